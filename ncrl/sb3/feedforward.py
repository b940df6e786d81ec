"""Policies without memory, for Stable-Baselines3's A2C and PPO: its own, with other heads."""

from __future__ import annotations

from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from ncrl.sb3.heads import ChosenHeads
from ncrl.sb3.regularise import Evaluation, regularised


class FeedForwardPolicy(ChosenHeads):
    """What the policies of this module have in common; any of SB3's actor-critics may follow."""

    @regularised
    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values [B, 1], log-probabilities [B] and entropy [B], as in SB3.

        A gradient through the log-probabilities brings along that of the heads' own losses.
        """
        return super().evaluate_actions(obs, actions)


class NeurocoderMlpPolicy(FeedForwardPolicy, ActorCriticPolicy):
    """SB3's `MlpPolicy` with Neurocoder heads.

    Args: those of SB3's policy, and `head`, `head_kwargs`, `orth_coef`, `balance_coef` of
    `ncrl.sb3.heads.ChosenHeads`.
    """


class NeurocoderCnnPolicy(FeedForwardPolicy, ActorCriticCnnPolicy):
    """SB3's `CnnPolicy` with Neurocoder heads; arguments as for `NeurocoderMlpPolicy`."""


class NeurocoderMultiInputPolicy(FeedForwardPolicy, MultiInputActorCriticPolicy):
    """SB3's `MultiInputPolicy`, for Dict observations, with Neurocoder heads; likewise."""
