"""What `A3C(env=...)` accepts, and the environments it makes of it.

A factory is any picklable callable `factory(n_envs, seed) -> VecEnv`. A Gymnasium id is turned into
one. An environment object stays what it is and is played in this process.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

EnvFactory = Callable[[int, int], VecEnv]
"""`factory(n_envs, seed)`, called in the process that plays the environments."""

ENTRY_POINTS = "ncrl.environments"
"""Group of entry points whose names are namespaces of Gymnasium ids (`ALE` in `ALE/Pong-v5`) and
whose values turn such an id into a factory. It lets ids of other packages, and of `envs`, come with
their proper preprocessing while `agents` imports none of them."""


@dataclass(frozen=True)
class GymFactory:
    """Copies of one registered Gymnasium environment, each under SB3's Monitor.

    Raises:
        ValueError: at construction, for an id that `gymnasium.make` does not know.
    """

    env_id: str
    """As for `gymnasium.make`: also without a version, or with the module that registers it before
    a colon."""

    def __post_init__(self) -> None:
        module, _, name = self.env_id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            namespace, plain_name, version = parse_env_id(name)
            if version is None:
                version = find_highest_version(namespace, plain_name)
            gymnasium.spec(get_env_id(namespace, plain_name, version))
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"unknown environment {self.env_id!r}: {error}") from error

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        """Environment i is seeded with `seed + i`."""
        return make_vec_env(self.env_id, n_envs, seed=seed)


def as_factory(env: str | EnvFactory) -> EnvFactory:
    """The factory behind a Gymnasium id, or the factory itself.

    Raises:
        ValueError: for an unknown id, or for a function of other arguments.
    """
    if not isinstance(env, str):
        try:
            inspect.signature(env).bind(1, 0)
        except ValueError:
            return env  # it does not tell its arguments
        except TypeError as error:
            raise ValueError(
                f"an environment factory is called as factory(n_envs, seed), which {env!r} is not "
                "made for; for example: lambda n_envs, seed: make_vec_env(make, n_envs, seed=seed)"
            ) from error
        return env
    namespace = env.split("/")[0] if "/" in env else None
    for entry_point in entry_points(group=ENTRY_POINTS):
        if entry_point.name == namespace:
            factory: EnvFactory = entry_point.load()(env)
            return factory
    return GymFactory(env)


def is_factory(env: object) -> bool:
    """Whether `env` is an id or a factory, not an environment that exists already."""
    return isinstance(env, str) or (
        callable(env) and not isinstance(env, (VecEnv, gymnasium.Env, type))
    )


def check_object(env: object) -> None:
    """What SB3 does not say about objects that are no environments.

    Raises:
        ValueError: for classes, lists, and the stand-in for what workers of another model play.
    """
    if isinstance(env, RemoteEnvs):
        raise ValueError(
            "this environment is played by the workers of another model; give its id or factory"
        )
    if env is not None and not isinstance(env, (VecEnv, gymnasium.Env)):
        raise ValueError(
            "env must be an environment, a Gymnasium id or a factory(n_envs, seed) -> VecEnv, got "
            f"{env!r}; lists of functions make a DummyVecEnv"
        )


def build(factory: EnvFactory, n_envs: int, seed: int) -> VecEnv:
    """Build and wrap an environment as SB3 does (images are moved to channel first)."""
    env = factory(n_envs, seed)
    if not isinstance(env, VecEnv) or env.num_envs != n_envs:
        raise ValueError(
            f"the environment factory must return a VecEnv of {n_envs} environments, got {env!r}"
        )
    return BaseAlgorithm._wrap_env(env, monitor_wrapper=False)


class RemoteEnvs(VecEnv):
    """The workers' environments as SB3 and its callbacks see them: spaces and number.

    They live in the worker processes; there is nothing here to step.
    """

    def __init__(
        self, n_envs: int, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
    ) -> None:
        self.render_mode = None
        super().__init__(n_envs, observation_space, action_space)

    @classmethod
    def like(cls, factory: EnvFactory, n_envs: int) -> RemoteEnvs:
        """Spaces are read off one environment, built for that and closed again.

        Raises:
            ValueError: for a factory of `VecNormalize`, whose statistics every worker would gather
                for itself, and nobody would save; and for one of `SubprocVecEnv`.
        """
        probe = build(factory, 1, 0)
        try:
            if unwrap_vec_normalize(probe) is not None:
                raise ValueError(
                    "the environment factory returns a VecNormalize, which workers cannot share; "
                    "use n_workers=0, or normalise in a wrapper without statistics"
                )
            if isinstance(probe.unwrapped, SubprocVecEnv):
                raise ValueError(
                    "the environment factory returns a SubprocVecEnv, but workers may not start "
                    "processes of their own; return a DummyVecEnv, or use n_workers=0"
                )
            return cls(n_envs, probe.observation_space, probe.action_space)
        finally:
            probe.close()

    def reset(self) -> Any:
        """A blank observation: SB3 resets what it trains on, and the workers reset theirs."""

        def blank(space: spaces.Space[Any]) -> np.ndarray:
            return np.zeros((self.num_envs, *(space.shape or ())), space.dtype)

        space = self.observation_space
        if isinstance(space, spaces.Dict):
            return {name: blank(entry) for name, entry in space.items()}
        return blank(space)

    def step_async(self, actions: np.ndarray) -> None:
        self._refuse()

    def step_wait(self) -> VecEnvStepReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            "the environments of this model live in its worker processes; "
            "give evaluate_policy or predict an environment of your own"
        )

    def close(self) -> None:
        """Nothing to close: the workers end with `learn`."""

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._refuse()

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        self._refuse()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return [None] * self.num_envs


class RecordedEnv(VecEnvWrapper):
    """Remembers every reset and action, so that a fresh copy can be brought to the same state.

    Most emulators and environments cannot be cloned, but all of ours play the same game again from
    the same seed and actions. Costs the memory of the actions (a byte for one of few discrete ones)
    and replay time in proportion to the run.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self._episodes: list[_Rows] = []  # actions since each reset

    def reset(self) -> Any:
        self._episodes.append(_Rows())
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self._episodes[-1].append(self._compact(np.asarray(actions)))
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()

    def history(self) -> list[np.ndarray]:
        """Actions [N, n_envs, ...] after each reset."""
        empty = np.empty((0, self.num_envs), dtype=np.int64)
        return [rows.array(empty).copy() for rows in self._episodes]

    def replay(self, history: Sequence[np.ndarray]) -> Any:
        """Repeat a recorded history on a fresh copy; returns the observations it ends in."""
        assert not self._episodes, "only an environment that was never reset can replay"
        obs = None
        for actions in history:
            obs = self.reset()
            for action in actions.astype(self.action_space.dtype):
                obs = self.step(action)[0]
        return obs

    def _compact(self, actions: np.ndarray) -> np.ndarray:
        if isinstance(self.action_space, spaces.Discrete) and self.action_space.n <= 256:
            return actions.astype(np.uint8)
        return actions


class _Rows:
    """Arrays of one shape, one after the other in one block of memory."""

    def __init__(self) -> None:
        self._block: np.ndarray | None = None
        self._count = 0

    def append(self, row: np.ndarray) -> None:
        if self._block is None:
            self._block = np.empty((16, *row.shape), row.dtype)
        elif self._count == len(self._block):
            self._block = np.concatenate([self._block, np.empty_like(self._block)])
        self._block[self._count] = row
        self._count += 1

    def array(self, empty: np.ndarray) -> np.ndarray:
        """All rows, or `empty` if there are none."""
        return empty if self._block is None else self._block[: self._count]
