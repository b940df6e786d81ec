"""Recipes from their files; data sets of a few images in the formats of MNIST and CIFAR."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ncrl.tasks.recipes import Recipe, read_recipes

Bytes = NDArray[np.uint8]


def read_recipe(path: Path, variant: str = "") -> Recipe:
    """One of the recipes of a file."""
    return read_recipes(path)[variant]


def idx(array: Bytes) -> bytes:
    """An array in the idx format, by its definition."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + sizes + array.tobytes()


def digits(count: int, seed: int = 0) -> tuple[Bytes, Bytes]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return images, (np.arange(count) % 10).astype(np.uint8)


def write_mnist(folder: Path, *, gz: bool = True, count: int = 20) -> dict[str, Bytes]:
    """The four files; returns the arrays by the beginning of the file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, size, seed in (("train", count, 0), ("t10k", 10, 1)):
        images, labels = digits(size, seed)
        arrays |= {f"{part}-images": images, f"{part}-labels": labels}
        for kind, array in ((f"images-idx{3}", images), (f"labels-idx{1}", labels)):
            data = idx(array)
            name = f"{part}-{kind}-ubyte" + (".gz" if gz else "")
            (folder / name).write_bytes(gzip.compress(data) if gz else data)
    return arrays


def colours(count: int, seed: int = 0) -> Bytes:
    """Smooth images, which JPEG hardly changes: [N, 3, 32, 32]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    large = [cv2.resize(image, (32, 32), interpolation=cv2.INTER_LINEAR) for image in small]
    return np.ascontiguousarray(np.stack(large).transpose(0, 3, 1, 2))


def write_cifar(folder: Path, classes: int) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """All files of the python version, two images each; returns what they hold."""
    ten = classes == 10
    place = folder / ("cifar-10-batches-py" if ten else "cifar-100-python")
    place.mkdir(parents=True)
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    test = ["test_batch"] if ten else ["test"]
    images, labels = [], []
    for number, name in enumerate([*train, *test]):
        pixels = colours(2, number)
        own = np.array([number, classes - 1 - number], np.uint8)
        images.append(pixels)
        labels.append(own)
        key = b"labels" if ten else b"fine_labels"
        batch = {b"data": pixels.reshape(2, -1), key: own.tolist()}
        (place / name).write_bytes(pickle.dumps(batch, protocol=2))
    split = len(train)
    return (
        np.concatenate(images[:split]),
        np.concatenate(labels[:split]),
        np.concatenate(images[split:]),
        np.concatenate(labels[split:]),
    )


CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_tree(folder: Path) -> Bytes:
    """`train/<class>/*.jpg` and `test/...`, an image per class and part; returns those of train."""
    for seed, part in enumerate(("train", "test")):
        images = colours(len(CLASSES), seed)
        for name, image in zip(CLASSES, images, strict=True):
            path = folder / part / name / "0000.jpg"
            path.parent.mkdir(parents=True)
            # OpenCV's channels are blue, green, red.
            blue_first = np.ascontiguousarray(image[::-1].transpose(1, 2, 0))
            assert cv2.imwrite(str(path), blue_first, [cv2.IMWRITE_JPEG_QUALITY, 98])
    return colours(len(CLASSES), 0)


def write_archive(folder: Path, tree: Path) -> Path:
    path = folder / "cifar10_jpeg.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for part in ("train", "test"):
            tar.add(tree / part, part)
    return path
