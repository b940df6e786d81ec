"""A time-out for every test of the engine, and proof that none leaves a process behind."""

import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import ncrl.agents.learning.learner
from ncrl.agents import A3C

SECONDS = 90
"""No test waits longer than this, whatever hangs."""


class HungError(Exception):
    """Not `TimeoutError`: that is an OSError, which code around pipes may take for their end."""


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    def alarm(_signal: int, _frame: FrameType | None) -> None:
        raise HungError("the test did not end in time")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def living_children(pid: int | None = None) -> list[psutil.Process]:
    """Descendants that are no zombies, without multiprocessing's own resource tracker."""
    children = []
    for child in psutil.Process(pid or os.getpid()).children(recursive=True):
        try:
            tracker = any("resource_tracker" in word for word in child.cmdline())
            if not tracker and child.status() != psutil.STATUS_ZOMBIE:
                children.append(child)
        except psutil.NoSuchProcess:
            pass
    return children


def worker_pids(model: Any) -> list[int]:
    """Process ids of the living workers of a model."""
    processes = [worker.process for worker in model._pool._workers]
    return [process.pid for process in processes if process is not None and process.is_alive()]


class Episodes(BaseCallback):
    """Keeps the ends of episodes; acts once at a row; goes on until `enough`, at a batch's end."""

    def __init__(
        self,
        at: int = -1,
        act: Callable[[A3C], None] = lambda model: None,
        enough: Callable[[set[int]], bool] = lambda pids: False,
    ) -> None:
        super().__init__()
        self.at, self.act, self.enough = at, act, enough
        self.ends: list[tuple[int, int, int, int]] = []
        self.restarts = (0, 0)

    def _on_step(self) -> bool:
        model = self.model
        assert isinstance(model, A3C)
        if model._pool is not None:
            self.restarts = (model._pool.worker_restarts, model._pool.env_restarts)
        for i, info in enumerate(self.locals["infos"]):
            if "episode" in info:
                self.ends.append((info["pid"], info["seed"], i % 2, info["tick"]))
        if self.n_calls == self.at:
            self.act(model)
        # Only at the end of a batch, which may hold two rollouts of the same environments.
        done = self.enough({pid for pid, *_ in self.ends}) and self.n_calls % model.n_steps == 0
        return not done

    def assert_nothing_was_counted_twice(self) -> None:
        """Every environment's episodes arrive once and without a gap."""
        assert len(set(self.ends)) == len(self.ends)
        ticks: dict[tuple[int, int, int], list[int]] = {}
        for *who, tick in self.ends:
            ticks.setdefault((who[0], who[1], who[2]), []).append(tick)
        for played in ticks.values():
            assert sorted(played) == [n + 1 for n in range(len(played))]


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails with EFBIG, as a full disk does with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies, of the policy's parameters and buffers."""
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def assert_bit_equal(one: Any, other: Any) -> None:
    for name, value in weights(one).items():
        assert torch.equal(value, other.policy.state_dict()[name]), name


def shared_memory_of(pids: set[int]) -> list[str]:
    """Entries of /dev/shm that torch made in one of these processes: torch_PID_..."""
    found = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return [name for name in found if any(f"_{pid}_" in name for pid in pids)]


@pytest.fixture(autouse=True)
def nothing_left_behind(watchdog: None) -> Iterator[None]:
    """After a test: no child process and no shared memory of this one."""
    yield
    assert wait_until(lambda: not living_children(), 5.0), living_children()
    assert shared_memory_of({os.getpid()}) == []


@pytest.fixture
def log_rhos(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """For every update, what the learner takes for log p(a) minus what was recorded of it."""
    found: list[torch.Tensor] = []
    loss = ncrl.agents.learning.learner.actor_critic_loss

    def watched(policy: Any, lesson: Any, objective: Any) -> Any:
        result = loss(policy, lesson, objective)
        found.append(result.evaluation.log_prob.detach() - lesson.rollout.log_prob)
        return result

    monkeypatch.setattr(ncrl.agents.learning.learner, "actor_critic_loss", watched)
    return found
