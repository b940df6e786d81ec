"""How far stored rows are from orthonormal: the loss L_o (paper, section 2.3).

Shapes: M holds P rows of width d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl.seat import without_autocast


def distances_from_orthonormal(matrices: Sequence[Tensor]) -> Tensor:
    """|M M^T - I_P| in the Frobenius norm for every M of the same P, [number of matrices].

    The gradient at exactly 0 is 0. Always in the matrices' own precision: under autocast what is
    left of nearly orthonormal rows would be rounding.
    """
    with without_autocast(matrices[0]):
        grams = torch.stack([rows @ rows.T for rows in matrices])
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    distances: Tensor = torch.linalg.vector_norm(grams - eye, dim=(1, 2))
    return distances


def orthonormality_floor(rows: Tensor) -> float:
    """The least |M M^T - I_P| for a matrix of this shape, sqrt(P - d) where P > d."""
    num_rows, width = rows.shape
    return math.sqrt(max(0, num_rows - width))


def orthogonal_part(rows: Tensor, others: Tensor) -> Tensor:
    """What rows [n, d] have at right angles to others [m, d], at their own lengths.

    The rows as they are if there is no room (m >= d).
    """
    if len(others) >= rows.shape[1]:
        return rows
    exact = torch.promote_types(rows.dtype, torch.float32)  # there is no QR in half precision
    basis = torch.linalg.qr(others.to(exact).T).Q  # [d, m]
    free: Tensor = rows.to(exact)
    for _ in range(2):  # once more against rounding
        free = free - free @ basis @ basis.T
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (F.normalize(free, dim=1) * lengths).to(rows.dtype)
