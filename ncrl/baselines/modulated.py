"""Linear layers that a small ReLU network of the input modulates: `HyperNetLinear`, `FiLMLinear`.

Ha, Dai & Le, "HyperNetworks", ICLR 2017, in the form with one scale per weight row, as the
Neurocoder paper uses it; Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer",
AAAI 2018. Both begin training as a plain linear layer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import LinearSeat, reset_linear


class HyperNetLinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = (s(x) * x) W + bias, with s from a small ReLU network.

    The paper's printed sizes hint at how it was used: one Linear layer (28 -> 28) behind a GRU of
    28, 3,529 parameters; for Atari, 3.6 million, about `hidden=192` in each of two layers.

    Further arguments are those of `nn.Linear`.

    Args:
        num_layers: Linear layers of the network behind s, with ReLU between them.
        hidden: width between those layers; without effect if `num_layers` is 1.
        scale: what a scale belongs to: `input`, a row of W [in, out]; `output`, a column:
            y = s(x) * (x W) + bias.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size or choice, naming it.
    """

    CHOICES: ClassVar = {"scale": ("input", "output")}
    scale: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_layers: int = 2,
        hidden: int = 64,
        scale: str = "input",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            dtype=dtype,
            num_layers=num_layers,
            hidden=hidden,
            scale=scale,
        )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._store_weight(torch.empty(out_features, in_features, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None
        width = in_features if scale == "input" else out_features
        self.scale_net = relu_network(in_features, width, num_layers, hidden, place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises a Linear, with s = 1 for every input."""
        reset_linear(self._stored_weight, self.bias)
        reset_network(self.scale_net, start=1.0)

    def _transform(self, x: Tensor) -> Tensor:
        scale: Tensor = self.scale_net(x)  # [B, in] or [B, out]
        if self.scale == "input":
            return F.linear(scale * x, self._stored_weight, self.bias)
        y = scale * F.linear(x, self._stored_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FiLMLinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = (1 + gamma(x)) * (x W + bias) + beta(x).

    gamma and beta, one of each per output, come from one small ReLU network. The paper's printed
    size tells that it was one Linear layer (32 -> 2) behind a GRU of 32: 3,555 parameters.

    Further arguments are those of `nn.Linear`.

    Args:
        num_layers: Linear layers of the network behind gamma and beta, with ReLU between them.
        hidden: width between those layers; without effect if `num_layers` is 1.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size, naming it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_layers: int = 2,
        hidden: int = 64,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, dtype=dtype, num_layers=num_layers, hidden=hidden
        )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear = nn.Linear(in_features, out_features, bias=bias, **place)
        self.film_net = relu_network(in_features, 2 * out_features, num_layers, hidden, place)
        self.reset_parameters()

    @property
    def bias(self) -> Tensor | None:
        """Of the linear part."""
        return self.linear.bias

    def reset_parameters(self) -> None:
        """As torch initialises a Linear, with gamma = beta = 0 for every input."""
        self.linear.reset_parameters()
        reset_network(self.film_net, start=0.0)

    def _transform(self, x: Tensor) -> Tensor:
        gamma, beta = self.film_net(x).chunk(2, dim=1)  # [B, out] each
        y: Tensor = (1 + gamma) * self.linear(x) + beta
        return y


def relu_network(
    in_features: int, out_features: int, num_layers: int, hidden: int, place: dict[str, Any]
) -> nn.Sequential:
    """`num_layers` Linear layers with ReLU between them, `hidden` wide inside."""
    widths = [in_features, *[hidden] * (num_layers - 1), out_features]
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width, **place), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def reset_network(network: nn.Sequential, start: float) -> None:
    """Initialise afresh, with a last layer that gives `start` whatever the input."""
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.reset_parameters()
    nn.init.zeros_(linears[-1].weight)
    nn.init.constant_(linears[-1].bias, start)
