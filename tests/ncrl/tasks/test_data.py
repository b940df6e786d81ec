"""Data sets read from every layout, and what is said about files that are wrong."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ncrl.tasks.data import Images, cache_folder, load_cifar, load_digits, load_mnist
from tests.ncrl.tasks import files

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("NCRL_DATA", ROOT.parent / "shared" / "datasets"))
"""Real data, where there is any: beside the checkout unless NCRL_DATA says otherwise."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NCRL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Images in folders of their classes, which lie packed in `tmp_path`."""
    folder = tmp_path / "tree"
    files.write_tree(folder)
    files.write_archive(tmp_path, folder)
    return folder


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
def test_mnist_is_read_from_its_four_files(tmp_path: Path, gz: bool, place: str) -> None:
    written = files.write_mnist(tmp_path / place, gz=gz)
    data = load_mnist(tmp_path)
    assert data.name == "MNIST" and str(tmp_path / place) in data.source
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_images.shape == (20, 1, 28, 28)
    assert np.array_equal(data.train_images[:, 0].numpy(), written["train-images"])
    assert np.array_equal(data.train_labels.numpy(), written["train-labels"])
    assert np.array_equal(data.test_images[:, 0].numpy(), written["t10k-images"])
    assert np.array_equal(data.test_labels.numpy(), written["t10k-labels"])


def test_the_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_mnist(tmp_path)
    monkeypatch.setenv("NCRL_DATA", str(tmp_path))
    assert load_mnist().name == "MNIST"
    monkeypatch.setenv("NCRL_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"NCRL_DATA must be a folder.*elsewhere does not exist"):
        load_mnist()


def test_without_a_folder_there_are_the_digits_and_it_says_so() -> None:
    from sklearn.datasets import load_digits as original

    data = load_mnist()
    assert data.name == "digits of scikit-learn" and "not the paper's data" in data.source
    assert data.train_images.shape == (1438, 1, 28, 28)
    assert data.test_images.shape == (359, 1, 28, 28)
    bunch = original()
    assert data.test_labels.tolist() == bunch.target[4::5].tolist()
    # Means over the 8x8 areas of an enlarged image give the original back, but for its borders.
    enlarged = load_digits(32)
    small = torch.nn.functional.avg_pool2d(enlarged.test_images.float(), 4)[:, 0] * 16 / 255
    blurred = torch.from_numpy(bunch.images[4::5]).float()
    assert float(torch.corrcoef(torch.stack([small.flatten(), blurred.flatten()]))[0, 1]) > 0.95
    colour = load_cifar()
    assert colour.train_images.shape == (1438, 3, 32, 32) and colour.name == data.name
    assert torch.equal(colour.train_images[:, 0], colour.train_images[:, 2])


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def changed(
    name: str, change: Callable[[bytes], bytes], suffix: str = ""
) -> Callable[[Path], object]:
    """What gives a file of a folder another content, and perhaps another name."""

    def spoil(folder: Path) -> None:
        data = change((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / f"{name}{suffix}").write_bytes(data)

    return spoil


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


ELEVEN = np.array([0, 1, 2, 11, *[0] * 16], np.uint8)
WRONG_IDX: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        changed(IMAGES, lambda data: data[:-7]),
        r"train-images-idx3-ubyte is truncated: 15,689 bytes where 15,696",
    ),
    "too long": (
        changed(LABELS, lambda data: data + b"\0"),
        r"train-labels-idx1-ubyte is too long: 29 bytes where 28",
    ),
    "empty": (
        changed(TEST_LABELS, lambda _: b""),
        r"t10k-labels-idx1-ubyte is no idx file: its 0 bytes",
    ),
    "text": (
        changed(TEST_LABELS, lambda _: b"<html>not found</html>"),
        r"t10k-labels-idx1-ubyte is no idx file: its 22 bytes begin with b'<htm'",
    ),
    "images for labels": (
        lambda folder: shutil.copy(folder / IMAGES, folder / LABELS),
        r"train-labels-idx1-ubyte should hold labels: 1 dimensions, got 3",
    ),
    "floats": (
        changed(IMAGES, lambda data: b"\0\0\x0d" + data[3:]),
        r"train-images-idx3-ubyte must hold unsigned bytes.*0x0d",
    ),
    "absurd": (
        changed(IMAGES, lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:]),
        r"train-images-idx3-ubyte is truncated: .* bytes where 3,367,254,359,296 are",
    ),
    "a header": (
        changed(IMAGES, lambda data: data[:9]),
        r"train-images-idx3-ubyte is truncated: 9 bytes where",
    ),
    "fewer labels": (
        changed(LABELS, lambda _: files.idx(files.digits(19)[1])),
        r"train-images.* with .*train-labels.*: 20 images do not match 19 labels",
    ),
    "a class too many": (
        changed(LABELS, lambda _: files.idx(ELEVEN)),
        r"train-labels.*: label number 3 is 11, where classes are 0 .. 9",
    ),
    "missing": (
        lambda folder: (folder / TEST_IMAGES).unlink(),
        r"but no t10k-images-idx3-ubyte",
    ),
    "other sizes": (
        changed(TEST_IMAGES, lambda _: files.idx(np.zeros((10, 30, 30), np.uint8))),
        r"training and test images differ in size",
    ),
    "cut gzip": (
        changed(IMAGES, lambda data: gzip.compress(data)[:-20], ".gz"),
        r"cannot read .*train-images-idx3-ubyte.gz: ",
    ),
    "wrong checksum": (
        changed(IMAGES, lambda data: flipped(gzip.compress(data), -6), ".gz"),
        r"cannot read .*train-images-idx3-ubyte.gz: .*CRC",
    ),
}


@pytest.mark.parametrize("fault", WRONG_IDX)
def test_a_wrong_idx_file_is_named(tmp_path: Path, fault: str) -> None:
    spoil, message = WRONG_IDX[fault]
    files.write_mnist(tmp_path, gz=False)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_mnist(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_mnist_says_what_was_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no MNIST in \.: expected"):
        load_mnist("")
    with pytest.raises(ValueError, match=r"no MNIST in .*train-images-idx3-ubyte.gz.*--download"):
        load_mnist(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--data-dir must be a folder: .*file is a file"):
        load_mnist(tmp_path / "file")


@pytest.mark.parametrize("classes", [10, 100])
def test_batches_of_cifar_are_read(tmp_path: Path, classes: int) -> None:
    expected = files.write_cifar(tmp_path, classes)
    data = load_cifar(tmp_path, classes)
    assert data.name == f"CIFAR-{classes}" and data.num_classes == classes
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    found = data.train_images, data.train_labels, data.test_images, data.test_labels
    for tensor, array in zip(found, expected, strict=True):
        assert np.array_equal(tensor.numpy(), array)
    inside = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert torch.equal(load_cifar(inside, classes).train_images, data.train_images)


def test_image_files_are_read_in_order_of_classes(tmp_path: Path) -> None:
    images = files.write_tree(tmp_path / "tree")
    files.write_archive(tmp_path, tmp_path / "tree")
    data = load_cifar(tmp_path)
    assert data.name == "CIFAR-10, JPEG-compressed copies"
    assert data.train_labels.tolist() == list(range(10)) == data.test_labels.tolist()
    difference = np.abs(data.train_images.numpy().astype(int) - images)
    assert difference.mean() < 3, "channels or images in another order"


def test_a_decoded_archive_is_kept_and_a_broken_copy_is_not_used(
    tree: Path, tmp_path: Path
) -> None:
    first = load_cifar(tmp_path)
    (cached,) = cache_folder().glob("*.npz")
    assert cache_folder().is_relative_to(tmp_path)
    assert not list(cache_folder().glob("tmp*"))
    again = load_cifar(tmp_path)
    assert torch.equal(again.train_images, first.train_images)
    assert torch.equal(again.test_labels, first.test_labels)
    cached.write_bytes(cached.read_bytes()[:5000])
    assert torch.equal(load_cifar(tmp_path).train_images, first.train_images)
    with np.load(cached) as arrays:  # written anew
        assert np.array_equal(arrays["test_labels"], np.arange(10))
    # Another archive of the same name is another data set.
    shutil.rmtree(tree / "train" / "truck")
    files.write_archive(tmp_path, tree)
    with pytest.raises(ValueError, match=r"class 'truck' of test is not among"):
        load_cifar(tmp_path)


@pytest.mark.usefixtures("tree")
def test_an_unwritable_cache_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert len(load_cifar(tmp_path).train_images) == 10
    assert "not cached" in capsys.readouterr().err


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("canary"),)  # type: ignore[return-value]


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_cifar(tmp_path, 10)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(pickle.dumps({b"data": Malicious(), b"labels": [0]}))
    with pytest.raises(ValueError, match="refused"):
        load_cifar(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_wrong_cifar_file_is_named(tmp_path: Path) -> None:
    files.write_cifar(tmp_path, 10)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.unlink()
    with pytest.raises(ValueError, match=r"is incomplete: there is no data_batch_2"):
        load_cifar(tmp_path)
    with pytest.raises(ValueError, match=r"no CIFAR-100 in .*cifar-100-python/"):
        load_cifar(tmp_path, 100)


PYTHON_BATCHES = [
    (b"no pickle", "is no pickled CIFAR batch"),
    (pickle.dumps([1, 2]), "is no batch of CIFAR-10"),
    (pickle.dumps({b"data": [1], b"labels": [1]}), "data must be an array of bytes"),
    (
        pickle.dumps({b"data": np.zeros((1, 9), np.uint8), b"labels": [1]}),
        "images must have 3072 bytes, got 9",
    ),
    (
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}),
        "1 images do not match 2 labels",
    ),
    (
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [300]}),
        "label number 0 is 255",
    ),
    (
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["x"]}),
        "labels must be a list of classes",
    ),
    # A terabyte: as the size of an array, and as a place in the memo.
    (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntS'b'\ntR.",
        "is no batch of CIFAR-10",
    ),
    (b"cnumpy\nndarray\n((I1000000000000\ntS'u1'\ntR.", "is no pickled CIFAR batch"),
    (b"I1\nr\xff\xff\xff\x7f.", "far beyond its end"),
]


@pytest.mark.parametrize(("data", "message"), PYTHON_BATCHES)
def test_a_wrong_python_batch_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    files.write_cifar(tmp_path, 10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").write_bytes(data)
    with pytest.raises(ValueError, match=rf"data_batch_4.*{message}"):
        load_cifar(tmp_path)


def picture(width: int, height: int) -> bytes:
    """A JPEG whose header is changed to say these sizes."""
    data = bytearray(cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes())
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
NOISE_JPEG = cv2.imencode(".jpg", noise)[1].tobytes()
NOISE_PNG = cv2.imencode(".png", noise)[1].tobytes()
SMALL_PNG = cv2.imencode(".png", noise[:31])[1].tobytes()
WRONG_IMAGES = [
    (b"\xff\xd8 no image", "is no whole JPEG or PNG image"),
    (b"", "is no whole JPEG or PNG image"),
    (cv2.imencode(".bmp", noise)[1].tobytes(), "is no whole JPEG or PNG image"),
    (NOISE_JPEG[: len(NOISE_JPEG) // 2], "is no whole JPEG or PNG image"),
    (NOISE_PNG[: len(NOISE_PNG) // 2], "is no whole JPEG or PNG image"),
    (picture(50_000, 20_000), "is no whole JPEG or PNG image of 32x32"),
    (SMALL_PNG, "is no whole JPEG or PNG image of 32x32 pixels: it has 32x31"),
]


@pytest.mark.parametrize(("data", "message"), WRONG_IMAGES)
def test_a_wrong_image_is_named_before_it_is_decoded(
    tree: Path, tmp_path: Path, data: bytes, message: str
) -> None:
    (tree / "train" / "cat" / "0000.jpg").write_bytes(data)
    files.write_archive(tmp_path, tree)
    with pytest.raises(ValueError, match=rf"train/cat/0000.jpg.* {message}"):
        load_cifar(tmp_path)


def test_wrong_classes_of_images_are_named(tree: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(tree / part / "dog")
    files.write_archive(tmp_path, tree)
    with pytest.raises(ValueError, match=r"expected 10 classes, got 9"):
        load_cifar(tmp_path)
    shutil.rmtree(tree / "test")
    (tree / "test").mkdir()
    files.write_archive(tmp_path, tree)
    with pytest.raises(ValueError, match=r"holds no images of the form test/CLASS/NAME.jpg"):
        load_cifar(tmp_path)


def test_a_file_that_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "cifar10_jpeg.tar.xz").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"cifar10_jpeg.tar.xz: it is no regular file"):
        load_cifar(tmp_path)
    files.write_mnist(tmp_path, gz=False)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    os.mkfifo(tmp_path / "t10k-labels-idx1-ubyte")
    with pytest.raises(ValueError, match=r"no t10k-labels-idx1-ubyte"):
        load_mnist(tmp_path)


@pytest.mark.usefixtures("tree")
def test_a_full_disk_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(load_cifar(tmp_path).train_images) == 10
    assert "not cached" in capsys.readouterr().err and not list(cache_folder().iterdir())


@pytest.mark.usefixtures("tree")
def test_a_broken_archive_is_named_and_not_cached(tmp_path: Path) -> None:
    path = tmp_path / "cifar10_jpeg.tar.xz"
    for content in (path.read_bytes()[:-500], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*cifar10_jpeg.tar.xz"):
            load_cifar(tmp_path)
    assert not cache_folder().exists()


def cut_off(content: bytes, place: int) -> bytes:
    return content[:place]


@pytest.mark.parametrize("after", [0, 100])
@pytest.mark.parametrize("damage", [cut_off, flipped])
def test_an_archive_without_compression_is_read_to_its_end_or_refused(
    tmp_path: Path, damage: Callable[[bytes, int], bytes], after: int
) -> None:
    """It has no checksum but those of its headers, of which tarfile ignores all but the first."""
    files.write_tree(tmp_path / "tree")
    path = tmp_path / "cifar10_jpeg.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for part in ("train", "test"):
            tar.add(tmp_path / "tree" / part, part)
    assert len(load_cifar(tmp_path).test_images) == 10
    content = path.read_bytes()
    path.write_bytes(damage(content, content.rindex(b"test/truck/0000.jpg") + after))
    with pytest.raises(ValueError, match=r"cifar10_jpeg\.tar: it is truncated or damaged"):
        load_cifar(tmp_path)


def test_members_of_an_archive_are_not_written_anywhere(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    files.write_tree(tree)
    image = tree / "train" / "cat" / "0000.jpg"
    with tarfile.open(tmp_path / "cifar10_jpeg.tar", "w") as tar:
        for part in ("train", "test"):
            tar.add(tree / part, part)
        tar.add(image, "../train/cat/0001.jpg")
    before = sorted(tmp_path.rglob("*.jpg"))
    data = load_cifar(tmp_path)
    assert data.train_labels.tolist().count(3) == 2
    assert sorted(tmp_path.rglob("*.jpg")) == before


def some_images() -> Images:
    pixels = torch.arange(6 * 2 * 2 * 2, dtype=torch.uint8).reshape(6, 2, 2, 2)
    labels = torch.arange(6)
    return Images("some", "some (here)", pixels, labels, pixels[:2] + 7, labels[:2], 6)


def test_standardised_pixels_have_mean_0_and_deviation_1_by_channel() -> None:
    data = some_images()
    found = data.standardised()
    train = data.train_images.numpy() / 255
    for channel in range(2):
        mean, std = train[:, channel].mean(), train[:, channel].std(ddof=1)
        for images, plain in zip(
            (found.train_images, found.test_images),
            (data.train_images, data.test_images),
            strict=True,
        ):
            expected = (plain[:, channel].numpy() / 255 - mean) / std
            assert np.allclose(images[:, channel].numpy(), expected, atol=1e-6)


def test_held_out_images_replace_the_test_images() -> None:
    data = some_images()
    held = data.held_out(3)
    assert torch.equal(held.train_images, data.train_images[[0, 1, 3, 4]])
    assert torch.equal(held.test_images, data.train_images[[2, 5]])
    assert held.test_labels.tolist() == [2, 5] and held.train_labels.tolist() == [0, 1, 3, 4]
    assert held.name != data.name
    for every in (1, 7):
        with pytest.raises(ValueError, match=f"cannot hold one of {every} out of 6"):
            data.held_out(every)


def test_images_in_order_of_classes_are_held_out_of_each() -> None:
    data = some_images()
    data = data._replace(train_labels=torch.arange(6) // 3)
    assert data.held_out(3).test_labels.tolist() == [0, 1]


def test_no_network_is_one_line_with_the_offline_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    with pytest.raises(ValueError, match=r"cannot fetch MNIST from OpenML: no route.*--data-dir"):
        load_mnist(download=True)
    with pytest.raises(ValueError, match=r"cannot fetch CIFAR-10 from OpenML"):
        load_cifar(download=True)
    with pytest.raises(ValueError, match=r"CIFAR-100 has no split"):
        load_cifar(num_classes=100, download=True)


def test_what_openml_returns_is_split_as_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets
    from sklearn.utils import Bunch

    images, labels = np.zeros((60_003, 28, 28), np.uint8), np.arange(60_003) % 10
    images[60_000:] = files.digits(3)[0]
    names = labels.astype(str)
    asked: dict[str, object] = {}

    def fetch(name: str, **options: object) -> Bunch:
        asked.update(options, name=name)
        return Bunch(data=images.reshape(len(images), -1), target=names)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    data = load_mnist(download=True)
    assert asked["name"] == "mnist_784" and asked["version"] == 1
    assert len(data.train_images) == 60_000 and len(data.test_images) == 3
    assert np.array_equal(data.test_images[:, 0].numpy(), images[60_000:])
    assert data.test_labels.tolist() == labels[60_000:].tolist()


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="needs MNIST's files")
def test_the_real_mnist() -> None:
    data = load_mnist(SHARED)
    assert len(data.train_images) == 60_000 and len(data.test_images) == 10_000
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test_labels.bincount().tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    mean = int(data.train_images.sum(dtype=torch.int64)) / data.train_images.numel() / 255
    assert mean == pytest.approx(0.1307, abs=1e-4)


def test_files_at_hand_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("there is no need to")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    files.write_mnist(tmp_path / "mnist")
    files.write_cifar(tmp_path, 10)
    assert len(load_mnist(tmp_path, download=True).train_labels) == 20
    assert len(load_cifar(tmp_path, download=True).train_labels) == 10
