"""Ctrl-C, SIGTERM and a terminal that is closed ask a run to stop where it can go on later."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Stopped(RuntimeError):
    """A signal ended training; `exit_code` is the process's."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("stopped by a signal")
        self.exit_code = exit_code


class StopSignals:
    """`exit_code` is other than 0 once a signal has come; a second one ends the run at once.

    `on_stop` is called in the handler of the first signal.
    """

    def __init__(self, on_stop: Callable[[], None] | None = None) -> None:
        self.exit_code = 0
        self.on_stop = on_stop

    def stop(self, number: int, _frame: FrameType | None) -> None:
        if self.exit_code:
            if number == signal.SIGHUP:  # the shell sends it, and the kernel once more
                return
            raise KeyboardInterrupt
        self.exit_code = 128 + number
        if self.on_stop is not None:
            self.on_stop()


def leave_at_once() -> None:
    """What `StopSignals` calls while there is nothing to save."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals(on_stop: Callable[[], None] | None = None) -> Iterator[StopSignals]:
    """Take the signals inside the block, in the main thread; elsewhere none comes."""
    stop = StopSignals(on_stop)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else `nohup` lets it go on
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop.stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
