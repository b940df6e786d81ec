"""Settings of a command: a frozen dataclass that is its flags, its YAML file and its documentation.

Bad input ends with one line and exit code 2; the line names the value, what was expected and the
nearest valid choice.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ncrl.checks import LONGEST_VALUE, nearest, require_choice, require_range, shortened, shown

EXIT_FAILED, EXIT_USAGE, EXIT_SIGINT = 1, 2, 130

LONGEST_MESSAGE = 600
"""Characters of a message."""

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
        flag = f"--{entry.name.replace('_', '-')}"
        if str(entry.type).startswith("bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        kind = {"float": float, "str": str}.get(str(entry.type).split(" ")[0], int)
        metavar = "|".join(entry.metadata["choices"]) or kind.__name__.upper()
        parser.add_argument(flag, type=kind, metavar=metavar, help=text)


def is_ncrl() -> bool:
    """Whether this process was started as the command `ncrl`, also as `python -m ncrl`."""
    started = Path(sys.argv[0]).parts
    return started[-1:] == ("ncrl",) or started[-2:] == ("ncrl", "__main__.py")


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
    """The flags that are given, by name; ends the process if they make no sense.

    They may be written with underlines, as the settings are in files.
    """
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), w) for w in arguments]
    try:
        namespace, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        usage_error(parser.prog, str(error))
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for word in unknown:
        if not word.startswith("-"):
            rule = "a value follows its flag, and switches are --NAME or --no-NAME"
            usage_error(parser.prog, f"{shown(word)} stands alone: {rule}")
        hint = nearest(word.split("=")[0][:LONGEST_VALUE], flags)
        usage_error(parser.prog, f"unknown argument {shown(word)}; nearest: {hint}")
    return vars(namespace)


def usage_error(program: str, message: str) -> NoReturn:
    """One line on stderr and exit code 2."""
    print(f"{program}: {shortened(' '.join(message.split()), LONGEST_MESSAGE)}", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)


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
