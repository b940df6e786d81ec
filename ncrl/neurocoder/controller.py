"""The LSTM of the composition network, which reads the same input at each of its J steps.

With a state of a few numbers per input it is all overhead: so it is one node of the graph, with a
gradient derived by hand.

Shapes: B inputs, J steps, h LSTM width; gates in torch's order i, f, g, o.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncrl.neurocoder.tracing import is_watched, plain_gradients, wants_plain_gradient


def run_lstm(from_input: Tensor, weight_hh: Tensor, bias: Tensor, num_steps: int) -> Tensor:
    """Hidden states of all steps from a zero state, [h, J B]: those of step 1 first.

    Args:
        from_input: weight_ih x, [4h, B], the same at every step.
        weight_hh: [4h, h].
        bias: [4h], of both.
        num_steps: J.
    """
    if is_watched():
        return plain_lstm(from_input, weight_hh, bias, num_steps)
    if not torch.is_grad_enabled():
        return _forward(from_input, weight_hh, bias, num_steps)[0]
    hidden: Tensor = _RunLstm.apply(  # type: ignore[no-untyped-call]
        from_input, weight_hh, bias, num_steps
    )
    return hidden


def plain_lstm(from_input: Tensor, weight_hh: Tensor, bias: Tensor, num_steps: int) -> Tensor:
    """`run_lstm` as the equations stand, differentiable as often as one likes."""
    # The initial state is one column of zeros that broadcasts over the batch.
    hidden = cell = from_input.new_zeros(weight_hh.shape[1], 1)
    states: list[Tensor] = []
    for _ in range(num_steps):
        from_state = torch.addmm(bias.unsqueeze(1), weight_hh, hidden)
        i, f, g, o = (from_input + from_state).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()  # [h, B]
        hidden = o.sigmoid() * cell.tanh()  # [h, B]
        states.append(hidden)
    return torch.cat(states, dim=1)


def _plain_lstm(
    num_steps: int, from_input: Tensor, weight_hh: Tensor, bias: Tensor
) -> tuple[Tensor]:
    return (plain_lstm(from_input, weight_hh, bias, num_steps),)


_Step = tuple[Tensor, Tensor, Tensor]
"""What one step leaves for the backward pass: its gates after the nonlinearity [4h, B], and its
cell and tanh(cell) [h, B]."""


def _forward(
    from_input: Tensor, weight_hh: Tensor, bias: Tensor, num_steps: int
) -> tuple[Tensor, list[_Step]]:
    width, batch = weight_hh.shape[1], from_input.shape[1]
    states = from_input.new_empty(width, num_steps * batch)
    steps: list[_Step] = []
    for j in range(num_steps):
        gates = from_input + bias.unsqueeze(1)
        if j:
            gates.addmm_(weight_hh, states[:, (j - 1) * batch : j * batch])
        i, f, g, o = gates.chunk(4)
        gates[: 2 * width].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        cell = i * g
        if j:
            cell.addcmul_(f, steps[-1][1])
        squashed = cell.tanh()
        torch.mul(o, squashed, out=states[:, j * batch : (j + 1) * batch])
        steps.append((gates, cell, squashed))
    return states, steps


class _RunLstm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, from_input: Tensor, weight_hh: Tensor, bias: Tensor, num_steps: int
    ) -> Tensor:
        states, steps = _forward(from_input, weight_hh, bias, num_steps)
        ctx.num_steps = num_steps
        ctx.save_for_backward(from_input, weight_hh, bias, states, *sum(steps, ()))
        return states

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_states,) = grad_outputs
        # Asked for once: `checkpoint` computes them anew for every asking.
        from_input, weight_hh, bias, states, *flat = ctx.saved_tensors
        with torch.autocast(from_input.device.type, enabled=False):
            if wants_plain_gradient(grad_outputs):
                equations = partial(_plain_lstm, ctx.num_steps)
                inputs, wanted = (from_input, weight_hh, bias), ctx.needs_input_grad[:3]
                return *plain_gradients(equations, inputs, wanted, grad_outputs), None
            steps = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
            return *_gradients(weight_hh, states, steps, grad_states), None


def _gradients(
    weight_hh: Tensor, states: Tensor, steps: list[_Step], grad_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of from_input, weight_hh and bias."""
    batch = steps[0][1].shape[1]
    total = torch.zeros_like(steps[0][0])  # of from_input
    grad_weight = torch.zeros_like(weight_hh)
    grad_hidden: Tensor | None = None
    grad_cell: Tensor | None = None
    for j in reversed(range(len(steps))):
        gates, _, squashed = steps[j]
        i, f, g, o = gates.chunk(4)
        grad = grad_states[:, j * batch : (j + 1) * batch]
        if grad_hidden is not None:
            grad = grad + grad_hidden
        through_cell = grad * o
        through_cell = torch.addcmul(through_cell, through_cell, squashed * squashed, value=-1)
        if grad_cell is not None:
            through_cell += grad_cell
        # Of the gates before their nonlinearity: sigmoid' = s (1 - s), tanh' = 1 - t^2.
        before = gates.new_zeros(gates.shape) if j == 0 else torch.empty_like(gates)
        d_i, d_f, d_g, d_o = before.chunk(4)
        torch.mul(through_cell * g, i - i * i, out=d_i)
        torch.mul(through_cell * i, 1 - g * g, out=d_g)
        torch.mul(grad * squashed, o - o * o, out=d_o)
        if j:
            torch.mul(through_cell * steps[j - 1][1], f - f * f, out=d_f)
            grad_cell = through_cell * f
            grad_weight.addmm_(before, states[:, (j - 1) * batch : j * batch].T)
            grad_hidden = weight_hh.T @ before
        total += before
    return total, grad_weight, total.sum(1)
