"""The names of our policies in the algorithms of Stable-Baselines3 and sb3-contrib."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

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

    May be called more than once. All other names keep their meaning. Names with Lstm given to A2C
    or PPO, and names without given to RecurrentPPO, are answered with a TypeError that says what to
    use instead.

    Returns:
        By name of the algorithm, the names of the policies that it knows now.
    """
    for algorithm, policies in POLICIES.items():
        wrong = FEED_FORWARD if policies is RECURRENT else RECURRENT
        algorithm.policy_aliases.update({policy.__name__: policy for policy in policies})
        algorithm.policy_aliases.update(
            {policy.__name__: refusal(policy.__name__, algorithm.__name__) for policy in wrong}
        )
    return {
        algorithm.__name__: [policy.__name__ for policy in policies]
        for algorithm, policies in POLICIES.items()
    }


@cache
def refusal(name: str, algorithm: str) -> Any:
    """What stands for the class of a policy that the algorithm cannot train."""
    if "Lstm" in name:
        other = name.replace("Lstm", "")
        why = f"has an LSTM, whose state {algorithm} does not carry"
        instead = f"use sb3_contrib.RecurrentPPO or ncrl.agents.A3C, or {algorithm}({other!r}, ...)"
    else:
        other = name.replace("Policy", "LstmPolicy")
        why = f"has no memory, which {algorithm} is made for"
        instead = f"use {algorithm}({other!r}, ...), or A2C, PPO or ncrl.agents.A3C"

    def refuse(*_arguments: Any, **_options: Any) -> NoReturn:
        raise TypeError(f"{name} {why}: {instead}")

    return refuse
