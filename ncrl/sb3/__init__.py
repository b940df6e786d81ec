"""Stable-Baselines3 policies whose policy and value outputs can be Neurocoder layers."""

from ncrl.sb3.recurrent import (
    CnnLstmPolicy,
    LstmPolicy,
    MlpLstmPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderMlpLstmPolicy,
    RolloutEvaluation,
    Step,
)

__all__ = [
    "CnnLstmPolicy",
    "LstmPolicy",
    "MlpLstmPolicy",
    "NeurocoderCnnLstmPolicy",
    "NeurocoderMlpLstmPolicy",
    "RolloutEvaluation",
    "Step",
]
