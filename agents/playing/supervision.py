"""What every pool of workers has in common, wherever they run: processes here, or actors elsewhere.

A worker that dies, hangs or cannot go on is buried, and its next incarnation starts after a pause;
one that fails too often ends the training with its reason. Nothing here waits without a time-out.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from torch import nn

from ncrl.agents.playing.buffers import Rollout, RolloutShape
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.worker import Games, Info, Played, PolicySpec
from ncrl.agents.profiling import Profile

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # longest a pool waits before it looks at its workers again
WINDOW_SECONDS = 600.0  # in which failures of a worker are counted whatever it played between them
FAILURES_PER_WINDOW = 4
LONGEST_PAUSE = 60.0  # seconds before a replacement, however many there were


class WorkerError(RuntimeError):
    """The workers cannot go on; the message carries the reason of the one that failed last."""


class Delivery(NamedTuple):
    """One played rollout."""

    rollout: Rollout  # valid until `release`
    played: Played
    infos: list[Info]
    worker: int


@dataclass(frozen=True)
class Limits:
    """When a pool replaces a worker, and when it gives up."""

    heartbeat_timeout: float = 60.0
    """Seconds that a worker may take for a timestep, while it has something to play."""
    startup_timeout: float = 180.0
    """Seconds that a worker may take to build its environments."""
    max_restarts: int = 5
    """How often one worker may die, or its environments fail, without a rollout in between. With
    rollouts in between, four times as often within ten minutes."""
    first_pause: float = 0.5
    """Seconds before a first replacement. They double with each further failure without a rollout
    in between, up to a minute."""


@dataclass
class Failures:
    """Counts the failures of one worker, and says what follows from them."""

    in_a_row: int = 0  # without a rollout between them
    times: list[float] = field(default_factory=list)  # of those in the last `WINDOW_SECONDS`

    def count(self, limits: Limits) -> str:
        """Count one more; returns in words how many there were if that is too many, else ""."""
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
class Incarnation:
    """One life of a worker, as the learner's process sees it."""

    index: int
    number: int = 0
    failures: Failures = field(default_factory=Failures)  # of all lives
    starts_at: float = 0.0  # monotonic time
    has_begun: bool = False
    building: bool = True  # it builds its environments, for the first time or again
    last_sign: float = field(default_factory=time.monotonic)  # monotonic time of its last sign
    place: str = ""  # where it runs; empty until it runs

    def __str__(self) -> str:
        return f"worker {self.index} ({self.place or 'without a place'})"


class PoolSpec(NamedTuple):
    """Who plays what."""

    factory: EnvFactory
    policy: PolicySpec
    shape: RolloutShape  # of one worker's rollout
    n_workers: int
    seed: int
    limits: Limits
    profile: Profile | None = None
    info_keywords: Sequence[str] = ()

    def make_games(self) -> Callable[..., Games]:
        """What makes a worker's `Games`, given a seed and what only its process has."""
        return partial(
            Games, self.factory, self.policy, self.shape.n_envs, info_keywords=self.info_keywords
        )


WorkerT = TypeVar("WorkerT", bound=Incarnation)


class Pool(ABC, Generic[WorkerT]):
    """Keeps `spec.n_workers` workers playing; used as a context manager.

    Raises:
        WorkerError: from any method, when workers cannot be kept running.
    """

    def __init__(self, spec: PoolSpec, new_worker: Callable[..., WorkerT]) -> None:
        self.spec = spec
        self.version = -1  # of the newest weights that were published
        self.worker_restarts = self.env_restarts = 0
        self.starting = True  # no rollout has been taken yet
        self._played: deque[Delivery] = deque()
        self._new_worker = new_worker
        self._workers = [new_worker(index) for index in range(spec.n_workers)]
        self._last_look = time.monotonic()

    def __enter__(self) -> Pool[WorkerT]:
        try:
            self._begin_those_due()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        """End every worker. Never raises, never leaves one behind."""
        for worker in self._workers:
            self._bury(worker)

    def take(self, give_up: Callable[[], bool]) -> list[Delivery] | None:
        """Wait for as many rollouts as there are workers; None if `give_up()` became true.

        The oldest come first, whoever played them. They are given back with `release`.
        """
        # At the start everybody is waited for: else the first worker would play all rollouts.
        while self._missing() or (self.starting and not self._all_ready()):
            if give_up():
                return None
            self._look(POLL_SECONDS)
        self.starting = False
        return [self._played.popleft() for _ in range(self.spec.n_workers)]

    def _missing(self) -> int:
        """Rollouts that still have to be played for the next batch."""
        return max(0, self.spec.n_workers - len(self._played))

    @abstractmethod
    def publish(self, module: nn.Module) -> None:
        """Make the module's present weights the next version, for workers to play with."""

    def release(self, deliveries: list[Delivery]) -> None:
        """Take back the memory of rollouts that the learner has copied, if it is the pool's."""

    @abstractmethod
    def _all_ready(self) -> bool:
        """Whether all workers play that are to be waited for at the start."""

    @abstractmethod
    def _look(self, timeout: float) -> None:
        """Wait for something to happen, at most so many seconds, then handle all that did."""

    @abstractmethod
    def _start(self, worker: WorkerT) -> None:
        """Begin a life."""

    @abstractmethod
    def _bury(self, worker: WorkerT) -> None:
        """End a life, if it lasts; nothing that comes from it counts any more."""

    def _seed(self, worker: WorkerT) -> int:
        """Seed of a life; a prime stride keeps those of all workers and lives apart."""
        return self.spec.seed + 1_000_003 * (worker.index + self.spec.n_workers * worker.number)

    def _deliver(
        self, worker: WorkerT, rollout: Rollout, played: Played, infos: list[Info]
    ) -> None:
        worker.failures.in_a_row = 0
        self._played.append(Delivery(rollout, played, infos, worker.index))
        if self.spec.profile is not None:
            self.spec.profile.add_worker(worker.index, played.phases)

    def _note_broken_envs(self, worker: WorkerT, reason: str) -> None:
        """A worker builds its environments anew, because they raised."""
        self.env_restarts += 1
        worker.building = True
        if too_often := worker.failures.count(self.spec.limits):
            what = f"the environments of worker {worker.index} fail again and again, {too_often}"
            raise WorkerError(f"{what}:\n{reason}")
        last = reason.strip().splitlines()[-1]
        logger.warning("%s: its environments failed and are built anew: %s", str(worker), last)

    def _deaf_for(self) -> float:
        """Seconds since the last look in which this process was busy or stopped, and deaf."""
        now = time.monotonic()
        gap, self._last_look = now - self._last_look, now
        return gap if gap > 5 * POLL_SECONDS else 0.0

    def _patience(self, worker: WorkerT) -> float:
        """Seconds that a worker may give no sign of life."""
        limits = self.spec.limits
        return limits.startup_timeout if worker.building else limits.heartbeat_timeout

    def _replace(self, worker: WorkerT, what: str, reason: str, *, at_start: bool = False) -> None:
        """Bury a worker and set the time at which its next life begins.

        Args:
            worker: the one that failed.
            what: what it did, such as "died".
            reason: told in the message if it is the last failure; its last line in a warning.
            at_start: whether it failed while it was being set up.
        """
        who = str(worker)
        self._bury(worker)
        # What fails at a first start would fail at every other one.
        hopeless = at_start and worker.number == 0
        if too_often := "at its start" if hopeless else worker.failures.count(self.spec.limits):
            raise WorkerError(f"{who} {what} {too_often}" + (f":\n{reason}" if reason else ""))
        pause = worker.failures.pause(self.spec.limits)
        if worker.place:  # else it never ran: its node was about to be found dead
            self.worker_restarts += 1
            (last,) = reason.strip().splitlines()[-1:] or ["no traceback"]
            logger.warning("%s %s (%s); a new one starts in %.1f s", who, what, last.strip(), pause)
        self._workers[worker.index] = self._new_worker(
            worker.index, worker.number + 1, worker.failures, time.monotonic() + pause
        )

    def _begin_those_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if not worker.has_begun and now >= worker.starts_at:
                worker.has_begun, worker.last_sign = True, now
                self._start(worker)
