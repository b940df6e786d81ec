"""When workers are replaced, and whom a batch waits for: with its own clock, without processes."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium import spaces

from ncrl.agents.playing import supervision
from ncrl.agents.playing.buffers import RolloutShape
from ncrl.agents.playing.pool import WorkerPool, handed_over
from ncrl.agents.playing.supervision import Delivery, Failures, Incarnation, Limits, Pool, PoolSpec
from ncrl.agents.playing.worker import Played, Ready, WorkerSpec, _work
from ncrl.agents.profiling import OFF

SHAPE = RolloutShape(1, 1, spaces.Discrete(2), spaces.Discrete(2), 0, 0)
NOTHING: Any = None


def make_spec(n_workers: int = 2, **limits: float) -> PoolSpec:
    return PoolSpec(NOTHING, NOTHING, SHAPE, n_workers, 0, Limits(**limits))  # type: ignore[arg-type]


class FakePool(Pool[Incarnation]):
    """Workers are told to live and die, and deliver what they are told to."""

    def __init__(self, spec: PoolSpec, script: Callable[[], None] = lambda: None) -> None:
        super().__init__(spec, Incarnation)
        self.script = script
        self.started: list[tuple[int, int]] = []
        self.are_ready = False

    def publish(self, module: torch.nn.Module) -> None: ...

    def release(self, deliveries: list[Delivery]) -> None: ...

    def _all_ready(self) -> bool:
        return self.are_ready

    def _look(self, timeout: float) -> None:
        self.script()

    def _start(self, worker: Incarnation) -> None:
        self.started.append((worker.index, worker.number))

    def _bury(self, worker: Incarnation) -> None: ...


def test_pauses_double_from_the_first_and_have_an_end() -> None:
    limits, failures = Limits(first_pause=0.5, max_restarts=100), Failures()
    pauses = []
    for _ in range(9):
        failures.count(limits)
        pauses.append(failures.pause(limits))
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_a_replacement_starts_after_its_pause_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pool = FakePool(make_spec(first_pause=4.0))
    with pool:
        assert pool.started == [(0, 0), (1, 0)]
        pool._replace(pool._workers[1], "died", "")
        for now, started in ((1000.0, 2), (1003.9, 2), (1004.1, 3), (1100.0, 3)):
            clock.now = now
            pool._begin_those_due()
            assert len(pool.started) == started
    assert pool.started[-1] == (1, 1)


def test_no_life_of_a_worker_has_the_seed_of_another() -> None:
    """Else both would play the same games."""
    pool = FakePool(make_spec(n_workers=3))
    lives = [Incarnation(index, number) for index in range(3) for number in range(20)]
    assert len({pool._seed(life) for life in lives}) == len(lives)


def test_the_first_batch_waits_for_everybody_and_the_oldest_come_first() -> None:
    """Else the first worker to be ready would play all of the first batches."""

    def play() -> None:
        worker = pool._workers[looks["number"] % 2 if pool.are_ready else 0]
        pool._deliver(worker, NOTHING, Played(0, looks["number"], {}), [])
        looks["number"] += 1
        pool.are_ready = looks["number"] > 5

    looks = {"number": 0}
    pool = FakePool(make_spec(), play)
    first = pool.take(lambda: False)
    assert looks["number"] == 6
    assert first is not None and [delivery.played.version for delivery in first] == [0, 1]
    second = pool.take(lambda: False)
    assert second is not None and [delivery.played.version for delivery in second] == [2, 3]
    assert looks["number"] == 6, "what is there is taken at once"


@pytest.mark.parametrize(
    ("slots", "deaf_for", "expected"),
    [([], 0.0, []), ([0], 0.0, [0]), ([0], 100.0, [])],
    ids=["nothing to play", "silent", "silent while nobody could hear it"],
)
def test_a_worker_that_has_work_and_is_heard_owes_signs_of_life(
    slots: list[int], deaf_for: float, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could hear it where the whole group of processes was stopped, so that it played
    nothing either."""
    pool = WorkerPool(make_spec(heartbeat_timeout=50), torch.nn.Linear(1, 1))
    worker = pool._workers[0]
    worker.process, worker.building = SimpleNamespace(), False  # type: ignore[assignment]
    worker.slots.extend(slots)
    worker.last_sign = time.monotonic() - 101
    given_up: list[int] = []
    monkeypatch.setattr(pool, "_give_up_on", lambda worker, what: given_up.append(worker.index))
    monkeypatch.setattr(pool, "_deaf_for", lambda: deaf_for)
    pool._check_silence()
    assert given_up == expected


class Pipe:
    """Hands one slot to a worker, then ends it."""

    def __init__(self) -> None:
        self.tasks: list[int | None] = [0, None]
        self.sent: list[Any] = []

    def poll(self) -> bool:
        """What comes next has not come yet."""
        return False

    def recv(self) -> int | None:
        return self.tasks.pop(0)

    def send(self, message: Any) -> None:
        self.sent.append(message)


def test_every_worker_counts_its_own_timesteps() -> None:
    """By them the pool knows who hangs."""

    class FakeGames:
        policy = None

        def __init__(self, beat: Callable[[], object], **_: Any) -> None:
            self.beat = beat

        def play(self, rollout: Any, slot: int, version: int) -> tuple[Played, list[Any]]:
            for _ in range(7):
                self.beat()
            return Played(slot, version, {}), []

        def close(self) -> None:
            pass

    pipe: Any = Pipe()
    beats = torch.zeros(3, dtype=torch.int64)
    weights: Any = SimpleNamespace(read_into=lambda policy: 5)
    slots: Any = SimpleNamespace(slot=lambda number: None)
    games = handed_over(FakeGames)
    _work(pipe, WorkerSpec(0, games, slots, weights, beats, False, index=1), OFF)
    assert beats.tolist() == [0, 7, 0]
    assert pipe.sent == [Ready(), Played(0, 5, {})]
