"""The registry of layers that can take a linear layer's seat, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import nn

from ncrl.neurocoder import NeurocoderLinear
from ncrl.settings import suggest


class LayerFactory(Protocol):
    """What every entry of the registry is called like: `nn.Linear`'s first arguments."""

    def __call__(self, in_features: int, out_features: int, **options: Any) -> nn.Module: ...


LAYERS: Mapping[str, LayerFactory] = {
    "linear": cast(LayerFactory, nn.Linear),
    "neurocoder": NeurocoderLinear,
}
"""Layer constructors by the name that flags and `policy_kwargs` use."""


def make_layer(name: str, in_features: int, out_features: int, **options: Any) -> nn.Module:
    """Build the layer called `name`.

    Raises:
        ValueError: for an unknown name (the nearest one is offered) or an option it has not got.
    """
    if name not in LAYERS:
        raise ValueError(f"unknown layer {name!r}; {suggest(name, LAYERS)}")
    try:
        return LAYERS[name](in_features, out_features, **options)
    except TypeError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
