"""What the engine must survive (rows F1 to F31): real processes, really killed."""

import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

import ncrl.agents.learning.learner
import ncrl.agents.playing.pool
import ncrl.agents.playing.sizes
import ncrl.agents.playing.supervision
from ncrl.agents import A3C, Limits, NonFiniteError, WorkerError
from ncrl.agents.playing.sizes import check_open_files
from ncrl.shell.tensors import tensors_in
from tests.agents.conftest import (
    Episodes,
    living_children,
    shared_memory_of,
    wait_until,
    warnings_of,
    weights,
    worker_pids,
)
from tests.agents.environments import THREAD_VARIABLES, TickingFactory, Trouble, in_worker

ROOT = Path(__file__).parents[2]
QUICK = Limits(heartbeat_timeout=60, startup_timeout=60, max_restarts=2, first_pause=0.2)


def make_model(env: Any, **options: Any) -> A3C:
    defaults: dict[str, Any] = {"n_workers": 1, "n_envs": 2, "n_steps": 5, "limits": QUICK}
    defaults |= {"seed": 1, "device": "cpu", "policy_kwargs": {"lstm_hidden_size": 8}}
    return A3C("MlpLstmPolicy", env, **(defaults | options))


def finite(model: A3C) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.policy.parameters())


def count_slots(model: A3C) -> list[int]:
    """Every slot number, wherever it is: free, at a worker, or played."""
    pool = model._pool
    assert pool is not None
    held = [slot for worker in pool._workers for slot in worker.slots]
    free = [slot for slots in pool._free for slot in slots]
    return sorted([*held, *free, *(delivery.played.slot for delivery in pool._played)])


class Ends(Episodes):
    """Also checks at every row that no slot is lost; keeps how many threads workers have."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.threads: set[int] = set()
        self.environ: set[str | None] = set()

    def _on_step(self) -> bool:
        if self.model._pool is not None:
            assert count_slots(self.model) == list(range(3 * self.model.n_workers))
        for info in self.locals["infos"]:
            if "episode" in info:
                self.threads.add(info["threads"])
                self.environ |= set(info["environ"].values())
        return super()._on_step()


def kill_first(model: A3C) -> None:
    os.kill(worker_pids(model)[0], signal.SIGKILL)


# Workers that die.


def test_f1_a_killed_worker_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Episodes of one timestep: each timestep that is counted has its own info."""
    victims = []

    def kill(model: A3C) -> None:
        victims.append(worker_pids(model)[0])
        kill_first(model)

    env = TickingFactory(length=1, log=str(tmp_path), together=2, pause=0.002)
    model = make_model(env, n_workers=2, n_envs=4)
    ends = Ends(at=23, act=kill, enough=lambda pids: len(pids) >= 3)
    model.learn(10**6, callback=ends)
    assert len(ends.ends) == model.num_timesteps
    ends.assert_nothing_was_counted_twice()
    (warning,) = warnings_of(caplog)
    assert re.search(rf"worker \d \(pid {victims[0]}\) died", warning)
    assert ends.restarts == (1, 0)
    seeds = [path.read_text() for path in tmp_path.iterdir()]
    assert len(seeds) == len(set(seeds)) == 3, "a fresh random stream for every process"
    assert finite(model)


def test_f2_workers_killed_at_any_moment_block_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """Kills follow each other at random rows: while reading weights, playing, sending."""
    rng = np.random.default_rng(0)

    class Killer(BaseCallback):
        killed = 0

        def _on_step(self) -> bool:
            if self.killed < 3 and worker_pids(self.model) and rng.random() < 0.05:
                time.sleep(rng.random() * 0.01)
                kill_first(self.model)
                self.killed += 1
            return self.killed < 3 or self.n_calls % 50 != 0

    killer, ends = Killer(), Ends(at=-1)
    model = make_model(TickingFactory(length=1), limits=Limits(max_restarts=9, first_pause=0.05))
    model.learn(10**6, callback=[killer, ends])
    assert killer.killed == 3 and finite(model)
    assert ends.restarts[0] >= 2
    ends.assert_nothing_was_counted_twice()


def stopped_while_sending(model: A3C) -> psutil.Process:
    """Wait until the worker is in the middle of a message that nobody receives."""
    worker = psutil.Process(worker_pids(model)[0])
    beats = model._pool._worker_spec.heartbeats
    last = -1

    def blocked() -> bool:
        nonlocal last
        before, last = last, int(beats[0].item())
        return last == before and worker.status() == psutil.STATUS_SLEEPING

    assert wait_until(lambda: (time.sleep(0.3), blocked())[1])
    return worker


def test_f2_a_worker_killed_inside_a_message() -> None:
    """The message is larger than a pipe's buffer, so half of it is in the pipe."""

    def kill(model: A3C) -> None:
        stopped_while_sending(model).kill()

    trouble = Trouble("big info")
    model, ends = make_model(TickingFactory(length=1, trouble=trouble)), Ends(at=12, act=kill)
    model.learn(100, callback=ends)
    assert model.num_timesteps == 100 and ends.restarts == (1, 0)
    ends.assert_nothing_was_counted_twice()


def test_f6_a_worker_stopped_inside_a_message() -> None:
    def stop(model: A3C) -> None:
        stopped_while_sending(model).suspend()

    trouble, limits = Trouble("big info"), Limits(heartbeat_timeout=2.0, first_pause=0.05)
    model = make_model(TickingFactory(length=1, trouble=trouble), limits=limits)
    ends = Ends(at=12, act=stop)
    model.learn(100, callback=ends)
    assert model.num_timesteps == 100 and ends.restarts == (1, 0)


def test_f3_an_environment_that_cannot_be_built(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(TickingFactory(trouble=Trouble("build")), n_workers=2, n_envs=4)
    with pytest.raises(WorkerError, match=r"worker \d \(pid \d+\).*at its start") as error:
        model.learn(1000)
    assert str(error.value).count("Traceback") == 1
    assert "OSError: no such game" in str(error.value)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("error", [ConnectionResetError, BrokenPipeError, EOFError])
def test_f3_a_simulator_that_hangs_up_is_not_taken_for_the_parent(error: type[Exception]) -> None:
    def connect(n_envs: int, seed: int) -> Any:
        if in_worker():
            raise error("the simulator hung up")
        return TickingFactory()(n_envs, seed)

    with pytest.raises(WorkerError, match=r"(?s)at its start.*the simulator hung up"):
        make_model(connect).learn(1000)


def test_f4_a_worker_that_dies_again_and_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env = TickingFactory(trouble=Trouble("exit", at=3), log=str(tmp_path))
    with pytest.raises(WorkerError, match=r"worker 0 \(pid \d+\) died 3 times in a row"):
        make_model(env).learn(1000)
    pauses = re.findall(r"a new one starts in (\S+) s", caplog.text)
    assert len(pauses) == 2 and float(pauses[1]) > float(pauses[0])
    seeds = [path.read_text() for path in tmp_path.iterdir()]
    assert len(seeds) == len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("kind", "at", "words"),
    [
        ("raise", 14, "RuntimeError: the cable came off"),
        ("nan observation", 13, "environment 0 returned observation nan at step 2"),
    ],
)
def test_f5_f18_an_environment_that_fails_once(
    kind: str, at: int, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rollout is thrown away, it is built anew; worker, environment and step are named."""
    trouble = Trouble(kind, at=at, flag=str(tmp_path / "flag"))
    env = TickingFactory(length=2 if kind == "nan observation" else 1, trouble=trouble)
    model, ends = make_model(env), Ends(at=-1)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, callback=ends, log_interval=19)
    model.logger.close()
    assert model.num_timesteps == 200 and ends.restarts == (0, 1) and finite(model)
    (warning,) = warnings_of(caplog)
    assert re.match(r"worker 0 \(pid \d+\)", warning) and words in warning
    header, *_, last = (tmp_path / "progress.csv").read_text().splitlines()
    row = dict(zip(header.split(","), last.split(","), strict=True))
    assert row["time/env_restarts"] == "1" and row["time/worker_restarts"] == "0"

    seeds = {seed for _, seed, _, _ in ends.ends}
    assert len(seeds) == 2, "rebuilt environments do not repeat their games"
    if env.length == 1:
        assert len(ends.ends) == 200
        ends.assert_nothing_was_counted_twice()
        last_ticks = [max(end[3] for end in ends.ends if end[1] == seed) for seed in seeds]
        assert min(last_ticks) == 10, "two rollouts of 5; the third was not finished"


def test_f5_an_environment_that_fails_again_and_again() -> None:
    model = make_model(TickingFactory(trouble=Trouble("raise", at=3)))
    with pytest.raises(WorkerError, match=r"worker 0.*again and again[^$]*the cable came off"):
        model.learn(1000)


@pytest.mark.parametrize(("kind", "words"), [("raise", "cable came off"), ("exit", "died")])
def test_f4_failures_with_rollouts_between_them(
    kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is in a row, but they do not go on for ever."""
    monkeypatch.setattr(ncrl.agents.playing.supervision, "FAILURES_PER_WINDOW", 1)
    env = TickingFactory(length=5, trouble=Trouble(kind, at=13))
    model = make_model(env, limits=Limits(max_restarts=1, first_pause=0.2))
    with pytest.raises(WorkerError, match=r"2 times in 10 minutes") as error:
        model.learn(100_000)
    assert words in str(error.value) and model.num_timesteps >= 20


def test_f4_failures_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncrl.agents.playing.supervision, "FAILURES_PER_WINDOW", 1)
    monkeypatch.setattr(ncrl.agents.playing.supervision, "WINDOW_SECONDS", 0.0)
    model = make_model(TickingFactory(length=5, trouble=Trouble("raise", at=13)))
    model.learn(200)
    assert model.num_timesteps == 200


@pytest.mark.parametrize("kind", ["nan reward", "nan observation"])
def test_f18_serial_training_stops_and_names_the_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.agents.environments.in_worker", lambda: True)
    model = make_model(TickingFactory(trouble=Trouble(kind, at=8)), n_workers=0)
    with pytest.raises(ValueError, match=rf"environment 0 returned {kind[4:]} nan at step 2"):
        model.learn(100)
    assert model._n_updates == 1 and finite(model)


# Workers that say nothing.


def test_f6_a_hanging_environment_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = Trouble("hang", at=12, flag=str(tmp_path / "flag"))
    limits = Limits(heartbeat_timeout=1.5, startup_timeout=60, first_pause=0.05)
    model, ends = make_model(TickingFactory(length=1, trouble=trouble), limits=limits), Ends(-1)
    model.learn(100, callback=ends)
    assert model.num_timesteps == 100 and ends.restarts == (1, 0)
    (warning,) = warnings_of(caplog)
    assert re.search(r"worker 0 \(pid \d+\) gave no sign of life for 1.5 s", warning)
    ends.assert_nothing_was_counted_twice()


def test_f6_rebuilding_may_take_as_long_as_building(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`startup_timeout`, not `heartbeat_timeout`, limits how long environments are built."""
    (tmp_path / "log").mkdir()
    trouble = Trouble("raise", at=8, flag=str(tmp_path / "flag"))
    env = TickingFactory(trouble=trouble, log=str(tmp_path / "log"), second_build=2.5)
    limits = Limits(heartbeat_timeout=1.5, startup_timeout=60, first_pause=0.05)
    model, ends = make_model(env, limits=limits), Ends(at=-1)
    model.learn(100, callback=ends)
    assert "no sign of life" not in caplog.text
    assert ends.restarts == (0, 1)


def test_f6_f27_a_short_stop_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """Stopped for less than the time-out; and a learner that is busy for longer than it."""
    stopped = []

    def resume() -> None:
        psutil.Process(stopped[0]).resume()

    def stop(model: A3C) -> None:
        stopped.append(worker_pids(model)[0])
        psutil.Process(stopped[0]).suspend()
        threading.Timer(1.0, resume).start()

    class Busy(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 60:
                time.sleep(3.5)
            return True

    limits = Limits(heartbeat_timeout=3.0, startup_timeout=60)
    model, ends = make_model(TickingFactory(length=1), limits=limits), Ends(at=12, act=stop)
    model.learn(200, callback=[ends, Busy()])
    assert stopped and model.num_timesteps == 200
    assert ends.restarts == (0, 0) and warnings_of(caplog) == []


# Parents that die or are interrupted.

SCRIPT = """
import os, signal, sys, threading, time
from stable_baselines3.common.callbacks import BaseCallback
from ncrl.agents import A3C
from tests.agents.conftest import worker_pids
from tests.agents.environments import TickingFactory, Trouble

class Tell(BaseCallback):
    def _on_step(self):
        if self.n_calls == 10:
            print("workers", *worker_pids(self.model), flush=True)
        return True

if __name__ == "__main__":
    # A shell without job control starts background jobs, such as these tests, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = TickingFactory({trouble})
    model = A3C("MlpLstmPolicy", env, n_workers=1, n_envs=2, n_steps=5, seed=1,
                device="cpu", policy_kwargs=dict(lstm_hidden_size=8))
    {setup}
    try:
        model.learn({total}, callback=Tell())
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print("end", flush=True)
"""


def run_script(folder: Path, setup: str = "pass", trouble: str = "") -> subprocess.Popen:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(setup=setup, trouble=trouble, total=10**9))
    return subprocess.Popen(
        [sys.executable, str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # signals to its group do not reach this process
    )


def pids_told(process: subprocess.Popen) -> set[int]:
    assert process.stdout is not None
    word, *pids = process.stdout.readline().split()
    assert word == "workers" and len(pids) >= 1
    return {int(pid) for pid in pids}


@pytest.mark.parametrize("moment", ["hanging", "starting"])
def test_f7_nobody_outlives_a_killed_parent(moment: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    trouble = Trouble("hang", at=80, flag=str(flag))
    process = run_script(tmp_path, trouble=f"trouble={trouble}")
    if moment == "starting":
        assert wait_until(lambda: len(living_children(process.pid)) >= 1)
    else:
        pids_told(process)
        assert wait_until(flag.exists)
    everybody = psutil.Process(process.pid).children(recursive=True)
    assert len(everybody) >= 1
    process.kill()
    process.wait(10)
    # A worker that starts looks for its parent once it has imported torch, which takes seconds.
    _, alive = psutil.wait_procs(everybody, timeout=20 if moment == "starting" else 5)
    for child in alive:
        child.kill()
    process.communicate()
    assert alive == []
    assert shared_memory_of({process.pid, *(child.pid for child in everybody)}) == []


def test_a_keyboard_interrupt_leaves_no_children(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[psutil.Process] = []

    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 8:
                seen.extend(living_children())
                raise KeyboardInterrupt
            return True

    model = make_model(TickingFactory())
    with pytest.raises(KeyboardInterrupt):
        model.learn(10**6, callback=Interrupt())
    assert seen and not any(child.is_running() for child in seen)
    assert warnings_of(caplog) == [] and model._pool is None


def test_f8_an_interrupt_of_the_group_shows_no_workers_traceback(tmp_path: Path) -> None:
    process = run_script(tmp_path)
    pids_told(process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.split() == ["interrupted", "end"]
    assert "Traceback" not in err
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_f8_an_interrupt_while_workers_start_shows_no_traceback_either(tmp_path: Path) -> None:
    """The parent asks itself to stop; its workers are still importing torch."""
    process = run_script(
        tmp_path, setup="signal.signal(signal.SIGINT, lambda *_: model.request_stop())"
    )

    def starting() -> bool:
        return len(living_children(process.pid)) >= 1

    assert wait_until(starting)
    time.sleep(0.3)  # into the imports of a worker, which take seconds
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err, err


# Numbers that are not.


@pytest.mark.parametrize("n_workers", [0, 1])
def test_f19_a_learning_rate_of_a_million(n_workers: int) -> None:
    """Skipped updates or the error made for it; the weights stay finite."""
    model = make_model(TickingFactory(), n_workers=n_workers, learning_rate=1e6)
    try:
        model.learn(500)
    except NonFiniteError as error:
        assert "learning rate is 1e+06" in str(error)
    assert finite(model)
    assert torch.isfinite(model.policy.optimizer.state_dict()["state"][0]["square_avg"]).all()


def poison(monkeypatch: pytest.MonkeyPatch, factor: Callable[[], float]) -> None:
    """The loss of every update is multiplied by what `factor` returns then."""
    loss = ncrl.agents.learning.learner.actor_critic_loss

    def poisoned(*arguments: Any) -> Any:
        result = loss(*arguments)
        return result._replace(total=result.total * factor())

    monkeypatch.setattr(ncrl.agents.learning.learner, "actor_critic_loss", poisoned)


def test_f19_a_gradient_that_is_not_finite_is_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(TickingFactory(), n_workers=0)
    bad = {2: math.nan, 3: math.inf, 5: math.nan}
    poison(monkeypatch, lambda: bad.get(model._n_updates + 1, 1.0))
    changed = []

    class Watch(BaseCallback):
        before: Any = None

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            now = torch.cat([p.detach().flatten() for p in self.model.policy.parameters()])
            if self.before is not None:
                changed.append(not torch.equal(now, self.before))
            self.before = now

    model.learn(80, callback=Watch(), log_interval=None)
    assert changed == [True, False, False, True, False, True, True]
    assert model.logger.name_to_value["train/skipped_updates"] == 3
    assert len(warnings_of(caplog)) == 3
    assert "update 2 skipped" in warnings_of(caplog)[0]


def test_f19_ten_skipped_updates_in_a_row_end_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(monkeypatch, lambda: math.inf)
    model = make_model(TickingFactory(), n_workers=0)
    before = weights(model)
    with pytest.raises(NonFiniteError, match="10 updates in a row"):
        model.learn(10**6)
    assert model._n_updates == 10
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_f19_skipped_updates_with_others_between_them_do_not_end_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(TickingFactory(), n_workers=0)
    poison(monkeypatch, lambda: math.inf if model._n_updates % 4 else 1.0)
    model.learn(200)
    assert (model._n_updates, model._skipped_updates) == (20, 15)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_f19_weights_that_nobody_can_play_with(n_workers: int) -> None:
    """They may be finite: what comes out of them is not."""
    options = {"use_rms_prop": False, "learning_rate": 1e30}
    model = make_model(TickingFactory(), n_workers=n_workers, **options)
    with pytest.raises(NonFiniteError, match="learning rate"):
        model.learn(100_000)


# The machine.


def test_f25_shared_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(path: str) -> Any:
        asked.append(path)
        return usage(64 << 20, 60 << 20, 4_000_000)

    model = make_model(TickingFactory(), n_steps=20_000, n_envs=64)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    started = []
    monkeypatch.setattr(ncrl.agents.playing.pool.WorkerPool, "_start", lambda *a: started.append(a))
    said = r"need (\d+) MB .*/dev/shm has 4 MB.*lower n_envs \(--games\) or n_steps"
    with pytest.raises(ValueError, match=said):
        model.learn(100)
    assert asked == ["/dev/shm"] and started == []


def test_f25_games_that_do_not_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64 << 20, 60 << 20, 4_000_000))
    large = bytes(5_000_000)
    model = make_model(lambda n, seed: large and TickingFactory()(n, seed))
    with pytest.raises(ValueError, match=r"need 5 MB .*/dev/shm has 4 MB"):
        model.learn(100)


def test_f26_the_limit_of_open_files_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(resource, "setrlimit", lambda *limits: asked.append(limits))
    check_open_files(4)
    assert asked == []
    check_open_files(64)
    (((_, (needed, hard))),) = asked
    assert needed > 256 and hard == 256
    monkeypatch.undo()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    with pytest.raises(ValueError, match=rf"64 workers need .*{needed}.* 256.*ulimit -n"):
        check_open_files(64)


def test_f20_rollouts_larger_than_the_memory_are_never_made() -> None:
    with pytest.raises(ValueError, match=r"need [\d,]+ MB of memory and [\d,]+ MB are free"):
        make_model(TickingFactory(), n_workers=0, n_steps=10**10)


def test_f27_a_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TickingFactory(), n_workers=0)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    day, real = 86_400 * 10**9, time.time_ns
    set_back = Ends(at=3, act=lambda _: monkeypatch.setattr(time, "time_ns", lambda: real() - day))
    model.learn(40, callback=set_back, log_interval=1)
    model.logger.close()
    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = header.split(",").index("time/fps")
    assert all(0 <= int(row.split(",")[column]) < 10**7 for row in rows) and len(rows) == 4


def test_what_workers_take_of_the_machine_is_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """F25, shared memory; F26, open files; F31, threads: of two workers at their first rows."""
    sizes = ncrl.agents.playing.sizes
    asked: list[int] = []
    monkeypatch.setattr(sizes, "check_shared_memory", asked.append)
    environ = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    files = len(os.listdir("/proc/self/fd"))
    taken, opened, threads = [], [], []

    def look(model: A3C) -> None:
        spec = model._pool._worker_spec
        slots = sum(tensor.nbytes for tensor in tensors_in(spec.slots))
        taken.append(slots + spec.weights._copies.nbytes)
        opened.append(len(os.listdir("/proc/self/fd")) - files)
        threads.extend(psutil.Process(pid).num_threads() for pid in worker_pids(model))

    ends = Ends(at=1, act=look)
    make_model(TickingFactory(length=1), n_workers=2).learn(40, callback=ends)
    assert asked == taken, "slots and weights, to within the pages that the system adds"
    assert opened[0] <= 2 * sizes.FILES_PER_WORKER + sizes.FILES_FOR_SHARING
    assert threads == [1, 1], "no pool of BLAS or OpenCV beside it"
    assert ends.threads == {1} and ends.environ == {"1"}
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == environ


def test_f31_trainings_in_threads_leave_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = ncrl.agents.playing.pool.resource_tracker.ensure_running

    def slowly() -> None:
        time.sleep(0.5)  # so that the other thread starts its worker meanwhile
        started()

    monkeypatch.setattr(ncrl.agents.playing.pool.resource_tracker, "ensure_running", slowly)
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    models = [make_model(TickingFactory()) for _ in range(2)]
    threads = [threading.Thread(target=model.learn, args=(20,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [model.num_timesteps for model in models] == [20, 20]
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == before
