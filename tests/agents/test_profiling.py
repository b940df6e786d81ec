"""`ncrl.agents.profiling`: each moment is charged once, to its phase; no worker's is lost."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import ncrl.agents.a3c
from ncrl.agents import A3C, Limits
from ncrl.agents.playing.pool import WorkerPool
from ncrl.agents.profiling import OFF, PHASES, Profile, Seconds, Stopwatch, stopwatch_for
from ncrl.agents.runs.checkpoints import resume, save_checkpoint
from tests.agents.conftest import worker_pids
from tests.agents.environments import TickingFactory, Trouble


class Clock:
    """Goes on by what the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_model(n_workers: int, env: Any = None, **options: Any) -> A3C:
    defaults: dict[str, Any] = {"n_envs": 2, "n_steps": 5, "seed": 1, "device": "cpu"}
    defaults |= {"policy_kwargs": {"lstm_hidden_size": 8}, "profile": True}
    defaults |= {"limits": Limits(max_restarts=2, first_pause=0.2)}
    env = env or TickingFactory()
    return A3C("MlpLstmPolicy", env, n_workers=n_workers, **(defaults | options))


def shares_in(table: str) -> list[list[float]]:
    """For each row of the table, the shares of the learner and of the mean worker."""
    rows = [line.split() for line in table.splitlines()[2:]]
    return [[0.0 if cell == "-" else float(cell) for cell in row[2:5:2]] for row in rows]


# The stopwatch.


def test_a_nested_phase_stops_the_outer_one() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.phase("other"):
        clock.now += 1
        with watch.phase("copy"):
            clock.now += 2
            with watch.phase("forward"):
                clock.now += 4
            clock.now += 8
            with watch.phase("copy"):  # within itself
                clock.now += 16
        clock.now += 32
    assert watch.take() == {"other": 33, "copy": 26, "forward": 4}


def test_phases_add_up_to_the_time_in_the_outermost_one() -> None:
    clock, rng = Clock(), np.random.default_rng(0)
    watch, whole = Stopwatch(clock), 0.0

    def spend() -> None:
        nonlocal whole
        seconds = float(rng.random())
        clock.now += seconds
        whole += seconds

    def nest(depth: int) -> None:
        for _ in range(3):
            with watch.phase(PHASES[rng.integers(len(PHASES))]):
                spend()
                if depth:
                    nest(depth - 1)
                spend()

    with watch.phase("other"):
        nest(3)
        parts = [watch.take(), (spend(), watch.take())[1]]  # in the middle of a phase
        nest(2)
    clock.now += 1000  # outside all phases
    parts.append(watch.take())
    assert sum(sum(part.values()) for part in parts) == pytest.approx(whole)
    assert parts[1].keys() == {"other"}
    assert watch.take() == {}


def test_a_phase_that_raises_is_left() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.phase("other"):
        with pytest.raises(KeyboardInterrupt), watch.phase("copy"):
            clock.now += 1
            raise KeyboardInterrupt
        clock.now += 2
    assert watch.take() == {"copy": 1, "other": 2}


def test_what_the_device_was_asked_to_do_belongs_to_the_phase_that_asked() -> None:
    """Kernels that take 5 seconds, started in one phase and waited for at its end."""
    clock = Clock()
    queued = [0.0]

    def synchronize() -> None:
        clock.now += queued[0]
        queued[0] = 0.0

    watch = Stopwatch(clock, synchronize)
    with watch.phase("other"):
        with watch.phase("backward"):
            queued[0] += 5
        with watch.phase("callbacks"):
            pass
    assert watch.take() == {"other": 0, "backward": 5, "callbacks": 0}


def test_only_the_stopwatch_of_a_cuda_device_synchronizes(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda:1"):
        with stopwatch_for(torch.device(name)).phase("copy"):
            pass
    assert waited == [torch.device("cuda:1")] * 2
    with OFF.phase("copy"):
        pass
    assert len(waited) == 2


# The table.


def profile_of(learner: Seconds, *workers: Seconds) -> Profile:
    profile = Profile(Stopwatch(Clock()))
    profile.learner = learner
    for index, seconds in enumerate(workers):
        profile.add_worker(index, seconds)
    return profile


def test_the_table() -> None:
    profile = profile_of(
        {"backward": 6.0, "wait": 2.0, "other": 0.001},
        {"environment": 3.0, "forward": 1.0},
        {"environment": 1.0, "forward": 1.0},
    )
    assert profile.table().splitlines() == [
        "                      learner     workers (mean of 2)",
        "phase                 s     %          s     %  worst",
        "environment           -     -       2.00  66.7   75.0",
        "forward               -     -       1.00  33.3   50.0",
        "copy                  -     -          -     -      -",
        "wait               2.00  25.0          -     -      -",
        "evaluation            -     -          -     -      -",
        "backward           6.00  75.0          -     -      -",
        "optimiser             -     -          -     -      -",
        "graph                 -     -          -     -      -",
        "exploration           -     -          -     -      -",
        "publishing            -     -          -     -      -",
        "callbacks             -     -          -     -      -",
        "setup                 -     -          -     -      -",
        "other              0.00   0.0          -     -      -",
        "total              8.00 100.0       3.00 100.0",
    ]


def test_a_serial_run_has_no_column_of_workers() -> None:
    table = profile_of({"forward": 1.0}).table()
    assert "worker" not in table and table.splitlines()[-1].split() == ["total", "1.00", "100.0"]


def test_shares_are_those_since_the_last_call() -> None:
    clock = Clock()
    profile = Profile(Stopwatch(clock))

    def spend(copy: float, other: float) -> None:
        with profile.stopwatch.phase("other"):
            clock.now += other
            with profile.stopwatch.phase("copy"):
                clock.now += copy

    spend(1, 3)
    profile.add_worker(0, {"wait": 1.0})
    profile.add_worker(1, {"forward": 4.0})
    shares = profile.shares()
    assert shares.keys() == {f"{who}/{name}" for who in ("learner", "workers") for name in PHASES}
    assert (shares["learner/copy"], shares["learner/other"]) == (0.25, 0.75)
    assert (shares["workers/wait"], shares["workers/forward"]) == (0.2, 0.8)
    spend(1, 0)
    again = profile.shares()
    assert again["learner/copy"] == 1 and "workers/wait" not in again
    assert profile.shares() == {}
    assert profile.learner == {"copy": 2, "other": 3}, "the table is about the whole run"


# Whole runs.

PLAYS = {"environment", "forward", "copy", "setup", "other"}
LEARNS = {"copy", "evaluation", "backward", "optimiser", "publishing", "callbacks", "setup"}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every time that the learner's stopwatch has read off its clock."""
    looks: list[float] = []

    def clock() -> float:
        looks.append(time.monotonic())
        return looks[-1]

    monkeypatch.setattr(ncrl.agents.a3c, "stopwatch_for", lambda device: Stopwatch(clock))
    return looks


@pytest.mark.parametrize("n_workers", [0, 1])
def test_phases_of_a_run(n_workers: int, looks: list[float]) -> None:
    model = make_model(n_workers)
    model.learn(40)
    profile = model.time_spent
    assert profile is not None
    table = profile.table()
    if n_workers:
        assert profile.learner.keys() == LEARNS | {"wait", "other"}
        assert profile.workers.keys() == {0}
        assert profile.workers[0].keys() == PLAYS | {"wait"}
    else:
        assert profile.learner.keys() == LEARNS | PLAYS and profile.workers == {}
    # The last look is the table's, after the run.
    assert sum(profile.learner.values()) == pytest.approx(looks[-2] - looks[0])
    assert all(value >= 0 for value in profile.learner.values())
    assert shares_in(table)[-1] == [100.0] * (2 if n_workers else 1)


def test_a_second_training_adds_to_the_first() -> None:
    model = make_model(0)
    profile = model.learn(20).time_spent
    assert profile is not None
    profile.table()
    first = dict(profile.learner)
    model.learn(20, reset_num_timesteps=False)
    profile.table()
    assert all(profile.learner[name] >= seconds for name, seconds in first.items())
    assert sum(profile.learner.values()) > sum(first.values())


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, Seconds]]:
    """What every message of a worker says that it measured, and which of its lives sent it."""
    found: list[tuple[int | None, Seconds]] = []
    handle = WorkerPool._handle

    def keep(pool: Any, worker: Any, message: Any) -> None:
        if hasattr(message, "phases"):
            found.append((worker.number, dict(message.phases)))
        handle(pool, worker, message)

    monkeypatch.setattr(WorkerPool, "_handle", keep)
    return found


def test_nothing_is_measured_unless_asked_for(
    received: list[tuple[int | None, Seconds]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stopwatch, "charge", lambda self: pytest.fail("measured"))
    for n_workers in (0, 1):
        model = make_model(n_workers, profile=False)
        model.learn(20, log_interval=None)
        model.dump_logs()
        assert model.time_spent is None
    assert received and not any(phases for _, phases in received)


def test_a_saved_and_a_resumed_model(tmp_path: Path) -> None:
    """Profiles are about one run of the program; everything else goes on as without one."""
    model = make_model(0)
    model.learn(20)
    checkpoint = save_checkpoint(model, tmp_path)
    model.learn(20, reset_num_timesteps=False)
    resumed = make_model(0)
    resume(resumed, checkpoint)
    resumed.learn(20, reset_num_timesteps=False)
    assert resumed.time_spent is not None
    resumed.time_spent.table()
    assert resumed.time_spent.learner["environment"] > 0, "the games that were brought back too"
    assert A3C.load(checkpoint.path, device="cpu").time_spent is None
    loaded = A3C.load(checkpoint.path, device="cpu", profile=True)
    assert loaded.time_spent is not None and loaded.time_spent.learner == {}
    plain = make_model(0, profile=False)
    plain.learn(20)
    plain.learn(20, reset_num_timesteps=False)
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
        assert torch.equal(value, plain.policy.state_dict()[name]), name


@pytest.mark.parametrize("end", ["killed", "environments raise"])
def test_what_a_worker_measured_before_its_end_is_counted_once(
    end: str, tmp_path: Path, received: list[tuple[int | None, Seconds]]
) -> None:
    """The total is the sum over all messages of both incarnations."""
    trouble = Trouble("raise", at=23, flag=str(tmp_path / "flag"))
    env = TickingFactory(length=1, trouble=Trouble("none") if end == "killed" else trouble)
    model = make_model(1, env)

    class UntilReplaced(BaseCallback):
        def _on_step(self) -> bool:
            pool = self.model._pool
            if end == "killed" and self.n_calls == 20:
                os.kill(worker_pids(self.model)[0], signal.SIGKILL)
            restarted = pool.worker_restarts if end == "killed" else pool.env_restarts
            incarnations = {incarnation for incarnation, _ in received}
            return not (
                restarted and self.n_calls > 60 and len(incarnations) == 1 + (end == "killed")
            )

    model.learn(10**6, callback=UntilReplaced())
    profile = model.time_spent
    assert profile is not None and profile.workers.keys() == {0}
    assert {incarnation for incarnation, _ in received} == ({0, 1} if end == "killed" else {0})
    for name in PLAYS:
        expected = sum(phases.get(name, 0.0) for _, phases in received)
        assert profile.workers[0][name] == pytest.approx(expected)
    # Games are built once, and once more after the fault; the time of it is sent once each.
    assert sum("setup" in phases for _, phases in received) == 2
