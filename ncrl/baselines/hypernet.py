"""`HyperNetLinear`: a linear layer whose weight rows are scaled by a network of the input.

Ha, Dai & Le, "HyperNetworks", ICLR 2017, in the form with one scale per weight row, as the
Neurocoder paper uses it. B stands for the product of the leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import (
    LinearSeat,
    modulation_net,
    require_choice,
    reset_linear,
    reset_modulation_net,
)

SCALES = ("input", "output")


class HyperNetLinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = (s(x) * x) W + bias, with s from a small ReLU network.

    s is 1 at the start, so that training begins as that of a plain linear layer.

    The paper's printed sizes hint at how it was used. A GRU of 28 with this layer behind it has
    3,529 parameters if s is one Linear layer with an output per row of W (28 -> 28). Its Atari
    network, printed as 3.6 million, has 3.65 if one network 512-256-1024 scales both heads, 512
    rows of the actor and 512 of the critic. With at most two Linear layers nothing on its search
    grid is closer; with three, 512-256-256-512 for the actor alone has 3.58. Separate networks, one
    in each layer, reach 3.65 with `hidden=192`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        num_layers: Linear layers of the network behind s, with ReLU between them. 1 is the
            smallest, and what the count above fixes; 2 lets scales depend on the input nonlinearly.
        hidden: width between those layers; without effect if `num_layers` is 1.
        scale: what a scale belongs to: `input`, a row of W [in, out]; `output`, a column, which
            takes fewer parameters where the output is narrow, y = s(x) * (x W) + bias.
        bias: whether a bias is added; it is not scaled.
        device: where the parameters are created.
        dtype: type of the parameters.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size or choice, naming it.

    Example:
        >>> layer = HyperNetLinear(512, 18, num_layers=2, hidden=256)
        >>> layer(torch.zeros(20, 16, 512)).shape
        torch.Size([20, 16, 18])
    """

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
        super().__init__(in_features, out_features)
        require_choice("scale", scale, SCALES)
        self.num_layers = num_layers
        self.hidden = hidden
        self.scale = scale
        self._store_weight(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.scale_net = modulation_net(
            in_features,
            in_features if scale == "input" else out_features,
            num_layers=num_layers,
            hidden=hidden,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises a Linear, with s = 1 for every input."""
        reset_linear(self._stored_weight, self.bias)
        reset_modulation_net(self.scale_net, start=1.0)

    def _transform(self, x: Tensor) -> Tensor:
        scale: Tensor = self.scale_net(x)  # [B, in] or [B, out]
        if self.scale == "input":
            return F.linear(scale * x, self._stored_weight, self.bias)
        y = scale * F.linear(x, self._stored_weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_layers={self.num_layers}, "
            f"hidden={self.hidden}, scale={self.scale!r}, bias={self.bias is not None}"
        )
