"""What a machine is worth, and that the learner leaves the workers their cores."""

import os

import psutil
import pytest
import torch

import ncrl.agents.playing.sizes
from ncrl.agents.playing.buffers import RolloutBatch
from ncrl.agents.playing.sizes import (
    available_cores,
    choose_sizes,
    default_workers,
    envs_per_update,
    learner_threads,
)
from tests.agents.test_buffers import CPU, make_shape, numbered


@pytest.mark.parametrize(
    ("cores", "has_gpu", "workers", "games", "batch"),
    [
        (1, False, 1, 16, 4),
        (2, False, 2, 8, 4),
        (3, False, 3, 8, 4),
        (4, False, 3, 8, 4),
        (16, False, 12, 8, 4),
        (1, True, 1, 16, 4),
        (2, True, 1, 16, 4),
        (4, True, 3, 8, 6),
        (8, True, 7, 8, 8),
        (16, True, 15, 8, 8),
        (64, True, 63, 8, 8),
    ],
)
def test_sizes(cores: int, has_gpu: bool, workers: int, games: int, batch: int) -> None:
    assert choose_sizes(cores, has_gpu)[:2] == (workers, games)
    assert envs_per_update(workers * games, has_gpu=has_gpu) == batch


@pytest.mark.parametrize("has_gpu", [False, True])
def test_sizes_fit_any_machine(has_gpu: bool) -> None:
    for cores in range(1, 130):
        sizes = choose_sizes(cores, has_gpu)
        assert 8 <= sizes.games <= 16 <= sizes.workers * sizes.games
        assert 1 <= sizes.workers <= cores
        total = sizes.workers * sizes.games
        assert total % envs_per_update(total, has_gpu=has_gpu) == 0
        if has_gpu and cores > 1:
            assert sizes.workers == cores - 1
        assert str(cores) in sizes.reason and "\n" not in sizes.reason


@pytest.mark.parametrize(
    ("n_workers", "threads"), [(0, 6), (2, 6), (12, 4), (15, 1), (16, 1), (20, 1)]
)
def test_the_learner_takes_the_cores_that_workers_leave(
    n_workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ncrl.agents.playing.sizes, "available_cores", lambda: 16)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with learner_threads(n_workers):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("games", "has_gpu", "explores", "expected"),
    [
        (1, False, False, 1),
        (6, False, False, 3),
        (240, False, False, 4),
        (240, True, False, 8),
        (64, True, False, 8),
        (4, False, True, 4),
        (32, True, False, 8),
        (16, True, False, 4),
        (16, False, True, 8),
        (64, False, True, 32),
        (240, True, True, 30),
    ],
)
def test_games_of_an_update(games: int, has_gpu: bool, explores: bool, expected: int) -> None:
    assert envs_per_update(games, has_gpu=has_gpu, explores=explores) == expected


def test_workers_are_as_many_as_cores_and_share_the_games(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncrl.agents.playing.sizes, "available_cores", lambda: 6)
    found = [default_workers(n_envs) for n_envs in (1, 4, 16, 18, 7, 11)]
    assert found == [1, 4, 4, 6, 1, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_only_cores_that_this_process_may_use_count() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_gathering_starts_no_threads() -> None:
    """Where torch copies so much with 4 threads, it starts three."""
    shape = make_shape(n_steps=500, n_envs=200)
    slots = [numbered(shape, first) for first in (0, 1)]
    batch = RolloutBatch(make_shape(n_steps=500, n_envs=400), CPU)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    threads = psutil.Process(os.getpid()).num_threads()
    try:
        batch.gather(slots)
        assert psutil.Process(os.getpid()).num_threads() == threads
        big = torch.zeros(1000, 1000)
        big[:, :500].copy_(torch.ones(1000, 500))
        assert psutil.Process(os.getpid()).num_threads() > threads, "the test sees threads"
    finally:
        torch.set_num_threads(before)
