"""The Neurocoder layer: program memory, composition network, integration network."""

from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.layer import Attention, NeurocoderLinear, constant_weights, orthogonal_loss

__all__ = [
    "Attention",
    "NeurocoderConfig",
    "NeurocoderLinear",
    "constant_weights",
    "orthogonal_loss",
]
