"""Sequences made of polynomials. Shapes: N sequences, T points."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NUM_POINTS = 100
NUM_CHUNKS = 4
LARGEST_X = 5.0

DEGREES = (2, 10)  # least and greatest degree of a polynomial, both included
# Points at the beginning of a chunk that nothing announces, left out of `chunk_mse`.
UNPREDICTABLE = 2


class Sequences(NamedTuple):
    """N sequences of T points. Time comes first, as in `GruRegressor`."""

    inputs: Tensor  # x_t / 5 and y_{t-1}, [T, N, 2]
    targets: Tensor  # y_t as observed, divided by the largest |y| of the sequence: [T, N, 1]
    clean: Tensor  # the same without noise, [T, N, 1]
    scale: Tensor  # the largest |y| of each sequence, [N]


def polynomials(
    num_sequences: int,
    generator: torch.Generator,
    *,
    num_points: int = NUM_POINTS,
    num_chunks: int = NUM_CHUNKS,
    noise: float = 0.0,
) -> Sequences:
    """Sequences whose chunks are polynomials of random degree and coefficients.

    In every chunk x runs from -5 to 5 in even steps; degrees are drawn from 2 to 10, all
    coefficients from U(-1, 1). Noise is Gaussian and part of what the network is fed.

    Args:
        num_sequences: N.
        generator: of the random numbers.
        num_points: T.
        num_chunks: polynomials in a sequence.
        noise: standard deviation, as a share of the sequence's largest |y|.
    """
    chunk, place, length = layout(num_points, num_chunks)
    highest = DEGREES[1]
    degree = torch.randint(
        DEGREES[0], highest + 1, (num_sequences, num_chunks, 1), generator=generator
    )
    coefficients = torch.rand(
        num_sequences, num_chunks, highest + 1, dtype=torch.float64, generator=generator
    )
    power = torch.arange(highest + 1)
    coefficients = (2 * coefficients - 1) * (power <= degree)
    x = LARGEST_X * (2 * place.double() / (length - 1) - 1)  # [T]
    y = torch.einsum("ntk,tk->nt", coefficients[:, chunk], x[:, None] ** power)
    scale = y.abs().amax(1)
    clean = (y / scale[:, None]).float().T  # [T, N]
    observed = clean
    if noise:
        observed = clean + noise * torch.randn(clean.shape, generator=generator)
    before = torch.cat([torch.zeros(1, num_sequences), observed[:-1]])
    at = (x / LARGEST_X).float()[:, None].expand_as(clean)
    return Sequences(
        torch.stack([at, before], dim=2), observed[..., None], clean[..., None], scale.float()
    )


def layout(num_points: int, num_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of equal length, or nearly so where the points cannot be divided.

    Returns:
        Of every point, [T] each: its chunk, its place in that, and how many points that has.
    """
    most = num_points // (UNPREDICTABLE + 1)
    if not 1 <= num_chunks <= most:
        raise ValueError(
            f"chunks must lie in 1 .. {most} for {num_points} points, got {num_chunks}"
        )
    chunk = torch.arange(num_points) * num_chunks // num_points
    lengths = chunk.bincount()
    begins = lengths.cumsum(0) - lengths
    return chunk, torch.arange(num_points) - begins[chunk], lengths[chunk]
