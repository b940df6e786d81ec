"""What a Neurocoder layer does on a batch of inputs, as numbers for curves and histograms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ncrl.neurocoder import NeurocoderLinear

RANK_SAMPLES = 16
"""Inputs whose programs are built in full to measure their rank."""


class LayerReport(NamedTuple):
    """See the paper's section 2 for the quantities; P slots, R components."""

    attention_entropy: float  # mean entropy over slots, in units of log P: 1 is uniform
    max_attention: float  # largest attention weight of any input, component and memory
    effective_rank: float  # mean `participation_ratio` of the active programs
    orthogonality: float  # the loss above the least value that the memories' shapes allow
    slot_usage: Tensor  # mean share of the attention that each slot receives, [P]
    singular_values: Tensor  # mean sigma_n of the active programs, [R]


@torch.no_grad()
def describe(layer: NeurocoderLinear, x: Tensor) -> LayerReport:
    """Measure `layer` on inputs x [B, in], B >= 1; a convolution on `description(images)`."""
    weights = torch.stack(layer.attend(x))  # [3, B, R, P]
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))  # 1e-12 is 0 in float16
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1).mean()
    uniform = torch.tensor(max(layer.config.num_slots, 2)).log()
    floor = layer.memory.orthogonality_floor()
    few = spread(x, RANK_SAMPLES)
    return LayerReport(
        attention_entropy=float(entropy / uniform),
        max_attention=float(weights.max()),
        effective_rank=float(participation_ratio(layer.active_program(few)).mean()),
        orthogonality=float(layer.memory.orthogonality()) - floor,
        slot_usage=shares.mean(dim=(0, 1, 2)),
        singular_values=layer.singular_values(x).mean(0),
    )


def participation_ratio(matrices: Tensor) -> Tensor:
    """(sum s^2)^2 / sum s^4 over the singular values s of matrices [..., m, n]: [...], 1 to n; 0
    for a matrix of zeros.

    The sums are |W|^2 and |W W^T|^2 (Frobenius), so that no singular value has to be computed.
    """
    matrices = matrices.float()
    # Fourth powers of numbers far from 1 would leave single precision.
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    matrices = matrices / largest.clamp_min(torch.finfo(torch.float32).tiny)
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    squares = matrices.square().sum((-2, -1))
    fourth_powers: Tensor = (matrices @ matrices.mT).square().sum((-2, -1))
    return squares.square() / fourth_powers.clamp_min(1e-30)


def spread(x: Tensor, count: int) -> Tensor:
    """At most `count` of inputs x [B, ...], from everywhere: neighbours may be alike."""
    return x[torch.linspace(0, len(x) - 1, min(len(x), count)).long()]
