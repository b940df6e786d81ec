"""From inputs to the mixture of stored v, in one node of the graph.

A layer is some hundred small operations. Torch's graph, with a node for each of them, would cost as
much as they do; so this node runs controller, attention and program forwards and, by the gradients
of `controller` and `fused`, backwards. Tests hold it to the plain equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncrl.neurocoder import controller, fused
from ncrl.neurocoder.composition import Constants, attend, run_controller
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.integration import Composed, mix_slots, singular_values
from ncrl.neurocoder.tracing import has_hooks, plain_gradients, wants_plain_gradient


def run_layer(
    x: Tensor,
    rows: Tensor,
    constants: Constants,
    keys: Tensor,
    memory_s: Tensor,
    config: NeurocoderConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compose a program for each input, and apply it but for the last product, c M_V.

    Args:
        x: [B, in].
        rows: what meets x, put together: M_U, the input weight of the controller, and any others,
            [P + 4h + more, in] ([P + h + more, in] for a linear controller).
        constants: of the composition network.
        keys: [3, P, K], unit length.
        memory_s: [P, 1].
        config: sizes and switches.

    Returns:
        The weight c of every stored v in the output, [P, B], the singular values sigma, [R, B], and
        what the other rows make of x, [more, B].
    """
    inputs = x, rows, *constants, keys, memory_s
    if not torch.is_grad_enabled():
        *outputs, _ = _forward(inputs, config, keep=False)
    else:
        outputs = _Node.apply(config, *inputs)  # type: ignore[no-untyped-call]
    mixture, sigma, others = outputs
    return mixture, sigma, others


_Kept = tuple[Tensor, list[controller.Step], Tensor, fused.Kept]
"""States and steps of the controller, M_U x^T, and what the program keeps."""


def _forward(
    inputs: Sequence[Tensor], config: NeurocoderConfig, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, _Kept]:
    x, rows, weight_hh, bias, *rest = inputs
    projection, from_input, others = _split(rows @ x.T, bias, config)
    states, steps = controller.states(from_input, weight_hh, bias, config.num_steps)
    of_program = states, *rest, projection
    mixture, sigma, kept = fused.mix_program(of_program, config, keep=keep)
    return mixture, sigma, others, (states, steps, projection, kept)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, config: NeurocoderConfig, *inputs: Any) -> tuple[Tensor, ...]:
        # Hooks may keep what is saved for longer than this node lives, and are there to save
        # memory: then attention is computed anew.
        keep = not has_hooks()
        mixture, sigma, others, kept = _forward(inputs, config, keep=keep)
        ctx.config = config
        ctx.kept = kept if keep else None
        ctx.save_for_backward(*inputs, sigma)
        return mixture, sigma, others

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Asked for once: `checkpoint` computes them anew for every asking.
        *inputs, sigma = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        with torch.autocast(inputs[0].device.type, enabled=False):
            if wants_plain_gradient(grad_outputs):
                equations = partial(_plain, ctx.config)
                return None, *plain_gradients(equations, inputs, wanted, grad_outputs)
            kept = ctx.kept or _forward(inputs, ctx.config, keep=True)[-1]
            return None, *_gradients(inputs, sigma, ctx.config, kept, grad_outputs, wanted)


def _gradients(
    inputs: Sequence[Tensor],
    sigma: Tensor,
    config: NeurocoderConfig,
    kept: _Kept,
    grad_outputs: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of what `_forward` takes; of x and rows, which are costly, only where wanted."""
    x, rows, weight_hh, _, *rest = inputs
    states, steps, projection, of_blocks = kept
    *grad_program, grad_others = grad_outputs
    grad_states, *grad_rest, grad_projection = fused.gradients(
        (states, *rest, projection), sigma, config, of_blocks, grad_program
    )
    grad_from_input, *grad_controller = controller.gradients(weight_hh, states, steps, grad_states)
    grad_read = torch.cat([grad_projection, grad_from_input, grad_others])
    grad_x = grad_read.T @ rows if wanted[0] else None
    grad_rows = grad_read @ x if wanted[1] else None
    return grad_x, grad_rows, *grad_controller, *grad_rest


def _plain(config: NeurocoderConfig, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_forward` as the equations stand."""
    x, rows, *rest, keys, memory_s = inputs
    constants = Constants(*rest)
    projection, from_input, others = _split(rows @ x.T, constants.controller_bias, config)
    weights = attend(run_controller(from_input, constants, config), keys, config)
    sigma = singular_values(weights[2], memory_s)
    return mix_slots(Composed(weights, sigma, None), projection), sigma, others


def _split(read: Tensor, bias: Tensor, config: NeurocoderConfig) -> Sequence[Tensor]:
    """M_U x^T, what the controller reads, and what others do."""
    sizes = [config.num_slots, len(bias)]
    return torch.split(read, [*sizes, len(read) - sum(sizes)])
