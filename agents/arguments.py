"""The arguments of `A3C`: what it refuses, and what it warns of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from ncrl import sb3
from ncrl.agents.learning.objective import Objective
from ncrl.agents.learning.optim import optimizer_options
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.supervision import Limits
from ncrl.checks import whole_number
from ncrl.envs import AtariFactory
from ncrl.sb3 import EnginePolicy
from ncrl.settings import check


def check_numbers(objective: Objective, max_grad_norm: Any, learning_rate: Any) -> None:
    """Raise ValueError for the first number that is out of range."""
    clip = objective.reward_clip
    if clip is not None and not (isinstance(clip, Real) and 0 < float(clip) < math.inf):
        raise ValueError(f"reward_clip must be a positive number, None or 'env', got {clip!r}")
    check(objective)
    if not (isinstance(max_grad_norm, Real) and float(max_grad_norm) >= 0):
        raise ValueError(
            f"max_grad_norm must be at least 0, got {max_grad_norm!r}; inf sets no limit"
        )
    is_rate = isinstance(learning_rate, Real) and 0 <= float(learning_rate) < math.inf
    if not (is_rate or callable(learning_rate)):
        raise ValueError(
            f"learning_rate must be a number of at least 0 or a schedule, got {learning_rate!r}"
        )


def check_batch(batch_size: int, n_steps: int, n_envs: int) -> None:
    """Raise ValueError unless a batch is whole rollouts of an equal share of the environments."""
    if batch_size % n_steps or n_steps * n_envs % batch_size:
        shares = [n for n in range(1, n_envs + 1) if n_envs % n == 0]
        nearest = min(shares, key=lambda n: abs(n * n_steps - batch_size))
        raise ValueError(
            f"batch_size must be a multiple of n_steps that divides n_steps * n_envs, got "
            f"batch_size={batch_size} with n_steps={n_steps} and n_envs={n_envs}; "
            f"nearest: {n_steps * nearest}"
        )


def check_policy(policy: Any, policy_kwargs: Mapping[str, Any], use_sde: bool) -> None:
    """Raise ValueError for arguments that are not the policy's, TypeError for a policy that A3C
    cannot train."""
    if policy_kwargs.get("squash_output") and not use_sde:
        raise ValueError("squash_output=True needs use_sde=True, got use_sde=False")
    for name in {"orth_coef", "balance_coef"} & set(policy_kwargs):
        raise ValueError(
            f"{name} is an argument of A3C itself, not of its policy: give "
            f"A3C(..., {name}={policy_kwargs[name]!r}) and leave it out of policy_kwargs"
        )
    if not (isinstance(policy, type) and issubclass(policy, BasePolicy)):
        got = f"an object of {type(policy).__name__}" if isinstance(policy, nn.Module) else policy
        raise TypeError(f"policy must be a name or a policy class, got {got!r}")
    if not issubclass(policy, EnginePolicy):
        kind = next((kind for kind in ("Cnn", "MultiInput") if kind in policy.__name__), "Mlp")
        memory = "Lstm" if issubclass(policy, RecurrentActorCriticPolicy) else ""
        name = f"{kind}{memory}Policy"
        raise TypeError(
            f"A3C needs a policy derived from ncrl.sb3.EnginePolicy, which {policy.__name__} is "
            f"not; use policy={name!r}, or derive yours from ncrl.sb3.{name}"
        )


def check_workers(n_workers: int, n_envs: int) -> None:
    """Raise ValueError for environments that workers cannot share out equally."""
    whole_number("n_workers", n_workers, least=0)
    whole_number("n_envs", n_envs)
    if n_workers and n_envs % n_workers:
        near = max(1, round(n_envs / n_workers)) * n_workers
        raise ValueError(
            f"n_envs must be a multiple of n_workers, got n_envs={n_envs} with "
            f"n_workers={n_workers}; nearest: n_envs={near}"
        )


def check_limits(limits: Any) -> None:
    """Raise ValueError for limits of the workers that are no `Limits`."""
    if not isinstance(limits, Limits):
        raise ValueError(
            f"limits must be an ncrl.agents.Limits, such as Limits(max_restarts=9), got {limits!r}"
        )


def check_serial(n_workers: int, n_envs: int | None, env: object) -> None:
    """Raise ValueError for an environment object that workers should play, or several of it."""
    if n_workers:
        raise ValueError(
            f"n_workers={n_workers} needs an env that workers can build: a Gymnasium id or a "
            f"factory, got {type(env).__name__}; with an environment object use n_workers=0"
        )
    if env is not None and n_envs not in (None, count := getattr(env, "num_envs", 1)):
        raise ValueError(
            f"n_envs={n_envs} needs an env that can be built so often: a Gymnasium id or a "
            f"factory, got {type(env).__name__}, which has {count}; leave n_envs out"
        )


def names(argument: str, value: Any) -> list[str]:
    """A list of names; ValueError for anything else, a single name included."""
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{argument} must be a sequence of names such as ('x',), got {value!r}")
    return list(value)


def tell_meaning(env: Any, factory: EnvFactory, verbose: int) -> None:
    """Say what an id of a game stands for here; aloud, where SB3's users mean something else."""
    if not (isinstance(env, str) and isinstance(factory, AtariFactory)):
        return
    rules = ", ".join(f"{name}={value!r}" for name, value in factory.describe().items())
    line = f"{env} is played as {rules}"
    if not env.startswith("ALE/"):
        warnings.warn(f"{line}; for other rules give ncrl.envs.atari(...)", stacklevel=4)
    elif verbose >= 1:
        print(line)


def warn_of_frequencies(callback: BaseCallback, n_envs: int) -> None:
    """Warn of callbacks that count calls: SB3's users of an id are used to one per timestep."""
    for part in getattr(callback, "callbacks", ()):
        warn_of_frequencies(part, n_envs)
    for name in ("save_freq", "eval_freq"):
        if frequency := getattr(callback, name, 0):
            warnings.warn(
                f"{type(callback).__name__}({name}={frequency}) counts calls, and an id makes "
                f"{n_envs} environments here, which are one call: it acts every "
                f"{frequency * n_envs} timesteps. Give {name}=max(timesteps // {n_envs}, 1), and "
                f"n_envs={n_envs} if that is what you mean",
                stacklevel=2,
            )


def sees_images(policy: str | type) -> bool:
    """Whether a policy, given by name or class, is a convolutional one."""
    return "Cnn" in (policy if isinstance(policy, str) else getattr(policy, "__name__", ""))


def with_head_options(
    policy: str | type, policy_kwargs: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a policy, with the default options of its Neurocoder heads filled in.

    Beside head options that are given, only those defaults are taken that are no sizes; beside a
    whole `config` none.
    """
    options = dict(policy_kwargs or {})
    kind = getattr(sb3, policy, None) if isinstance(policy, str) else policy
    if options.get("head", getattr(kind, "head", None)) == "neurocoder":
        given = options.get("head_kwargs") or {}
        taken = list(defaults)
        if "config" in given:
            taken = []
        elif given.get("preset") == "official":
            taken = ["sharpness"]
        elif given:
            taken = ["sharpness", "residual_gate"]
        options["head_kwargs"] = {name: defaults[name] for name in taken} | given
    return options


def policy_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the learner's policy is built with, from the attributes of `A3C`, saved or present."""
    options = {"use_sde": settings["use_sde"], **settings["policy_kwargs"]}
    if settings.get("intrinsic_reward") is not None and settings["int_coef"]:
        options["int_value"] = True
    return options | optimizer_options(
        settings["policy_kwargs"],
        use_rms_prop=settings["use_rms_prop"],
        rms_prop_eps=settings["rms_prop_eps"],
    )
