"""File formats of MNIST and CIFAR, read into arrays of bytes; whatever is wrong is one ValueError.

Sizes in headers are compared with what is expected before memory is allocated for them, and nothing
that a file contains is executed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import math
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ncrl import files

Bytes = NDArray[np.uint8]

IDX_UINT8 = 0x08
IDX_KINDS = {1: "labels", 3: "images"}
"""By the number of dimensions, of the files that MNIST consists of."""

LARGEST_FILE = 1 << 30
"""Bytes; six times the largest file of these data sets, unpacked."""

CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE * CIFAR_SIDE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

PNG_BEGIN, JPEG_BEGIN, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the JPEG segments that hold the size of the image."""


class Labelled(NamedTuple):
    """Images and what they show."""

    images: Bytes
    """[N, channels, height, width], 0 to 255."""

    labels: Bytes
    """[N], classes from 0."""


def read_bytes(path: Path) -> bytes:
    """A file, unpacked if its name ends in .gz.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    packed = files.read_bytes(path, LARGEST_FILE)
    if path.suffix != ".gz":
        return packed
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"cannot read {path}: {reason}") from error
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path} unpacks to more than {LARGEST_FILE:,} bytes")
    return data


# The idx format of MNIST: http://yann.lecun.com/exdb/mnist


def read_idx(path: Path, dimensions: int) -> Bytes:
    """An array of bytes in the idx format, also gzipped.

    Args:
        path: the file.
        dimensions: that it must have: 1 for labels, 3 for images.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    data = read_bytes(path)
    if len(data) < 4:
        raise ValueError(f"{path} is no idx file: it has only {len(data)} bytes")
    if data[:2] != b"\0\0":
        raise ValueError(f"{path} is no idx file: it begins with {data[:4]!r}")
    kind, count = data[2], data[3]
    if kind != IDX_UINT8:
        raise ValueError(
            f"{path} must hold unsigned bytes (type 0x{IDX_UINT8:02x}), got type 0x{kind:02x}"
        )
    if count != dimensions:
        raise ValueError(
            f"{path} should hold {IDX_KINDS.get(dimensions)} ({dimensions} dimensions), but has "
            f"{count}, as {IDX_KINDS.get(count, 'no file of MNIST')} would"
        )
    header = 4 + 4 * count
    if len(data) < header:
        raise ValueError(f"{path} is truncated: it ends inside its header")
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    _check_size(path, len(data), header + math.prod(sizes))
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes).copy()


def _check_size(path: Path | str, size: int, expected: int) -> None:
    if size < expected:
        raise ValueError(f"{path} is truncated: {size:,} bytes where {expected:,} are expected")
    if size > expected:
        raise ValueError(f"{path} is too long: {size:,} bytes where {expected:,} are expected")


def read_idx_pair(images: Path, labels: Path) -> Labelled:
    """Images [N, 1, height, width] and labels from two idx files.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    pair = Labelled(read_idx(images, 3)[:, None], read_idx(labels, 1))
    check_labelled(pair, f"{images} with {labels}", 10)
    return pair


def check_labelled(pair: Labelled, source: object, num_classes: int) -> None:
    """Raise ValueError unless there is a label for each image, and a class for each label."""
    if len(pair.images) != len(pair.labels):
        raise ValueError(
            f"{source}: {len(pair.images):,} images do not match {len(pair.labels):,} labels"
        )
    if not len(pair.images):
        raise ValueError(f"{source}: there are no images")
    wrong = np.flatnonzero(pair.labels >= num_classes)
    if len(wrong):
        raise ValueError(
            f"{source}: label number {wrong[0]} is {pair.labels[wrong[0]]}, where classes are "
            f"0 .. {num_classes - 1}"
        )


# The python version of CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html


def read_cifar_python(path: Path, num_classes: int) -> Labelled:
    """One pickled batch of the python version; nothing in the pickle is executed.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    content = read_bytes(path)
    try:
        for operation, index, _ in pickletools.genops(content):
            if "PUT" in operation.name and isinstance(index, int) and index > len(content):
                raise ValueError("a place in its memo lies far beyond its end")
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{path} is no pickled CIFAR batch: {error}") from error
    key = b"fine_labels" if num_classes == 100 else b"labels"
    if not isinstance(batch, Mapping) or b"data" not in batch or key not in batch:
        raise ValueError(f"{path} is no batch of CIFAR-{num_classes}: no data and {key.decode()}")
    data, labels = batch[b"data"], np.asarray(batch[key])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        raise ValueError(f"{path}: data must be an array of bytes with two dimensions")
    if data.shape[1] != CIFAR_PIXELS:
        raise ValueError(f"{path}: images must have {CIFAR_PIXELS} bytes, got {data.shape[1]}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise ValueError(f"{path}: {key.decode()} must be a list of classes from 0")
    images = data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    pair = Labelled(images, np.minimum(labels, 255).astype(np.uint8))
    check_labelled(pair, path, num_classes)
    return pair


def _empty_array(*_arguments: object) -> Bytes:
    """What the pickle of an array begins with. Its sizes come with its numbers, and must fit."""
    return np.empty(0, np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays of numbers and plain values, and refuses everything else."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): None,  # an argument of the functions above
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"a pickled CIFAR batch does not need {module}.{name}: refused")
        return self.ALLOWED[module, name]


# Images in folders named after their classes, in a tar file.

PARTS = ("train", "test")


def read_image_archive(archive: Path) -> tuple[Labelled, Labelled, list[str]]:
    """Training and test images, `train/<class>/<image>` and `test/<class>/<image>`, of a tar file,
    however it is compressed; nothing is unpacked to disk.

    Returns:
        Both parts, and the classes in alphabetical order.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    return _image_tree(archive, _members(archive))


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    total = 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                total += member.size
                if total > LARGEST_FILE:
                    raise ValueError(f"{archive} unpacks to more than {LARGEST_FILE:,} bytes")
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                _check_size(f"{archive}: {member.name}", len(data), member.size)
                yield PurePosixPath(member.name), data
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"cannot read {archive}: {error}") from error
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        # lzma has an exception of its own, and not every Python has lzma
        raise ValueError(f"cannot read {archive}: {error}") from error


def _image_tree(
    source: Path, files: Iterable[tuple[PurePosixPath, bytes]]
) -> tuple[Labelled, Labelled, list[str]]:
    found: dict[str, list[tuple[str, Bytes]]] = {part: [] for part in PARTS}
    for path, data in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES or len(path.parts) < 3:
            continue
        part, name = path.parts[-3:-1]
        if part in found:
            found[part].append((name, _decode(f"{source}: {path}", data)))
    for part, images in found.items():
        if not images:
            raise ValueError(f"{source} holds no images of the form {part}/CLASS/NAME.jpg")
    classes = sorted({name for name, _ in found["train"]})
    for name, _ in found["test"]:
        if name not in classes:
            raise ValueError(f"{source}: class {name!r} of test is not among those of train")
    if len(classes) > 256:
        raise ValueError(f"{source} has {len(classes)} classes; at most 256 can be read")
    train, test = (_stack(found[part], classes) for part in PARTS)
    return train, test, classes


def _decode(name: str, data: bytes) -> Bytes:
    """A colour image, [3, 32, 32] in RGB."""
    size = image_size(data)
    if size is None:
        raise ValueError(f"{name} is no whole JPEG or PNG image")
    if size != (CIFAR_SIDE, CIFAR_SIDE):
        raise ValueError(
            f"{name}: images must be {CIFAR_SIDE}x{CIFAR_SIDE}, got {size[0]}x{size[1]}"
        )
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None or image.shape != (CIFAR_SIDE, CIFAR_SIDE, 3):
        raise ValueError(f"{name} is no image that can be decoded")
    rgb: Bytes = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1), np.uint8)
    return rgb


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that the header of a JPEG or PNG image says; None for any other content, and
    for one that lacks its end."""
    if data.startswith(PNG_BEGIN):
        if data[12:16] != b"IHDR" or b"IEND" not in data[-16:]:
            return None
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    at = len(JPEG_BEGIN) if data.startswith(JPEG_BEGIN) else len(data)
    while data[at : at + 1] == b"\xff" and at + 9 <= len(data):
        if data[at + 1] in JPEG_FRAMES:
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return (width, height) if JPEG_END in data[at:] else None
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        at += 1 if data[at + 1] == 0xFF else 2 + length  # bytes may stand between segments
    return None


def _stack(found: Sequence[tuple[str, Bytes]], classes: Sequence[str]) -> Labelled:
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[name] for name, _ in found], np.uint8)
    return Labelled(np.stack([image for _, image in found]), labels)
