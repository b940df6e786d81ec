"""The integration network: from attention weights to the output y = x W (paper, section 2.1).

Singular values and the factor of the residual program are functions here. The composition network
calls them, because the authors' layer computes both in another way.

Shapes: B inputs, P slots, R components. The working program W is never built here: x u_n^T is a sum
of x M_U^T over slots, so two matrix products with the memories and two sums over slots suffice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.weights import LinearWeights


class Attention(NamedTuple):
    """Attention weights over slots for every component of the program, each [..., R, P]."""

    u: Tensor
    v: Tensor
    s: Tensor


class Composed(NamedTuple):
    """Programs of B inputs in terms of the memory, and what the memory makes of the inputs."""

    attention: Attention
    """Each [B, R, P]."""

    sigma: Tensor
    """Singular values, [B, R]; sigma_n belongs to u_n and v_n."""

    residual_scale: Tensor | None
    """Factor of the residual program, [B, 1]; None without one."""

    projection: Tensor | None
    """x M_U^T, [B, P], for the inputs x that the programs are applied to; None until they are
    known, which is later than composition where programs are composed from a context."""


class IntegrationNetwork(nn.Module):
    """The residual program Rho, whole or in two factors, and its gate (Eq. 7).

    There is no gate without `gate_features`, and no Rho where `config.residual` is False.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: NeurocoderConfig,
        gate_features: int | None,
    ) -> None:
        super().__init__()
        self.rank = config.residual_rank
        if self.rank is not None:
            self.left = nn.Parameter(torch.empty(in_features, self.rank))  # [in, r]
            self.right = nn.Parameter(torch.empty(self.rank, out_features))  # [r, out]
        elif config.residual:
            self.residual = nn.Parameter(torch.empty(in_features, out_features))
        self.gate = None if gate_features is None else LinearWeights(gate_features, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch does a Linear (the matrices are stored transposed)."""
        for matrix in self._factors():
            bound = 1 / math.sqrt(matrix.shape[0])
            nn.init.uniform_(matrix, -bound, bound)
        if self.gate is not None:
            self.gate.reset_parameters()

    @torch.no_grad()
    def start_from(self, matrix: Tensor) -> None:
        """Set Rho to `matrix` [in, out], or to its best approximation of the rank there is.

        Where the rank exceeds the number of singular values, the surplus columns of `left` stay as
        they are and the rows of `right` that they meet are zero, so that they can still learn.
        """
        if self.rank is None:
            self.residual.copy_(matrix)
            return
        # There is no SVD in half precision.
        exact = torch.promote_types(matrix.dtype, torch.float32)
        u, s, vh = torch.linalg.svd(matrix.to(exact), full_matrices=False)
        rank = min(self.rank, len(s))
        root = s[:rank].sqrt()
        self.left[:, :rank] = u[:, :rank] * root
        self.right[:rank] = root.unsqueeze(1) * vh[:rank]
        self.right[rank:] = 0

    def forward(self, x: Tensor) -> Tensor:
        """x Rho, [B, out], for x [B, in]."""
        for matrix in self._factors():
            x = x @ matrix
        return x

    def matrix(self) -> Tensor:
        """Rho, [in, out]."""
        first, *rest = self._factors()
        return first @ rest[0] if rest else first

    def _factors(self) -> tuple[Tensor, ...]:
        """Matrices whose product is Rho; none without it."""
        names = ("residual", "left", "right")
        return tuple(getattr(self, name) for name in names if hasattr(self, name))


def read_memory(weights: Tensor, rows: Tensor) -> Tensor:
    """u_n = w^u_n M_U and v_n = w^v_n M_V (Eq. 3); so is M_S read for Eq. 4.

    It is linear: where rows are M_U x^T, it gives u_n x^T, and there is no need for u_n.

    Args:
        weights: attention, [..., R, P].
        rows: of the memory, [..., P, width].

    Returns:
        [..., R, width].
    """
    return weights @ rows


def increments(weight_s: Tensor, memory_s: Tensor) -> Tensor:
    """s_n = softplus(w^s_n M_S), [B, R], for weights [B, R, P] and M_S [P, 1]."""
    return F.softplus(read_memory(weight_s, memory_s)).squeeze(2)


def singular_values(weight_s: Tensor, memory_s: Tensor) -> Tensor:
    """Positive, strictly decreasing singular values sigma_n (Eq. 4).

    In single precision softplus is 0 below -104, and they can be equal or 0 then.

    Args:
        weight_s: [B, R, P], attention over the stored singular values.
        memory_s: [P, 1].

    Returns:
        [B, R]; sigma_n sums softplus(w^s_k M_S) over k >= n.
    """
    s = increments(weight_s, memory_s)
    # One product with a triangle of ones, where `flip`, `cumsum`, `flip` take eight operations.
    return s @ torch.ones(s.shape[1], s.shape[1], dtype=s.dtype, device=s.device).tril()


def residual_scale(gate: Tensor | None, sigma: Tensor) -> Tensor:
    """Factor of the residual program (Eq. 7), [B, 1]: the open part of its gate times the smallest
    singular value; 1 where there is no gate.

    Args:
        gate: before the sigmoid, [B, 1], or None.
        sigma: [B, R], decreasing.
    """
    smallest = sigma[:, -1:]
    return torch.ones_like(smallest) if gate is None else gate.sigmoid() * smallest


def sum_components(sigma: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sum of sigma_n u_n^T v_n over components n (Eq. 1).

    It is linear in u_n and v_n, which may be multiplied with inputs, or not with the memory yet.

    Args:
        sigma: [..., R].
        left: in place of u_n, [..., R, N].
        right: in place of v_n, [..., R, M].

    Returns:
        [..., N, M].
    """
    return (sigma.unsqueeze(-1) * left).transpose(-1, -2) @ right


def mix_slots(composed: Composed) -> Tensor:
    """Weight of every stored v in the output: c of y = c M_V, [B, P] (Eqs. 1 and 3, folded)."""
    weight_u, weight_v, _ = composed.attention
    assert composed.projection is not None
    read = read_memory(weight_u, composed.projection.unsqueeze(2))  # u_n x^T, [B, R, 1]
    return sum_components(composed.sigma, read, weight_v).squeeze(1)


def active_program(composed: Composed, u: Tensor, v: Tensor) -> Tensor:
    """What mixing slots applies, as a matrix [B, in, out], from M_U [P, in] and M_V [P, out].

    For inspection and tests.
    """
    weight_u, weight_v, _ = composed.attention
    return sum_components(composed.sigma, read_memory(weight_u, u), read_memory(weight_v, v))
