"""Files of tensors: written with a checksum, read without running code or trusting their sizes."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ncrl.files import read_bytes, write_atomically

Like = TypeVar("Like")

FREE_BYTES = 64 << 20
"""What names, curves and random states may take beside the weights."""

MARK = b"sha256 "
"""Begins the comment of the zip that torch writes: the sum of all that comes before the comment."""


def size_of(module: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def write_tensors(path: Path, state: Any) -> None:
    """Write tensors and plain values, whole or not at all, so that `torch.load` reads them. Raises
    OSError if the disk refuses.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, with_checksum(buffer.getvalue()))


def with_checksum(content: bytes) -> bytes:
    """A zip without comment, with its own sha256 as the comment."""
    comment = MARK + hashlib.sha256(content).hexdigest().encode()
    # The last two bytes of a zip say how long its comment is.
    return content[:-2] + len(comment).to_bytes(2, "little") + comment


def read_tensors(path: Path, limit: int, *, foreign: bool = False) -> Any:
    """Tensors and plain values of a file, on the CPU.

    Args:
        path: of the file.
        limit: bytes that its tensors may take.
        foreign: whether `torch.save` alone may have written it, without a sum of the whole.

    Raises:
        ValueError: naming the file, if it is damaged, too large, or holds anything else.
    """
    limit += FREE_BYTES
    content = read_bytes(path, limit)
    try:
        check_sums(content, limit, foreign=foreign)
        return load_tensors(content, limit)
    except Exception as error:  # a broken zip or pickle can raise anything
        raise ValueError(f"cannot read {path}: {reason_of(error)}") from error


def load_tensors(content: bytes, limit: int) -> Any:
    """Tensors and plain values that torch has saved, on the CPU.

    Raises:
        ValueError: if they would take more than `limit` bytes.
        Exception: of any type for what is damaged or holds anything else; see `reason_of`.
    """
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:  # its members may be compressed
            check_size(archive, limit)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    # Views of one number can have any shape, and take memory when they are copied.
    if (total := sum(tensor.nbytes for tensor in tensors_in(loaded))) > limit:
        raise ValueError(f"its tensors would take {total:,} bytes, expected at most {limit:,}")
    return loaded


def check_size(archive: zipfile.ZipFile, limit: int) -> None:
    """Raise ValueError for a zip that unpacks to more than `limit` bytes."""
    total = sum(member.file_size for member in archive.infolist())
    if total > limit:
        raise ValueError(f"it unpacks to {total:,} bytes, expected at most {limit:,}")


def reason_of(error: Exception) -> str:
    """Why a file cannot be used, in one line."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    code = re.search(r"Unsupported (?:global|operand|class)\S*:? (?:GLOBAL )?(\S+)", text)
    if code is None and not isinstance(error, pickle.UnpicklingError):
        return text[:500] or type(error).__name__
    return (
        f"it holds more than tensors and plain values ({code[1] if code else text[-200:]}); if you "
        "trust the file, convert it yourself: torch.load(file, weights_only=False)"
    )


def check_sums(content: bytes, limit: int, *, foreign: bool = False) -> None:
    """Raise ValueError for a zip that is damaged, or unpacks to more than `limit` bytes."""
    if foreign and not content.startswith(b"PK"):
        return  # the format before torch 1.6, in which torchvision published weights
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_size(archive, limit)
            comment = archive.comment
            whole = foreign and not comment and archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeError, OSError) as error:
        raise ValueError("it is damaged, or no file that torch saved") from error
    if not comment and not foreign:
        raise ValueError("it has no checksum: an earlier release of ncrl wrote it, or a stranger")
    if comment:
        before = content[: -len(comment) - 2] + b"\0\0"
        whole = comment == MARK + hashlib.sha256(before).hexdigest().encode()
    if not whole:
        raise ValueError("it is damaged (its checksum differs)")


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors inside of dicts, lists and tuples."""
    seen = set() if seen is None else seen  # as few bytes can name one list many times
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part, seen)


def check_like(found: Any, expected: Like, name: str) -> Like:
    """A value that was read, if it can stand for the one that it replaces: a tensor of the same
    shape and type, a finite number for a number, and so on. Raises ValueError otherwise."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(found).__name__}")
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{name} must be {expected.dtype} of shape {list(expected.shape)}, "
                f"got {found.dtype} of shape {list(found.shape)}"
            )
    elif not _is_like(found, expected):
        raise ValueError(f"{name} must be like {expected!r}, got {str(found)[:80]!r}")
    result: Like = found
    return result


def _is_like(found: Any, expected: Any) -> bool:
    if isinstance(expected, (tuple, list)):
        return (
            isinstance(found, (tuple, list))
            and len(found) == len(expected)
            and all(map(_is_like, found, expected))
        )
    if isinstance(expected, bool) or expected is None:  # on, off, or as torch decides
        return found is None or isinstance(found, bool)
    if isinstance(expected, (int, float)):
        return type(found) in (int, float) and math.isfinite(found)
    return type(found) is type(expected)
