"""Files of settings in YAML: small and plain."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ncrl.checks import shown, suggest
from ncrl.files import given_path, read_bytes

LARGEST_YAML = 1 << 17
"""Bytes of a file of settings."""


def find_config(name: str, folder: Path) -> Path:
    """A file of settings, by its path or by its name in a folder; ValueError if there is none."""
    path = given_path(name)
    for found in (path, folder / name, folder / f"{name}.yaml"):
        if os.path.isfile(found):  # false also for a name that is too long
            return found
    if os.path.lexists(path):
        return path  # who reads it says what is wrong with it
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    raise ValueError(f"there is no config {shown(name)}; {suggest(Path(name).stem, known)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name; ValueError, naming the file, if there is no such."""
    data = read_bytes(path, LARGEST_YAML)
    try:
        values = parse_yaml(data.decode())
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
        raise ValueError(f"{path} must hold settings as 'name: value' lines, got {shown(values)}")
    return values


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few bytes of which stand for billions of values
            raise ValueError("it repeats a value by an alias (*name): write the value again")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.most_common(1):
            if times > 1:  # PyYAML would take the last of them
                raise ValueError(f"it names {shown(name)} {times} times")
        return node


def parse_yaml(text: str) -> Any:
    """Plain values from YAML; ValueError, in one line, for whatever is wrong with it."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # for a value that its tag does not fit, PyYAML raises anything
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())[:200]}") from error
