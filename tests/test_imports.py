"""The direction of imports: run_atari.py -> agents, envs, ncrl; agents -> ncrl; nothing else.

Sources are parsed, not imported, so an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"ncrl", "agents", "envs", "run_atari", "tests", "benchmarks"}
DYNAMIC_IMPORTS = {"import_module", "__import__"}


class Rule(NamedTuple):
    path: str
    """A file or a folder, relative to the repository."""
    ours: tuple[str, ...]
    """The packages of this repository that it may import."""
    only: frozenset[str] | None = None
    """The foreign packages that it may import; None: any."""


CORE = frozenset({"torch"}) | sys.stdlib_module_names
RULES = [
    Rule("run_atari.py", ("agents", "envs", "ncrl")),
    Rule("agents", ("agents", "ncrl")),
    Rule("envs", ("envs",)),
    Rule("ncrl", ("ncrl",)),
    Rule("ncrl/neurocoder", ("ncrl.neurocoder",), CORE),
    Rule("ncrl/baselines", ("ncrl.baselines",), CORE),
]


def imported_names(source: str, package: str) -> list[str]:
    """Full dotted names of everything a module of `package` imports, at any depth of the code."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = [*base, node.module] if node.level else [node.module]
            names += [".".join([*filter(None, prefix), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if called in DYNAMIC_IMPORTS and isinstance(argument, ast.Constant):
                names.append(str(argument.value))
    return names


def violations(rule: Rule, source: str, package: str) -> list[str]:
    wrong = []
    for name in imported_names(source, package):
        root = name.split(".")[0]
        if root in OURS:
            allowed = any(name == own or name.startswith(own + ".") for own in rule.ours)
        else:
            allowed = rule.only is None or root in rule.only
        if not allowed:
            wrong.append(name)
    return wrong


def sources(rule: Rule) -> list[Path]:
    path = ROOT / rule.path
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.path)
def test_imports_point_in_one_direction(rule: Rule) -> None:
    if not (ROOT / rule.path).exists():
        pytest.skip(f"{rule.path} does not exist")
    wrong = {}
    for path in sources(rule):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        found = violations(rule, path.read_text(encoding="utf-8"), package)
        if found:
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong, f"{rule.path} may import {rule.ours}: {wrong}"


@pytest.mark.parametrize("folder", ["ncrl", "ncrl/neurocoder", "agents"])
def test_sources_are_found(folder: str) -> None:
    paths = sources(Rule(folder, ()))
    assert paths
    assert any(
        imported_names(path.read_text(encoding="utf-8"), folder.replace("/", ".")) for path in paths
    )


CAUGHT = [
    ("agents", "import envs", "envs"),
    ("agents", "def f():\n    from envs.atari import Atari", "envs.atari.Atari"),
    ("agents", "import importlib\nimportlib.import_module('envs')", "envs"),
    ("envs", "from ncrl import inject", "ncrl.inject"),
    ("ncrl", "if TYPE_CHECKING:\n    import agents.losses as losses", "agents.losses"),
    ("ncrl/neurocoder", "import numpy as np", "numpy"),
    ("ncrl/neurocoder", "from .. import injection", "ncrl.injection"),
    ("ncrl/neurocoder", "from ncrl import NeurocoderLinear", "ncrl.NeurocoderLinear"),
    ("ncrl/baselines", "from stable_baselines3 import PPO", "stable_baselines3.PPO"),
    ("run_atari.py", "from tests import reference", "tests.reference"),
]


@pytest.mark.parametrize(("path", "source", "name"), CAUGHT)
def test_a_forbidden_import_is_caught(path: str, source: str, name: str) -> None:
    rule = next(rule for rule in RULES if rule.path == path)
    assert violations(rule, source, path.replace("/", ".")) == [name]


ALLOWED = [
    ("agents", "from ncrl import inject\nfrom . import losses\nimport numpy"),
    ("ncrl/neurocoder", "import math\nimport torch.nn.functional as F\nfrom .memory import Memory"),
    ("ncrl/neurocoder", "from __future__ import annotations\nfrom ..neurocoder import layer"),
    ("run_atari.py", "from agents import A3C\nimport envs, ncrl.sb3"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_an_allowed_import_is_not_caught(path: str, source: str) -> None:
    rule = next(rule for rule in RULES if rule.path == path)
    assert violations(rule, source, path.replace("/", ".")) == []
