"""The pool of worker processes: started, watched, replaced, and always ended.

One pipe per worker, thrown away with it: a worker killed in the middle of a message harms nobody
else. Every worker plays into slots of its own. Their numbers are all that is handed round, and the
pool knows where each is: free, at the worker, or played. Nothing here waits without a time-out.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

import torch
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper

from ncrl.agents.playing.buffers import Rollout, RolloutShape
from ncrl.agents.playing.collector import NonFiniteError
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.weights import SharedWeights
from ncrl.agents.playing.worker import (
    EXIT_NO_GUARD,
    EnvFailed,
    Failed,
    Info,
    Message,
    Played,
    PolicySpec,
    Ready,
    WorkerSpec,
    worker_main,
)
from ncrl.agents.runs.profiling import Profile

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # longest the pool waits before it looks at its workers again
WINDOW_SECONDS = 600.0  # in which failures of a worker are counted whatever it played between them
FAILURES_PER_WINDOW = 4
LONGEST_PAUSE = 60.0  # seconds before a replacement, however many there were

SLOTS_PER_WORKER = 3
"""The rollout that a worker plays, the one that it goes on with, so that it never waits for a
learner in the middle of an update, and the one that the learner copies."""

# What a worker finds before it imports torch: processes, not threads, share out the cores.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1"
)

NO_GUARD = (
    "a worker process imports your file again, which must not start another training: put what "
    'starts it under `if __name__ == "__main__":`, or use n_workers=0'
)

# Of a worker that ended before it was set up, and so could not send its traceback.
NO_START = "it said why above, while it imported your file again as worker processes do"


class WorkerError(RuntimeError):
    """The workers cannot go on; the message carries the reason of the one that failed last."""


class Delivery(NamedTuple):
    """One played rollout."""

    rollout: Rollout  # a view of its slot; valid until `release`
    played: Played
    infos: list[Info]
    worker: int


@dataclass(frozen=True)
class Limits:
    """When the pool gives up on a worker, and on itself."""

    heartbeat_timeout: float = 60.0  # seconds that a worker with work may go without a timestep
    startup_timeout: float = 180.0  # seconds that it may take to build its environments
    max_restarts: int = 5
    """Deaths, or environment failures, of one worker without a rollout between them. With rollouts
    between them it may have `FAILURES_PER_WINDOW` times as many in `WINDOW_SECONDS`."""
    first_pause: float = 0.5  # seconds before a first replacement; doubles with each further death


@dataclass
class Failures:
    """Of one worker, and what follows from them."""

    in_a_row: int = 0  # without a rollout between them
    times: list[float] = field(default_factory=list)  # of those in the last `WINDOW_SECONDS`

    def count(self, limits: Limits) -> str:
        """One more; returns how many there were if they were too many."""
        now = time.monotonic()
        self.in_a_row += 1
        self.times = [*(then for then in self.times if then >= now - WINDOW_SECONDS), now]
        if self.in_a_row > limits.max_restarts:
            return f"{self.in_a_row} times in a row"
        if len(self.times) > FAILURES_PER_WINDOW * limits.max_restarts:
            return f"{len(self.times)} times in {WINDOW_SECONDS / 60:.0f} minutes"
        return ""

    def pause(self, limits: Limits) -> float:
        """Seconds before the next replacement."""
        return min(LONGEST_PAUSE, limits.first_pause * 2 ** min(self.in_a_row - 1, 30))


@dataclass
class _Worker:
    """The parent's view of one worker."""

    index: int
    process: SpawnProcess | None = None
    connection: Connection | None = None
    ready: bool = False  # it has built its environments at least once
    building: bool = True  # it is building them now, for the first time or again
    slots: deque[int] = field(default_factory=deque)  # that it holds, the one it plays first
    free: deque[int] = field(default_factory=deque)  # slots that it may be given
    failures: Failures = field(default_factory=Failures)
    infos: list[Info] = field(default_factory=list)  # of the rollout that it announces next
    incarnation: int = 0
    restart_at: float | None = None
    last_sign: float = 0.0  # time of its latest heartbeat, message or task
    last_beat: int = 0
    traceback: str = ""

    def __str__(self) -> str:
        return f"worker {self.index} (pid {self.process.pid if self.process else None})"


class WorkerPool:
    """Runs `n_workers` processes of `shape.n_envs` environments each; used as a context manager.

    Any method raises WorkerError when workers cannot be kept running.
    """

    def __init__(
        self,
        factory: EnvFactory,
        policy: PolicySpec,
        shape: RolloutShape,
        weights: SharedWeights,
        *,
        n_workers: int,
        seed: int,
        limits: Limits,
        profile: Profile | None = None,
        info_keywords: Sequence[str] = (),
    ) -> None:
        self.limits = limits
        self.worker_restarts = self.env_restarts = 0
        self.starting = True  # no rollout has been taken yet
        self._profile = profile
        self._spec = WorkerSpec(
            seed=seed,
            factory=CloudpickleWrapper(factory),
            policy=CloudpickleWrapper(policy),
            slots=shape.allocate(SLOTS_PER_WORKER * n_workers),
            weights=weights,
            heartbeats=torch.zeros(n_workers, dtype=torch.int64).share_memory_(),
            profile=profile is not None,
            info_keywords=info_keywords,
        )
        for tensor in self._spec.slots.tensors():
            tensor.share_memory_()
        self._played: deque[Delivery] = deque()
        self._workers = [_Worker(index) for index in range(n_workers)]
        for slot in range(SLOTS_PER_WORKER * n_workers):
            self._workers[slot % n_workers].free.append(slot)
        self._last_look = time.monotonic()

    def __enter__(self) -> WorkerPool:
        try:
            for worker in self._workers:
                self._start(worker)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        """End every worker: asked first, then killed. Never raises, never leaves one behind."""
        for worker in self._workers:
            if worker.connection is not None:
                with contextlib.suppress(OSError):
                    worker.connection.send(None)
        deadline = time.monotonic() + 1.0
        for worker in self._workers:
            if worker.process is not None:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            self._bury(worker)

    def take(self, count: int, give_up: Callable[[], bool]) -> list[Delivery] | None:
        """Wait for `count` played rollouts, the oldest first; None if `give_up()` became true.

        They are given back with `release`.
        """
        # At the start everybody is waited for: else the first worker would play all rollouts.
        while len(self._played) < count or (
            self.starting and not all(worker.ready for worker in self._workers)
        ):
            if give_up():
                return None
            self._look(POLL_SECONDS)
        self.starting = False
        return [self._played.popleft() for _ in range(count)]

    def release(self, deliveries: list[Delivery]) -> None:
        """Free the slots of rollouts the learner has copied, and hand them out again."""
        for delivery in deliveries:
            self._workers[delivery.worker].free.append(delivery.played.slot)
        self._look(0.0)

    # What happens in one look: messages, deaths, silence, replacements, new tasks.

    def _look(self, timeout: float) -> None:
        connections = {w.connection: w for w in self._workers if w.connection is not None}
        for connection in wait(list(connections), timeout):
            self._receive(connections[connection])  # type: ignore[index]
        self._check_silence()
        now = time.monotonic()
        for worker in self._workers:
            if worker.restart_at is not None and now >= worker.restart_at:
                self._start(worker)
        self._hand_out()

    def _receive(self, worker: _Worker) -> None:
        """Handle all that a worker has sent; the end of its pipe is its death."""
        assert worker.connection is not None
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                self._handle(worker, worker.connection.recv())
            return
        self._replace(worker, "died")

    def _handle(self, worker: _Worker, message: Message) -> None:
        worker.last_sign = time.monotonic()
        if isinstance(message, Ready):
            worker.ready, worker.building = True, False
        elif isinstance(message, list):
            worker.infos.extend(message)
        elif isinstance(message, Played):
            assert worker.slots[0] == message.slot, "a slot is in exactly one place"
            worker.slots.popleft()
            worker.failures.in_a_row = 0
            rollout = self._spec.slots.slot(message.slot)
            self._played.append(Delivery(rollout, message, worker.infos, worker.index))
            worker.infos = []
            if self._profile is not None:
                self._profile.add_worker(worker.index, message.phases)
        elif isinstance(message, EnvFailed):
            self.env_restarts += 1
            worker.building = True
            last = message.reason.strip().splitlines()[-1]
            logger.warning("%s: its environments failed and are built anew: %s", str(worker), last)
            if too_often := worker.failures.count(self.limits):
                raise WorkerError(
                    f"the environments of worker {worker.index} fail again and again, {too_often}:"
                    f"\n{message.reason}"
                )
        elif isinstance(message, Failed):
            worker.traceback = message.traceback
            if message.not_finite:
                raise NonFiniteError(message.not_finite)

    def _check_silence(self) -> None:
        """Replace workers whose environments hang."""
        now = time.monotonic()
        # This process was busy or stopped: nobody could have been heard meanwhile.
        grace = now - self._last_look
        self._last_look = now
        for worker in self._workers:
            if worker.process is None:
                continue
            beat = int(self._spec.heartbeats[worker.index].item())
            if beat != worker.last_beat or (not worker.building and not worker.slots):
                worker.last_beat, worker.last_sign = beat, now
            elif grace > 5 * POLL_SECONDS:
                worker.last_sign += grace
            limits = self.limits
            limit = limits.startup_timeout if worker.building else limits.heartbeat_timeout
            if now - worker.last_sign > limit:
                self._replace(worker, f"gave no sign of life for {limit:g} s")

    def _replace(self, worker: _Worker, what: str) -> None:
        """Bury a worker and set the time at which its successor starts."""
        who = str(worker)
        # What fails at the first start fails at every other one.
        first_start = worker.incarnation == 1 and not worker.ready
        if worker.process is not None and first_start and not worker.traceback:
            worker.process.join(1.0)
            if worker.process.exitcode == EXIT_NO_GUARD:
                raise WorkerError(NO_GUARD)
            if (worker.process.exitcode or 0) > 0:  # not killed: it ended by itself
                worker.traceback = NO_START
        hopeless = first_start and bool(worker.traceback)
        self._bury(worker)
        if too_often := "at its start" if hopeless else worker.failures.count(self.limits):
            reason = f":\n{worker.traceback}" if worker.traceback else ""
            raise WorkerError(f"{who} {what} {too_often}{reason}")
        pause = worker.failures.pause(self.limits)
        (last,) = worker.traceback.strip().splitlines()[-1:] or ["no traceback"]
        logger.warning("%s %s (%s); a new one starts in %.1f s", who, what, last, pause)
        self.worker_restarts += 1
        worker.restart_at = time.monotonic() + pause

    def _bury(self, worker: _Worker) -> None:
        """Kill the process, drop its pipe, and take back its slots."""
        if worker.process is not None:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join(5.0)
            worker.process = None
        if worker.connection is not None:
            worker.connection.close()
            worker.connection = None
        worker.free.extend(worker.slots)
        worker.slots.clear()
        worker.infos = []

    def _start(self, worker: _Worker) -> None:
        context = multiprocessing.get_context("spawn")
        parent_end, child_end = context.Pipe()
        # A prime stride keeps the seeds of workers and of their successors apart.
        stride = 1_000_003 * (worker.index + len(self._workers) * worker.incarnation)
        spec = replace(self._spec, index=worker.index, seed=self._spec.seed + stride)
        process = context.Process(target=worker_main, args=(child_end, spec), daemon=True)
        with _for_children():
            process.start()
        child_end.close()
        worker.process, worker.connection = process, parent_end
        worker.ready, worker.building = False, True
        worker.restart_at, worker.traceback = None, ""
        worker.incarnation += 1
        worker.last_sign = time.monotonic()

    def _hand_out(self) -> None:
        """Give every worker that plays those of its slots that are free."""
        for worker in self._workers:
            while worker.free and worker.ready and worker.connection is not None:
                worker.slots.append(worker.free.popleft())
                with contextlib.suppress(OSError):  # the next look finds the end of its pipe
                    worker.connection.send(worker.slots[-1])


@contextlib.contextmanager
def _for_children() -> Iterator[None]:
    """Processes started inside have one thread, and SIGINT blocked until they are set up."""
    before = {name: value for name, value in os.environ.items() if name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    mask: set[signal.Signals] | None = None
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # the first start would do it, and unblock SIGINT
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # type: ignore[assignment]
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in ONE_THREAD:
            del os.environ[name]
        os.environ.update(before)
