"""Workers on many machines: actors of a Ray cluster, supervised as `pool` does processes.

Ray finds a place for every actor, carries rollouts and weights through its object store (once per
node), and tells when a process or a node is gone. What follows from that is decided here: an actor
is one incarnation of a worker; it is never restarted by Ray, so that nothing it was asked for is
silently played twice, but buried and replaced by the next incarnation, wherever there is a place.
Of the agents only this module imports ray, and only `A3C(cluster=...)` imports this module.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from torch import nn

from ncrl.agents.playing.buffers import RolloutShape, packed, unpacked
from ncrl.agents.playing.collector import NonFiniteError
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.pool import POLL_SECONDS, Delivery, Failures, Limits, WorkerError
from ncrl.agents.playing.weights import fill, flatten
from ncrl.agents.playing.worker import (
    EnvFailed,
    Failed,
    Games,
    Info,
    Played,
    PolicySpec,
    tail_of_traceback,
)
from ncrl.agents.runs.profiling import OFF, Profile, Stopwatch
from ncrl.shell.hardware import keep_freed_memory

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Rollouts a worker is asked for at a time: it plays the next one while the last one travels."""

PATIENCE = 60.0
"""Seconds after which a worker without a place in the cluster is worth a warning: a process alone
takes 10 to start on a busy machine."""

Call = Literal["sign", "start", "play"]
"""The methods of `Actor`."""


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Take part in a cluster. Where this process has joined one already, that is the one.

    Args:
        address: `auto` for the cluster that this machine belongs to, or `host:port` of its head.

    Raises:
        ValueError: if there is no such cluster, or if it does not let this process in.
    """
    if ray.is_initialized():
        yield
        return
    with _own_signals():
        try:
            _knock(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise ValueError(
                f"cannot join the Ray cluster {address!r} ({_sentence(error)}); start one with "
                "`ray start --head`, and this machine with `ray start --address=HOST:PORT` "
                "(docs/cluster.md)"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def cluster_cores(address: str) -> int:
    """Cores that a cluster offers to workers.

    Raises:
        ValueError: as `joined`.
    """
    with joined(address):
        return int(ray.cluster_resources().get("CPU", 0))


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """`ray.init` makes SIGTERM end the process at once; whoever handled it goes on doing so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ObjectWeights:
    """Weights as one object per version in the object store, which every node fetches once."""

    def __init__(self) -> None:
        self.version = -1
        self.reference: Any = None
        """Of the newest version. Older ones live as long as a worker is to read them."""

    def publish(self, module: nn.Module, version: int) -> None:
        """Make the module's present weights version `version`."""
        self.reference = ray.put(flatten(module).cpu().numpy())
        self.version = version


class ActorSpec(NamedTuple):
    """Everything an actor is given at its start."""

    factory: EnvFactory
    policy: PolicySpec
    shape: RolloutShape
    seed: int
    """Of this incarnation."""
    profile: bool
    info_keywords: Sequence[str]


class Sign(NamedTuple):
    """An actor's sign of life."""

    steps: int
    """Timesteps that it has played."""
    pid: int
    host: str


class PlayedBlock(NamedTuple):
    """A rollout on its way."""

    played: Played
    infos: list[Info]
    block: np.ndarray
    """The rollout, as `buffers.packed` lays it out."""


class Actor:
    """One incarnation of a worker, in a process of the cluster."""

    def __init__(self, spec: ActorSpec) -> None:
        keep_freed_memory()
        self._spec = spec
        self._steps = 0
        self._version = -1
        self._games: Games | None = None
        self._broken = False
        self._stopwatch = Stopwatch() if spec.profile else OFF

    def sign(self) -> Sign:
        """Answered in a thread of its own, also while a rollout is played."""
        return Sign(self._steps, os.getpid(), ray.util.get_node_ip_address())

    def start(self) -> None:
        """Build environments and policy."""
        spec = self._spec
        self._like = spec.shape.allocate()
        self._games = Games(
            spec.factory,
            spec.policy,
            spec.shape.n_envs,
            spec.seed,
            info_keywords=spec.info_keywords,
            stopwatch=self._stopwatch,
            beat=self._beat,
        )

    def _beat(self) -> None:
        self._steps += 1

    def play(self, version: int, flat: np.ndarray) -> PlayedBlock | EnvFailed | Failed:
        """Play a rollout under these weights. Environments that raise are built anew by the next
        call."""
        games, stopwatch = self._games, self._stopwatch
        assert games is not None
        with stopwatch.phase("other"):
            if self._broken:
                games.start()
                self._broken = False
            with stopwatch.phase("copy"):
                if version != self._version:
                    fill(games.policy, torch.tensor(flat))
                    self._version = version
                block, rollout = packed(self._like, torch.device("cpu"))
            try:
                played, infos = games.play(rollout, -1, version)
            except NonFiniteError as error:
                return Failed(tail_of_traceback(), str(error))
            except Exception:
                self._broken = True
                return EnvFailed(tail_of_traceback())
        return PlayedBlock(played._replace(phases=stopwatch.take()), infos, block.numpy())


@dataclass
class _Worker:
    """The learner's view of one worker."""

    index: int
    actor: Any = None
    """Handle of its present incarnation."""
    incarnation: int = 0
    calls: dict[Any, Call] = field(default_factory=dict)
    """What the actor has been asked for, by the reference of the answer."""
    place: str = ""
    """Where it runs; empty until it runs."""
    ready: bool = False
    """It has built its environments."""
    building: bool = True
    """It is building them now, for the first time or again."""
    failures: Failures = field(default_factory=Failures)
    restart_at: float | None = None
    last_sign: float = 0.0
    """Monotonic time of the latest answer that told of progress."""
    steps: int = 0
    """In its latest sign of life."""
    is_patient: bool = True
    """Nothing has been said yet about this incarnation having no place."""

    def asked(self, call: Call) -> int:
        """Answers of a kind that are still to come."""
        return sum(kind == call for kind in self.calls.values())

    def __str__(self) -> str:
        return f"worker {self.index} ({self.place or 'without a place'})"


class ActorPool:
    """Runs `n_workers` actors of `shape.n_envs` environments each; used as a context manager.

    The process must have `joined` the cluster.

    Raises:
        WorkerError: from any method, when workers cannot be kept running.
    """

    def __init__(
        self,
        factory: EnvFactory,
        policy: PolicySpec,
        shape: RolloutShape,
        weights: ObjectWeights,
        *,
        n_workers: int,
        seed: int,
        limits: Limits,
        profile: Profile | None = None,
        info_keywords: Sequence[str] = (),
    ) -> None:
        self.limits = limits
        self.worker_restarts = 0
        self.env_restarts = 0
        self._spec = ActorSpec(factory, policy, shape, seed, profile is not None, info_keywords)
        self._like = shape.allocate()
        self._weights = weights
        self._profile = profile
        self._played: deque[Delivery] = deque()
        self._workers = [_Worker(index) for index in range(n_workers)]
        self._kind = ray.remote(
            num_cpus=1,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"signs": 1},
        )(Actor)
        self._last_look = time.monotonic()
        self._starting = True

    def __enter__(self) -> ActorPool:
        for worker in self._workers:
            self._start(worker)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def starting(self) -> bool:
        """No rollout has been taken yet; the workers are building their environments."""
        return self._starting

    @property
    def places(self) -> list[str]:
        """Of the workers that run: `pid 4711 on 10.0.0.2`."""
        return [worker.place for worker in self._workers if worker.place]

    def take(self, count: int, give_up: Callable[[], bool]) -> list[Delivery] | None:
        """Wait for `count` played rollouts, the oldest first.

        Returns:
            None if `give_up()` became true meanwhile.
        """
        # Now, not when the rollouts before arrived: the weights are those after the update.
        self._ask(IN_FLIGHT)
        while len(self._played) < count or (self._starting and not self._all_ready()):
            if give_up():
                return None
            self._look(POLL_SECONDS)
            if len(self._played) < count:  # others may be gone: whoever is idle plays for them
                self._ask(1)
        self._starting = False
        return [self._played.popleft() for _ in range(count)]

    def release(self, deliveries: list[Delivery]) -> None:
        """Nothing: the memory of a rollout from elsewhere is its own."""

    def close(self) -> None:
        """End every actor. Never raises."""
        for worker in self._workers:
            self._bury(worker)

    def _all_ready(self) -> bool:
        """Whether everybody is ready who has, or may soon have, a place in the cluster."""
        patience_ends = time.monotonic() - self.limits.startup_timeout
        return all(w.ready or (not w.place and w.last_sign < patience_ends) for w in self._workers)

    # Calls and answers.

    def _ask(self, most: int) -> None:
        """Ask every worker that is ready for rollouts, up to `most` at a time."""
        for worker in self._workers:
            for _ in range(worker.asked("play"), most if worker.ready else 0):
                self._call(worker, "play", self._weights.version, self._weights.reference)

    def _call(self, worker: _Worker, call: Call, *arguments: Any) -> None:
        method = getattr(worker.actor, call)
        if call == "sign":
            method = method.options(concurrency_group="signs")
        worker.calls[method.remote(*arguments)] = call

    def _look(self, timeout: float) -> None:
        """Handle all answers that have arrived, then deaths, silence and replacements."""
        owners = {answer: worker for worker in self._workers for answer in worker.calls}
        if owners:
            arrived, _ = ray.wait(list(owners), num_returns=1, timeout=timeout)
            if arrived:
                arrived, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
            for answer in arrived:
                if answer in owners[answer].calls:  # else it is from an actor buried just now
                    self._receive(owners[answer], answer)
        else:
            time.sleep(timeout)
        now = time.monotonic()
        if now - self._last_look >= POLL_SECONDS:
            self._check_silence(now)
        for worker in self._workers:
            if worker.restart_at is not None and now >= worker.restart_at:
                self._start(worker)

    def _receive(self, worker: _Worker, answer: Any) -> None:
        call = worker.calls.pop(answer)
        try:
            result = ray.get(answer, timeout=self.limits.heartbeat_timeout)
        except RayTaskError as error:  # of our code, or of the environments while they were built
            self._replace(worker, "failed", str(error).strip(), hopeless=not worker.ready)
            return
        except RayError as error:
            never_began = isinstance(error, RayActorError) and error.actor_init_failed
            self._replace(worker, "died", _sentence(error), hopeless=never_began)
            return
        now = time.monotonic()
        if isinstance(result, Sign):
            if not worker.place or result.steps != worker.steps:
                worker.last_sign = now
            worker.place = f"pid {result.pid} on {result.host}"
            worker.steps = result.steps
            return
        worker.last_sign, worker.building = now, False
        if call == "start":
            worker.ready = True
        elif isinstance(result, EnvFailed):
            self._note_broken_envs(worker, result.reason)
        elif isinstance(result, Failed):
            raise NonFiniteError(result.not_finite)
        else:
            self._deliver(worker, result)

    def _deliver(self, worker: _Worker, result: PlayedBlock) -> None:
        worker.failures.in_a_row = 0
        # A copy: what lies in the object store is read-only, and fills it.
        rollout = unpacked(torch.tensor(result.block), self._like)
        self._played.append(Delivery(rollout, result.played, result.infos, worker.index))
        if self._profile is not None:
            self._profile.add_worker(worker.index, result.played.phases)

    def _note_broken_envs(self, worker: _Worker, reason: str) -> None:
        self.env_restarts += 1
        worker.building = True
        if too_often := worker.failures.count(self.limits):
            raise WorkerError(
                f"the environments of {worker} fail again and again, {too_often}:\n{reason}"
            )
        logger.warning(
            "%s: its environments failed and are built anew: %s", str(worker), _last_line(reason)
        )

    # Deaths, silence, replacements.

    def _check_silence(self, now: float) -> None:
        grace = now - self._last_look
        self._last_look = now
        limits = self.limits
        for worker in self._workers:
            if worker.actor is None:
                continue
            if worker.ready and not worker.asked("play"):
                worker.last_sign = now
            elif grace > 5 * POLL_SECONDS:  # this process was busy, and could hear nobody
                worker.last_sign += grace
            silence = now - worker.last_sign
            limit = limits.startup_timeout if worker.building else limits.heartbeat_timeout
            if not worker.place:
                self._note_waiting(worker, silence)
            elif silence > limit:
                self._replace(worker, f"gave no sign of life for {limit:g} s", "no answer")
            elif silence > limit / 4 and not worker.building and not worker.asked("sign"):
                self._call(worker, "sign")
        if all(
            not worker.place and now - worker.last_sign > limits.startup_timeout
            for worker in self._workers
        ):
            raise WorkerError(
                f"no worker has had a place in the cluster for {limits.startup_timeout:g} s: it "
                "has no free CPU, or does not get its processes started; see `ray status`"
            )

    def _note_waiting(self, worker: _Worker, seconds: float) -> None:
        if worker.is_patient and seconds > PATIENCE:
            worker.is_patient = False
            logger.warning(
                "worker %d waits for a free CPU of the cluster; the others play on", worker.index
            )

    def _replace(self, worker: _Worker, what: str, reason: str, *, hopeless: bool = False) -> None:
        """Bury an actor and set the time at which the next incarnation starts."""
        # What fails at the first start fails at every other one.
        hopeless = hopeless and worker.incarnation == 1
        who, has_run = str(worker), bool(worker.place)
        self._bury(worker)
        too_often = "at its start" if hopeless else worker.failures.count(self.limits)
        if too_often:
            raise WorkerError(f"{who} {what} {too_often}:\n{reason}")
        last = _last_line(reason)
        pause = worker.failures.pause(self.limits)
        # One that was sent to a node that was about to be found dead is none that was lost.
        level = logging.WARNING if has_run else logging.INFO
        logger.log(level, "%s %s (%s); a new one starts in %.1f s", *(who, what, last), pause)
        self.worker_restarts += has_run
        worker.restart_at = time.monotonic() + pause

    def _bury(self, worker: _Worker) -> None:
        """End the actor, if it still runs; nothing that it answers from now on counts."""
        if worker.actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(worker.actor)
        worker.actor, worker.calls = None, {}
        worker.place, worker.ready = "", False

    def _start(self, worker: _Worker) -> None:
        # A prime stride keeps the seeds of workers and of their successors apart.
        stride = 1_000_003 * (worker.index + len(self._workers) * worker.incarnation)
        worker.actor = self._kind.remote(self._spec._replace(seed=self._spec.seed + stride))
        worker.building, worker.restart_at = True, None
        worker.steps, worker.is_patient = 0, True
        worker.incarnation += 1
        worker.last_sign = time.monotonic()
        self._call(worker, "sign")
        self._call(worker, "start")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()


def _sentence(error: Exception) -> str:
    """What matters of an error of Ray, whose messages are pages long."""
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached"
    text = str(error).strip()
    match = re.search(r"[^.\n]*\bbecause\b[^.\n]*", text)
    return match[0].strip() if match else (text.splitlines() or [type(error).__name__])[0][:200]


__all__ = ["Actor", "ActorPool", "ObjectWeights", "cluster_cores", "joined"]
