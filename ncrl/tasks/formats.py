"""File formats of MNIST and CIFAR, read into arrays of bytes; whatever is wrong is one ValueError.

Sizes in headers are compared with the size of the file before memory is allocated for them, and
nothing that a file contains is executed.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

IDX_UINT8 = 0x08
IDX_KINDS = {1: "labels", 3: "images"}
"""By the number of dimensions, of the files that MNIST consists of."""

LARGEST_FILE = 1 << 30
"""Bytes; six times the largest file of these data sets, unpacked."""

CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE * CIFAR_SIDE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


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
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
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


# The two formats of CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html


def read_cifar_binary(path: Path, num_classes: int) -> Labelled:
    """One .bin file: for each image its label (CIFAR-100: coarse, then fine) and its pixels.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    data = read_bytes(path)
    num_labels = 2 if num_classes == 100 else 1
    record = num_labels + CIFAR_PIXELS
    if not data or len(data) % record:
        raise ValueError(
            f"{path} must hold whole records of {record} bytes, but has {len(data):,} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    images = records[:, num_labels:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).copy()
    pair = Labelled(images, records[:, num_labels - 1].copy())
    check_labelled(pair, path, num_classes)
    return pair


def read_cifar_python(path: Path, num_classes: int) -> Labelled:
    """One pickled batch of the python version; nothing in the pickle is executed.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(read_bytes(path)), encoding="bytes").load()
    except ValueError:
        raise
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


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays of numbers and plain values, and refuses everything else."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"a pickled CIFAR batch does not need {module}.{name}: refused")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


# Images in folders named after their classes.

PARTS = ("train", "test")


def read_image_folder(folder: Path) -> tuple[Labelled, Labelled, list[str]]:
    """Training and test images of `train/<class>/<image>` and `test/<class>/<image>`.

    Returns:
        Both parts, and the classes in alphabetical order.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    paths = sorted(path for part in PARTS for path in (folder / part).glob("*/*"))
    files = ((path.relative_to(folder), read_bytes(path)) for path in paths)
    return _image_tree(folder, ((PurePosixPath(path), data) for path, data in files))


def read_image_archive(archive: Path) -> tuple[Labelled, Labelled, list[str]]:
    """`read_image_folder` of a tar file, however it is compressed; nothing is unpacked to disk.

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
    train, test = (_stack(source, found[part], classes) for part in PARTS)
    return train, test, classes


def _decode(name: str, data: bytes) -> Bytes:
    """A colour image, [3, height, width] in RGB."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if image is None:
        raise ValueError(f"{name} is no image that can be decoded")
    rgb: Bytes = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1), np.uint8)
    return rgb


def _stack(source: Path, found: Sequence[tuple[str, Bytes]], classes: Sequence[str]) -> Labelled:
    shape = found[0][1].shape
    for name, image in found:
        if image.shape != shape:
            raise ValueError(
                f"{source}: images must be of one size, got {_size(shape)} and "
                f"{_size(image.shape)} (class {name})"
            )
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[name] for name, _ in found], np.uint8)
    return Labelled(np.stack([image for _, image in found]), labels)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2]}x{shape[1]}"
