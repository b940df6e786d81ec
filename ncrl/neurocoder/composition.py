"""The composition network: a small LSTM that attends to the program memory (paper, section 2.2).

Its result, `Composed`, also holds the singular values (Eq. 4) and the factor of the residual
program (Eq. 7).

Shapes: B inputs, P slots, H heads, J steps, R = J * H components, K key width, h LSTM width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ncrl.neurocoder.attention import (
    compose_attention,
    content_attention,
    content_logits,
    two_level_attention,
)
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.growth import replace_parameter
from ncrl.neurocoder.integration import Attention, Composed, residual_scale, singular_values
from ncrl.neurocoder.memory import ProgramMemory
from ncrl.neurocoder.weights import LinearWeights, LstmWeights


class Composition(nn.Module):
    """From inputs to their programs: the base of the paper's and of the authors' form."""

    config: NeurocoderConfig

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def grow(self, num_slots: int, optimizer: Optimizer | None = None) -> None:
        """Make room for more slots; `config` still has the old number."""

    def forward(
        self, x: Tensor, memory: ProgramMemory, gate: LinearWeights | None, rows: Tensor | None
    ) -> Composed:
        """Compose a program for each input.

        Args:
            x: what the programs are composed from, [B, in].
            memory: where programs are stored.
            gate: of the residual program, if it has one that is linear in the input.
            rows: M_U, to be multiplied with x as well; None if the program is for another input.
        """
        raise NotImplementedError


class CompositionNetwork(Composition):
    """The paper's form: an LSTM reads the input J times, and gives queries and gates each time.

    Component n = step * H + head of a program, steps and heads counted from 0.
    """

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.controller_size
        if config.controller == "linear":
            self.linear = LinearWeights(in_features, width)
        else:
            self.lstm = LstmWeights(in_features, width)
            self.lstm.reset_parameters()  # and again below: what seeds give stays what it was
        self.head = nn.Linear(width, head_size(config))
        self.log_sharpness = nn.Parameter(torch.empty(())) if config.learned_sharpness else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torch does an LSTM and a Linear, with the gates half open."""
        (self.linear if self.config.controller == "linear" else self.lstm).reset_parameters()
        self.head.reset_parameters()
        with torch.no_grad():
            _, gates = split_head(self.head.bias, self.config)
            if gates is not None:
                gates.zero_()
            if self.log_sharpness is not None:
                self.log_sharpness.fill_(math.log(self.config.sharpness))

    def grow(self, num_slots: int, optimizer: Optimizer | None = None) -> None:
        """Gates of new slots start half open, as all gates did."""
        config = replace(self.config, num_slots=self.config.num_slots + num_slots)
        for name in ("weight", "bias"):
            change = partial(widen_head, old=self.config, new=config)
            replace_parameter(self.head, name, change, optimizer)
        self.head.out_features = len(self.head.bias)

    def forward(
        self, x: Tensor, memory: ProgramMemory, gate: LinearWeights | None, rows: Tensor | None
    ) -> Composed:
        config = self.config
        is_linear = config.controller == "linear"
        # Read once: the LSTM meets the same x at every step.
        controller = self.linear.weight if is_linear else self.lstm.weight_ih  # [h or 4h, in]
        gate_weight = None if gate is None else gate.weight
        read = products(x, memory=rows, controller=controller, gate=gate_weight)
        if is_linear:
            states = (read["controller"] + self.linear.bias).unsqueeze(1)  # [B, J, h]
        else:
            states = self.lstm(read["controller"], config.num_steps)
        attention = self._attend(states, memory.keys())
        sigma = singular_values(attention.s, memory.stored("s"))  # [B, R]
        scale = None
        if config.residual:
            scale = residual_scale(None if gate is None else read["gate"] + gate.bias, sigma)
        return Composed(attention, sigma, scale, read.get("memory"))

    def _attend(self, states: Tensor, keys: Tensor) -> Attention:
        """w^u, w^v and w^s, [B, R, P] each, for states [B, J, h] and keys [3, P, K]."""
        config = self.config
        queries, gates = split_head(self.head(states), config)  # [B, J, 3, H, K or P]
        queries = queries.permute(2, 0, 1, 3, 4)  # [3, B, J, H, K]
        learned = self.log_sharpness
        sharpness = config.sharpness if learned is None else learned.exp()
        content = content_attention(queries.flatten(1, 3), keys, sharpness)
        content = content.view(*queries.shape[:4], config.num_slots)
        if gates is not None:
            gates = gates.permute(2, 0, 1, 3, 4)
        weights = compose_attention(content, gates, config.num_least_used, config.detach_usage)
        return Attention(*weights.flatten(2, 3).unbind())


class ProjectionNetwork(Composition):
    """A random projection of the input, never trained, for memories that grow.

    Every head has its own projection and its own keys. All heads together decide how much attention
    each group of slots gets: the slots that were frozen at one time, or those that are trained.
    """

    projection: Tensor
    """[H * K, in], normal with variance 1 / in."""

    center: Tensor
    """Subtracted from inputs first, [in]; zeros, until it is set to the mean of some inputs."""

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.key_dim
        self.register_buffer("projection", torch.empty(width, in_features))
        self.register_buffer("center", torch.empty(in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.projection, std=self.projection.shape[1] ** -0.5)
        nn.init.zeros_(self.center)

    def queries(self, x: Tensor) -> Tensor:
        """Queries of inputs [B, in]: [B, H, K]."""
        queries = F.linear(x - self.center, self.projection)
        return queries.view(x.shape[0], self.config.num_heads, self.config.key_dim)

    def forward(
        self, x: Tensor, memory: ProgramMemory, gate: LinearWeights | None, rows: Tensor | None
    ) -> Composed:
        queries = self.queries(x).transpose(0, 1)
        logits = content_logits(queries, memory.keys(), self.config.sharpness)
        weights = two_level_attention(logits, memory.groups()).transpose(0, 1)  # [B, H, P]
        sigma = singular_values(weights, memory.stored("s"))
        scale = None
        if self.config.residual:
            from_input = None if gate is None else F.linear(x, gate.weight, gate.bias)
            scale = residual_scale(from_input, sigma)
        projection = None if rows is None else x @ rows.T
        return Composed(Attention(weights, weights, weights), sigma, scale, projection)


def products(x: Tensor, **weights: Tensor | None) -> dict[str, Tensor]:
    """x W^T, [B, rows], by the name of each weight W [rows, in], for inputs [B, in].

    The weights are stacked: one product, and one for its gradient.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    stacked = F.linear(x, torch.cat([*given.values()]))
    parts = torch.split(stacked, [len(weight) for weight in given.values()], dim=1)
    return dict(zip(given, parts, strict=True))


def head_size(config: NeurocoderConfig) -> int:
    """Width of the head's output in one step: queries and gates of the three memories."""
    gates = {"slot-head": config.num_heads * config.num_slots, "slot": config.num_slots}
    num_gates = gates.get(config.gate, config.num_heads) if config.num_least_used else 0
    return 3 * (config.num_heads * config.key_dim + num_gates)


def split_head(rows: Tensor, config: NeurocoderConfig) -> tuple[Tensor, Tensor | None]:
    """Views of the head's output [..., rows]: queries [..., 3, H, K] and gates
    [..., 3, H or 1, P or 1], None without usage attention.

    The order of rows: for each memory and head, its query and then its gates. Gates that the heads
    share come after the queries of all heads.
    """
    heads, width = config.num_heads, config.key_dim
    rest = rows.shape[:-1]
    if not config.num_least_used:
        return rows.view(*rest, 3, heads, width), None
    if config.gate == "slot":
        sizes = [heads * width, config.num_slots]
        queries, gates = torch.split(rows.view(*rest, 3, sum(sizes)), sizes, dim=-1)
        return queries.view(*rest, 3, heads, width), gates.unsqueeze(-2)
    sizes = [width, config.num_slots if config.gate == "slot-head" else 1]
    queries, gates = torch.split(rows.view(*rest, 3, heads, sum(sizes)), sizes, dim=-1)
    return queries, gates


def widen_head(rows: Tensor, old: NeurocoderConfig, new: NeurocoderConfig) -> Tensor:
    """Rows of the head, [rows, ...], for the slots of `new`; those of new gates are zero."""
    wide = rows.new_zeros(head_size(new), *rows.shape[1:])
    parts = (split_head(each.movedim(0, -1), config) for each, config in ((rows, old), (wide, new)))
    for source, target in zip(*parts, strict=True):
        if source is not None and target is not None:
            target[..., : source.shape[-1]] = source
    return wide
