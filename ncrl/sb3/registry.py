"""The names of our policies in the algorithms of Stable-Baselines3 and sb3-contrib."""

from __future__ import annotations

from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from ncrl.sb3.feedforward import (
    NeurocoderCnnPolicy,
    NeurocoderMlpPolicy,
    NeurocoderMultiInputPolicy,
)
from ncrl.sb3.recurrent import (
    NeurocoderCnnLstmPolicy,
    NeurocoderMlpLstmPolicy,
    NeurocoderMultiInputLstmPolicy,
)

FEED_FORWARD: tuple[type[BasePolicy], ...] = (
    NeurocoderMlpPolicy,
    NeurocoderCnnPolicy,
    NeurocoderMultiInputPolicy,
)
RECURRENT: tuple[type[BasePolicy], ...] = (
    NeurocoderMlpLstmPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderMultiInputLstmPolicy,
)

# Not TRPO: its natural gradient leaves no place for the heads' own losses.
POLICIES: dict[type[BaseAlgorithm], tuple[type[BasePolicy], ...]] = {
    A2C: FEED_FORWARD,
    PPO: FEED_FORWARD,
    RecurrentPPO: RECURRENT,
}


def register() -> dict[str, list[str]]:
    """Let A2C, PPO and RecurrentPPO know our policies by name: `PPO("NeurocoderMlpPolicy", env)`.

    May be called more than once. All other names keep their meaning.

    Returns:
        By name of the algorithm, the names of the policies that it knows now.
    """
    for algorithm, policies in POLICIES.items():
        algorithm.policy_aliases.update({policy.__name__: policy for policy in policies})
    return {
        algorithm.__name__: [policy.__name__ for policy in policies]
        for algorithm, policies in POLICIES.items()
    }
