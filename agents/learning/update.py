"""One step of the optimiser: from a loss to changed weights, with one wait or with none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ncrl.agents.learning.imitation import KeptEvaluation
from ncrl.agents.learning.objective import Lesson, Loss, Objective, actor_critic_loss
from ncrl.agents.learning.optim import scaled_step
from ncrl.agents.profiling import OFF, Stopwatch
from ncrl.networks import static_unroll
from ncrl.sb3 import EnginePolicy, Latent
from ncrl.sb3.engine import map_tensors


class Update(NamedTuple):
    """What one step of the optimiser was made of."""

    stepped: bool  # no step is made along a gradient that is not finite
    scalars: dict[str, float]  # those of the loss, and `grad_norm`, before the gradient's limit
    latent: Latent  # what actor and critic read, [T + 1, B, ...]
    kept: KeptEvaluation | None  # as in `Loss`


def apply_gradient(
    policy: EnginePolicy, loss: Loss, max_grad_norm: float, *, stopwatch: Stopwatch = OFF
) -> Update:
    """One step of the policy's optimiser, unless the gradient is not finite.

    All scalars come from the device at once, in the only wait of an update. The surplus of
    demonstrations is there by then, and is copied later.
    """
    with stopwatch.phase("backward"):
        norm = _backward(policy, loss)
    with stopwatch.phase("optimiser"):
        update = _measured(loss, norm).on_host()
        if update.stepped:
            if update.scalars["grad_norm"] > max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_grad_norm, norm)
            policy.optimizer.step()
    return update


class Measured(NamedTuple):
    """What an update was made of, on the device: nothing has been waited for yet."""

    scalars: dict[str, Tensor]
    latent: Latent
    kept: KeptEvaluation | None

    def on_host(self) -> Update:
        """Wait for the values."""
        scalars = on_host(self.scalars)
        kept = map_tensors(Tensor.clone, self.kept)  # the next launch of a graph overwrites it
        return Update(math.isfinite(scalars["grad_norm"]), scalars, self.latent, kept)


def on_host(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of scalars on a device, with one wait for all of them."""
    values = [value.float() for value in scalars.values()]
    return dict(zip(scalars, torch.stack(values).tolist() if values else [], strict=True))


def update_on_device(
    policy: EnginePolicy, lesson: Lesson, objective: Objective, max_grad_norm: float
) -> Measured:
    """`apply_gradient` where the device finds out by itself whether the gradient is finite.

    The host waits for nothing, and what it asks for does not depend on data: always the same
    operations, which can be captured as a CUDA graph. The weights are the same to rounding. The
    optimiser must be one that `can_scale`, and all of the lesson lie on the policy's device.
    """
    with static_unroll():
        loss = actor_critic_loss(policy, lesson, objective)
    norm = _backward(policy, loss)
    found_inf = (~norm.isfinite()).to(norm.dtype)
    scaled_step(policy.optimizer, _excess(norm, max_grad_norm), found_inf)
    return _measured(loss, norm)


def _backward(policy: EnginePolicy, loss: Loss) -> Tensor:
    """Give every parameter its gradient; returns the norm of all of them, a scalar."""
    policy.optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    return torch.nn.utils.get_total_norm(
        [p.grad for p in policy.parameters() if p.grad is not None]
    )


def _measured(loss: Loss, norm: Tensor) -> Measured:
    known = loss.scalars | {"grad_norm": norm}, loss.evaluation.latent
    return Measured(*map_tensors(Tensor.detach, known), loss.kept)


def _excess(norm: Tensor, limit: float) -> Tensor:
    """What a gradient of this norm is divided by to keep the limit. As in torch's
    `clip_grad_norm_`, but exactly 1 where there is nothing to limit."""
    return ((norm + 1e-6) / limit).clamp(min=1) if limit else torch.full_like(norm, math.inf)
