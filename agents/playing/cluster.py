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
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from torch import nn

from ncrl.agents.playing.buffers import RolloutShape, packed, unpacked
from ncrl.agents.playing.collector import NonFiniteError
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.pool import POLL_SECONDS, Delivery, Failures, Limits, WorkerError
from ncrl.agents.playing.weights import fill, flatten
from ncrl.agents.playing.worker import EnvFailed, Games, Info, Played, PolicySpec, tail_of_traceback
from ncrl.agents.runs.profiling import OFF, Profile, Stopwatch
from ncrl.shell.hardware import keep_freed_memory

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Rollouts a worker is asked for at a time: it plays the next one while the last one travels."""

PATIENCE = 60.0
"""Seconds after which a worker without a place in the cluster is worth a warning: a process alone
takes 10 to start, and many more on a busy machine."""

PlayedBlock = tuple[Played, list[Info], np.ndarray]
"""A rollout on its way, as `buffers.packed` lays it out, and what was told of it."""


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
    handler = signal.getsignal(signal.SIGTERM)
    try:
        head = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
        host, _, port = head.rpartition(":")
        if port.isdigit():  # where nobody listens, Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ValueError(
            f"cannot join the Ray cluster {address!r} ({_sentence(error)}); start one with "
            "`ray start --head`, and this machine with `ray start --address=HOST:PORT` "
            "(docs/cluster.md)"
        ) from error
    finally:  # Ray makes SIGTERM end the process at once
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_cores(address: str) -> int:
    """Cores that a cluster offers to workers; ValueError as of `joined`."""
    with joined(address):
        return int(ray.cluster_resources().get("CPU", 0))


class ObjectWeights:
    """Weights as one object per version in the object store, which every node fetches once."""

    version = -1
    reference: Any = None
    """Of the newest version. Older ones live as long as a worker is to read them."""

    def publish(self, module: nn.Module, version: int) -> None:
        """Make the module's present weights version `version`."""
        self.reference = ray.put(flatten(module).cpu().numpy())
        self.version = version


class Actor:
    """One incarnation of a worker, in a process of the cluster. `make_games` is `Games`, but for
    the seed and what only this process has."""

    def __init__(
        self, make_games: Callable[..., Games], shape: RolloutShape, seed: int, profile: bool
    ) -> None:
        keep_freed_memory()
        self._stopwatch = Stopwatch() if profile else OFF
        self._make_games = partial(
            make_games, seed=seed, stopwatch=self._stopwatch, beat=self._beat
        )
        self._like = shape.allocate()
        self._steps = 0
        self._version = -1
        self._is_broken = False

    def sign(self) -> tuple[int, str]:
        """Timesteps played until now, and where. Answered in a thread of its own at any time."""
        return self._steps, f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    def start(self) -> None:
        """Build environments and policy."""
        self._games = self._make_games()

    def _beat(self) -> None:
        self._steps += 1

    def play(self, version: int, flat: np.ndarray) -> PlayedBlock | EnvFailed:
        """Play a rollout under these weights. Environments that raise are built anew by the next
        call; NonFiniteError is raised."""
        games, stopwatch = self._games, self._stopwatch
        with stopwatch.phase("other"):
            if self._is_broken:
                games.start()
                self._is_broken = False
            with stopwatch.phase("copy"):
                if version != self._version:
                    fill(games.policy, torch.tensor(flat))
                    self._version = version
                block, rollout = packed(self._like, torch.device("cpu"))
            try:
                played, infos = games.play(rollout, -1, version)
            except NonFiniteError:
                raise
            except Exception:
                self._is_broken = True
                return EnvFailed(tail_of_traceback())
        return played._replace(phases=stopwatch.take()), infos, block.numpy()


@dataclass
class _Worker:
    """One incarnation of a worker, as the learner sees it."""

    index: int
    incarnation: int = 0
    failures: Failures = field(default_factory=Failures)
    """Of all incarnations."""
    starts_at: float = 0.0
    """Monotonic time."""
    actor: Any = None
    """Its handle, once it is started."""
    calls: dict[Any, str] = field(default_factory=dict)
    """The methods that were called, by the reference of the answer that is still to come."""
    place: str = ""
    """Where it runs; empty until it runs."""
    building: bool = True
    """It is building its environments, for the first time or again."""
    last_sign: float = field(default_factory=time.monotonic)
    """Monotonic time of the latest answer that told of progress."""
    steps: int = 0
    """In its latest sign of life."""
    is_missed: bool = False
    """It has been said that it has no place."""

    def asked(self, call: str) -> int:
        """Answers of a method that are still to come."""
        return list(self.calls.values()).count(call)

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
        self.starting = True
        """No rollout has been taken yet; the workers are building their environments."""
        self._seed = seed
        self._like = shape.allocate()
        self._weights = weights
        self._profile = profile
        self._played: deque[Delivery] = deque()
        self._workers = [_Worker(index) for index in range(n_workers)]
        remote = ray.remote(
            num_cpus=1,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"signs": 1},
        )
        games = partial(Games, factory, policy, shape.n_envs, info_keywords=info_keywords)
        self._actor = partial(
            remote(Actor).remote, make_games=games, shape=shape, profile=profile is not None
        )
        self._last_look = time.monotonic()

    def __enter__(self) -> ActorPool:
        for worker in self._workers:
            self._start(worker)
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self._workers:
            self._bury(worker)

    def take(self, count: int, give_up: Callable[[], bool]) -> list[Delivery] | None:
        """Wait for `count` rollouts, the oldest first; None if `give_up()` became true."""
        # Now, not when the rollouts before arrived: the weights are those after the update.
        self._ask(self._workers, IN_FLIGHT)
        while len(self._played) < count or (self.starting and not self._all_ready()):
            if give_up():
                return None
            self._look(POLL_SECONDS)
            if len(self._played) < count:  # others may be gone: whoever is idle plays for them
                self._ask(self._workers, 1)
        self.starting = False
        return [self._played.popleft() for _ in range(count)]

    def release(self, deliveries: list[Delivery]) -> None:
        """Nothing: a rollout from elsewhere has memory of its own."""

    def _all_ready(self) -> bool:
        """Whether everybody is ready who has, or may soon have, a place in the cluster."""
        late = time.monotonic() - self.limits.startup_timeout
        return all(not w.building or (not w.place and w.last_sign < late) for w in self._workers)

    def _ask(self, workers: list[_Worker], most: int) -> None:
        """Ask those that are ready for rollouts, up to `most` at a time."""
        for worker in workers:
            for _ in range(worker.asked("play"), 0 if worker.building else most):
                answer = worker.actor.play.remote(self._weights.version, self._weights.reference)
                worker.calls[answer] = "play"

    def _ask_for_sign(self, worker: _Worker) -> None:
        worker.calls[worker.actor.sign.options(concurrency_group="signs").remote()] = "sign"

    def _look(self, timeout: float) -> None:
        """Handle all answers that have arrived, then deaths, silence and replacements."""
        owners = {answer: worker for worker in self._workers for answer in worker.calls}
        if not owners:
            time.sleep(timeout)
        elif ray.wait(list(owners), num_returns=1, timeout=timeout)[0]:
            for answer in ray.wait(list(owners), num_returns=len(owners), timeout=0)[0]:
                if answer in owners[answer].calls:  # else it is from an actor buried just now
                    self._receive(owners[answer], answer)
        now = time.monotonic()
        if now - self._last_look >= POLL_SECONDS:
            self._check_silence(now)
        for worker in self._workers:
            if worker.actor is None and now >= worker.starts_at:
                self._start(worker)

    def _receive(self, worker: _Worker, answer: Any) -> None:
        call = worker.calls.pop(answer)
        try:
            result = ray.get(answer, timeout=self.limits.heartbeat_timeout)
        except RayTaskError as error:  # of our code, or of the environments while they were built
            if isinstance(error.cause, NonFiniteError):
                raise error.cause from None
            self._replace(worker, "failed", str(error).strip(), hopeless=self.starting)
            return
        except RayError as error:
            never_began = getattr(error, "actor_init_failed", False)
            self._replace(worker, "died", _sentence(error), hopeless=never_began)
            return
        now = time.monotonic()
        if call == "sign":
            if result != (worker.steps, worker.place):
                worker.last_sign = now
            worker.steps, worker.place = result
            return
        worker.last_sign, worker.building = now, False
        if isinstance(result, EnvFailed):
            self._note_broken_envs(worker, result.reason)
        elif call == "play":
            played, infos, block = result
            worker.failures.in_a_row = 0
            # A copy: what lies in the object store is read-only, and fills it.
            rollout = unpacked(torch.tensor(block), self._like)
            self._played.append(Delivery(rollout, played, infos, worker.index))
            if self._profile is not None:
                self._profile.add_worker(worker.index, played.phases)

    def _note_broken_envs(self, worker: _Worker, reason: str) -> None:
        self.env_restarts += 1
        if too_often := worker.failures.count(self.limits):
            what = f"the environments of {worker} fail again and again, {too_often}"
            raise WorkerError(f"{what}:\n{reason}")
        last = reason.strip().splitlines()[-1]
        logger.warning("%s: its environments failed and are built anew: %s", str(worker), last)
        self._ask([worker], 1)
        worker.building = True

    def _check_silence(self, now: float) -> None:
        grace, self._last_look = now - self._last_look, now
        startup = self.limits.startup_timeout
        for worker in [w for w in self._workers if w.actor is not None]:
            if not worker.building and not worker.asked("play"):
                worker.last_sign = now
            elif grace > 5 * POLL_SECONDS:  # this process was busy, and could hear nobody
                worker.last_sign += grace
            silence = now - worker.last_sign
            limit = startup if worker.building else self.limits.heartbeat_timeout
            if not worker.place:
                if silence > PATIENCE and not worker.is_missed:
                    worker.is_missed = True
                    what = "still waits for a CPU of the cluster, or for its process to start"
                    logger.warning("worker %d %s", worker.index, what)
            elif silence > limit:
                self._replace(worker, f"gave no sign of life for {limit:g} s", "no answer")
            elif silence > limit / 4 and not worker.building and not worker.asked("sign"):
                self._ask_for_sign(worker)
        if all(not w.place and now - w.last_sign > startup for w in self._workers):
            raise WorkerError(
                f"no worker has had a place in the cluster for {startup:g} s: it has no free CPU, "
                "or does not get its processes started; see `ray status`"
            )

    def _replace(self, worker: _Worker, what: str, reason: str, *, hopeless: bool = False) -> None:
        """Bury an actor and set the time at which the next incarnation starts."""
        self._bury(worker)
        # What fails at the first start fails at every other one.
        at_start = "at its start" if hopeless and worker.incarnation == 0 else ""
        if too_often := at_start or worker.failures.count(self.limits):
            raise WorkerError(f"{worker} {what} {too_often}:\n{reason}")
        pause = worker.failures.pause(self.limits)
        if worker.place:  # else it was sent to a node that was about to be found dead
            self.worker_restarts += 1
            what = f"{what} ({reason.splitlines()[-1].strip()})"
            logger.warning("%s %s; a new one starts in %.1f s", str(worker), what, pause)
        self._workers[worker.index] = _Worker(
            worker.index, worker.incarnation + 1, worker.failures, time.monotonic() + pause
        )

    def _bury(self, worker: _Worker) -> None:
        """End the actor, if it still runs; nothing that it answers from now on counts."""
        if worker.actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(worker.actor)
        worker.calls = {}

    def _start(self, worker: _Worker) -> None:
        # A prime stride keeps the seeds of workers and of their successors apart.
        stride = 1_000_003 * (worker.index + len(self._workers) * worker.incarnation)
        worker.actor = self._actor(seed=self._seed + stride)
        worker.last_sign = time.monotonic()
        self._ask_for_sign(worker)
        worker.calls[worker.actor.start.remote()] = "start"


def _sentence(error: Exception) -> str:
    """What matters of an error of Ray, whose messages are pages long."""
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached"
    text = str(error).strip()
    match = re.search(r"[^.\n]*\bbecause\b[^.\n]*", text)
    return match[0].strip() if match else (text.splitlines() or [type(error).__name__])[0][:200]


__all__ = ["Actor", "ActorPool", "ObjectWeights", "cluster_cores", "joined"]
