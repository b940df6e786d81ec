"""`register()`: our policies by name in SB3's algorithms, and what is said to the wrong pairs."""

from typing import Any

import pytest
from gymnasium.wrappers import TimeLimit
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import ncrl.sb3
from ncrl.envs.small import Remember
from ncrl.sb3 import NeurocoderMlpLstmPolicy, NeurocoderMlpPolicy, register

ALGORITHMS: dict[str, Any] = {"A2C": A2C, "PPO": PPO, "RecurrentPPO": RecurrentPPO}


def test_names_are_added_and_nothing_else_changes() -> None:
    before = {name: dict(kind.policy_aliases) for name, kind in ALGORITHMS.items()}
    registered = register()
    assert registered.keys() == ALGORITHMS.keys()
    for name, kind in ALGORITHMS.items():
        added = {policy: getattr(ncrl.sb3, policy) for policy in registered[name]}
        assert all(policy.startswith("Neurocoder") for policy in added)
        assert kind.policy_aliases.items() >= (before[name] | added).items()
        assert all(("Lstm" in policy) == (name == "RecurrentPPO") for policy in added)
        others = kind.policy_aliases.keys() - before[name].keys() - added.keys()
        assert all(policy.startswith("Neurocoder") for policy in others)


def test_a_second_call_changes_nothing() -> None:
    first = register()
    aliases = {name: dict(kind.policy_aliases) for name, kind in ALGORITHMS.items()}
    assert register() == first
    assert aliases == {name: kind.policy_aliases for name, kind in ALGORITHMS.items()}


def test_names_can_be_used() -> None:
    register()
    for kind in (A2C, PPO):
        model = kind("NeurocoderMlpPolicy", "CartPole-v1", device="cpu")
        assert type(model.policy) is NeurocoderMlpPolicy


@pytest.mark.parametrize("algorithm", [A2C, PPO])
@pytest.mark.parametrize("policy", ["NeurocoderMlpLstmPolicy", NeurocoderMlpLstmPolicy])
def test_a_recurrent_policy_is_refused(algorithm: Any, policy: Any) -> None:
    register()
    model = algorithm(policy, "CartPole-v1", device="cpu")
    with pytest.raises(TypeError, match=r"use sb3_contrib\.RecurrentPPO or ncrl\.agents\.A3C"):
        model.learn(10)


def test_a_policy_without_memory_is_refused_by_recurrent_ppo() -> None:
    register()
    with pytest.raises(ValueError, match="NeurocoderMlpPolicy unknown"):
        RecurrentPPO("NeurocoderMlpPolicy", "CartPole-v1", device="cpu")


def test_recurrent_ppo_learns_to_remember() -> None:
    """The reward is 1 for naming the cue shown two timesteps before; without memory 0.5."""
    register()

    def make() -> Any:
        return TimeLimit(Remember(delay=2, n_cues=2), 10)

    model = RecurrentPPO(
        "NeurocoderMlpLstmPolicy", make_vec_env(make, 8, seed=0), n_steps=18, batch_size=72,
        n_epochs=4, learning_rate=5e-3, seed=0, device="cpu",
        policy_kwargs={"head_kwargs": {"num_slots": 6, "num_heads": 2}, "lstm_hidden_size": 16},
    )  # fmt: skip
    model.learn(4_000)
    mean, _ = evaluate_policy(model, make_vec_env(make, 4, seed=9), n_eval_episodes=40)
    assert mean > 0.9  # chance: 0.5
