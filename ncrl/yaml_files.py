"""Files of settings in YAML: small, plain, and of no more values than people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ncrl.files import read_bytes
from ncrl.settings import shown

LARGEST_YAML = 1 << 17
"""Bytes of a file of settings."""

MOST_YAML_VALUES = 10_000
"""In a file of settings, counted where they are repeated: aliases of a few bytes can stand for
billions of values."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name.

    Raises:
        ValueError: in one line that names the file, if it cannot be read or holds anything else.
    """
    data = read_bytes(path, LARGEST_YAML)
    try:
        values = parse_yaml(data.decode())
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
        raise ValueError(f"{path} must hold settings as 'name: value' lines, got {shown(values)}")
    return values


class _Loader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<), which repeat what is merged."""
        super().flatten_mapping(node)
        if len(node.value) > MOST_YAML_VALUES:
            raise ValueError(f"it stands for more than {MOST_YAML_VALUES:,} values")


def parse_yaml(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        ValueError: in one line, for whatever is wrong with it.
    """
    try:
        values = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # for a value that its tag does not fit, PyYAML raises anything
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())[:200]}") from error
    count, pending = 0, [values]
    while pending:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            pending += value
        if count + len(pending) > MOST_YAML_VALUES:
            raise ValueError(f"it stands for more than {MOST_YAML_VALUES:,} values")
    return values
