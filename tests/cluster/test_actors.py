"""A3C whose workers are actors: a real cluster of one node, really killed actors."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

import ncrl.agents.learning.learner as learner
from ncrl.agents import A3C, Limits, NonFiniteError, WorkerError
from tests.agents.conftest import Episodes, wait_until
from tests.agents.environments import TickingFactory, Trouble

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
SECONDS = 170
"""No test waits longer than this, whatever hangs."""

QUICK = Limits(heartbeat_timeout=60, startup_timeout=120, max_restarts=2, first_pause=0.2)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    def alarm(*_: Any) -> None:
        raise RuntimeError("the test did not end in time")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes may take minutes to start where many tests run; warnings are counted here."""
    monkeypatch.setattr("ncrl.agents.playing.cluster.PATIENCE", 1000.0)


@pytest.fixture(autouse=True)
def no_actor_left_behind(cluster: None, watchdog: None) -> Iterator[None]:
    yield
    assert wait_until(lambda: actors() == [], 20.0), actors()


def actors() -> list[int]:
    """Process ids of the actors on this machine that belong to this test's cluster."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::Actor" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def make_model(env: Any, **options: Any) -> A3C:
    defaults: dict[str, Any] = {"n_workers": 1, "n_envs": 2, "n_steps": 5, "limits": QUICK}
    defaults |= {"seed": 1, "device": "cpu", "policy_kwargs": {"lstm_hidden_size": 8}}
    return A3C("MlpLstmPolicy", env, **({"cluster": "auto"} | defaults | options))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and r.name.startswith("ncrl")
    ]


def test_two_updates_are_those_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update sees its own weights: all ratios are 1, and it is the update that a worker
    process leads to, bit for bit. The weights of later rollouts are newer."""
    differences: list[float] = []
    versions: list[int] = []
    loss = learner.actor_critic_loss

    def watched(policy: Any, lesson: Any, objective: Any) -> Any:
        result = loss(policy, lesson, objective)
        difference = result.evaluation.log_prob.detach() - lesson.rollout.log_prob
        differences.append(difference.abs().max().item())
        return result

    monkeypatch.setattr(learner, "actor_critic_loss", watched)
    here = make_model("CartPole-v1", cluster=None)
    here.learn(10)
    there = make_model("CartPole-v1", profile=True)
    there.learn(10)
    assert max(differences) < 1e-6
    for name, tensor in here.policy.state_dict().items():
        assert torch.equal(tensor, there.policy.state_dict()[name]), name
    assert there.time_spent is not None and there.time_spent.workers[0]["environment"] > 0

    class Lag(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            versions.append(self.num_timesteps // 10 - 1 - round(self.model.policy_lag))

    there.learn(60, callback=Lag())
    assert versions == sorted(versions) and versions[-1] >= 3


def test_a_killed_actor_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """Episodes of one timestep: each timestep that is counted has its own info."""
    victims: list[int] = []

    def kill(model: A3C) -> None:
        victims.extend(actors()[:1])
        os.kill(victims[0], signal.SIGKILL)

    model = make_model(TickingFactory(length=1, pause=0.002), n_workers=2, n_envs=4)
    episodes = Episodes(at=23, act=kill, enough=lambda pids: len(pids) == 3)
    model.learn(10**6, callback=episodes)
    assert len(episodes.ends) == model.num_timesteps
    episodes.assert_nothing_was_counted_twice()
    assert episodes.restarts == (1, 0)
    (warning,) = warnings_of(caplog)
    assert re.match(rf"worker \d \(pid {victims[0]} on [\d.]+\) died \(.+\)", warning)
    assert len({seed for _, seed, *_ in episodes.ends}) == 3, "fresh games in every incarnation"


def test_an_environment_that_raises_is_rebuilt_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = Trouble("raise", at=14, flag=str(tmp_path / "flag"))
    model, episodes = make_model(TickingFactory(length=1, trouble=trouble)), Episodes()
    model.learn(200, callback=episodes)
    assert model.num_timesteps == 200 == len(episodes.ends)
    episodes.assert_nothing_was_counted_twice()
    assert episodes.restarts == (0, 1)
    (warning,) = warnings_of(caplog)
    assert re.match(r"worker 0 \(pid \d+ on ", warning) and "the cable came off" in warning
    assert len({pid for pid, *_ in episodes.ends}) == 1, "in the same process"
    assert len({seed for _, seed, *_ in episodes.ends}) == 2


def test_an_environment_that_raises_again_and_again() -> None:
    model = make_model(TickingFactory(trouble=Trouble("raise", at=3)))
    with pytest.raises(WorkerError, match=r"worker 0.*again and again[^$]*the cable came off"):
        model.learn(1000)


def test_an_actor_that_dies_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    """Deaths without a rollout between them are counted over incarnations, up to a limit."""
    limits = Limits(startup_timeout=120, max_restarts=1, first_pause=0.05)
    model = make_model(TickingFactory(trouble=Trouble("exit", at=3)), limits=limits)
    with pytest.raises(WorkerError, match=r"worker 0 \(pid .* died 2 times in a row"):
        model.learn(1000)
    assert len(warnings_of(caplog)) == 1


def test_weights_that_are_not_finite_end_the_training_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No other actor could play with them either, and no environment has failed."""
    model = make_model("CartPole-v1")
    torch.nn.init.constant_(model.policy.action_net.weight, float("nan"))
    with pytest.raises(NonFiniteError, match="no finite probabilities any more"):
        model.learn(100)
    assert warnings_of(caplog) == []


def test_a_hanging_actor_is_found_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = Trouble("hang", at=12, flag=str(tmp_path / "flag"))
    limits = Limits(heartbeat_timeout=2, startup_timeout=120, first_pause=0.05)
    model = make_model(TickingFactory(length=1, trouble=trouble), limits=limits)
    episodes = Episodes()
    model.learn(100, callback=episodes)
    assert model.num_timesteps == 100 and episodes.restarts == (1, 0)
    (warning,) = warnings_of(caplog)
    assert re.search(r"worker 0 \(pid \d+ on \S+\) gave no sign of life for 2 s", warning)
    episodes.assert_nothing_was_counted_twice()


def test_a_slow_rollout_is_no_silence(caplog: pytest.LogCaptureFixture) -> None:
    """A timestep within the limit is a sign of life, however many of them a rollout has."""
    limits = Limits(heartbeat_timeout=1.5, startup_timeout=120)
    model = make_model(TickingFactory(pause=0.2), n_steps=20, limits=limits)
    model.learn(40)
    assert warnings_of(caplog) == []


def test_an_actor_that_cannot_start() -> None:
    model = make_model(TickingFactory(trouble=Trouble("build")))
    with pytest.raises(WorkerError, match=r"failed at its start:\n[^$]*no such game"):
        model.learn(100)


def test_an_actor_without_a_place_is_waited_for_no_longer_than_allowed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers on two cores: two of them play."""
    monkeypatch.setattr("ncrl.agents.playing.cluster.PATIENCE", 0.5)
    limits = Limits(startup_timeout=25)
    model = make_model(TickingFactory(), n_workers=3, n_envs=6, limits=limits)
    model.learn(300)
    assert model.num_timesteps == 300
    assert "still waits for a CPU of the cluster" in warnings_of(caplog)[-1]


def test_rollouts_of_one_worker_come_in_the_order_of_play(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the network brings later ones first: demonstrations are cut out of successive
    rollouts."""
    wait = ray.wait

    def newest_first(answers: list[Any], num_returns: int, timeout: float) -> Any:
        ready, _ = wait(answers, num_returns=len(answers), timeout=timeout)
        return ready[-1:], [answer for answer in answers if answer not in ready[-1:]]

    monkeypatch.setattr(ray, "wait", newest_first)
    episodes = Episodes()
    make_model(TickingFactory(length=1)).learn(100, callback=episodes)
    ticks = [tick for _, _, i, tick in episodes.ends if i == 0]
    assert ticks == sorted(ticks) and len(ticks) == 50


class WithHandles(TickingFactory):
    """A game that ends shows the handle of its simulator."""

    def __call__(self, n_envs: int, seed: int) -> VecEnv:
        class Handles(VecEnvWrapper):
            def reset(self) -> np.ndarray:
                return self.venv.reset()

            def step_wait(self) -> tuple:
                *answer, infos = self.venv.step_wait()
                return *answer, [info | {"handle": threading.Lock()} for info in infos]

        return Handles(super().__call__(n_envs, seed))


def test_what_cannot_be_pickled_stays_with_the_actor(caplog: pytest.LogCaptureFixture) -> None:
    episodes = Episodes()
    make_model(WithHandles(length=1)).learn(20, callback=episodes)
    assert len(episodes.ends) == 20 and warnings_of(caplog) == []


SCRIPT = """
import signal, sys
import ray
from ncrl.agents import A3C
from stable_baselines3.common.callbacks import BaseCallback
from tests.agents.environments import TickingFactory

class Tell(BaseCallback):
    def _on_step(self):
        if self.n_calls == 10:
            print("playing", flush=True)
        return True

if __name__ == "__main__":
    model = A3C("MlpLstmPolicy", TickingFactory(), n_workers=1, n_envs=2, n_steps=5, seed=1,
                device="cpu", policy_kwargs=dict(lstm_hidden_size=8), cluster=sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: model.request_stop())
    model.learn(10**9, callback=Tell())
    print("end", ray.is_initialized(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_actor_behind(number: signal.Signals, tmp_path: Path) -> None:
    """A process that joins for the length of `learn`; its own handlers of signals stay in force."""
    (tmp_path / "script.py").write_text(SCRIPT)
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), address],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "playing\n"
    assert len(actors()) == 1
    started = time.monotonic()
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert "Traceback" not in error, error
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert out.split() == ["end", "False"] and process.returncode == 0
        assert time.monotonic() - started < 30
