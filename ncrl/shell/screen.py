"""What a run says while it is at work, on a terminal or into a file."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import IO

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Time between lines of progress where there is no terminal."""


def say(text: str, stream: IO[str] | None = None) -> None:
    """Write a line; a reader who has gone is no reason to stop training."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            # The interpreter flushes its streams once more when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """A bar on a terminal, else a line every ten seconds; on standard error.

    Args:
        title: of the run.
        total: updates of the whole run.
        begin: updates done before.
    """

    def __init__(self, title: str, total: int, begin: int) -> None:
        self.title, self.total = title, total
        self.begin, self.metrics = begin, ""
        terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.bar = (
            tqdm(total=self.total, initial=begin, desc=title, dynamic_ncols=True, leave=False)
            if terminal
            else None
        )
        self.started = self.spoken = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def measured(self, row: Mapping[str, float]) -> None:
        """Keep the metrics of an evaluation for the next line."""
        shown = [f"{k} {v:.4g}" for k, v in row.items() if k not in ("update", "loss")]
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
