"""The optimiser of A3C, RMSProp with epsilon inside the square root, and steps that the device of
the weights decides about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ncrl.agents.defaults import RMS_PROP_EPS

ADAM_EPS = 1e-5
"""Epsilon of Adam, as in SB3."""


class SharedRMSProp(torch.optim.Optimizer):
    """theta -= lr * g / sqrt(m + eps), where m = alpha m + (1 - alpha) g^2.

    The "shared RMSProp" of Mnih et al. 2016, section 4: one m for the gradients of all workers,
    which a single learner has anyway. `torch.optim.RMSprop` adds epsilon outside the root, where
    A3C's 0.1 means something else.

    As for torch's fused optimisers, `step` divides gradients by the attribute `grad_scale`, and
    changes nothing if the attribute `found_inf` is 1; both are scalars on the weights' device. See
    `scaled_step`.

    Args:
        params: as for any torch optimiser.
        lr: learning rate; may be a scalar tensor.
        alpha: decay of m.
        eps: epsilon.
        initial_average: m at the start. 1, as in TensorFlow's RMSProp, lets steps grow over the
            first few hundred updates. From 0 the first steps are ten times the learning rate, which
            a small epsilon does not soften, and which can ruin a network for good.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 7e-4,
        alpha: float = 0.99,
        eps: float = RMS_PROP_EPS,
        initial_average: float = 1.0,
    ) -> None:
        finite = all(0 <= number < math.inf for number in (lr, eps, initial_average))
        if not (finite and 0 <= alpha < 1):
            raise ValueError(
                "SharedRMSProp needs lr >= 0, 0 <= alpha < 1, eps >= 0 and initial_average >= 0, "
                f"all finite, got lr={lr}, alpha={alpha}, eps={eps}, "
                f"initial_average={initial_average}"
            )
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "initial_average": initial_average}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients: list[Tensor] = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["square_avg"] = torch.full_like(p, group["initial_average"])
            averages: list[Tensor] = [self.state[p]["square_avg"] for p in params]
            lr, alpha = group["lr"], group["alpha"]
            if scale is not None:
                gradients = list(torch._foreach_div(gradients, scale))
            if found_inf is not None:  # then the gradients are 0 and the averages stay
                skipped = found_inf > 0
                gradients = [g.masked_fill(skipped, 0) for g in gradients]
                alpha = torch.full_like(found_inf, alpha).masked_fill(skipped, 1)
            torch._foreach_mul_(averages, alpha)
            torch._foreach_addcmul_(averages, gradients, gradients, 1 - group["alpha"])
            roots = torch._foreach_add(averages, group["eps"])
            torch._foreach_sqrt_(roots)
            if isinstance(lr, Tensor):
                steps = torch._foreach_div(gradients, roots)
                torch._foreach_mul_(steps, lr)
                torch._foreach_sub_(params, steps)
            else:
                torch._foreach_addcdiv_(params, gradients, roots, -lr)
        return loss


def can_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser can take a `scaled_step`: `SharedRMSProp`, or Adam(W) with `fused=True`.

    Fused SGD cannot: if its first step is left out, its momentum is memory that nobody has written.
    """
    is_adam = isinstance(optimizer, torch.optim.Adam)
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, SharedRMSProp) or (is_adam and is_fused)


def scaled_step(optimizer: torch.optim.Optimizer, scale: Tensor, found_inf: Tensor) -> None:
    """One step along the gradients divided by `scale`, by the means of torch's `GradScaler`.

    If `found_inf` is 1, weights and state of the optimiser stay as they are, without the host
    knowing. Both are scalars on the weights' device; the optimiser is one that `can_scale`.
    """
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = scale, found_inf
    try:
        optimizer.step()
    finally:
        del fused.grad_scale, fused.found_inf


def optimizer_options(
    policy_kwargs: Mapping[str, Any], *, use_rms_prop: bool, rms_prop_eps: float
) -> dict[str, Any]:
    """`optimizer_class` and `optimizer_kwargs` of a policy, where its arguments name none."""
    kind, chosen = policy_kwargs.get("optimizer_class"), policy_kwargs.get("optimizer_kwargs")
    if use_rms_prop and kind is None:
        options = {"alpha": 0.99, "eps": rms_prop_eps} | (chosen or {})
        return {"optimizer_class": SharedRMSProp, "optimizer_kwargs": options}
    if kind in (None, torch.optim.Adam) and not {"foreach", "differentiable"} & set(chosen or ()):
        # Fused, a step is one operation, and can be left out by the device itself.
        options = {"eps": ADAM_EPS} if chosen is None else chosen
        return {"optimizer_kwargs": {"fused": True} | options}
    return {}
