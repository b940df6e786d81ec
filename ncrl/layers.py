"""The registry of layers that can take a linear layer's seat, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ncrl.baselines import FiLMLinear, HyperNetLinear, MoELinear, NSMLinear
from ncrl.checks import require_switch, suggest
from ncrl.neurocoder import NeurocoderConfig, NeurocoderLinear, layer_class

LayerFactory = Callable[..., nn.Module]
"""Called like `nn.Linear`: input width, output width, then options of its own by name."""


def neurocoder(
    in_features: int, out_features: int, config: NeurocoderConfig | None = None, **options: Any
) -> NeurocoderLinear:
    """`NeurocoderLinear`, or `OfficialNeurocoderLinear` where the preset says so."""
    preset = options.get("preset", getattr(config, "preset", "paper"))
    return layer_class(preset)(in_features, out_features, config, **options)


LAYERS: Mapping[str, LayerFactory] = {
    "linear": nn.Linear,
    "neurocoder": neurocoder,
    "hypernet": HyperNetLinear,
    "film": FiLMLinear,
    "moe": MoELinear,
    "nsm": NSMLinear,
}
"""Layer constructors by the name that flags and `policy_kwargs` use."""


def make_layer(name: str, in_features: int, out_features: int, **options: Any) -> nn.Module:
    """Build the layer called `name`; ValueError for unknown names and options."""
    if name not in LAYERS:
        raise ValueError(f"unknown layer {name!r}; {suggest(name, LAYERS)}")
    require_switch("bias", options.get("bias", True))
    try:
        return LAYERS[name](in_features, out_features, **options)
    except TypeError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
