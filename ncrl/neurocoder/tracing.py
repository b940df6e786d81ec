"""Whether somebody watches the operations, and so has to be shown the plain equations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor


def is_watched() -> bool:
    """Whether a compiler, a tracer, a function transform (`torch.func`) or forward-mode
    differentiation is at work.

    They differentiate, vectorise and fuse the plain equations themselves, and cannot look into a
    gradient derived by hand or a comparison of weights.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def wants_plain_gradient(grad_outputs: Iterable[Tensor]) -> bool:
    """Whether a backward pass has to be differentiable or vectorised: a gradient of the gradient is
    wanted, or gradients in many directions at once."""
    return (
        torch.is_grad_enabled()
        or is_watched()
        # `torch.autograd.grad(is_grads_batched=True)`: an older way of vectorising than torch.func.
        or any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grad_outputs)
    )


def plain_gradients(
    equations: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients of the plain `equations`, themselves differentiable; None where not `wanted`."""
    with torch.enable_grad():
        outputs = equations(*inputs)
        # An output that no wanted input reaches has no gradient.
        reached = [output.requires_grad for output in outputs]
        gradients = torch.autograd.grad(
            list(compress(outputs, reached)),
            list(compress(inputs, wanted)),
            list(compress(grad_outputs, reached)),
            create_graph=True,
            allow_unused=True,
        )
    found = iter(gradients)
    return tuple(next(found) if want else None for want in wanted)


def has_hooks() -> bool:
    """Whether hooks see to tensors saved for the backward pass, as in `torch.utils.checkpoint` and
    `torch.autograd.graph.save_on_cpu`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
