"""A step of the learner: what it makes the host wait for, and steps that are not made."""

import copy
import math
import traceback
from typing import Any

import pytest
import torch
from torch.distributions import Categorical
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ncrl.agents import A3C
from ncrl.agents.learning.objective import Lesson, Loss, actor_critic_loss
from ncrl.agents.learning.update import apply_gradient, update_on_device
from ncrl.agents.playing.buffers import Rollout
from ncrl.networks import static_unroll
from ncrl.sb3.engine import map_tensors
from ncrl.shell.tensors import tensors_in

HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "neurocoder": {"num_slots": 8, "num_heads": 2},
    "moe": {"num_experts": 3, "top_k": 2},
}


def trained(head: str, use_rms_prop: bool = True) -> A3C:
    """A model with a batch to learn from, in which episodes end."""
    options = {"lstm_hidden_size": 8, "head": head, "head_kwargs": HEADS[head]}
    model = A3C(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_workers=0,
        n_envs=4,
        seed=0,
        use_rms_prop=use_rms_prop,
        policy_kwargs=options,
    )
    model.learn(160)
    model.policy.optimizer.param_groups[0]["lr"] = 7e-4  # a training ends at 0
    return model


def batch_of(model: A3C) -> Rollout:
    assert model._batch is not None
    return model._batch.rollout


def loss_of(model: A3C, batch: Rollout | None = None) -> Loss:
    """Of a batch, or of that which the model played last."""
    return actor_critic_loss(model.policy, Lesson(batch or batch_of(model)), model._objective())


class Waits(TorchDispatchMode):
    """Where the host asked for a value, or for a shape that depends on values, or stood by while
    something was copied to another device."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        moves = "_to_copy" in func._schema.name and options.get("device", args[0].device).type
        stands_by = moves and moves != args[0].device.type and not options.get("non_blocking")
        if stands_by or any(name in func._schema.name for name in self.ASKING):
            on_host = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.bool]
            mine = [
                frame for frame in traceback.extract_stack() if "/site-packages/" not in frame[0]
            ]
            # Episode starts are kept on the host, whatever the learner's device.
            if not (on_host and mine[-2].name == "unroll_lstm"):
                self.places.append(f"{func._schema.name} in {mine[-2].filename}:{mine[-2].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", HEADS)
def test_an_update_waits_for_the_device_once(head: str) -> None:
    """Once is the list of all scalars, which asks for no value by itself."""
    model = trained(head)
    assert batch_of(model).episode_start[1:].any()
    with Waits() as waits:
        model.train()
    assert not waits.places


def test_the_counter_of_waits_counts() -> None:
    with Waits() as waits:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        torch.ones(3).to("meta", non_blocking=True)
        torch.ones(3).to("meta")
    assert len(waits.places) == 3


@pytest.mark.parametrize("head", HEADS)
def test_episode_starts_may_lie_on_the_host(head: str) -> None:
    """As those of eager updates on a GPU do. Tensors on `meta` refuse those of the host as well."""
    model = trained(head)
    host = batch_of(model)
    rollout = map_tensors(lambda tensor: tensor.to("meta"), host)
    rollout = rollout._replace(episode_start=host.episode_start)
    model.policy.to("meta")
    with Waits() as waits:
        loss = loss_of(model, rollout)
        loss.total.backward()
    assert all(scalar.is_meta for scalar in loss.scalars.values())
    assert not waits.places


def test_scalars_are_the_terms_of_the_loss() -> None:
    model = trained("linear")
    loss = loss_of(model)
    gradients = torch.autograd.grad(loss.total, list(model.policy.parameters()), retain_graph=True)
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    update = apply_gradient(model.policy, loss, 1e-3)
    assert update.stepped
    for parameter, gradient in zip(model.policy.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 1e-3 / norm, rtol=1e-2, atol=1e-9)
    terms = {f"{name}_loss" for name in ("policy", "value", "entropy")}
    assert set(loss.scalars) == terms | {"explained_variance"}
    expected = {name: value.item() for name, value in loss.scalars.items()} | {"grad_norm": norm}
    assert update.scalars == pytest.approx(expected, nan_ok=True, rel=1e-5)


def test_normalised_advantages_do_not_depend_on_the_scale_of_rewards() -> None:
    model = trained("linear")
    with torch.no_grad():  # values of 0, so that advantages are made of rewards alone
        for parameter in model.policy.value_net.parameters():
            parameter.zero_()
    losses = []
    for normalize, scale in ((False, 1.0), (False, 3.0), (True, 1.0), (True, 3.0)):
        model.normalize_advantage, model.reward_scale = normalize, scale
        losses.append(loss_of(model).scalars["policy_loss"].item())
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4)
    assert losses[3] == pytest.approx(losses[2], abs=1e-6)
    assert losses[2] != pytest.approx(losses[0], abs=1e-2)


def test_weights_that_are_not_finite_make_no_step_and_no_exception() -> None:
    model = trained("linear")
    with torch.no_grad():
        next(iter(model.policy.action_net.parameters())).fill_(float("nan"))
    before = [p.clone() for p in model.policy.parameters()]
    update = apply_gradient(model.policy, loss_of(model), 40.0)
    assert not update.stepped
    for now, then in zip(model.policy.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, equal_nan=True, rtol=0, atol=0)


def test_a_gradient_too_long_to_be_measured_makes_no_step() -> None:
    """All its numbers are finite, but the sum of their squares is not."""
    eager, other = trained("linear"), trained("linear")
    batch = batch_of(eager)._replace(rewards=batch_of(eager).rewards * 1e25)
    before = [p.clone() for p in eager.policy.parameters()]
    updates = [
        apply_gradient(eager.policy, loss_of(eager, batch), 40.0),
        update_device(other, batch).on_host(),
    ]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in eager.policy.parameters())
    for model, update in zip((eager, other), updates, strict=True):
        assert not update.stepped and update.scalars["grad_norm"] == math.inf
        assert all(map(torch.equal, model.policy.parameters(), before))


def test_distributions_elsewhere_are_validated_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile, called by any earlier test, ends validation in the whole process.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    model = trained("linear")
    loss_of(model)
    with pytest.raises(ValueError, match="logits"):
        Categorical(logits=torch.tensor([float("nan")]))


both_optimisers = pytest.mark.parametrize("use_rms_prop", [True, False], ids=["rmsprop", "adam"])
static_heads = pytest.mark.parametrize("head", ["linear", "neurocoder"])


def other_batch(model: A3C) -> Rollout:
    """Like the batch of the model, but episodes start elsewhere and actions differ."""
    batch = batch_of(model)
    starts = torch.rand(21, 4, generator=torch.Generator().manual_seed(5)) < 0.4
    assert not torch.equal(starts.any(1), batch.episode_start.any(1))
    return batch._replace(
        episode_start=starts,
        actions=1 - batch.actions,
        rewards=batch.rewards * 3,
        obs=batch.obs.flip(0),  # type: ignore[union-attr]
    )


def update_device(model: A3C, batch: Rollout, limit: float = 40.0) -> Any:
    return update_on_device(model.policy, Lesson(batch), model._objective(), limit)


@both_optimisers
@static_heads
@pytest.mark.parametrize("limit", [1e-2, 40.0, float("inf"), 0.0])
def test_an_update_on_the_device_is_the_update(head: str, limit: float, use_rms_prop: bool) -> None:
    one, other = trained(head, use_rms_prop), trained(head, use_rms_prop)
    for batch in (batch_of(one), other_batch(one)):
        loss = loss_of(one, batch)
        update = apply_gradient(one.policy, loss, limit)
        measured = update_device(other, batch, limit)
        assert measured.on_host().stepped and update.stepped
        assert measured.on_host().scalars == pytest.approx(
            update.scalars, nan_ok=True, rel=1e-4, abs=1e-5
        )
        torch.testing.assert_close(measured.latent.actor, loss.evaluation.latent.actor)
        assert not any(x.requires_grad for x in tensors_in(measured)), "no graph is kept alive"
    for mine, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@both_optimisers
def test_the_device_leaves_out_a_step_that_is_not_finite(use_rms_prop: bool) -> None:
    model = trained("neurocoder", use_rms_prop)
    rewards = batch_of(model).rewards.clone()
    rewards[3, 1] = float("nan")
    before = copy.deepcopy(
        (list(model.policy.parameters()), model.policy.optimizer.state_dict()["state"])
    )
    update = update_device(model, batch_of(model)._replace(rewards=rewards)).on_host()
    assert not update.stepped and math.isnan(update.scalars["grad_norm"])
    for now, then in zip(model.policy.parameters(), before[0], strict=True):
        assert torch.equal(now, then)
    torch.testing.assert_close(
        model.policy.optimizer.state_dict()["state"], before[1], rtol=0, atol=0
    )
    assert update_device(model, batch_of(model)).on_host().stepped


class Operations(TorchDispatchMode):
    """What was asked of torch, with the shapes of what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else None for a in args]
        self.seen.append((func, *shapes))
        return func(*args, **(kwargs or {}))


@both_optimisers
@static_heads
def test_an_update_on_the_device_never_depends_on_data(head: str, use_rms_prop: bool) -> None:
    """The same operations for other starts of episodes, and for a gradient that is not finite."""
    model = trained(head, use_rms_prop)
    batch = batch_of(model)
    seen = []
    for given in (batch, other_batch(model), batch._replace(rewards=batch.rewards * float("nan"))):
        with Waits() as waits, Operations() as operations:
            update_device(model, given)
        # The fused step of the CPU asks for the number of steps; that of CUDA does not.
        assert not [place for place in waits.places if "/torch/optim/" not in place]
        seen.append(operations.seen)
    assert seen[0] == seen[1] == seen[2]


@static_heads
def test_a_trace_with_one_batch_is_right_for_another(head: str) -> None:
    model = trained(head)
    first, second = batch_of(model), other_batch(model)
    weights = list(model.policy.parameters())

    def gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
        with static_unroll():
            loss = loss_of(model, Rollout(*tensors))
        return [loss.total, *torch.autograd.grad(loss.total, weights)]

    traced = make_fx(gradients)(*first)
    for batch in (first, second):
        loss = loss_of(model, batch)
        expected = [loss.total, *torch.autograd.grad(loss.total, weights)]
        with torch.no_grad():  # the trace holds the backward pass as well
            found = traced(*batch)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
