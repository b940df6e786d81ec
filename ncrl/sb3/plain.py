"""What a policy is made of as JSON, and back, with nothing in between that could run code.

Numbers, strings, lists and dicts are themselves. Everything else is a dict whose entry "$" says
what it is: a tuple, an array, a Gymnasium space, a schedule, a class. Classes, and objects of them,
are written by name, and read only if the name is one of a given list: nothing is imported.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from torch import nn

from ncrl.networks import AtariEncoder, VectorEncoder
from ncrl.neurocoder import NeurocoderConfig
from ncrl.sb3 import feedforward, recurrent

TAG = "$"
"""The entry that says what a dict stands for."""

MAX_ELEMENTS = 1 << 26
"""Largest array or space that is read; a space keeps two arrays of its size."""

NUMBERS = "biuf"
"""Kinds of numpy types that are read: truth values, integers, floating point."""

CLASSES: tuple[type, ...] = (
    *(
        entry
        for module in (feedforward, recurrent)
        for entry in vars(module).values()
        if isinstance(entry, type) and entry.__module__ == module.__name__
    ),
    *(ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy),
    *(RecurrentActorCriticPolicy, RecurrentActorCriticCnnPolicy),
    RecurrentMultiInputActorCriticPolicy,
    *(AtariEncoder, VectorEncoder, FlattenExtractor, NatureCNN, CombinedExtractor),
    *(LinearSchedule, ConstantSchedule, FloatSchedule, NeurocoderConfig, RMSpropTFLike),
)
"""Classes that are read without being named by the caller, besides those of torch."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "stable_baselines3.common.utils.LinearSchedule": ("start", "end", "end_fraction"),
    "stable_baselines3.common.utils.ConstantSchedule": ("val",),
    "stable_baselines3.common.utils.FloatSchedule": ("value_schedule",),
    "rl_zoo3.utils.SimpleLinearSchedule": ("initial_value",),
}
"""Arguments, and attributes, that make an object of these classes; dataclasses say theirs."""


class UnknownClassError(ValueError):
    """A description names a class that is neither of ncrl, SB3 or torch nor given."""


def name_of(kind: type) -> str:
    """The name by which a class is written: `module.Class`, for torch's own `torch.nn.Class`."""
    for module in (nn, torch.optim):
        if getattr(module, kind.__name__, None) is kind:
            return f"{module.__name__}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def to_plain(value: Any, where: str) -> Any:
    """`value` as what `json.dumps` takes.

    Args:
        where: what it is, for messages.

    Raises:
        ValueError: if it holds something that has no description, such as a function.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {TAG: "float", "value": str(value)}
    if type(value) in (list, tuple, deque, dict, OrderedDict):
        return _container(value, where)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in NUMBERS:
        return _array(np.asarray(value), scalar=isinstance(value, np.generic))
    if isinstance(value, type):
        return {TAG: "class", "name": name_of(value)}
    if type(value) in SPACES:
        return {TAG: "space", "kind": type(value).__name__, **_space(value, where)}
    names = _arguments(type(value))
    if names is not None:
        arguments = {name: to_plain(getattr(value, name), where) for name in names}
        return {TAG: "object", "class": name_of(type(value)), "arguments": arguments}
    raise ValueError(f"{where} holds a {name_of(type(value))}, which has no description as JSON")


def from_plain(plain: Any, where: str, classes: Iterable[type] = ()) -> Any:
    """What `to_plain` was given.

    Args:
        plain: as `json.loads` returns it.
        where: what it is, for messages.
        classes: that may be used besides `CLASSES` and the modules and optimisers of torch.

    Raises:
        ValueError: for a class that is not known, and for what `to_plain` never makes.
    """
    known = {name_of(kind): kind for kind in (*CLASSES, *_of_rl_zoo3(), *classes)}
    try:
        return _Reader(where, known).read(plain)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error


def _container(value: Any, where: str) -> Any:
    if type(value) is list:
        return [to_plain(item, where) for item in value]
    if type(value) in (dict, OrderedDict):
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: to_plain(item, where) for key, item in value.items()}
        items = [[to_plain(part, where) for part in pair] for pair in value.items()]
        return {TAG: "dict", "items": items}
    items = [to_plain(item, where) for item in value]
    if type(value) is tuple:
        return {TAG: "tuple", "items": items}
    return {TAG: "deque", "items": items, "maxlen": value.maxlen}


def _array(array: np.ndarray, *, scalar: bool) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"))
    return {
        TAG: "scalar" if scalar else "array",
        "dtype": little.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


SPACES = (
    *(spaces.Box, spaces.Discrete, spaces.MultiDiscrete),
    *(spaces.MultiBinary, spaces.Dict, spaces.Tuple),
)


def _space(space: Any, where: str) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        low, high = (_bound(bound) for bound in (space.low, space.high))
        return {"low": low, "high": high, "shape": list(space.shape), "dtype": space.dtype.str}
    if isinstance(space, spaces.Discrete):
        return {"n": int(space.n), "start": int(space.start), "dtype": np.dtype(space.dtype).str}
    if isinstance(space, spaces.MultiDiscrete):
        start = _array(np.asarray(space.start), scalar=False)
        return {"nvec": _array(space.nvec, scalar=False), "start": start, "dtype": space.dtype.str}
    if isinstance(space, spaces.MultiBinary):
        return {"n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
    if isinstance(space, spaces.Dict):
        return {"spaces": [[key, to_plain(part, where)] for key, part in space.spaces.items()]}
    return {"spaces": [to_plain(part, where) for part in space.spaces]}


def _bound(bound: np.ndarray) -> Any:
    """One number where all are equal, as for images."""
    if bound.size and (bound == bound.flat[0]).all():
        return _array(np.asarray(bound.flat[0]), scalar=True)
    return _array(bound, scalar=False)


def _arguments(kind: type) -> tuple[str, ...] | None:
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind) if field.init)
    return ARGUMENTS.get(name_of(kind))


def _of_rl_zoo3() -> Iterable[type]:
    """Its schedule, if it is rl_zoo3 that reads."""
    schedule = getattr(sys.modules.get("rl_zoo3.utils"), "SimpleLinearSchedule", None)
    return () if schedule is None else (schedule,)


class _Reader:
    """Reads values for one place; every fault is a ValueError that names it."""

    def __init__(self, where: str, known: Mapping[str, type]) -> None:
        self.where = where
        self.known = known

    def read(self, plain: Any) -> Any:
        if plain is None or isinstance(plain, (bool, int, float, str)):
            return plain
        if isinstance(plain, list):
            return [self.read(item) for item in plain]
        if not isinstance(plain, dict):
            raise self.fault(f"a {type(plain).__name__}")
        if TAG not in plain:
            return {key: self.read(item) for key, item in plain.items()}
        readers = {
            "float": lambda: float(self.get(plain, "value", str)),
            "tuple": lambda: tuple(self.read_items(plain)),
            "deque": lambda: deque(self.read_items(plain), self.get(plain, "maxlen", int, None)),
            "dict": lambda: dict(self.pair(pair) for pair in self.get(plain, "items", list)),
            "array": lambda: self.array(plain),
            "scalar": lambda: self.array(plain)[()],
            "class": lambda: self.find(self.get(plain, "name", str)),
            "space": lambda: self.space(plain),
            "object": lambda: self.object(plain),
        }
        reader = readers.get(plain[TAG]) if isinstance(plain[TAG], str) else None
        if reader is None:
            raise self.fault(f"{TAG}: {plain[TAG]!r}")
        try:
            return reader()  # type: ignore[no-untyped-call]
        except (TypeError, AssertionError, KeyError, OverflowError, MemoryError) as error:
            raise self.fault(f"an impossible {plain[TAG]} ({error})") from error

    def fault(self, what: str) -> ValueError:
        return ValueError(
            f"{self.where} holds {' '.join(what.split())[:200]}, which cannot be read"
        )

    def get(self, plain: dict[str, Any], key: str, *kinds: type | None) -> Any:
        """An entry that must have one of these types."""
        value = plain.get(key)
        if not any(value is None if kind is None else type(value) is kind for kind in kinds):
            raise self.fault(f"{plain[TAG]} with {key}: {value!r}")
        return value

    def read_items(self, plain: dict[str, Any]) -> list[Any]:
        return [self.read(item) for item in self.get(plain, "items", list)]

    def pair(self, plain: Any) -> tuple[Any, Any]:
        if not (isinstance(plain, list) and len(plain) == 2):
            raise self.fault("a dict of other things than pairs")
        return self.read(plain[0]), self.read(plain[1])

    def shape(self, plain: dict[str, Any]) -> tuple[int, ...]:
        shape = self.get(plain, "shape", list)
        if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 32:
            raise self.fault(f"the shape {shape}")
        if math.prod(shape) > MAX_ELEMENTS:
            raise self.fault(f"the shape {shape} with more than {MAX_ELEMENTS} elements")
        return tuple(shape)

    def dtype(self, plain: dict[str, Any]) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self.get(plain, "dtype", str))
        if dtype.kind not in NUMBERS:
            raise self.fault(f"the type {dtype}")
        return dtype

    def array(self, plain: dict[str, Any]) -> np.ndarray:
        dtype, shape = self.dtype(plain), self.shape(plain)
        data = base64.b64decode(self.get(plain, "base64", str), validate=True)
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise self.fault(f"{len(data)} bytes for an array of {dtype} and shape {list(shape)}")
        array = np.frombuffer(data, dtype).reshape(shape)
        return array.astype(dtype.newbyteorder("="))  # which is writable as well

    def find(self, name: str) -> type:
        if name.startswith("agents."):  # as files of earlier releases call ncrl.agents
            name = f"ncrl.{name}"
        if name in self.known:
            return self.known[name]
        for module, base in ((nn, nn.Module), (torch.optim, torch.optim.Optimizer)):
            prefix, _, last = name.rpartition(".")
            found = getattr(module, last, None) if prefix == module.__name__ else None
            if isinstance(found, type) and issubclass(found, base):
                return found
        raise UnknownClassError(
            f"{self.where} refers to the class {name[:200]!r}, which is not known here"
        )

    def object(self, plain: dict[str, Any]) -> Any:
        kind = self.find(self.get(plain, "class", str))
        names = _arguments(kind)
        arguments = self.get(plain, "arguments", dict)
        if names is None or not set(arguments) <= set(names):
            raise self.fault(f"an impossible {kind.__name__}")
        return kind(**{name: self.read(value) for name, value in arguments.items()})

    def space(self, plain: dict[str, Any]) -> spaces.Space[Any]:
        kind = self.get(plain, "kind", str)
        if kind == "Box":
            return self.box(plain)
        if kind == "Discrete":
            n, start = (self.get(plain, key, int) for key in ("n", "start"))
            dtype = self.dtype(plain)
            # Older releases of Gymnasium know no other type than this.
            other: dict[str, Any] = {} if dtype == np.int64 else {"dtype": dtype.type}
            discrete: spaces.Space[Any] = spaces.Discrete(n, start=start, **other)
            return discrete
        if kind == "MultiDiscrete":
            nvec, start = (self.read(plain.get(key)) for key in ("nvec", "start"))
            return spaces.MultiDiscrete(nvec, dtype=self.dtype(plain).type, start=start)
        if kind == "MultiBinary":
            return spaces.MultiBinary(self.get(plain, "n", int, list))
        if kind == "Dict":
            parts = self.get(plain, "spaces", list)
            return spaces.Dict(OrderedDict(self.pair(pair) for pair in parts))
        if kind == "Tuple":
            return spaces.Tuple([self.read(part) for part in self.get(plain, "spaces", list)])
        raise self.fault(f"a space of kind {kind!r}")

    def box(self, plain: dict[str, Any]) -> spaces.Box:
        shape, dtype = self.shape(plain), self.dtype(plain)
        low, high = (self.read(plain.get(key)) for key in ("low", "high"))
        for bound in (low, high):
            if np.shape(bound) not in ((), shape):
                raise self.fault(f"a Box of shape {list(shape)} with other bounds")
        low, high = (np.full(shape, bound, dtype) for bound in (low, high))
        return spaces.Box(low, high, dtype=dtype.type)
