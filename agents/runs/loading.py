"""Reading a model as SB3 saves it, without running code from the file.

SB3 writes what is no JSON (spaces, classes, schedules) as pickles, and a pickle can do anything
when it is read. `A3C.save` adds a description of the same values as JSON, `ncrl.json`, which SB3
passes over. Reading takes the values from there and hands them to SB3's own loader in the place of
the pickles, which are never opened. Tensors are read with `weights_only`.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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

from ncrl.agents.arguments import check_batch, check_serial, whole_number
from ncrl.agents.learning.optim import SharedRMSProp
from ncrl.agents.playing.env_sources import check_object, is_factory
from ncrl.agents.playing.pool import Limits
from ncrl.agents.playing.sizes import default_workers
from ncrl.optimizer_state import check_optimizer_state
from ncrl.sb3.engine import EnginePolicy
from ncrl.sb3.export import compare_tensors, without_memory
from ncrl.sb3.plain import UnknownClassError, from_plain, to_plain
from ncrl.settings import suggest
from ncrl.shell.tensors import tensors_in

SelfAlgorithm = TypeVar("SelfAlgorithm", bound=BaseAlgorithm)

DESCRIPTION = "ncrl.json"
VERSION = 1

PICKLED = ":serialized:"
"""SB3's mark of a pickle in its JSON."""

TENSORS = ("policy.pth", "policy.optimizer.pth", "exploration.pth", "pytorch_variables.pth")

NEVER_SAVED = ("env", "env_factory", "policy", "_logger")
"""Names that a checkpoint cannot give a meaning to: an id of an environment imports modules."""

OF_A3C = "correction"
"""A field that every saved A3C has, and no other algorithm."""

OTHERS = {
    "cg_max_steps": "TRPO",
    "clip_range": "PPO or RecurrentPPO",
    "exploration_rate": "DQN",
    "target_entropy": "SAC",
    "policy_delay": "TD3",
    "normalize_advantage": "A2C",
}
"""Fields that tell who has saved a zip, the most telling ones first."""

DERIVED = ("lr_schedule",)
"""Attributes that `_setup_model` makes of others."""

SMALL_BYTES = 16 << 20
"""What names and containers may take beside the weights."""

MOST_EXPANSION = 20
"""Times its size that a file may unpack to; SB3 does not compress."""

MOST_BUILT = 4
"""Times the number of weights in the file that a policy may make, some only to replace them."""

MAX_ROLLOUT_BYTES = 16 << 30
"""Largest rollout that a checkpoint can ask for."""

CLASSES = (SharedRMSProp, Limits)
"""Classes of ours that a model refers to, besides those of `ncrl.sb3.plain`."""


# Saving.


def write_model(model: BaseAlgorithm, zipped: bytes, path: str | pathlib.Path | Any) -> None:
    """Write the zip that SB3 made of `model`, with the description that `without_code` reads."""
    described = io.BytesIO()
    described.write(zipped)
    with zipfile.ZipFile(described, "a") as archive:
        data = json.loads(archive.read("data"))
        classes = _classes(type(model))
        described_fields = _describe(vars(model), _pickled(data), classes)
        archive.writestr(DESCRIPTION, json.dumps(described_fields))
    file = open_path(path, "w", verbose=0, suffix="zip")
    file.write(described.getbuffer())
    if isinstance(path, (str, pathlib.Path)):
        file.close()


def _describe(
    values: Mapping[str, Any], names: Collection[str], classes: Collection[type]
) -> dict[str, Any]:
    fields = {}
    for name in names:
        if name in DERIVED:
            continue
        try:
            fields[name] = to_plain(values[name], repr(name))
            from_plain(fields[name], repr(name), classes)
        except UnknownClassError as error:
            warnings.warn(f"saved, but load() will need known=[...]: {error}", stacklevel=4)
        except ValueError as error:
            warnings.warn(
                f"saved, but load() will need custom_objects={{{name!r}: ...}} or trust=True: "
                f"{error}",
                stacklevel=4,
            )
    return {"version": VERSION, "fields": fields}


def _pickled(data: Mapping[str, Any]) -> list[str]:
    """The fields that SB3 has pickled."""
    return [name for name, value in data.items() if isinstance(value, dict) and PICKLED in value]


def _classes(kind: type[BaseAlgorithm]) -> list[type]:
    """What a file may name: our own, and features extractors and policies of the running program,
    which are classes that somebody has already imported and that do nothing but compute."""
    own = [BaseFeaturesExtractor, EnginePolicy]
    for parent in own:  # which grows while it is walked
        own += parent.__subclasses__()
    return [*own, *kind.policy_aliases.values(), *CLASSES]


# Loading.


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
    """What `A3C.load` does.

    Args:
        kind: the class whose `load` was called.
        sb3_load: the `load` that it has inherited.
        path, env, custom_objects, trust, known: as there.
        options: its further arguments, and attributes to set in place of the saved ones.
    """
    from_factory = is_factory(env)
    if env is not None and not from_factory:
        check_object(env)
        check_serial(options.setdefault("n_workers", 0) or 0, env)
    one_per_core = from_factory and options.get("n_workers", 0) is None
    if one_per_core:
        options["n_workers"] = 0
    is_saved_batch = "batch_size" not in options
    source: Any = path
    if not trust:
        source, custom_objects = without_code(kind, path, custom_objects, options, known)
    saved = {**saved_fields(source, path), **(custom_objects or {})}
    with nullcontext() if trust else plain_faults(path):
        if is_saved_batch:
            options["batch_size"] = None
        model: Any = sb3_load(
            source,
            None if from_factory else env,
            custom_objects=custom_objects,
            **options,
        )
        if is_saved_batch and saved.get("batch_size") is not None:
            model.batch_size = _fitting_batch(saved["batch_size"], model.n_steps, model.n_envs)
    if from_factory:
        if one_per_core:
            model.n_workers = default_workers(model.n_envs)
        model.set_env(env, options["force_reset"])
    loaded: SelfAlgorithm = model
    return loaded


def _fitting_batch(batch_size: Any, n_steps: int, n_envs: int) -> int | None:
    """The saved batch size, unless it cannot suit another number of environments."""
    try:
        check_batch(whole_number("batch_size", batch_size), n_steps, n_envs)
    except ValueError as error:
        warnings.warn(f"{error}; the default is taken", stacklevel=4)
        return None
    return int(batch_size)


def without_code(
    kind: type[BaseAlgorithm],
    path: str | pathlib.Path | io.BufferedIOBase,
    custom_objects: dict[str, Any] | None,
    replaced: Mapping[str, Any],
    known: Iterable[type] = (),
) -> tuple[io.BytesIO, dict[str, Any]]:
    """What to give to SB3's loader so that it opens no pickle.

    Args:
        kind: the class whose `load` reads.
        path: of the zip, or the zip as an open file.
        custom_objects: values by field, which come before those of the file.
        replaced: attributes that the caller sets after loading.
        known: classes that the file may name besides ours.

    Returns:
        The content of the file, read once and checked, and custom objects for each of its pickles.

    Raises:
        ValueError: in one line that names the file and the reason.
        OSError: if it cannot be opened.
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects must be a dict, got {type(custom_objects).__name__}")
    classes = list(known)
    if wrong := [value for value in classes if not isinstance(value, type)]:
        raise ValueError(f"known must hold classes, got {wrong[0]!r}")
    classes += _classes(kind)
    content = _read(path)
    with one_line(path), zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_members(archive, len(content))
        data = _json(archive, "data")
        _check_algorithm(data)
        given = {**replaced, **(custom_objects or {})}
        objects = dict(custom_objects or {}) | _objects(kind, archive, data, given, classes)
        values = {**data, **objects}
        tensors = {
            name: read_tensors(archive, name, _limit(len(content)))
            for name in TENSORS
            if name in archive.namelist()
        }
        if tensors.get("pytorch_variables.pth"):
            raise ValueError("it holds pytorch_variables, which A3C has not got")
        if not {"policy_class", "policy_kwargs"} & set(given):
            _check_policy(kind, values, tensors)
        _check_rollout(values)
    return io.BytesIO(content), objects


def saved_fields(file: str | pathlib.Path | io.BufferedIOBase, name: object) -> dict[str, Any]:
    """The plain values of a saved A3C; no code of the file is run.

    Args:
        file: its path, or an open file.
        name: what messages call it.

    Raises:
        ValueError: for what another algorithm has saved.
    """
    with one_line(name), zipfile.ZipFile(io.BytesIO(_read(file))) as archive:
        data = _json(archive, "data")
        _check_algorithm(data)
    if not isinstance(file, (str, pathlib.Path)):
        file.seek(0)
    return data


def _check_algorithm(data: Mapping[str, Any]) -> None:
    if OF_A3C in data:
        return
    other = next((name for field, name in OTHERS.items() if field in data), "another algorithm")
    raise ValueError(f"it was saved by {other}, not by A3C; load it with the class that saved it")


def _read(path: str | pathlib.Path | io.BufferedIOBase) -> bytes:
    file = open_path(path, "r", verbose=0, suffix="zip")
    if not isinstance(path, (str, pathlib.Path)):
        file.seek(0)
        return file.read()
    with file:
        return file.read()


def _limit(size: int) -> int:
    return MOST_EXPANSION * size + SMALL_BYTES


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    for name in archive.namelist():
        foreign = name.endswith(".pth") and name not in TENSORS
        if foreign or "/" in name or "\\" in name:
            raise ValueError(f"its member {name[:200]!r} is none of a saved A3C")
    _check_size(archive, _limit(size))


def _check_size(archive: zipfile.ZipFile, limit: int) -> None:
    total = sum(member.file_size for member in archive.infolist())
    if total > limit:
        raise ValueError(f"it would unpack to {total} bytes, more than {limit}")


def _json(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    if name not in archive.namelist():
        raise ValueError(f"it has no member {name!r}: it is no model that SB3 has saved")
    try:
        content = json.loads(archive.read(name))
    except RecursionError as error:
        raise ValueError(f"its member {name!r} is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"its member {name!r} is no dict")
    return content


def _objects(
    kind: type[BaseAlgorithm],
    archive: zipfile.ZipFile,
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    classes: Collection[type],
) -> dict[str, Any]:
    """The value of every field that SB3 would read from a pickle."""
    for name in data:
        if name in NEVER_SAVED or hasattr(kind, name):
            raise ValueError(f"it gives a value to {name!r}, which no saved A3C does")
    described = _description(archive)
    objects: dict[str, Any] = {}
    for name in _pickled(data):
        if name in given:
            objects[name] = given[name]
        elif name in DERIVED:
            objects[name] = None
        elif name in described:
            try:
                objects[name] = from_plain(described[name], repr(name), classes)
            except UnknownClassError as error:
                raise ValueError(f"{error}; give it, known=[...]; or {_way_out(name)}") from error
            except ValueError as error:
                raise ValueError(f"{error}; {_way_out(name)}") from error
        else:
            what = " ".join(str(data[name].get(":type:", "value")).split())[:80]
            raise ValueError(
                f"its field {name!r}, a {what}, can only be restored by running code of the file; "
                f"{_way_out(name)}"
            )
    return objects


def _description(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The fields that `write_model` has described; none in a zip of SB3's own."""
    if DESCRIPTION not in archive.namelist():
        return {}
    description = _json(archive, DESCRIPTION)
    fields = description.get("fields")
    if description.get("version") != VERSION or not isinstance(fields, dict):
        raise ValueError(
            f"its description has version {description.get('version')!r}, and this release of "
            f"ncrl reads version {VERSION}"
        )
    return fields


def _way_out(name: str) -> str:
    return (
        f"give its value, custom_objects={{{name!r}: ...}}, or, only if you trust whoever made the "
        "file, load with trust=True"
    )


def _check_policy(
    kind: type[BaseAlgorithm], values: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    """Raise ValueError unless weights and optimiser are those of the policy described.

    Before any memory is asked for: the sizes come from the file too.
    """
    for name in ("policy_class", "observation_space", "action_space", "policy_kwargs"):
        if name not in values:
            raise ValueError(f"it has no field {name!r}")
    for name in TENSORS[:2]:
        if name not in tensors:
            raise ValueError(f"it has no member {name!r}")
    policy_class = values["policy_class"]
    if isinstance(policy_class, str):
        if policy_class not in kind.policy_aliases:
            raise ValueError(
                f"unknown policy {policy_class!r}; {suggest(policy_class, kind.policy_aliases)}"
            )
        policy_class = kind.policy_aliases[policy_class]
    if not (isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)):
        raise ValueError("its policy_class is none of an actor-critic policy")
    optimizer = {"optimizer_class": SharedRMSProp} if values.get("use_rms_prop") else {}
    weights = tensors["policy.pth"]
    if not (isinstance(weights, dict) and all(isinstance(t, Tensor) for t in weights.values())):
        raise ValueError("its weights are no tensors by name")
    with _at_most_weights(MOST_BUILT * len(weights)):
        policy = without_memory(
            lambda: policy_class(
                values["observation_space"],
                values["action_space"],
                ConstantSchedule(0.0),
                **{
                    "use_sde": values.get("use_sde", False),
                    **optimizer,
                    **values["policy_kwargs"],
                    **({"int_value": True} if _has_int_value(values) else {}),
                },
            )
        )
    compare_tensors(policy.state_dict(), weights)
    check_optimizer_state(policy.optimizer, tensors["policy.optimizer.pth"])


def _has_int_value(values: Mapping[str, Any]) -> bool:
    return values.get("intrinsic_reward") is not None and bool(values.get("int_coef"))


@contextmanager
def _at_most_weights(most: int) -> Iterator[None]:
    """Raise ValueError inside where a module gets more weights than the file can hold.

    One number of the file, such as a number of layers, could keep the constructor busy for hours.
    """
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


def _check_rollout(values: Mapping[str, Any]) -> None:
    """Raise ValueError for sizes of rollouts that no training has."""
    sizes = []
    for name in ("n_steps", "n_envs"):
        size = values.get(name)
        if type(size) is not int or size < 1:
            raise ValueError(f"its {name} must be a positive integer, got {size!r}")
        sizes.append(size)
    space = values["observation_space"]
    one = sum(
        math.prod(part.shape or ()) * part.dtype.itemsize
        for part in getattr(space, "spaces", {"": space}).values()
    )
    if (total := one * math.prod(sizes)) > MAX_ROLLOUT_BYTES:
        raise ValueError(
            f"its n_steps={sizes[0]} and n_envs={sizes[1]} make rollouts of {total} bytes, more "
            f"than {MAX_ROLLOUT_BYTES}"
        )


# Tensors, and what went wrong.


def read_tensors(archive: zipfile.ZipFile, member: str, limit: int) -> Any:
    """Tensors and plain values of a member that torch has saved, on the CPU.

    Args:
        archive: the zip that it is in.
        member: its name.
        limit: bytes that it may take in memory.

    Raises:
        KeyError: if there is no such member.
        ValueError: if it is larger than `limit`.
        Exception: as torch raises it, if it holds more than tensors and plain values.
    """
    size = archive.getinfo(member).file_size
    if size > limit:
        raise ValueError(f"{member} would take {size} bytes, for this model at most {limit}")
    return load_tensors(archive.read(member), member, limit)


def load_tensors(content: bytes, name: str, limit: int) -> Any:
    """Tensors and plain values of a file that torch has saved, on the CPU.

    Raises:
        ValueError: if they would take more than `limit` bytes.
        Exception: as torch raises it, if it holds more than tensors and plain values.
    """
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as records:  # which may be compressed in their turn
            _check_size(records, limit)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if (total := sum(t.numel() * t.element_size() for t in tensors_in(loaded))) > limit:
        # Views of one number can have any shape, and take memory when they are copied.
        raise ValueError(f"the tensors of {name} would take {total} bytes, at most {limit}")
    return loaded


@contextmanager
def one_line(path: object) -> Iterator[None]:
    """Turn what goes wrong with a file inside the block into a ValueError of one line."""
    name = str(path) if isinstance(path, (str, pathlib.Path)) else "the file"
    try:
        yield
    except zipfile.BadZipFile as error:
        raise ValueError(f"cannot load {name}: it is damaged, or no zip file") from error
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:
        # torch reports a forbidden pickle with several types, wrong attributes fail anywhere.
        raise ValueError(f"cannot load {name}: {reason_of(error)}") from error


@contextmanager
def plain_faults(path: object) -> Iterator[None]:
    """The same for what wrong types and shapes lead to while a model is built of them."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        with one_line(path):
            raise error


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    code = re.search(r"Unsupported (?:global|operand|class)\S*:? (?:GLOBAL )?(\S+)", text)
    if code is not None:
        return (
            f"it refers to {code[1]}, and only tensors and plain values are read; if you trust the "
            "file, convert it yourself: torch.load(file, weights_only=False)"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"it holds more than tensors and plain values ({' '.join(text.split())[-200:]}); if "
            "you trust the file, convert it yourself: torch.load(file, weights_only=False)"
        )
    return " ".join(text.split())[:500] or type(error).__name__
