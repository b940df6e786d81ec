"""Attention over program slots: pure functions (paper, section 2.2, Eqs. 5 and 6).

Shapes: B inputs, P slots, H heads, J steps, K key width. The leading 3 stands for the memories u, v
and s, which every operation treats together. Slots come last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl.seat import NORM_FLOOR


def content_attention(queries: Tensor, keys: Tensor, sharpness: float | Tensor) -> Tensor:
    """Softmax of `content_logits` over slots (Eq. 5): sums to 1 over P."""
    return content_logits(queries, keys, sharpness).softmax(dim=2)


def content_logits(queries: Tensor, keys: Tensor, sharpness: float | Tensor) -> Tensor:
    """Cosine between query and key, times the sharpness (the exponent of Eq. 5).

    Args:
        queries: N vectors of any length, [3, N, K]; with keys for each head [H, N, K].
        keys: of any length, [3, P, K] or [H, P, K].
        sharpness: beta.

    Returns:
        [3, N, P] or [H, N, P].
    """
    # Both are brought to unit length in one go: for so few numbers, calls are the cost.
    directions = F.normalize(torch.cat([queries, keys], dim=1), dim=2, eps=NORM_FLOOR)
    query, key = torch.split(directions, [queries.shape[1], keys.shape[1]], dim=1)
    return torch.bmm(query, (sharpness * key).transpose(1, 2))


def two_level_attention(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Softmax within groups of slots, times a softmax over groups that all heads decide together.

    Not in the paper: for memories that grow (results/growing_memory.md).

    What speaks for a group is its largest logit, summed over heads.

    Args:
        logits: [H, B, P].
        sizes: of the groups; none is empty.

    Returns:
        [H, B, P], summing to 1 over P. With one group it is the softmax.
    """
    groups = torch.split(logits, list(sizes), dim=2)
    evidence = torch.stack([group.amax(2).sum(0) for group in groups])  # [groups, B]
    shares = evidence.softmax(dim=0).unsqueeze(2)
    parts = [group.softmax(dim=2) * share for group, share in zip(groups, shares, strict=True)]
    return torch.cat(parts, dim=2)


def usage_attention(usage: Tensor, num_least_used: int) -> Tensor:
    """Weight of the least-used slots: how far each stays below the most used one (Eq. 6).

    Args:
        usage: [..., P], the largest weight each slot has received so far.
        num_least_used: l_I; slots that tie with the l_I-th smallest usage are selected too.

    Returns:
        [..., P], zero outside the selected slots.
    """
    # The selection is a constant to the gradient; the weights themselves are not.
    selected = usage <= kth_smallest(usage.detach(), num_least_used)
    # Not amax, whose gradient is shared by all slots that are used most: see `compose_attention`.
    return (usage.max(dim=-1, keepdim=True).values - usage) * selected


def compose_attention(
    content: Tensor, gates: Tensor | None, num_least_used: int, detach_usage: bool
) -> Tensor:
    """Mix of content and usage attention over J steps: w_j = g c_j + (1 - g) l_j (section 2.2).

    The usage m_j of a slot is the largest weight that it got up to step j.

    Args:
        content: [3, B, J, H, P].
        gates: before the sigmoid, broadcasting with `content`; None for content attention alone.
        num_least_used: l_I.
        detach_usage: whether usage is a constant to the gradient.

    Returns:
        [3, B, J, H, P]. At the first step nothing has been used, and usage attention is zero.

    Where slots or steps tie, the gradient of the usage is that of the first slot and latest step.
    """
    if gates is None:
        return content
    gates = gates.sigmoid()
    if content.shape[2] == 1:
        return content * gates
    # Not indexed step by step: the gradient of each index would be as large as that of all steps.
    (first, *later), (first_gate, *later_gates) = content.unbind(2), gates.unbind(2)
    weights = [first * first_gate]
    usage = weights[0]
    for step_content, gate in zip(later, later_gates, strict=True):
        least_used = usage_attention(usage.detach() if detach_usage else usage, num_least_used)
        weights.append(torch.lerp(least_used, step_content, gate))
        usage = torch.where(weights[-1] >= usage, weights[-1], usage)
    return torch.stack(weights, dim=2)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of values [..., P] over P, equal ones counted apart: [..., 1]."""
    return values.topk(k, dim=-1, largest=False).values[..., -1:]
