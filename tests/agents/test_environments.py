"""What `A3C(env=...)` makes of ids, and what it says and does where SB3's users expect another."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy as copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
from stable_baselines3.common.envs import (
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecMonitor,
    VecNormalize,
)
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.defaults import FEW
from ncrl.agents.playing.env_sources import (
    RecordedEnv,
    RegisteredFactory,
    RemoteEnvs,
    as_factory,
    build,
    fresh_seed,
)
from ncrl.envs import masked_cartpole, remember
from ncrl.envs.atari import AtariFactory
from tests.agents.environments import TickingFactory


def make_model(env: Any = None, policy: str = "MlpPolicy", **options: Any) -> A3C:
    options = {"n_workers": 0, "n_envs": 2, "n_steps": 4, "seed": 1, "device": "cpu"} | options
    return A3C(policy, env or masked_cartpole(), **options)


# Ids.


SCRIPT = """
import gymnasium as gym, numpy as np
from gymnasium import spaces
from ncrl.agents import A3C

class Mine(gym.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {}

if __name__ == "__main__":
    gym.register("Mine-v0", Mine, max_episode_steps=20)
    A3C("MlpPolicy", "Mine-v0", n_workers=1, n_envs=1, n_steps=5, device="cpu").learn(40)
    print("trained")
"""


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_workers_know_an_id_that_the_script_registers(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = run_python(str(tmp_path / "script.py"))
    assert ran.stdout.strip() == "trained", ran.stderr


@pytest.mark.parametrize(
    "env_id", ["Pong", "ALE/Pong-v5", "ale_py:ALE/Pong-v5", "PongNoFrameskip-v4", "Pong-v4"]
)
def test_one_meaning_for_one_game(env_id: str) -> None:
    assert as_factory(env_id) == AtariFactory("pong")


def test_an_unknown_id_is_said_where_there_are_no_games(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict[str, str]:
        raise ModuleNotFoundError("No module named 'ale_py'")

    monkeypatch.setattr(sys.modules["ncrl.envs.atari"], "_games", missing)
    with pytest.raises(ValueError, match="unknown environment 'CartPole-v9'"):
        as_factory("CartPole-v9")


def test_what_a_game_means_is_said_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"n_envs": 1, "policy": "CnnLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8}}
    with pytest.warns(UserWarning, match=r"PongNoFrameskip-v4 is played as .*sticky_actions=0\.25"):
        make_model("PongNoFrameskip-v4", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model("ALE/Pong-v5", verbose=1, **options)
    assert "ALE/Pong-v5 is played as game='pong'" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", ["CartPole", "gymnasium.envs.classic_control:CartPole-v1"])
def test_other_ids_are_gymnasiums(env_id: str) -> None:
    factory = as_factory(env_id)
    assert isinstance(factory, RegisteredFactory) and factory.spec.id == "CartPole-v1"
    env = factory(2, 5)
    np.testing.assert_array_equal(env.reset(), gym_reset("CartPole-v1", (5, 6)))


def gym_reset(env_id: str, seeds: tuple[int, ...]) -> np.ndarray:
    return np.stack([gym.make(env_id).reset(seed=seed)[0] for seed in seeds])


class Plain(gym.Env):
    """Shows the action that it was given last, and its seed at first; draws nothing."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)

    def __init__(self, action_space: spaces.Space | None = None) -> None:
        self.action_space = action_space or spaces.Discrete(3)
        self.closed = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.full(1, -1.0 if seed is None else float(seed)), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        assert np.asarray(action).dtype == self.action_space.dtype
        return np.full(1, np.sum(action), np.float64), 0.0, False, False, {}

    def close(self) -> None:
        self.closed += 1


class Worded(Plain):
    observation_space = spaces.Text(4)  # type: ignore[assignment]


@pytest.fixture
def registered() -> Iterator[None]:
    gym.register("Plain-v0", Plain)
    gym.register("Worded-v0", Worded)
    gym.register("Ram-v0", "ale_py.env:AtariEnv", kwargs={"game": "pong", "obs_type": "ram"})
    yield
    for name in ("Plain-v0", "Worded-v0", "Ram-v0"):
        del gym.registry[name]


@pytest.mark.usefixtures("registered")
def test_pictures_are_for_environments_that_draw_them() -> None:
    drawn = as_factory("CartPole-v1")
    assert drawn(1, 0).render_mode == "rgb_array"
    assert RemoteEnvs(drawn, 2).get_attr("render_mode") == ["rgb_array"] * 2
    env = as_factory("Plain-v0")(1, 0)
    assert env.render_mode is None and env.reset().shape == (1, 1)


@pytest.mark.usefixtures("registered")
def test_spaces_that_nothing_can_read_are_named() -> None:
    with pytest.raises(ValueError, match=r"Text\(.* not supported as observations"):
        as_factory("Worded-v0")(1, 0)
    words = spaces.Text(4)
    with pytest.raises(ValueError, match=r"Text\(.* not supported as actions"):
        build(lambda n_envs, seed: DummyVecEnv([lambda: Plain(words)] * n_envs), 2, 0)


@pytest.mark.usefixtures("registered")
def test_an_atari_game_that_shows_no_pictures_is_played_as_registered() -> None:
    factory = as_factory("Ram-v0")
    assert isinstance(factory, RegisteredFactory) and factory.spec.kwargs["obs_type"] == "ram"


def test_a_factory_that_does_not_tell_its_arguments_is_taken() -> None:
    assert as_factory(max) is max  # type: ignore[arg-type,comparison-overlap]


def test_seeds_of_the_system_leave_room_to_count_on() -> None:
    seeds = [fresh_seed() for _ in range(64)]
    assert len(set(seeds)) > 60 and all(0 <= seed < 2**31 for seed in seeds)


# Environments of workers, in this process.


class PlainFactory:
    """Remembers what it was called with and what it built."""

    def __init__(self, wrap: Callable[[VecEnv], VecEnv] = lambda env: env) -> None:
        self.wrap = wrap
        self.calls: list[tuple[int, int]] = []
        self.built: list[Plain] = []

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        self.calls.append((n_envs, seed))
        games = [Plain() for _ in range(n_envs)]
        self.built += games
        env = DummyVecEnv([lambda game=game: game for game in games])  # type: ignore[misc]
        env.seed(seed)
        return self.wrap(env)


def test_the_environment_that_spaces_are_read_off_is_closed() -> None:
    factory = PlainFactory()
    envs = RemoteEnvs(factory, 3)
    assert factory.calls == [(1, 0)] and factory.built[0].closed == 1
    assert envs.get_attr("render_mode") == [None] * 3
    envs.close()
    assert len(factory.built) == 1, "nothing was built to be asked or closed"
    envs.reset()
    envs.close()
    assert [game.closed for game in factory.built] == [1] * 4
    factory = PlainFactory(lambda env: VecMonitor(VecNormalize(env)))
    with pytest.raises(ValueError, match="VecNormalize"):
        RemoteEnvs(factory, 3)
    assert factory.built[0].closed == 1


class NotedEnds(TickingFactory):
    """Slow environments of workers, which leave a file in `log` when they are closed."""

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        factory = self

        class Noted(DummyVecEnv):
            def close(self) -> None:
                super().close()
                Path(str(factory.log), f"closed-{os.getpid()}").touch()

        return Noted([lambda: self.make(seed)] * n_envs)


def test_workers_close_their_environments(tmp_path: Path) -> None:
    """At once, and not after the rollouts that they were asked for, for which nobody waits."""
    make_model(NotedEnds(log=str(tmp_path), pause=0.1), n_workers=1).learn(8)
    here = f"closed-{os.getpid()}"
    assert sum(file.name != here for file in tmp_path.glob("closed-*")) == 1


class LockedFactory(PlainFactory):
    """Its environments take turns, in whatever process they are."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = multiprocessing.get_context("spawn").Lock()

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        with self.lock:
            return DummyVecEnv([lambda: gym.make("CartPole-v1")] * n_envs)


def test_a_factory_may_hold_a_lock_that_workers_share() -> None:
    model = make_model(LockedFactory(), n_workers=1)
    model.learn(8)
    assert model.num_timesteps >= 8


def test_environments_in_this_process_have_their_seed_or_one_of_the_system() -> None:
    factory = PlainFactory()
    envs = RemoteEnvs(factory, 2)
    assert len(envs.seed(5)) == 2
    assert envs.reset().tolist() == [[5], [6]] and factory.calls[1:] == [(2, 5)]
    envs.seed(7)
    assert envs.reset().tolist() == [[7], [8]] and len(factory.calls) == 2
    for _ in range(2):
        RemoteEnvs(factory, 2).reset()
    assert factory.calls[3][1] != factory.calls[5][1]


def test_options_of_a_reset_reach_the_environments_of_this_process() -> None:
    class Optional(Plain):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.full(1, (options or {}).get("level", 0.0)), {}

    envs = RemoteEnvs(lambda n_envs, seed: DummyVecEnv([Optional] * n_envs), 2)
    envs.set_options({"level": 3.0})
    assert envs.reset().tolist() == [[3], [3]] and envs.reset().tolist() == [[0], [0]]


def test_a_reset_does_nothing_while_workers_reset_theirs() -> None:
    factory = PlainFactory()
    envs = RemoteEnvs(factory, 2)
    with pytest.raises(KeyboardInterrupt), envs.resting():
        assert envs.reset() is None
        raise KeyboardInterrupt
    assert len(factory.built) == 1
    assert envs.reset().shape == (2, 1), "also after an interruption"


# Histories of games.


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Discrete(3), 1),
        (spaces.Discrete(256), 1),
        (spaces.Discrete(257), 8),
        (spaces.MultiDiscrete([300, 2]), 16),
        (spaces.MultiBinary(3), 3),
        (spaces.Box(-1, 1, (2, 2), np.float32), 16),
    ],
    ids=str,
)
def test_a_history_brings_a_fresh_copy_to_the_same_state(space: spaces.Space, size: int) -> None:
    """Also of the largest action, and recording goes on after the history was looked at."""

    def fresh() -> RecordedEnv:
        return RecordedEnv(DummyVecEnv([lambda: Plain(space)] * 2), 5)

    space.seed(0)
    largest = space.n - 1 if isinstance(space, spaces.Discrete) else space.sample()
    played: list[list[np.ndarray]] = []
    env = fresh()
    for steps in (2, 0, 3):
        if steps == 3:
            env.seed(6)
        env.reset()
        played.append([])
        for _ in range(steps):
            actions = np.stack([np.asarray(largest), np.asarray(space.sample())])
            obs, *_ = env.step(actions)
            played[-1].append(actions)
            history = env.history()
    assert [(seed, len(actions)) for seed, actions in history] == [(5, 2), (None, 0), (6, 3)]
    for (_, actions), expected in zip(history, played, strict=True):
        assert actions.shape[1:] == (2, *(space.shape or ()))
        assert not expected or np.array_equal(actions, np.stack(expected))
    assert sum(actions.nbytes for _, actions in history) == 5 * 2 * size
    again = fresh()
    np.testing.assert_array_equal(again.replay(history), obs)
    for (seed, one), (before, other) in zip(again.history(), history, strict=True):
        np.testing.assert_array_equal(one, other)
        assert seed == before


# Callbacks.


def test_frequencies_that_count_calls_are_told_to_users_of_ids(tmp_path: Path) -> None:
    callback = CheckpointCallback(10, str(tmp_path))
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=0, n_steps=4, device="cpu")
    assert model.n_envs == 16
    with pytest.warns(UserWarning, match=r"save_freq=10\) counts calls.*every 160 timesteps"):
        model.learn(64, callback=CallbackList([CallbackList([callback])]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model("CartPole-v1", n_envs=16)  # who says 16 knows
        model.learn(64, callback=callback).save(tmp_path / "model")
        A3C.load(tmp_path / "model", env="CartPole-v1").learn(64, callback=callback)


class Locals(BaseCallback):
    """Looks at what A2C shows its callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.rows.append(
            {
                k: copy(v) if isinstance(v, (Tensor, np.ndarray)) else v
                for k, v in self.locals.items()
            }
        )
        return True

    def _on_rollout_end(self) -> None:
        buffer, rows = self.locals["rollout_buffer"], self.rows[-self.model.n_steps :]
        assert buffer.rewards.shape == (buffer.buffer_size, buffer.n_envs)
        for name, key in (("log_probs", "log_probs"), ("observations", "obs_tensor")):
            seen = torch.stack([row[key] for row in rows]).numpy()
            np.testing.assert_array_equal(getattr(buffer, name), seen)
        np.testing.assert_array_equal(buffer.rewards, np.stack([row["rewards"] for row in rows]))
        np.testing.assert_array_equal(buffer.actions, np.stack([row["actions"] for row in rows]))
        dones = np.stack([row["dones"] for row in rows])
        np.testing.assert_array_equal(buffer.episode_starts[1:], dones[:-1])
        if rows[0]["values"] is not None:
            values = torch.stack([row["values"] for row in rows]).squeeze(-1)
            np.testing.assert_allclose(buffer.values, values, atol=1e-5)
        assert not hasattr(buffer, "advantages")


class Keeping(BaseCallback):
    """Keeps rows, while the next rollout is played, or gathered, into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, Any, Any]] = []

    def _on_step(self) -> bool:
        for name in ("rewards", "dones", "actions", "clipped_actions", "log_probs"):
            self.kept.append((name, self.locals[name], copy(self.locals[name])))
        return True


@pytest.mark.parametrize("n_workers", [0, 1])
def test_callbacks_see_what_a2cs_see_and_may_keep_it(n_workers: int) -> None:
    seen = Locals()
    policy_kwargs = {"lstm_hidden_size": 8}
    model = make_model(
        remember(), "MlpLstmPolicy", n_workers=n_workers, policy_kwargs=policy_kwargs
    )
    keeping = Keeping()
    model.learn(40, callback=[seen, keeping])
    names = {"new_obs", "actions", "rewards", "dones", "infos", "values", "log_probs"}
    names |= {"clipped_actions", "obs_tensor", "n_steps", "n_rollout_steps", "env"}
    for row in seen.rows:
        assert names <= set(row) and (row["values"] is None) == bool(n_workers)
        assert len(row["obs_tensor"]) == len(row["log_probs"]) == len(row["clipped_actions"]) == 2
        np.testing.assert_array_equal(row["clipped_actions"], row["actions"])
    assert len(keeping.kept) == 5 * 20
    for name, now, then in keeping.kept:
        np.testing.assert_array_equal(now, then, err_msg=f"{name} stays as it was")


def test_clipped_actions_are_those_of_the_environment() -> None:
    class Bounded(gym.Env):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(0, 0.1, (1,))

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(1, np.float32), float(action[0]), False, False, {}

    seen = Locals()
    make_model(Bounded(), n_envs=1).learn(16, callback=seen)
    for row in seen.rows:
        np.testing.assert_array_equal(row["clipped_actions"][:, 0], row["rewards"])
    assert any((row["clipped_actions"] != row["actions"]).any() for row in seen.rows)


# Stopping.


@pytest.mark.parametrize("at", ["_on_step", "_init_callback"])
def test_a_stop_does_not_outlive_the_learn_that_failed(at: str) -> None:
    def fail(self: BaseCallback) -> bool:
        self.model.request_stop()
        raise RuntimeError("a user's callback")

    failing = type("Failing", (BaseCallback,), {"_on_step": lambda _: True} | {at: fail})
    model = make_model()
    with pytest.raises(RuntimeError, match="a user's callback"):
        model.learn(40, callback=failing())
    assert model.learn(40).num_timesteps == 40


# Defaults.


def test_defaults_follow_the_number_of_environments() -> None:
    def defaults(env: Any, **options: Any) -> tuple[int, float]:
        model = A3C("MlpPolicy", env, device="cpu", **options)
        return model.n_steps, model.lr_schedule(1.0)

    one = gym.make("CartPole-v1")
    few, many = (5, FEW.learning_rate), (20, 7e-4)
    assert defaults(one) == defaults(masked_cartpole(), n_workers=0, n_envs=3) == few
    assert defaults("CartPole-v1", n_workers=0) == many
    assert defaults("CartPole-v1", n_workers=1, n_envs=1) == many
    assert defaults(one, n_steps=20, learning_rate=7e-4) == many


@pytest.mark.parametrize(
    ("env", "timesteps", "options"),
    [
        (IdentityEnv(4), 2500, {"gamma": 0.4, "seed": 3}),
        (IdentityEnvMultiDiscrete(4), 2500, {"gamma": 0.4, "seed": 3}),
        (IdentityEnvMultiBinary(4), 2500, {"gamma": 0.4, "seed": 3}),
        (IdentityEnvBox(eps=0.5), 2000, {"gamma": 0.95, "policy_kwargs": {"net_arch": [64, 64]}}),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, gym.Env) else "",
)
def test_identity_is_learned_with_the_defaults(env: Any, timesteps: int, options: dict) -> None:
    """SB3's own test of its algorithms, with its budget and its seed."""
    model = A3C("MlpPolicy", env, device="cpu", **({"seed": 0} | options)).learn(timesteps)
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=20, warn=False)[0] > 90
