"""`LowRankLinear`: a linear layer of limited rank, the control for layers that compose weights.

Weights composed by nearly uniform attention hardly depend on the input and have nearly rank 1. What
such a layer does better or worse than a plain one may then be due to the rank alone; this is that
rank without composition. It is a control of the continual-learning tables and no choice of policies
or recipes, so it is not in `ncrl.layers.LAYERS`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncrl.seat import LinearSeat, require_positive, reset_linear


class LowRankLinear(LinearSeat):
    """y = (x A) B + bias with A [in, r] and B [r, out], the same for all inputs.

    Both factors start as torch would initialise a stack of two linear layers.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: r; may exceed the widths, to no avail.
        bias: whether a bias is added.
        device: where the parameters are created.
        dtype: type of the parameters.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size, naming it.

    Example:
        >>> LowRankLinear(1024, 400, rank=1, bias=False)(torch.zeros(20, 1024)).shape
        torch.Size([20, 400])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        require_positive("rank", rank)
        self.rank = rank
        self.left = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises two linear layers, the second with the bias."""
        reset_linear(self.left.T, None)
        reset_linear(self.right.T, self.bias)

    def matrix(self) -> Tensor:
        """A B, [in, out]."""
        return self.left @ self.right

    def _transform(self, x: Tensor) -> Tensor:
        y = x @ self.left @ self.right
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
