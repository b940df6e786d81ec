"""Losses of the layers themselves, in the gradient of whoever trains an SB3 policy.

Neurocoder layers have an orthogonality loss (paper, section 2.3), mixtures of experts a balance
loss. A2C, PPO and RecurrentPPO build their objective inside `train()`, where a policy cannot add a
term, but all of them differentiate the log-probabilities that `evaluate_actions` returns. So the
losses ride on these: their values stay what they are, and when a gradient flows back through them,
the losses' own gradient is added to that of the parameters, once and unscaled. It is therefore
clipped and accumulated like the rest, and neither copies of a policy, nor pickles, nor another
optimiser lose it. (A hook on the optimiser would act behind the clipping, and hooks on parameters
would act in every `backward()`, also in that of an algorithm that adds the terms itself.)

What SB3 logs as `train/loss` does not contain them. `ncrl.agents.A3C` adds the terms in its own
loss; it calls `evaluate_rollout`, on which nothing rides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ncrl.baselines import balance_loss, record_gates
from ncrl.baselines.moe import Gating
from ncrl.neurocoder import NeurocoderLinear, orthogonal_loss

Params = ParamSpec("Params")
Evaluation = tuple[Tensor, Tensor, "Tensor | None"]
"""What `evaluate_actions` returns: values, log-probabilities, entropy."""


class _Regularised(Protocol):
    orth_coef: float
    balance_coef: float


Policy = TypeVar("Policy", bound=_Regularised)


def regularised(
    evaluate_actions: Callable[Concatenate[Policy, Params], Evaluation],
) -> Callable[Concatenate[Policy, Params], Evaluation]:
    """Decorator of `evaluate_actions`: see the top of the module."""

    @wraps(evaluate_actions)
    def evaluate(policy: Policy, /, *args: Params.args, **kwargs: Params.kwargs) -> Evaluation:
        assert isinstance(policy, nn.Module)
        with record_gates(policy) as gates:
            values, log_prob, entropy = evaluate_actions(policy, *args, **kwargs)
        loss = regularisation_loss(policy, gates, policy.orth_coef, policy.balance_coef)
        return values, with_gradient_of(loss, log_prob), entropy

    return evaluate


def regularisation_loss(
    model: nn.Module,
    gates: Mapping[str, list[Gating]],
    orth_coef: float,
    balance_coef: float,
) -> Tensor | None:
    """orth_coef * L_o + balance_coef * (balance loss of the recorded gates), a scalar.

    None where `model` has no layer with such a loss, or the coefficients are 0.
    """
    terms = []
    if orth_coef and any(isinstance(module, NeurocoderLinear) for module in model.modules()):
        terms.append(orth_coef * orthogonal_loss(model))
    if balance_coef and any(gates.values()):
        terms.append(balance_coef * balance_loss(gates))
    return torch.stack(terms).sum() if terms else None


def with_gradient_of(loss: Tensor | None, x: Tensor) -> Tensor:
    """x, unchanged; a gradient that flows back through it sets that of `loss` free as well."""
    if loss is None or not torch.is_grad_enabled():
        return x
    carried: Tensor = _WithGradientOf.apply(x, loss)  # type: ignore[no-untyped-call]
    return carried


class _WithGradientOf(torch.autograd.Function):
    """(x, loss) -> x, with gradients (dy, 1): that of the objective y + loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grad_x, torch.ones((), dtype=dtype, device=device)


def check_coefficient(name: str, value: float) -> float:
    """The weight of a loss; ValueError unless it is a finite number of at least 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)
