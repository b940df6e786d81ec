"""Workers on many machines: actors of a Ray cluster, supervised as processes are (`supervision`).

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from torch import nn

from ncrl.agents.playing.buffers import RolloutShape
from ncrl.agents.playing.collector import NonFiniteError
from ncrl.agents.playing.supervision import (
    POLL_SECONDS,
    Delivery,
    Incarnation,
    Pool,
    PoolSpec,
    WorkerError,
)
from ncrl.agents.playing.weights import fill, flatten
from ncrl.agents.playing.worker import EnvFailed, Games, Info, Played, picklable
from ncrl.agents.profiling import OFF, Stopwatch
from ncrl.shell.hardware import keep_freed_memory
from ncrl.shell.tensors import tensors_in

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Rollouts a worker is asked for at a time: it plays the next one while the last one travels."""

PATIENCE = 60.0
"""Seconds after which a worker without a place in the cluster is worth a warning: a process
takes several to start, and many on a busy machine."""

PlayedArrays = tuple[Played, list[Info], list[np.ndarray]]
"""A rollout on its way through the cluster: what was told of it, and its tensors."""


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


class Actor:
    """One incarnation of a worker, in a process of the cluster. `make_games` is that of `PoolSpec`:
    it still needs the seed, and what only this process has."""

    def __init__(
        self, make_games: Callable[..., Games], shape: RolloutShape, seed: int, profile: bool
    ) -> None:
        keep_freed_memory()
        self._stopwatch = Stopwatch() if profile else OFF
        self._make_games = partial(
            make_games, seed=seed, stopwatch=self._stopwatch, beat=self._beat
        )
        self._shape = shape
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

    def play(self, version: int, flat: np.ndarray) -> PlayedArrays | EnvFailed:
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
                rollout = self._shape.allocate()
            result = games.play(rollout, -1, version)
        if isinstance(result, EnvFailed):
            self._is_broken = True
            return result
        played, infos = result
        infos = [(row, i, picklable(info)) for row, i, info in infos]
        return played, infos, [tensor.numpy() for tensor in tensors_in(rollout)]


@dataclass
class _Worker(Incarnation):
    actor: Any = None
    """Its handle, once it is started."""
    calls: dict[Any, str] = field(default_factory=dict)
    """The methods that were called, by the reference of the answer that is still to come."""
    steps: int = 0
    """In its latest sign of life."""
    has_warned: bool = False
    """Whether a warning has said that it has no place."""

    def asked(self, call: str) -> int:
        """How many answers of a method are still to come."""
        return list(self.calls.values()).count(call)

    def awaited(self) -> list[Any]:
        """Answers to receive next. Of rollouts that is the first one alone, even if a later one has
        arrived before it: demonstrations are cut out of successive rollouts."""
        later = [answer for answer, call in self.calls.items() if call == "play"][1:]
        return [answer for answer in self.calls if answer not in later]


class ActorPool(Pool[_Worker]):
    """Workers that are actors of the cluster that this process has `joined`."""

    def __init__(self, spec: PoolSpec, module: nn.Module) -> None:
        super().__init__(spec, _Worker)
        remote = ray.remote(
            num_cpus=1,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"signs": 1},
        )
        self._actor = partial(
            remote(Actor).remote,
            make_games=spec.make_games(),
            shape=spec.shape,
            profile=spec.profile is not None,
        )
        self.publish(module)

    def take(self, give_up: Callable[[], bool]) -> list[Delivery] | None:
        # Asked now, not as soon as the last rollouts arrived: now there are the weights after them.
        self._ask(self._workers, IN_FLIGHT)
        return super().take(give_up)

    def publish(self, module: nn.Module) -> None:
        """One object per version in the object store, which every node fetches once."""
        # Older versions live as long as a worker is to read them.
        self._weights = ray.put(flatten(module).cpu().numpy())
        self.version += 1

    def _all_ready(self) -> bool:
        """Workers count that have a place in the cluster, or may still get one soon."""
        late = time.monotonic() - self.spec.limits.startup_timeout
        return all(not w.building or (not w.place and w.last_sign < late) for w in self._workers)

    def _ask(self, workers: list[_Worker], most: int) -> None:
        """Ask those that are ready for rollouts, up to `most` at a time."""
        for worker in workers:
            for _ in range(worker.asked("play"), 0 if worker.building else most):
                answer = worker.actor.play.remote(self.version, self._weights)
                worker.calls[answer] = "play"

    def _ask_for_sign(self, worker: _Worker) -> None:
        worker.calls[worker.actor.sign.options(concurrency_group="signs").remote()] = "sign"

    def _look(self, timeout: float) -> None:
        """Handle all answers that have arrived, then deaths, silence and replacements."""
        if self._missing():  # others may be gone: whoever is idle plays for them
            self._ask(self._workers, 1)
        owners = {answer: worker for worker in self._workers for answer in worker.awaited()}
        if not owners:
            time.sleep(timeout)
        elif ray.wait(list(owners), num_returns=1, timeout=timeout)[0]:
            for answer in ray.wait(list(owners), num_returns=len(owners), timeout=0)[0]:
                if answer in owners[answer].calls:  # else it is from an actor buried just now
                    self._receive(owners[answer], answer)
        if time.monotonic() - self._last_look >= POLL_SECONDS:
            self._check_silence()
        self._begin_those_due()

    def _receive(self, worker: _Worker, answer: Any) -> None:
        call = worker.calls.pop(answer)
        try:
            result = ray.get(answer, timeout=self.spec.limits.heartbeat_timeout)
        except RayTaskError as error:  # of our code, or of the environments while they were built
            if isinstance(error.cause, NonFiniteError):
                raise error.cause from None
            self._replace(worker, "failed", str(error).strip(), at_start=self.starting)
            return
        except RayError as error:
            never_began = getattr(error, "actor_init_failed", False)
            self._replace(worker, "died", _sentence(error), at_start=never_began)
            return
        now = time.monotonic()
        if call == "sign":
            if result != (worker.steps, worker.place):
                worker.last_sign = now
            worker.steps, worker.place = result
            return
        worker.last_sign, worker.building = now, False
        if isinstance(result, EnvFailed):
            self._ask([worker], 1)
            self._note_broken_envs(worker, result.reason)
        elif call == "play":
            played, infos, arrays = result
            rollout = self.spec.shape.allocate()
            # A copy: what lies in the object store is read-only, and fills it.
            for tensor, array in zip(tensors_in(rollout), arrays, strict=True):
                tensor.numpy()[...] = array
            self._deliver(worker, rollout, played, infos)

    def _check_silence(self) -> None:
        deaf_for = self._deaf_for()
        now = time.monotonic()
        for worker in [w for w in self._workers if w.actor is not None]:
            if not worker.building and not worker.asked("play"):
                worker.last_sign = now
            else:
                worker.last_sign += deaf_for
            silence, patience = now - worker.last_sign, self._patience(worker)
            if not worker.place:
                if silence > PATIENCE and not worker.has_warned:
                    worker.has_warned = True
                    what = "still waits for a CPU of the cluster, or for its process to start"
                    logger.warning("worker %d %s", worker.index, what)
            elif silence > patience:
                self._replace(worker, f"gave no sign of life for {patience:g} s", "no answer")
            elif silence > patience / 4 and not worker.building and not worker.asked("sign"):
                self._ask_for_sign(worker)
        startup = self.spec.limits.startup_timeout
        if all(not w.place and now - w.last_sign > startup for w in self._workers):
            raise WorkerError(
                f"no worker has had a place in the cluster for {startup:g} s: it has no free CPU, "
                "or does not get its processes started; see `ray status`"
            )

    def _bury(self, worker: _Worker) -> None:
        """End the actor; nothing that it answers from now on counts."""
        if worker.actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(worker.actor)
        worker.calls = {}

    def _start(self, worker: _Worker) -> None:
        worker.actor = self._actor(seed=self._seed(worker))
        self._ask_for_sign(worker)
        worker.calls[worker.actor.start.remote()] = "start"


def _sentence(error: Exception) -> str:
    """What matters of an error of Ray, whose messages are pages long."""
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached"
    text = str(error).strip()
    match = re.search(r"[^.\n]*\bbecause\b[^.\n]*", text)
    return match[0].strip() if match else (text.splitlines() or [type(error).__name__])[0][:200]
