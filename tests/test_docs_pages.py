"""The Python examples of README.md and of pages without a test of their own run; pages are tidy."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.logger import KVWriter, Logger

from ncrl.agents import A3C
from ncrl.envs import key_and_door

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED = ("quickstart", "neurocoder", "exploration", "injection", "sb3")
WITH_EXAMPLES = ("README.md", *(f"docs/{name}.md" for name in EXPLAINED))
TIDY = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "results").glob("*.md"))]
TIDY += sorted((ROOT / "docs").glob("*.md"))
PRINTED = {
    "docs/sb3.md-0": r"both trained",
    "docs/sb3.md-1": r"\d+ \+- \d+ of 500",
    "docs/sb3.md-2": r"400 timesteps by 2 workers",
    "docs/sb3.md-3": r"400 timesteps",
    "docs/sb3.md-4": r"\d+ \+- \d+ of 500\n\[ True  True  True  True\]",
}
"""What the last lines say, of programs that print what their pages do not show."""


def examples(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PROGRAMS = [
    pytest.param(program, PRINTED.get(f"{page}-{number}"), id=f"{page}-{number}")
    for page in WITH_EXAMPLES
    for number, program in enumerate(examples(page))
]


def printed_by_process(path: Path) -> str:
    words = [sys.executable, "-W", "error::DeprecationWarning:__main__", path.name]
    done = subprocess.run(words, cwd=path.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def printed_here(path: Path) -> str:
    output = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(output):
        warnings.simplefilter("error")
        runpy.run_path(str(path))
    return output.getvalue()


@pytest.mark.parametrize(("program", "printed"), PROGRAMS)
def test_an_example_runs_and_prints_what_it_says(
    program: str, printed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trainings are cut short; nothing else is changed.
    short = re.sub(r"\.learn\([\d_]+", ".learn(400", program)
    short = re.sub(r"eval_freq=\d+", "eval_freq=20", short)  # of 8 timesteps each
    path = tmp_path / "example.py"
    path.write_text(short, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # Worker processes import the program that starts them.
    output = printed_by_process(path) if "__main__" in program else printed_here(path)
    if printed:
        assert re.search(printed + r"\n\Z", output), output
    said = re.search(r"print\(.*\)\s*# (torch.*)", program)
    if said:
        assert output.strip() == said[1].strip()


def test_the_bonus_of_the_example_begins() -> None:
    example, *_ = examples("docs/exploration.md")
    names: dict[str, Any] = {"__name__": "example"}
    exec(example, names)
    assert "int_reward" in names["model"].learner.explored


@pytest.mark.parametrize(
    ("policy", "env", "options"),
    [
        (
            "NeurocoderMlpLstmPolicy",
            key_and_door(length=3),
            {"intrinsic_reward": "snd", "intrinsic_kwargs": {"warmup_timesteps": 20}},
        ),
        ("MlpPolicy", "Pendulum-v1", {"policy_kwargs": {"head": "moe"}}),
    ],
    ids=["exploring", "plain"],
)
def test_the_page_of_curves_names_what_is_drawn(policy: str, env: Any, options: Any) -> None:
    """And nothing else, but for what only some environments tell or only a fault shows."""
    drawn: set[str] = set()

    class Curves(KVWriter):
        def write(self, key_values: dict[str, Any], *_: Any) -> None:
            drawn.update(key_values)

    model = A3C(policy, env, n_workers=1, n_envs=4, profile=True, device="cpu", seed=0, **options)
    model.set_logger(Logger(None, [Curves()]))
    model.learn(3_000, log_interval=10)
    page = (ROOT / "docs" / "curves.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+/[\w/<>]+)`", page))
    drawn = {re.sub(r"^(profile/\w+/)\w+", r"\1<phase>", name) for name in drawn}
    heads = r"^(neurocoder/(?!residual|slot)\w+)/(?:actor|critic)"
    drawn = {re.sub(heads, r"\1", name) for name in drawn}
    assert drawn <= named
    rare = {"rollout/success_rate", "train/std", "train/balance_loss", "train/<name>"}
    assert policy == "MlpPolicy" or named - drawn == rare


@pytest.mark.parametrize("page", TIDY, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_can_be_read(page: Path) -> None:
    """Prose has at most 110 characters a line; tables, pictures, code and comments cannot wrap."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 110 and line[:1] not in ("|", "!")]
    assert not long


def test_pages_of_results_are_short() -> None:
    for page in (ROOT / "results").glob("*.md"):
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 125, page.name


def test_the_commands_that_ci_and_readers_copy_are_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    setup = r"python3 -m venv \.venv && \.venv/bin/pip install .*-c constraints\.txt -e '\.\[{}\]'"
    assert len(re.findall("^" + setup.format("dev") + ".* pytest .*$", text, re.M)) == 1
    assert len(re.findall("^" + setup.format("all") + ".* run_atari.py --env .*$", text, re.M)) == 1
