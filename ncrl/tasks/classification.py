"""Image classification, with the whole data set in tensors on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl.tasks.data import Images
from ncrl.tasks.experiment import Experiment, describe_layers, random_stream, try_network
from ncrl.tasks.recipes import Recipe, build_network

EVALUATION_BATCH = 1000
"""Images that are classified at a time."""

REPORT_IMAGES = 256
"""Test images on which the layers are described."""


class Classification(Experiment):
    """A recipe's network, trained with cross-entropy to classify images.

    Every epoch goes through the training images in a new random order; a last batch that is not
    full is left out.

    Args:
        recipe: with `epochs` or `iterations`.
        images: with pixels as floats, on the device.
        seed: of the order of the images.
        measure: what is reported in per cent of the test images, `accuracy` or `error`.
        readings: see `Experiment`.

    Raises:
        ValueError: if the recipe's sizes do not fit, or it says neither epochs nor iterations.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Images,
        seed: int,
        *,
        measure: str = "accuracy",
        readings: Mapping[str, Any] | None = None,
    ) -> None:
        self.images, self.seed, self.measure = images, seed, measure
        self.data = images.name
        self.best = {measure: "max" if measure == "accuracy" else "min"}
        self.readings = {**(readings or {}), **images.readings}
        self.batch_size = recipe.batch_size
        self.per_epoch = len(images.train_images) // recipe.batch_size
        if not self.per_epoch:
            raise ValueError(
                f"batch_size={recipe.batch_size} is more than the {len(images.train_images):,} "
                f"training images of {images.name}"
            )
        if recipe.epochs is None and recipe.iterations is None:
            raise ValueError("the recipe says neither epochs nor iterations")
        self.num_updates = (
            recipe.iterations
            if recipe.iterations is not None
            else self.per_epoch * (recipe.epochs or 0)
        )
        self.evaluate_every = self.per_epoch
        self.model = build_network(recipe).to(images.train_images.device)
        self._epoch = -1  # that `_order` is of
        self._order = torch.empty(0)
        self._try_shapes()

    def _try_shapes(self) -> None:
        for images in (self.images.train_images, self.images.test_images):
            logits = try_network(
                self.model, images[:1], f"images of shape {list(images.shape[1:])}"
            )
        if logits.shape[1] < self.images.num_classes:
            raise ValueError(
                f"num_outputs={logits.shape[1]} is less than the {self.images.num_classes} classes "
                f"of {self.images.name}"
            )

    def batch(self, update: int) -> tuple[Tensor, Tensor]:
        """Images [B, channels, height, width] and labels [B] of one update."""
        epoch, index = divmod(update, self.per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(
                len(self.images.train_images), generator=random_stream(self.seed, "order", epoch)
            )
            self._epoch, self._order = epoch, order.to(self.images.train_images.device)
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        # Whole rows at a time, where indexing copies number by number.
        images, labels = self.images.train_images, self.images.train_labels
        return images.index_select(0, chosen), labels.index_select(0, chosen)

    def loss(self, update: int) -> Tensor:
        x, labels = self.batch(update)
        return F.cross_entropy(self.model(x), labels)

    def evaluate(self) -> dict[str, float]:
        """Accuracy or error on the test images, in per cent, and their cross-entropy."""
        images, labels = self.images.test_images, self.images.test_labels
        parts = torch.split(images, EVALUATION_BATCH)
        logits = torch.cat([self.model(part) for part in parts])
        correct = int((logits.argmax(1) == labels).sum())
        counted = correct if self.measure == "accuracy" else len(labels) - correct
        return {
            self.measure: 100 * counted / len(labels),
            "test_loss": float(F.cross_entropy(logits, labels)),
        }

    def report(self) -> dict[str, Any]:
        """What the Neurocoder layers do with the first test images."""
        reports = describe_layers(self.model, self.images.test_images[:REPORT_IMAGES])
        return {"layers": reports} if reports else {}
