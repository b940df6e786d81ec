"""`A3C` as a Stable-Baselines3 algorithm: what an SB3 user relies on holds here too.

The properties are those of SB3's own tests; the recurrent ones are in `test_sb3_recurrent`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from ncrl.agents import A3C
from tests.agents.conftest import weights
from tests.agents.environments import TickingFactory

VECTORS = spaces.Box(-1, 1, (3,), np.float32)
IMAGES = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict(
    {"pixels": IMAGES, "speed": spaces.Box(-1, 1, (2,), np.float32), "gear": spaces.Discrete(3)}
)
PLAIN_DICT = spaces.Dict({"speed": VECTORS, "gear": spaces.MultiDiscrete([3, 2])})
RETURNS = spaces.Discrete(2)


class Sampled(gym.Env):
    """Random observations; the reward is the time, and an episode of 4 timesteps is cut off."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space = RETURNS):
        self.observation_space, self.action_space = observation_space, action_space
        self.actions: list[Any] = []
        self.shown: list[Any] = []
        self.time = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple:
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)), action
        self.actions.append(action)
        self.time += 1
        info = {"is_success": self.time == 4}
        return self._observe(), float(self.time), False, self.time == 4, info

    def _observe(self) -> Any:
        observation = self.observation_space.sample()
        self.shown.append(observation)
        return observation


class Reversed(VecEnvWrapper):
    """Dict observations whose entries come in another order than their space has them."""

    def reset(self) -> dict[str, np.ndarray]:
        return dict(reversed(self.venv.reset().items()))

    def step_wait(self) -> tuple:
        obs, *others = self.venv.step_wait()
        return dict(reversed(obs.items())), *others


def sampled(*given: spaces.Space, n_envs: int = 2) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Sampled(*given)) for _ in range(n_envs)])


def small(policy: str, **options: Any) -> dict[str, Any]:
    if "Lstm" in policy:
        options.setdefault("lstm_hidden_size", 8)
    if "Neurocoder" in policy:
        options.setdefault("head_kwargs", {"num_slots": 6, "num_heads": 2})
    return options


def make_model(policy: str, env: Any, policy_kwargs: dict | None = None, **options: Any) -> A3C:
    options = {"n_steps": 6, "seed": 1, "device": "cpu", "n_workers": 0} | options
    return A3C(policy, env, policy_kwargs=small(policy) | (policy_kwargs or {}), **options)


def space_of(policy: str) -> spaces.Space:
    return DICT if "MultiInput" in policy else IMAGES if "Cnn" in policy else VECTORS


def random_observations(space: spaces.Space, count: int) -> Any:
    """`count` observations as a vector environment returns them."""
    space.seed(3)
    samples = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([sample[name] for sample in samples]) for name in space.spaces}
    return np.stack(samples)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Policies, spaces, networks.


@pytest.mark.parametrize("name", A3C.policy_aliases)
def test_every_policy_name_trains_saves_loads_and_goes_on(name: str, tmp_path: Path) -> None:
    env = sampled(space_of(name))
    model = make_model(name, env)
    before = weights(model)
    model.learn(24)
    assert not equal(before, weights(model))
    assert all(value.isfinite().all() for value in weights(model).values())
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=env, device="cpu")
    assert type(loaded.policy) is A3C.policy_aliases[name]
    assert equal(weights(model), weights(loaded))
    obs = random_observations(env.observation_space, 5)
    for deterministic in (True, False):
        torch.manual_seed(0)
        expected, _ = model.predict(obs, deterministic=deterministic)
        torch.manual_seed(0)
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=deterministic)[0], expected)
    assert loaded.learn(12, reset_num_timesteps=False).num_timesteps == 36


ACTION_SPACES = {
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box": spaces.Box(-0.1, 0.2, (2,), np.float32),
    "Box of two dimensions": spaces.Box(-1, 1, (2, 2), np.float32),
    "Box of float64": spaces.Box(-1, 1, (2,), np.float64),
}
OBSERVATION_SPACES = {
    "Discrete": spaces.Discrete(4),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box of two dimensions": spaces.Box(-1, 1, (2, 3), np.float32),
    "Box of float64": spaces.Box(-1, 1, (2,), np.float64),
}


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_action_spaces(policy: str, action_space: spaces.Space, log_rhos: list) -> None:
    env = sampled(VECTORS, action_space)  # which refuses actions out of bounds
    make_model(policy, env, learning_rate=0.0).learn(24)
    assert len(log_rhos) == 2
    assert all(log_rho.abs().max() < 1e-4 for log_rho in log_rhos)
    played = np.stack(env.envs[0].unwrapped.actions)
    assert played.shape == (12, *action_space.shape)
    assert len(np.unique(played, axis=0)) > 1


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("space", OBSERVATION_SPACES.values(), ids=OBSERVATION_SPACES)
def test_observation_spaces(policy: str, space: spaces.Space, log_rhos: list) -> None:
    model = make_model(policy, sampled(space), learning_rate=0.0).learn(24)
    assert all(log_rho.abs().max() < 1e-4 for log_rho in log_rhos)
    # This rollout's rows 1 and 5 are the 8th and 12th timestep.
    rows = model._batch.rollout.truncation_value.any(dim=1).nonzero().flatten().tolist()
    assert rows == [1, 5]
    one = space.sample()
    assert np.shape(model.predict(one)[0]) == ()


@pytest.mark.parametrize("policy", ["MultiInputPolicy", "MultiInputLstmPolicy"])
def test_rollouts_hold_every_entry_of_dict_observations(policy: str, log_rhos: list) -> None:
    env = sampled(DICT)
    model = make_model(policy, Reversed(env), learning_rate=0.0).learn(24)
    assert all(log_rho.abs().max() < 1e-4 for log_rho in log_rhos)
    for i in range(2):
        # 12 timesteps of episodes of 4: the row after the last of one shows the first of the next.
        shown = env.envs[i].unwrapped.shown
        shown = [seen for t, seen in enumerate(shown) if t % 5 != 4]
        for name, tensor in model._batch.rollout.obs.items():
            expected = np.stack([seen[name] for seen in shown[6:13]])
            np.testing.assert_array_equal(tensor[:, i], expected)


class Averaging(BaseFeaturesExtractor):
    """Batch normalisation and dropout: both behave differently while training."""

    def __init__(self, observation_space: spaces.Box, rate: float = 0.5) -> None:
        super().__init__(observation_space, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.dropout = torch.nn.Dropout(rate)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(obs))


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_training_mode_while_learning_and_evaluation_mode_while_playing(policy: str) -> None:
    model = make_model(policy, sampled(VECTORS), {"features_extractor_class": Averaging})
    modes = set()
    norm = model.policy.features_extractor.norm
    before = norm.running_mean.clone()

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            modes.add(self.model.policy.training)
            assert self.num_timesteps > 12 or torch.equal(norm.running_mean, before)
            return True

    model.learn(24, callback=Watch())
    assert modes == {False}
    assert not torch.equal(norm.running_mean, before), "an update follows its batches"
    learnt = norm.running_mean.clone()
    obs = random_observations(VECTORS, 6)
    model.policy.set_training_mode(True)
    actions = [model.predict(obs, deterministic=True)[0] for _ in range(3)]
    np.testing.assert_array_equal(actions[0], actions[1])
    assert torch.equal(norm.running_mean, learnt)


@pytest.mark.parametrize("policy", ["MlpPolicy", "NeurocoderMlpPolicy", "MlpLstmPolicy"])
def test_networks_and_optimisers_of_choice(policy: str, tmp_path: Path) -> None:
    options = small(
        policy,
        net_arch={"pi": [5], "vf": [6, 4]},
        activation_fn=torch.nn.ReLU,
        share_features_extractor=False,
        features_extractor_class=Averaging,
        features_extractor_kwargs={"rate": 0.25},
        optimizer_class=torch.optim.Adam,
        optimizer_kwargs={"eps": 1e-4},
    )
    given = dict(options)
    model = make_model(policy, sampled(VECTORS), options).learn(12)
    assert model.policy_kwargs == given, "the user's own, for load to compare with"
    extractor = model.policy.mlp_extractor
    assert (extractor.latent_dim_pi, extractor.latent_dim_vf) == (5, 4)
    assert isinstance(extractor.policy_net[1], torch.nn.ReLU)
    assert isinstance(model.policy.optimizer, torch.optim.Adam)
    assert model.policy.optimizer.defaults["eps"] == 1e-4
    assert model.policy.vf_features_extractor is not model.policy.pi_features_extractor
    assert model.policy.vf_features_extractor.dropout.p == 0.25
    model.dump_logs()  # describes heads that read what net_arch makes of the features
    model.save(tmp_path / "model")
    custom = {"policy_kwargs": given}
    loaded = A3C.load(tmp_path / "model", custom_objects=custom, policy_kwargs=given, device="cpu")
    assert equal(weights(model), weights(loaded))


@pytest.mark.parametrize("policy", ["CnnPolicy", "CnnLstmPolicy"])
def test_images_that_are_normalised_already(policy: str) -> None:
    space = spaces.Box(0, 1, (1, 36, 36), np.float32)
    options = {"normalize_images": False, "features_extractor_kwargs": {"features_dim": 8}}
    model = make_model(policy, sampled(space), options).learn(12)
    assert model.policy.features_extractor.features_dim == 8
    assert model.num_timesteps == 12


def test_images_with_their_channels_last_are_turned() -> None:
    env = sampled(spaces.Box(0, 255, (36, 40, 3), np.uint8))
    model = make_model("CnnPolicy", env).learn(12)
    assert model.observation_space.shape == (3, 36, 40)
    image = env.observation_space.sample()
    turned = np.transpose(image, (2, 0, 1))
    actions = [model.predict(x, deterministic=True)[0] for x in (image, turned, image[None])]
    assert actions[0] == actions[1] == actions[2][0]


@pytest.mark.parametrize(("squash", "every"), [(False, 4), (True, 4), (False, None)])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
def test_noise_that_depends_on_the_state(
    policy: str, squash: bool, every: int | None, log_rhos: list
) -> None:
    """New in every rollout, and after so many timesteps where that is asked for."""
    env = sampled(VECTORS, spaces.Box(-2, 2, (2,), np.float32))
    model = make_model(
        policy, env, {"squash_output": squash, "log_std_init": -1.0}, use_sde=True,
        learning_rate=0.0, **({"sde_sample_freq": every} if every else {}),
    )  # fmt: skip
    drawn = []
    reset_noise = model.policy.reset_noise
    model.policy.reset_noise = lambda n_envs=1: (drawn.append(n_envs), reset_noise(n_envs))
    model.learn(24)
    assert drawn == ([2, 2] if every else [2]) * 2, "in rollouts of 6"
    assert all(log_rho.abs().max() < 1e-3 for log_rho in log_rhos)
    stored, played = model._batch.rollout.actions, np.stack(env.envs[0].unwrapped.actions[6:])
    rollout = model._batch.rollout
    evaluation = model.policy.evaluate_rollout(
        rollout.obs, rollout.actions, (rollout.lstm_h, rollout.lstm_c), rollout.episode_start
    )
    if squash:
        assert torch.equal(evaluation.entropy, -evaluation.log_prob), "as SB3 estimates it"
        assert stored.abs().max() <= 1
        np.testing.assert_allclose(played, 2 * stored[:, 0], rtol=1e-5)
    else:
        np.testing.assert_array_equal(played, stored[:, 0].clamp(-2, 2))


def test_noise_of_a_policy_that_workers_play_is_that_of_its_present_weights() -> None:
    """They draw their own: nobody has drawn for `predict` since it was made."""
    env = sampled(VECTORS, spaces.Box(-2, 2, (2,), np.float32))
    model = make_model("MlpPolicy", env, use_sde=True)
    with torch.no_grad():
        model.policy.log_std.fill_(-20.0)
    model.n_workers = 1
    nobody: Any = SimpleNamespace(collect=lambda n_steps, on_row: None)
    assert model._collect(nobody, 6, CallbackList([])) is None
    assert model.policy.action_dist.exploration_mat.abs().max() < 1e-6


# Wrappers and environments.


def test_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=1))
    watched = VecNormalize(make_vec_env("CartPole-v1", 1, seed=2), training=False)
    evaluation = EvalCallback(watched, eval_freq=10, n_eval_episodes=1, verbose=0)
    model = make_model("MlpLstmPolicy", env).learn(100, callback=evaluation)
    assert model.get_vec_normalize_env() is env
    # 50 timesteps of 2 environments, the first observations, and the wrapper's own 1e-4.
    assert env.obs_rms.count == pytest.approx(102, abs=0.01)
    np.testing.assert_array_equal(watched.obs_rms.mean, env.obs_rms.mean)
    assert all(info["r"] == info["l"] for info in model.ep_info_buffer), "raw scores"
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics"))
    again = VecNormalize.load(str(tmp_path / "statistics"), make_vec_env("CartPole-v1", 2))
    loaded = A3C.load(tmp_path / "model", env=again, device="cpu")
    assert loaded.get_vec_normalize_env() is again
    assert loaded.learn(12).num_timesteps == 12


def test_vec_normalize_sees_to_observations_behind_time_limits() -> None:
    env = VecNormalize(sampled(spaces.Box(90, 110, (3,), np.float32)), norm_reward=False)
    model = make_model("MlpPolicy", env, learning_rate=0.0)
    expected = torch.zeros(6, 2)

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            for i, info in enumerate(self.locals["infos"]):
                if self.locals["dones"][i]:
                    last = torch.as_tensor(info["terminal_observation"])
                    assert last.abs().max() <= 10, "normalised"
                    with torch.no_grad():
                        value = self.model.policy.predict_values(last[None])
                    expected[self.locals["n_steps"], i] = value
            return True

    model.learn(12, callback=Watch())
    assert (expected != 0).sum() == 2
    torch.testing.assert_close(model._batch.rollout.truncation_value, expected)


@pytest.mark.parametrize("space", [IMAGES, DICT], ids=["images", "dicts"])
def test_frame_stacks_and_monitors(space: spaces.Space) -> None:
    if isinstance(space, spaces.Dict):
        space = spaces.Dict({name: space[name] for name in ("pixels", "speed")})
    env = VecFrameStack(VecMonitor(DummyVecEnv([lambda: Sampled(space)] * 2)), n_stack=3)
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy"
    model = make_model(policy, env).learn(36)
    assert [info["r"] for info in model.ep_info_buffer] == [10.0] * 8
    assert (model._batch.rollout.truncation_value != 0).any()
    scores, lengths = evaluate_policy(model, env, 2, return_episode_rewards=True, warn=False)
    assert scores == [10.0] * 2 and lengths == [4] * 2


# Learning at all.


def test_repeating_what_is_shown_is_learnt_by_neurocoder_heads() -> None:
    """Plain heads learn it with the defaults, in `test_environments`."""
    model = make_model(
        "NeurocoderMlpPolicy", DummyVecEnv([lambda: IdentityEnv(3)] * 8),
        {"optimizer_class": torch.optim.Adam}, n_steps=5, gamma=0.4, learning_rate=0.01,
        ent_coef=0.0, max_grad_norm=20.0,
    )  # fmt: skip
    model.learn(3_200, log_interval=None)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=5, warn=False)
    assert mean >= 90, "of 100"


# Predicting.


@pytest.mark.parametrize("name", ["MlpPolicy", "CnnPolicy", "MultiInputLstmPolicy"])
def test_many_observations_at_once_are_as_one_after_the_other(name: str) -> None:
    space = space_of(name)
    model = make_model(name, sampled(space, spaces.Box(-9, 9, (2,), np.float32)))
    obs = random_observations(space, 4)
    together, state = model.predict(obs, deterministic=True)
    assert together.shape == (4, 2)
    for i in range(4):
        one = {k: v[i] for k, v in obs.items()} if isinstance(obs, dict) else obs[i]
        action, alone = model.predict(one, deterministic=True)
        np.testing.assert_allclose(action, together[i], rtol=1e-4, atol=1e-5)
        if state is not None:
            np.testing.assert_allclose(alone[0][:, 0], state[0][:, i], rtol=1e-4, atol=1e-5)


# Callbacks and logs.


class Count(BaseCallback):
    """Checks on every call what callbacks are told."""

    def _on_step(self) -> bool:
        assert self.n_calls * self.training_env.num_envs == self.num_timesteps
        assert self.model.num_timesteps == self.num_timesteps
        seen = self.locals
        n_envs = self.training_env.num_envs
        assert len(seen["rewards"]) == len(seen["dones"]) == len(seen["infos"]) == n_envs
        assert len(seen["actions"]) == n_envs
        for i in range(n_envs):
            assert self.training_env.action_space.contains(seen["actions"][i])
            assert ("episode" in seen["infos"][i]) == seen["dones"][i]
        return True


def test_callbacks(tmp_path: Path) -> None:
    env = sampled(VECTORS)
    every = CheckpointCallback(save_freq=1, save_path=str(tmp_path), name_prefix="every")
    better = StopTrainingOnRewardThreshold(reward_threshold=11.0)
    same = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    evaluation = EvalCallback(
        sampled(VECTORS, n_envs=1), callback_on_new_best=better, callback_after_eval=same,
        eval_freq=6, n_eval_episodes=2, log_path=str(tmp_path), verbose=0,
        best_model_save_path=str(tmp_path),
    )  # fmt: skip
    count = Count()
    callbacks = [
        count,
        CheckpointCallback(save_freq=5, save_path=str(tmp_path)),
        evaluation,
        EveryNTimesteps(n_steps=8, callback=every),
        LogEveryNTimesteps(n_steps=6),
    ]
    model = make_model("MlpPolicy", env)
    model.learn(1_000, callback=CallbackList(callbacks), progress_bar=True)
    # Each evaluation scores 10: after the second, one without improvement, the third stops.
    assert model.num_timesteps == 36
    assert env.observation_space.contains(count.locals["new_obs"][0])
    assert {path.name for path in tmp_path.glob("*.zip")} == {
        "best_model.zip",
        *(f"rl_model_{steps}_steps.zip" for steps in (10, 20, 30)),
        *(f"every_{steps}_steps.zip" for steps in (8, 16, 24, 32)),
    }
    written = np.load(tmp_path / "evaluations.npz")
    assert written["timesteps"].tolist() == [12, 24, 36]
    assert (written["ep_lengths"] == 4).all() and (written["results"] == 10).all()
    assert A3C.load(tmp_path / "best_model", device="cpu").num_timesteps == 12

    calls = []
    model.learn(20, callback=lambda seen, _: calls.append(seen["n_steps"]) or len(calls) < 8)
    assert calls == [0, 1, 2, 3, 4, 5, 0, 1] and model.num_timesteps == 16
    model.learn(1_000, callback=StopTrainingOnMaxEpisodes(max_episodes=3, verbose=0))
    assert model.num_timesteps == 2 * 4 * 3, "3 episodes of each environment"


def test_logs(tmp_path: Path) -> None:
    model = make_model("MlpPolicy", sampled(VECTORS), stats_window_size=3)
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log", "tensorboard"]))
    for _ in range(2):  # both end at timestep 12
        model.learn(12, log_interval=1)
    model.logger.close()
    lines = (tmp_path / "progress.csv").read_text().splitlines()
    assert len(lines) == 3, "a header and two lines"
    values = dict(zip(lines[0].split(","), lines[2].split(","), strict=True))
    for name, expected in {
        "rollout/ep_rew_mean": 10,
        "rollout/ep_len_mean": 4,
        "rollout/success_rate": 1,
        "time/total_timesteps": 12,
        "time/iterations": 1,
        "train/n_updates": 2,
    }.items():
        assert float(values[name]) == expected, name
    losses = {"entropy_loss", "policy_loss", "value_loss", "explained_variance", "learning_rate"}
    assert {f"train/{name}" for name in losses} | {"time/fps", "time/time_elapsed"} <= set(values)
    assert (tmp_path / "progress.json").read_text().count("\n") == 2
    assert "ep_rew_mean" in (tmp_path / "log.txt").read_text()
    assert list(tmp_path.glob("events*"))


def test_tensorboard_folders(tmp_path: Path) -> None:
    model = make_model("MlpPolicy", sampled(VECTORS), tensorboard_log=str(tmp_path))
    model.learn(12)
    model.learn(12, reset_num_timesteps=False)
    model.learn(12)
    model.learn(12, tb_log_name="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A3C_1", "A3C_2", "mine_1"]


# Saving, loading, parameters.


def test_loaded_with_other_settings(tmp_path: Path) -> None:
    env = sampled(VECTORS)
    model = make_model("MlpPolicy", env, gamma=0.9, learning_rate=0.5).learn(24)
    model.save(tmp_path / "model", exclude=["_last_obs"])
    loaded = A3C.load(
        tmp_path / "model", env=sampled(VECTORS, n_envs=3), device="cpu",
        custom_objects={"learning_rate": 0.25, "lr_schedule": lambda _: 0.25}, n_steps=4,
    )  # fmt: skip
    assert (loaded.gamma, loaded.n_steps, loaded.n_envs) == (0.9, 4, 3)
    loaded.learn(12)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.25 and loaded._n_updates == 3
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        A3C.load(tmp_path / "model", policy_kwargs={"net_arch": [3]}, device="cpu")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        A3C.load(tmp_path / "model", env=sampled(IMAGES), device="cpu")
    alone = A3C.load(tmp_path / "model", device="cpu")
    assert equal(weights(alone), weights(model))
    alone.predict(random_observations(VECTORS, 2))
    for wrong in (sampled(VECTORS, n_envs=3), sampled(VECTORS, n_envs=1)):
        with pytest.raises(AssertionError, match=r"number of environments.*load\(path, env\)"):
            alone.set_env(wrong)
    alone.set_env(env)
    assert alone.learn(12).num_timesteps == 12


def test_parameters_by_name() -> None:
    model, other = (make_model("MlpPolicy", sampled(VECTORS), seed=s).learn(12) for s in (1, 2))
    parameters = model.get_parameters()
    assert parameters.keys() == {"policy", "policy.optimizer"}
    other.set_parameters(parameters)
    assert equal(weights(other), weights(model))
    one = "action_net.bias"
    changed = {"policy": {one: parameters["policy"][one] + 1}}
    other.set_parameters(changed, exact_match=False)
    for name, value in weights(other).items():
        assert torch.equal(value, parameters["policy"][name] + (name == one))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.set_parameters({**parameters, **changed})
    with pytest.raises(ValueError, match="Names of parameters"):
        other.set_parameters({"policy": parameters["policy"]})
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({**parameters, "critic": {}})


def test_the_policy_alone_is_saved(tmp_path: Path) -> None:
    model = make_model("MultiInputPolicy", sampled(PLAIN_DICT)).learn(12)
    model.policy.save(str(tmp_path / "policy"))
    loaded = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    obs = random_observations(PLAIN_DICT, 4)
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
    )


def test_another_policy_object_is_the_one_that_plays() -> None:
    """As with `model.policy = torch.compile(model.policy)`."""
    model = make_model("MlpPolicy", sampled(VECTORS)).learn(12)
    other = make_model("MlpPolicy", sampled(VECTORS)).policy
    with torch.no_grad():
        other.action_net.bias.copy_(torch.tensor([-1e3, 1e3]))
    model.policy = other
    env = model.get_env().envs[0].unwrapped
    model.learn(12, reset_num_timesteps=False)
    assert set(map(int, env.actions[6:])) == {1} and len(env.actions) == 12


# Mistakes of users.


def test_workers_cannot_share_running_statistics() -> None:
    def factory(n_envs: int, seed: int) -> VecEnv:
        return VecNormalize(sampled(VECTORS, n_envs=n_envs))

    with pytest.raises(ValueError, match=r"VecNormalize.*give the environment itself"):
        make_model("MlpPolicy", factory, n_workers=1, n_envs=2)
    assert make_model("MlpPolicy", factory, n_envs=2).learn(12).num_timesteps == 12


# Workers: the same numbers, row by row, in this process.


class DictTicking(gym.ObservationWrapper):
    """`Ticking` with its two numbers under names, and a picture that is as grey as the time."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Dict(
            {
                "tick": spaces.Box(-np.inf, np.inf, (1,), np.float32),
                "action": spaces.Discrete(3),
                "pixels": IMAGES,
            }
        )

    def observation(self, observation: np.ndarray) -> dict[str, Any]:
        tick, action = observation
        grey = np.full(IMAGES.shape, abs(tick), np.uint8)
        return {"tick": np.array([tick], np.float32), "action": int(action), "pixels": grey}


class Honest(Count):
    """What `Ticking` shows, pays and reports must fit together in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.episodes: list[tuple[float, int]] = []

    def _on_step(self) -> bool:
        obs = self.locals["new_obs"]
        for i, (reward, done) in enumerate(
            zip(self.locals["rewards"], self.locals["dones"], strict=True)
        ):
            # The first observation of an episode is negative, and shows the action before too.
            assert obs["tick"][i, 0] == (-reward if done else reward)
            assert (obs["pixels"][i] == abs(reward)).all()
            assert obs["action"][i] == self.locals["actions"][i]
            if done:
                episode = self.locals["infos"][i]["episode"]
                self.episodes.append((episode["r"], episode["l"]))
        return super()._on_step()


def test_dict_observations_of_workers(log_rhos: list) -> None:
    def env(n_envs: int, seed: int) -> VecEnv:
        games = TickingFactory(length=4, truncate=True)
        return VecMonitor(DummyVecEnv([lambda: DictTicking(games.make(seed))] * n_envs))

    policy = "NeurocoderMultiInputLstmPolicy"
    model = make_model(policy, env, n_workers=2, n_envs=4, learning_rate=0.0)
    honest = Honest()
    model.learn(4 * (6 * 4 + 4), callback=honest)
    assert model.num_timesteps == 4 * 28 and len(log_rhos) == 5
    assert all(log_rho.abs().max() < 1e-3 for log_rho in log_rhos)
    assert honest.episodes and all(length == 4 for _, length in honest.episodes)
    # Episodes of 4: the last rollout, of 4 rows, cuts off one of each environment.
    assert ((model._batch.rollout.truncation_value != 0).sum(dim=0) == 1).all()


@pytest.mark.filterwarnings("error:Training and eval env")
@pytest.mark.parametrize("n_workers", [0, 1])
def test_callbacks_beside_workers_see_whole_games(n_workers: int, tmp_path: Path) -> None:
    """And no warning: what stands in for the training environment is of another type."""
    env = TickingFactory(length=5)
    model = make_model("MlpPolicy", env, n_workers=n_workers, n_envs=2)
    bar = ProgressBarCallback()
    evaluation = EvalCallback(
        env(1, 0), eval_freq=20, n_eval_episodes=3, verbose=0, log_path=str(tmp_path)
    )
    count = Count()
    model.learn(120, callback=[count, evaluation, bar])
    assert count.n_calls == 60 and evaluation.n_calls == 60
    assert bar.pbar.n == bar.pbar.total == 120
    assert evaluation.evaluations_timesteps == [40, 80, 120]
    assert (np.array(evaluation.evaluations_length) == 5).all()
    # An environment of `Ticking` pays 1, 2, 3, ...: not one timestep of its games is missing.
    paid = np.arange(1, 3 * 3 * 5 + 1).reshape(3, 3, 5).sum(-1)
    np.testing.assert_array_equal(evaluation.evaluations_results, paid)
    stop = StopTrainingOnMaxEpisodes(max_episodes=3, verbose=0)
    model.learn(10_000, callback=stop)
    assert stop.n_episodes == 6 and model.num_timesteps == 30


def test_the_seed_of_workers_can_be_set_later() -> None:
    model = make_model("MlpPolicy", TickingFactory(), n_workers=1, n_envs=1, seed=3)
    assert model.games_seed == 3
    model.set_random_seed(9)
    model.set_random_seed(None)
    assert model.games_seed == 9
