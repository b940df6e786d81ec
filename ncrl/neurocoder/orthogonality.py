"""How far stored rows are from orthonormal: the loss L_o (paper, section 2.3).

Shapes: M holds P rows of width d.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ncrl.neurocoder.tracing import is_watched, plain_gradients, wants_plain_gradient


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """|M M^T - I_P| in the Frobenius norm, a scalar; its gradient at exactly 0 is 0."""
    if is_watched():
        return _distance(rows)[0]
    distance: Tensor = _Distance.apply(rows)  # type: ignore[no-untyped-call]
    return distance


def squared_distance_from_orthonormal(rows: Tensor) -> Tensor:
    """|M M^T - I_P|^2, a scalar."""
    error, missing = _gram_error(rows)
    return error.square().sum() + missing


def orthonormality_floor(rows: Tensor) -> float:
    """The least |M M^T - I_P| for a matrix of this shape, sqrt(P - d) where P > d."""
    num_rows, width = rows.shape
    return math.sqrt(max(0, num_rows - width))


def _distance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """|M M^T - I_P| and the error of `_gram_error`."""
    error, missing = _gram_error(rows)
    distance: Tensor = torch.linalg.vector_norm(error)
    return ((distance.square() + missing).sqrt() if missing else distance), error


def _gram_error(rows: Tensor) -> tuple[Tensor, int]:
    """The smaller of M M^T - I_P and M^T M - I_d, and by how much its squared norm falls short of
    that of the first: |M M^T - I_P|^2 = |M^T M - I_d|^2 + (P - d)."""
    num_rows, width = rows.shape
    left = rows.T if width < num_rows else rows
    eye = torch.eye(len(left), dtype=rows.dtype, device=rows.device)
    return torch.addmm(eye, left, left.T, beta=-1), max(0, num_rows - width)


class _Distance(torch.autograd.Function):
    """The gradient 2 (M M^T - I) M / |M M^T - I| is one product, where torch's own has one for
    each of the two M."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        distance, error = _distance(rows)
        ctx.save_for_backward(rows, error, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor | None:
        rows, error, distance = ctx.saved_tensors
        if wants_plain_gradient(grad_outputs):
            (gradient,) = plain_gradients(_plain, [rows], [True], grad_outputs)
            return gradient
        scale = torch.where(distance > 0, 2 * grad_outputs[0] / distance, 0)
        # (M M^T - I) M = M (M^T M - I)
        product: Tensor = rows @ error if rows.shape[1] < len(rows) else error @ rows
        return product.mul_(scale)


def _plain(rows: Tensor) -> tuple[Tensor]:
    return (_distance(rows)[0],)
