"""Settings of a command: a frozen dataclass that is its flags, its YAML file and its documentation.

Bad input ends with one line and exit code 2; the line names the value, what was expected and the
nearest valid choice.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import reprlib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import field, fields, replace
from numbers import Real
from typing import Any, NoReturn, TypeVar

EXIT_USAGE, EXIT_SIGINT = 2, 130

LONGEST_VALUE, LONGEST_MESSAGE = 80, 600
"""Characters of a value that a message shows, and of a message."""

Config = TypeVar("Config")


def setting(
    default: Any, text: str, *, low: float = -math.inf, high: float = math.inf, choices: Any = ()
) -> Any:
    """A dataclass field with its documentation and what it may hold."""
    return field(
        default=default, metadata={"help": text, "low": low, "high": high, "choices": choices}
    )


def same_as(config_class: Any, name: str) -> Any:
    """A dataclass field like the one of that name in another dataclass of settings."""
    entry = config_class.__dataclass_fields__[name]
    return field(default=entry.default, metadata=entry.metadata)


def check(config: Any) -> None:
    """Raise ValueError for a `setting` of a dataclass that has an impossible value, TypeError for
    one that must be a number and is none."""
    for entry in fields(config):
        value, rules = getattr(config, entry.name), entry.metadata
        if value is None and "None" in str(entry.type):
            continue
        if rules["choices"]:
            require_choice(entry.name, value, rules["choices"])
        if str(entry.type).startswith("float") and not isinstance(value, Real):
            raise TypeError(f"{entry.name} must be a number, got {shown(value)}")
        if isinstance(value, Real):
            require_range(entry.name, value, rules["low"], rules["high"])
        if isinstance(value, Real) and not isinstance(value, int) and not math.isfinite(value):
            raise ValueError(f"{entry.name} must be a finite number, got {value}")


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


def configure(values: dict[str, Any], base: Config, source: str) -> Config:
    """`base`, a dataclass, with the settings of a YAML file or of flags put in place.

    Raises ValueError, which names the `source`, for unknown settings and impossible values.
    """
    config = replace(base, **typed_values(values, type(base), source))  # type: ignore[type-var]
    check(config)
    return config


def typed_values(values: Mapping[str, Any], config_class: Any, source: str) -> dict[str, Any]:
    """The settings in the types of the dataclass; see `configure`."""
    types = {entry.name: str(entry.type) for entry in fields(config_class)}
    for name in values:
        if name not in types:
            hint = nearest(shown(name), types)
            raise ValueError(f"unknown setting {shown(name)} in {source}; nearest: {hint}")
    return {name: _as_type(name, value, types[name], source) for name, value in values.items()}


def add_flags(
    parser: argparse._ActionsContainer,
    config_class: type,
    *,
    only: Collection[str] | None = None,
    show_defaults: bool = True,
) -> None:
    """One flag per field, or per field in `only`."""
    for entry in fields(config_class):
        if only is not None and entry.name not in only:
            continue
        text = entry.metadata["help"]
        if show_defaults and entry.default is not None and entry.default != "":
            text += f" (default: {entry.default})"
        names = [f"--{entry.name.replace('_', '-')}"]
        if "_" in entry.name:
            names.append(f"--{entry.name}")
        if entry.type == "bool":
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
            continue
        kind = {"float": float, "str": str}.get(str(entry.type).split(" ")[0], int)
        parser.add_argument(*names, type=kind, metavar=kind.__name__.upper(), help=text)


def make_parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser for `parse`, whose flags are absent unless given."""
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The flags that are given, by name; ends the process if they make no sense."""
    try:
        namespace, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        usage_error(parser.prog, str(error))
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for word in unknown:
        hint = nearest(word.split("=")[0][:LONGEST_VALUE], flags)
        usage_error(parser.prog, f"unknown argument {shown(word)}; nearest: {hint}")
    return vars(namespace)


def usage_error(program: str, message: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    print(f"{program}: {_shortened(' '.join(message.split()), LONGEST_MESSAGE)}", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)


def shown(value: Any) -> str:
    """A value for a message: `repr`, cut off where it is long, whatever it is made of.

    YAML can name one list many times, so that 300 bytes are a list of millions of words.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, LONGEST_VALUE, LONGEST_VALUE
    # It would turn the whole number into text before it cuts.
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_VALUE:
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    return _shortened(short.repr(value), LONGEST_VALUE)


def _shortened(text: str, longest: int) -> str:
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


def _as_type(name: str, value: Any, expected: str, source: str) -> Any:
    kind = expected.split(" ")[0]
    if value is None and "None" in expected:
        return None
    if kind == "float" and isinstance(value, str):  # YAML reads 7e-4, without a point, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of hundreds of digits
            value = float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{name} in {source} must be of type {kind}, got {shown(value)}")
    return value
