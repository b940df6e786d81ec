"""Policies as files that hold no code: `policy.safetensors`, the weights, and `policy.json`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import stable_baselines3
import torch
from safetensors.torch import load, save
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule, get_device
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ncrl.checks import nearest
from ncrl.files import read_bytes, write_atomically
from ncrl.sb3.plain import UnknownClassError, from_plain, to_plain
from ncrl.sb3.policies import lstm_arguments
from ncrl.shell.tensors import check_like

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"
FORMAT, VERSION = "ncrl policy", 2
MAX_BYTES = 4 << 30  # of either file

NOT_EXPORTED = (
    *("observation_space", "action_space"),  # which have their own places
    *("lr_schedule", "optimizer_class", "optimizer_kwargs"),  # of training, not of the policy
)


def export_policy(model: BaseAlgorithm | ActorCriticPolicy, folder: str | Path) -> Path:
    """Write a policy, without its optimiser, for `load_policy`.

    Args:
        model: an actor-critic policy of SB3, sb3-contrib or ncrl, or the algorithm that has it.
        folder: made if need be; a policy that is there already is replaced. It is returned.

    Raises:
        ValueError: for other policies, for arguments that no file can describe, and for a policy
            that its arguments do not make, such as one with injected layers.
    """
    policy = policy_to_export(model)
    if not isinstance(policy, ActorCriticPolicy):
        raise ValueError(f"only actor-critic policies can be exported, got {type(policy).__name__}")
    tensors, arguments = unique_tensors(policy), _arguments(policy)
    weights = save({name: part.detach().cpu().contiguous() for name, part in tensors.items()})
    is_algorithm = isinstance(model, BaseAlgorithm)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "policy_class": to_plain(type(policy), "the policy"),
        "algorithm": type(model).__name__ if is_algorithm else None,
        "timesteps": model.num_timesteps if is_algorithm else None,
        "observation_space": to_plain(policy.observation_space, "the observation space"),
        "action_space": to_plain(policy.action_space, "the action space"),
        "arguments": {
            name: to_plain(value, f"the policy's argument {name!r}")
            for name, value in arguments.items()
        },
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()},
        "versions": {"torch": torch.__version__, "sb3": stable_baselines3.__version__},
    }
    text = json.dumps(description, indent=2, allow_nan=False)
    build = _builder(type(policy), policy.observation_space, policy.action_space, arguments)
    try:
        compare_tensors(unique_tensors(build()), tensors)
    except ValueError as error:
        raise ValueError(
            f"a policy that was changed after it was made cannot be exported: {error}"
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    write_atomically(folder / DESCRIPTION, f"{text}\n".encode())
    return folder


def policy_to_export(model: Any) -> Any:
    """The policy that an algorithm has, or that is given itself; of a compiled one the original.

    Warns of what an algorithm normalises observations by, which no exported policy contains.
    """
    is_algorithm = isinstance(model, BaseAlgorithm)
    normalizer = model.get_vec_normalize_env() if is_algorithm else None
    if normalizer is not None and normalizer.norm_obs:
        logger.warning(
            "the policy reads normalised observations, and the statistics of VecNormalize are not "
            "exported: save them with model.get_vec_normalize_env().save(...)"
        )
    policy = model.policy if is_algorithm else model
    return getattr(policy, "_orig_mod", policy)


def load_policy(
    folder: str | Path, device: torch.device | str = "auto", *, classes: Iterable[type] = ()
) -> ActorCriticPolicy:
    """The policy that `export_policy` wrote, ready to `predict`; runs no code of the files.

    Args:
        folder: where it was exported to.
        device: where it shall compute.
        classes: those of your own that the policy is or has, such as its features extractor.

    Raises:
        ValueError: in one line, for files that are missing, damaged or not of an exported policy,
            and for classes that are neither of ncrl, SB3 or torch nor among `classes`.
    """
    folder, classes = Path(folder), tuple(classes)
    description = read_description(folder)
    tensors = read_weights(folder, description)
    names = ("policy_class", "observation_space", "action_space", "arguments")
    try:
        made_from: Any = [from_plain(description.get(n), f"its {n}", given=classes) for n in names]
        if not (isinstance(made_from[0], type) and issubclass(made_from[0], ActorCriticPolicy)):
            raise ValueError("its policy_class is none of an actor-critic policy")
        build = _builder(*made_from)
        if not classes:
            compare_tensors(unique_tensors(without_memory(build)), tensors)
        policy = build()
        put_tensors(policy, tensors)
    except ValueError as error:
        unknown = isinstance(error, UnknownClassError)
        hint = "; give classes of your own: classes=[...]" if unknown else ""
        raise ValueError(f"cannot load {folder / DESCRIPTION}: {error}{hint}") from error
    policy.set_training_mode(False)
    policy.to(get_device(device))
    if policy.use_sde:  # its noise was drawn with fresh weights, on the CPU
        on_gpu = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu):
            policy.reset_noise()
    return policy


def read_description(folder: Path) -> dict[str, Any]:
    """The content of `policy.json`; ValueError unless it is one of ours."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(read_bytes(path, MAX_BYTES))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a policy that ncrl has exported")
    if description.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {description.get('version')!r} of the format, and this release of "
            f"ncrl reads version {VERSION}"
        )
    for name in ("arguments", "weights"):
        if not isinstance(description.get(name), dict):
            raise ValueError(f"{path} is damaged: it has no {name}")
    return description


def read_weights(folder: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The content of `policy.safetensors`; ValueError unless it is what the description is of."""
    path = folder / WEIGHTS  # whatever the description calls it: it cannot lead elsewhere
    data = read_bytes(path, MAX_BYTES)
    if hashlib.sha256(data).hexdigest() != description["weights"].get("sha256"):
        raise ValueError(f"{path} is damaged, or of another policy (its checksum differs)")
    try:
        return load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error})") from error


def _builder(
    kind: type[ActorCriticPolicy], observation_space: Any, action_space: Any, arguments: Any
) -> Callable[[], ActorCriticPolicy]:
    """What makes the policy with fresh weights."""

    def build() -> ActorCriticPolicy:
        try:
            with torch.random.fork_rng(devices=[]):
                return kind(observation_space, action_space, ConstantSchedule(0.0), **arguments)
        except ValueError:
            raise
        except Exception as error:  # of arguments that do not belong to this policy
            text = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{kind.__name__} cannot be built from its arguments ({text})"
            ) from error

    return build


def _arguments(policy: ActorCriticPolicy) -> dict[str, Any]:
    """What the policy's constructor was given, as far as it is not the default None."""
    arguments = policy._get_constructor_parameters()
    arguments["share_features_extractor"] = policy.share_features_extractor  # which SB3 leaves out
    if isinstance(policy, RecurrentActorCriticPolicy):
        arguments |= lstm_arguments(policy)
    return {
        name: value
        for name, value in arguments.items()
        if name not in NOT_EXPORTED and value is not None
    }


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, each tensor once: SB3's policies hold their extractor three times."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())


def without_memory(build: Callable[[], Module]) -> Module:
    """The module that `build` makes, of meta tensors: sizes from a stranger's file do no harm."""
    with torch.device("meta"), _StayWithoutMemory():
        return build()


class _StayWithoutMemory(TorchFunctionMode):
    """What SB3 does to weights while it builds a policy, for weights that have no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].is_meta:  # some modules are moved to the CPU
            moved = (*args[1:], *kwargs.values())
            dtype = next((entry for entry in moved if isinstance(entry, torch.dtype)), None)
            return args[0] if dtype is None else args[0].type(dtype)
        if func is torch.Tensor.__bool__ and args[0].is_meta:  # distributions check their arguments
            return True
        return func(*args, **kwargs)


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what `unique_tensors` gave into a module, or raise ValueError as `compare_tensors`."""
    compare_tensors(unique_tensors(module), tensors)
    module.load_state_dict(tensors, strict=False)


def compare_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference in names, shapes and types."""
    for name in tensors:
        if name not in expected:
            hint = f"; nearest: {nearest(name, expected)!r}" if expected else ""
            raise ValueError(f"there is a tensor {name[:200]!r} that the policy has not got{hint}")
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing")
        check_like(tensors[name], tensor, f"the tensor {name!r}")
