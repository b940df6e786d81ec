"""The loss: what one update learns from, its coefficients, and the scalar that is minimised.

Shapes: T timesteps, B environments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Distribution

from ncrl import orthogonal_loss
from ncrl.agents.learning import losses
from ncrl.agents.learning.imitation import Kept, KeptEvaluation
from ncrl.agents.playing.buffers import Rollout
from ncrl.baselines import balance_loss, record_gates
from ncrl.sb3 import EnginePolicy, RolloutEvaluation
from ncrl.sb3.engine import map_tensors
from ncrl.settings import setting

CORRECTIONS = ("vtrace", "none")
"""What is done about rollouts played by older weights: V-trace, or nothing, as in A3C."""

FLOOR_COEF = 0.1
"""Weight of the squared distance below `entropy_floor`, which is the setting: a lower floor does
what a smaller weight would. Half a nat below a floor of 1 the slope is .1 * 2 log(2) * 2 = .28;
that of an entropy coefficient of .01 is .01."""


@dataclass(frozen=True)
class Objective:
    """Coefficients of the loss, with the defaults of `A3C` and of its command.

    What Stable-Baselines3 has too has its name there.
    """

    gamma: float = setting(0.99, "discount", low=0, high=1)
    gae_lambda: float = setting(1.0, "1 for n-step returns", low=0, high=1)
    ent_coef: float = setting(0.01, "weight of the entropy", low=0)
    entropy_floor: float = setting(0.0, "mean entropy below which it is drawn up again", low=0)
    """A policy that is certain before it has met a reward stays so. 0: no floor."""
    vf_coef: float = setting(0.5, "weight of the value loss", low=0)
    orth_coef: float = setting(0.1, "weight of the orthogonality loss", low=0)
    """Paper: a."""
    balance_coef: float = setting(0.01, "moe: weight of the balance loss", low=0)
    correction: str = setting("vtrace", "for rollouts played by older weights", choices=CORRECTIONS)
    reward_scale: float = setting(1.0, "factor on rewards in the loss, not in the log", low=0)
    reward_clip: float | None = setting(None, "limit on rewards in the loss, after the factor")
    normalize_advantage: bool = setting(False, "whether advantages get mean 0 and deviation 1")
    int_coef: float = setting(0.5, "bonus: weight of its advantages, of deviation 1", low=0)
    ext_coef: float = setting(10.0, "bonus: weight of the game's own advantages beside it", low=0)
    """A score is rare and its advantage close to 1; it has to count for more than a bonus's."""
    int_gamma: float = setting(0.99, "bonus: discount of its return", low=0, high=1)
    """No end of a game cuts that return."""
    imitation_coef: float = setting(
        5.0, "bonus: weight of what led to a score, learnt from again", low=0
    )


class Bonus(NamedTuple):
    """What exploration adds to the rollout of an update."""

    rewards: Tensor  # normalised intrinsic rewards, [T, B]
    advantage_deviation: Tensor  # divides their advantages, unless their own is larger; a scalar


class Lesson(NamedTuple):
    """What one update learns from."""

    rollout: Rollout  # what B environments played
    bonus: Bonus | None = None  # if there is one, the policy needs a head for its value
    kept: Kept | None = None  # windows of demonstrations, learnt from as further environments


class Loss(NamedTuple):
    """What is minimised, and what became known on the way."""

    total: Tensor  # a scalar
    scalars: dict[str, Tensor]  # the terms of the total and how good values are, by curve
    evaluation: RolloutEvaluation
    kept: KeptEvaluation | None  # of the windows of demonstrations, without gradient


def actor_critic_loss(policy: EnginePolicy, lesson: Lesson, objective: Objective) -> Loss:
    """Loss of a lesson under the policy's present weights.

    As in A3C and IMPALA the total is a sum over the T * B timesteps of the rollout, not a mean:
    RMSProp's epsilon and the gradient norm's limit are made for that scale. The terms that are
    logged are means, as in Stable-Baselines3.
    """
    rollout, bonus, kept = lesson
    num_envs = rollout.rewards.shape[1]
    with record_gates(policy) as gates, _unvalidated_distributions():
        joint = _evaluate(policy, rollout, kept)
    evaluation = joint if kept is None else joint.narrow(0, num_envs)
    values = evaluation.values[:-1]  # V(x_t); the last row is V(x_T)
    returns = _returns(rollout, evaluation, objective)
    advantages = returns.advantages
    if objective.normalize_advantage:
        advantages = losses.standardised(advantages)
    exploration: dict[str, Tensor] = {}
    if bonus is not None:
        advantages, exploration = _with_bonus(advantages, rollout, evaluation, bonus, objective)
        exploration["ext_advantage_std"] = returns.advantages.std(correction=0)
    kept_share, kept_evaluation = 0.0, None
    if kept is not None:
        # Its loss is a sum over its own timesteps, not over those of the rollout.
        kept_share = kept.returns.numel() / values.numel()
        remembered = joint.narrow(num_envs, kept.returns.shape[1])
        surplus = losses.imitation_surplus(remembered.values[:-1], kept.returns.to(values.device))
        exploration["imitation_loss"] = losses.imitation_loss(remembered.log_prob, surplus)
        kept_evaluation = KeptEvaluation(
            map_tensors(Tensor.detach, remembered.lstm_state), surplus.mean(0)
        )
    zero = values.new_zeros(())
    terms = {
        "policy_loss": losses.policy_gradient_loss(evaluation.log_prob, advantages),
        "value_loss": losses.value_loss(values, returns.returns),
        "entropy_loss": losses.entropy_loss(evaluation.entropy),
    }
    of_heads = {"orthogonality_loss": orthogonal_loss(policy), "balance_loss": balance_loss(gates)}
    # Without such heads it is a constant 0, which would be no curve.
    terms |= {name: term.to(values) for name, term in of_heads.items() if term.requires_grad}
    floor, fades = objective.entropy_floor, not isinstance(policy.action_space, spaces.Box)
    floor_loss = losses.entropy_floor_loss(-terms["entropy_loss"], floor, fades=fades)
    # The balance loss depends on the inputs: its usual coefficient is made for a mean over them.
    # The orthogonality loss depends on the weights alone.
    total = values.numel() * (
        terms["policy_loss"]
        + objective.vf_coef * terms["value_loss"]
        + objective.ent_coef * terms["entropy_loss"]
        + FLOOR_COEF * floor_loss
        + objective.balance_coef * terms.get("balance_loss", zero)
        + objective.vf_coef * exploration.get("int_value_loss", zero)
        + objective.imitation_coef * kept_share * exploration.get("imitation_loss", zero)
    ) + objective.orth_coef * terms.get("orthogonality_loss", zero)
    explained = {"explained_variance": losses.explained_variance(values.detach(), returns.returns)}
    return Loss(total, exploration | terms | explained, evaluation, kept_evaluation)


def _evaluate(policy: EnginePolicy, rollout: Rollout, kept: Kept | None) -> RolloutEvaluation:
    """Evaluation of the rollout, and of what was kept as further environments beside it."""
    names = ("obs", "actions", "lstm_h", "lstm_c", "episode_start")
    parts = [getattr(rollout, name) for name in names]
    if kept is not None:
        others = [getattr(kept, name) for name in names]
        parts = [torch.cat([x, y.to(x.device)], 1) for x, y in zip(parts, others, strict=True)]
    obs, actions, hidden, cells, starts = parts
    return policy.evaluate_rollout(obs, actions, (hidden, cells), starts)


def _with_bonus(
    advantages: Tensor,
    rollout: Rollout,
    evaluation: RolloutEvaluation,
    bonus: Bonus,
    objective: Objective,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages of both rewards together, and scalars of the intrinsic one."""
    assert evaluation.int_values is not None
    # No end of a game cuts this return.
    discounts = torch.full_like(bonus.rewards, objective.int_gamma)
    values, rewards = evaluation.int_values, bonus.rewards
    intrinsic = _targets(rollout, evaluation, objective, values, rewards, discounts)
    deviation = intrinsic.advantages.std(correction=0)
    known = bonus.advantage_deviation
    divisor = known.maximum(deviation).clamp(min=losses.SMALLEST_DEVIATION)
    # Where everything is newer than its values say, no action is to blame or to praise.
    centred = intrinsic.advantages - intrinsic.advantages.mean()
    values = values[:-1]
    scalars = {
        "int_value_loss": losses.value_loss(values, intrinsic.returns),
        "int_value": values.detach().mean(),
        "int_explained_variance": losses.explained_variance(values.detach(), intrinsic.returns),
        "int_advantage_std": deviation,
    }
    return objective.ext_coef * advantages + objective.int_coef * centred / divisor, scalars


def _returns(
    rollout: Rollout, evaluation: RolloutEvaluation, objective: Objective
) -> losses.Returns:
    rewards = rewards_in_loss(rollout.rewards, objective)
    # After a time limit the return goes on with the value of what was cut off.
    rewards = rewards + objective.gamma * rollout.truncation_value
    goes_on = (~rollout.episode_start[1:]).to(rewards, non_blocking=True)  # it may lie on the host
    discounts = objective.gamma * goes_on
    return _targets(rollout, evaluation, objective, evaluation.values, rewards, discounts)


def _targets(
    rollout: Rollout,
    evaluation: RolloutEvaluation,
    objective: Objective,
    values: Tensor,
    rewards: Tensor,
    discounts: Tensor,
) -> losses.Returns:
    """Targets and advantages of the values [T + 1, B] of one of the two rewards [T, B]."""
    log_rhos = torch.zeros_like(rollout.log_prob)
    if objective.correction == "vtrace":  # log pi(a_t | x_t) - log mu(a_t | x_t)
        log_rhos = evaluation.log_prob.detach() - rollout.log_prob
    values = values.detach()
    return losses.vtrace(
        log_rhos, discounts, rewards, values[:-1], values[-1], gae_lambda=objective.gae_lambda
    )


def rewards_in_loss(rewards: Tensor, objective: Objective) -> Tensor:
    """Raw rewards [T, B], scaled and clipped."""
    rewards = objective.reward_scale * rewards
    if objective.reward_clip is not None:
        rewards = rewards.clamp(-objective.reward_clip, objective.reward_clip)
    return rewards


@contextmanager
def _unvalidated_distributions() -> Iterator[None]:
    """Distributions made inside do not look at their arguments, which the host would wait for.

    Logits that are not finite make a gradient that is not finite, and that is looked for.
    """
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
