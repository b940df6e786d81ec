"""The registry of layers that can take a linear layer's seat, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ncrl.baselines import FiLMLinear, HyperNetLinear, MoELinear, NSMLinear
from ncrl.neurocoder import NeurocoderLinear
from ncrl.neurocoder.config import require_switch
from ncrl.settings import suggest

LayerFactory = Callable[..., nn.Module]
"""Called like `nn.Linear`: input width, output width, then options of its own by name."""

LAYERS: Mapping[str, LayerFactory] = {
    "linear": nn.Linear,
    "neurocoder": NeurocoderLinear,
    "hypernet": HyperNetLinear,
    "film": FiLMLinear,
    "moe": MoELinear,
    "nsm": NSMLinear,
}
"""Layer constructors by the name that flags and `policy_kwargs` use."""


def prepared(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What to call in place of a layer in a loop over time, until its weights change: see
    `NeurocoderLinear.prepare`. Any other layer itself."""
    return layer.prepare() if isinstance(layer, NeurocoderLinear) else layer


def make_layer(name: str, in_features: int, out_features: int, **options: Any) -> nn.Module:
    """Build the layer called `name`.

    Raises:
        ValueError: for an unknown name (the nearest one is offered) or an option it has not got.
    """
    if name not in LAYERS:
        raise ValueError(f"unknown layer {name!r}; {suggest(name, LAYERS)}")
    require_switch("bias", options.get("bias", True))
    try:
        return LAYERS[name](in_features, out_features, **options)
    except TypeError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
