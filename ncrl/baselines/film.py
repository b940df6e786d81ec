"""`FiLMLinear`: a linear layer whose outputs are scaled and shifted by a network of the input.

Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018. B stands for
the product of the leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncrl.seat import LinearSeat, modulation_net, reset_modulation_net


class FiLMLinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = (1 + gamma(x)) * (x W + bias) + beta(x).

    gamma and beta, one of each per output, come from one small ReLU network. Both are 0 at the
    start, so that training begins as that of a plain linear layer.

    The paper's printed size tells how it was used: a GRU of 32 with this layer behind it has 3,555
    parameters if gamma and beta are one Linear layer (32 -> 2).

    Args:
        in_features: width of the input.
        out_features: width of the output.
        num_layers: Linear layers of the network behind gamma and beta, with ReLU between them. 1
            is the smallest, and what the count above fixes.
        hidden: width between those layers; without effect if `num_layers` is 1.
        bias: whether x W has a bias, which gamma scales too.
        device: where the parameters are created.
        dtype: type of the parameters.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size, naming it.

    Example:
        >>> layer = FiLMLinear(512, 18, num_layers=2, hidden=64)
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
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.num_layers = num_layers
        self.hidden = hidden
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.film_net = modulation_net(
            in_features,
            2 * out_features,
            num_layers=num_layers,
            hidden=hidden,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @property
    def bias(self) -> Tensor | None:
        """Of the linear part."""
        return self.linear.bias

    def reset_parameters(self) -> None:
        """As torch initialises a Linear, with gamma = beta = 0 for every input."""
        self.linear.reset_parameters()
        reset_modulation_net(self.film_net, start=0.0)

    def _transform(self, x: Tensor) -> Tensor:
        gamma, beta = self.film_net(x).chunk(2, dim=1)  # [B, out] each
        y: Tensor = (1 + gamma) * self.linear(x) + beta
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_layers={self.num_layers}, "
            f"hidden={self.hidden}, bias={self.linear.bias is not None}"
        )
