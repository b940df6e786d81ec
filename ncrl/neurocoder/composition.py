"""The composition network: a small LSTM that attends to the program memory (paper, section 2.2).

Shapes: B inputs, P slots, H heads, J steps, R = J * H components, K key width, h LSTM width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.neurocoder.attention import content_attention, gated_attention
from ncrl.neurocoder.config import NeurocoderConfig


class CompositionNetwork(nn.Module):
    """From an input to the attention weights of every component of its active program."""

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        gates = config.num_slots if config.num_least_used else 0
        self.lstm = nn.LSTMCell(in_features, config.controller_size)
        self.head = nn.Linear(
            config.controller_size, 3 * config.num_heads * (config.key_dim + gates)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises an LSTM and a Linear, with the gates half open."""
        self.lstm.reset_parameters()
        self.head.reset_parameters()
        with torch.no_grad():
            bias = self.head.bias.view(3, self.config.num_heads, -1)
            bias[..., self.config.key_dim :] = 0

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """Attention weights w^u, w^v, w^s of all components.

        Args:
            x: [B, in].
            keys: [3, P, K], unit length.

        Returns:
            [3, P, R, B]; component n = step * H + head, steps and heads counted from 0.
        """
        query_rows, gate_rows = self._head_rows()
        usage: Tensor | None = None
        weights: list[Tensor] = []
        for hidden in self._controller(x):  # [B, h]
            queries = _project(query_rows, hidden)  # [3, K, H, B]
            weight = content_attention(queries, keys, self.config.sharpness)  # [3, P, H, B]
            if gate_rows is not None:
                gates = _project(gate_rows, hidden)  # [3, P, H, B]
                weight = gated_attention(weight, gates, usage, self.config.num_least_used)
                usage = weight if usage is None else torch.maximum(usage, weight)
            weights.append(weight)
        if len(weights) == 1:
            return weights[0]
        return torch.stack(weights, dim=2).flatten(2, 3)  # [3, P, J, H, B] -> [3, P, R, B]

    def _controller(self, x: Tensor) -> list[Tensor]:
        """Hidden states of the LSTM, which reads the same x at each of the J steps: [B, h] each."""
        lstm = self.lstm
        from_input = F.linear(x, lstm.weight_ih, lstm.bias_ih)  # [B, 4h], shared by all steps
        # The initial state is one row of zeros that broadcasts over the batch.
        hidden = x.new_zeros(1, lstm.hidden_size, dtype=from_input.dtype)
        cell = hidden
        states: list[Tensor] = []
        for _ in range(self.config.num_steps):
            preactivation = from_input + F.linear(hidden, lstm.weight_hh, lstm.bias_hh)
            i, f, g, o = preactivation.chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()  # [B, h]
            hidden = o.sigmoid() * cell.tanh()  # [B, h]
            states.append(hidden)
        return states

    def _head_rows(self) -> tuple[_Rows, _Rows | None]:
        """The head's rows for queries [3, K, H] and gates [3, P, H].

        The stored order is [3, H, K + P]. Moving the heads behind here costs a few thousand
        numbers per forward pass; moving them in the projected tensors would cost B times that.
        """
        config = self.config
        weight = self.head.weight.view(3, config.num_heads, -1, config.controller_size)
        bias = self.head.bias.view(3, config.num_heads, -1)
        weight, bias = weight.transpose(1, 2), bias.transpose(1, 2)  # [3, K + P, H(, h)]
        queries = weight[:, : config.key_dim], bias[:, : config.key_dim]
        if not config.num_least_used:
            return queries, None
        return queries, (weight[:, config.key_dim :], bias[:, config.key_dim :])


_Rows = tuple[Tensor, Tensor]
"""Weight [..., h] and bias [...] of a Linear with several output axes."""


def _project(rows: _Rows, hidden: Tensor) -> Tensor:
    """Linear map of hidden [B, h] onto rows [...], batch last: [..., B]."""
    weight, bias = rows
    out = torch.addmm(bias.reshape(-1, 1), weight.reshape(-1, weight.shape[-1]), hidden.T)
    return out.view(*bias.shape, -1)
