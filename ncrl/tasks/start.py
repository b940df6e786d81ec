"""Starts an experiment by the name of its folder, which is loaded no sooner."""

from __future__ import annotations

import importlib
from collections.abc import Sequence


def run(package: str, arguments: Sequence[str] | None) -> int:
    """`main` of the module `experiment` of a package, with command-line arguments."""
    code: int = importlib.import_module(f"{package}.experiment").main(arguments)
    return code
