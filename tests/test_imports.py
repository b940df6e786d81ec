"""The direction of imports: run_atari.py -> ncrl.agents, ncrl.envs -> the rest of ncrl.

Sources are parsed, not imported, so an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
import os
import subprocess
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
    but: tuple[str, ...] = ()
    """Packages within those that it may not."""
    only: frozenset[str] | None = None
    """The foreign packages that it may import; None: any."""


CORE = frozenset({"torch"}) | sys.stdlib_module_names
RULES = [
    Rule("run_atari.py", ("ncrl",)),
    Rule("agents", ("ncrl",)),
    Rule("envs", ("ncrl.envs",)),
    Rule("ncrl", ("ncrl",), but=("ncrl.agents", "ncrl.envs")),
    Rule("ncrl/cli.py", ("ncrl",), but=("ncrl.envs",)),
    Rule("ncrl/neurocoder", ("ncrl.neurocoder", "ncrl.seat", "ncrl.checks"), only=CORE),
    Rule("ncrl/baselines", ("ncrl.baselines", "ncrl.seat"), only=CORE),
    Rule("ncrl/seat.py", ("ncrl.checks",), only=CORE),
    Rule("ncrl/checks.py", (), only=frozenset(sys.stdlib_module_names)),
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


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(rule: Rule, source: str, package: str) -> list[str]:
    wrong = []
    for name in imported_names(source, package):
        root = name.split(".")[0]
        if root in OURS:
            allowed = is_within(name, rule.ours) and not is_within(name, rule.but)
        else:
            allowed = rule.only is None or root in rule.only
        if not allowed:
            wrong.append(name)
    return wrong


def package_of(folder: Path) -> str:
    """`agents` and `envs` are parts of `ncrl`, wherever they lie."""
    parts = folder.parts
    return ".".join(("ncrl", *parts) if parts[:1] in (("agents",), ("envs",)) else parts)


def sources(rule: Rule) -> list[Path]:
    """Links are not followed: `ncrl/agents` and `ncrl/envs` are the folders `agents`, `envs`."""
    path = ROOT / rule.path
    if path.is_file():
        return [path]
    return [file for file in python_files(path) if not has_own_rule(file, rule)]


def python_files(folder: Path) -> list[Path]:
    found = [Path(top) / name for top, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.suffix == ".py")


def has_own_rule(path: Path, rule: Rule) -> bool:
    return any(path == ROOT / other.path for other in RULES if other != rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.path)
def test_imports_point_in_one_direction(rule: Rule) -> None:
    if not (ROOT / rule.path).exists():
        pytest.skip(f"{rule.path} does not exist")
    wrong, paths = {}, sources(rule)
    assert paths
    for path in paths:
        package = package_of(path.relative_to(ROOT).parent)
        found = violations(rule, path.read_text(encoding="utf-8"), package)
        if found:
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong, f"{rule.path} may import {rule.ours}: {wrong}"


CAUGHT = [
    ("agents", "import envs", "envs"),
    ("agents", "from agents import losses", "agents.losses"),
    ("agents", "import importlib\nimportlib.import_module('run_atari')", "run_atari"),
    ("envs", "from ncrl import inject", "ncrl.inject"),
    ("envs", "def f():\n    from ncrl.agents import A3C", "ncrl.agents.A3C"),
    (
        "ncrl",
        "if TYPE_CHECKING:\n    import ncrl.agents.learning.losses as losses",
        "ncrl.agents.learning.losses",
    ),
    ("ncrl", "from ncrl.envs import atari", "ncrl.envs.atari"),
    ("ncrl/neurocoder", "import numpy as np", "numpy"),
    ("ncrl/neurocoder", "from .. import injection", "ncrl.injection"),
    ("ncrl/neurocoder", "from ncrl import NeurocoderLinear", "ncrl.NeurocoderLinear"),
    ("ncrl/baselines", "from stable_baselines3 import PPO", "stable_baselines3.PPO"),
    ("run_atari.py", "from tests import reference", "tests.reference"),
]


@pytest.mark.parametrize(("path", "source", "name"), CAUGHT)
def test_a_forbidden_import_is_caught(path: str, source: str, name: str) -> None:
    rule = next(rule for rule in RULES if rule.path == path)
    assert violations(rule, source, package_of(Path(path))) == [name]


ALLOWED = [
    ("agents", "from ncrl import envs, inject\nfrom . import losses\nimport numpy"),
    ("ncrl/neurocoder", "import math\nimport torch.nn.functional as F\nfrom .memory import Memory"),
    ("ncrl/neurocoder", "from __future__ import annotations\nfrom ..neurocoder import layer"),
    ("run_atari.py", "from ncrl.agents import A3C\nimport ncrl.envs, ncrl.sb3"),
]


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_an_allowed_import_is_not_caught(path: str, source: str) -> None:
    rule = next(rule for rule in RULES if rule.path == path)
    assert violations(rule, source, package_of(Path(path))) == []


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, the last one the first; empty if there is no such."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for following in sorted(graph[module]):
            if circle := visit(following, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), [])


def import_graph() -> dict[str, set[str]]:
    """The modules of `ncrl`, `agents` and `envs`, and which of them each one imports.

    Importing a name of a package is importing the package; its `__init__` is not asked who made it.
    """
    paths = [p for folder in ("ncrl", "agents", "envs") for p in python_files(ROOT / folder)]
    modules = {}
    for path in paths:
        place = path.relative_to(ROOT)
        package = package_of(place.parent)
        name = package if path.stem == "__init__" else f"{package}.{path.stem}"
        modules[name] = (path, package)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, (path, package) in modules.items():
        for imported in imported_names(path.read_text(encoding="utf-8"), package):
            parts = imported.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            longest = next((prefix for prefix in prefixes if prefix in modules), None)
            if longest is not None and longest != name:
                graph[name].add(longest)
    return graph


def test_no_imports_go_round_in_a_circle() -> None:
    graph = import_graph()
    assert len(graph) > 100 and graph["ncrl.agents.a3c"]
    assert find_circle(graph) == []


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    names = imported_names("if TYPE_CHECKING:\n    from ncrl.agents.a3c import A3C", "ncrl.agents")
    assert names == ["ncrl.agents.a3c.A3C"]


LOADED = """
import sys, {envs}
assert "ale_py" not in sys.modules
import {agents}, run_atari
assert "ray" not in sys.modules, "nobody pays for it on one machine"
from agents import *; from envs import *
assert agents is ncrl.agents and envs is ncrl.envs
modules = [m for k, m in sys.modules.items() if k.split(".")[0] in ("agents", "envs")]
assert modules and all(m.__name__.startswith("ncrl.") for m in modules), modules
"""


@pytest.mark.parametrize("order", ["ncrl.{0}, {0}", "{0}, ncrl.{0}"])
def test_packages_are_never_loaded_twice_nor_what_is_not_needed(order: str) -> None:
    """In a clone the folder lies on the path, too; under its own name it is the same package."""
    code = LOADED.format(envs=order.format("envs"), agents=order.format("agents"))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
