"""Files that are there whole or not at all, and that are read only if they are files."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

SMALL_FILE = 1 << 20  # bytes: what people write, or what describes other files

UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names that `write_atomically` gives to files until they are whole."""


def given_path(path: str | Path) -> Path:
    """A path as a user gives it: a tilde is the home folder, which no shell sees in
    `--logdir=~/runs`, nor in a file."""
    return Path(os.path.expanduser(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, it is there whole or as it was before.

    If the disk refuses, OSError is raised and nothing is left behind.
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


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of `write_atomically`; the folder must be locked."""
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def read_bytes(path: Path, limit: int = SMALL_FILE) -> bytes:
    """The content of a regular file of at most `limit` bytes, or ValueError, naming the file and
    the reason; pipes and devices are never opened."""
    try:
        if not path.is_file():
            reason = "it is no regular file" if os.path.lexists(path) else "it does not exist"
            raise ValueError(f"cannot read {path}: {reason}")
        with path.open("rb") as file:
            # As much as is asked for is set aside at once.
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise ValueError(f"cannot read {path}: it has more than {limit:,} bytes")
    return data
