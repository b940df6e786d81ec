"""Parameters that are read as part of a larger product, under the names that torch's modules have.

They are neither `nn.Linear` nor `nn.LSTMCell`, because nothing calls them: tools that work through
such modules (hooks, pruning, adapters, quantisation) would change nothing here, without a word.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ncrl.seat import reset_linear


class LinearWeights(nn.Module):
    """`weight` [out, in] and `bias` [out] of a linear map, initialised as in `nn.Linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does, with the same random numbers."""
        reset_linear(self.weight, self.bias)


class LstmWeights(nn.Module):
    """Weights of an LSTM of width h in torch's order of gates, i, f, g, o, and its equations."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * width, in_features))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(4 * width))
        self.bias_hh = nn.Parameter(torch.empty(4 * width))

    def reset_parameters(self) -> None:
        """Initialise as `nn.LSTMCell` does, with the same random numbers."""
        bound = 1 / math.sqrt(self.weight_hh.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def initial_state(self) -> tuple[Tensor, Tensor | None]:
        """Hidden state [1, h] and cell before the first step; None for a cell of zeros."""
        return self.bias_hh.new_zeros(1, self.weight_hh.shape[1]), None

    def forward(self, from_input: Tensor, num_steps: int) -> Tensor:
        """Hidden states of steps that all read the same input.

        Args:
            from_input: weight_ih x without bias, [B, 4h], the same at every step.
            num_steps: J.

        Returns:
            [B, J, h].
        """
        hidden, cell = self.initial_state()
        bias = self.bias_ih + self.bias_hh
        states = []
        for _ in range(num_steps):
            gates = from_input + torch.addmm(bias, hidden, self.weight_hh.T)
            i, f, g, o = gates.chunk(4, dim=1)
            new = i.sigmoid() * g.tanh()
            # Of a cell of zeros there is nothing to forget.
            cell = new if cell is None else torch.addcmul(new, f.sigmoid(), cell)
            hidden = o.sigmoid() * cell.tanh()
            states.append(hidden)
        return torch.stack(states, dim=1)
