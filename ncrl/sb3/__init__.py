"""Stable-Baselines3 policies whose policy and value outputs can be Neurocoder layers."""

from ncrl.sb3.engine import EnginePolicy, Latent, RolloutEvaluation, Step
from ncrl.sb3.export import export_policy, load_policy
from ncrl.sb3.onnx import export_onnx
from ncrl.sb3.policies import (
    CnnLstmPolicy,
    CnnPolicy,
    LstmPolicy,
    MlpLstmPolicy,
    MlpPolicy,
    MultiInputLstmPolicy,
    MultiInputPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderCnnPolicy,
    NeurocoderMlpLstmPolicy,
    NeurocoderMlpPolicy,
    NeurocoderMultiInputLstmPolicy,
    NeurocoderMultiInputPolicy,
)
from ncrl.sb3.registry import register

__all__ = [
    "CnnLstmPolicy",
    "CnnPolicy",
    "EnginePolicy",
    "Latent",
    "LstmPolicy",
    "MlpLstmPolicy",
    "MlpPolicy",
    "MultiInputLstmPolicy",
    "MultiInputPolicy",
    "NeurocoderCnnLstmPolicy",
    "NeurocoderCnnPolicy",
    "NeurocoderMlpLstmPolicy",
    "NeurocoderMlpPolicy",
    "NeurocoderMultiInputLstmPolicy",
    "NeurocoderMultiInputPolicy",
    "RolloutEvaluation",
    "Step",
    "export_onnx",
    "export_policy",
    "load_policy",
    "register",
]
