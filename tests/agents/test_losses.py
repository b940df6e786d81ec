"""Losses and returns against loops from the definitions, values by hand, gradients by hand."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ncrl.agents.learning.losses import (
    Returns,
    entropy_floor_loss,
    entropy_loss,
    explained_variance,
    policy_gradient_loss,
    standardised,
    value_loss,
    vtrace,
)
from tests.reference import gae_reference, vtrace_reference


class Rollouts(NamedTuple):
    log_rhos: Tensor  # [T, B]
    discounts: Tensor  # [T, B], gamma * (1 - done)
    rewards: Tensor  # [T, B]
    values: Tensor  # [T, B]
    bootstrap_value: Tensor  # [B]


def make_rollouts(num_times: int, batch: int, *, seed: int = 0, gamma: float = 0.9) -> Rollouts:
    """Random rollouts in which about a quarter of the rows end an episode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    done = (torch.rand(num_times, batch, generator=generator) < 0.25).double()
    return Rollouts(
        normal(num_times, batch),
        gamma * (1 - done),
        normal(num_times, batch),
        normal(num_times, batch),
        normal(batch),
    )


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


SHAPES = [(1, 1), (2, 3), (8, 2), (13, 1)]
LAMBDAS = [0.0, 0.6, 0.95, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gae_lambda", LAMBDAS)
def test_vtrace_equals_the_explicit_sum(shape: tuple[int, int], gae_lambda: float) -> None:
    rollouts = make_rollouts(*shape, seed=1)
    copies = [tensor.clone() for tensor in rollouts]
    actual = vtrace(*rollouts, gae_lambda=gae_lambda)
    assert all(map(torch.equal, rollouts, copies)), "arguments are not changed"
    returns, advantages = vtrace_reference(*rollouts, gae_lambda=gae_lambda)
    assert_equal(actual.returns, returns)
    assert_equal(actual.advantages, advantages)


def gae(discounts: Tensor, *rows: Tensor, gae_lambda: float = 1.0) -> Returns:
    """V-trace where learner and worker have the same policy."""
    return vtrace(torch.zeros_like(discounts), discounts, *rows, gae_lambda=gae_lambda)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gae_lambda", LAMBDAS)
def test_gae_equals_the_mean_of_n_step_returns(shape: tuple[int, int], gae_lambda: float) -> None:
    _, *rollouts = make_rollouts(*shape, seed=2)
    actual = gae(*rollouts, gae_lambda=gae_lambda)
    returns, advantages = gae_reference(*rollouts, gae_lambda=gae_lambda)
    assert_equal(actual.returns, returns)
    assert_equal(actual.advantages, advantages)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_vtrace_by_hand() -> None:
    """Ratios 2 (cut to 1) and .5, deltas 1 and 3 as above.

    v_1 = 4 + .5*3 = 5.5; v_0 = 2 + 1*1 + .5*1*(.5*3) = 3.75;
    A_1 = .5*(3 + .5*8 - 4) = 1.5; A_0 = 1*(1 + .5*5.5 - 2) = 1.75.
    """
    actual = vtrace(
        column(math.log(2.0), math.log(0.5)),
        column(0.5, 0.5),
        column(1.0, 3.0),
        column(2.0, 4.0),
        torch.tensor([8.0], dtype=torch.float64),
    )
    assert_equal(actual.returns, column(3.75, 5.5))
    assert_equal(actual.advantages, column(1.75, 1.5))


@pytest.mark.parametrize("with_lag", [False, True])
def test_nothing_after_the_end_of_an_episode_counts(with_lag: bool) -> None:
    rollouts = make_rollouts(6, 1, seed=5)
    discounts = torch.full_like(rollouts.discounts, 0.9)
    discounts[2] = 0.0
    before = rollouts._replace(discounts=discounts)
    after = before._replace(
        rewards=torch.cat([before.rewards[:3], before.rewards[3:] + 7]),
        values=torch.cat([before.values[:3], before.values[3:] - 5]),
        bootstrap_value=before.bootstrap_value + 11,
    )
    first, second = (
        vtrace(*rows) if with_lag else gae(*rows[1:], gae_lambda=0.9) for rows in (before, after)
    )
    assert torch.equal(first.returns[:3], second.returns[:3])
    assert torch.equal(first.advantages[:3], second.advantages[:3])
    assert not torch.equal(first.returns[3:], second.returns[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_no_gradient(dtype: torch.dtype) -> None:
    rollouts = [tensor.to(dtype).requires_grad_() for tensor in make_rollouts(3, 2)]
    for result in vtrace(*rollouts):
        assert result.dtype == dtype and not result.requires_grad


def test_a_very_large_ratio_stays_finite() -> None:
    """exp overflows float32 at 89; a clipped ratio must not."""
    rollouts = Rollouts(*(tensor.float() for tensor in make_rollouts(4, 2, seed=8)))
    large = vtrace(*rollouts._replace(log_rhos=torch.full((4, 2), 200.0)))
    on_policy = vtrace(*rollouts._replace(log_rhos=torch.zeros(4, 2)))
    assert torch.equal(large.returns, on_policy.returns)
    assert torch.equal(large.advantages, on_policy.advantages)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_standardised_advantages() -> None:
    numbers = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0]
    mean = sum(numbers) / 6
    deviation = (sum((x - mean) ** 2 for x in numbers) / 5) ** 0.5
    found = standardised(torch.tensor(numbers, dtype=torch.float64).view(3, 2))
    assert found.shape == (3, 2)
    expected = [(x - mean) / deviation for x in numbers]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-7)
    assert standardised(torch.tensor([[2.0]])).item() == 2.0
    assert not standardised(torch.full((4, 1), 2.0)).any()


def test_policy_gradient_loss_value_and_gradient() -> None:
    """d/dlog_prob of -(log_prob * A).mean() is -A / (T*B), and none through A."""
    log_probs = normal(3, 2, seed=10).requires_grad_()
    advantages = normal(3, 2, seed=11).requires_grad_()
    loss = policy_gradient_loss(log_probs, advantages)
    expected = -sum(
        log_probs[t, b].item() * advantages[t, b].item() for t in range(3) for b in range(2)
    )
    assert loss.item() == pytest.approx(expected / 6)
    loss.backward()
    assert log_probs.grad is not None
    assert_equal(log_probs.grad, -advantages.detach() / 6)
    assert advantages.grad is None


def test_value_loss_value_and_gradient() -> None:
    """d/dV of mean (V - R)^2 is 2 (V - R) / (T*B), and none through R."""
    values = normal(3, 2, seed=14).requires_grad_()
    returns = normal(3, 2, seed=15).requires_grad_()
    loss = value_loss(values, returns)
    expected = sum(
        (values[t, b].item() - returns[t, b].item()) ** 2 for t in range(3) for b in range(2)
    )
    assert loss.item() == pytest.approx(expected / 6)
    loss.backward()
    assert values.grad is not None
    assert_equal(values.grad, 2 * (values - returns).detach() / 6)
    assert returns.grad is None


@pytest.mark.parametrize("fades", [True, False])
@pytest.mark.parametrize(
    ("entropy", "floor"), [(0.25, 1.0), (0.25, 0.5), (1.0, 1.0), (2.5, 1.0), (-3.0, 0.0)]
)
def test_entropy_floor_loss(entropy: float, floor: float, fades: bool) -> None:
    """d^2 with d = f - H or f log(f / H), and -2 d or -2 d f / H as its derivative; 0 above it, and
    without one."""
    mean = torch.tensor(entropy, dtype=torch.float64, requires_grad=True)
    loss = entropy_floor_loss(mean, floor, fades=fades)
    slope = torch.autograd.grad(loss, mean, allow_unused=True)[0] if loss.requires_grad else None
    distance = slope_of_distance = 0.0
    if floor and entropy < floor:
        distance = floor * math.log(floor / entropy) if fades else floor - entropy
        slope_of_distance = -floor / entropy if fades else -1.0
    assert loss.item() == pytest.approx(distance**2)
    expected = pytest.approx(2 * distance * slope_of_distance)
    assert (0.0 if slope is None else slope.item()) == expected


@pytest.mark.parametrize("margin", [4.0, 8.0, 15.0, 30.0, 38.0])
def test_a_policy_that_has_become_certain_is_drawn_back(margin: float) -> None:
    """The loss falls as fast with the other logits, however small their chance is (here down to
    entropies of 1e-15); with the distance itself the slope would be the entropy's, which fades."""
    logits = torch.tensor([margin, 0.0, 0.0], requires_grad=True)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    (slope,) = torch.autograd.grad(entropy_floor_loss(entropy, 1.0, fades=True), logits)
    assert slope[0] >= 0 and slope[1:].max() < -0.5


@pytest.mark.parametrize("logit", [-16.0, -20.0, -40.0, -110.0, 20.0, 110.0])
def test_the_pull_is_finite_where_rounding_makes_an_entropy_0(logit: float) -> None:
    """Its square too, which the norm of the gradient sums up."""
    logits = torch.full((1000,), logit, requires_grad=True)
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().mean()
    (slope,) = torch.autograd.grad(1000 * entropy_floor_loss(entropy, 2.0, fades=True), logits)
    assert slope.norm().isfinite()


def test_entropy_loss_value_and_gradient() -> None:
    entropy = normal(3, 2, seed=16).requires_grad_()
    loss = entropy_loss(entropy)
    assert loss.item() == pytest.approx(-sum(entropy.flatten().tolist()) / 6)
    loss.backward()
    assert entropy.grad is not None
    assert_equal(entropy.grad, torch.full((3, 2), -1 / 6, dtype=torch.float64))


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2, 4, 6 vary by 5; the residuals -1, 1, -1, 1 vary by 1: 1 - 1/5."""
    returns = column(0.0, 2.0, 4.0, 6.0)
    values = column(1.0, 1.0, 5.0, 5.0)
    assert float(explained_variance(values, returns)) == pytest.approx(0.8)
    assert float(explained_variance(returns, returns)) == pytest.approx(1.0)
    assert float(explained_variance(returns + 3, returns)) == pytest.approx(1.0)
    assert float(explained_variance(torch.zeros_like(returns), returns)) == pytest.approx(0.0)
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3.0)


def test_explained_variance_of_constant_returns_is_no_number() -> None:
    """Sparse rewards make returns constant for long; like SB3, NaN then and never an infinity."""
    assert torch.isnan(explained_variance(column(0.0, 1.0, 2.0), column(1.0, 1.0, 1.0)))


VTRACE_NAMES = Rollouts._fields


@pytest.mark.parametrize("name", VTRACE_NAMES)
def test_vtrace_names_both_shapes_that_disagree(name: str) -> None:
    rollouts = make_rollouts(5, 3)
    wrong = torch.zeros(7) if name == "bootstrap_value" else torch.zeros(7, 3)
    with pytest.raises(ValueError, match="7") as error:
        vtrace(*rollouts._replace(**{name: wrong}))
    assert "5" in str(error.value) or name == "bootstrap_value"
    assert "3" in str(error.value)


def test_a_bootstrap_value_that_would_broadcast_is_refused() -> None:
    rollouts = make_rollouts(5, 3)
    for wrong in (torch.zeros(1), torch.zeros(1, 3), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="3"):
            vtrace(*rollouts._replace(bootstrap_value=wrong))


@pytest.mark.parametrize("loss", [policy_gradient_loss, value_loss, explained_variance])
def test_losses_refuse_shapes_that_would_broadcast(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """[T, B] against [T, B, 1] would broadcast to [T, B, B]-like nonsense without an error."""
    with pytest.raises(ValueError, match=r"5, 3\D.*5, 3, 1|5, 3, 1.*5, 3\D"):
        loss(torch.zeros(5, 3), torch.zeros(5, 3, 1))
    with pytest.raises(ValueError, match=r"5, 3.*5, 1|5, 1.*5, 3"):
        loss(torch.zeros(5, 3), torch.zeros(5, 1))
