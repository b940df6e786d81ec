"""A worker's games, played in this process: its random numbers, its reports, what it closes."""

import threading
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces

from ncrl.agents.playing.buffers import Rollout, RolloutShape
from ncrl.agents.playing.worker import (
    MESSAGE_BYTES,
    Games,
    PolicySpec,
    _in_small_parts,
    picklable,
)
from ncrl.agents.profiling import OFF
from ncrl.sb3 import MlpLstmPolicy
from tests.agents.environments import Scripted

LENGTH, ENVS, WIDTH = 12, 3, 8
BOX = spaces.Box(-1, 1, (2,), np.float32)


class Factory:
    """Environments that always show the same, without a Monitor; keeps those it made."""

    reward_clip = None

    def __init__(self, action_space: spaces.Space | None = None) -> None:
        self.action_space = action_space
        self.made: list[Scripted] = []
        self.seeds: list[int] = []
        self.closed: list[Scripted] = []

    def __call__(self, n_envs: int, seed: int) -> Scripted:
        dones = np.zeros((LENGTH, n_envs), dtype=int)
        dones[4, 1], dones[7, 2] = 1, 2
        observations = np.ones((LENGTH + 1, n_envs, 2), np.float32)
        env = Scripted(
            observations, np.zeros((LENGTH, n_envs), np.float32), dones, observations[1:]
        )
        env.action_space = self.action_space or env.action_space
        env.close = lambda: self.closed.append(env)  # type: ignore[method-assign]
        self.made.append(env)
        self.seeds.append(seed)
        return env


@pytest.fixture(autouse=True)
def _threads() -> Any:
    """`Games` leaves its process one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_games(factory: Factory, *, seed: int = 0, sde_sample_freq: int | None = None) -> Games:
    env = factory(ENVS, 0)
    policy = PolicySpec(
        MlpLstmPolicy,
        env.observation_space,
        env.action_space,
        {"lstm_hidden_size": WIDTH, "use_sde": sde_sample_freq is not None},
        sde_sample_freq or -1,
    )
    return Games(factory, policy, ENVS, seed, info_keywords=(), stopwatch=OFF, beat=lambda: None)


def play(games: Games, env: Scripted) -> tuple[Rollout, list[Any]]:
    shape = RolloutShape(LENGTH, ENVS, env.observation_space, env.action_space, 1, WIDTH)
    rollout = shape.allocate()
    return rollout, games.play(rollout, 0, 0)[1]


def test_a_worker_draws_from_its_seed_alone() -> None:
    """Else all workers, which start alike, would play the same games."""
    draws = []
    for seed in (1, 1, 2):
        factory = Factory()
        games = make_games(factory, seed=seed)
        draws.append((play(games, factory.made[-1])[0].actions.tolist(), np.random.rand()))
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0] and draws[0][1] != draws[2][1]


def test_the_end_of_a_game_is_reported_without_a_monitor() -> None:
    factory = Factory()
    games = make_games(factory)
    infos = play(games, factory.made[-1])[1]
    assert infos == [
        (4, 1, {"TimeLimit.truncated": False}),
        (7, 2, {"TimeLimit.truncated": True}),
    ]


@pytest.mark.parametrize(("frequency", "rows_alike"), [(-1, True), (1, False)])
def test_noise_of_gsde_is_drawn_as_often_as_asked(frequency: int, rows_alike: bool) -> None:
    factory = Factory(BOX)
    games = make_games(factory, sde_sample_freq=frequency)
    actions = play(games, factory.made[-1])[0].actions[:, 0]
    # The observation is constant, and after some timesteps the LSTM's state nearly so.
    changes = (actions[9:] - actions[8:-1]).abs().amax(1)
    assert bool((changes < 0.02).all()) == rows_alike


def test_environments_are_closed_and_do_not_repeat_their_games_when_they_are_built_anew() -> None:
    factory = Factory()
    games = make_games(factory)
    for _ in range(2):
        games.start()
        assert factory.closed == factory.made[1:-1]  # the first one is for its spaces alone
    _, *seeds = factory.seeds
    assert len(set(seeds)) == 3


def test_what_cannot_be_pickled_stays_in_the_worker() -> None:
    """Such as a lock, or the handle of a simulator, in an info at the end of a game."""
    info = {"episode": {"r": 1.0, "l": 3}, "lock": threading.Lock(), "name": "x"}
    [part] = _in_small_parts([(0, 1, info), (2, 0, {"plain": 1})])
    assert part == [(0, 1, {"episode": {"r": 1.0, "l": 3}, "name": "x"}), (2, 0, {"plain": 1})]
    large = {"picture": b"x" * 100_000, "lock": threading.Lock()}
    assert picklable(large) == {"picture": large["picture"]}  # where there is no pipe


def test_infos_come_in_parts_that_a_pipe_takes_in_one_write() -> None:
    infos = [(row, row % ENVS, {"note": f"{row:300}"}) for row in range(100)]
    parts = list(_in_small_parts(infos))
    assert [info for part in parts for info in part] == infos
    sizes = [sum(len(cloudpickle.dumps(info)) for _, _, info in part) for part in parts]
    assert max(sizes) <= MESSAGE_BYTES and min(sizes[:-1]) > MESSAGE_BYTES / 2
    assert max(len(cloudpickle.dumps(part)) for part in parts) < 2 * MESSAGE_BYTES


def test_of_an_info_with_many_entries_those_are_sent_that_fit_and_the_score() -> None:
    score = {"r": 1.0, "l": 3}
    many = {f"joint {i}": f"{i:100}" for i in range(300)}
    [[(row, i, sent)]] = _in_small_parts([(2, 1, {**many, "episode": score})])
    assert (row, i, sent["episode"]) == (2, 1, score)
    assert sent.items() <= (many | {"episode": score}).items() and len(sent) > 40
    assert len(cloudpickle.dumps([(row, i, sent)])) <= MESSAGE_BYTES
