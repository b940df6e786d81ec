"""The optimiser of A3C: RMSProp with epsilon inside the square root."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SharedRMSProp(torch.optim.Optimizer):
    """theta -= lr * g / sqrt(m + eps), where m = alpha m + (1 - alpha) g^2.

    The "shared RMSProp" of Mnih et al. 2016, section 4: one m for the gradients of all workers,
    which a single learner gives by itself. `torch.optim.RMSprop` adds epsilon outside the root,
    where A3C's 0.1 means something else.

    Args:
        params: as for any torch optimiser.
        lr: learning rate.
        alpha: decay of m.
        eps: epsilon.
        initial_average: m at the start. 1, as in TensorFlow's RMSProp, warms the step size up over
            the first few hundred updates; from 0 the first steps are ten times the learning rate,
            which a small epsilon does not soften and which can ruin a network for good.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 7e-4,
        alpha: float = 0.99,
        eps: float = 0.1,
        initial_average: float = 1.0,
    ) -> None:
        if lr < 0 or not 0 <= alpha < 1 or eps < 0 or initial_average < 0:
            raise ValueError(
                "SharedRMSProp needs lr >= 0, 0 <= alpha < 1, eps >= 0 and initial_average >= 0, "
                f"got lr={lr}, alpha={alpha}, eps={eps}, initial_average={initial_average}"
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
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            averages = [self._average(p, group["initial_average"]) for p in params]
            torch._foreach_mul_(averages, group["alpha"])
            torch._foreach_addcmul_(averages, gradients, gradients, 1 - group["alpha"])
            roots = torch._foreach_add(averages, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(params, gradients, roots, -group["lr"])
        return loss

    def _average(self, param: Tensor, initial: float) -> Tensor:
        state = self.state[param]
        if not state:
            state["square_avg"] = torch.full_like(param, initial)
        average: Tensor = state["square_avg"]
        return average
