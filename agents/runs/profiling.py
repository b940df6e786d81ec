"""Where the time of each process goes: a stopwatch per process, and the table of all of them.

environment  stepping the games
forward      choosing actions, and values of what a time limit cut off
copy         rollouts and weights, from one memory to another
wait         for rollouts (learner; the messages they come in are handled meanwhile), for free slots
             (worker)
evaluation   the learner's pass over a batch, up to the loss
backward     gradients of the loss
optimiser    limiting the gradient, and the step
graph        all three of a learner's update at once, where it is captured as a CUDA graph
exploration  scoring rollouts by what is new in them, and learning from that
publishing   weights for the workers
callbacks    callbacks with all that they do (checkpoints, progress), and logging
setup        building environments and policies, starting and ending processes
other        what is left
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

Phase = Literal[
    "environment",
    "forward",
    "copy",
    "wait",
    "evaluation",
    "backward",
    "optimiser",
    "graph",
    "exploration",
    "publishing",
    "callbacks",
    "setup",
    "other",
]
PHASES: tuple[Phase, ...] = get_args(Phase)

Seconds = dict[Phase, float]
"""Time per phase; phases that did not happen are absent."""


class Stopwatch:
    """Time per phase. A phase within another stops the outer one, so that each moment counts once.

    Nothing is counted outside all phases: the outermost one of a process is "other", and the sum
    over phases is then the time spent in it.

    Args:
        clock: seconds that never go back.
        synchronize: called before the clock is read. Work that an accelerator was only asked to do
            would else be charged to whichever later phase happens to wait for it.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._laps = {name: _Lap(self, name) for name in PHASES}
        self._running: list[Phase] = []  # the innermost last
        self._since = 0.0
        self._seconds: Seconds = {}

    def phase(self, name: Phase) -> AbstractContextManager[object]:
        """What runs within is charged to this phase."""
        return self._laps[name]

    def take(self) -> Seconds:
        """Time per phase since the last call; phases may be running."""
        self.charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def enter(self, name: Phase) -> None:
        """Interrupt the running phase by another."""
        self.charge()
        self._running.append(name)

    def leave(self) -> None:
        """Go on with the phase that was interrupted."""
        self.charge()
        self._running.pop()

    def charge(self) -> None:
        """Charge what has passed since the last call to the running phase."""
        if self._synchronize is not None:
            self._synchronize()
        now = self._clock()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Lap:
    """Enters and leaves one phase; made once, as phases are entered several times per timestep."""

    __slots__ = ("_name", "_stopwatch")

    def __init__(self, stopwatch: Stopwatch, name: Phase) -> None:
        self._stopwatch = stopwatch
        self._name: Phase = name

    def __enter__(self) -> None:
        self._stopwatch.enter(self._name)

    def __exit__(self, *_exception: object) -> None:
        self._stopwatch.leave()


class _Off(Stopwatch):
    """Measures nothing."""

    _nothing = nullcontext()

    def phase(self, name: Phase) -> AbstractContextManager[object]:
        return self._nothing

    def take(self) -> Seconds:
        return {}


OFF: Stopwatch = _Off()


def stopwatch_for(device: torch.device) -> Stopwatch:
    """One that waits for the device at each change of phase, where kernels run asynchronously."""
    if device.type != "cuda":
        return Stopwatch()
    return Stopwatch(synchronize=lambda: torch.cuda.synchronize(device))


class Profile:
    """Adds up what the stopwatches of all processes say.

    A worker sends what it measured since its last rollout together with the next one, so each
    moment arrives once. What a killed worker had not sent yet is lost, with its rollout; its
    successor adds to the same entry.

    Args:
        stopwatch: the learner's.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.learner: Seconds = {}
        self.workers: dict[int, Seconds] = {}
        """By index; workers that have not sent a rollout yet are absent."""
        self._recent: dict[str, Seconds] = {"learner": {}, "workers": {}}

    def add_worker(self, index: int, seconds: Seconds) -> None:
        """Count what worker `index` measured since the last call."""
        _add(self.workers.setdefault(index, {}), seconds)
        _add(self._recent["workers"], seconds)

    def shares(self) -> dict[str, float]:
        """Share (0 to 1) of each phase since the last call, by `<process>/<phase>`.

        All workers are one process here. A process that measured nothing is absent.
        """
        self._read_learner()
        found: dict[str, float] = {}
        for process, seconds in self._recent.items():
            whole = sum(seconds.values())
            if whole > 0:
                found |= {f"{process}/{name}": seconds.get(name, 0.0) / whole for name in PHASES}
        self._recent = {"learner": {}, "workers": {}}
        return found

    def table(self) -> str:
        """Seconds and percent of each phase: in the learner, and in a worker on average.

        The last column is the largest share that the phase has in any worker.
        """
        self._read_learner()
        heading, units, cells = f"{'':<12}", f"{'phase':<12}", _cells(self.learner)
        heading += f"{'learner':>15}"
        units += f"{'s':>9}{'%':>6}"
        if self.workers:
            count = len(self.workers)
            heading += f"{f'workers (mean of {count})':>24}"
            units += f"{'s':>11}{'%':>6}{'worst':>7}"
            mean: Seconds = {}
            for seconds in self.workers.values():
                _add(mean, {name: value / count for name, value in seconds.items()})
            worst = [""] * (len(PHASES) + 1)
            for row, name in enumerate(PHASES):
                share = max(_percent(seconds)[row] for seconds in self.workers.values())
                worst[row] = f"{share:.1f}" if name in mean else "-"
            cells = [
                f"{left}  {right}{last:>7}"
                for left, right, last in zip(cells, _cells(mean), worst, strict=True)
            ]
        rows = [f"{name:<12}{cell}" for name, cell in zip((*PHASES, "total"), cells, strict=True)]
        return "\n".join(line.rstrip() for line in (heading, units, *rows))

    def _read_learner(self) -> None:
        seconds = self.stopwatch.take()
        _add(self.learner, seconds)
        _add(self._recent["learner"], seconds)


def _add(total: Seconds, seconds: Seconds) -> None:
    for name, value in seconds.items():
        total[name] = total.get(name, 0.0) + value


def _cells(seconds: Seconds) -> list[str]:
    """Seconds and percent of each phase, then of all."""
    cells = [
        f"{seconds[name]:>9.2f}{percent:>6.1f}" if name in seconds else f"{'-':>9}{'-':>6}"
        for name, percent in zip(PHASES, _percent(seconds), strict=True)
    ]
    return [*cells, f"{sum(seconds.values()):>9.2f}{sum(_percent(seconds)):>6.1f}"]


def _percent(seconds: Seconds) -> list[float]:
    """Of each phase, to a tenth, so that they add up to 100: the largest remainders go up."""
    whole = sum(seconds.values())
    if whole <= 0:
        return [0.0] * len(PHASES)
    exact = [1000 * seconds.get(name, 0.0) / whole for name in PHASES]
    tenths = [int(value) for value in exact]
    by_remainder = sorted(range(len(PHASES)), key=lambda row: tenths[row] - exact[row])
    for row in by_remainder[: 1000 - sum(tenths)]:
        tenths[row] += 1
    return [value / 10 for value in tenths]
