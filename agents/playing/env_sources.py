"""What `A3C(env=...)` accepts, and the environments it makes of it.

A factory is any picklable callable `factory(n_envs, seed) -> VecEnv`. A Gymnasium id is turned into
one. An environment object stays what it is and is played in this process.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

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

from ncrl.envs import atari
from ncrl.sb3.engine import check_spaces

EnvFactory = Callable[[int, int], VecEnv]
"""`factory(n_envs, seed)`, called in the process that plays the environments."""

ATARI = "ale_py.env:AtariEnv"  # what Gymnasium builds Atari games with, under all their ids


class RegisteredFactory:
    """Copies of one registered Gymnasium environment, each under SB3's Monitor.

    The registration travels along, so that workers also know an id that was registered in a script
    or a notebook. Ids are those of `gymnasium.make`, also without a version, or with the module
    that registers it before a colon; ValueError for others.
    """

    def __init__(self, env_id: str) -> None:
        module, _, name = env_id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            namespace, plain_name, version = parse_env_id(name)
            if version is None:
                version = find_highest_version(namespace, plain_name)
            self.spec = gymnasium.spec(get_env_id(namespace, plain_name, version))
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"unknown environment {env_id!r}: {error}") from error

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        """Environment i is seeded with `seed + i`."""
        return make_vec_env(self._make, n_envs, seed=seed)

    def _make(self) -> gymnasium.Env[Any, Any]:
        """One environment, made as `make_vec_env` makes one of an id: with pictures if it can."""
        try:
            env = gymnasium.make(self.spec, render_mode="rgb_array")
        except TypeError:
            env = gymnasium.make(self.spec)
        check_spaces(env.observation_space, env.action_space)
        return env


def as_factory(env: str | EnvFactory) -> EnvFactory:
    """The factory of an id, or itself; ValueError for unknown ids and other arguments."""
    if not isinstance(env, str):
        try:
            inspect.signature(env).bind(1, 0)
        except ValueError:
            pass  # it does not tell its arguments
        except TypeError as error:
            raise ValueError(
                f"an environment factory is called as factory(n_envs, seed), which {env!r} is not "
                "made for; for example: lambda n_envs, seed: make_vec_env(make, n_envs, seed=seed)"
            ) from error
        return env
    if env.startswith("ALE/"):
        return atari(env)
    try:
        factory = RegisteredFactory(env)
    except ValueError:
        with suppress(ValueError, ImportError):  # a game whose ids nobody has registered yet
            return atari(env)
        raise
    if factory.spec.entry_point == ATARI and factory.spec.kwargs.get("obs_type", "rgb") == "rgb":
        # `Pong`, `PongNoFrameskip-v4`, `ale_py:ALE/Pong-v5`: one meaning for one game.
        return atari(factory.spec.kwargs["game"])
    return factory


def is_factory(env: object) -> bool:
    """Whether `env` is an id or a factory, and no environment that exists already."""
    is_object = isinstance(env, (VecEnv, gymnasium.Env, type))
    return isinstance(env, str) or (callable(env) and not is_object)


def check_object(env: object) -> None:
    """Raise ValueError for classes, lists, and environments whose spaces are not supported."""
    if env is None:
        return
    if not isinstance(env, (VecEnv, gymnasium.Env)):
        raise ValueError(
            "env must be an environment, a Gymnasium id or a factory(n_envs, seed) -> VecEnv, got "
            f"{env!r}; make_vec_env(id, n_envs) makes a VecEnv, and DummyVecEnv one of a list of "
            "functions"
        )
    check_spaces(env.observation_space, env.action_space)


def build(factory: EnvFactory, n_envs: int, seed: int) -> VecEnv:
    """Build and wrap an environment as SB3 does (images are moved to channel first)."""
    env = factory(n_envs, seed)
    if not isinstance(env, VecEnv) or env.num_envs != n_envs:
        raise ValueError(
            f"the environment factory must return a VecEnv of {n_envs} environments, got {env!r}"
        )
    check_spaces(env.observation_space, env.action_space)
    return BaseAlgorithm._wrap_env(env, monitor_wrapper=False)


def fresh_seed() -> int:
    """A seed that the system draws."""
    return int(np.random.SeedSequence().generate_state(1)[0] >> 1)


def _forwarded(name: str) -> Any:
    """A method that builds the environments if need be, and asks them."""

    def method(self: RemoteEnvs, *arguments: Any, **options: Any) -> Any:
        return getattr(self.envs, name)(*arguments, **options)

    return method


class RemoteEnvs(VecEnv):
    """The workers' environments as SB3 and its callbacks see them: spaces and number.

    The environments that train live in the worker processes. Whoever resets, steps or asks this
    object gets others of the same kind, built in this process when they are first needed. Spaces
    are those of one environment that is built and closed again. ValueError for a factory of
    `VecNormalize` (every worker would gather statistics, nobody would save them) or of
    `SubprocVecEnv`.
    """

    def __init__(self, factory: EnvFactory, n_envs: int) -> None:
        self._factory = factory
        self._envs: VecEnv | None = None
        self._seed: int | None = None
        self._is_resting = False
        probe = build(factory, 1, 0)
        try:
            if unwrap_vec_normalize(probe) is not None:
                raise ValueError(
                    "the environment factory returns a VecNormalize, which workers cannot share; "
                    "give the environment itself, or normalise in a wrapper without statistics"
                )
            if isinstance(probe.unwrapped, SubprocVecEnv):
                raise ValueError(
                    "the environment factory returns a SubprocVecEnv, but workers may not start "
                    "processes of their own; return a DummyVecEnv, or use n_workers=0"
                )
            self.render_mode = probe.render_mode
            super().__init__(n_envs, probe.observation_space, probe.action_space)
        finally:
            probe.close()

    @property
    def envs(self) -> VecEnv:
        """The environments of this process."""
        if self._envs is None:
            seed = fresh_seed() if self._seed is None else self._seed
            self._envs = build(self._factory, self.num_envs, seed)
        return self._envs

    step_async = _forwarded("step_async")
    step_wait = _forwarded("step_wait")
    env_is_wrapped = _forwarded("env_is_wrapped")
    set_attr = _forwarded("set_attr")
    set_options = _forwarded("set_options")
    env_method = _forwarded("env_method")
    get_images = _forwarded("get_images")
    render = _forwarded("render")

    @contextmanager
    def resting(self) -> Iterator[None]:
        """A reset inside the block does nothing: SB3 asks for one, but workers do their own."""
        self._is_resting = True
        try:
            yield
        finally:
            self._is_resting = False

    def reset(self) -> Any:
        return None if self._is_resting else self.envs.reset()

    def close(self) -> None:
        """Close the environments of this process; those of workers end with `learn`."""
        if self._envs is not None:
            self._envs.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        self._seed = seed
        return super().seed(seed) if self._envs is None else self._envs.seed(seed)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        if attr_name == "render_mode":  # which SB3 asks every VecEnv for when it is made
            return [self.render_mode for _ in self._get_indices(indices)]
        return self.envs.get_attr(attr_name, indices)


class RecordedEnv(VecEnvWrapper):
    """Remembers seeds, resets and actions, so that a fresh copy can be brought to the same state.

    Most environments cannot be cloned, but ours play the same game again from the same seed and
    actions. This costs memory (one byte for one of few discrete actions) and time to replay.

    Args:
        venv: the environments, which were never reset.
        seed: the seed that they were built with.
    """

    def __init__(self, venv: VecEnv, seed: int) -> None:
        super().__init__(venv)
        space = self.action_space
        few = isinstance(space, spaces.Discrete) and space.n <= 256  # they count from 0
        self._dtype = np.dtype(np.uint8 if few else space.dtype)
        self._seed: int | None = seed
        """The seed that was set after the last reset, if any."""
        self._episodes: list[tuple[int | None, bytearray]] = []
        """For each reset: the seed that was set before it, and the actions after it."""

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        self._seed = fresh_seed() if seed is None else seed
        return self.venv.seed(self._seed)

    def reset(self) -> Any:
        self._episodes.append((self._seed, bytearray()))
        self._seed = None
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        _, played = self._episodes[-1]
        played += np.asarray(actions).astype(self._dtype).tobytes()
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()

    def history(self) -> list[tuple[int | None, np.ndarray]]:
        """For each reset: the seed that was set before it, or None, and the actions after it,
        [N, n_envs, ...]."""
        shape = (-1, self.num_envs, *(self.action_space.shape or ()))
        return [
            (seed, np.frombuffer(played.copy(), self._dtype).reshape(shape))
            for seed, played in self._episodes
        ]

    def replay(self, history: Sequence[tuple[int | None, np.ndarray]]) -> Any:
        """Repeat a recorded history on a fresh copy; returns the observations it ends in."""
        assert not self._episodes, "only an environment that was never reset can replay"
        obs = None
        for seed, actions in history:
            if seed is not None:
                self.seed(seed)
            obs = self.reset()
            for action in actions.astype(self.action_space.dtype):
                obs = self.step(action)[0]
        return obs
