"""Policies of A3C as files: exported from any model, they act like it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv

from ncrl.agents import A3C, export_policy, load_policy
from ncrl.envs import light, masked_cartpole

SMALL = {"num_slots": 6, "num_heads": 2}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "MlpPolicy": (masked_cartpole(), {}),
    "NeurocoderMlpLstmPolicy": (
        masked_cartpole(), {"lstm_hidden_size": 8, "head_kwargs": SMALL, "net_arch": [5]},
    ),
    "NeurocoderCnnLstmPolicy": (
        light(), {"lstm_hidden_size": 8, "head_kwargs": SMALL, "encoder": "a3c"},
    ),
    "MultiInputLstmPolicy": (make_vec_env(SimpleMultiObsEnv), {"enable_critic_lstm": True}),
}  # fmt: skip


@pytest.mark.parametrize("policy", CASES)
def test_an_exported_policy_acts_like_the_model(policy: str, tmp_path: Path) -> None:
    env, kwargs = CASES[policy]
    n_envs = 1 if policy == "MultiInputLstmPolicy" else 2
    model = A3C(
        policy,
        env,
        n_workers=0,
        n_envs=n_envs,
        n_steps=5,
        seed=1,
        device="cpu",
        policy_kwargs=kwargs,
    ).learn(5 * n_envs)
    loaded = load_policy(export_policy(model, tmp_path), "cpu")
    assert type(loaded) is type(model.policy)
    state = same_state = None
    space = model.observation_space
    space.seed(0)
    for step in range(3):
        obs, starts = space.sample(), np.array([step == 2])
        action, state = model.predict(obs, state, starts, deterministic=True)
        same, same_state = loaded.predict(obs, same_state, starts, deterministic=True)
        assert np.array_equal(action, same)
        for part, same_part in zip(state or (), same_state or (), strict=True):
            assert np.array_equal(part, same_part)


def noise(policy: Any) -> float:
    obs = np.array([0.3, 0.2, 0.5], np.float32)
    drawn, mean = (policy.predict(obs, deterministic=fixed)[0] for fixed in (False, True))
    return float(np.abs(drawn - mean).max())


def test_the_noise_of_gsde_is_that_of_the_exported_weights(tmp_path: Path) -> None:
    """It is no tensor of the policy, but drawn from one."""
    model = A2C("MlpPolicy", "Pendulum-v1", use_sde=True, device="cpu", seed=0)
    with torch.no_grad():
        model.policy.log_std.fill_(-8)  # training has made it certain
    before = torch.get_rng_state()
    loaded = load_policy(export_policy(model, tmp_path), "cpu")
    assert 0 < noise(loaded) < 0.01
    assert torch.equal(before, torch.get_rng_state()), "reading draws nothing"
