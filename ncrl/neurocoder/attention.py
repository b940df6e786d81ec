"""Attention over program slots: pure functions (paper, section 2.2, Eqs. 5 and 6).

Shapes: B inputs, P slots, H heads, K key width. The leading 3 stands for the memories u, v, s.
The batch comes last, so that every reduction over slots or heads runs over whole vectors of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NORM_FLOOR = 1e-6
"""Smallest norm a key or query is divided by."""


def content_attention(queries: Tensor, keys: Tensor, sharpness: float) -> Tensor:
    """Softmax over slots of the sharpened cosine between query and key (Eq. 5).

    Args:
        queries: [3, K, H, B], any length.
        keys: [3, P, K], unit length (see `unit`).
        sharpness: softmax temperature beta.

    Returns:
        [3, P, H, B], summing to 1 over P.
    """
    _, _, num_heads, batch = queries.shape
    cosine = keys @ unit(queries, dim=1).flatten(2)  # [3, P, H * B]
    return (sharpness * cosine).softmax(dim=1).view(*keys.shape[:2], num_heads, batch)


def unit(vectors: Tensor, dim: int) -> Tensor:
    """`vectors` divided by their norm along `dim`, or by 1e-6 where the norm is smaller."""
    return F.normalize(vectors, dim=dim, eps=NORM_FLOOR)


def usage_attention(usage: Tensor, num_least_used: int) -> Tensor:
    """Weight of the least-used slots: how far each stays below the most used one (Eq. 6).

    Args:
        usage: [3, P, H, B], the largest weight each slot has received so far.
        num_least_used: l_I; slots that tie with the l_I-th smallest usage are selected too.

    Returns:
        [3, P, H, B], zero outside the selected slots.
    """
    threshold = usage.kthvalue(num_least_used, dim=1, keepdim=True).values  # [3, 1, H, B]
    # The selection is a constant to the gradient; the weights themselves are not.
    selected = usage <= threshold.detach()
    return (usage.amax(dim=1, keepdim=True) - usage) * selected


def gated_attention(content: Tensor, gates: Tensor, usage: Tensor | None, least: int) -> Tensor:
    """Mix of content and usage attention by one gate per slot and head.

    Args:
        content: [3, P, H, B].
        gates: [3, P, H, B], before the sigmoid.
        usage: [3, P, H, B] from the steps before, or None at the first step, where nothing has
            been used and usage attention is zero.
        least: l_I.
    """
    gates = gates.sigmoid()
    if usage is None:
        return gates * content
    return torch.lerp(usage_attention(usage, least), content, gates)
