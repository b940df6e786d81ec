"""The heads' own losses are part of the gradient that A2C, PPO and RecurrentPPO step along."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit, TransformObservation
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from ncrl.baselines import balance_loss, record_gates
from ncrl.sb3 import CnnLstmPolicy, MlpLstmPolicy, NeurocoderMlpLstmPolicy, NeurocoderMlpPolicy
from ncrl.sb3.regularise import with_gradient_of
from tests.ncrl.sb3.environments import Still

HEAD = {"num_slots": 6, "num_heads": 2}
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], type, dict[str, Any]]] = {
    "A2C": (A2C, NeurocoderMlpPolicy, {}),
    "PPO": (PPO, NeurocoderMlpPolicy, {"batch_size": 16, "n_epochs": 1}),
    "RecurrentPPO": (RecurrentPPO, NeurocoderMlpLstmPolicy, {"batch_size": 16, "n_epochs": 1}),
}


def model_of(algorithm: str, *, max_grad_norm: float = 1e9, **policy_kwargs: Any) -> Any:
    """A model whose one update moves the weights by the negative gradient itself."""
    kind, policy, options = ALGORITHMS[algorithm]
    if policy is NeurocoderMlpLstmPolicy:
        policy_kwargs["lstm_hidden_size"] = 8
    policy_kwargs = {
        "head_kwargs": HEAD,
        "optimizer_class": torch.optim.SGD,
        "optimizer_kwargs": {},
        **policy_kwargs,
    }
    return kind(
        policy, "CartPole-v1", n_steps=16, seed=3, learning_rate=1.0, device="cpu",
        max_grad_norm=max_grad_norm, policy_kwargs=policy_kwargs, **options,
    )  # fmt: skip


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.policy.named_parameters()}


def orthogonality_gradient(policy: ActorCriticPolicy) -> dict[str, Tensor]:
    """Of |U U^T - I| + |V V^T - I| of both heads, written out."""
    copies, total = {}, torch.zeros(())
    for head in ("action_net", "value_net"):
        for memory in ("u", "v"):
            name = f"{head}.memory.{memory}"
            rows = dict(policy.named_parameters())[name].detach().clone().requires_grad_()
            total = total + torch.linalg.norm(rows @ rows.T - torch.eye(len(rows)))
            copies[name] = rows
    gradients = torch.autograd.grad(total, list(copies.values()))
    return dict(zip(copies, gradients, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_follows_the_gradient_of_the_total(algorithm: str) -> None:
    model = model_of(algorithm, orth_coef=0.0)
    expected = orthogonality_gradient(model.policy)
    without = weights(model.learn(16))
    after = weights(model_of(algorithm, orth_coef=0.5).learn(16))
    for name, value in without.items():
        step = expected[name] * -0.5 if name in expected else torch.zeros_like(value)
        torch.testing.assert_close(after[name] - value, step, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_is_clipped_with_the_rest(algorithm: str) -> None:
    model = model_of(algorithm, orth_coef=100.0, max_grad_norm=0.25)
    before = weights(model)
    model.learn(16)
    after = weights(model)
    squares = [(after[name] - value).square().sum() for name, value in before.items()]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(0.25, rel=1e-3)


def memory_gradient(policy: Any) -> Tensor:
    """Of the plain sum of log-probabilities, through `evaluate_actions`."""
    policy.zero_grad()
    obs, actions = torch.linspace(-1, 1, 12).view(3, 4), torch.tensor([0, 1, 1])
    if isinstance(policy, NeurocoderMlpLstmPolicy):
        state = policy.initial_state(3)
        result = policy.evaluate_actions(obs, actions, RNNStates(state, state), torch.zeros(3))
    else:
        result = policy.evaluate_actions(obs, actions)
    result[1].sum().backward()
    gradient: Tensor = policy.action_net.memory.u.grad
    return gradient.clone()


@pytest.mark.parametrize("algorithm", ["PPO", "RecurrentPPO"])
def test_copies_and_files_keep_it(algorithm: str, tmp_path: Path) -> None:
    model = model_of(algorithm, orth_coef=0.5)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    others = [
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
        type(model).load(tmp_path / "model", device="cpu").policy,
        type(model.policy).load(tmp_path / "policy", device="cpu"),
    ]
    expected = memory_gradient(model.policy)
    model.policy.orth_coef = 0.0
    assert not torch.allclose(memory_gradient(model.policy), expected, atol=1e-3)
    for policy in others:
        assert torch.equal(memory_gradient(policy), expected)


@pytest.mark.parametrize("algorithm", ["PPO", "RecurrentPPO"])
def test_what_a3c_calls_carries_nothing(algorithm: str) -> None:
    """A3C adds the loss itself; it must not count twice."""
    gradients = []
    for coef in (0.0, 5.0):
        policy: Any = model_of(algorithm, orth_coef=coef).policy
        result = policy.evaluate_rollout(
            torch.ones(3, 2, 4),
            torch.zeros(2, 2),
            policy.initial_state(2),
            torch.zeros(3, 2, dtype=torch.bool),
        )
        (result.log_prob.sum() + result.values.sum()).backward()
        gradients.append(policy.action_net.memory.u.grad)
    assert torch.equal(*gradients)


def test_values_and_log_probabilities_are_what_they_were() -> None:
    x = torch.randn(3, requires_grad=True)
    loss = torch.randn(2, requires_grad=True)
    y = with_gradient_of(loss.square().sum(), x)
    assert torch.equal(x, y)
    (7 * y).mean().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 7 / 3))
    torch.testing.assert_close(loss.grad, 2 * loss.detach())  # once, whatever the factor of y
    with torch.no_grad():
        assert with_gradient_of(loss.square().sum(), x) is x


IMAGES = spaces.Box(0, 255, (1, 20, 20), np.uint8)


def test_no_padding_is_in_the_mean_image() -> None:
    """RecurrentPPO fills sequences up to the length of the longest with zeros."""
    white = TransformObservation(Still(IMAGES), lambda image: np.full_like(image, 255), IMAGES)
    model = RecurrentPPO(
        CnnLstmPolicy, TimeLimit(white, 5), n_steps=16, batch_size=8, n_epochs=1, device="cpu",
        seed=0, policy_kwargs={"lstm_hidden_size": 8},
    )  # fmt: skip
    background = model.policy.features_extractor.background
    model.learn(16)
    assert background.num_images == 16
    torch.testing.assert_close(background.mean, torch.ones(1, 20, 20))


def test_what_is_not_trained_on_is_not_in_the_mean_image() -> None:
    """As where log-probabilities are only looked at."""
    policy = CnnLstmPolicy(IMAGES, spaces.Discrete(2), lambda _: 1e-3, lstm_hidden_size=8)
    background, state = policy.features_extractor.background, policy.initial_state(3)
    obs, starts = torch.full((3, 1, 20, 20), 255, dtype=torch.uint8), torch.zeros(3)
    arguments: Any = (obs, torch.zeros(3), RNNStates(state, state), starts)
    for is_training, has_gradient, seen in ((True, False, 0), (False, True, 0), (True, True, 3)):
        policy.set_training_mode(is_training)
        with torch.set_grad_enabled(has_gradient):
            policy.evaluate_actions(*arguments)
        assert background.num_images == seen


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_balance_loss_is_that_of_the_same_pass(recurrent: bool) -> None:
    space = spaces.Box(-1, 1, (4,), np.float32)
    options: dict[str, Any] = {
        "head": "moe", "head_kwargs": {"num_experts": 4, "top_k": 2}, "balance_coef": 0.7,
    }  # fmt: skip
    kind: Any = NeurocoderMlpPolicy
    if recurrent:
        kind, options = MlpLstmPolicy, {**options, "lstm_hidden_size": 8}
    torch.manual_seed(1)
    policy = kind(space, spaces.Discrete(3), lambda _: 1e-3, **options)
    obs, actions = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 2, 1, 0])
    arguments: tuple[Any, ...] = (obs, actions)
    if recurrent:
        state = policy.initial_state(5)
        arguments = (obs, actions, RNNStates(state, state), torch.zeros(5))

    torch.manual_seed(2)  # the gates are noisy
    policy.evaluate_actions(*arguments)[1].sum().backward()
    got = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    policy.zero_grad()
    policy.balance_coef = 0.0
    torch.manual_seed(2)
    with record_gates(policy) as gates:
        log_prob = policy.evaluate_actions(*arguments)[1]
    (log_prob.sum() + 0.7 * balance_loss(gates)).backward()
    assert any("value_net.gate" in name for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, dict(policy.named_parameters())[name].grad)


@pytest.mark.parametrize("name", ["orth_coef", "balance_coef"])
@pytest.mark.parametrize("value", [-1, float("nan"), "much"])
def test_impossible_coefficients_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        model_of("PPO", **{name: value})
