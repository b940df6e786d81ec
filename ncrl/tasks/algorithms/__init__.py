"""Several algorithms in a sequence, by a Neural Turing machine."""

from __future__ import annotations

from collections.abc import Sequence

from ncrl.tasks.start import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment from the command line; returns the exit code."""
    return run(__name__, arguments)
