"""The worker process: plays its environments with the newest weights, rollout after rollout."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from torch import Tensor

from ncrl.agents.playing.buffers import Rollout
from ncrl.agents.playing.collector import Collector, NonFiniteError, Outcome
from ncrl.agents.playing.env_sources import EnvFactory, build
from ncrl.agents.playing.weights import SharedWeights, layout
from ncrl.agents.profiling import OFF, Seconds, Stopwatch
from ncrl.sb3 import EnginePolicy
from ncrl.shell.hardware import keep_freed_memory

EXIT_NO_GUARD = 78  # of a process about to start a training while it imports its parent's script
FROM_TERMINAL = {signal.SIGINT, signal.SIGHUP}  # Ctrl-C, and that it is closed
MESSAGE_BYTES = 8_000  # most infos in one message; a pipe takes twice that in one write

Info = tuple[int, int, dict[str, Any]]  # (row, environment, info) of what was reported


class PolicySpec(NamedTuple):
    """What it takes to build the policy again in another process."""

    policy_class: type[EnginePolicy]
    observation_space: Any
    action_space: Any
    policy_kwargs: dict[str, Any]
    sde_sample_freq: int

    def build(self, lr_schedule: Schedule | None = None) -> EnginePolicy:
        """A policy on the CPU with fresh weights; without a schedule, one that only plays."""
        options = self.policy_kwargs
        if lr_schedule is None:
            # One of torch imports the compiler, which takes long.
            options = options | {"optimizer_class": lambda *_arguments, **_options: None}
        spaces = self.observation_space, self.action_space
        return self.policy_class(*spaces, lr_schedule or (lambda _: 0.0), **options)

    def check_like(self, policy: EnginePolicy) -> None:
        """Raise ValueError if `policy` is not the one that workers build for themselves."""
        with torch.random.fork_rng(devices=[]):
            theirs = self.build()
        if layout(theirs) != layout(policy):
            raise ValueError(
                "the policy was changed after it was made, and workers cannot do the same: use "
                "n_workers=0, or a policy class whose constructor makes the change"
            )


@dataclass
class WorkerSpec:
    """Everything a worker process is given at its start."""

    seed: int  # of this incarnation; no other worker and no earlier incarnation had it
    make_games: Tensor | CloudpickleWrapper  # `pool.handed_over(PoolSpec.make_games())`
    slots: Rollout  # rollouts in shared memory
    weights: SharedWeights
    heartbeats: Tensor  # [n_workers] in shared memory: steps played, each counts up its own
    profile: bool  # whether it measures where its time goes
    index: int = 0


class Ready(NamedTuple):
    """The worker's environments are built."""


class Played(NamedTuple):
    """A slot is full."""

    slot: int
    version: int  # of the weights that chose every action in it
    phases: Seconds  # where time went since the last message of this kind; empty if not measured


class EnvFailed(NamedTuple):
    """The environments raised. They are built anew, and the unfinished rollout is thrown away."""

    reason: str


class Failed(NamedTuple):
    """The worker ends; the reason is its traceback."""

    traceback: str
    not_finite: str = ""  # what its weights computed, if that is why: nobody could play with them


Message = Ready | list[Info] | Played | EnvFailed | Failed
"""A list holds what environments reported in the rollout that the next `Played` announces."""


def end_if_importing_main() -> None:
    """End a spawned process that imports its parent's script, which must not train there again.

    The parent knows the exit code, and says what to do.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(EXIT_NO_GUARD)


def check_parent() -> None:
    """Raise RuntimeError for a process that may not start others, and for a program that workers
    cannot import again: standard input."""
    if multiprocessing.current_process().daemon:
        raise RuntimeError(
            "this process is daemonic, and Python lets such start no worker processes: use "
            "n_workers=0, or start it with daemon=False"
        )
    main = sys.modules["__main__"]
    file: str | None = getattr(main, "__file__", None)
    if file and getattr(main, "__spec__", None) is None and not os.path.exists(file):
        raise RuntimeError(
            f"worker processes import your script again, which came from {file} (standard input): "
            'save it to a file, with what starts a training under `if __name__ == "__main__":`, or '
            "use n_workers=0"
        )


def worker_main(connection: Connection, spec: WorkerSpec) -> None:
    """Entry point of the process. Receives slot numbers, answers with `Message`s; on None it plays
    no more of them, and ends."""
    keep_freed_memory()
    gc.freeze()  # what is imported stays: to take it apart at the end would take half a second
    # A terminal's signals reach all its processes, but the parent decides what follows from them.
    # They were blocked while this process started.
    for number in FROM_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_TERMINAL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    stopwatch = Stopwatch() if spec.profile else OFF
    try:
        with stopwatch.phase("other"):
            _work(connection, spec, stopwatch)
    except Exception as error:
        not_finite = str(error) if isinstance(error, NonFiniteError) else ""
        with contextlib.suppress(OSError):  # where the error is that the parent is gone
            connection.send(Failed(tail_of_traceback(), not_finite))
        sys.exit(1)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it ended before the request
        os._exit(1)


def _work(connection: Connection, spec: WorkerSpec, stopwatch: Stopwatch) -> None:
    asked: deque[int | None] = deque()

    def next_slot() -> int | None:
        with stopwatch.phase("wait"):
            while not asked or connection.poll():
                asked.append(connection.recv())
        return None if asked[-1] is None else asked.popleft()

    heartbeat = spec.heartbeats[spec.index]
    given = spec.make_games
    if isinstance(given, Tensor):
        given = pickle.loads(given.numpy().tobytes())
    games: Games = given.var(seed=spec.seed, stopwatch=stopwatch, beat=lambda: heartbeat.add_(1))
    connection.send(Ready())
    slot = next_slot()
    while slot is not None:
        with stopwatch.phase("copy"):
            version = spec.weights.read_into(games.policy)
        result = games.play(spec.slots.slot(slot), slot, version)
        if isinstance(result, EnvFailed):
            connection.send(result)
            games.start()
            connection.send(Ready())
            continue
        played, infos = result
        for part in _in_small_parts(infos):
            # By value, where a class is defined in the user's script or notebook.
            connection.send_bytes(cloudpickle.dumps(part))
        connection.send(played)
        slot = next_slot()
    games.close()


class Games:
    """A worker's environments and policy, which play one rollout after the other."""

    def __init__(
        self,
        factory: EnvFactory,
        policy: PolicySpec,  # what the policy is built from, with fresh weights
        n_envs: int,
        seed: int,  # of all random numbers of this process, which has one thread from now on
        *,
        info_keywords: Sequence[str],  # entries of infos that are reported for every timestep
        stopwatch: Stopwatch,
        beat: Callable[[], object],  # called after every timestep
    ) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        self._seeds = np.random.SeedSequence(seed)
        self._factory, self._n_envs, self._info_keywords = factory, n_envs, info_keywords
        self._sde_sample_freq = policy.sde_sample_freq
        self._stopwatch, self._beat = stopwatch, beat
        with stopwatch.phase("setup"):
            self.policy = policy.build()
        self._collector: Collector | None = None
        self.start()

    def start(self) -> None:
        """Build the environments, anew if there are any; they do not repeat their games."""
        self.close()
        with self._stopwatch.phase("setup"):
            seed = int(self._seeds.spawn(1)[0].generate_state(1)[0] >> 1)
            env = build(self._factory, self._n_envs, seed)
            self._collector = Collector(
                env,
                self.policy,
                env.reset(),
                sde_sample_freq=self._sde_sample_freq,
                stopwatch=self._stopwatch,
            )

    def close(self) -> None:
        """Close the environments, which may be broken in any way."""
        if self._collector is not None:
            with contextlib.suppress(Exception):
                self._collector.env.close()

    def play(
        self, rollout: Rollout, slot: int, version: int
    ) -> tuple[Played, list[Info]] | EnvFailed:
        """Play a rollout with the policy as it is; returns also what environments reported.

        After `EnvFailed` the environments have to be built anew by `start`. NonFiniteError is
        raised where the policy computes no finite numbers.
        """
        assert self._collector is not None
        infos: list[Info] = []

        def after_step(outcome: Outcome) -> bool:
            self._beat()
            for i, info in enumerate(outcome.infos):
                if "episode" in info or outcome.dones[i]:
                    kept = {k: v for k, v in info.items() if k != "terminal_observation"}
                    infos.append((outcome.row, i, kept))
                elif wanted := {k: info[k] for k in self._info_keywords if k in info}:
                    infos.append((outcome.row, i, wanted))
            return True

        try:
            self._collector.collect(rollout, len(rollout.rewards), after_step)
        except NonFiniteError:
            raise
        except Exception:
            return EnvFailed(tail_of_traceback())
        return Played(slot, version, self._stopwatch.take()), infos


def tail_of_traceback() -> str:
    """The traceback of the exception being handled, or its end if it is long."""
    return traceback.format_exc()[-MESSAGE_BYTES:]


def _in_small_parts(infos: list[Info]) -> Iterator[list[Info]]:
    """Parts of at most `MESSAGE_BYTES`, each of which is one write to the pipe: a worker that is
    stopped between two writes would leave the parent waiting. Of an info that is larger, or cannot
    be pickled, only as many entries are sent, the smallest first: Stable-Baselines3 reads those."""
    part: list[Info] = []
    size = 0.0
    for row, i, info in infos:
        length = _pickled_bytes(info)
        if length > MESSAGE_BYTES:
            info = _smallest_entries(info)
            length = _pickled_bytes(info)
        if part and size + length > MESSAGE_BYTES:
            yield part
            part, size = [], 0.0
        part.append((row, i, info))
        size += length
    if part:
        yield part


def _smallest_entries(info: dict[str, Any]) -> dict[str, Any]:
    """The score of an ended game, and other entries as long as `MESSAGE_BYTES` allow."""
    sizes = {entry: _pickled_bytes((entry, value)) for entry, value in info.items()}
    entries = sorted(sizes, key=lambda entry: (entry != "episode", sizes[entry]))
    totals = accumulate(sizes[entry] for entry in entries)
    fits = {e for e, total in zip(entries, totals, strict=True) if total <= MESSAGE_BYTES}
    return {entry: value for entry, value in info.items() if entry in fits}


def picklable(info: dict[str, Any]) -> dict[str, Any]:
    """An info without the entries that cannot be pickled, if it has any."""
    if _pickled_bytes(info) < math.inf:
        return info
    return {name: value for name, value in info.items() if _pickled_bytes(value) < math.inf}


def _pickled_bytes(value: Any) -> float:
    """Size of the pickle; infinity for what has none, such as a lock or a simulator's handle."""
    try:
        return len(cloudpickle.dumps(value))
    except Exception:  # whatever the class of a user raises
        return math.inf
