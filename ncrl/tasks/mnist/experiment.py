"""MNIST with one coded layer as a linear classifier (paper, section 4.1, Fig. 2a-c).

python -m ncrl.tasks.mnist                                  # J = 1..5 beside the linear classifier
python -m ncrl.tasks.mnist --data-dir DIR --seeds 0 1 2 --figure mnist.png
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ncrl import NeurocoderConfig, NeurocoderLinear
from ncrl.shell.screen import say
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import BASE, NamedRecipe, Session, run_command, task_parser
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.figures import draw_attention, save_figure
from ncrl.tasks.models.mlp import ProjectedLinear
from ncrl.tasks.recipes import OPTIONS_OF, Recipe
from ncrl.tasks.results import Result, Summary, by_name, results_table

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
            maps = {"mean": means, "example": examples}
            details["maps"] = {k: v.double().round(decimals=4).tolist() for k, v in maps.items()}
            details["patterns"] = patterns.astype(int).tolist()
            details["tree"] = decision_tree(patterns)
        return details


def maps_by_class(attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention [N, R, P] and attention to the first example of every class, each [classes, R,
    P]; every label from 0 to the largest has to be there."""
    by_class = [attention[labels == digit] for digit in range(int(labels.max()) + 1)]
    return torch.stack([own.mean(0) for own in by_class]), torch.stack([own[0] for own in by_class])


def attention_patterns(means: Tensor) -> NDArray[np.bool_]:
    """Which of two kinds of attention every component of every class has, [classes, R]: the columns
    w^u_n of means [classes, R, P] in two clusters (k-means); the kind of the first is False."""
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
    """The tree whose paths are the patterns [digits, R]: what digits share is one branch. A node is
    the `digits` whose patterns agree so far, and its `children` by the next component's kind."""
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
    parser = task_parser("mnist", __doc__, HELD_OUT_EVERY)
    parser.add_argument(
        "--num-steps",
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
    wanted = wanted_recipes(session)
    data = session.validated(
        load_mnist(session.data_dir, download=session.download), HELD_OUT_EVERY
    )
    for digit in range(data.num_classes):
        if not (data.test_labels == digit).any():
            raise ValueError(f"{data.source}: no test image shows a {digit}")
    images = data.standardised().to(session.device)

    def make(recipe: Recipe, seed: int, _device: torch.device) -> DigitClassifier:
        return DigitClassifier(recipe, images, seed)

    shown = maps_of(session, wanted) if session.figure is not None else []  # refused at once
    rows = session.run(wanted, make)
    if session.figure is not None and rows:
        maps = session.run(shown, make, seeds=session.seeds[:1])
        if maps:
            firsts = [int((data.test_labels == d).nonzero()[0]) for d in range(data.num_classes)]
            draw(session.figure, rows, maps, data.test_images[firsts, 0])
        else:
            names = " and ".join(named.name for named in shown)
            say(f"no figure: the runs whose attention it shows, {names}, are not finished")
    say(results_table(rows, ["error", "best_error"]))


def wanted_recipes(session: Session) -> list[NamedRecipe]:
    """The recipes that the flags name; without any, the linear classifier and every J."""
    recipes = session.recipes(CONFIG, default_variants=("linear", BASE))
    steps = dict.fromkeys(session.flags.get("num_steps", () if session.names_recipes else STEPS))
    if "num_steps" in session.flags and all(n.recipe.layer != "neurocoder" for n in recipes):
        raise ValueError("--num-steps is for Neurocoder layers, and no recipe has any")
    wanted: list[NamedRecipe] = []
    for named in recipes:
        coded = bool(steps) and named.recipe.layer == "neurocoder"
        wanted += [named.changed(num_steps=j) for j in steps] if coded else [named]
    return wanted


def maps_of(session: Session, wanted: Sequence[NamedRecipe]) -> list[NamedRecipe]:
    """The recipes whose attention is drawn. Options of the flags are theirs too, unless they are
    meant for other layers."""
    others = session.names_recipes and any(one.recipe.layer != "neurocoder" for one in wanted)
    dropped = OPTIONS_OF if others else ()
    instead: dict[str, Any] = dict.fromkeys((*dropped, "layer", "config"))
    return session.recipes(CONFIG, variant=list(MAPS), **instead)


# The figure

UNTRAINED = 50.0  # per cent of errors from which on attention shows nothing that was learnt


def draw(path: Path, rows: Sequence[Result], maps: Sequence[Result], images: Tensor) -> None:
    """The paper's Figure 2a-c: error against J, attention maps, and the tree that attention makes.

    Args:
        path: file to write.
        rows: of Neurocoder with several J, and of the linear classifier.
        maps: rows with attention maps; the last one makes the tree.
        images: an example of every digit, [10, height, width], the one whose attention is shown.
    """
    figure: Any = Figure(figsize=(11, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.6))
    draw_errors(left, rows)
    right.axis("off")
    tree = maps[-1].details["tree"]
    draw_tree(right, tree, 0.0, float(_count_leaves(tree)))
    said = f"{_sizes(maps[-1])}, {_error(maps[-1])}"
    right.set_title(f"tree of attention patterns, {said}", fontsize=9)
    _draw_maps(bottom, maps, images)
    save_figure(figure, path)


def draw_errors(axes: Axes, rows: Sequence[Result]) -> None:
    """Test error against J, with every seed as a point, and the linear classifier as a line."""
    coded: list[tuple[int, Summary]] = []
    sizes = set()
    for group in by_name(rows).values():
        summary = Summary([row.metrics["error"] for row in group])
        mean, std = summary.mean, summary.std
        if group[0].layer == "neurocoder":
            options = group[0].recipe["layer_options"]
            coded.append((int(options.get("num_steps", NeurocoderConfig.num_steps)), summary))
            sizes.add(group[0].parameters)
        else:
            label = f"{group[0].layer}, {group[0].parameters:,} parameters"
            axes.axhline(mean, linestyle="--", color="gray", label=label)
            axes.axhspan(mean - std, mean + std, color="gray", alpha=0.2)
    if coded:
        coded.sort(key=lambda entry: entry[0])
        steps = [j for j, _ in coded]
        label = f"Neurocoder, {' to '.join(f'{size:,}' for size in sorted(sizes))} parameters"
        means, stds = [errors.mean for _, errors in coded], [errors.std for _, errors in coded]
        axes.errorbar(steps, means, stds, marker="o", capsize=3, label=label)
        for j, errors in coded:
            axes.plot([j] * len(errors.values), errors.values, ".", color="black", markersize=3)
        axes.set_xticks(sorted(set(steps)))
    seeds = len({row.seed for row in rows})
    axes.set(xlabel="composition steps J", ylabel=f"test error, % (seeds: {seeds})")
    axes.set_title(rows[0].data, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def draw_tree(
    axes: Axes,
    node: Mapping[str, Any],
    left: float,
    right: float,
    depth: int = 0,
    above: tuple[float, float] | None = None,
) -> None:
    """A node with the digits that share a path, and its children below it, between two places."""
    x, y = (left + right) / 2, -float(depth)
    if above is not None:
        axes.plot([above[0], x], [above[1], y], color="gray", linewidth=1, zorder=1)
    digits = re.sub(r"((?:\d ){4}\d) ", r"\1\n", " ".join(map(str, node["digits"])))
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "gray"}
    axes.text(x, y, digits, ha="center", va="center", fontsize=8, bbox=box)
    for child in node["children"]:
        width = (right - left) * _count_leaves(child) / _count_leaves(node)
        draw_tree(axes, child, left, left + width, depth + 1, (x, y))
        left += width


def _count_leaves(node: Mapping[str, Any]) -> int:
    return sum(map(_count_leaves, node["children"])) if node["children"] else 1


def _draw_maps(figure: Any, maps: Sequence[Result], images: Tensor) -> None:
    """A column for each digit: the image, then for every row its attention and the class's."""
    grid = figure.subplots(
        1 + 2 * len(maps), len(images), squeeze=False, height_ratios=[1] + [1.2] * (2 * len(maps))
    )
    for digit, image in enumerate(images.numpy()):
        grid[0, digit].imshow(image, cmap="gray_r")
        grid[0, digit].axis("off")
    for index, row in enumerate(maps):
        shown = row.details["maps"]
        largest = float(np.max([shown["mean"], shown["example"]]))
        for offset, (kind, said) in enumerate((("example", "this image"), ("mean", "class mean"))):
            line = grid[1 + 2 * index + offset]
            for digit in range(len(images)):
                draw_attention(line[digit], np.transpose(shown[kind][digit]), largest)
                line[digit].set(xticks=[], yticks=[])
            line[0].set_ylabel(f"{_sizes(row)}\n{_error(row)}\n{said}", fontsize=7)
    figure.supxlabel("attention w^u: components to the right, slots upwards", fontsize=8)


def _sizes(row: Result) -> str:
    options = row.recipe["layer_options"]
    return f"P={options['num_slots']} J={options['num_steps']} H={options['num_heads']}"


def _error(row: Result) -> str:
    error = row.metrics["error"]
    return f"error {error:.0f} %" + (", untrained" if error > UNTRAINED else "")
