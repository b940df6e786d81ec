"""`A3C` with policies that remember: what sb3-contrib's recurrent tests check of RecurrentPPO.

And the recurrent twin of SB3's advantage test: returns and advantages through time limits, ends of
episodes and several rollouts, against a loop over a log of what happened.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

import ncrl.agents.learning.learner
import ncrl.agents.learning.losses
from ncrl.agents import A3C
from ncrl.agents.algorithm import FORGOTTEN_AFTER
from ncrl.agents.learning.losses import policy_gradient_loss, value_loss
from ncrl.envs import remember
from ncrl.sb3 import MlpLstmPolicy

WIDTH = 8


@dataclass
class Happened:
    """One timestep as the environment saw it."""

    obs: np.ndarray
    reward: float
    after: np.ndarray
    """What it led to, before any reset."""
    end: str
    """`terminated`, `truncated` or nothing."""


@dataclass
class Diary:
    """All that happened, and what is shown now."""

    steps: list[Happened] = field(default_factory=list)
    now: np.ndarray | None = None


class Alternating(gym.Env):
    """Episodes of 3 timesteps that end, then of 5 that are cut off, with rewards of any sign."""

    def __init__(self, diary: Diary, seed: int) -> None:
        self.observation_space = spaces.Box(-3, 3, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.diary, self.rng = diary, np.random.default_rng(seed)
        self.time, self.episodes = 0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.time, self.episodes = 0, self.episodes + 1
        return self._show(), {}

    def step(self, action: int) -> tuple:
        self.time += 1
        before, reward = self.diary.now, float(self.rng.normal()) + float(action)
        after = self._show()
        short = self.episodes % 2 == 1
        over = self.time == (3 if short else 5)
        end = "" if not over else "terminated" if short else "truncated"
        self.diary.steps.append(Happened(before, reward, after, end))
        return after, reward, end == "terminated", end == "truncated", {}

    def _show(self) -> np.ndarray:
        self.diary.now = self.rng.normal(size=2).clip(-3, 3).astype(np.float32)
        return self.diary.now


def make_model(policy: str, env: Any, policy_kwargs: dict | None = None, **options: Any) -> A3C:
    options = {"n_steps": 7, "seed": 1, "device": "cpu", "n_workers": 0} | options
    memory = {"lstm_hidden_size": WIDTH} if "Lstm" in policy else {}
    return A3C(policy, env, policy_kwargs=memory | (policy_kwargs or {}), **options)


def unsettle(model: A3C) -> None:
    """Give the heads weights of a size that SB3's initialisation does not have."""
    torch.manual_seed(7)
    with torch.no_grad():
        for head in (model.policy.action_net, model.policy.value_net):
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter))


class LiteralCritic:
    """V of one environment, one timestep at a time, from the modules of the policy alone."""

    def __init__(self, policy: MlpLstmPolicy) -> None:
        self.policy = policy
        self.forget()

    def forget(self) -> None:
        layers = self.policy.lstm_actor.num_layers
        self.state = torch.zeros(layers, 1, WIDTH), torch.zeros(layers, 1, WIDTH)

    @torch.no_grad()
    def look(self, obs: np.ndarray, *, remember: bool) -> float:
        features = self.policy.features_extractor(torch.from_numpy(obs)[None])
        output, state = self.policy.lstm_actor(features[None], self.state)
        if remember:
            self.state = state
        return float(self.policy.value_net(output[0]))


def literal_advantages(
    policy: MlpLstmPolicy, diary: Diary, n_steps: int, gamma: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of one environment's whole rollouts, one after the other.

    With equal weights V-trace's corrections are 1, so both corrections come to this.
    """
    critic = LiteralCritic(policy)
    values, rewards = [], []
    for step in diary.steps:
        values.append(critic.look(step.obs, remember=True))
        behind_the_limit = critic.look(step.after, remember=False)
        rewards.append(step.reward + gamma * behind_the_limit * (step.end == "truncated"))
        if step.end:
            critic.forget()
    values.append(critic.look(diary.now, remember=False))
    advantages = np.zeros(len(rewards))
    for first in range(0, len(rewards), n_steps):
        ahead = 0.0
        for t in reversed(range(first, first + n_steps)):
            goes_on = diary.steps[t].end == ""
            delta = rewards[t] + gamma * values[t + 1] * goes_on - values[t]
            ahead = delta + gamma * gae_lambda * ahead * goes_on
            advantages[t] = ahead
    return advantages, advantages + np.array(values[:-1])


@pytest.mark.parametrize(
    ("policy", "gamma", "gae_lambda", "correction"),
    [
        ("MlpLstmPolicy", 0.97, 1.0, "none"),
        ("MlpLstmPolicy", 0.97, 1.0, "vtrace"),
        ("MlpLstmPolicy", 0.9, 0.8, "none"),
        ("MlpLstmPolicy", 0.9, 0.8, "vtrace"),
        ("MlpLstmPolicy", 1.0, 0.0, "none"),
        ("NeurocoderMlpLstmPolicy", 0.97, 0.8, "vtrace"),
    ],
)
def test_advantages_through_limits_ends_and_rollouts(
    policy: str, gamma: float, gae_lambda: float, correction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    advantages: list[Tensor] = []
    returns: list[Tensor] = []

    def watched_policy_loss(log_prob: Tensor, given: Tensor) -> Tensor:
        advantages.append(given)
        return policy_gradient_loss(log_prob, given)

    def watched_value_loss(values: Tensor, given: Tensor) -> Tensor:
        returns.append(given)
        return value_loss(values, given)

    monkeypatch.setattr(ncrl.agents.learning.losses, "policy_gradient_loss", watched_policy_loss)
    monkeypatch.setattr(ncrl.agents.learning.losses, "value_loss", watched_value_loss)
    diaries = [Diary() for _ in range(3)]
    env = DummyVecEnv([lambda i=i: Alternating(diaries[i], i) for i in range(3)])
    model = make_model(
        policy, env, {"n_lstm_layers": 2}, learning_rate=0.0, gamma=gamma, gae_lambda=gae_lambda,
        correction=correction,
    )  # fmt: skip
    unsettle(model)
    model.learn(3 * 7 * 3)
    assert len(advantages) == len(returns) == 3
    for i, diary in enumerate(diaries):
        assert {step.end for step in diary.steps} == {"", "terminated", "truncated"}
        expected = literal_advantages(model.policy, diary, 7, gamma, gae_lambda)
        found = (torch.cat(rows)[:, i].double().numpy() for rows in (advantages, returns))
        for actual, literal in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, literal, rtol=1e-4, atol=1e-4)


# Memory in predict.


def test_forgotten_states_are_noticed_once() -> None:
    model = make_model("MlpLstmPolicy", "CartPole-v1", n_envs=1)
    obs = np.zeros(4, np.float32)
    state = (np.zeros((1, 1, WIDTH)), np.zeros((1, 1, WIDTH)))

    def predict(times: int, *given: Any) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(times):
                model.predict(obs, *given)
        found = [warning for warning in caught if "without a state" in str(warning.message)]
        assert all(warning.filename == __file__ for warning in found)
        return len(found)

    assert predict(FORGOTTEN_AFTER - 1) == 0
    assert predict(1, state) == 0, "now it is carried"
    assert predict(FORGOTTEN_AFTER - 1) == 0
    assert predict(FORGOTTEN_AFTER, None, np.ones(1, dtype=bool)) == 0, "episodes of one timestep"
    assert predict(3 * FORGOTTEN_AFTER) == 1
    assert predict(3 * FORGOTTEN_AFTER) == 0
    model = make_model("MlpPolicy", "CartPole-v1", n_envs=1)
    assert predict(3 * FORGOTTEN_AFTER) == 0, "it has nothing to remember with"


# LSTMs of actor and critic.

SEPARATE = {"enable_critic_lstm": True, "n_lstm_layers": 2}
LSTMS: dict[str, dict[str, Any]] = {
    "shared": {},
    "shared, said so": {"shared_lstm": True, "enable_critic_lstm": False},
    "separate": SEPARATE,
    "separate by their features": {"share_features_extractor": False},
    "not shared": {"shared_lstm": False},
    "critic without memory": {"enable_critic_lstm": False, "share_features_extractor": False},
    "dropout": SEPARATE | {"lstm_kwargs": {"dropout": 0.5}},
}


@pytest.mark.parametrize("name", LSTMS)
def test_lstms_of_actor_and_critic(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They train and are saved, and learner and player agree on what they remember."""
    differences = []
    loss = ncrl.agents.learning.learner.actor_critic_loss

    def watched(policy: Any, lesson: Any, objective: Any) -> Any:
        policy.set_training_mode(False)  # else dropout makes a difference, as it should
        result = loss(policy, lesson, objective)
        policy.set_training_mode(True)
        differences.append(
            (result.evaluation.log_prob.detach() - lesson.rollout.log_prob).abs().max()
        )
        return result

    monkeypatch.setattr(ncrl.agents.learning.learner, "actor_critic_loss", watched)
    env = DummyVecEnv([lambda i=i: Alternating(Diary(), i) for i in range(2)])
    model = make_model("MlpLstmPolicy", env, LSTMS[name], learning_rate=0.01)
    unsettle(model)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(2 * 7 * 3)
    assert max(differences) < 1e-4
    policy = model.policy
    layers = LSTMS[name].get("n_lstm_layers", 1)
    own_lstm = name not in ("shared", "shared, said so", "critic without memory")
    assert (policy.lstm_critic is not None) == own_lstm
    assert (policy.critic is not None) == (name == "critic without memory")
    assert policy.state_shape == (layers * (2 if own_lstm else 1), WIDTH)
    moved = {key for key, value in policy.state_dict().items() if not value.equal(before[key])}
    assert {key.split(".")[0] for key in before} == {key.split(".")[0] for key in moved}

    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=env, device="cpu")
    policy.save(str(tmp_path / "policy"))
    alone = MlpLstmPolicy.load(str(tmp_path / "policy"), device="cpu")
    assert alone.state_shape == policy.state_shape
    obs, state = np.ones((3, 2), np.float32), None
    for _ in range(3):
        predicted = [p.predict(obs, state, deterministic=True) for p in (policy, loaded, alone)]
        _, state = predicted[0]
        for _, other in predicted[1:]:
            np.testing.assert_array_equal(state, other)
    loaded.learn(14)


def test_a_separate_critic_keeps_its_memory_behind_the_actors() -> None:
    """Row by row, from the modules alone."""
    space = spaces.Box(-1, 1, (2,), np.float32)
    torch.manual_seed(0)
    policy = MlpLstmPolicy(
        space, spaces.Discrete(2), lambda _: 0.0, lstm_hidden_size=WIDTH, **SEPARATE
    )
    obs = torch.randn(6, 3, 2)
    starts = torch.zeros(6, 3, dtype=torch.bool)
    starts[2, 1] = starts[4, 0] = True
    state = (torch.randn(4, 3, WIDTH), torch.randn(4, 3, WIDTH))
    with torch.no_grad():
        latent, last = policy.unroll(obs, state, starts)
        own = {"actor": slice(0, 2), "critic": slice(2, 4)}
        lstms = {"actor": policy.lstm_actor, "critic": policy.lstm_critic}
        for name, layers in own.items():
            h, c = (part[layers] for part in state)
            for t in range(6):
                keep = (~starts[t]).float()[None, :, None]
                features = policy.features_extractor(obs[t])
                output, (h, c) = lstms[name](features[None], (h * keep, c * keep))
                torch.testing.assert_close(getattr(latent, name)[t], output[0])
            torch.testing.assert_close(last[0][layers], h)
            torch.testing.assert_close(last[1][layers], c)


@pytest.mark.parametrize(
    "options",
    [
        {"shared_lstm": True, "enable_critic_lstm": True},
        {"shared_lstm": True, "share_features_extractor": False},
    ],
)
def test_lstms_that_are_shared_and_are_not(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="shared_lstm=True needs enable_critic_lstm=False and"):
        make_model("MlpLstmPolicy", "CartPole-v1", options, n_envs=1)


# Learning what must be remembered.


def test_what_was_shown_three_timesteps_ago_is_learnt() -> None:
    """Without memory a mean of 0.5 is the best there is."""
    options = {"optimizer_class": torch.optim.Adam, "lstm_hidden_size": 16}
    model = make_model(
        "MlpLstmPolicy", remember(delay=3), options, n_envs=16, n_steps=8, learning_rate=0.01,
        gamma=0.9,
    )  # fmt: skip
    model.learn(9_600, log_interval=None)
    mean, _ = evaluate_policy(model, remember(delay=3)(8, 5), n_eval_episodes=80)
    assert mean > 0.9
