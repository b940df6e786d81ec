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
from ncrl.tasks.command import BASE, Plan, Session, add_validate, run_command, task_parser
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.mnist.figure import draw
from ncrl.tasks.models import ProjectedLinear
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.results import Result, results_table

CONFIG = "mnist.yaml"
HELD_OUT_EVERY = 6
"""With --validate, one of so many training images is measured on."""

STEPS = (1, 2, 3, 4, 5)
"""J of Fig. 2a."""

MAPS = ("maps_j1", "maps_j5")
"""Variants whose attention is drawn (Fig. 2b); that of the last one makes the tree (Fig. 2c)."""

READINGS = {"pixels": "standardised"}


class DigitClassifier(Classification):
    """A classifier that says what its coded layer attends to."""

    def __init__(self, recipe: Recipe, images: Images, seed: int) -> None:
        super().__init__(recipe, images, seed, measure="error", readings=READINGS)

    def report(self) -> dict[str, Any]:
        """Attention of the coded layer, beside what `Classification` reports."""
        details = super().report()
        attention = attention_to_u(self.model, self.images.test_images)
        if attention is not None:
            means, examples = maps_by_class(attention, self.images.test_labels)
            patterns = attention_patterns(means)
            details["maps"] = {"mean": _rounded(means), "example": _rounded(examples)}
            details["patterns"] = patterns.astype(int).tolist()
            details["tree"] = decision_tree(patterns)
        return details


def _rounded(values: Tensor) -> list[Any]:
    rounded: list[Any] = np.asarray(values.cpu(), np.float64).round(4).tolist()
    return rounded


def attention_to_u(model: torch.nn.Module, images: Tensor) -> Tensor | None:
    """w^u of a coded classifier for images [N, 1, height, width]: [N, R, P]; None if not coded."""
    if not isinstance(model, ProjectedLinear) or not isinstance(model.output, NeurocoderLinear):
        return None
    return model.output.attend(images.flatten(1) @ model.projection).u


def maps_by_class(attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention and attention to the first example of every class, each [classes, R, P].

    Args:
        attention: [N, R, P].
        labels: [N], every class from 0 to the largest at least once.
    """
    means, examples = [], []
    for digit in range(int(labels.max()) + 1):
        own = attention[labels == digit]
        means.append(own.mean(0))
        examples.append(own[0])
    return torch.stack(means), torch.stack(examples)


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
    parser = task_parser("mnist", __doc__)
    parser.add_argument(
        "--num-steps",
        "--num_steps",
        nargs="+",
        type=int,
        metavar="INT",
        help="values of J for Neurocoder layers (default: 1 to 5 where no recipe is named, else "
        "the recipe's)",
    )
    add_validate(parser, "one of six training images")
    return run_command("mnist", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the figure."""
    wanted = plans(session)
    data = load_mnist(session.data_dir, download=session.download)
    if session.flags.get("validate"):
        data = data.held_out(HELD_OUT_EVERY)
    say(data.source)
    for digit in range(data.num_classes):
        if not (data.test_labels == digit).any():
            raise ValueError(f"{data.source}: no test image shows a {digit}")
    images = data.standardised().to(session.device)

    def make(recipe: Recipe, seed: int, _device: torch.device) -> DigitClassifier:
        return DigitClassifier(recipe, images, seed)

    rows = session.run(wanted, make)
    if session.figure is not None and rows:
        maps = session.run(variants(session, MAPS), make, seeds=session.seeds[:1])
        draw(session.figure, rows, maps, first_of_each(data))
        say(f"drawn: {session.figure}")
    say(table(rows))


def plans(session: Session) -> list[Plan]:
    """The recipes that the flags name; without any, the linear classifier and every J."""
    named = session.names_recipes
    recipes = session.plans(CONFIG) if named else [linear(session), *variants(session, [BASE])]
    steps = dict.fromkeys(session.flags.get("num_steps", () if named else STEPS))
    if not steps:
        return recipes
    wanted: list[Plan] = []
    for plan in recipes:
        coded = plan.recipe.layer == "neurocoder"
        wanted += [plan.changed(num_steps=j) for j in steps] if coded else [plan]
    return wanted


def variants(session: Session, names: Sequence[str]) -> list[Plan]:
    """Variants of the command's own recipe, with the changes that the flags make."""
    return session.plans(CONFIG, variant=list(names), layer=None, config=None)


def linear(session: Session) -> Plan:
    """The linear classifier, to which options of coded layers mean nothing."""
    (plan,) = session.plans(
        CONFIG,
        variant=["linear"],
        layer=None,
        config=None,
        layer_options=None,
        network_options=None,
    )
    return plan


def first_of_each(data: Images) -> Tensor:
    """The first test image of every class, [classes, height, width]."""
    firsts = [int((data.test_labels == digit).nonzero()[0]) for digit in range(data.num_classes)]
    return data.test_images[firsts, 0]


def table(rows: Sequence[Result]) -> str:
    """Mean error over seeds, last and best epoch. The paper prints no number (Fig. 2a); its text
    says that Neurocoder is up to 5 points better than the linear classifier."""
    return results_table(rows, ["error", "best_error"])
