"""Workers that are processes of this machine, and play into shared memory.

One pipe per process, thrown away with it: a worker killed in the middle of a message harms nobody
else. Every worker plays into slots of its own. Their numbers are all that is handed round, and the
pool knows where each is: free, at the worker, or played.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from torch import Tensor, nn

from ncrl.agents.playing.collector import NonFiniteError
from ncrl.agents.playing.sizes import SLOTS_PER_WORKER, check_shared_memory
from ncrl.agents.playing.supervision import Delivery, Incarnation, Pool, PoolSpec, WorkerError
from ncrl.agents.playing.weights import SharedWeights
from ncrl.agents.playing.worker import (
    EXIT_NO_GUARD,
    FROM_TERMINAL,
    EnvFailed,
    Failed,
    Info,
    Message,
    Played,
    Ready,
    WorkerSpec,
    worker_main,
)
from ncrl.shell.tensors import tensors_in

# For the import of torch in a worker: processes, not threads, share out the cores.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1"
)
STARTING = threading.Lock()  # the environment is shared by the trainings of several threads

NO_GUARD = (
    "a worker process imports your file again, which must not start another training: put what "
    'starts it under `if __name__ == "__main__":`, or use n_workers=0'
)

# Said of a worker that ended before it was set up, and so could not send its traceback.
NO_START = "it said why above, while it imported your file again as worker processes do"


@dataclass
class _Worker(Incarnation):
    process: SpawnProcess | None = None
    connection: Connection | None = None
    ready: bool = False  # it has built its environments at least once
    slots: deque[int] = field(default_factory=deque)  # that it holds, the one it plays first
    infos: list[Info] = field(default_factory=list)  # of the rollout that it announces next
    last_beat: int = 0
    traceback: str = ""


class WorkerPool(Pool[_Worker]):
    """Workers that are processes of this machine."""

    def __init__(self, spec: PoolSpec, module: nn.Module) -> None:
        super().__init__(spec, _Worker)
        slots = spec.shape.allocate(SLOTS_PER_WORKER * spec.n_workers)
        for tensor in tensors_in(slots):
            tensor.share_memory_()
        self._worker_spec = WorkerSpec(
            seed=spec.seed,
            make_games=handed_over(spec.make_games()),
            slots=slots,
            weights=SharedWeights(module),
            heartbeats=torch.zeros(spec.n_workers, dtype=torch.int64).share_memory_(),
            profile=spec.profile is not None,
        )
        self._free = [  # slots that each worker may be given
            deque(range(index, SLOTS_PER_WORKER * spec.n_workers, spec.n_workers))
            for index in range(spec.n_workers)
        ]
        self.publish(module)

    def __exit__(self, *_exception: object) -> None:
        """End every worker: asked first, then killed."""
        for worker in self._workers:
            if worker.connection is not None:
                with contextlib.suppress(OSError):
                    worker.connection.send(None)
        deadline = time.monotonic() + 1.0
        for worker in self._workers:
            if worker.process is not None:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        super().__exit__()

    def publish(self, module: nn.Module) -> None:
        self.version += 1
        self._worker_spec.weights.publish(module, self.version)

    def release(self, deliveries: list[Delivery]) -> None:
        """Free the slots of rollouts that the learner has copied, and hand them out again."""
        for delivery in deliveries:
            self._free[delivery.worker].append(delivery.played.slot)
        self._look(0.0)

    def _all_ready(self) -> bool:
        return all(worker.ready for worker in self._workers)

    # What happens in one look: messages, deaths, silence, replacements, new tasks.

    def _look(self, timeout: float) -> None:
        connections = {w.connection: w for w in self._workers if w.connection is not None}
        for connection in wait(list(connections), timeout):
            self._receive(connections[connection])  # type: ignore[index]
        self._check_silence()
        self._begin_those_due()
        self._hand_out()

    def _receive(self, worker: _Worker) -> None:
        """Handle all that a worker has sent; the end of its pipe is its death."""
        assert worker.connection is not None
        with contextlib.suppress(EOFError, OSError):
            while worker.connection.poll():
                self._handle(worker, worker.connection.recv())
            return
        self._give_up_on(worker, "died")

    def _handle(self, worker: _Worker, message: Message) -> None:
        worker.last_sign = time.monotonic()
        if isinstance(message, Ready):
            worker.ready, worker.building = True, False
        elif isinstance(message, list):
            worker.infos.extend(message)
        elif isinstance(message, Played):
            assert worker.slots[0] == message.slot, "a slot is in exactly one place"
            worker.slots.popleft()
            rollout = self._worker_spec.slots.slot(message.slot)
            self._deliver(worker, rollout, message, worker.infos)
            worker.infos = []
        elif isinstance(message, EnvFailed):
            self._note_broken_envs(worker, message.reason)
        elif isinstance(message, Failed):
            worker.traceback = message.traceback
            if message.not_finite:
                raise NonFiniteError(message.not_finite)

    def _check_silence(self) -> None:
        """Replace workers whose environments hang."""
        deaf_for = self._deaf_for()
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None:
                continue
            beat = int(self._worker_spec.heartbeats[worker.index].item())
            if beat != worker.last_beat or (not worker.building and not worker.slots):
                worker.last_beat, worker.last_sign = beat, now
            else:
                worker.last_sign += deaf_for
            patience = self._patience(worker)
            if now - worker.last_sign > patience:
                self._give_up_on(worker, f"gave no sign of life for {patience:g} s")

    def _give_up_on(self, worker: _Worker, what: str) -> None:
        if worker.process is not None and not worker.ready and not worker.traceback:
            worker.process.join(1.0)
            if worker.process.exitcode == EXIT_NO_GUARD:
                raise WorkerError(NO_GUARD)
            if (worker.process.exitcode or 0) > 0:  # not killed: it ended by itself
                worker.traceback = NO_START
        at_start = not worker.ready and bool(worker.traceback)
        self._replace(worker, what, worker.traceback, at_start=at_start)

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
        self._free[worker.index].extend(worker.slots)
        worker.slots.clear()

    def _start(self, worker: _Worker) -> None:
        context = multiprocessing.get_context("spawn")
        connection, child_end = context.Pipe()
        spec = replace(self._worker_spec, index=worker.index, seed=self._seed(worker))
        process = context.Process(target=worker_main, args=(child_end, spec), daemon=True)
        with STARTING, _for_children():
            process.start()
        child_end.close()
        worker.process, worker.connection, worker.place = process, connection, f"pid {process.pid}"

    def _hand_out(self) -> None:
        """Give every worker that plays those of its slots that are free."""
        for worker, free in zip(self._workers, self._free, strict=True):
            while free and worker.ready and worker.connection is not None:
                worker.slots.append(free.popleft())
                with contextlib.suppress(OSError):  # the next look finds the end of its pipe
                    worker.connection.send(worker.slots[-1])


def handed_over(value: Any) -> Tensor | CloudpickleWrapper:
    """What a process needs at its start, pickled into shared memory (uint8), also functions from a
    notebook. What holds a lock of `multiprocessing` is returned as it is, in a wrapper.

    Arguments of a process are piped to it when it starts. More than the pipe takes, such as the
    bounds of an image space, would block the parent until the process has imported its script, and
    for ever if it ends before. ValueError if there is too little shared memory.
    """
    try:
        pickled = pickle.dumps(CloudpickleWrapper(value))
    except RuntimeError:  # locks are inherited only
        return CloudpickleWrapper(value)
    check_shared_memory(len(pickled))
    return torch.frombuffer(bytearray(pickled), dtype=torch.uint8).clone().share_memory_()


@contextlib.contextmanager
def _for_children() -> Iterator[None]:
    """Processes started inside have one thread, and block a terminal's signals until they are set
    up."""
    before = {name: value for name, value in os.environ.items() if name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINAL)
    try:
        resource_tracker.ensure_running()  # the first start would do it, and unblock SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, FROM_TERMINAL)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name in ONE_THREAD:
            del os.environ[name]
        os.environ.update(before)
