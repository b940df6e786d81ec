"""Files that are there whole or not at all, and small files that may be anything."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

SMALL_FILE = 1 << 20
"""Bytes of a file that people write, or that describes others."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, it is there whole or as it was before.

    Raises:
        OSError: if the disk refuses; nothing is left behind then.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # temporary files are private, ours is not
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_small(path: Path, limit: int = SMALL_FILE) -> bytes:
    """The content of a plain file; pipes and devices, which may never end, are not opened.

    Raises:
        ValueError: if it is no plain file, or larger than `limit` bytes.
        OSError: if it cannot be read.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no plain file")
    if found.st_size > limit:
        raise ValueError(f"it has {found.st_size:,} bytes, more than {limit:,}")
    with open(path, "rb") as file:
        return file.read(limit)
