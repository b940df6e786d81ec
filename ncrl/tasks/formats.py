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
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ncrl import files

Bytes = NDArray[np.uint8]

LARGEST_FILE = 1 << 30  # bytes; six times the largest file of these data sets, unpacked
CIFAR_SIDE = 32
CIFAR_PIXELS = 3 * CIFAR_SIDE * CIFAR_SIDE

PARTS = ("train", "test")  # folders of an archive of images
END_OF_TAR = bytes(tarfile.BLOCKSIZE)


class Labelled(NamedTuple):
    """Images [N, channels, height, width] of 0 to 255, and the classes [N] that they show."""

    images: Bytes
    labels: Bytes


def read_bytes(path: Path) -> bytes:
    """A file, unpacked if its name ends in .gz."""
    packed = files.read_bytes(path, LARGEST_FILE)
    if path.suffix != ".gz":
        return packed
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path} unpacks to more than {LARGEST_FILE:,} bytes")
    return data


def read_idx(path: Path, dimensions: int) -> Bytes:
    """An array of bytes in the idx format of http://yann.lecun.com/exdb/mnist, also gzipped, which
    must have 1 dimension, of labels, or 3, of images."""
    data = read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"{path} is no idx file: its {len(data)} bytes begin with {data[:4]!r}")
    if data[2] != 0x08:
        raise ValueError(f"{path} must hold unsigned bytes (type 0x08), got type 0x{data[2]:02x}")
    if data[3] != dimensions:
        kind = {1: "labels", 3: "images"}[dimensions]
        raise ValueError(f"{path} should hold {kind}: {dimensions} dimensions, got {data[3]}")
    begin = 4 + 4 * dimensions
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, begin, 4)]
    expected = begin + math.prod(sizes)
    if len(data) != expected:
        fault = "truncated" if len(data) < expected else "too long"
        raise ValueError(f"{path} is {fault}: {len(data):,} bytes where {expected:,} are expected")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(sizes).copy()


def read_idx_pair(images: Path, labels: Path) -> Labelled:
    """Images [N, 1, height, width] and labels from two idx files."""
    pair = Labelled(read_idx(images, 3)[:, None], read_idx(labels, 1))
    check_labelled(pair, f"{images} with {labels}", 10)
    return pair


def check_labelled(pair: Labelled, source: object, num_classes: int) -> None:
    """Raise ValueError unless there is a label for each image, and a class for each label."""
    if len(pair.images) != len(pair.labels) or not len(pair.images):
        raise ValueError(
            f"{source}: {len(pair.images):,} images do not match {len(pair.labels):,} labels"
        )
    wrong = np.flatnonzero(pair.labels >= num_classes)
    if len(wrong):
        raise ValueError(
            f"{source}: label number {wrong[0]} is {pair.labels[wrong[0]]}, where classes are "
            f"0 .. {num_classes - 1}"
        )


def read_cifar_python(path: Path, num_classes: int) -> Labelled:
    """One pickled batch of https://www.cs.toronto.edu/~kriz/cifar.html, the python version."""
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


def read_image_archive(archive: Path, num_classes: int) -> tuple[Labelled, Labelled]:
    """Training and test images, `train/<class>/<image>` and `test/<class>/<image>`, of a tar file,
    however it is compressed; nothing is unpacked to disk. Classes count in alphabetical order."""
    found: dict[str, list[tuple[str, Bytes]]] = {part: [] for part in PARTS}
    try:
        for part, name, image in _images_of(archive):
            found[part].append((name, image))
    except Exception as error:  # of tarfile and whatever unpacks it; not every Python has lzma
        raise ValueError(f"cannot read {archive}: {error}") from error
    for part, images in found.items():
        if not images:
            raise ValueError(f"{archive} holds no images of the form {part}/CLASS/NAME.jpg")
    classes = sorted({name for name, _ in found["train"]})
    for name, _ in found["test"]:
        if name not in classes:
            raise ValueError(f"{archive}: class {name!r} of test is not among those of train")
    if len(classes) != num_classes:
        raise ValueError(f"{archive}: expected {num_classes} classes, got {len(classes)}")
    train, test = (
        Labelled(
            np.stack([image for _, image in found[part]]),
            np.array([classes.index(name) for name, _ in found[part]], np.uint8),
        )
        for part in PARTS
    )
    return train, test


def _images_of(archive: Path) -> Iterator[tuple[str, str, Bytes]]:
    """Part, class and pixels of every image; raises anything for a file that is broken."""
    total = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            place = PurePosixPath(member.name).parts[-3:-1]
            file = tar.extractfile(member) if member.isfile() else None
            if file is None or len(place) < 2 or place[0] not in PARTS:
                continue
            total += member.size
            if total > LARGEST_FILE:
                raise ValueError(f"it unpacks to more than {LARGEST_FILE:,} bytes")
            yield place[0], place[1], _decode(member.name, file.read())
        # A damaged header, or a file cut off at one, is the end for tarfile, too. The real end is
        # two blocks of zeros, of which it has read the first.
        if tar.fileobj is None or tar.fileobj.read(tarfile.BLOCKSIZE) != END_OF_TAR:
            raise ValueError("it is truncated or damaged: it does not end as tar files do")


def _decode(name: str, data: bytes) -> Bytes:
    """A colour image, [3, 32, 32] in RGB."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.size != (CIFAR_SIDE, CIFAR_SIDE):  # before anything is decoded
                raise ValueError(f"it has {image.size[0]}x{image.size[1]}")
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises anything, too
        raise ValueError(
            f"{name} is no whole JPEG or PNG image of {CIFAR_SIDE}x{CIFAR_SIDE} pixels: {error}"
        ) from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
