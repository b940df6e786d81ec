"""Attention over program slots: pure functions (paper, section 2.2, Eqs. 5 and 6).

These are the equations, differentiable as often as one likes; `ncrl.neurocoder.fused` computes the
same attention faster. Shapes: B inputs, P slots, H heads, J steps, K key width. The leading 3
stands for the memories u, v, s. The batch comes last, so that every reduction over slots or heads
runs over whole vectors of inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_FLOOR = 1e-6
"""Smallest norm a key or query is divided by."""


def unit(vectors: Tensor, dim: int) -> Tensor:
    """`vectors` divided by their norm along `dim`, or by 1e-6 where the norm is smaller."""
    return vectors * inverse_norm(vectors, dim)


def inverse_norm(vectors: Tensor, dim: int) -> Tensor:
    """1 / max(norm along `dim`, 1e-6), with `dim` kept as 1."""
    return (vectors * vectors).sum(dim, keepdim=True).clamp_min(NORM_FLOOR**2).rsqrt()


def content_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax over slots of the sharpened cosine between query and key (Eq. 5).

    Args:
        queries: [3, K, H, B], of length beta (`unit` times the sharpness).
        keys: [3, P, K], unit length.

    Returns:
        [3, P, H, B], summing to 1 over P.
    """
    scores = torch.bmm(keys, queries.flatten(2))  # [3, P, H B]
    return scores.softmax(dim=1).view(*keys.shape[:2], *queries.shape[2:])


def usage_attention(usage: Tensor, num_least_used: int) -> Tensor:
    """Weight of the least-used slots: how far each stays below the most used one (Eq. 6).

    Args:
        usage: [3, P, H, B], the largest weight each slot has received so far.
        num_least_used: l_I; slots that tie with the l_I-th smallest usage are selected too.

    Returns:
        [3, P, H, B], zero outside the selected slots.
    """
    # The selection is a constant to the gradient; the weights themselves are not.
    selected = usage <= kth_smallest(usage.detach(), num_least_used)
    # Not amax, whose gradient is shared by all slots that are used most: see `compose_attention`.
    return (usage.max(dim=1, keepdim=True).values - usage) * selected


def compose_attention(
    content: Tensor, gates: Tensor | None, num_least_used: int, detach_usage: bool
) -> Tensor:
    """Mix of content and usage attention over J steps.

    Args:
        content: [3, P, H, J, B].
        gates: before the sigmoid, broadcasting with `content`; None for content attention alone.
        num_least_used: l_I.
        detach_usage: whether usage is a constant to the gradient.

    Returns:
        [3, P, H, J, B]. At the first step nothing has been used, and usage attention is zero.

    Where slots or steps tie, the gradient of the usage is that of the first slot and latest step,
    as in `ncrl.neurocoder.fused`.
    """
    if gates is None:
        return content
    gates = gates.sigmoid()
    weights = [(gates * content)[..., 0, :]]
    usage = weights[0]
    for step in range(1, content.shape[3]):
        least_used = usage_attention(usage.detach() if detach_usage else usage, num_least_used)
        weights.append(torch.lerp(least_used, content[..., step, :], gates[..., step, :]))
        usage = torch.where(weights[-1] >= usage, weights[-1], usage)
    return torch.stack(weights, dim=3)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of values [3, P, H, B] over P, equal ones counted apart: [3, 1, H, B].

    Needs no index and hardly any memory: groups of slots keep their k smallest values in order, and
    pairs of groups are merged until one is left. Several times faster than `kthvalue` for small k.
    """
    groups = [values]  # groups[i]: the i-th smallest of each group, [3, groups, H, B]
    while (count := groups[0].shape[1]) > 1:
        if count % 2:
            groups = [F.pad(rank, (0, 0, 0, 0, 0, 1), value=math.inf) for rank in groups]
        half = (count + 1) // 2
        first = [rank[:, :half] for rank in groups]
        second = [rank[:, half:] for rank in groups]
        length = min(k, 2 * len(groups))
        wanted = range(1, length + 1) if half > 1 else [length]
        groups = [_merged_rank(first, second, rank) for rank in wanted]
    return groups[-1]


def _merged_rank(first: list[Tensor], second: list[Tensor], rank: int) -> Tensor:
    """The value of this rank, from 1, in two ordered lists of equal length taken together.

    It is the least, over all ways to take `rank` values from the heads of the lists, of the
    greatest value taken.
    """
    length = len(first)
    least: Tensor | None = None
    for ours in range(max(0, rank - length), min(rank, length) + 1):
        if ours == 0:
            greatest = second[rank - 1]
        elif ours == rank:
            greatest = first[rank - 1]
        else:
            greatest = torch.maximum(first[ours - 1], second[rank - ours - 1])
        least = greatest if least is None else torch.minimum(least, greatest)
    assert least is not None
    return least
