"""A3C with every layer of the registry in the heads' place, and the losses those layers add."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from torch import nn

from ncrl.agents import A3C
from ncrl.agents.learning.objective import Lesson, Loss, actor_critic_loss
from ncrl.agents.playing.buffers import RolloutView
from ncrl.baselines import MoELinear, balance_loss, record_gates
from ncrl.envs import masked_cartpole
from ncrl.layers import LAYERS, make_layer
from ncrl.sb3 import MlpLstmPolicy
from tests.agents.conftest import assert_bit_equal

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "neurocoder": {"num_slots": 6, "num_heads": 2},
    "hypernet": {"hidden": 5},
    "film": {"hidden": 5},
    "moe": {"num_experts": 4, "top_k": 2},
    "nsm": {"num_slots": 3, "key_dim": 2},
}
heads = pytest.mark.parametrize("head", LAYERS)


def policy_kwargs(head: str) -> dict[str, Any]:
    return {"head": head, "head_kwargs": OPTIONS[head], "lstm_hidden_size": 8}


def make_model(head: str, **options: Any) -> A3C:
    options = {"n_envs": 2, "n_steps": 5, "seed": 1, "device": "cpu"} | options
    options = {"policy_kwargs": policy_kwargs(head)} | options
    return A3C("MlpLstmPolicy", masked_cartpole(), n_workers=0, **options)


def trained(head: str, **options: Any) -> A3C:
    return make_model(head, **options).learn(10, log_interval=None)


@heads
def test_every_head_trains_in_a3c_and_one_seed_gives_bit_equal_weights(head: str) -> None:
    model = make_model(head)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(20)
    assert model._n_updates == 2
    for net in ("action_net", "value_net"):
        assert type(getattr(model.policy, net)) is type(make_layer(head, 8, 2))
        moved = [
            name
            for name, value in model.policy.state_dict().items()
            if name.startswith(net) and not torch.equal(value, before[name])
        ]
        assert moved, f"{net} learns"
    assert_bit_equal(model, make_model(head).learn(20))


@pytest.mark.parametrize("head", ["moe", "nsm"])
def test_every_head_trains_in_sb3_contrib(head: str) -> None:
    model = RecurrentPPO(
        MlpLstmPolicy, "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu",
        policy_kwargs=policy_kwargs(head),
    )  # fmt: skip
    before = model.policy.action_net.state_dict()["query.bias" if head == "nsm" else "bias"].clone()
    model.learn(8)
    after = model.policy.action_net.state_dict()["query.bias" if head == "nsm" else "bias"]
    assert not torch.equal(before, after)


# The balance loss


def loss_of(model: A3C, **objective: Any) -> Loss:
    assert model._batch is not None
    torch.manual_seed(0)
    objective_ = replace(model._objective(), **objective)
    return actor_critic_loss(model.policy, Lesson(model._batch.rollout), objective_)


def mean_of_terms(loss: Loss) -> torch.Tensor:
    """With the default coefficients, but for the balance loss."""
    terms = loss.scalars
    return terms["policy_loss"] + 0.5 * terms["value_loss"] + 0.01 * terms["entropy_loss"]


def test_the_total_is_the_sum_of_its_terms() -> None:
    model = trained("moe")
    for coefficient in (0.0, 0.5):
        loss = loss_of(model, balance_coef=coefficient)
        assert loss.scalars["balance_loss"] > 0
        mean = mean_of_terms(loss) + coefficient * loss.scalars["balance_loss"]
        torch.testing.assert_close(loss.total, 10 * mean)  # a sum over 5 timesteps of 2 games


def test_the_orthogonality_loss_is_added_once_and_not_for_every_timestep() -> None:
    loss = loss_of(trained("neurocoder"), orth_coef=0.3)
    assert loss.scalars["orthogonality_loss"] > 0
    expected = 10 * mean_of_terms(loss) + 0.3 * loss.scalars["orthogonality_loss"]
    torch.testing.assert_close(loss.total, expected)


def test_the_balance_loss_is_that_of_the_evaluated_rollout() -> None:
    """Both heads, with the noise that the values and log-probabilities have."""
    model = trained("moe")
    loss = loss_of(model)
    assert model._batch is not None
    batch = model._batch.rollout
    torch.manual_seed(0)
    with record_gates(model.policy) as gates:
        again = model.policy.evaluate_rollout(
            batch.obs, batch.actions, (batch.lstm_h, batch.lstm_c), batch.episode_start
        )
    assert torch.equal(again.log_prob, loss.evaluation.log_prob)
    assert set(gates) == {"action_net", "value_net"}
    assert loss.scalars["balance_loss"].item() == pytest.approx(balance_loss(gates).item())


def test_the_balance_loss_has_a_gradient_of_its_own() -> None:
    model = trained("moe")
    gate = model.policy.value_net.gate.weight  # type: ignore[union-attr]
    gradients = [
        torch.autograd.grad(loss_of(model, balance_coef=c, vf_coef=0.0).total, gate)[0]
        for c in (0.0, 1.0)
    ]
    assert not gradients[0].any() and gradients[1].any()


@pytest.mark.parametrize("head", ["linear", "film"])
def test_other_heads_have_no_curve_of_these_losses(head: str) -> None:
    model = trained(head)
    assert not {"orthogonality_loss", "balance_loss"} & loss_of(model).scalars.keys()
    assert not {"train/orthogonality_loss", "train/balance_loss"} & set(model.logger.name_to_value)


def test_the_coefficient_is_an_argument_and_the_loss_is_logged() -> None:
    model = trained("moe")
    assert model.balance_coef == 0.01
    assert model.logger.name_to_value["train/balance_loss"] > 0
    assert trained("moe", balance_coef=0.3)._objective().balance_coef == 0.3
    with pytest.raises(ValueError, match=r"balance_coef .*got -1"):
        make_model("moe", balance_coef=-1)


def test_workers_play_without_noise() -> None:
    policy = MlpLstmPolicy(
        spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2), lambda _: 1e-3,
        **policy_kwargs("moe"),
    )  # fmt: skip
    policy.set_training_mode(False)
    assert not any(m.training for m in policy.modules() if isinstance(m, (MoELinear, nn.LSTM)))
    obs, state = torch.ones(4, 3), policy.initial_state(4)
    starts = torch.zeros(4, dtype=torch.bool)
    latent, _ = policy.encode(obs, state, starts)
    assert torch.equal(policy.values(latent), policy.values(latent))
    policy.set_training_mode(True)
    assert not torch.equal(policy.values(latent), policy.values(latent))


@pytest.mark.parametrize("gate", [False, True])
def test_a_residual_program_without_gate_starts_as_sb3s_layer(gate: bool) -> None:
    def made(head: str, **options: Any) -> Any:
        kwargs = {"head": head, "head_kwargs": options, "net_arch": []}
        return make_model(head, policy_kwargs=kwargs).policy

    plain, coded = made("linear"), made("neurocoder", residual_gate=gate)
    for name in ("action_net", "value_net"):
        started = getattr(coded, name).integration.residual
        assert torch.equal(started, getattr(plain, name).weight.T) == (not gate)


def test_values_that_callbacks_are_shown_are_without_noise() -> None:
    """Also where workers play, and the policy is as its last update left it."""
    model = trained("moe")
    assert model._batch is not None
    model.policy.set_training_mode(True)
    view = RolloutView(model._batch, model.policy)
    values = view.values
    model.policy.set_training_mode(True)
    assert np.array_equal(values, view.values)
