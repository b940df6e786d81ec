"""The integration network: from attention weights to the output y = x W (paper, section 2.1).

Shapes: B inputs, P slots, R components. The working program W is never built here: x u_n^T is a sum
of x M_U^T over slots, so two matrix products with the memories and two sums over slots suffice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.neurocoder.config import NeurocoderConfig


class Composed(NamedTuple):
    """A working program in terms of the memory."""

    weights: Tensor
    """Attention over slots of the memories u, v, s: [3, R, P, B]."""

    sigma: Tensor
    """Singular values, [R, B]; sigma_n belongs to u_n and v_n."""

    residual_scale: Tensor | None
    """Factor of the residual program, [B]; None without one."""


class IntegrationNetwork(nn.Module):
    """The residual program Rho, whole or in two factors, and its gate (Eq. 7)."""

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.rank = config.residual_rank
        if self.rank is None:
            self.residual = nn.Parameter(torch.empty(in_features, out_features))  # [in, out]
        else:
            self.left = nn.Parameter(torch.empty(in_features, self.rank))  # [in, r]
            self.right = nn.Parameter(torch.empty(self.rank, out_features))  # [r, out]
        self.gate = nn.Linear(in_features, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises a Linear (the matrices are stored transposed)."""
        for matrix in self._factors():
            bound = 1 / math.sqrt(matrix.shape[0])
            nn.init.uniform_(matrix, -bound, bound)
        self.gate.reset_parameters()

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: the gate."""
        return self.gate.parameters()

    @torch.no_grad()
    def start_from(self, matrix: Tensor) -> None:
        """Set Rho to `matrix` [in, out], or to its best approximation of the rank there is.

        Where the rank exceeds the number of singular values, the surplus columns of `left` stay as
        they are and the rows of `right` that they meet are zero, so that they can still learn.
        """
        if self.rank is None:
            self.residual.copy_(matrix)
        else:
            set_product(self.left, self.right, matrix)

    def forward(self, x: Tensor) -> Tensor:
        """x Rho, [B, out], for x [B, in]."""
        for matrix in self._factors():
            x = x @ matrix
        return x

    def matrix(self) -> Tensor:
        """Rho, [in, out]."""
        first, *rest = self._factors()
        return first @ rest[0] if rest else first

    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """sig(gate(x)) * sigma_R, the factor in front of Rho: [B], for sigma [R, B]."""
        return self.scale_from(self.gate.weight @ x.T, sigma)

    def scale_from(self, from_input: Tensor, sigma: Tensor) -> Tensor:
        """`scale` from the gate's weight times x, [1, B]."""
        return (from_input[0] + self.gate.bias).sigmoid() * sigma[-1]

    def _factors(self) -> tuple[Tensor, ...]:
        return (self.residual,) if self.rank is None else (self.left, self.right)


def set_product(left: Tensor, right: Tensor, matrix: Tensor) -> None:
    """Make left @ right the best approximation of `matrix` in place; left [n, r], right [r, m]."""
    exact = torch.promote_types(matrix.dtype, torch.float32)  # there is no SVD in half precision
    u, s, vh = torch.linalg.svd(matrix.to(exact), full_matrices=False)
    rank = min(left.shape[1], len(s))
    root = s[:rank].sqrt()
    left[:, :rank] = u[:, :rank] * root
    right[:rank] = root.unsqueeze(1) * vh[:rank]
    # Columns of `left` beyond the rank of any matrix of this shape keep their values, so that the
    # rows that cancel them here can learn.
    right[rank:] = 0


def singular_values(weight_s: Tensor, memory_s: Tensor) -> Tensor:
    """Positive, strictly decreasing singular values sigma_n (Eq. 4).

    Args:
        weight_s: [R, P, B], attention over the stored singular values.
        memory_s: [P, 1].

    Returns:
        [R, B]; sigma_n sums softplus(w^s_k M_S) over k >= n.
    """
    return sum_of_smaller(F.softplus((memory_s.T @ weight_s).squeeze(1)))


def sum_of_smaller(increments: Tensor, dim: int = 0) -> Tensor:
    """sigma_n = sum of s_k over k >= n, for s with R along `dim`."""
    return increments.flip(dim).cumsum(dim).flip(dim)


def mix_slots(composed: Composed, projection: Tensor) -> Tensor:
    """Weight of every stored v in the output: c of y = c M_V, [P, B] (Eqs. 1 and 3, folded).

    Args:
        composed: the active program.
        projection: M_U x^T, [P, B].
    """
    weight_u, weight_v, _ = composed.weights  # [R, P, B] each
    strength = composed.sigma * (weight_u * projection).sum(1)  # [R, B]
    mixture: Tensor = (weight_v * strength.unsqueeze(1)).sum(0)
    return mixture


def active_program(composed: Composed, u: Tensor, v: Tensor) -> Tensor:
    """sum_n sigma_n u_n^T v_n itself, [B, in, out], from M_U [P, in] and M_V [P, out].

    For inspection and tests.
    """
    weight_u, weight_v, _ = composed.weights
    left = torch.einsum("rpb,pi->bri", weight_u, u)  # u_n, [B, R, in]
    right = torch.einsum("rpb,po->bro", weight_v, v)  # v_n, [B, R, out]
    return torch.einsum("rb,bri,bro->bio", composed.sigma, left, right)
