"""What a policy is made of as JSON, and back, with nothing in between that could run code.

Numbers, strings, lists and dicts are themselves. Everything else is a dict whose entry "$" says
what it is: a tuple, an array, a class, a path, an object with the arguments that make it. Classes
are written by name, and read only if the name is one of a given list: nothing is imported.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent import policies as contrib_policies
from stable_baselines3.common import policies as sb3_policies
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from ncrl.networks import AtariEncoder, VectorEncoder
from ncrl.neurocoder import NeurocoderConfig
from ncrl.sb3 import policies

TAG = "$"
"""The entry that says what a dict stands for."""

MAX_ELEMENTS = 1 << 26
"""Of all arrays together that are read: few bytes can stand for large ones, all of one number."""

NUMBERS = "biuf"
"""Kinds of numpy types that are read: truth values, integers, floating point."""

CLASSES: tuple[type, ...] = (
    *(
        entry
        for module in (policies, sb3_policies, contrib_policies)
        for entry in vars(module).values()
        if isinstance(entry, type) and issubclass(entry, BaseModel)
    ),
    *(AtariEncoder, VectorEncoder, FlattenExtractor, NatureCNN, CombinedExtractor),
    *(LinearSchedule, ConstantSchedule, FloatSchedule, NeurocoderConfig, RMSpropTFLike),
)
"""Classes that are read without being named by the caller, besides those of `FAMILIES`."""

FAMILIES = {nn: nn.Module, torch.optim: torch.optim.Optimizer, spaces: spaces.Space}
"""Modules whose classes of that kind are written and read as `module.Class`."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "gymnasium.spaces.Box": ("low", "high", "dtype"),
    "gymnasium.spaces.Discrete": ("n", "start", "dtype"),
    "gymnasium.spaces.MultiDiscrete": ("nvec", "start", "dtype"),
    "gymnasium.spaces.MultiBinary": ("n",),
    "gymnasium.spaces.Dict": ("spaces",),
    "gymnasium.spaces.Tuple": ("spaces",),
    "stable_baselines3.common.utils.LinearSchedule": ("start", "end", "end_fraction"),
    "stable_baselines3.common.utils.ConstantSchedule": ("val",),
    "stable_baselines3.common.utils.FloatSchedule": ("value_schedule",),
    "rl_zoo3.utils.SimpleLinearSchedule": ("initial_value",),
}
"""Arguments, and attributes, that make an object of these classes; dataclasses say theirs."""


class PlainError(ValueError):
    """A description cannot be read."""


class UnknownClassError(PlainError):
    """A description names a class that is neither of ncrl, SB3 or torch nor given."""


def to_plain(value: Any, where: str) -> Any:
    """`value` as what `json.dumps` takes; `where` is what it is, for messages.

    Raises ValueError if it holds something that has no description, such as a function.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float or isinstance(value, Path):
        return {TAG: "float" if kind is float else "path", "value": str(value)}
    if kind in (list, tuple, deque, dict, OrderedDict):
        return _container(value, where)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in NUMBERS:
        return _array(np.asarray(value), "array" if kind is np.ndarray else "scalar")
    if isinstance(value, np.dtype):
        return {TAG: "dtype", "dtype": value.str}
    if isinstance(value, type):
        return {TAG: "class", "name": name_of(value)}
    names = _arguments(kind)
    if names is None:
        raise ValueError(f"{where} holds a {name_of(kind)}, which has no description as JSON")
    if kind is spaces.Discrete and value.dtype == np.int64:
        names = ("n", "start")  # older releases of Gymnasium know no other type
    arguments = {name: getattr(value, name) for name in names}
    for name, part in arguments.items():
        arguments[name] = to_plain(part.item() if isinstance(part, np.generic) else part, where)
    return {TAG: "object", "class": name_of(kind), "arguments": arguments}


def _container(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: to_plain(part, where) for key, part in value.items()}
        return {TAG: "dict", "items": to_plain([list(pair) for pair in value.items()], where)}
    items = [to_plain(part, where) for part in value]
    if isinstance(value, list):
        return items
    if isinstance(value, tuple):
        return {TAG: "tuple", "items": items}
    return {TAG: "deque", "items": items, "maxlen": value.maxlen}


def from_plain(
    plain: Any, where: str, classes: Iterable[type] = (), given: Iterable[type] = ()
) -> Any:
    """What `to_plain` was given, from what `json.loads` returns.

    Args:
        plain: the description.
        where: what it is of, for messages.
        classes: known by their whole names, besides `CLASSES` and `FAMILIES`.
        given: named by the caller, so known in whatever module they are. A script calls its own
            module `__main__`, and whoever imports the script does not.

    Raises:
        ValueError: for what `to_plain` never makes, and for classes that are not known.
    """
    given = tuple(given)
    known = {name_of(kind): kind for kind in (*CLASSES, *_of_rl_zoo3(), *classes, *given)}
    try:
        return _Reader(where, known, given).read(plain)
    except RecursionError as error:
        raise PlainError(f"{where} is nested too deeply") from error


def name_of(kind: type) -> str:
    """The name by which a class is written: `module.Class`."""
    for module in FAMILIES:
        if getattr(module, kind.__name__, None) is kind:
            return f"{module.__name__}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _array(array: np.ndarray, tag: str) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"))
    data = little.tobytes()
    if data == data[: little.itemsize] * little.size:  # all equal, as the bounds of images
        data = data[: little.itemsize]
    text = base64.b64encode(data).decode()
    return {TAG: tag, "dtype": little.dtype.str, "shape": list(array.shape), "base64": text}


def _arguments(kind: type) -> tuple[str, ...] | None:
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind) if field.init)
    return ARGUMENTS.get(name_of(kind))


def _of_rl_zoo3() -> Iterable[type]:
    """Its schedule, if it is rl_zoo3 that reads."""
    schedule = getattr(sys.modules.get("rl_zoo3.utils"), "SimpleLinearSchedule", None)
    return () if schedule is None else (schedule,)


class _Reader:
    """Reads values for one place; every fault is a `PlainError` that names it."""

    def __init__(self, where: str, known: Mapping[str, type], given: tuple[type, ...]) -> None:
        self.where, self.known, self.given, self.elements = where, known, given, 0

    def read(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.read(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        if TAG not in plain:
            return {key: self.read(item) for key, item in plain.items()}
        tag = plain[TAG]
        readers: dict[str, Callable[[], Any]] = {
            "float": lambda: float(plain["value"]),
            "path": lambda: Path(plain["value"]),
            "tuple": lambda: tuple(self.read(plain["items"])),
            "deque": lambda: deque(self.read(plain["items"]), plain["maxlen"]),
            "dict": lambda: dict(self.read(plain["items"])),
            "dtype": lambda: self.dtype(plain).type,
            "array": lambda: self.array(plain),
            "scalar": lambda: self.array(plain)[()],
            "class": lambda: self.find(plain["name"]),
            "object": lambda: self.object(plain),
        }
        if not isinstance(tag, str) or tag not in readers:
            raise self.fault(f"{TAG}: {tag!r}")
        try:
            return readers[tag]()
        except (PlainError, RecursionError):
            raise
        except Exception as error:  # numpy, Gymnasium and others raise anything
            raise self.fault(f"an impossible {tag} ({error})") from error

    def fault(self, what: str) -> PlainError:
        what = " ".join(what.split())[:200]
        return PlainError(f"{self.where} holds {what}, which cannot be read")

    def dtype(self, plain: dict[str, Any]) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(plain["dtype"])
        if dtype.kind not in NUMBERS:
            raise self.fault(f"the type {dtype}")
        return dtype

    def array(self, plain: dict[str, Any]) -> np.ndarray:
        dtype, shape = self.dtype(plain), plain["shape"]
        self.elements += math.prod(shape)
        if self.elements > MAX_ELEMENTS:
            raise self.fault(f"the shape {shape}, and with it more than {MAX_ELEMENTS} elements")
        data = np.frombuffer(base64.b64decode(plain["base64"], validate=True), dtype)
        data = np.broadcast_to(data[0], shape) if data.size == 1 else data.reshape(shape)
        return data.astype(dtype.newbyteorder("="))  # which is writable as well

    def find(self, name: str) -> type:
        if name in self.known:
            return self.known[name]
        for module, base in FAMILIES.items():
            prefix, _, last = name.rpartition(".")
            found = getattr(module, last, None) if prefix == module.__name__ else None
            if isinstance(found, type) and issubclass(found, base):
                return found
        for kind in self.given:
            if name.endswith(f".{kind.__qualname__}"):
                return kind
        raise UnknownClassError(
            f"{self.where} refers to the class {name[:200]!r}, which is not known here"
        )

    def object(self, plain: dict[str, Any]) -> Any:
        kind = self.find(plain["class"])
        names = _arguments(kind)
        if names is None or not plain["arguments"].keys() <= set(names):
            raise self.fault(f"an impossible {kind.__name__}")
        arguments = self.read(plain["arguments"])
        if kind is spaces.Dict:  # which would sort the entries of another mapping
            arguments["spaces"] = OrderedDict(arguments["spaces"])
        return kind(**arguments)
