"""How far stored rows are from orthonormal: the loss L_o (paper, section 2.3).

Shapes: M holds P rows of width d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def distances_from_orthonormal(matrices: Sequence[Tensor]) -> Tensor:
    """|M M^T - I_P| in the Frobenius norm for every M of the same P, [number of matrices].

    The gradient at exactly 0 is 0.
    """
    grams = torch.stack([rows @ rows.T for rows in matrices])
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    distances: Tensor = torch.linalg.vector_norm(grams - eye, dim=(1, 2))
    return distances


def orthonormality_floor(rows: Tensor) -> float:
    """The least |M M^T - I_P| for a matrix of this shape, sqrt(P - d) where P > d."""
    num_rows, width = rows.shape
    return math.sqrt(max(0, num_rows - width))
