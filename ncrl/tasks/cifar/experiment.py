"""CIFAR with coded last layers of an MLP, LeNet or DenseNet (paper, section 4.2, Tables 2 and 4).

python -m ncrl.tasks.cifar --data-dir DIR --layer linear moe nsm neurocoder
python -m ncrl.tasks.cifar --data-dir DIR --config cifar_lenet --layer linear neurocoder --epochs 20
python -m ncrl.tasks.cifar --data-dir DIR --config cifar_densenet --variant base h1 h1_no_residual
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ncrl.shell.screen import say
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import BASE, NamedRecipe, Session, run_command, task_parser
from ncrl.tasks.data import HELD_OUT, load_cifar
from ncrl.tasks.figures import draw_curves, save_figure
from ncrl.tasks.recipes import CONFIGS, Recipe, read_recipes
from ncrl.tasks.results import Result, by_name, results_table

CONFIG = "cifar_mlp.yaml"
HELD_OUT_EVERY = 5  # with --validate, one of so many training images is measured on
READINGS = {"pixels": "standardised by channel", "augmentation": "none"}

# Best test accuracy over 5 runs, by network and classes, then layer.
TABLE_4: Mapping[tuple[str, int], Mapping[str, float]] = {
    ("mlp", 10): {"linear": 52.06, "moe": 50.76, "nsm": 52.76, "neurocoder": 54.86},
    ("mlp", 100): {"linear": 23.31, "moe": 22.79, "nsm": 25.65, "neurocoder": 26.24},
    ("lenet", 10): {"linear": 75.71, "moe": 75.88, "nsm": 75.45, "neurocoder": 78.92},
    ("lenet", 100): {"linear": 42.73, "moe": 42.47, "nsm": 43.14, "neurocoder": 47.21},
    ("densenet", 10): {"linear": 93.61, "moe": 80.61, "nsm": 94.24, "neurocoder": 95.61},
    ("densenet", 100): {"linear": 78.11, "moe": 69.48, "nsm": 71.76, "neurocoder": 79.34},
}
# DenseNet with Neurocoder, by classes, heads H and residual; H = 3 with residual is in Table 4.
TABLE_2: Mapping[tuple[int, int, bool], float] = {
    (10, 1, False): 77.4,
    (10, 3, False): 80.8,
    (10, 1, True): 88.9,
    (100, 1, False): 70.8,
    (100, 3, False): 75.0,
    (100, 1, True): 75.1,
}


def paper_accuracy(row: Result) -> float | None:
    """What the paper prints for the network of a row; None where it prints nothing. The network has
    to stand like this in `configs/tasks/`, the number of classes left aside."""
    if not row.data.startswith("CIFAR") or HELD_OUT in row.data or not is_shipped(row):
        return None
    network, options = row.recipe["network"], row.recipe["layer_options"]
    size = int(row.recipe["network_options"].get("num_outputs", 10))
    heads, residual = options.get("num_heads"), options.get("residual")
    if row.layer == "neurocoder" and (heads, residual) != (3, True):
        return TABLE_2.get((size, heads, residual)) if network == "densenet" else None
    return TABLE_4.get((network, size), {}).get(row.layer)


def is_shipped(row: Result) -> bool:
    """Whether the row's network is that of a recipe in `configs/tasks/`, the number of classes left
    aside. The authors' own layer is not, for the paper does not speak of it."""
    path = CONFIGS / f"cifar_{row.recipe['network']}.yaml"
    if not path.is_file() or row.recipe["layer_options"].get("preset") == "official":
        return False

    def body(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
        network_options = {**recipe["network_options"], "num_outputs": None}
        return recipe["layer"], recipe["layer_options"], network_options

    return body(row.recipe) in map(body, map(vars, read_recipes(path).values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = task_parser("cifar", __doc__, HELD_OUT_EVERY)
    said = "10 or 100 (default: those of the recipe)"
    parser.add_argument("--classes", type=int, metavar="INT", help=said)
    return run_command("cifar", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the curves."""
    wanted = wanted_recipes(session)
    views = {}
    for size in sorted({num_outputs(named.recipe) for named in wanted}):
        data = load_cifar(session.data_dir, size, download=session.download)
        views[size] = session.validated(data, HELD_OUT_EVERY).standardised().to(session.device)

    def make(recipe: Recipe, seed: int, _device: torch.device) -> Classification:
        return Classification(recipe, views[num_outputs(recipe)], seed, readings=READINGS)

    rows = session.run(wanted, make)
    if session.figure is not None and rows:
        draw(session.figure, rows)
    say(table(rows))


def wanted_recipes(session: Session) -> list[NamedRecipe]:
    """The recipes that the flags name; the plain MLP and Neurocoder's without any."""
    flags = session.flags
    wanted = session.recipes(CONFIG, default_variants=("linear", BASE))
    size = flags.get("classes")
    if size is None and "layer" in flags:
        # The variant that is found for a layer may be of the other data set.
        others = session.recipes(CONFIG, layer=None, layer_options=None)
        sizes = {num_outputs(named.recipe) for named in others}
        if len(sizes) > 1:
            raise ValueError("variants of 10 and of 100 classes with --layer: say --classes")
        (size,) = sizes
    return [named if size is None else with_outputs(named, size) for named in wanted]


def num_outputs(recipe: Recipe) -> int:
    """Classes that a recipe's network tells apart."""
    return int(recipe.network_options.get("num_outputs", 10))


def with_outputs(named: NamedRecipe, size: int) -> NamedRecipe:
    """The same recipe for 10 or 100 classes."""
    if num_outputs(named.recipe) == size:
        return named
    options = {**named.recipe.network_options, "num_outputs": size}
    recipe = dataclasses.replace(named.recipe, network_options=options, paper_parameters=None)
    return NamedRecipe(f"{named.name} {size} classes", recipe, named.labels)


def table(rows: Sequence[Result]) -> str:
    """Accuracy in the last and the best epoch, over seeds, beside what the paper prints."""

    def paper(group: list[Result]) -> str | None:
        accuracy = paper_accuracy(group[0])
        return None if accuracy is None else f"{accuracy:.2f}"

    columns: Mapping[str, Callable[[list[Result]], object]] = {
        "paper (best)": paper,
        "layer": lambda group: group[0].layer,
        "updates": lambda group: group[0].updates,
        "time": lambda group: f"{sum(row.seconds for row in group) / len(group):.0f} s",
    }
    return results_table(rows, ["accuracy", "best_accuracy"], columns)


def draw(path: Path, rows: Sequence[Result]) -> None:
    """Test accuracy over updates, and what the paper prints as a mark at the right."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, rows, "accuracy")
    last = max(row.updates for row in rows)
    for line, group in zip(list(axes.lines), by_name(rows).values(), strict=True):
        paper = paper_accuracy(group[0])
        if paper is not None:
            axes.plot([last], [paper], "<", color=line.get_color(), clip_on=False)
    axes.set_ylabel("accuracy, %")
    title = "; ".join(dict.fromkeys(row.data for row in rows))
    if len(axes.lines) > len(by_name(rows)):
        title += "; triangles: the paper's best"
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    save_figure(figure, path)
