"""`A3C`: exact where it is serial, honest where workers play, and clear about wrong arguments."""

import gc
import math
import multiprocessing
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib.common.recurrent.policies as contrib
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
)

import ncrl.agents.a3c
from ncrl.agents import A3C, WorkerError
from ncrl.agents.curves import record_heads, record_lag, record_means
from ncrl.agents.playing.env_sources import RemoteEnvs
from ncrl.agents.playing.supervision import PoolSpec
from ncrl.agents.playing.weights import layout
from ncrl.envs import light, masked_cartpole
from ncrl.sb3 import Latent
from tests.agents.conftest import assert_bit_equal, weights
from tests.agents.environments import TickingFactory

SMALL = {"lstm_hidden_size": 8}


def make_model(
    env: Any = None,
    policy: Any = "MlpLstmPolicy",
    policy_kwargs: dict | None = None,
    **options: Any,
) -> A3C:
    options = {"n_workers": 0, "n_envs": 2, "n_steps": 5, "seed": 1, "device": "cpu"} | options
    return A3C(policy, env or masked_cartpole(), policy_kwargs=policy_kwargs or SMALL, **options)


class Record(BaseCallback):
    """Everything that a callback is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []
        self.shown: list[np.ndarray] = []
        self.dones: list[np.ndarray] = []
        self.infos: list[list[dict]] = []
        self.timesteps: list[int] = []
        self.lags: list[tuple[float, float]] = []
        self.calls: list[str] = []

    def _on_training_start(self) -> None:
        self.calls.append("training_start")

    def _on_rollout_start(self) -> None:
        self.calls.append("rollout_start")

    def _on_step(self) -> bool:
        self.rewards.append(np.array(self.locals["rewards"]))
        self.shown.append(np.array(self.locals["new_obs"]))
        self.dones.append(np.array(self.locals["dones"]))
        self.infos.append(list(self.locals["infos"]))
        self.timesteps.append(self.num_timesteps)
        return True

    def _on_rollout_end(self) -> None:
        self.calls.append("rollout_end")
        values = self.logger.name_to_value
        self.lags.append((values["train/policy_lag"], values["train/policy_lag_max"]))

    def _on_training_end(self) -> None:
        self.calls.append("training_end")


class RecordOfWorkers(Record):
    """Also whether what the workers play into is still there."""

    def _on_training_start(self) -> None:
        assert self.locals["iteration"] == 0  # as SB3's
        self.pool = weakref.ref(self.model._pool)
        super()._on_training_start()


class Stop(BaseCallback):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def _on_step(self) -> bool:
        return self.n_calls < self.after


# Serial: deterministic and exact.


@pytest.mark.parametrize(
    ("policy", "env"),
    [("NeurocoderMlpLstmPolicy", masked_cartpole()), ("CnnLstmPolicy", light(max_steps=7))],
)
def test_one_seed_gives_bit_equal_weights(policy: str, env: Callable) -> None:
    one, same, other = (make_model(env, policy, seed=seed).learn(60) for seed in (1, 1, 2))
    fresh = make_model(env, policy, seed=1)
    assert_bit_equal(one, same)
    for different in (other, fresh):
        assert any(not torch.equal(v, weights(different)[n]) for n, v in weights(one).items())


def test_the_seed_fixes_games_of_an_environment_object_too() -> None:
    one, same = (make_model(make_vec_env("CartPole-v1", 2)).learn(60) for _ in range(2))
    assert_bit_equal(one, same)


@pytest.mark.parametrize(
    ("total", "n_envs", "n_steps"), [(1, 1, 5), (10, 2, 5), (11, 3, 4), (47, 2, 20), (24, 4, 1)]
)
def test_learn_ends_at_the_total_rounded_up_to_a_row(total: int, n_envs: int, n_steps: int) -> None:
    model, record = make_model(n_envs=n_envs, n_steps=n_steps), Record()
    model.learn(total, callback=record)
    rows = math.ceil(total / n_envs)
    assert model.num_timesteps == rows * n_envs
    assert record.timesteps == [n_envs * (row + 1) for row in range(rows)]
    updates = math.ceil(rows / n_steps)
    assert model._n_updates == updates
    rollouts = ["rollout_start", "rollout_end"] * updates
    assert record.calls == ["training_start", *rollouts, "training_end"]


def test_a_stopping_callback_stops_at_once() -> None:
    model = make_model()
    model.learn(1000, callback=Stop(after=13))
    assert model.num_timesteps == 26
    assert model._n_updates == 2, "the unfinished rollout is not learnt from"


def test_request_stop_finishes_the_update() -> None:
    class Ask(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 7:
                self.model.request_stop()
            return True

    model = make_model()
    model.learn(1000, callback=Ask())
    assert model.num_timesteps == 20 and model._n_updates == 2
    model.learn(30)
    assert model.num_timesteps == 30, "an earlier request does not stop a later training"


def test_the_learning_rate_falls_to_0() -> None:
    model = make_model(learning_rate=lambda left: 0.5 * left)
    rates = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

    model.learn(47, callback=Watch())
    rates.append(model.policy.optimizer.param_groups[0]["lr"])
    assert rates[1:] == pytest.approx([0.5 * (1 - n / 47) for n in (10, 20, 30, 40)] + [0.0])
    default = make_model(n_envs=4)
    assert default.lr_schedule(1.0) == 7e-4 and default.lr_schedule(0.0) == 0.0


def test_learning_goes_on_where_it_stopped() -> None:
    whole = make_model(learning_rate=0.01).learn(100)
    parts = make_model(learning_rate=0.01).learn(40)
    parts.learn(60, reset_num_timesteps=False)
    assert parts.num_timesteps == 100
    assert_bit_equal(whole, parts)
    again = make_model(learning_rate=0.01).learn(40)
    again.learn(60)
    assert again.num_timesteps == 60


def test_a_training_that_begins_anew_begins_episodes_where_frames_are_stacked() -> None:
    """SB3's stack shows the array that it showed last again after a reset."""

    class Starts(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            starts.append(self.locals["rollout_buffer"].episode_starts[0].tolist())

    starts: list[list[float]] = []
    model = make_model(VecFrameStack(TickingFactory(length=100)(2, 0), 2))
    model.learn(10, callback=Starts())
    model.learn(10, callback=Starts(), reset_num_timesteps=False)
    model.learn(10, callback=Starts())
    assert starts == [[1, 1], [0, 0], [1, 1]]


def test_scores_of_a_training_that_begins_anew_are_those_of_its_own_games() -> None:
    model = make_model(env=masked_cartpole(max_steps=2), n_steps=10).learn(20)
    assert (model.best_score, model.first_scored_at) == (2, 4)
    model.learn(20, reset_num_timesteps=False)
    assert (model.best_score, model.first_scored_at) == (2, 4)
    model.learn(2)
    assert (model.best_score, model.first_scored_at) == (-math.inf, -1)


def test_logs_are_written_once_per_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().learn(20, log_interval=1)
    dumps: list[int] = []
    monkeypatch.setattr(model.logger, "dump", lambda step: dumps.append(step))
    model.dump_logs()
    assert dumps == []
    model.num_timesteps += 10
    model.dump_logs()
    model.dump_logs()
    assert dumps == [30]


def test_curves_count_frames_where_a_timestep_has_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(env=masked_cartpole(max_steps=2), n_steps=10)
    model.frames_per_timestep = 4
    model.learn(20, log_interval=None)
    monkeypatch.setattr(model.logger, "dump", lambda step: None)
    model.dump_logs()
    found = model.logger.name_to_value
    assert (found["time/frames"], found["rollout/first_reward_frames"]) == (80, 16)


def test_games_without_a_reward_have_no_first_score() -> None:
    def factory(n_envs: int, seed: int) -> VecEnv:
        cartpole = gym.make("CartPole-v1")
        return make_vec_env(
            lambda: gym.wrappers.TransformReward(cartpole, lambda _: 0.0), n_envs, seed=seed
        )

    model = make_model(env=factory, n_envs=1).learn(100)
    assert model.ep_info_buffer
    assert (model.best_score, model.first_scored_at) == (0, -1)


@pytest.mark.parametrize("where", ["callback", "environment"])
def test_an_interrupted_training_goes_on_where_its_games_stand(where: str) -> None:
    class Interrupt(BaseCallback):
        def _interrupt(self, *_: Any) -> None:
            raise KeyboardInterrupt

        def _on_step(self) -> bool:
            if self.n_calls == 7:
                if where == "callback":
                    self._interrupt()
                monkeypatch.setattr(self.training_env, "step_wait", self._interrupt)
            return True

    stopped = make_model(masked_cartpole()(2, 0)).learn(1000, callback=Stop(after=7))
    interrupted = make_model(masked_cartpole()(2, 0))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        interrupted.learn(1000, callback=Interrupt())
    for model in (stopped, interrupted):
        torch.manual_seed(0)
        model.learn(20, reset_num_timesteps=False)
    assert interrupted.num_timesteps == 34
    assert_bit_equal(stopped, interrupted)


def test_rewards_are_clipped_in_the_loss_and_nowhere_else() -> None:
    def clipping(n_envs: int, seed: int) -> VecEnv:
        game = TickingFactory(length=4).make
        clip = partial(np.clip, a_min=-2, a_max=2)
        return make_vec_env(lambda: gym.wrappers.TransformReward(game(seed), clip), n_envs)

    record = Record()
    clipped = make_model(TickingFactory(length=4), reward_clip=2)
    clipped.learn(60, callback=record)
    assert_bit_equal(clipped, make_model(clipping, reward_clip=None).learn(60))
    unclipped = make_model(TickingFactory(length=4), reward_clip=None).learn(60)
    with pytest.raises(AssertionError):
        assert_bit_equal(clipped, unclipped)
    np.testing.assert_array_equal(np.stack(record.rewards)[:, 0], np.arange(1, 31))
    assert [info["r"] for info in list(clipped.ep_info_buffer)[:4:2]] == [10, 26]


def test_the_environment_says_how_rewards_are_clipped() -> None:
    factory = masked_cartpole()
    assert make_model(factory).reward_clip is None
    object.__setattr__(factory, "reward_clip", 3.0)
    assert make_model(factory).reward_clip == 3.0
    assert make_model(factory, reward_clip=None).reward_clip is None
    assert make_model(factory, reward_clip=0.5).reward_clip == 0.5


# Saving, loading, predicting.


def test_load_with_a_factory_or_an_id(tmp_path: Path) -> None:
    make_model("CartPole-v1").learn(20).save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    assert loaded.learn(20).num_timesteps == 20
    loaded = A3C.load(tmp_path / "model", env="CartPole-v1", n_workers=None, device="cpu")
    assert loaded.n_workers >= 1


def test_gymnasium_ids() -> None:
    model = make_model("CartPole-v1")
    assert model.observation_space.shape == (4,) and model.env_factory is not None
    pytest.importorskip("ale_py")
    pong = make_model("ALE/Pong-v5", "CnnLstmPolicy", n_envs=1)
    assert pong.observation_space.shape[1:] == (84, 84), "is ncrl installed (pip install -e .)?"
    assert pong.observation_space.dtype == np.uint8
    assert pong.reward_clip == 1 and pong.frames_per_timestep == 4
    pong.learn(5)
    assert pong.num_timesteps == 5


def test_an_environment_of_a_factory_is_stepped_by_lists_of_actions_too() -> None:
    env = make_model("CartPole-v1").get_env()
    assert env is not None
    env.reset()
    for _ in range(40):
        observations = env.step([0, 1])[0]  # type: ignore[arg-type]
    assert observations.shape == (2, 4)
    ((_, history),) = env.history()  # type: ignore[attr-defined]
    assert history.tolist() == [[0, 1]] * 40 and history.nbytes == 80


def test_loaded_for_another_number_of_environments(tmp_path: Path) -> None:
    model = make_model(n_envs=4, batch_size=10).learn(20)
    model.save(tmp_path / "model")
    one = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        A3C.load(tmp_path / "model", env=one, device="cpu")
    env = masked_cartpole()(1, 0)
    with pytest.warns(UserWarning, match="batch_size=10 .*n_envs=1; .*the default"):
        loaded = A3C.load(tmp_path / "model", env=env, device="cpu")
    assert loaded.batch_size is None and loaded.learn(10).num_timesteps == 10
    loaded = A3C.load(tmp_path / "model", env=env, batch_size=5, device="cpu")
    assert loaded.batch_size == 5
    assert A3C.load(tmp_path / "model", device="cpu").batch_size == 10
    with pytest.raises(ValueError, match=r"n_workers=2 needs an env that workers can build"):
        A3C.load(tmp_path / "model", env=env, n_workers=2)


def test_another_environment_goes_on_without_a_reset() -> None:
    first, second = (TickingFactory()(2, 0) for _ in range(2))
    model = make_model(first).learn(20)
    model.set_env(second, force_reset=False)
    second.reset()
    model.learn(20, reset_num_timesteps=False)
    assert first.get_attr("_tick") == second.get_attr("_tick") == [10, 10]


def test_an_environment_that_is_built_anew_is_reset() -> None:
    model = make_model().learn(20)
    model.set_env(masked_cartpole(), force_reset=False)
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 40


@pytest.mark.parametrize("is_object", [True, False])
def test_an_environment_that_is_refused_leaves_the_model_as_it_was(is_object: bool) -> None:
    model = make_model(n_workers=2)
    env, factory = model.env, model.env_factory
    with pytest.raises((AssertionError, ValueError), match=r"to be the same|spaces do not match"):
        model.set_env(masked_cartpole()(3, 0) if is_object else light())
    assert (model.env, model.env_factory, model.n_workers) == (env, factory, 2)


# Wrong arguments.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_steps": 0}, r"n_steps must be an integer of at least 1, got 0"),
        ({"gamma": 1.5}, r"gamma must lie in 0 .. 1, got 1.5"),
        ({"gamma": math.nan}, r"gamma .*got nan"),
        ({"gae_lambda": -0.1}, r"gae_lambda .*got -0.1"),
        ({"ent_coef": -1.0}, r"ent_coef .*got -1"),
        ({"vf_coef": math.inf}, r"vf_coef .*got inf"),
        ({"max_grad_norm": -1}, r"max_grad_norm .*got -1"),
        ({"orth_coef": -1}, r"orth_coef .*got -1"),
        ({"rms_prop_eps": -1.0}, r"eps=-1"),
        ({"learning_rate": math.nan}, r"learning_rate .*got nan"),
        ({"learning_rate": -1e-3}, r"learning_rate .*got -0.001"),
        ({"learning_rate": "7e-4"}, r"learning_rate must be a number .*, got '7e-4'"),
        ({"n_envs": 5, "n_workers": 2}, r"n_envs=5 .*n_workers=2"),
        ({"n_envs": 0}, r"n_envs must be an integer of at least 1, got 0"),
        ({"n_workers": -1}, r"n_workers must be an integer of at least 0, got -1"),
        ({"n_workers": 2.0}, r"n_workers must be an integer of at least 0, got 2.0"),
        ({"n_envs": 2.0, "n_workers": None}, r"n_envs must be an integer of at least 1, got 2.0"),
        ({"correction": "vtrac"}, r"got 'vtrac'; nearest: vtrace"),
        ({"policy": "MlpLstmPolcy"}, r"'MlpLstmPolcy'; nearest: MlpLstmPolicy"),
        ({"policy": "DQN"}, r"'DQN'; choose one of MlpPolicy, CnnPolicy"),
        ({"reward_clip": "sign"}, r"reward_clip.*sign"),
        ({"reward_clip": -1.0}, r"reward_clip.*-1.0"),
        ({"reward_clip": math.nan}, r"reward_clip.*nan"),
        ({"n_steps": 2.5}, r"n_steps.*2.5"),
        ({"use_sde": True}, r"gSDE.* can only be used with continuous actions"),
        ({"env": "CartPol-v1"}, r"'CartPol-v1'.*CartPole"),
        ({"policy_kwargs": {"head": "neurocodr"}}, r"nearest: neurocoder"),
        ({"max_grad_norm": None}, r"max_grad_norm .*got None; inf sets no limit"),
        ({"batch_size": 10.0}, r"batch_size must be an integer of at least 1, got 10.0"),
        ({"batch_size": 7}, r"got batch_size=7 with n_steps=.*; nearest: "),
        ({"env": lambda: None}, r"factory\(n_envs, seed\), which .*lambda"),
        ({"env": gym.Env}, r"env must be an environment, .*got <class"),
        ({"env": [lambda: None]}, r"DummyVecEnv one of a list of functions"),
        # Its loss has the terms already: as arguments of the policy they would do nothing.
        *(
            (
                {"policy_kwargs": {name: 0.5}},
                rf"{name} is an argument of A3C itself.*A3C\(.*{name}=0.5",
            )
            for name in ("orth_coef", "balance_coef")
        ),
        ({"info_keywords": "tick"}, r"info_keywords.*sequence of names.*'tick'"),
        ({"info_keywords": ("tick", 3)}, r"info_keywords.*sequence of names.*'tick'"),
        ({"limits": {"max_restarts": 9}}, r"ncrl\.agents\.Limits.*'max_restarts': 9"),
        ({"env": "no.such.module:CartPole-v1"}, r"unknown environment 'no.such.*No module"),
    ],
    # Without addresses: names of tests must be the same in every process.
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**wrong)


def test_numbers_of_other_kinds_are_taken() -> None:
    model = make_model(n_steps=np.int64(5), batch_size=np.int32(5), max_grad_norm=math.inf)
    assert model.learn(10).num_timesteps == 10
    model = make_model(max_grad_norm=np.float32(0.5), reward_clip=np.float32(1.0))
    assert model.learn(10).num_timesteps == 10


def test_workers_cannot_play_an_environment_object() -> None:
    for env in (gym.make("CartPole-v1"), make_vec_env("CartPole-v1", 2)):
        with pytest.raises(ValueError, match=r"n_workers=2 .*factory.*n_workers=0"):
            make_model(env, n_workers=2)


def test_an_environment_object_is_not_several(tmp_path: Path) -> None:
    one, two = gym.make("CartPole-v1"), make_vec_env("CartPole-v1", 2)
    for env, n_envs, count in ((one, 16, 1), (two, 4, 2)):
        with pytest.raises(ValueError, match=f"n_envs={n_envs} .*factory.* which has {count};"):
            make_model(env, n_envs=n_envs)
    model = make_model(two, n_envs=2)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"n_envs=16 .*factory"):
        A3C.load(tmp_path / "model", env=one, n_envs=16)


@pytest.mark.parametrize(
    ("policy", "instead"),
    [
        (contrib.RecurrentActorCriticPolicy, "MlpLstmPolicy"),
        (contrib.RecurrentMultiInputActorCriticPolicy, "MultiInputLstmPolicy"),
        (ActorCriticPolicy, "MlpPolicy"),
        (ActorCriticCnnPolicy, "CnnPolicy"),
    ],
)
def test_a_policy_of_another_kind_is_refused(policy: type, instead: str) -> None:
    with pytest.raises(TypeError, match=rf"EnginePolicy.*{policy.__name__} is not.*'{instead}'"):
        make_model(policy=policy, policy_kwargs={"net_arch": [4]})
    with pytest.raises(TypeError, match="a name or a policy class, got 7"):
        make_model(policy=7)


def test_a_factory_that_returns_something_else_is_refused() -> None:
    for count in (1, 3):
        with pytest.raises(ValueError, match="VecEnv of 2"):
            make_model(lambda n_envs, seed, n=count: make_vec_env("CartPole-v1", n))
    with pytest.raises(ValueError, match="VecEnv"):
        make_model(lambda n_envs, seed: gym.make("CartPole-v1"))


# Workers.

WORKERS = {"n_workers": 2, "n_envs": 4, "n_steps": 5}


@pytest.fixture(scope="module")
def healthy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[A3C, RecordOfWorkers]:
    """Two workers play episodes of three timesteps; 50 whole updates and 2 rows of one more."""
    log = str(tmp_path_factory.mktemp("log"))
    env = TickingFactory(length=3, log=log, together=2, pause=0.001)
    model, record = make_model(env, **WORKERS), RecordOfWorkers()
    model.learn(4 * (5 * 50 + 2) - 1, callback=record, log_interval=None)
    return model, record


def test_a_run_with_workers_reaches_its_total(healthy_run: tuple[A3C, Record]) -> None:
    model, record = healthy_run
    assert model.num_timesteps == 4 * (5 * 50 + 2)
    assert record.timesteps == [4 * (row + 1) for row in range(252)]
    assert model._n_updates == 51
    assert record.calls.count("rollout_end") == 51 and record.calls[-1] == "training_end"
    assert model.policy.optimizer.param_groups[0]["lr"] == 0
    assert all(torch.isfinite(p).all() for p in model.policy.parameters())
    assert isinstance(model.env, RemoteEnvs)
    assert model.env._envs is None, "training builds none in this process"


def test_the_memory_that_workers_play_into_is_freed_though_the_callback_is_kept(
    healthy_run: tuple[A3C, RecordOfWorkers],
) -> None:
    model, record = healthy_run
    gc.collect()
    assert record.pool() is None and record.model is model
    assert record.locals["total_timesteps"] == 4 * (5 * 50 + 2) - 1
    assert record.locals["iteration"] == 50


def test_rows_are_what_the_workers_played(healthy_run: tuple[A3C, Record]) -> None:
    """Rewards count an environment's timesteps; every third one ends an episode."""
    _, record = healthy_run
    rewards, dones = np.stack(record.rewards), np.stack(record.dones)
    np.testing.assert_array_equal(dones, rewards % 3 == 0)
    shown = np.stack(record.shown)[..., 0]  # behind the row; negative where a new episode begins
    np.testing.assert_array_equal(shown, np.where(dones, -rewards, rewards))
    for update in range(50):
        rows = rewards[5 * update : 5 * update + 5]
        np.testing.assert_array_equal(np.diff(rows, axis=0), 1)
        assert (rows[0] % 5 == 1).all(), "a rollout begins where the one before it ended"


def test_infos_are_honest_and_no_rollout_is_lost_or_repeated(
    healthy_run: tuple[A3C, Record],
) -> None:
    _, record = healthy_run
    ends: dict[tuple[int, int], list[int]] = {}
    for row in range(250):  # two rows of one more update follow
        reward, done, info = record.rewards[row], record.dones[row], record.infos[row]
        for i in range(4):
            assert ("episode" in info[i]) == done[i]
            if done[i]:
                tick = info[i]["tick"]
                assert tick == reward[i]
                assert info[i]["episode"]["l"] == 3
                assert info[i]["episode"]["r"] == tick + (tick - 1) + (tick - 2)
                ends.setdefault((info[i]["pid"], i % 2), []).append(tick)
    assert len(ends) == 4 and len({pid for pid, _ in ends}) == 2
    for ticks in ends.values():
        # One batch may hold two rollouts of one worker, side by side.
        assert sorted(ticks) == [3 * (n + 1) for n in range(len(ticks))]


def test_policy_lag_is_recorded(healthy_run: tuple[A3C, Record]) -> None:
    _, record = healthy_run
    for update, (mean, largest) in enumerate(record.lags):
        assert 0 <= largest <= update
        assert 0 <= mean <= max(most for _, most in record.lags)
    assert any(mean > 0 for mean, _ in record.lags), "workers play while the learner learns"


def test_the_largest_lag_is_that_of_all_batches_since_the_last_point() -> None:
    logger = Logger(None, [])
    for lags in ([0, 1], [5, 0], [2, 1]):
        record_lag(logger, lags)
    assert logger.name_to_value["train/policy_lag_max"] == 5
    assert logger.name_to_value["train/policy_lag"] == pytest.approx(1.5)
    logger.dump()
    record_lag(logger, [1, 0])
    assert logger.name_to_value["train/policy_lag_max"] == 1


def test_what_is_no_number_does_not_spoil_the_mean_of_other_updates() -> None:
    logger = Logger(None, [])
    for value in (1.0, math.nan, 3.0, math.inf):
        record_means(logger, {"value_loss": value})
    assert logger.name_to_value["train/value_loss"] == 2


@pytest.mark.parametrize("gate", [True, False])
def test_the_factor_of_residual_programs_is_recorded_where_it_varies(gate: bool) -> None:
    model = A3C(
        "NeurocoderMlpPolicy", "CartPole-v1", n_workers=0, n_envs=1, device="cpu",
        policy_kwargs={"head_kwargs": {"residual_gate": gate}, "net_arch": []},
    )  # fmt: skip
    logger, latent = Logger(None, []), Latent(torch.randn(3, 2, 4), torch.randn(3, 2, 4))
    record_heads(logger, model.policy, latent)
    found = {name: v for name, v in logger.name_to_value.items() if "residual_scale" in name}
    heads = {"actor": model.policy.action_net, "critic": model.policy.value_net} if gate else {}
    scales = {
        name: head.residual_scale(getattr(latent, name)).mean() for name, head in heads.items()
    }
    assert found == {
        f"neurocoder/residual_scale/{name}": pytest.approx(scale.item())
        for name, scale in scales.items()
    }


def test_the_lag_of_one_worker_is_bounded_by_its_slots() -> None:
    """Three slots: when it reads weights, at most two rollouts lie before its own, and the one
    that is being learnt from has given its slot back."""
    model, record = make_model(TickingFactory(), n_workers=1, n_envs=1), Record()
    model.learn(5 * 60, callback=record, log_interval=None)
    assert max(largest for _, largest in record.lags) <= 3


def test_workers_refuse_a_policy_that_was_changed() -> None:
    """They would play another network with weights in the wrong places."""
    model = make_model(TickingFactory(), n_workers=1, n_envs=2)
    model.policy.action_net = torch.nn.Sequential(model.policy.action_net)
    with pytest.raises(ValueError, match=r"changed after it was made.*n_workers=0"):
        model.learn(10)
    model = make_model(TickingFactory(), n_workers=1, n_envs=2)
    network = model.policy.features_extractor.network
    place = next(i for i, part in enumerate(network) if isinstance(part, torch.nn.Tanh))
    network[place] = torch.nn.ReLU()  # no weight tells
    with pytest.raises(ValueError, match=r"changed after it was made.*n_workers=0"):
        model.learn(10)


def test_a_compiled_policy_counts_as_what_it_was_made_of() -> None:
    policy = make_model().policy
    compiled = torch.compile(policy)
    assert isinstance(compiled, torch.nn.Module)
    assert layout(compiled) == layout(policy)
    policy.value_net = torch.nn.Linear(8, 1, bias=False)
    assert layout(make_model().policy) != layout(policy)


def test_infos_that_are_asked_for_come_with_every_timestep() -> None:
    """Also what only the user's script knows: its classes travel to the workers by value, and
    back."""

    class Ending(Enum):
        LOST = 1

    class Telling(gym.Wrapper):
        def step(self, action: Any) -> Any:
            *result, info = self.env.step(action)
            return *result, info | {"ending": Ending.LOST}

    def make(n_envs: int, seed: int) -> VecEnv:
        return make_vec_env(lambda: Telling(TickingFactory().make(seed)), n_envs)

    record = Record()
    model = make_model(make, n_workers=1, info_keywords=["tick", "ending", "none"])
    model.learn(40, callback=record)
    infos = [info for row in record.infos for info in row]
    assert [info["tick"] for info in infos] == [tick for tick in range(1, 21) for _ in range(2)]
    assert {info["ending"] for info in infos} == {Ending.LOST}
    assert all("seed" not in info or "pid" in info for info in infos)


def test_get_env_plays_and_leaves_the_workers_theirs() -> None:
    model = make_model(TickingFactory(length=3), n_workers=1, n_envs=2)
    env = model.get_env()
    assert isinstance(env, RemoteEnvs) and env is model.env
    obs = env.reset()
    assert obs.shape == (2, *env.observation_space.shape)
    _, rewards, dones, infos = env.step(np.zeros(2, dtype=int))
    assert rewards.shape == dones.shape == (2,) and len(infos) == 2
    assert env.get_attr("spec") == [None, None]
    mean, _ = evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    assert mean > 0
    model.set_env(env)
    assert model.n_workers == 1 and model.env is env
    model.learn(20)
    assert model.num_timesteps == 20
    other = make_model(env)  # an environment object like any other
    assert other.n_workers == 0 and other.learn(20).num_timesteps == 20


def test_get_env_is_seeded_with_its_model() -> None:
    def first(seed: int) -> np.ndarray:
        return make_model("CartPole-v1", n_workers=1, n_envs=2, seed=seed).get_env().reset()

    np.testing.assert_array_equal(first(3), first(3))
    assert not np.array_equal(first(3), first(4))


def test_environments_that_workers_cannot_build() -> None:
    fork = {"start_method": "fork"}
    subprocesses = partial(
        make_vec_env, "CartPole-v1", vec_env_cls=SubprocVecEnv, vec_env_kwargs=fork
    )
    with pytest.raises(ValueError, match=r"SubprocVecEnv.*return a DummyVecEnv"):
        make_model(lambda n_envs, seed: VecMonitor(subprocesses(n_envs, seed=seed)), n_workers=1)


UNGUARDED = """
from ncrl.agents import A3C
from ncrl.envs import masked_cartpole
from ncrl.sb3 import Latent
large = bytes(1 << 20)  # more than the pipe takes through which a process is told what to do
env = lambda n_envs, seed: large and masked_cartpole()(n_envs, seed)
A3C("MlpPolicy", env, n_workers=1, n_envs=1, device="cpu").learn(100)
"""

KILLED_ONCE = """
import os, pathlib, signal
if __name__ == "__mp_main__" and not pathlib.Path("killed").exists():
    pathlib.Path("killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_unguarded(folder: Path, argument: str, script: str = UNGUARDED) -> str:
    """What Python says of the script, in a file or on standard input; one traceback, the script's
    own, and none of its workers."""
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, argument],
        input=script,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(ncrl.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=80,
    )
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    return done.stderr.strip()


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    """Also where its first worker was killed, and at once: one that ended so is not replaced."""
    said = run_unguarded(tmp_path, "script.py", KILLED_ONCE + UNGUARDED)
    assert said.count("a new one starts") == 1
    assert 'under `if __name__ == "__main__":`' in said.splitlines()[-1]


def test_a_script_on_standard_input_is_told_so(tmp_path: Path) -> None:
    assert "standard input" in run_unguarded(tmp_path, "-").splitlines()[-1]


def test_a_daemonic_process_is_told_that_it_starts_no_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as a worker of a pool of `multiprocessing`, in a search for hyper-parameters."""
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=1, n_envs=1, device="cpu")
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(RuntimeError, match=r"daemonic.*n_workers=0"):
        model.learn(20)


def test_games_of_a_loaded_model_do_not_repeat_those_that_it_has_played(tmp_path: Path) -> None:
    seeds = []

    def factory(n_envs: int, seed: int) -> VecEnv:
        seeds.append(seed)
        return masked_cartpole()(n_envs, seed)

    make_model(factory).learn(10).save(tmp_path / "model")
    A3C.load(tmp_path / "model", env=factory, device="cpu").learn(10)
    assert len(set(seeds)) == 2


def test_no_call_of_learn_repeats_the_games_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def pool(spec: PoolSpec, module: torch.nn.Module) -> None:
        seeds.append(spec.seed)
        raise WorkerError("seen enough")

    monkeypatch.setattr("ncrl.agents.playing.players.WorkerPool", pool)
    model = make_model(TickingFactory(), n_workers=1, n_envs=2)
    for reset in (True, True, False):
        with pytest.raises(WorkerError, match="seen enough"):
            model.learn(40, reset_num_timesteps=reset)
        model._n_updates += 4
    assert len(set(seeds)) == 3


def test_a_model_of_workers_is_trained_on_in_this_process(tmp_path: Path) -> None:
    make_model(TickingFactory(), n_workers=1, n_envs=2).save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=TickingFactory()(2, 0), device="cpu")
    assert loaded.learn(20).num_timesteps == 20


@pytest.mark.parametrize(
    ("policy", "env"),
    [("NeurocoderMlpLstmPolicy", masked_cartpole()), ("NeurocoderCnnLstmPolicy", light())],
)
def test_equal_weights_give_equal_log_probabilities(
    policy: str, env: Callable, log_rhos: list[torch.Tensor]
) -> None:
    """Whatever a worker does differently from the learner would show as log rho."""
    model = make_model(env, policy, n_workers=1, n_envs=4, learning_rate=0.0)
    model.policy.watch = lambda obs: None  # type: ignore[method-assign]  # no new mean image
    model.learn(4 * (5 * 8 + 3))
    assert len(log_rhos) == 9 and log_rhos[-1].shape == (3, 4)
    for update, log_rho in enumerate(log_rhos):
        assert log_rho.abs().max() < 1e-5, f"update {update}"


@pytest.mark.parametrize("n_workers", [0, 1])
def test_the_mean_image_is_that_of_the_frames_trained_on(n_workers: int) -> None:
    model = make_model(light(), "CnnLstmPolicy", n_workers=n_workers, n_envs=2)
    shown: list[torch.Tensor] = []
    watch = model.policy.watch

    def record(obs: torch.Tensor) -> None:
        shown.append(obs.clone())
        watch(obs)

    model.policy.watch = record  # type: ignore[method-assign]
    model.learn(2 * (5 * 4 + 3))
    background = model.policy.features_extractor.background
    frames = torch.cat(shown)
    assert background.num_images == len(frames) == model.num_timesteps == 46
    torch.testing.assert_close(background.mean, frames.float().mean(0) / 255)


def test_workers_play_with_the_mean_image(log_rhos: list[torch.Tensor]) -> None:
    """Without it, what they do would never come close to what the learner makes of it."""
    policy_kwargs = {"lstm_hidden_size": 16}
    model = make_model(
        light(), "CnnLstmPolicy", policy_kwargs, n_workers=1, n_envs=2, learning_rate=0.0
    )
    with torch.no_grad():
        model.policy.action_net.weight.normal_()
    model.learn(2 * 5 * 60)
    first, last = (rho.abs().max() for rho in (torch.cat(log_rhos[1:8]), torch.cat(log_rhos[-8:])))
    assert last < 0.05 < 0.2 < first
