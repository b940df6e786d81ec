"""Atari games for RLlib: whole batches of games per env runner, without an object per game."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from ncrl.envs.atari import MAX_SEED, atari, game_options


def atari_vector_env(config: dict[str, Any]) -> VectorEnv:
    """For `ray.tune.registry.register_env(name, atari_vector_env)`, with
    `env_runners(gym_env_vectorize_mode="vector_entry_point")`.

    Args:
        config: RLlib's `env_config`: the arguments of `ncrl.envs.atari`, and `num_envs`, which
            RLlib puts there. Rewards are raw; learners clip them.

    Raises:
        ValueError: for an unknown game, and for the protocol `classic`: where returns end at lost
            lives, RLlib would drop a timestep after each, and report scores of single lives.
    """
    from ale_py import AtariVectorEnv

    options = dict(config)
    n_envs = options.pop("num_envs", 1)
    factory = atari(**options)
    if factory.rules.life_ends_return:
        raise ValueError(
            f"RLlib cuts episodes where returns end, which protocol {factory.protocol!r} does at "
            "every lost life; use 'machado'"
        )

    largest = len(factory.action_meanings) - 1

    class Games(AtariVectorEnv):  # type: ignore[misc]
        def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
            actions = np.asarray(actions)
            if actions.min() < 0 or actions.max() > largest:  # ale-py would never return
                raise ValueError(f"expected actions from 0 to {largest}, got {actions}")
            obs, rewards, terminated, truncated, _ = super().step(actions)
            # RLlib would make a list of dicts of the infos at every step.
            return obs, rewards.astype(np.float32), terminated, truncated, {}

        def reset(
            self, *, seed: Any = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            obs, _ = super().reset(seed=None if seed is None else int(seed) % MAX_SEED)
            return obs, {}

    mode = AutoresetMode.NEXT_STEP
    return Games(factory.game, n_envs, autoreset_mode=mode, **game_options(factory))
