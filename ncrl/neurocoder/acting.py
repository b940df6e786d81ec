"""One step of attention for few inputs and no gradient: what an agent does to choose its actions.

The equations are those of `composition` and `integration`. With few inputs a layer is a matter of
microseconds per operation, so this takes as few as it can: weights that meet the same input are put
side by side once, and inputs are rows.

Shapes: B inputs, P slots, H heads (and components, with one step), K key width, h LSTM width.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl.neurocoder.attention import inverse_norm
from ncrl.neurocoder.caching import Source, is_comparable
from ncrl.neurocoder.composition import CompositionNetwork, split_head
from ncrl.neurocoder.integration import IntegrationNetwork

if TYPE_CHECKING:
    from ncrl.neurocoder.layer import NeurocoderLinear

FEW = 16
"""Up to this many inputs rows are faster than the columns of `ncrl.neurocoder.fused`."""

SMALL = 1 << 18
"""Up to this many weights it pays to compare them with a copy at every call."""


def suits(weight: Tensor, x: Tensor) -> bool:
    """Whether `Weights` is the fast way for inputs x [B, in] and such a weight."""
    return (
        is_comparable(weight)  # first: a compiler takes a size that is asked about for a constant
        and len(x) <= FEW
        and x.dtype == weight.dtype
        and not torch.is_autocast_enabled("cpu")
    )


class Weights:
    """The weights of a one-step layer, arranged for acting, and what they were arranged from."""

    @torch.no_grad()
    def __init__(self, layer: NeurocoderLinear) -> None:
        composition, memory, integration = layer.composition, layer.memory, layer.integration
        assert isinstance(composition, CompositionNetwork)
        assert integration is None or isinstance(integration, IntegrationNetwork)
        self.config = layer.config
        self.source = Source(layer)
        self.keys = (memory.keys() * composition.sharpness(memory.u)).transpose(1, 2).contiguous()
        self.s, self.v = memory.s.detach().clone(), memory.v.detach().clone()
        # What meets the state of the controller: all queries first, then all gates.
        head = composition.head
        parts = split_head(head.weight.T, self.config), split_head(head.bias, self.config)
        weight, bias = (
            torch.cat([part.flatten(-3) for part in views if part is not None], dim=-1)
            for views in parts
        )
        self.head_weight, self.head_bias = weight.contiguous(), bias.contiguous()
        gates = parts[1][1]
        self.gate_shape = None if gates is None else gates.shape  # [3, H or 1, P or 1]
        # What meets x: M_U, the input part of the controller, the gate of the residual, and Rho.
        rows = [(memory.u, memory.u.new_zeros(len(memory.u))), composition.first_rows()]
        if integration is not None:
            gate, residual = integration.gate, integration.matrix().T
            rows += [(gate.weight, gate.bias), (residual, residual.new_zeros(len(residual)))]
        ends = list(accumulate(len(bias) for _, bias in rows))
        self.ranges = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        self.x_weight = torch.cat([weight for weight, _ in rows]).T.contiguous()  # [in, ...]
        self.x_bias = torch.cat([bias for _, bias in rows])
        self.is_lstm = self.config.controller != "linear"
        self.bias = layer.bias.detach().clone() if layer.bias is not None else None
        # sigma_n sums over k >= n.
        self.sum_of_smaller = self.v.new_ones(self.config.num_heads, self.config.num_heads).tril()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        batch, heads = len(x), self.config.num_heads
        read = torch.addmm(self.x_bias, x, self.x_weight)
        projection, rows, *residual = [read[:, part] for part in self.ranges]
        if self.is_lstm:
            i, g, o = rows.chunk(3, dim=1)
            rows = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()  # from a zero state
        rows = torch.addmm(self.head_bias, rows, self.head_weight)
        num_queries = 3 * heads * self.config.key_dim
        queries = (
            rows[:, :num_queries].reshape(batch, 3, heads * self.config.key_dim).transpose(0, 1)
        )
        queries = queries.reshape(3, batch * heads, self.config.key_dim)
        queries = queries * inverse_norm(queries, dim=2)
        scores = torch.bmm(queries, self.keys)  # [3, B H, P]
        weights = scores.softmax(dim=2).view(3, batch, heads, scores.shape[2])
        if self.gate_shape is not None:
            gates = rows.sigmoid_()[:, num_queries:]  # in one piece, whatever the queries in it
            weights = weights * gates.view(batch, *self.gate_shape).transpose(0, 1)
        weight_u, weight_v, weight_s = weights.unbind()  # [B, H, P]
        read_u = (weight_u * projection.unsqueeze(1)).sum(2)  # x u_n^T, [B, H]
        sigma = F.softplus((weight_s @ self.s).squeeze(2)) @ self.sum_of_smaller
        mixture = torch.bmm((sigma * read_u).unsqueeze(1), weight_v).squeeze(1)
        y = mixture @ self.v if self.bias is None else torch.addmm(self.bias, mixture, self.v)
        if residual:
            gate, share = residual
            y.addcmul_(gate.sigmoid() * sigma[:, -1:], share)
        return y
