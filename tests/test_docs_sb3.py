"""The examples of docs/sb3.md run as they stand there, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "sb3.md"
TEXT = PAGE.read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PRINTED = (
    r"both trained",
    r"\d+ \+- \d+ of 500",
    r"20000 timesteps by 2 workers",
    r"5000 timesteps",
    r"\d+ \+- \d+ of 500\n\[ True  True  True  True\]",
)
"""What the last lines of the programs' output say, in their order."""


def test_no_example_is_missed() -> None:
    assert len(PROGRAMS) == len(PRINTED) == TEXT.count("```python")


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_an_example_runs(number: int, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(PROGRAMS[number], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", program.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[number] + r"\n\Z", done.stdout), done.stdout
    assert "Warning" not in done.stderr, done.stderr
