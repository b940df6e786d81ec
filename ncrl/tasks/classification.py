"""Image classification, with the whole data set in tensors on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ncrl.tasks.data import Images
from ncrl.tasks.experiment import Batches, Experiment, describe_layers, logits_of, try_network
from ncrl.tasks.recipes import Recipe, build_network

REPORT_IMAGES = 256  # test images on which the layers are described


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
        self.images, self.measure, self.data = images, measure, images.name
        self.best = {measure: "max" if measure == "accuracy" else "min"}
        self.readings = {**(readings or {}), **images.readings}
        samples = images.train_images, images.train_labels
        self.batches = Batches(samples, recipe.batch_size, seed)
        self.evaluate_every = self.batches.per_epoch
        if not self.evaluate_every:
            raise ValueError(
                f"batch_size={recipe.batch_size} is more than the {len(images.train_images):,} "
                f"training images of {images.name}"
            )
        if recipe.epochs is None and recipe.iterations is None:
            raise ValueError("the recipe says neither epochs nor iterations")
        self.num_updates = recipe.iterations or self.evaluate_every * (recipe.epochs or 0)
        self.model = build_network(recipe).to(images.train_images.device)
        shape = list(images.train_images.shape[1:])
        first = images.train_images[:1]
        try_network(self.model, first, f"images of shape {shape}", images.num_classes)

    def batch(self, update: int) -> list[Tensor]:
        """Images [B, channels, height, width] and labels [B] of one update."""
        epoch, index = divmod(update, self.evaluate_every)
        return self.batches.batch(index, epoch)

    def loss(self, update: int) -> Tensor:
        x, labels = self.batch(update)
        return F.cross_entropy(self.model(x), labels)

    def evaluate(self) -> dict[str, float]:
        """Accuracy or error on the test images, in per cent, and their cross-entropy."""
        images, labels = self.images.test_images, self.images.test_labels
        logits = logits_of(self.model, images)
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
