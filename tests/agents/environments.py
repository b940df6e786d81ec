"""Environments for the tests of the engine, importable in worker processes.

`Ticking` counts: every reward, observation and info says which process played which timestep, so a
test can tell whether anything was lost, repeated or misplaced. `Trouble` makes it fail on purpose,
in worker processes only.
"""

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
)


def in_worker() -> bool:
    return multiprocessing.parent_process() is not None or "RAY_RAYLET_PID" in os.environ


@dataclass(frozen=True)
class Trouble:
    """What goes wrong in a worker, and when."""

    kind: str
    """`build`, `raise`, `exit`, `hang`, `nan reward`, `nan observation` or `big info`."""
    at: int = 0
    """The timestep of an environment at which it happens."""
    flag: str | None = None
    """A file: whoever creates it has the trouble, all others are spared. None: everybody has it."""

    def strikes(self, kind: str, tick: int) -> bool:
        if self.kind != kind or tick != self.at or not in_worker():
            return False
        if self.flag is None:
            return True
        try:
            os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class Ticking(gym.Env):
    """Reward and observation are the number of timesteps this environment has played.

    The first observation after `reset` is the same number, negative. An episode lasts `length`
    timesteps, then it ends or, with `truncate`, is cut off.
    """

    def __init__(
        self, length: int, truncate: bool, trouble: Trouble, seed: int, pause: float
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(3)
        self._length, self._truncate, self._trouble = length, truncate, trouble
        self._seed, self._pause = seed, pause
        self._tick = 0
        self._time = 0
        self._action = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self._time = 0
        return np.array([-self._tick, self._action], np.float32), {}

    def step(self, action: int) -> tuple:
        self._tick += 1
        self._time += 1
        self._action = int(action)
        time.sleep(self._pause)
        if self._trouble.strikes("raise", self._tick):
            raise RuntimeError("the cable came off")
        if self._trouble.strikes("exit", self._tick):
            os._exit(7)
        if self._trouble.strikes("hang", self._tick):
            time.sleep(3600)
        observation = np.array([self._tick, self._action], np.float32)
        if self._trouble.strikes("nan observation", self._tick):
            observation[1] = np.nan
        reward = np.nan if self._trouble.strikes("nan reward", self._tick) else float(self._tick)
        over = self._time == self._length
        info: dict[str, Any] = {"pid": os.getpid(), "tick": self._tick, "seed": self._seed}
        if over:
            info["threads"] = torch.get_num_threads()
            info["environ"] = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        if self._trouble.kind == "big info" and in_worker():
            info["picture"] = np.zeros(1 << 20, np.uint8)
        return observation, reward, over and not self._truncate, over and self._truncate, info


@dataclass(frozen=True)
class TickingFactory:
    """Vector environments of `Ticking`."""

    length: int = 5
    truncate: bool = False
    trouble: Trouble = Trouble("none")
    log: str | None = None
    """A folder that receives one file for each call in a worker, with the seed in it."""
    together: int = 1
    """A worker waits until so many calls are logged."""
    pause: float = 0.0
    """Seconds that a timestep takes."""
    second_build: float = 0.0
    """Seconds that the second logged call takes."""

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        if self.log is not None and in_worker():
            (Path(self.log) / f"{os.getpid()}-{time.monotonic_ns()}").write_text(str(seed))
            while len(os.listdir(self.log)) < self.together:
                time.sleep(0.01)
            if len(os.listdir(self.log)) == 2:
                time.sleep(self.second_build)
        if self.trouble.strikes("build", 0):
            raise OSError("no such game")
        return VecMonitor(
            DummyVecEnv([lambda: self.make(seed) for _ in range(n_envs)]), info_keywords=()
        )

    def make(self, seed: int) -> Ticking:
        return Ticking(self.length, self.truncate, self.trouble, seed, self.pause)


class Scripted(VecEnv):
    """Plays back observations, rewards and dones, and remembers the actions it was given.

    Row t of `dones` says how timestep t ended: 0 not at all, 1 terminated, 2 cut off by a time
    limit. `terminal_observations[t]` is shown in the info of an episode that ended.
    """

    def __init__(
        self,
        observations: np.ndarray,
        rewards: np.ndarray,
        dones: np.ndarray,
        terminal_observations: np.ndarray | None = None,
        action_space: spaces.Space | None = None,
    ) -> None:
        low, high = (0, 255) if observations.dtype == np.uint8 else (-np.inf, np.inf)
        space = spaces.Box(low, high, observations.shape[2:], observations.dtype)
        self.render_mode = None
        super().__init__(observations.shape[1], space, action_space or spaces.Discrete(3))
        self.observations, self.rewards, self.dones = observations, rewards, dones
        self.terminal_observations = terminal_observations
        self.actions: list[np.ndarray] = []

    def reset(self) -> np.ndarray:
        return self.observations[0].copy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions.append(np.array(actions))

    def step_wait(self) -> VecEnvStepReturn:
        t = len(self.actions) - 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(self.dones[t]):
            infos[i]["TimeLimit.truncated"] = bool(self.dones[t, i] == 2)
            if self.terminal_observations is not None:
                infos[i]["terminal_observation"] = self.terminal_observations[t, i]
        return self.observations[t + 1].copy(), self.rewards[t], self.dones[t] > 0, infos

    def close(self) -> None:
        pass

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list:
        raise NotImplementedError
