"""The Neurocoder layer: program memory, composition network, integration network."""

from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.convolution import NeurocoderConv2d
from ncrl.neurocoder.integration import Attention
from ncrl.neurocoder.layer import NeurocoderLinear, orthogonal_loss
from ncrl.neurocoder.official import OfficialNeurocoderLinear, layer_class

__all__ = [
    "Attention",
    "NeurocoderConfig",
    "NeurocoderConv2d",
    "NeurocoderLinear",
    "OfficialNeurocoderLinear",
    "layer_class",
    "orthogonal_loss",
]
