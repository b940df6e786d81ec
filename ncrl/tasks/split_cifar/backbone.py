"""Frozen ResNet-18 features of images: ImageNet's weights from a file, or a network trained here.

Features of a whole data set are computed once and kept in the cache folder under what they follow
from: weights, pixels and preparation. B stands for images.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl.checks import nearest
from ncrl.shell.screen import LINE_SECONDS, say
from ncrl.shell.tensors import read_tensors
from ncrl.tasks.data import Arrays, Images, cache_folder, cached
from ncrl.tasks.experiment import Experiment, evaluating, random_stream
from ncrl.tasks.models.resnet import ResNet18
from ncrl.tasks.recipes import Recipe, build_network

# What torchvision's weights were trained with: statistics of pixels from 0 to 1, by channel.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIDE = 224

TURNS = 4  # quarters of a turn that a rotated image may have made
MEASURED = 500  # test images, in every rotation, on which a backbone is measured
FEATURE_BATCH = 250

LEAST_STD = 1e-6  # features that vary less are left at their scale


class Backbone(NamedTuple):
    """A frozen network and how images are prepared for it."""

    network: ResNet18
    title: str  # for outputs and result rows: above all, whether it has seen ImageNet
    side: int  # images are enlarged to side x side
    mean: Tensor  # of pixels from 0 to 1, by channel: [3]
    std: Tensor
    pooled: bool  # whether its features are the stages' means, [B, 15 w], in place of its outputs

    @property
    def num_features(self) -> int:
        """Numbers for each image."""
        network = self.network
        return network.STAGE_WIDTHS * network.width if self.pooled else network.num_outputs

    def features(self, images: Tensor) -> Tensor:
        """Bytes [B, 3, height, width] -> [B, num_features]."""
        prepared = prepare(images, self.side, self.mean, self.std)
        features: Tensor = self.network.pooled(prepared) if self.pooled else self.network(prepared)
        return features

    @property
    def mark(self) -> str:
        """Twelve characters that follow from weights and preparation."""
        content = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            if not name.endswith(UNUSED):
                content.update(name.encode())
                content.update(as_bytes(tensor))
        for tensor in (self.mean, self.std):
            content.update(as_bytes(tensor))
        content.update(f"{self.side} {self.pooled}".encode())
        return content.hexdigest()[:12]


def prepare(images: Tensor, side: int, mean: Tensor, std: Tensor) -> Tensor:
    """Bytes [B, 3, height, width] as numbers, normalised by channel, and enlarged to side x side:
    [B, 3, side, side]."""
    pixels = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    if side != images.shape[-1]:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    return pixels


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel of bytes [N, 3, height, width], as of 0 to 1."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    values = torch.arange(256, dtype=torch.float64, device=images.device) / 255
    shares = counts.double() / counts.sum(1, keepdim=True)  # exact whatever the order of summation
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp_min(0).sqrt().clamp_min(LEAST_STD)
    return mean.float(), std.float()


def as_bytes(tensor: Tensor) -> Any:
    """The numbers of a tensor, for hashing."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy()).data


# ImageNet's weights

LARGEST_WEIGHTS = 1 << 30  # bytes of a file of weights; torchvision's has a twentieth
# End of the names of counters that are not used here, and missing in torchvision's first files.
UNUSED = "num_batches_tracked"


def load_backbone(path: Path, side: int, device: torch.device) -> Backbone:
    """A ResNet-18 on a device, with weights from a file as torchvision publishes them: a state_dict
    that torch saved, with torchvision's names. Nothing in it is executed."""
    network = ResNet18()
    try:
        weights = read_tensors(path, LARGEST_WEIGHTS, foreign=True)
    except ValueError as error:
        raise ValueError(f"--backbone: {error}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise ValueError(f"--backbone: {path} must hold a state_dict, tensors by name alone")
    found = {str(n): t for n, t in weights.items() if not str(n).endswith(UNUSED)}
    try:
        missing, unknown = network.load_state_dict(found, strict=False)
    except RuntimeError as error:  # another shape
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    for name in (n for n in (*missing, *unknown) if not n.endswith(UNUSED)):
        hint = f"nearest: {nearest(name, found if name in missing else network.state_dict())}"
        said = f"{name!r} is {'missing' if name in missing else 'not known'}; {hint}"
        raise ValueError(f"{path} is no ResNet-18 of torchvision: {said}")
    for name, tensor in found.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} must hold finite floating-point numbers")
    mean, std = (torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    title = f"frozen ResNet-18 with the weights of {path.name}"
    return Backbone(frozen(network, device), title, side, mean, std, pooled=False)


def frozen(network: ResNet18, device: torch.device) -> ResNet18:
    """The network on a device, for good in eval mode and without gradients."""
    return network.to(device).requires_grad_(False).eval()


# A backbone of our own


class Rotations(Experiment):
    """A ResNet-18 that learns how far images were rotated (Gidaris et al., ICLR 2018).

    No label of the data set is used, so that features know of no task; the images of all tasks are.
    Every epoch shows each training image once, in a random rotation and mirrored at random; the
    last batch, if not full, is left out.

    `images` are bytes, on the device; the recipe's network is `resnet18` with 4 outputs.
    """

    def __init__(self, recipe: Recipe, images: Images, side: int, seed: int) -> None:
        self.images, self.side, self.seed = images, side, seed
        self.data = images.name
        self.readings = {
            "pretext": "rotation by quarter turns, without labels",
            "augmentation": "mirrored at random",
            "side": side,
            "precision": "bfloat16, torch's autocast",
            **images.readings,
        }
        self.batch_size = recipe.batch_size
        self.per_epoch = self.evaluate_every = len(images.train_images) // recipe.batch_size
        if not self.per_epoch:
            raise ValueError(
                f"batch_size={recipe.batch_size} of the backbone is more than the "
                f"{len(images.train_images):,} training images of {images.name}"
            )
        self.num_updates = self.per_epoch * (recipe.epochs or 0)
        device = images.train_images.device
        self.model = build_network(recipe).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean, self.std = pixel_statistics(images.train_images)
        self._epoch = -1  # that these are of
        self._order = self._turns = self._mirrored = torch.empty(0)

    def batch(self, update: int) -> tuple[Tensor, Tensor]:
        """Rotated images [B, 3, side, side] and their quarter turns [B] of one update."""
        epoch, index = divmod(update, self.per_epoch)
        total, device = len(self.images.train_images), self.images.train_images.device
        if epoch != self._epoch:
            stream = random_stream(self.seed, "rotations", epoch)
            self._order = torch.randperm(total, generator=stream).to(device)
            self._turns = torch.randint(TURNS, (total,), generator=stream).to(device)
            self._mirrored = torch.randint(2, (total,), generator=stream).bool().to(device)
            self._epoch = epoch
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        images = self.images.train_images[self._order[part]]
        turns, mirrored = self._turns[part], self._mirrored[part]
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return prepare(rotated(images, turns), self.side, self.mean, self.std), turns

    def loss(self, update: int) -> Tensor:
        x, turns = self.batch(update)
        return F.cross_entropy(self._logits(x), turns)

    def _logits(self, x: Tensor) -> Tensor:
        # bfloat16 trains faster on a CPU that computes with it.
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits.float()

    def evaluate(self) -> dict[str, float]:
        """Per cent of test images, in all four rotations, whose rotation is found; chance is 25."""
        every = max(1, len(self.images.test_images) // MEASURED)  # data may be in order of classes
        images = self.images.test_images[::every][:MEASURED]
        correct = 0
        for turn in range(TURNS):
            turns = torch.full((len(images),), turn, device=images.device)
            x = prepare(rotated(images, turns), self.side, self.mean, self.std)
            for part in torch.split(x, FEATURE_BATCH):
                correct += int((self._logits(part).argmax(1) == turn).sum())
        return {"rotation_accuracy": 100 * correct / (TURNS * len(images))}


def rotated(images: Tensor, turns: Tensor) -> Tensor:
    """Square images [B, 3, s, s], each rotated by its own number of quarter turns [B]."""
    result = images.clone()
    for turn in range(1, TURNS):
        chosen = turns == turn
        result[chosen] = torch.rot90(images[chosen], turn, dims=(2, 3))
    return result


# Features


def features_of(backbone: Backbone, data: Images, folder: Path | None = None) -> Images:
    """The data set with standardised features [N, num_features] in place of pixels as bytes, of
    mean 0 and standard deviation 1 over the training images: from the cache, or computed.

    Both are on the device; the cache's folder is `cache_folder()` if None.
    """
    folder = cache_folder() if folder is None else folder
    content = hashlib.sha256(backbone.mark.encode())
    for images in (data.train_images, data.test_images):
        content.update(f"{tuple(images.shape)}".encode())
        content.update(as_bytes(images))
    path = folder / f"features-{content.hexdigest()[:16]}.npz"
    images_of = {"train": data.train_images, "test": data.test_images}

    def check(found: Arrays) -> None:
        for part, given in images_of.items():
            if found[part].shape != (len(given), backbone.num_features):
                raise ValueError("features of other images")
            if found[part].dtype != np.float32 or not np.isfinite(found[part]).all():
                raise ValueError("no features")

    def compute() -> Arrays:
        total = sum(map(len, images_of.values()))
        say(f"computing features of {total:,} images, once: {path}", sys.stderr)
        return {part: _compute(backbone, given).numpy() for part, given in images_of.items()}

    found = cached(path, check, compute)
    device = data.train_images.device
    train, test = (torch.from_numpy(found[part]).to(device) for part in images_of)
    mean, std = train.mean(0), train.std(0, correction=0)
    std = torch.where(std < LEAST_STD, torch.ones_like(std), std)
    return data._replace(train_images=(train - mean) / std, test_images=(test - mean) / std)


def _compute(backbone: Backbone, images: Tensor) -> Tensor:
    """Features [N, num_features], on the CPU."""
    parts, done, spoken = [], 0, time.monotonic()
    with evaluating(backbone.network):
        for batch in torch.split(images, FEATURE_BATCH):
            parts.append(backbone.features(batch).float().cpu())
            done += len(batch)
            if time.monotonic() - spoken > LINE_SECONDS:
                spoken = time.monotonic()
                say(f"features: {done:,} of {len(images):,} images", sys.stderr)
    features = torch.cat(parts)
    if not features.isfinite().all():
        raise ValueError(f"{backbone.title}: its features are not finite")
    return features
