"""A data set learnt some classes at a time, by one network (paper, section 4.4).

The protocol is that of Hsu et al. ("Re-evaluating Continual Learning Scenarios", 2018; their code,
GT-RIPL/Continual-Learning-Benchmark): images padded to 32x32, tasks one after the other, a constant
learning rate, and an optimiser that keeps its state from task to task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl import orthogonal_loss
from ncrl.shell.tensors import check_like
from ncrl.tasks.continual import metrics
from ncrl.tasks.continual.methods import Grow, OnlineEwc, Quadratic, make_method, own_label_loss
from ncrl.tasks.data import Images
from ncrl.tasks.experiment import Batches, Experiment, evaluating, logits_of, try_network
from ncrl.tasks.models.mlp import SplitMlp
from ncrl.tasks.recipes import ContinualRecipe, Recipe, build_network

COEFS: Mapping[str, Mapping[str, float]] = {
    "domain": {"l2": 0.5, "si": 3000, "ewc": 100, "online-ewc": 700, "grow": 1},
    "task": {"l2": 0.01, "si": 300, "ewc": 100, "online-ewc": 400, "grow": 1},
}
"""Weights of the penalties, tuned by Hsu et al. for each scenario; a method that is not here has
none."""

ADAGRAD = {"optimizer": "adagrad", "learning_rate": 1e-2}  # what the method of this name changes
CLASSES_PER_TASK = 2
PADDED_SIDE = 32
MEAN, STD = 0.1000, 0.2752  # Hsu et al.'s normalisation, of pixels from 0 to 1 and the padding, too
# What `SplitLearning` measures, in the order of tables.
METRICS = ("accuracy", "learn", "failed_tasks", "forgetting", "transfer", "rank", "attention")
# Test images of each task on which weights and attention are measured at the end.
DESCRIBED_IMAGES = 50


def says_length(flags: Mapping[str, Any]) -> bool:
    """Whether flags say how long to train, so that no number of epochs is to be chosen for them."""
    return "epochs" in flags or "iterations" in flags


def check_penalty_coef(flags: Mapping[str, Any], methods: Iterable[str]) -> None:
    """Raise ValueError for the flag where no method has a penalty."""
    if "penalty_coef" in flags and not any(method in COEFS["domain"] for method in methods):
        raise ValueError(
            f"--penalty-coef needs a method out of {', '.join(COEFS['domain'])}, "
            f"got {', '.join(dict.fromkeys(methods))}"
        )


def method_changes(
    recipe: Recipe, scenario: str, method: str, flags: Mapping[str, Any], coef: float | None = None
) -> tuple[dict[str, Any], str]:
    """What a method changes in a recipe where flags do not, and its penalty's weight in words where
    it is not the usual one. `coef` comes before that of the recipe and Hsu et al.'s."""
    assert isinstance(recipe, ContinualRecipe)
    usual = COEFS[scenario].get(method, 0.0)
    if coef is None and method in COEFS[scenario]:
        coef = recipe.penalty_coef
    given = usual if coef is None else coef
    changes: dict[str, Any] = {"scenario": scenario, "method": method, "penalty_coef": given}
    if method == "adagrad":
        changes |= {name: value for name, value in ADAGRAD.items() if name not in flags}
    return changes, "" if given == usual else f"penalty_coef={given:g}"


class Task(NamedTuple):
    """Some classes; labels count from 0."""

    images: Tensor  # [N, 1024]
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def split_tasks(data: Images) -> list[Task]:
    """Tasks of two consecutive classes, 0 and 1, 2 and 3, ..., from pixels as bytes."""
    channels, height, width = data.train_images.shape[1:]
    if channels != 1 or height != width or height > PADDED_SIDE or (PADDED_SIDE - height) % 2:
        raise ValueError(
            f"{data.name}: expected grey square images with an even side of up to {PADDED_SIDE}, "
            f"got {channels}x{height}x{width}"
        )
    train, test = prepare(data.train_images), prepare(data.test_images)
    return class_tasks(data._replace(train_images=train, test_images=test), CLASSES_PER_TASK)


def class_tasks(data: Images, classes_per_task: int) -> list[Task]:
    """Tasks of consecutive classes, from features [N, F] in place of pixels."""
    tasks = []
    for first in range(0, data.num_classes, classes_per_task):
        parts: list[Tensor] = []
        for features, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        ):
            chosen = (labels >= first) & (labels < first + classes_per_task)
            missing = set(range(first, first + classes_per_task)) - set(labels[chosen].tolist())
            if missing:
                raise ValueError(f"{data.name} has no images of class {min(missing)}")
            parts += [features[chosen], labels[chosen] - first]
        tasks.append(Task(*parts))
    return tasks


def prepare(images: Tensor) -> Tensor:
    """Bytes [N, 1, height, width] padded and normalised: [N, 1024]."""
    margin = (PADDED_SIDE - images.shape[-1]) // 2
    pixels = F.pad(images, [margin] * 4).flatten(1).float()
    return pixels.div_(255).sub_(MEAN).div_(STD)


class SplitLearning(Experiment):
    """A network that learns one task after the other.

    Args:
        recipe: its network is a `SplitMlp`, with one head for each task in the task scenario.
        tasks: on the device.
        data: name of the data set.
        seed: of the order of the images.
        readings: see `Experiment`; at least `Images.readings` of the data set.
    """

    model: SplitMlp

    def __init__(
        self,
        recipe: ContinualRecipe,
        tasks: list[Task],
        data: str,
        seed: int,
        readings: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe, self.tasks, self.data = recipe, tasks, data
        self.readings = dict(readings or {})
        if recipe.epochs is None:
            raise ValueError("the recipe has to say how many epochs each task takes")
        model = build_network(recipe).to(tasks[0].images.device)
        heads = 1 if recipe.scenario == "domain" else len(tasks)
        if not isinstance(model, SplitMlp) or len(model.heads) != heads:
            raise ValueError(
                f"the {recipe.scenario} scenario needs network split_mlp with num_tasks={heads}"
            )
        self.model = model
        self.num_classes = int(tasks[0].labels.max()) + 1
        images = tasks[0].images
        try_network(model, images[:1], f"{images[0].numel()} numbers", self.num_classes)
        if recipe.method == "si" and recipe.max_grad_norm is not None:
            raise ValueError(
                "method si reads gradients that must not be clipped, got "
                f"max_grad_norm={recipe.max_grad_norm:g}"
            )
        self.epochs = recipe.epochs
        self.batches = [Batches(t[:2], recipe.batch_size, seed, keep_last=True) for t in tasks]
        # Updates after which the tasks end.
        self.ends = list(accumulate(self.epochs * own.per_epoch for own in self.batches))
        self.num_updates = self.evaluate_every = self.ends[-1]
        # Per cent, [T trained, T tested].
        self.accuracy = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        self.method = make_method(recipe.method or "adam", model, recipe.penalty_coef or 0.0)
        if isinstance(self.method, Grow) and recipe.scenario == "task":
            self.method.heads = list(model.heads)
        self.method.begin_task(images, None)
        has_memory = self.orthogonality().requires_grad
        if recipe.fisher_orthogonality and has_memory and isinstance(self.method, OnlineEwc):
            self.method.extra_loss = self.orthogonality
        self.doubles = recipe.double_orth_coef and isinstance(self.method, Quadratic)

    def orthogonality(self) -> Tensor:
        """The orthogonality loss with its coefficient, as the training loop adds it."""
        return self.recipe.orth_coef * orthogonal_loss(self.model)

    def _head(self, task: int) -> int:
        return 0 if self.recipe.scenario == "domain" else task

    def _task_of(self, update: int) -> int:
        return next(task for task, end in enumerate(self.ends) if update < end)

    def batch(self, update: int) -> tuple[int, Tensor, Tensor]:
        """Task, images [B, 1024] and labels [B] of one update. The last batch of an epoch is as
        small as it comes."""
        task = self._task_of(update)
        begin = self.ends[task - 1] if task else 0
        epoch, index = divmod(update - begin, self.batches[task].per_epoch)
        images, labels = self.batches[task].batch(index, task * self.epochs + epoch)
        return task, images, labels

    def loss(self, update: int) -> Tensor:
        task, images, labels = self.batch(update)
        # Hsu et al.'s torch set gradients to zero where ours removes them, so that there the
        # momentum of Adam moves the heads of earlier tasks a little further.
        for head in self.model.heads[: self._head(task)]:
            for parameter in head.parameters():
                parameter.grad = torch.zeros_like(parameter)
        loss = F.cross_entropy(self.model(images, self._head(task)), labels)
        if self.doubles and task:
            loss = loss + self.orthogonality()  # the training loop adds it once more
        return self.method.loss(loss, images)

    def after_update(self, update: int) -> None:
        self.method.after_update()
        task = self._task_of(update)
        if update + 1 < self.ends[task]:
            return
        if task + 1 < len(self.tasks):  # after the last one nothing can be forgotten
            own_loss = partial(own_label_loss, task=self._head(task))
            self.method.end_task(self.tasks[task].images, own_loss)
        with evaluating(self.model):
            for tested, (_, _, images, labels) in enumerate(self.tasks):
                said = logits_of(self.model, images, self._head(tested)).argmax(1)
                self.accuracy[task, tested] = 100 * float((said == labels).double().mean())
        if task + 1 < len(self.tasks):
            self.method.begin_task(self.tasks[task + 1].images, self.optimizer)

    def evaluate(self) -> dict[str, float]:
        """At the very end. See `ncrl.tasks.continual.metrics`; a task failed that was halfway from
        chance or below right after training, `rank` is that of the hidden layers and `attention`
        the largest weight of all layers."""
        accuracy, half_way = self.accuracy, 50 + 50 / self.num_classes
        found = {
            "accuracy": metrics.final_accuracy(accuracy),
            "learn": metrics.learning_accuracy(accuracy),
            "failed_tasks": float((accuracy.diagonal() < half_way).sum()),
            "forgetting": metrics.forgetting(accuracy),
            "transfer": metrics.backward_transfer(accuracy),
        }
        layers = self._describe()
        hidden = [weights for name, weights in layers.items() if name.startswith("hidden")]
        if ranks := [weights.rank for weights in hidden if weights.rank is not None]:
            found["rank"] = sum(ranks) / len(ranks)
        if attention := [w.attention for w in layers.values() if w.attention is not None]:
            found["attention"] = max(attention)
        return found

    def _describe(self) -> dict[str, metrics.Weights]:
        images = torch.cat([task.test_images[:DESCRIBED_IMAGES] for task in self.tasks])
        last = self._head(len(self.tasks) - 1)
        return metrics.describe_weights(self.model, images, last)

    def report(self) -> dict[str, Any]:
        layers = {name: weights._asdict() for name, weights in self._describe().items()}
        details = {"accuracy": self.accuracy.tolist(), "layers": layers}
        if isinstance(self.method, Grow):  # [T tested, layers, T whose slots]
            details["slots"] = [self.method.shares(task.test_images) for task in self.tasks]
        return details

    def state(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "method": self.method.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.accuracy = check_like(state["accuracy"], self.accuracy, "accuracy")
        self.method.restore(state["method"], self.optimizer)
