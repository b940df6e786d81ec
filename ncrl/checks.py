"""Checks of what users give, and the words of their messages.

A message names the value, what was expected and, where there is one, the nearest valid choice.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any

LONGEST_VALUE = 80
"""Characters of a value that a message shows."""


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got {shown(value)}; "
            f"nearest: {nearest(shown(value), choices)}"
        )


def require_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise ValueError unless a number lies between two others."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low:.12g} .. {high:.12g}, got {shown(value)}")


def whole_number(name: str, value: Any, *, least: int = 1) -> int:
    """An integer of any kind as an `int`; ValueError for anything else, or less."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    return int(value)


def require_switch(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def shown(value: Any) -> str:
    """A value for a message: `repr`, cut off where it is long, whatever it is made of.

    YAML can name one list many times, so that 300 bytes are a list of millions of words.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, LONGEST_VALUE, LONGEST_VALUE
    # It would turn the whole number into text before it cuts.
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_VALUE:
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    return shortened(short.repr(value), LONGEST_VALUE)


def shortened(text: str, longest: int) -> str:
    """The text, without its middle where it is longer than that."""
    if len(text) <= longest:
        return text
    kept = (longest - 5) // 2
    return f"{text[:kept]} ... {text[-kept:]}"


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice that looks most like `name`; "none" if there is no choice."""
    return (difflib.get_close_matches(name, list(choices), n=1, cutoff=0) or ["none"])[0]


def suggest(name: str, choices: Collection[str]) -> str:
    """A hint for a message: the nearest choice, or all of them where none looks like `name`."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f"nearest: {close[0]}" if close else f"choose one of {', '.join(choices)}"
