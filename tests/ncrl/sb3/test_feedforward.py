"""Policies without memory in A2C and PPO: SB3's own but for the heads, which learn."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from ncrl import NeurocoderLinear
from ncrl.envs.small import Light
from ncrl.layers import LAYERS
from ncrl.sb3 import NeurocoderCnnPolicy, NeurocoderMlpPolicy

SMALL = {"num_slots": 6, "num_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "neurocoder": SMALL,
    "hypernet": {"hidden": 5},
    "film": {"hidden": 5},
    "moe": {"num_experts": 4, "top_k": 2},
    "nsm": {"num_slots": 3, "key_dim": 2},
}


class SmallLight(Light):
    """As small as SB3's convolutional trunk allows."""

    SIZE = 36


def small_light() -> gym.Env:
    return gym.wrappers.TimeLimit(SmallLight(n_actions=4), 20)


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_with_linear_heads_it_is_sb3s_policy(algorithm: Any) -> None:
    trained = [
        algorithm(policy, "CartPole-v1", n_steps=64, seed=1, device="cpu", policy_kwargs=kwargs)
        .learn(128)
        .policy.state_dict()
        for policy, kwargs in (("MlpPolicy", {}), (NeurocoderMlpPolicy, {"head": "linear"}))
    ]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


@pytest.mark.parametrize("head", LAYERS)
@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_every_layer_trains(algorithm: Any, head: str) -> None:
    model = algorithm(
        NeurocoderMlpPolicy, "CartPole-v1", n_steps=64, seed=1, device="cpu",
        policy_kwargs={"head": head, "head_kwargs": OPTIONS[head]},
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(64)
    for net in ("action_net", "value_net"):
        kind = NeurocoderLinear if head == "neurocoder" else LAYERS[head]
        assert type(getattr(model.policy, net)) is kind
        assert any(
            not torch.equal(value, before[name])
            for name, value in model.policy.state_dict().items()
            if name.startswith(net)
        )
    held = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.policy.parameters()}


def test_gsde_works() -> None:
    """Its noise depends on what the head reads, not on the head."""
    model = A2C(
        NeurocoderMlpPolicy, "Pendulum-v1", use_sde=True, seed=0, device="cpu",
        policy_kwargs={"head_kwargs": SMALL},
    )  # fmt: skip
    before = model.policy.log_std.detach().clone()
    model.learn(30)
    assert not torch.equal(before, model.policy.log_std)


def test_cartpole_is_learned() -> None:
    model = PPO(
        NeurocoderMlpPolicy, make_vec_env("CartPole-v1", 4, seed=0), n_steps=64, batch_size=64,
        n_epochs=4, learning_rate=2e-3, gae_lambda=0.9, seed=0, device="cpu",
        policy_kwargs={"head_kwargs": SMALL},
    )  # fmt: skip
    model.learn(4_000)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 4, seed=9), n_eval_episodes=4)
    assert mean > 70  # chance: about 22


def test_images_are_learned() -> None:
    model = PPO(
        NeurocoderCnnPolicy, make_vec_env(small_light, 4, seed=0), n_steps=32, batch_size=32,
        n_epochs=2, learning_rate=1e-3, gamma=0.0, seed=0, device="cpu",
        policy_kwargs={"head_kwargs": SMALL, "features_extractor_kwargs": {"features_dim": 32}},
    )  # fmt: skip
    model.learn(1_500)
    mean, _ = evaluate_policy(model, make_vec_env(small_light, 4, seed=9), n_eval_episodes=8)
    assert mean > 15  # chance: 5, best: 20


def test_no_weight_is_left_out_of_the_gradient() -> None:
    policy = PPO(NeurocoderMlpPolicy, "CartPole-v1", device="cpu").policy
    obs = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 4))).float()
    values, log_prob, _ = policy.evaluate_actions(obs, torch.tensor([0, 1] * 3))
    (values.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None for p in policy.parameters())
