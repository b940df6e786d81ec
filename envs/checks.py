"""Checks of what users give. Games import nothing of the rest of ncrl, so this room has its own."""

from numbers import Integral
from typing import Any


def positive_integer(name: str, value: Any) -> int:
    """An integer of any kind as an `int`; ValueError for anything else, or below 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)
