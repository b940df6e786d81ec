"""`nn.MultiheadAttention` with projections that are called, so that they can be replaced.

Shapes: B sequences, L queries, S keys and values, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import NO_WEIGHT

ORIGINAL = "original"
"""Attribute of what stands in a module's place that holds it, hidden from torch."""


class OpenAttention(nn.Module):
    """Called as the `nn.MultiheadAttention` that it is made from, to the same result.

    `q_proj`, `k_proj`, `v_proj` and `out_proj` are linear layers over its weights, until
    `with_own_weights` over copies of them.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    in_proj_weight = NO_WEIGHT
    in_proj_bias = None
    """Both keep `nn.TransformerEncoder` and its layers off their fast paths, which read weights."""

    def __init__(self, host: nn.MultiheadAttention) -> None:
        super().__init__()
        vars(self)[ORIGINAL] = host
        self.embed_dim, self.num_heads = host.embed_dim, host.num_heads
        self.batch_first, self.dropout = host.batch_first, host.dropout
        for name, (weight, bias) in parts_of(host).items():
            out_features, in_features = weight.shape
            linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach(), bias.requires_grad)
            self.add_module(name, linear)
        self.train(host.training)

    def with_own_weights(self) -> OpenAttention:
        """Itself, whose training does not change the original any more."""
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
        return self

    @torch.no_grad()
    def close(self) -> nn.Module:
        """The original where this is, with what the linear layers have learned."""
        host: nn.MultiheadAttention = vars(self)[ORIGINAL].to(self.out_proj.weight)
        for name, theirs in parts_of(host).items():
            linear = self.get_submodule(name)
            for ours, part in zip((linear.weight, linear.bias), theirs, strict=True):
                if isinstance(ours, Tensor) and part is not None:
                    part.copy_(ours)
        return host.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Like `nn.MultiheadAttention`; `is_causal` is a hint about `attn_mask`, and needs one."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True says what attn_mask is like, got no attn_mask")
        batched = query.dim() == 3
        swapped = batched and not self.batch_first
        streams = [query, key, value]
        if swapped:
            streams = [each.transpose(0, 1) for each in streams]
        elif not batched:
            streams = [each.unsqueeze(0) for each in streams]
        layers = self.q_proj, self.k_proj, self.v_proj
        # Not unflatten: the older ONNX exporter would take the number of inputs for constant.
        heads = self.num_heads, self.embed_dim // self.num_heads
        q, k, v = (
            layer(each).view(*each.shape[:2], *heads).transpose(1, 2)  # [B, H, L or S, ...]
            for layer, each in zip(layers, streams, strict=True)
        )
        if attn_mask is not None and attn_mask.dim() == 3:  # [B * H, L, S]
            attn_mask = attn_mask.view(q.shape[0], self.num_heads, *attn_mask.shape[1:])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.view(q.shape[0], 1, 1, -1)
        masks = [
            additive(mask, q.dtype) for mask in (attn_mask, key_padding_mask) if mask is not None
        ]
        mask = sum(masks[1:], masks[0]) if masks else None
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # Divided first, as torch does: products may exceed what half precision holds.
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout)  # [B, H, L, S]
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # [B, L, width]
        if not batched:
            return y[0], weights
        return y.transpose(0, 1) if swapped else y, weights


def parts_of(host: nn.MultiheadAttention) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of the four projections, views of the host's parameters."""
    if host.in_proj_weight is not None:
        weights = host.in_proj_weight.chunk(3)
    else:  # keys and values of other widths
        weights = (host.q_proj_weight, host.k_proj_weight, host.v_proj_weight)
    biases = (None,) * 3 if host.in_proj_bias is None else host.in_proj_bias.chunk(3)
    out = host.out_proj
    pairs = [*zip(weights, biases, strict=True), (out.weight, out.bias)]
    return dict(zip(("q_proj", "k_proj", "v_proj", "out_proj"), pairs, strict=True))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores: bools say what must not be attended to."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
