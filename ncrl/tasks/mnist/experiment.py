"""MNIST with one coded layer as a linear classifier (paper, section 4.1, Fig. 2a-c).

python -m ncrl.tasks.mnist                                  # J = 1..5 beside the linear classifier
python -m ncrl.tasks.mnist --data-dir DIR --seeds 0 1 2 --figure mnist.png
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ncrl import NeurocoderLinear
from ncrl.shell.screen import say
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import BASE, Plan, Session, run_command, task_parser
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.mnist.figure import draw
from ncrl.tasks.models.mlp import ProjectedLinear
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.results import results_table

CONFIG = "mnist.yaml"
HELD_OUT_EVERY = 6  # with --validate, one of so many training images is measured on
STEPS = (1, 2, 3, 4, 5)  # J of Fig. 2a
# Variants whose attention is drawn (Fig. 2b); that of the last one makes the tree (Fig. 2c).
MAPS = ("maps_j1", "maps_j5")


class DigitClassifier(Classification):
    """A classifier that says what its coded layer attends to."""

    def __init__(self, recipe: Recipe, images: Images, seed: int) -> None:
        readings = {"pixels": "standardised"}
        super().__init__(recipe, images, seed, measure="error", readings=readings)

    def report(self) -> dict[str, Any]:
        """Attention of the coded layer, beside what `Classification` reports."""
        details = super().report()
        model, images = self.model, self.images.test_images
        if isinstance(model, ProjectedLinear) and isinstance(model.output, NeurocoderLinear):
            attention = model.output.attend(images.flatten(1) @ model.projection).u  # [N, R, P]
            means, examples = maps_by_class(attention, self.images.test_labels)
            patterns = attention_patterns(means)
            details["maps"] = {"mean": _rounded(means), "example": _rounded(examples)}
            details["patterns"] = patterns.astype(int).tolist()
            details["tree"] = decision_tree(patterns)
        return details


def _rounded(values: Tensor) -> list[Any]:
    rounded: list[Any] = np.asarray(values.cpu(), np.float64).round(4).tolist()
    return rounded


def maps_by_class(attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention [N, R, P] and attention to the first example of every class, each [classes, R,
    P]; every label from 0 to the largest has to be there."""
    by_class = [attention[labels == digit] for digit in range(int(labels.max()) + 1)]
    return torch.stack([own.mean(0) for own in by_class]), torch.stack([own[0] for own in by_class])


def attention_patterns(means: Tensor) -> NDArray[np.bool_]:
    """Which of two kinds of attention every component of every class has, [classes, R].

    The R columns w^u_n of all classes are put into two clusters (k-means); the kind of the first
    column is False.

    Args:
        means: attention [classes, R, P].
    """
    from sklearn.cluster import KMeans

    columns = np.asarray(means.flatten(0, 1).cpu(), np.float64)
    if len(np.unique(columns, axis=0)) < 2:
        return np.zeros(means.shape[:2], bool)
    clusters = KMeans(2, n_init=10, random_state=0).fit(columns).labels_.reshape(means.shape[:2])
    patterns: NDArray[np.bool_] = clusters != clusters[0, 0]
    return patterns


def decision_tree(
    patterns: NDArray[np.bool_], digits: Sequence[int] | None = None
) -> dict[str, Any]:
    """The tree whose paths are the patterns [digits, R]: what digits share is one branch.

    Returns:
        A node: the `digits` whose patterns agree so far, and its `children`, nodes by the next
        component's kind.
    """
    chosen = list(range(len(patterns))) if digits is None else list(digits)
    children = []
    if patterns.shape[1]:
        for kind in (False, True):
            own = [digit for digit in chosen if bool(patterns[digit, 0]) is kind]
            if own:
                children.append(decision_tree(patterns[:, 1:], own))
    return {"digits": chosen, "children": children}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = task_parser("mnist", __doc__, validate="one of six training images")
    parser.add_argument(
        *("--num-steps", "--num_steps"),
        nargs="+",
        type=int,
        metavar="INT",
        help="values of J for Neurocoder layers (default: 1 to 5 where no recipe is named, else "
        "the recipe's)",
    )
    return run_command("mnist", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the figure.

    The paper prints no number for the table (Fig. 2a); its text says that Neurocoder is up to 5
    points better than the linear classifier.
    """
    wanted = plans(session)
    data = session.validated(
        load_mnist(session.data_dir, download=session.download), HELD_OUT_EVERY
    )
    for digit in range(data.num_classes):
        if not (data.test_labels == digit).any():
            raise ValueError(f"{data.source}: no test image shows a {digit}")
    images = data.standardised().to(session.device)

    def make(recipe: Recipe, seed: int, _device: torch.device) -> DigitClassifier:
        return DigitClassifier(recipe, images, seed)

    rows = session.run(wanted, make)
    if session.figure is not None and rows:
        maps = session.run(variants(session, MAPS), make, seeds=session.seeds[:1])
        firsts = [int((data.test_labels == d).nonzero()[0]) for d in range(data.num_classes)]
        draw(session.figure, rows, maps, data.test_images[firsts, 0])
    say(results_table(rows, ["error", "best_error"]))


def plans(session: Session) -> list[Plan]:
    """The recipes that the flags name; without any, the linear classifier and every J."""
    named = session.names_recipes
    if named:
        recipes = session.plans(CONFIG)
    else:  # to the linear classifier options of coded layers mean nothing
        plain = variants(session, ["linear"], layer_options=None, network_options=None)
        recipes = [*plain, *variants(session, [BASE])]
    steps = dict.fromkeys(session.flags.get("num_steps", () if named else STEPS))
    wanted: list[Plan] = []
    for plan in recipes:
        coded = bool(steps) and plan.recipe.layer == "neurocoder"
        wanted += [plan.changed(num_steps=j) for j in steps] if coded else [plan]
    return wanted


def variants(session: Session, names: Sequence[str], **instead: Any) -> list[Plan]:
    """Variants of the command's own recipe, with the changes that the flags make."""
    return session.plans(CONFIG, variant=list(names), layer=None, config=None, **instead)
