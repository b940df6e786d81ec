"""ncrl: Neurocoder layers, and reinforcement-learning agents built with them."""

from ncrl.injection import eject, inject
from ncrl.neurocoder import (
    Attention,
    NeurocoderConfig,
    NeurocoderConv2d,
    NeurocoderLinear,
    orthogonal_loss,
)

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "NeurocoderConfig",
    "NeurocoderConv2d",
    "NeurocoderLinear",
    "eject",
    "inject",
    "orthogonal_loss",
]
