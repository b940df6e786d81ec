"""What all layers share: the seat of a linear layer, checks of sizes, a small network.

`...` stands for any leading dimensions, B for their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class NoWeight:
    """What stands where `nn.Linear` has its weight.

    Using it raises, instead of computing something else than the layer does. The fast paths of
    `nn.TransformerEncoder` and its layers, which would read the weights of their linear layers in
    eval mode, ask first whether any of them has `__torch_function__`, and then call the layers.
    """

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any, **__: Any) -> NoReturn:
        cls._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # the protocols of copy, pickle and inspect
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise AttributeError(
            "this layer has no weight as nn.Linear has: it composes one for every input. Call the "
            "layer instead, or do not put it where the host computes with the weight itself"
        )


NO_WEIGHT = NoWeight()


class LinearSeat(nn.Module):
    """A layer that is called like `nn.Linear`; subclasses define `_transform`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
    """

    @property
    def weight(self) -> NoWeight:
        """No matrix, also where the state_dict has one of this name: see `_stored_weight`."""
        return NO_WEIGHT

    bias: Any
    """Parameter or None, as in `nn.Linear`, which hosts may ask for."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        require_positive("in_features", in_features)
        require_positive("out_features", out_features)
        self.in_features = in_features
        self.out_features = out_features

    def _store_weight(self, weight: Tensor) -> None:
        """Add a parameter that is called `weight` in the state_dict, but not as an attribute."""
        self._parameters["weight"] = nn.Parameter(weight)

    @property
    def _stored_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None:  # torch asks for every attribute when it traces
            raise AttributeError(f"{type(self).__name__} stores no weight of its own")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out].

        Raises:
            ValueError: if the last dimension of x is not `in_features`.
        """
        return self._transform(self._flatten(x)).reshape(*x.shape[:-1], self.out_features)

    def _transform(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        raise NotImplementedError

    def _flatten(self, x: Tensor) -> Tensor:
        return flatten(x, in_features=self.in_features)


def flatten(x: Tensor, **width: int) -> Tensor:
    """[..., width] -> [B, width]; raises ValueError, which names the width, for another one."""
    ((name, expected),) = width.items()
    if x.dim() == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"expected an input whose last dimension is {name}={expected}, "
            f"got shape {list(x.shape)}"
        )
    return x.reshape(-1, expected)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the device of x, where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def require_positive(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def require_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def reset_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Initialise weight [..., out, in] and bias [..., out] as torch initialises a Linear."""
    bound = 1 / math.sqrt(weight.shape[-1])
    for tensor in (weight, bias):
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)


def modulation_net(
    in_features: int,
    out_features: int,
    *,
    num_layers: int,
    hidden: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    """`num_layers` Linear layers with ReLU between them, `hidden` wide inside.

    Raises:
        ValueError: if `num_layers` or `hidden` is not a positive integer.
    """
    require_positive("num_layers", num_layers)
    require_positive("hidden", hidden)
    widths = [in_features, *[hidden] * (num_layers - 1), out_features]
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width, device=device, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def reset_modulation_net(net: nn.Sequential, start: float) -> None:
    """Initialise afresh, with a last layer that gives `start` whatever the input."""
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.reset_parameters()
    nn.init.zeros_(linears[-1].weight)
    nn.init.constant_(linears[-1].bias, start)


def require_switch(name: str, value: bool) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
