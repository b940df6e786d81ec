"""The composition network: a small LSTM that attends to the program memory (paper, section 2.2).

Shapes: B inputs, P slots, H heads, J steps, R = J * H components, K key width, h LSTM width.
The batch comes last; J B stands for an axis that runs over the inputs of step 1, then of step 2...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncrl.neurocoder.attention import compose_attention, content_attention, unit
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.controller import plain_states
from ncrl.neurocoder.integration import Composed, IntegrationNetwork, singular_values
from ncrl.neurocoder.tracing import is_watched


class Control(NamedTuple):
    """What the composition network says about its inputs, before the memory is read.

    Queries and gates are linear in the state of the controller. They are kept in that form because
    gates, one for every slot, head and input, are by far the largest thing the network computes.
    `split_slots` says what the rows mean.
    """

    hidden: Tensor
    """State of the controller, [h, J B]."""

    weight: Tensor
    """[rows, h]."""

    bias: Tensor
    """[rows]."""

    sharpness: Tensor
    """beta, a scalar."""


class Constants(NamedTuple):
    """What follows from the weights of the composition network alone."""

    controller_weight: Tensor
    """That of the LSTM's state, weight_hh: [4h, h]. A linear controller has no state: [0, h]."""

    controller_bias: Tensor
    """[4h or h]."""

    weight: Tensor
    """Of the head, rows as `split_slots` reads them: [rows, h]."""

    bias: Tensor
    """[rows]."""

    sharpness: Tensor
    """beta, a scalar."""


class CompositionNetwork(nn.Module):
    """From an input to the attention weights of every component of its active program."""

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.controller_size
        if config.controller == "linear":
            self.linear = nn.Linear(in_features, width)
        else:
            self.lstm = nn.LSTMCell(in_features, width)
        self.head = nn.Linear(width, 3 * (config.num_heads * config.key_dim + self._num_gates()))
        self.log_sharpness = nn.Parameter(torch.empty(())) if config.learned_sharpness else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch initialises an LSTM and a Linear, with the gates half open."""
        (self.linear if self.config.controller == "linear" else self.lstm).reset_parameters()
        self.head.reset_parameters()
        with torch.no_grad():
            _, gates = split_head(self.head.bias, self.config)
            if gates is not None:
                gates.zero_()
            if self.log_sharpness is not None:
                self.log_sharpness.fill_(math.log(self.config.sharpness))

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: everything."""
        return self.parameters()

    def forward(
        self, x: Tensor, keys: Tensor, memory_s: Tensor, integration: IntegrationNetwork | None
    ) -> Composed:
        """Compose a program for each input.

        Args:
            x: [B, in].
            keys: [3, P, K], unit length.
            memory_s: [P, 1].
            integration: the residual and its gate, if the program has one.

        Returns:
            The program; its component n = step * H + head, steps and heads counted from 0.
        """
        from_input = self.input_weight() @ x.T
        weights = attend(
            run_controller(from_input, self.constants(), self.config), keys, self.config
        )
        sigma = singular_values(weights[2], memory_s)
        scale = None if integration is None else integration.scale(x, sigma)
        return Composed(weights, sigma, scale)

    def input_weight(self) -> Tensor:
        """What x is multiplied with, [4h or h, in]: the LSTM reads the same x at every step."""
        return self.linear.weight if self.config.controller == "linear" else self.lstm.weight_ih

    def constants(self) -> Constants:
        """What `run_controller` needs beside the input."""
        weight, bias = (by_slot(rows, self.config) for rows in (self.head.weight, self.head.bias))
        head = weight, bias, self.sharpness(bias)
        if self.config.controller == "linear":
            return Constants(bias.new_empty(0, len(self.linear.bias)), self.linear.bias, *head)
        return Constants(self.lstm.weight_hh, self.lstm.bias_ih + self.lstm.bias_hh, *head)

    def first_rows(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of what meets x in the first step: the gates i, g, o of the LSTM, each
        [h, in]. From a zero state the forget gate and weight_hh have nothing to act on."""
        if self.config.controller == "linear":
            return self.linear.weight, self.linear.bias
        lstm = self.lstm
        i, _, g, o = lstm.weight_ih.chunk(4)
        i_bias, _, g_bias, o_bias = (lstm.bias_ih + lstm.bias_hh).chunk(4)
        return torch.cat([i, g, o]), torch.cat([i_bias, g_bias, o_bias])

    def sharpness(self, like: Tensor) -> Tensor:
        """beta, a scalar of the type of `like`."""
        if self.log_sharpness is None:
            return like.new_full((), self.config.sharpness)
        return self.log_sharpness.exp()

    def _num_gates(self) -> int:
        """Gates of one memory in one step."""
        config = self.config
        if not config.num_least_used:
            return 0
        per_gate = {"slot-head": config.num_heads * config.num_slots, "slot": config.num_slots}
        return per_gate.get(config.gate, config.num_heads)


def run_controller(from_input: Tensor, constants: Constants, config: NeurocoderConfig) -> Control:
    """What the network says, from `input_weight` x, [4h or h, B]."""
    state, bias, *head = constants
    return Control(plain_states(from_input, state, bias, config.num_steps), *head)


def attend(control: Control, keys: Tensor, config: NeurocoderConfig) -> Tensor:
    """Attention weights w^u, w^v, w^s of all components, [3, R, P, B], for keys [3, P, K]."""
    rows = torch.addmm(control.bias.unsqueeze(1), control.weight, control.hidden)  # [rows, J B]
    queries, gates = split_slots(rows, config)
    queries = unit(queries, dim=1)  # [3, K, H, J B]
    content = content_attention(queries * control.sharpness, keys)  # [3, P, H, J B]
    by_step = config.num_steps, rows.shape[1] // config.num_steps  # J, B
    if gates is not None:
        gates = gates.reshape(*gates.shape[:3], *by_step)
    weights = compose_attention(
        content.view(*content.shape[:3], *by_step),
        gates,
        config.num_least_used,
        config.detach_usage,
    )  # [3, P, H, J, B]
    return weights.permute(0, 3, 2, 1, 4).flatten(1, 2)


def split_head(rows: Tensor, config: NeurocoderConfig) -> tuple[Tensor, Tensor | None]:
    """Views of what the head says, [..., rows]: queries [..., 3, H, K] and gates
    [..., 3, H or 1, P or 1], None without usage attention.

    Stored are, for each memory and head, its queries and then its gates; gates shared by the heads
    come after the queries of all of them.
    """
    heads, width = config.num_heads, config.key_dim
    rest = rows.shape[:-1]
    if not config.num_least_used:
        return rows.view(*rest, 3, heads, width), None
    if config.gate == "slot":
        rows = rows.view(*rest, 3, heads * width + config.num_slots)
        queries, gates = rows[..., : heads * width], rows[..., heads * width :]
        return queries.view(*rest, 3, heads, width), gates.unsqueeze(-2)
    rows = rows.view(*rest, 3, heads, rows.shape[-1] // (3 * heads))
    return rows[..., :width], rows[..., width:]


def by_slot(rows: Tensor, config: NeurocoderConfig) -> Tensor:
    """Rows of the head [rows, ...] in the order that `split_slots` reads: those of the queries
    [3, K, H], then those of the gates [3, P or 1, H or 1]."""
    if is_watched():
        return _by_slot(rows, config)
    reordered: Tensor = _Reordered.apply(rows, *_slot_order(len(rows), config, rows.device))  # type: ignore[no-untyped-call]
    return reordered


def _by_slot(rows: Tensor, config: NeurocoderConfig) -> Tensor:
    parts = split_head(rows.movedim(0, -1), config)
    return torch.cat(
        [
            part.transpose(-1, -2).movedim((-3, -2, -1), (0, 1, 2)).flatten(0, 2)
            for part in parts
            if part is not None
        ]
    )


@lru_cache(maxsize=64)
def _slot_order(
    num_rows: int, config: NeurocoderConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The row that comes to each place in `by_slot`, and the place that each row comes to."""
    # Whoever asks first: what is made in inference mode could not be used in training.
    with torch.inference_mode(False):
        order = _by_slot(torch.arange(num_rows, device=device), config)
        return order, order.argsort()


class _Reordered(torch.autograd.Function):
    """Rows in another order: whole rows are copied, where views of views are copied number by
    number, and torch's own gradient adds them up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0].index_select(0, ctx.inverse), None, None


def split_slots(rows: Tensor, config: NeurocoderConfig) -> tuple[Tensor, Tensor | None]:
    """Views of what rows in the order of `by_slot` say, [rows, J B]: queries [3, K, H, J B] and
    gates [3, P or 1, H or 1, J B], None without usage attention."""
    heads, width, batch = config.num_heads, config.key_dim, rows.shape[1]
    queries = rows[: 3 * width * heads].view(3, width, heads, batch)
    if not config.num_least_used:
        return queries, None
    gates = rows[3 * width * heads :]
    slots = 1 if config.gate == "head" else config.num_slots
    return queries, gates.view(3, slots, 1 if config.gate == "slot" else heads, batch)
