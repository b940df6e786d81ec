"""The lock of a run's folder, which the system drops with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Make a run's folder and hold its lock; yields False if another process has it.

    With `wait` it waits until the lock is free. Raises ValueError if the folder cannot be written
    or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:  # of a network's file system, say
            raise ValueError(f"cannot lock {folder}: {error.strerror}") from error
        yield held
    finally:
        os.close(descriptor)  # which gives the lock back
