"""Policies without memory, for A2C, PPO and `ncrl.agents.A3C`: SB3's own, with heads of choice."""

from __future__ import annotations

from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from ncrl.sb3.engine import EnginePolicy
from ncrl.sb3.heads import ChosenHeads
from ncrl.sb3.regularise import Evaluation, regularised


class FeedForwardPolicy(EnginePolicy, ChosenHeads):
    """What the policies of this module have in common; any of SB3's actor-critics may follow."""

    head = "linear"

    @regularised
    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values [B, 1], log-probabilities [B] and entropy [B], as in SB3."""
        return super().evaluate_actions(obs, actions)


class MlpPolicy(FeedForwardPolicy, ActorCriticPolicy):
    """SB3's `MlpPolicy`, with further arguments: those of `ncrl.sb3.heads.ChosenHeads`."""


class CnnPolicy(FeedForwardPolicy, ActorCriticCnnPolicy):
    """SB3's `CnnPolicy`, likewise."""


class MultiInputPolicy(FeedForwardPolicy, MultiInputActorCriticPolicy):
    """SB3's `MultiInputPolicy`, for Dict observations, likewise."""


class NeurocoderMlpPolicy(MlpPolicy):
    """`MlpPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderCnnPolicy(CnnPolicy):
    """`CnnPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderMultiInputPolicy(MultiInputPolicy):
    """`MultiInputPolicy` with Neurocoder heads."""

    head = "neurocoder"
