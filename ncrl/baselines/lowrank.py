"""`LowRankLinear`: a linear layer of limited rank, the control for layers that compose weights.

Weights composed by nearly uniform attention hardly depend on the input and have nearly rank 1. What
such a layer does better or worse than a plain one may then be due to the rank alone. It is a
control of the continual-learning tables only, so it is not in `ncrl.layers.LAYERS`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncrl.seat import LinearSeat, reset_linear


class LowRankLinear(LinearSeat):
    """y = (x A) B + bias with A [in, r] and B [r, out], the same for all inputs.

    `rank` is r; it may exceed the widths, to no avail.
    """

    rank: int

    def __init__(
        self, in_features: int, out_features: int, *, rank: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, rank=rank)
        self.left = nn.Parameter(torch.empty(in_features, rank))
        self.right = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
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
