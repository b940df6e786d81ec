"""What a run says while it is at work, on a terminal or into a file."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Mapping
from typing import IO

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Time between lines of progress where there is no terminal."""


class Screen:
    """A stream that may be closed by its reader at any time, which is no reason to stop training.

    After the first failure nothing more is written.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = io.StringIO() if stream is None else stream
        self.open = stream is not None and not stream.closed

    @property
    def is_terminal(self) -> bool:
        """Whether cursor movements and redrawing make sense."""
        return self.open and self.stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def line(self, text: str) -> None:
        """Write one line."""
        self.write(text + "\n")

    def write(self, text: str) -> None:
        """Write text; also what tqdm calls."""
        if not self.open:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.open = False
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                # What is held back is flushed once more when the stream is closed.
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def flush(self) -> None:
        """Nothing is held back."""

    def fileno(self) -> int:
        """The stream's; tqdm asks it for the width of the terminal."""
        return self.stream.fileno()

    @property
    def encoding(self) -> str | None:
        """The stream's; tqdm chooses the blocks of its bar by it."""
        return getattr(self.stream, "encoding", None)

    def line_from_signal(self, text: str) -> None:
        """Write one line past all buffers, as a signal handler may interrupt another write."""
        with contextlib.suppress(OSError, ValueError):
            start = "\n" if self.is_terminal else ""  # after the bar
            os.write(self.fileno(), f"{start}{text}\n".encode())


def say(text: str, stream: IO[str] | None = None) -> None:
    """Write a line, by default to standard output, as `Screen` does."""
    Screen(sys.stdout if stream is None else stream).line(text)


class Progress:
    """A bar on a terminal, else a line every ten seconds; on standard error.

    `total` counts the updates of the whole run, `begin` those that were done before.
    """

    def __init__(self, title: str, total: int, begin: int) -> None:
        self.title, self.total, self.begin = title, total, begin
        self.metrics = ""
        self.bar = (
            tqdm(total=self.total, initial=begin, desc=title, dynamic_ncols=True, leave=False)
            if Screen(sys.stderr).is_terminal
            else None
        )
        self.started = self.spoken = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def measured(self, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of an evaluation for the next line, which has the newest loss."""
        shown = [f"{k} {v:.4g}" for k, v in metrics.items() if k != "loss"]
        self.metrics = ", ".join(shown[:3])

    def show(self, update: int, loss: float) -> None:
        """Say how far it is, if it is time to."""
        text = ", ".join(filter(None, [f"loss {loss:.4g}", self.metrics]))
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(update - self.bar.n)
            return
        now = time.monotonic()
        if now - self.spoken < LINE_SECONDS:
            return
        self.spoken = now
        left = (self.total - update) * (now - self.started) / max(update - self.begin, 1)
        say(f"{self.title}: {update:,} of {self.total:,}, {text}, {left:.0f} s left", sys.stderr)
