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

    @regularised
    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values [B, 1], log-probabilities [B] and entropy [B], as in SB3.

        A gradient through the log-probabilities brings along that of the heads' own losses.
        """
        evaluation = super().evaluate_actions(obs, actions)
        self.watch_in_training(obs)
        return evaluation


class MlpPolicy(FeedForwardPolicy, ActorCriticPolicy):
    """SB3's `MlpPolicy`, whose heads are its own unless `head` says otherwise.

    Args: those of SB3's policy, and `head`, `head_kwargs`, `orth_coef`, `balance_coef` of
    `ncrl.sb3.heads.ChosenHeads`.
    """

    head = "linear"


class CnnPolicy(FeedForwardPolicy, ActorCriticCnnPolicy):
    """SB3's `CnnPolicy`; arguments as for `MlpPolicy`."""

    head = "linear"


class MultiInputPolicy(FeedForwardPolicy, MultiInputActorCriticPolicy):
    """SB3's `MultiInputPolicy`, for Dict observations; arguments as for `MlpPolicy`."""

    head = "linear"


class NeurocoderMlpPolicy(MlpPolicy):
    """`MlpPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderCnnPolicy(CnnPolicy):
    """`CnnPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderMultiInputPolicy(MultiInputPolicy):
    """`MultiInputPolicy` with Neurocoder heads."""

    head = "neurocoder"
