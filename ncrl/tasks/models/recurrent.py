"""The recurrent networks: a GRU for polynomials, and a Neural Turing machine with one read and one
write head (Graves, Wayne & Danihelka 2014).

Shapes: T timesteps, B sequences, h units, a memory of N rows of M numbers. A dimension of 2 stands
for the heads of the machine, read before write.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import NORM_FLOOR
from ncrl.tasks.models.mlp import PLAIN, Coded

# Added to the sum of sharpened weights, so that weights which are all zero stay zero.
WEIGHT_FLOOR = 1e-16
# Widths of what addresses the memory besides the key: strength, gate, shift, sharpening.
ADDRESS_SIZES = (1, 1, 3, 1)


class GruRegressor(nn.Module):
    """GRU and a coded output layer (paper, section 4.1: input x_t and y_{t-1}, output y_t)."""

    def __init__(self, hidden_size: int, *, coded: Coded = PLAIN) -> None:
        super().__init__()
        self.gru = nn.GRU(2, hidden_size)
        self.output = coded(hidden_size, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, B, 2] -> [T, B, 1], and the state [1, B, h] after the last timestep. `state` is that
        before timestep 0; zero if None."""
        hidden, state = self.gru(inputs, state)  # [T, B, h]
        return self.output(hidden), state


class NtmState(NamedTuple):
    """What an `Ntm` carries from one timestep to the next."""

    hidden: Tensor  # output of the controller, [B, h]
    cell: Tensor  # of the controller, [B, h]
    read: Tensor  # what was read last, [B, M]
    weights: Tensor  # where the heads read and wrote last, [B, 2, N]
    memory: Tensor  # [B, N, M]


class Ntm(nn.Module):
    """An LSTM that reads and writes an external memory (paper, section 4.3).

    A timestep: the controller sees the input and what was read before; the read head reads, then
    the write head erases and adds; the output layer sees the controller's output and what was read
    now. That order, the learned initial state of the controller, the fixed start of the memory and
    the zero weights before the first timestep are those of the authors' code for the same tasks
    (github.com/thaihungle/NSM). The two interface layers are coded.

    Args:
        in_features: numbers per timestep; 10 in the paper, 8 bits and 2 channels.
        num_outputs: logits per timestep; 9 by the paper's parameter counts, 8 bits and a channel
            that marks the end of an answer.
        controller_size: h.
        num_rows: N.
        row_size: M.
        tanh: put keys and what is added to the memory through a tanh, as the paper says, and the
            authors' code does not.
        official_count: hold the two group norms that the authors' heads create and never use.
        coded: kind of the interface layers.
    """

    memory_start: Tensor
    read_start: Tensor

    def __init__(
        self,
        in_features: int = 10,
        num_outputs: int = 9,
        controller_size: int = 200,
        *,
        num_rows: int = 128,
        row_size: int = 20,
        tanh: bool = False,
        official_count: bool = False,
        coded: Coded = PLAIN,
    ) -> None:
        super().__init__()
        self.tanh = tanh
        self.controller = nn.LSTMCell(in_features + row_size, controller_size)
        self.hidden_start = nn.Parameter(0.05 * torch.randn(controller_size))
        self.cell_start = nn.Parameter(0.05 * torch.randn(controller_size))
        address_size = row_size + sum(ADDRESS_SIZES)
        self.write_sizes = [address_size, row_size, row_size]  # address, erase, add
        write_size = sum(self.write_sizes)
        self.read_interface = coded(controller_size, address_size)
        self.write_interface = coded(controller_size, write_size)
        if official_count:
            self.unused_norms = nn.ModuleList(
                nn.GroupNorm(1, size) for size in (address_size, write_size)
            )
        self.output = nn.Linear(controller_size + row_size, num_outputs)

        bound = (num_rows + row_size) ** -0.5
        memory_start = torch.empty(num_rows, row_size).uniform_(-bound, bound)
        self.register_buffer("memory_start", memory_start)  # [N, M]
        self.register_buffer("read_start", 0.01 * torch.randn(row_size))  # [M]

    def initial_state(self, batch_size: int) -> NtmState:
        """The state before the first timestep of `batch_size` sequences."""
        num_rows, row_size = self.memory_start.shape
        return NtmState(
            hidden=self.hidden_start.expand(batch_size, -1),
            cell=self.cell_start.expand(batch_size, -1),
            read=self.read_start.expand(batch_size, row_size),
            weights=self.memory_start.new_zeros(batch_size, 2, num_rows),
            memory=self.memory_start.expand(batch_size, num_rows, row_size),
        )

    def forward(self, inputs: Tensor, state: NtmState | None = None) -> tuple[Tensor, NtmState]:
        """[T, B, in_features], T at least 1 -> logits [T, B, num_outputs], and the state after the
        last timestep. `state` is that before timestep 0; `initial_state` if None."""
        if state is None:
            state = self.initial_state(inputs.shape[1])
        outputs = []
        for x in inputs:
            output, state = self.step(x, state)
            outputs.append(output)
        return torch.stack(outputs), state

    def step(self, x: Tensor, state: NtmState) -> tuple[Tensor, NtmState]:
        """One timestep: x [B, in_features] -> logits [B, num_outputs], next state."""
        controller_input = torch.cat([x, state.read], dim=1)
        hidden, cell = self.controller(controller_input, (state.hidden, state.cell))

        written = self.write_interface(hidden)
        write_address, erase, add = written.split_with_sizes(self.write_sizes, dim=1)
        # Both heads look at the memory as it was before the write.
        addresses = torch.stack([self.read_interface(hidden), write_address], dim=1)
        weights = self._address(addresses, state.memory, state.weights)  # [B, 2, N]

        read = (weights[:, :1] @ state.memory).squeeze(1)  # [B, M]
        memory = write(state.memory, weights[:, 1], erase.sigmoid(), self._squash(add))

        output = self.output(torch.cat([hidden, read], dim=1))
        return output, NtmState(hidden, cell, read, weights, memory)

    def _address(self, addresses: Tensor, memory: Tensor, previous: Tensor) -> Tensor:
        """Weights [B, 2, N] from interface vectors [B, 2, M + 6] and the weights before."""
        key, strength, gate, shift, sharpening = addresses.split_with_sizes(
            [memory.shape[2], *ADDRESS_SIZES], dim=2
        )
        content = content_weights(memory, self._squash(key), F.softplus(strength))
        weights = previous + gate.sigmoid() * (content - previous)  # Eq. 7
        weights = shifted(weights, shift.softmax(2))
        return sharpened(weights, 1 + F.softplus(sharpening))

    def _squash(self, vector: Tensor) -> Tensor:
        return vector.tanh() if self.tanh else vector


def content_weights(memory: Tensor, key: Tensor, strength: Tensor) -> Tensor:
    """Softmax over rows of strength beta [B, heads, 1] * cosine of memory [B, N, M] and key
    [B, heads, M]: [B, heads, N] (Eqs. 5 and 6 of Graves et al.)."""
    row_norms = memory.norm(dim=2).clamp(min=NORM_FLOOR).unsqueeze(1)  # [B, 1, N]
    directions = F.normalize(key, dim=2, eps=NORM_FLOOR)
    cosine = (directions @ memory.mT) / row_norms  # [B, heads, N]
    weights: Tensor = (strength * cosine).softmax(2)
    return weights


def shifted(weights: Tensor, shift: Tensor) -> Tensor:
    """Circular convolution (Eq. 8): shares `shift` [..., 3] of weights [..., N] go by +1, 0, -1."""
    forward, stay, back = shift.chunk(3, dim=-1)  # [..., 1] each
    return forward * weights.roll(1, -1) + stay * weights + back * weights.roll(-1, -1)


def sharpened(weights: Tensor, exponent: Tensor) -> Tensor:
    """Powers of weights [..., N], normalised (Eq. 9); exponent [..., 1] of at least 1."""
    powers = weights**exponent
    return powers / (powers.sum(-1, keepdim=True) + WEIGHT_FLOOR)


def write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    """Erase from and add to memory [B, N, M] vectors [B, M] at weights [B, N] (Eqs. 3 and 4)."""
    change = torch.addcmul(add.unsqueeze(1), memory, erase.unsqueeze(1), value=-1)  # [B, N, M]
    return torch.addcmul(memory, weights.unsqueeze(2), change)
