"""Whole data sets in tensors: from files, from OpenML, or the digits that scikit-learn ships.

A data set is looked for in a folder that the user names (`--data-dir`, or the environment variable
NCRL_DATA), and fetched only if asked for. Without either there are the embedded digits, which every
output names, so that nobody takes them for MNIST.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ncrl.files import given_path, write_atomically
from ncrl.shell.screen import say
from ncrl.tasks.formats import (
    CIFAR_SIDE,
    PARTS,
    Labelled,
    check_labelled,
    read_bytes,
    read_cifar_python,
    read_idx_pair,
    read_image_archive,
)

MNIST_SIDE = 28

Arrays = Mapping[str, NDArray[Any]]

DIGITS_TEST_EVERY = 5  # of the embedded digits every fifth is kept for testing
DIGITS = "digits of scikit-learn"  # the name of the embedded data set
# What the name of a data set says whose test images are not used.
HELD_OUT = "held out and measured on"
FETCH_HINT = "--download fetches it from OpenML"


class Images(NamedTuple):
    """A data set of images, on the CPU; `to` moves it."""

    name: str  # what it is, for result rows; runs on data of another name or `mark` are other runs
    source: str  # the same with where it comes from, for outputs
    train_images: Tensor  # [N, channels, height, width], uint8
    train_labels: Tensor  # [N], int64
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    # A hash of all images and labels; empty for the embedded digits, which are always the same.
    mark: str = ""

    @property
    def readings(self) -> dict[str, str]:
        """What tells this data set from another of the same name, for `Experiment.readings`."""
        return {"images": self.mark} if self.mark else {}

    @property
    def is_embedded(self) -> bool:
        """Whether it is the digits that scikit-learn ships."""
        return self.name.startswith(DIGITS)

    def to(self, device: torch.device | str) -> Images:
        """The same data set on a device."""
        parts: Any = (part.to(device) if isinstance(part, Tensor) else part for part in self)
        return Images(*parts)

    def held_out(self, every: int) -> Images:
        """One of `every` training images in place of the test images, which are not used: what
        settings are chosen on. Not the last ones, as files may be in order of classes."""
        total = len(self.train_labels)
        if not 1 < every <= total:
            raise ValueError(f"cannot hold one of {every} out of {total:,} training images")
        held = torch.arange(total, device=self.train_labels.device) % every == every - 1
        said = f", one of {every} training images {HELD_OUT}"
        return self._replace(
            name=self.name + said,
            source=self.source + said,
            train_images=self.train_images[~held],
            train_labels=self.train_labels[~held],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )

    def standardised(self) -> Images:
        """Pixels as numbers of mean 0 and standard deviation 1 in every channel of the training
        images; the test images are treated with the same constants."""
        pixels = self.train_images.float() / 255
        mean = pixels.mean(dim=(0, 2, 3), keepdim=True)  # [1, channels, 1, 1]
        std = pixels.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        test = (self.test_images.float() / 255 - mean) / std
        return self._replace(train_images=(pixels - mean) / std, test_images=test)


def load_mnist(data_dir: str | Path | None = None, *, download: bool = False) -> Images:
    """MNIST, or what else comes in its four idx files (also .gz); the digits if no folder is named.

    Args:
        data_dir: holds the files, or holds them in `mnist/` or `MNIST/raw/`; NCRL_DATA if None.
        download: where there are none, get it from OpenML through scikit-learn, which caches it in
            `data_dir`.
    """
    folder = data_folder(data_dir)
    if folder is None and not download:
        return load_digits(MNIST_SIDE)
    places = [] if folder is None else [folder, folder / "mnist", folder / "MNIST" / "raw"]
    for place in places:
        found = [_idx_path(place, name) for name in IDX_FILES]
        paths = [path for path in found if path is not None]
        if not paths:
            continue
        if None in found:
            missing = IDX_FILES[found.index(None)]
            raise ValueError(f"{place} holds {paths[0].name} but no {missing} or {missing}.gz")
        train, test = read_idx_pair(*paths[:2]), read_idx_pair(*paths[2:])
        if train.images.shape[1:] != test.images.shape[1:]:
            raise ValueError(f"{place}: training and test images differ in size")
        return _images("MNIST", place, train, test, 10)
    if download:
        return _fetch("mnist_784", "MNIST", folder, 60_000, (1, MNIST_SIDE, MNIST_SIDE))
    raise ValueError(
        f"no MNIST in {folder}: expected {IDX_FILES[0]}.gz and its three companions there, in "
        f"mnist/ or in MNIST/raw/; {FETCH_HINT}"
    )


IDX_FILES = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def _idx_path(folder: Path, name: str) -> Path | None:
    names = name, name.replace("-idx", ".idx")  # as some copies have it
    paths = (folder / f"{candidate}{suffix}" for candidate in names for suffix in ("", ".gz"))
    return next(filter(Path.is_file, paths), None)


def load_cifar(
    data_dir: str | Path | None = None, num_classes: int = 10, *, download: bool = False
) -> Images:
    """CIFAR-10 or CIFAR-100; the embedded digits, as colour images, if no folder is named.

    Args:
        data_dir: holds one of these, NCRL_DATA if None: the unpacked python version
            (`cifar-10-batches-py`, `cifar-100-python`), or `cifar10_jpeg.tar.xz`, a tar file of
            images `train/<class>/*.jpg` and `test/<class>/*.jpg`.
        num_classes: 10 or 100.
        download: see `load_mnist`.
    """
    if num_classes not in BATCHES:
        raise ValueError(f"CIFAR has 10 or 100 classes, got {num_classes}")
    folder = data_folder(data_dir)
    if folder is None and not download:
        if num_classes == 100:
            raise ValueError("there are 10 embedded digits; CIFAR-100 needs --data-dir")
        return load_digits(CIFAR_SIDE, channels=3)
    data = None if folder is None else _find_cifar(folder, num_classes)
    if data is not None:
        return data
    if not download:
        raise ValueError(
            f"no CIFAR-{num_classes} in {folder}: expected {BATCHES[num_classes][0]}/ or "
            f"cifar{num_classes}_jpeg.tar.xz; {FETCH_HINT}"
        )
    if num_classes == 100:
        raise ValueError(
            "OpenML's CIFAR-100 has no split into training and test images; give --data-dir "
            "with cifar-100-python"
        )
    return _fetch("CIFAR_10", "CIFAR-10", folder, 50_000, (3, CIFAR_SIDE, CIFAR_SIDE))


def _find_cifar(folder: Path, num_classes: int) -> Images | None:
    """What is in a folder; None if nothing is."""
    name = f"CIFAR-{num_classes}"
    name_of_folder, files = BATCHES[num_classes]
    for place in (folder / name_of_folder, folder):
        if any((place / file).is_file() for file in files):
            for file in files:
                if not (place / file).is_file():
                    raise ValueError(f"{place} is incomplete: there is no {file}")
            *parts, test = (read_cifar_python(place / file, num_classes) for file in files)
            train = Labelled(*(np.concatenate(part) for part in zip(*parts, strict=True)))
            return _images(name, place, train, test, num_classes)
    for path in sorted(folder.glob(f"cifar{num_classes}_jpeg.tar*")):
        return _cached_archive(path, name, num_classes)
    return None


# Folder and files of the python version, by number of classes; the last one is for testing.
BATCHES: Mapping[int, tuple[str, Sequence[str]]] = {
    10: ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
    100: ("cifar-100-python", ["train", "test"]),
}
# What the name of a data set from image files says: compression costs a little accuracy.
JPEG = ", JPEG-compressed copies"


def _images(name: str, place: object, train: Labelled, test: Labelled, num_classes: int) -> Images:
    mark = hashlib.sha256()
    for array in (*train, *test):
        mark.update(np.ascontiguousarray(array).data)
    return Images(
        name,
        f"{name} ({place})",
        torch.from_numpy(train.images),
        torch.from_numpy(train.labels).long(),
        torch.from_numpy(test.images),
        torch.from_numpy(test.labels).long(),
        num_classes,
        mark.hexdigest()[:16],
    )


def cache_folder() -> Path:
    """Where decoded data sets are kept: `ncrl` in XDG_CACHE_HOME, which is ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncrl"


def cached(path: Path, check: Callable[[Arrays], None], make: Callable[[], Arrays]) -> Arrays:
    """Arrays from a file below `cache_folder()`, or made and kept there; `check` raises for arrays
    that cannot be used, which are then made again."""
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
        found = dict(file)
        check(found)
        return found
    arrays = make()
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever finishes last replaces a whole file by a whole and equal one.
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        say(f"not cached in {path.parent}: {error.strerror}", sys.stderr)
    return arrays


def _cached_archive(path: Path, name: str, num_classes: int) -> Images:
    """Decoded archives are kept: decoding takes far longer than reading the arrays."""
    key = hashlib.sha256(read_bytes(path)).hexdigest()
    names = [f"{part}_{field}" for part in PARTS for field in Labelled._fields]

    def parts_of(arrays: Arrays) -> tuple[Labelled, Labelled]:
        found = [arrays[name] for name in names]
        return Labelled(*found[:2]), Labelled(*found[2:])

    def check(arrays: Arrays) -> None:
        for part in parts_of(arrays):
            check_labelled(part, path, num_classes)

    def decode() -> Arrays:
        train, test = read_image_archive(path, num_classes)
        return dict(zip(names, [*train, *test], strict=True))

    file = cache_folder() / f"{path.name.split('.')[0]}-{key[:16]}.npz"
    train, test = parts_of(cached(file, check, decode))
    return _images(name + JPEG, path, train, test, num_classes)


def data_folder(data_dir: str | Path | None = None) -> Path | None:
    """The folder that was named, or NCRL_DATA; None if there is neither."""
    # An empty flag, as of a variable of the shell that is not set, is the current folder.
    named = os.environ.get("NCRL_DATA") or None if data_dir is None else data_dir
    if named is None:
        return None
    folder = given_path(named)
    if not folder.is_dir():
        origin = "NCRL_DATA" if data_dir is None else "--data-dir"
        reason = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{origin} must be a folder: {folder} {reason}")
    return folder


def load_digits(side: int, *, channels: int = 1) -> Images:
    """The 1,797 digits of 8x8 pixels that scikit-learn ships, enlarged to `side` x `side`.

    Enlarged, they go through the same networks as MNIST and CIFAR. Every fifth is a test image.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)  # [N, 1, 8, 8]
    images = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).repeat(1, channels, 1, 1)
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.arange(len(labels)) % DIGITS_TEST_EVERY == DIGITS_TEST_EVERY - 1
    return Images(
        DIGITS,
        f"the {len(labels):,} digits of 8x8 pixels that scikit-learn ships, enlarged to "
        f"{side}x{side}: not the paper's data (--data-dir or NCRL_DATA names a folder with that)",
        images[~is_test],
        labels[~is_test],
        images[is_test],
        labels[is_test],
        10,
    )


def _fetch(
    name: str, title: str, folder: Path | None, num_train: int, shape: tuple[int, ...]
) -> Images:
    """A data set from OpenML, whose first `num_train` images are those for training."""
    from sklearn.datasets import fetch_openml

    try:
        bunch = fetch_openml(
            name, version=1, as_frame=False, parser="liac-arff", data_home=folder, n_retries=1
        )
    except Exception as error:  # the network, OpenML's answers, a full disk
        raise ValueError(
            f"cannot fetch {title} from OpenML: {error}; without network, give --data-dir with "
            "its files"
        ) from error
    pixels, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    if pixels.ndim != 2 or pixels.shape[1] != np.prod(shape) or len(pixels) <= num_train:
        raise ValueError(f"OpenML's {name} is not what was expected: shape {pixels.shape}")
    images = pixels.astype(np.uint8).reshape(-1, *shape)
    pair = Labelled(images, labels.astype(np.int64).astype(np.uint8))
    check_labelled(pair, f"OpenML's {name}", 10)
    train, test = (
        Labelled(*(array[part].copy() for array in pair))
        for part in (slice(num_train), slice(num_train, None))
    )
    return _images(title, "from OpenML", train, test, 10)
