"""Stable-Baselines3 policies whose policy and value outputs can be Neurocoder layers."""

from ncrl.sb3.feedforward import (
    NeurocoderCnnPolicy,
    NeurocoderMlpPolicy,
    NeurocoderMultiInputPolicy,
)
from ncrl.sb3.recurrent import (
    CnnLstmPolicy,
    LstmPolicy,
    MlpLstmPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderMlpLstmPolicy,
    RolloutEvaluation,
    Step,
)
from ncrl.sb3.registry import register

__all__ = [
    "CnnLstmPolicy",
    "LstmPolicy",
    "MlpLstmPolicy",
    "NeurocoderCnnLstmPolicy",
    "NeurocoderCnnPolicy",
    "NeurocoderMlpLstmPolicy",
    "NeurocoderMlpPolicy",
    "NeurocoderMultiInputPolicy",
    "RolloutEvaluation",
    "Step",
    "register",
]
