"""Losses of the layers themselves, in the gradient of whoever trains an SB3 policy.

Neurocoder layers have an orthogonality loss (paper, section 2.3), mixtures of experts a balance
loss. A2C, PPO and RecurrentPPO build their objective inside `train()`, where a policy cannot add a
term, but all of them differentiate the log-probabilities that `evaluate_actions` returns. So the
losses ride on these: their values stay what they are, and when a gradient flows back through them,
the losses' own gradient is added to that of the parameters, once and unscaled, to be clipped and
accumulated like the rest. Copies, pickles and other optimisers keep it, which hooks would not.

What SB3 logs as `train/loss` does not contain them. `ncrl.agents.A3C` adds the terms in its own
loss; it calls `evaluate_rollout`, on which nothing rides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ncrl.baselines import balance_loss, record_gates
from ncrl.baselines.moe import Gating
from ncrl.neurocoder import NeurocoderLinear, orthogonal_loss

Evaluation = tuple[Tensor, Tensor, "Tensor | None"]
"""What `evaluate_actions` returns: values, log-probabilities, entropy."""


def regularised(evaluate_actions: Callable[..., Evaluation]) -> Callable[..., Evaluation]:
    """Decorator of the `evaluate_actions` of an `EnginePolicy` with `ChosenHeads`.

    Everything that SB3's algorithms train on goes through that method. So this adds the gradient of
    the losses there, and shows the observations to the encoders (`EnginePolicy.watch`).
    """

    @wraps(evaluate_actions)
    def evaluate(policy: Any, obs: Any, *args: Any, **kwargs: Any) -> Evaluation:
        with record_gates(policy) as gates:
            values, log_prob, entropy = evaluate_actions(policy, obs, *args, **kwargs)
        if policy.training and torch.is_grad_enabled():
            policy.watch(obs, padded=True)
        loss = regularisation_loss(policy, gates, policy.orth_coef, policy.balance_coef)
        return values, with_gradient_of(loss, log_prob), entropy

    return evaluate


def regularisation_loss(
    model: nn.Module, gates: Mapping[str, list[Gating]], orth_coef: float, balance_coef: float
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
    """x, unchanged; where a gradient flows back through it, that of `loss` is added."""
    if loss is None or not torch.is_grad_enabled():
        return x
    carried: Tensor = _WithGradientOf.apply(x, loss)  # type: ignore[no-untyped-call]
    return carried


class _WithGradientOf(torch.autograd.Function):
    """(x, loss) -> x, with gradients (dy, 1): that of the objective y + loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        return grad_x, ctx.one


def check_coefficient(name: str, value: float) -> float:
    """The weight of a loss; ValueError unless it is a finite number of at least 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)
