"""What `A3C(env=...)` accepts, and the environments it makes of it.

A factory is any picklable callable `factory(n_envs, seed) -> VecEnv`. A Gymnasium id is turned into
one. An environment object stays what it is and is played in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, unwrap_vec_normalize
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
        ValueError: at construction, for an id that is not registered.
    """

    env_id: str

    def __post_init__(self) -> None:
        try:
            gymnasium.spec(self.env_id)
        except gymnasium.error.Error as error:
            raise ValueError(f"unknown environment {self.env_id!r}: {error}") from error

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        """Environment i is seeded with `seed + i`."""
        return make_vec_env(self.env_id, n_envs, seed=seed)


def as_factory(env: str | EnvFactory) -> EnvFactory:
    """The factory behind a Gymnasium id, or the factory itself.

    Raises:
        ValueError: for an unknown id.
    """
    if not isinstance(env, str):
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
                for itself, and nobody would save.
        """
        probe = build(factory, 1, 0)
        try:
            if unwrap_vec_normalize(probe) is not None:
                raise ValueError(
                    "the environment factory returns a VecNormalize, which workers cannot share; "
                    "use n_workers=0, or normalise in a wrapper without statistics"
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
    the same seed and actions. Costs memory and replay time in proportion to the run.
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self._episodes: list[list[np.ndarray]] = []  # actions since each reset

    def reset(self) -> Any:
        self._episodes.append([])
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self._episodes[-1].append(self._compact(actions))
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()

    def history(self) -> list[np.ndarray]:
        """Actions [N, n_envs, ...] after each reset."""
        empty = np.empty((0, self.num_envs), dtype=np.int64)
        return [np.stack(actions) if actions else empty for actions in self._episodes]

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
        return actions.copy()
