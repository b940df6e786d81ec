"""Small environments that train within seconds or minutes: for tests, examples and debugging.

Each function returns a picklable factory, called like that of `ncrl.envs.atari`:
`factory(n_envs, seed)` builds a monitored vector environment that plays from exactly that seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from ncrl.envs.checks import positive_integer

ResetReturn = tuple[np.ndarray, dict[str, Any]]
StepReturn = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


@dataclass(frozen=True)
class GymFactory:
    """Vector environments of one Gymnasium environment; picklable if `make` is.

    Raises ValueError if `make` cannot be called.
    """

    make: Callable[[], gym.Env]
    """Builds one environment. It must draw every random number from the seed given to `reset`."""

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise ValueError(
                f"make must be a function that builds an environment, got {self.make!r}; "
                "for an id: functools.partial(gymnasium.make, id)"
            )

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        """`n_envs` environments in this process; number i plays from seed `seed + i`.

        Raises ValueError if `n_envs` is below 1.
        """
        if n_envs < 1:
            raise ValueError(f"n_envs must be at least 1, got {n_envs}")
        env = VecMonitor(DummyVecEnv([self.make] * n_envs))
        env.seed(int(seed))
        return env

    @property
    def observation_space(self) -> spaces.Space[Any]:
        """The observations of one environment."""
        return self.make().observation_space

    @property
    def action_space(self) -> spaces.Space[Any]:
        """The actions of one environment."""
        return self.make().action_space


def masked_cartpole(*, max_steps: int = 500) -> GymFactory:
    """CartPole-v1 whose velocities are hidden: observation [2] = cart position, pole angle.

    Balancing needs memory. The best return is `max_steps`, where an episode is truncated.
    """
    return _limited(_MaskedCartPole, max_steps)


def remember(*, delay: int = 5, n_cues: int = 2) -> GymFactory:
    """A cue is shown once and asked for `delay` timesteps later; see `Remember`.

    The best return is 1; without memory it is 1 / n_cues on average.
    """
    positive_integer("delay", delay)
    positive_integer("n_cues", n_cues)
    return GymFactory(partial(Remember, delay, n_cues))


def light(*, n_actions: int = 4, max_steps: int = 50) -> GymFactory:
    """One of `n_actions` stripes of an image is lit and must be named; see `Light`.

    The best return is `max_steps`; that of chance is max_steps / n_actions on average.
    """
    positive_integer("n_actions", n_actions)
    if n_actions > Light.SIZE:
        raise ValueError(f"n_actions must be at most {Light.SIZE}, got {n_actions}")
    return _limited(Light, max_steps, n_actions)


def key_and_door(*, length: int = 21, max_steps: int = 64) -> GymFactory:
    """A corridor with a key at one end and a door at the other; see `KeyAndDoor`.

    The best return is 1. Chance opens the door in about one of ten thousand episodes.
    """
    positive_integer("length", length)
    return _limited(KeyAndDoor, max_steps, length)


def _limited(kind: Callable[..., gym.Env], max_steps: int, *sizes: int) -> GymFactory:
    steps = positive_integer("max_steps", max_steps)
    return GymFactory(partial(_make_limited, kind, steps, *sizes))


def _make_limited(kind: Callable[..., gym.Env], max_steps: int, *sizes: int) -> gym.Env:
    return gym.wrappers.TimeLimit(kind(*sizes), max_steps)


class KeyAndDoor(gym.Env):
    """A corridor of cells. Walking through the door at its right end, with the key from its left
    end, gives reward 1 and ends the episode; nothing else gives any.

    Observation: float32 [length + 1], the cell as a one-hot vector, and a 1 in the last place with
    the key. Actions: left, right. An episode begins in the middle.
    """

    def __init__(self, length: int):
        self.observation_space = spaces.Box(0, 1, (length + 1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> ResetReturn:
        super().reset(seed=seed)
        self._cell = self._length // 2
        self._has_key = False
        return self._observe(), {}

    def step(self, action: int) -> StepReturn:
        step = 1 if action else -1
        is_open = self._has_key and self._cell + step == self._length
        self._cell = min(max(self._cell + step, 0), self._length - 1)
        self._has_key |= self._cell == 0
        return self._observe(), float(is_open), is_open, False, {}

    def _observe(self) -> np.ndarray:
        observation = np.zeros(self._length + 1, np.float32)
        observation[self._cell] = 1
        observation[-1] = self._has_key
        return observation


class Remember(gym.Env):
    """Shows a cue, then nothing, then a question; answering with the cue gives reward 1.

    Observation: float32 [n_cues + 1], the cue as a one-hot vector at the first timestep only, the
    question as a 1 in the last place. An episode takes `delay + 1` timesteps; only the last action
    matters.
    """

    def __init__(self, delay: int, n_cues: int):
        self.observation_space = spaces.Box(0, 1, (n_cues + 1,), np.float32)
        self.action_space = spaces.Discrete(n_cues)
        self._n_cues, self._delay = n_cues, delay

    def reset(self, *, seed: int | None = None, options: Any = None) -> ResetReturn:
        super().reset(seed=seed)
        self._cue = int(self.np_random.integers(self._n_cues))
        self._time = 0
        return self._observe(self._cue), {}

    def step(self, action: int) -> StepReturn:
        if self._time == self._delay:
            return self._observe(), float(action == self._cue), True, False, {}
        self._time += 1
        asked = self._time == self._delay
        return (self._observe(self._n_cues) if asked else self._observe()), 0.0, False, False, {}

    def _observe(self, lit: int | None = None) -> np.ndarray:
        observation = np.zeros(self._n_cues + 1, np.float32)
        if lit is not None:
            observation[lit] = 1
        return observation


class Light(gym.Env):
    """An image with one lit vertical stripe; the action naming the stripe gives reward 1.

    Observation: uint8 [1, 84, 84], 255 inside the stripe. The next stripe is drawn uniformly,
    whatever the action. Episodes do not end: limit their time.
    """

    SIZE = 84

    def __init__(self, n_actions: int):
        self.observation_space = spaces.Box(0, 255, (1, self.SIZE, self.SIZE), np.uint8)
        self.action_space = spaces.Discrete(n_actions)
        self._n_actions = n_actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> ResetReturn:
        super().reset(seed=seed)
        return self._draw(), {}

    def step(self, action: int) -> StepReturn:
        reward = float(action == self._lit)
        return self._draw(), reward, False, False, {}

    def _draw(self) -> np.ndarray:
        self._lit = int(self.np_random.integers(self._n_actions))
        width = self.SIZE // self._n_actions
        image = np.zeros((1, self.SIZE, self.SIZE), np.uint8)
        image[:, :, self._lit * width : (self._lit + 1) * width] = 255
        return image


class _MaskedCartPole(gym.ObservationWrapper):
    """Keeps position and angle of CartPole's position, velocity, angle, angular velocity."""

    def __init__(self) -> None:
        super().__init__(CartPoleEnv())
        space = self.env.observation_space
        assert isinstance(space, spaces.Box)
        self.observation_space = spaces.Box(space.low[::2], space.high[::2], dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[::2]
