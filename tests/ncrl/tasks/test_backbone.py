"""Frozen backbones: preparation, weights from files, rotations, and the cache of features."""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.tasks.data import Images
from ncrl.tasks.models import ResNet18
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.split_cifar import backbone as module
from ncrl.tasks.split_cifar.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Rotations,
    features_of,
    frozen,
    load_backbone,
    pixel_statistics,
    rotated,
)

CPU = torch.device("cpu")


def pictures(train: int = 12, test: int = 6, side: int = 32) -> Images:
    stream = torch.Generator().manual_seed(3)
    images = torch.randint(256, (train + test, 3, side, side), generator=stream).to(torch.uint8)
    labels = torch.arange(train + test) % 2
    parts = images[:train], labels[:train], images[train:], labels[train:]
    return Images("made up", "made up", *parts, 2)


def narrow(pooled: bool = True, side: int = 32) -> Backbone:
    torch.manual_seed(5)
    network = frozen(ResNet18(4, width=2), CPU)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    return Backbone(network, "narrow", side, mean, std, pooled)


# Networks and pixels


def test_pooled_features_are_the_means_of_the_stages() -> None:
    network = narrow().network
    seen: list[Tensor] = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda _m, _x, maps: seen.append(maps))
    x = torch.randn(3, 3, 64, 64)
    found = network.pooled(x)
    expected = torch.cat([maps.flatten(2).mean(2) for maps in seen], 1)
    assert [maps.shape[1] for maps in seen] == [2, 4, 8, 16]
    assert [maps.shape[2] for maps in seen] == [16, 8, 4, 2]
    torch.testing.assert_close(found, expected)
    last = seen[3].mean((2, 3))
    fc = network.fc
    assert isinstance(fc, nn.Linear)
    torch.testing.assert_close(network(x), last @ fc.weight.T + fc.bias)


def test_width_scales_every_stage() -> None:
    with torch.device("meta"):
        half = ResNet18(10, width=32).state_dict()
        full = ResNet18(10).state_dict()
    for name, tensor in full.items():
        if tensor.ndim:
            fixed = {"conv1.weight": (1,), "fc.weight": (0,), "fc.bias": (0,)}.get(name, ())
            shape = [n if i in fixed or n <= 7 else n // 2 for i, n in enumerate(tensor.shape)]
            assert list(half[name].shape) == shape, name


def test_statistics_of_pixels() -> None:
    images = pictures().train_images
    mean, std = pixel_statistics(images)
    for channel in range(3):
        values = images[:, channel].numpy().astype(np.float64) / 255
        assert mean[channel] == pytest.approx(values.mean(), rel=1e-6)
        assert std[channel] == pytest.approx(values.std(), rel=1e-6)


def test_images_are_normalised_and_enlarged() -> None:
    images = pictures().train_images[:2]
    backbone = narrow()
    x = module.prepare(images, 32, backbone.mean, backbone.std)
    for channel, (mean, std) in enumerate(((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))):
        expected = (images[1, channel, 7, 9].item() / 255 - mean) / std
        assert x[1, channel, 7, 9].item() == pytest.approx(expected, rel=1e-5)
    # A plane stays a plane, away from the border.
    plane = (torch.arange(32)[:, None] * 3 + torch.arange(32) * 2).to(torch.uint8)
    plane = plane.expand(1, 3, 32, 32)
    large = module.prepare(plane, 64, backbone.mean, backbone.std)[0, 0]
    assert large.shape == (64, 64)
    steps = large[2:-2].diff(dim=0)
    torch.testing.assert_close(steps, torch.full_like(steps, 1.5 / 255 / 0.2))


def test_every_image_turns_by_its_own_angle() -> None:
    images = pictures(4).train_images
    turns = torch.tensor([0, 1, 2, 3])
    before = images.clone()
    for image, turn, found in zip(images, turns.tolist(), rotated(images, turns), strict=True):
        for channel in range(3):
            expected = np.rot90(image[channel].numpy(), turn)
            assert np.array_equal(found[channel].numpy(), expected)
    assert torch.equal(images, before)


# Learning rotations

ROTATIONS = Recipe(
    task="split_cifar",
    network="resnet18",
    network_options={"num_outputs": 4, "width": 2},
    batch_size=3,
    epochs=2,
)


def test_an_epoch_shows_every_image_once_in_a_known_rotation() -> None:
    data = pictures(12)
    experiment = Rotations(ROTATIONS, data, 32, seed=7)
    assert experiment.num_updates == 8
    epochs = []
    for epoch in range(2):
        seen = []
        for update in range(4 * epoch, 4 * epoch + 4):
            x, turns = experiment.batch(update)
            assert torch.equal(x, Rotations(ROTATIONS, data, 32, seed=7).batch(update)[0])
            for image, turn in zip(x, turns.tolist(), strict=True):
                upright = torch.rot90(image, -turn, dims=(1, 2))
                originals = module.prepare(data.train_images, 32, experiment.mean, experiment.std)
                found = [
                    (index, mirrored)
                    for index, original in enumerate(originals)
                    for mirrored in (False, True)
                    if torch.equal(upright, original.flip(2) if mirrored else original)
                ]
                assert len(found) == 1
                seen.append((*found[0], turn))
        assert sorted(index for index, _, _ in seen) == list(range(12))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert {mirrored for seen in epochs for _, mirrored, _ in seen} == {False, True}
    assert {turn for seen in epochs for _, _, turn in seen} == {0, 1, 2, 3}


def test_rotations_are_measured_on_all_four() -> None:
    experiment = Rotations(ROTATIONS, pictures(), 32, seed=0)

    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(torch.full((len(x),), 2), 4).float()

    experiment.model = Always()
    assert experiment.evaluate() == {"rotation_accuracy": 25.0}
    assert math.isfinite(Rotations(ROTATIONS, pictures(), 32, seed=0).loss(0).item())


def test_backbones_that_cannot_learn_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=3 of the backbone is more than the 2"):
        Rotations(ROTATIONS, pictures(2), 32, seed=0)


# Weights from a file


def zeros() -> dict[str, Tensor]:
    """A state_dict of the right shapes that takes no room."""
    with torch.device("meta"):
        shapes = ResNet18().state_dict()
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}


def test_weights_of_torchvision_are_what_the_features_come_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ResNet18().eval()
    # torchvision's first files have no counters.
    state = {n: t for n, t in network.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "resnet18.pth")
    backbone = load_backbone(tmp_path / "resnet18.pth", 32, CPU)
    assert backbone.num_features == 1000 and "resnet18.pth" in backbone.title
    assert not backbone.network.training
    assert not any(p.requires_grad for p in backbone.network.parameters())
    images = pictures().train_images[:2]
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = network((images.double() / 255 - mean).div(std).float())
    torch.testing.assert_close(backbone.features(images), expected, rtol=1e-4, atol=1e-4)


def saved(values: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


class Code:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


WRONG_FILES = {
    "text": (lambda: b"no weights", "--backbone: cannot read"),
    "empty": (lambda: b"", "--backbone: cannot read"),
    "cut": (lambda: saved(zeros())[:2000], "--backbone: cannot read"),
    "code": (lambda: pickle.dumps(Code(), protocol=2), "--backbone: cannot read"),
    "saved code": (lambda: saved({"fc.weight": Code()}), "--backbone: cannot read"),
    "checkpoint": (lambda: saved({"epoch": 3}), "must hold a state_dict"),
    "list": (lambda: saved([torch.zeros(1)]), "must hold a state_dict"),
    "nothing": (lambda: saved({}), "'conv1.weight' is missing; nearest: none"),
    "prefix": (
        lambda: saved({f"module.{n}": t for n, t in zeros().items()}),
        "'conv1.weight' is missing; nearest: module.conv1.weight",
    ),
    "classes": (
        lambda: saved(zeros() | {"fc.weight": torch.zeros(10, 512)}),
        "size mismatch for fc.weight",
    ),
    "deeper": (
        lambda: saved(zeros() | {"layer1.2.conv1.weight": torch.zeros(1)}),
        "'layer1.2.conv1.weight' is not known; nearest: layer1.",
    ),
    "not finite": (
        lambda: saved(zeros() | {"bn1.bias": torch.full((64,), torch.nan)}),
        "bn1.bias must hold finite floating-point numbers",
    ),
    "integers": (
        lambda: saved(zeros() | {"bn1.bias": torch.zeros(64, dtype=torch.int64)}),
        "bn1.bias must hold finite floating-point numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_refused_in_one_line(name: str, tmp_path: Path, capsys: Any) -> None:
    content, message = WRONG_FILES[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(content())
    with pytest.raises(ValueError) as caught:
        load_backbone(path, 32, CPU)
    text = str(caught.value)
    assert message in text and str(path) in text and "\n" not in text
    assert "executed" not in capsys.readouterr().out


# Features and their cache


def test_features_are_standardised_and_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, data = narrow(), pictures()
    first = features_of(backbone, data, tmp_path)
    raw = backbone.features(data.train_images).double(), backbone.features(data.test_images)
    mean, std = raw[0].mean(0), raw[0].std(0, correction=0)
    dead = std < 1e-6  # stays at its scale
    assert dead.any() and not dead.all()
    std[dead] = 1
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(first.train_images.double(), (raw[0] - mean) / std, **close)
    torch.testing.assert_close(first.test_images.double(), (raw[1].double() - mean) / std, **close)
    assert first.train_images.shape == (12, 30) and first.test_images.shape == (6, 30)
    assert torch.equal(first.train_labels, data.train_labels) and first.name == data.name

    def computed(*_arguments: Any) -> Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "_compute", computed)
    again = features_of(narrow(), pictures(), tmp_path)
    assert torch.equal(again.train_images, first.train_images)
    assert torch.equal(again.test_images, first.test_images)
    assert len(list(tmp_path.iterdir())) == 1


def test_other_weights_pixels_or_preparation_are_other_features(tmp_path: Path) -> None:
    data, backbone = pictures(), narrow()
    features_of(backbone, data, tmp_path)
    test_images = data.test_images.clone()
    test_images[0, 0, 0, 0] += 1
    features_of(backbone, data._replace(test_images=test_images), tmp_path)
    features_of(backbone._replace(side=40), data, tmp_path)
    features_of(backbone._replace(pooled=False), data, tmp_path)
    features_of(backbone._replace(mean=backbone.mean + 0.1), data, tmp_path)
    other = narrow()
    other.network.bn1.running_mean[0] += 1  # type: ignore[index,operator]
    features_of(other, data, tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "text", "rows", "width", "not finite", "type"])
def test_a_broken_cache_is_computed_again(damage: str, tmp_path: Path) -> None:
    backbone, data = narrow(), pictures()
    expected = features_of(backbone, data, tmp_path)
    (path,) = tmp_path.iterdir()
    with np.load(path) as arrays:
        train, test = arrays["train"], arrays["test"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no archive")
    else:
        changed = {
            "rows": train[:-1],
            "width": train[:, :-1],
            "not finite": np.where(train == train[0, 0], np.nan, train).astype(np.float32),
            "type": train.astype(np.float64),
        }[damage]
        np.savez(path, train=changed, test=test)
    found = features_of(backbone, data, tmp_path)
    assert torch.equal(found.train_images, expected.train_images)
    assert torch.equal(found.test_images, expected.test_images)
    with np.load(path) as arrays:  # repaired
        assert np.array_equal(arrays["train"], train)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    found = features_of(narrow(), pictures(), file / "cache")
    assert found.train_images.isfinite().all()
    assert "not cached in" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    backbone = narrow()
    backbone.network.conv1.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="narrow: its features are not finite"):
        features_of(backbone, pictures(), tmp_path)
    assert not list(tmp_path.iterdir())
