"""The integration network: from attention weights to the output y = x W (paper, section 2.1).

Shapes: B inputs, P slots, R components. The working program W is never built here: x u_n^T is a sum
of x M_U^T over slots, so two matrix products with the memories and two sums over slots suffice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class IntegrationNetwork(nn.Module):
    """The residual program Rho and its gate (Eq. 7)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.residual = nn.Parameter(torch.empty(in_features, out_features))  # [in, out]
        self.gate = nn.Linear(in_features, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises a Linear (the residual is stored transposed)."""
        bound = 1 / math.sqrt(self.residual.shape[0])
        nn.init.uniform_(self.residual, -bound, bound)
        self.gate.reset_parameters()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The residual program's share of y, [B, out], from x [B, in] and sigma [R, B]."""
        y: Tensor = self.scale(x, sigma) * (x @ self.residual)
        return y

    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """sig(gate(x)) * sigma_R, the factor in front of Rho, [B, 1]."""
        scale: Tensor = self.gate(x).sigmoid() * sigma[-1].unsqueeze(1)
        return scale


def singular_values(weight_s: Tensor, memory_s: Tensor) -> Tensor:
    """Positive, strictly decreasing singular values sigma_n (Eq. 4).

    Args:
        weight_s: [P, R, B], attention over the stored singular values.
        memory_s: [P, 1].

    Returns:
        [R, B]; sigma_n sums softplus(w^s_k M_S) over k >= n.
    """
    num_slots, num_components, batch = weight_s.shape
    raw = (memory_s.T @ weight_s.reshape(num_slots, -1)).view(num_components, batch)
    sigma: Tensor = F.softplus(raw).flip(0).cumsum(0).flip(0)
    return sigma


def apply_active_program(
    x: Tensor, weight_u: Tensor, weight_v: Tensor, sigma: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """x times the active program sum_n sigma_n u_n^T v_n, in folded form (Eqs. 1 and 3).

    Args:
        x: [B, in].
        weight_u: [P, R, B], and weight_v: [P, R, B], attention over the singular vectors.
        sigma: [R, B].
        u: memory M_U [P, in], and v: memory M_V [P, out].

    Returns:
        [B, out].
    """
    projection = u @ x.T  # [P, B]
    strength = sigma * (weight_u * projection.unsqueeze(1)).sum(0)  # [R, B]
    mixture = (weight_v * strength).sum(1)  # [P, B]
    return mixture.T @ v


def active_program(
    weight_u: Tensor, weight_v: Tensor, sigma: Tensor, u: Tensor, v: Tensor
) -> Tensor:
    """The active program itself, [B, in, out]: for inspection and tests. Arguments as above."""
    left = torch.einsum("prb,pi->bri", weight_u, u)  # u_n, [B, R, in]
    right = torch.einsum("prb,po->bro", weight_v, v)  # v_n, [B, R, out]
    return torch.einsum("rb,bri,bro->bio", sigma, left, right)
