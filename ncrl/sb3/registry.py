"""The names of our policies in the algorithms of Stable-Baselines3 and sb3-contrib."""

from __future__ import annotations

from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from ncrl.sb3 import policies
from ncrl.sb3.engine import EnginePolicy

BASES = (EnginePolicy, policies.FeedForwardPolicy, policies.LstmPolicy)

POLICIES: dict[str, type[EnginePolicy]] = {
    name: kind
    for name, kind in vars(policies).items()
    if isinstance(kind, type) and issubclass(kind, EnginePolicy) and kind not in BASES
}
"""Policies that `ncrl.agents.A3C` and RLlib's modules take by name."""

CODED = {name: kind for name, kind in POLICIES.items() if name.startswith("Neurocoder")}
"""Those that `register` adds to SB3's algorithms, which have the other names themselves."""

# Not TRPO: its natural gradient leaves no place for the heads' own losses.
ALGORITHMS: tuple[type[BaseAlgorithm], ...] = (A2C, PPO, RecurrentPPO)


def register() -> dict[str, list[str]]:
    """Let A2C, PPO and RecurrentPPO know our policies by name: `PPO("NeurocoderMlpPolicy", env)`.

    May be called more than once. All other names keep their meaning. A2C and PPO know the policies
    with an LSTM too, which say what to use instead when they are to be trained.

    Returns:
        By name of the algorithm, the names of the policies that it can train.
    """
    known: dict[str, list[str]] = {}
    for algorithm in ALGORITHMS:
        needs_lstm = algorithm is RecurrentPPO
        fitting = [name for name in CODED if ("Lstm" in name) == needs_lstm]
        known[algorithm.__name__] = fitting
        for name in fitting if needs_lstm else CODED:
            algorithm.policy_aliases[name] = CODED[name]
    return known
