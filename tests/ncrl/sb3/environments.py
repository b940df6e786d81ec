"""An environment of any spaces."""

from typing import Any

import gymnasium as gym
from gymnasium import spaces

TWO = spaces.Discrete(2)


class Still(gym.Env[Any, Any]):
    """Shows samples of its space, takes any action of its own, and nothing matters."""

    def __init__(self, observation_space: Any, action_space: Any = TWO) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 1.0, False, False, {}
