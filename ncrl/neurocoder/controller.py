"""The controller of the composition network, which reads the same input at each of its J steps.

An LSTM, or for one step a linear map. `plain_states` are the equations; `states` and `gradients`
compute the same, and its gradient derived by hand, in few operations: with a state of a few numbers
per input it is all overhead.

Shapes: B inputs, J steps, h width; gates in torch's order i, f, g, o.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The gradient of what the function was taken of, from that of its value and the value.
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input


def plain_states(from_input: Tensor, weight_hh: Tensor, bias: Tensor, num_steps: int) -> Tensor:
    """Hidden states of all steps from a zero state, [h, J B]: those of step 1 first.

    Args:
        from_input: weight_ih x, [4h, B], the same at every step; of a linear controller [h, B].
        weight_hh: [4h, h]; of a linear controller [0, h].
        bias: [4h], of both; of a linear controller [h].
        num_steps: J; 1 for a linear controller.
    """
    if len(weight_hh) == 0:
        return from_input + bias.unsqueeze(1)
    # The initial state is one column of zeros that broadcasts over the batch.
    hidden = cell = from_input.new_zeros(weight_hh.shape[1], 1)
    found: list[Tensor] = []
    for _ in range(num_steps):
        from_state = torch.addmm(bias.unsqueeze(1), weight_hh, hidden)
        i, f, g, o = (from_input + from_state).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()  # [h, B]
        hidden = o.sigmoid() * cell.tanh()  # [h, B]
        found.append(hidden)
    return torch.cat(found, dim=1)


class Step(NamedTuple):
    """What one step of the LSTM leaves for the backward pass."""

    gates: Tensor
    """After the nonlinearity, [4h, B]; the forget gate of the first step is void."""

    cell: Tensor
    """[h, B]."""

    squashed: Tensor
    """tanh(cell)."""


def states(
    from_input: Tensor, weight_hh: Tensor, bias: Tensor, num_steps: int
) -> tuple[Tensor, list[Step]]:
    """`plain_states`, without a graph, and what `gradients` needs."""
    steps: list[Step] = []
    if len(weight_hh) == 0:
        return from_input + bias.unsqueeze(1), steps
    width, batch = weight_hh.shape[1], from_input.shape[1]
    found = from_input.new_empty(width, num_steps * batch)
    for j in range(num_steps):
        gates = from_input + bias.unsqueeze(1)
        if j:
            gates.addmm_(weight_hh, found[:, (j - 1) * batch : j * batch])
        i, f, g, o = gates.chunk(4)
        gates[: 2 * width].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        cell = i * g
        if j:
            cell.addcmul_(f, steps[-1].cell)
        squashed = cell.tanh()
        torch.mul(o, squashed, out=found[:, j * batch : (j + 1) * batch])
        steps.append(Step(gates, cell, squashed))
    return found, steps


def gradients(
    weight_hh: Tensor, found: Tensor, steps: list[Step], grad_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of from_input, weight_hh and bias, from `states` and the gradient of its result."""
    if len(weight_hh) == 0:
        return grad_states, weight_hh, grad_states.sum(1)
    batch = steps[0].cell.shape[1]
    total: Tensor | None = None  # of from_input
    grad_weight = torch.zeros_like(weight_hh)
    grad_hidden: Tensor | None = None
    grad_cell: Tensor | None = None
    for j in reversed(range(len(steps))):
        gates, _, squashed = steps[j]
        i, f, g, o = gates.chunk(4)
        grad = grad_states[:, j * batch : (j + 1) * batch]
        if grad_hidden is not None:
            grad = grad + grad_hidden
        through_cell = tanh_backward(grad * o, squashed, grad_input=torch.empty_like(squashed))
        if grad_cell is not None:
            through_cell += grad_cell
        before = torch.empty_like(gates)  # of the gates before their nonlinearity
        d_i, d_f, d_g, d_o = before.chunk(4)
        sigmoid_backward(through_cell * g, i, grad_input=d_i)
        tanh_backward(through_cell * i, g, grad_input=d_g)
        sigmoid_backward(grad * squashed, o, grad_input=d_o)
        if j:
            sigmoid_backward(through_cell * steps[j - 1].cell, f, grad_input=d_f)
            grad_cell = through_cell * f
            grad_weight.addmm_(before, found[:, (j - 1) * batch : j * batch].T)
            grad_hidden = weight_hh.T @ before
        else:
            d_f.zero_()
        total = before if total is None else total.add_(before)
    assert total is not None
    return total, grad_weight, total.sum(1)
