"""Where the time of each process goes: a stopwatch per process, and the table of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch

Phase = Literal[
    "environment",  # stepping the games
    "forward",  # choosing actions, and values of what a time limit cut off
    "copy",  # rollouts and weights, from one memory to another
    "wait",  # learner: for rollouts, and their messages; worker: for free slots
    "evaluation",  # the learner's pass over a batch, up to the loss
    "backward",  # gradients of the loss
    "optimiser",  # limiting the gradient, and the step
    "graph",  # these three at once, where an update is captured as a CUDA graph
    "exploration",  # scoring rollouts by what is new in them, and learning from that
    "publishing",  # weights for the workers
    "callbacks",  # with all that they do (checkpoints, progress), and logging
    "setup",  # building environments and policies, starting and ending processes
    "other",  # what is left
]
PHASES: tuple[Phase, ...] = get_args(Phase)

Seconds = dict[Phase, float]  # time per phase; phases that did not happen are absent


class Stopwatch:
    """Time per phase. A phase within another stops the outer one, so that each moment counts once.

    Nothing is counted outside all phases; the outermost one of a process is "other".
    `synchronize` is called before the clock is read: work that an accelerator was only asked to do
    would else be charged to whichever later phase happens to wait for it.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._clock, self._synchronize = clock, synchronize
        self.running: list[Phase] = []  # the innermost last
        self._since = 0.0
        self._seconds: Seconds = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs within is charged to this phase, which interrupts the running one."""
        self.charge()
        self.running.append(name)
        try:
            yield
        finally:
            self.charge()
            self.running.pop()

    def take(self) -> Seconds:
        """Time per phase since the last call; phases may be running."""
        self.charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def charge(self) -> None:
        """Charge what has passed since the last call to the running phase."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self.running:
            name = self.running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Off(Stopwatch):
    """Measures nothing."""

    _nothing = nullcontext()

    def phase(self, name: Phase) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._nothing

    def take(self) -> Seconds:
        return {}


OFF: Stopwatch = _Off()


def stopwatch_for(device: torch.device) -> Stopwatch:
    """One that waits for the device at each change of phase, where kernels run asynchronously."""
    is_cuda = device.type == "cuda"
    return Stopwatch(synchronize=(lambda: torch.cuda.synchronize(device)) if is_cuda else None)


class Profile:
    """Adds up what the stopwatches of all processes say.

    A worker sends what it measured with its next rollout. What a killed one had not sent is lost;
    its successor adds to the same entry.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch  # the learner's
        self.learner: Seconds = {}
        self.workers: dict[int, Seconds] = {}  # of those that have sent a rollout, by index
        self._recent: dict[str, Seconds] = {"learner": {}, "workers": {}}

    def add_worker(self, index: int, seconds: Seconds) -> None:
        """Count what worker `index` measured since the last call."""
        _add(self.workers.setdefault(index, {}), seconds)
        _add(self._recent["workers"], seconds)

    def shares(self) -> dict[str, float]:
        """Share (0 to 1) of each phase since the last call, by `learner/phase`, `workers/phase`."""
        self._read_learner()
        recent, self._recent = self._recent, {"learner": {}, "workers": {}}
        return {
            f"{process}/{name}": _share(seconds, name)
            for process, seconds in recent.items()
            if any(seconds.values())
            for name in PHASES
        }

    def table(self) -> str:
        """Seconds and percent of each phase in the learner and in the mean of the workers, with the
        largest percentage that a worker has."""
        self._read_learner()
        names = [f"{name:<12}" for name in ("", "phase", *PHASES, "total")]
        columns = [names, _column("learner", [self.learner], worst=False)]
        if self.workers:
            title = f"workers (mean of {len(self.workers)})"
            columns.append(_column(title, self.workers.values(), worst=True))
        return "\n".join("".join(row).rstrip() for row in zip(*columns, strict=True))

    def _read_learner(self) -> None:
        seconds = self.stopwatch.take()
        _add(self.learner, seconds)
        _add(self._recent["learner"], seconds)


def _add(total: Seconds, seconds: Seconds) -> None:
    for name, value in seconds.items():
        total[name] = total.get(name, 0.0) + value


def _share(seconds: Seconds, name: Phase) -> float:
    return seconds.get(name, 0.0) / (sum(seconds.values()) or 1.0)


def _column(title: str, processes: Collection[Seconds], *, worst: bool) -> list[str]:
    """Seconds and percent of each phase in the mean of processes; with `worst`, also the largest
    percentage that one of them has."""
    mean: Seconds = {}
    for seconds in processes:
        _add(mean, {name: value / len(processes) for name, value in seconds.items()})
    lines = [f"{'s':>11}{'%':>6}{'worst':>7}"]
    for name in PHASES:
        cells = f"{'-':>11}{'-':>6}{'-':>7}"
        if name in mean:
            most = max(_share(seconds, name) for seconds in processes)
            cells = f"{mean[name]:>11.2f}{100 * _share(mean, name):>6.1f}{100 * most:>7.1f}"
        lines.append(cells)
    lines.append(f"{sum(mean.values()):>11.2f}{100.0:>6.1f}{'':>7}")
    width = len(lines[0]) if worst else 17
    return [f"{title:>{width}}", *(line[:width] for line in lines)]
