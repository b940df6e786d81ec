"""The names of our policies in the algorithms of Stable-Baselines3 and sb3-contrib."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from ncrl.sb3 import feedforward, recurrent

POLICIES: dict[str, Any] = {
    name: kind
    for module in (feedforward, recurrent)
    for name, kind in vars(module).items()
    if name.startswith("Neurocoder")
}

# Not TRPO: its natural gradient leaves no place for the heads' own losses.
ALGORITHMS: tuple[type[BaseAlgorithm], ...] = (A2C, PPO, RecurrentPPO)


def register() -> dict[str, list[str]]:
    """Let A2C, PPO and RecurrentPPO know our policies by name: `PPO("NeurocoderMlpPolicy", env)`.

    May be called more than once. All other names keep their meaning. Names with Lstm given to A2C
    or PPO, and names without given to RecurrentPPO, are answered with a TypeError that says what to
    use instead.

    Returns:
        By name of the algorithm, the names of the policies that it knows now.
    """
    known: dict[str, list[str]] = {}
    for algorithm in ALGORITHMS:
        known[algorithm.__name__] = names = []
        for name, kind in POLICIES.items():
            if ("Lstm" in name) == (algorithm is RecurrentPPO):
                algorithm.policy_aliases[name] = kind
                names.append(name)
            else:
                algorithm.policy_aliases[name] = refusal(name, algorithm.__name__)
    return known


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
