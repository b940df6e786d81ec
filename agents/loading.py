"""Writing and reading a model as SB3 saves it, without running code from the file.

SB3 pickles what is no JSON (spaces, classes, schedules), and a pickle can do anything when it is
read. So `write_model` describes the same values as JSON, in the member `ncrl.json`, which SB3
ignores. `load_model` hands them to SB3's own loader in place of the pickles, which are never
opened.
"""

from __future__ import annotations

import io
import json
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import ConstantSchedule
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from ncrl.agents.arguments import check_batch, check_serial, policy_options
from ncrl.agents.learning.optim import SharedRMSProp
from ncrl.agents.playing.buffers import RolloutShape
from ncrl.agents.playing.env_sources import check_object, is_factory
from ncrl.agents.playing.sizes import check_memory, default_workers
from ncrl.agents.playing.supervision import Limits
from ncrl.checks import whole_number
from ncrl.optimizer_state import check_optimizer_state
from ncrl.sb3.engine import EnginePolicy
from ncrl.sb3.export import compare_tensors, without_memory
from ncrl.sb3.plain import UnknownClassError, from_plain, to_plain
from ncrl.shell.tensors import check_size, load_tensors, reason_of

SelfAlgorithm = TypeVar("SelfAlgorithm", bound=BaseAlgorithm)

DESCRIPTION = "ncrl.json"
VERSION = 1
PICKLED = ":serialized:"  # SB3's mark of a pickle in its JSON
TENSORS = ("policy.pth", "policy.optimizer.pth", "exploration.pth", "pytorch_variables.pth")
DERIVED = "lr_schedule"  # an attribute that `_setup_model` makes of others
CLASSES = (SharedRMSProp, Limits)  # that a model refers to, besides those of `ncrl.sb3.plain`

NEVER_SAVED = ("env", "env_factory", "policy", "policy_aliases", "_logger")
"""Attributes that no file may set: an id of an environment, for one, would import modules."""

OF_A3C = "correction"  # a field that every saved A3C has, and no other algorithm
OTHERS = {
    "cg_max_steps": "TRPO",
    "clip_range": "PPO or RecurrentPPO",
    "exploration_rate": "DQN",
    "target_entropy": "SAC",
    "policy_delay": "TD3",
    "normalize_advantage": "A2C",
}
"""Fields that tell who has saved a zip, the most telling ones first."""

SMALL_BYTES = 16 << 20  # what names and containers may take beside the weights
MOST_EXPANSION = 20  # times its size that a file may unpack to; SB3 does not compress
MOST_BUILT = 4  # times the weights of the file that a policy may make, some to replace them


def write_model(model: BaseAlgorithm, zipped: bytes, path: str | pathlib.Path | Any) -> None:
    """Write the zip that SB3 made of `model`, with the description that `load_model` reads."""
    described, fields, classes = io.BytesIO(zipped), {}, _classes(type(model))
    with zipfile.ZipFile(described, "a") as archive:
        for name in _pickled(json.loads(archive.read("data"))):
            if name == DERIVED:
                continue
            try:
                fields[name] = to_plain(vars(model)[name], repr(name))
                from_plain(fields[name], repr(name), classes)
            except ValueError as error:
                needed = f"custom_objects={{{name!r}: ...}} or trust=True"
                if isinstance(error, UnknownClassError):
                    needed = "known=[...]"
                warnings.warn(f"saved, but load() will need {needed}: {error}", stacklevel=3)
        archive.writestr(DESCRIPTION, json.dumps({"version": VERSION, "fields": fields}))
    file = open_path(path, "w", verbose=0, suffix="zip")
    file.write(described.getbuffer())
    if isinstance(path, (str, pathlib.Path)):
        file.close()


def _pickled(data: Mapping[str, Any]) -> list[str]:
    """The fields that SB3 has pickled."""
    return [name for name, value in data.items() if isinstance(value, dict) and PICKLED in value]


def _classes(kind: type[BaseAlgorithm]) -> list[type]:
    """What a file may name: our own, and features extractors and policies that somebody has already
    imported, which do nothing but compute."""
    own = [BaseFeaturesExtractor, EnginePolicy]
    for parent in own:  # which grows while it is walked
        own += parent.__subclasses__()
    return [*own, *kind.policy_aliases.values(), *CLASSES]


def load_model(
    kind: type[SelfAlgorithm],
    sb3_load: Callable[..., SelfAlgorithm],
    path: str | pathlib.Path | io.BufferedIOBase,
    env: Any,
    options: dict[str, Any],
    custom_objects: dict[str, Any] | None,
    *,
    trust: bool,
    known: Iterable[type],
) -> SelfAlgorithm:
    """What `kind.load` does with its arguments.

    `sb3_load` is the method of that name that `kind` inherits from SB3; `options` are further
    arguments of it, among them attributes to set in place of the saved ones.
    """
    is_object = env is not None and not is_factory(env)
    if is_object:
        check_object(env)
        check_serial(options.setdefault("n_workers", 0) or 0, options.get("n_envs"), env)
    content = _read(path)
    objects = dict(custom_objects or {})
    with one_line(path), zipfile.ZipFile(io.BytesIO(content)) as archive:
        limit = unpacked_limit(len(content))
        if not trust:
            _check_members(archive, limit)
        if "data" not in archive.namelist():
            raise ValueError("it is no model that SB3 has saved: it has no member 'data'")
        data = dict(json.loads(archive.read("data")))
        if OF_A3C not in data:
            others = [name for field, name in OTHERS.items() if field in data]
            other = (*others, "another algorithm")[0]
            raise ValueError(f"it was saved by {other}, not by A3C; load it with the same class")
        if not trust:
            given = options | objects
            objects |= _objects(kind, archive, data, given, known)
            _check_values(kind, archive, {**data, **objects}, given, limit)
    values = {**data, **objects, **options}
    if is_object and "batch_size" not in options:
        options["batch_size"] = _fitting_batch(values, getattr(env, "num_envs", 1))
    if is_factory(env) and options.get("n_workers", 0) is None:
        options["n_workers"] = default_workers(values["n_envs"], options.get("cluster"))
    with nullcontext() if trust else one_line(path):
        source = io.BytesIO(content)
        model = sb3_load(source, env if is_object else None, custom_objects=objects, **options)
    if is_factory(env):
        model.set_env(env, options["force_reset"])
    return model


def _read(path: str | pathlib.Path | io.BufferedIOBase) -> bytes:
    if isinstance(path, io.BufferedIOBase):
        path.seek(0)
        return path.read()
    with open_path(path, "r", suffix="zip") as file:
        return file.read()


def _check_members(archive: zipfile.ZipFile, limit: int) -> None:
    for name in archive.namelist():
        foreign = name.endswith(".pth") and name not in TENSORS
        if foreign or "/" in name or "\\" in name:
            raise ValueError(f"its member {name[:200]!r} is none of a saved A3C")
    check_size(archive, limit)


def _objects(
    kind: type[BaseAlgorithm],
    archive: zipfile.ZipFile,
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    known: Iterable[type],
) -> dict[str, Any]:
    """The value of every field that SB3 would read from a pickle."""
    for name in data:
        if name in NEVER_SAVED or callable(getattr(kind, name, None)):
            raise ValueError(f"it gives a value to {name!r}, which no saved A3C does")
    description: dict[str, Any] = {}
    if DESCRIPTION in archive.namelist():
        description = dict(json.loads(archive.read(DESCRIPTION)))
    if (version := description.get("version", VERSION)) != VERSION:
        raise ValueError(f"its description has version {version!r}, and {VERSION} is read here")
    described = description.get("fields", {})
    classes, known, objects = _classes(kind), tuple(known), dict[str, Any]()
    for name in _pickled(data):
        way_out = (
            f"give its value, custom_objects={{{name!r}: ...}}, or, only if you trust whoever made "
            "the file, load with trust=True"
        )
        if name in given or name == DERIVED:
            objects[name] = given.get(name)
        elif name in described:
            try:
                objects[name] = from_plain(described[name], repr(name), classes, known)
            except ValueError as error:
                if isinstance(error, UnknownClassError):
                    way_out = f"give it, known=[...]; or {way_out}"
                raise ValueError(f"{error}; {way_out}") from error
        else:
            what = " ".join(str(data[name].get(":type:", "value")).split())[:80]
            raise ValueError(
                f"its field {name!r}, a {what}, can only be restored by running code of the file; "
                f"{way_out}"
            )
    return objects


def _check_values(
    kind: type[BaseAlgorithm],
    archive: zipfile.ZipFile,
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    limit: int,
) -> None:
    """Raise an error for tensors and sizes that do not fit, before any memory is asked for."""
    present = set(TENSORS) & set(archive.namelist())
    tensors = {name: read_member(archive, name, limit) for name in present}
    if tensors.get("pytorch_variables.pth"):
        raise ValueError("it holds pytorch_variables, which A3C has not got")
    if not {"policy_class", "policy_kwargs"} & set(given):
        _check_policy(kind, values, tensors["policy.pth"], tensors["policy.optimizer.pth"])
    n_steps, n_envs = (whole_number(name, values[name]) for name in ("n_steps", "n_envs"))
    spaces = values["observation_space"], values["action_space"]
    check_memory(RolloutShape(n_steps, n_envs, *spaces, lstm_layers=0, lstm_size=0).nbytes)


def _check_policy(
    kind: type[BaseAlgorithm], values: Mapping[str, Any], weights: Any, optimizer_state: Any
) -> None:
    """Raise an error unless weights and optimiser are those of the policy described."""
    policy_class = values["policy_class"]
    if isinstance(policy_class, str):
        policy_class = kind.policy_aliases.get(policy_class)
    if not (isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)):
        raise ValueError("its policy_class is none of an actor-critic policy")
    if not (isinstance(weights, dict) and all(isinstance(t, Tensor) for t in weights.values())):
        raise ValueError("its weights are no tensors by name")
    spaces = values["observation_space"], values["action_space"]
    with _at_most_weights(MOST_BUILT * len(weights)):
        policy = without_memory(
            lambda: policy_class(*spaces, ConstantSchedule(0.0), **policy_options(values))
        )
    compare_tensors(policy.state_dict(), weights)
    check_optimizer_state(policy.optimizer, optimizer_state)


@contextmanager
def _at_most_weights(most: int) -> Iterator[None]:
    """ValueError once more weights are made inside: a file could ask for layers without end."""
    count = 0

    def one_more(*_arguments: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"the network that it describes has more than {most} weights")

    hook = register_module_parameter_registration_hook(one_more)
    try:
        yield
    finally:
        hook.remove()


def _fitting_batch(values: Mapping[str, Any], n_envs: int) -> int | None:
    """The saved batch size, unless it cannot suit so many environments."""
    batch_size: int | None = values.get("batch_size")
    if batch_size is not None:
        try:
            check_batch(whole_number("batch_size", batch_size), values["n_steps"], n_envs)
        except ValueError as error:
            warnings.warn(f"{error}; the default is taken", stacklevel=4)
            return None
    return batch_size


def unpacked_limit(size: int) -> int:
    """Bytes that a file of a size may unpack to."""
    return MOST_EXPANSION * size + SMALL_BYTES


def read_member(archive: zipfile.ZipFile, member: str, limit: int) -> Any:
    """Tensors and plain values of a member of a zip; raises what `load_tensors` does."""
    size = archive.getinfo(member).file_size
    if size > limit:
        raise ValueError(f"{member} would take {size} bytes, for this file at most {limit}")
    return load_tensors(archive.read(member), limit)


@contextmanager
def one_line(path: object) -> Iterator[None]:
    """Turn what goes wrong with a file inside the block into a ValueError of one line."""
    name = str(path) if isinstance(path, (str, pathlib.Path)) else "the file"
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:  # wrong attributes, types and pickles fail in many ways
        reason = reason_of(error)
        if isinstance(error, zipfile.BadZipFile):
            reason = "it is damaged, or no zip file"
        elif isinstance(error, KeyError):
            reason = f"it has no {reason}"
        raise ValueError(f"cannot load {name}: {reason}") from error
