"""Actor-critic mathematics: value targets, advantages and losses, as pure functions.

Time-major shapes: T timesteps, B environments. Row t of `rewards` and `discounts` belongs to the
action taken at t; `discounts[t]` is gamma, or 0 where that action ended the episode, so no `done`
appears in the formulas. Targets and advantages are constants to the gradient. Shapes that differ
raise ValueError: they would broadcast to nonsense.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ENTROPY = 1e-16
"""Added to a mean entropy before its logarithm is taken, since rounding can make the entropy 0. An
entropy below this is drawn up ever less. Were it much smaller, the squares of the gradients that
rounding leaves at such a 0 would overflow."""

SMALLEST_DEVIATION = 1e-8
"""Deviations below this are taken for it before they divide."""


class Returns(NamedTuple):
    """What the losses need of a rollout."""

    returns: Tensor  # value targets, [T, B]
    advantages: Tensor  # of the actions taken, [T, B]


@torch.no_grad()
def vtrace(
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    *,
    gae_lambda: float = 1.0,
) -> Returns:
    """V-trace targets and advantages (Espeholt et al. 2018, "IMPALA", section 4.1).

    Importance weights are clipped at 1, as in the paper: rho_t and c_t are the same.

    Args:
        log_rhos: log pi(a_t | x_t) - log mu(a_t | x_t), learner's policy over worker's, [T, B].
        discounts: [T, B].
        rewards: [T, B].
        values: V(x_t) of the learner, [T, B].
        bootstrap_value: V(x_T), [B].
        gae_lambda: factor on the trace coefficients c_t (the paper's remark 2).

    With `log_rhos` all zero this is generalised advantage estimation (Schulman et al. 2016), and
    with `gae_lambda=1` beside it n-step returns.
    """
    _check_shapes(values.shape, log_rhos=log_rhos, discounts=discounts, rewards=rewards)
    _check_shapes(values.shape[1:], bootstrap_value=bootstrap_value)
    rhos = log_rhos.exp().clamp(max=1.0)
    traces = gae_lambda * rhos
    values_next = torch.cat([values[1:], bootstrap_value.unsqueeze(0)])  # V(x_{t+1})
    deltas = rhos * (rewards + discounts * values_next - values)

    # v_t - V(x_t) = delta_t + discount_t c_t (v_{t+1} - V(x_{t+1})), from the last row backwards.
    correction = torch.zeros_like(bootstrap_value)
    later = []
    factors = (discounts * traces).unbind()
    for delta, factor in zip(reversed(deltas.unbind()), reversed(factors), strict=True):
        correction = torch.addcmul(delta, factor, correction)
        later.append(correction)
    corrections = torch.stack(later[::-1])
    returns = values + corrections

    # The action's worth looks one step ahead to v_{t+1}, which lambda mixes with V(x_{t+1}).
    corrections_next = torch.cat([corrections[1:], torch.zeros_like(bootstrap_value)[None]])
    worth = rewards + discounts * (values_next + gae_lambda * corrections_next)
    return Returns(returns, rhos * (worth - values))


def standardised(advantages: Tensor) -> Tensor:
    """Advantages of mean 0 and standard deviation 1 over all timesteps, [T, B]; a single one stays
    as it is."""
    if advantages.numel() < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_gradient_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-mean(log pi(a_t | x_t) A_t), a scalar; no gradient flows into the advantages."""
    _check_shapes(log_probs.shape, advantages=advantages)
    return -(log_probs * advantages.detach()).mean()


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """Mean squared distance of the values from their targets, a scalar."""
    _check_shapes(values.shape, returns=returns)
    return (values - returns.detach()).square().mean()


def imitation_surplus(values: Tensor, returns: Tensor) -> Tensor:
    """(return - V(x_t))+, [T, B], without gradient: how much more was reached than is expected.

    Args:
        values: V(x_t) of now, [T, B].
        returns: what was reached then, [T, B]; timesteps with 0 are left out.
    """
    _check_shapes(values.shape, returns=returns)
    return torch.where(returns > 0, (returns - values).clamp(min=0), 0.0).detach()


def imitation_loss(log_probs: Tensor, surplus: Tensor) -> Tensor:
    """-mean(surplus_t log pi(a_t | x_t)), a scalar: self-imitation (Oh et al. 2018).

    A timestep counts only where more was reached than its value expects. Other than in the paper,
    the values learn nothing from it: at the few timesteps that are repeated they would soon equal
    the returns, which would end the imitation long before the policy reaches the score again.

    Args:
        log_probs: of the actions that were taken then, under the policy of now, [T, B].
        surplus: of `imitation_surplus`, [T, B].
    """
    _check_shapes(surplus.shape, log_probs=log_probs)
    return -(log_probs * surplus).mean()


def entropy_loss(entropy: Tensor) -> Tensor:
    """-mean entropy, a scalar: adding it to the loss keeps the policy from collapsing."""
    return -entropy.mean()


def entropy_floor_loss(mean_entropy: Tensor, floor: float, *, fades: bool) -> Tensor:
    """Squared distance of the mean entropy H (nats) below a floor; 0 if the floor is 0 (none).

    Args:
        mean_entropy: H, a scalar.
        floor: H is drawn up from below it.
        fades: whether the gradient of H fades in proportion to H as H goes to 0, as it does where
            actions are discrete. The distance then is floor log(floor / H), whose slope grows as
            that gradient fades, so that a policy that has become certain is still drawn back. Close
            to the floor it equals floor - H, which is the distance otherwise: the entropy of a
            Gaussian can be negative.
    """
    if not floor:
        return torch.zeros_like(mean_entropy)
    if fades:
        distance = floor * (floor / (mean_entropy.clamp(min=0) + LEAST_ENTROPY)).log()
    else:
        distance = floor - mean_entropy
    return distance.clamp(min=0).square()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar; NaN where the returns are constant."""
    _check_shapes(values.shape, returns=returns)
    variance, unexplained = returns.var(correction=0), (returns - values).var(correction=0)
    return (1 - unexplained / variance).where(variance > 0, math.nan)


def _check_shapes(shape: torch.Size, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
