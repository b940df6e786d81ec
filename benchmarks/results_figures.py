"""Figures of the kept results, drawn from results/*.csv by what draws each task's own figure.

python benchmarks/results_figures.py    # writes docs/figures/{cifar,polynomial,algorithms,...}.png
"""

from __future__ import annotations

import re
from dataclasses import fields

import numpy as np
from matplotlib.figure import Figure

from ncrl.tasks.algorithms import experiment as algorithms
from ncrl.tasks.cifar import experiment as cifar
from ncrl.tasks.polynomial import experiment as polynomial
from ncrl.tasks.results import Result
from ncrl.tasks.split_cifar import features
from ncrl.tasks.split_mnist import tables
from results import RESULTS, ROOT, Row, chosen, read_csv, table_specs, values_of

FIGURES = ROOT / "docs" / "figures"


def result(row: Row, **changes: object) -> Result:
    """A kept row as the tasks know it, with other values of some fields."""
    return Result(**{f.name: row[f.name] for f in fields(Result) if f.name in row} | changes)


def results_of(task: str) -> list[Result]:
    """The rows of the first table of a task's page, each under the name that it has there."""
    rows, spec = read_csv(task), table_specs(RESULTS / f"{task}.md")[0]
    found = []
    for name, label in spec["runs"].items():
        label = label[0] if isinstance(label, list) else label
        said = {"name": label, "labels": {"variant": label}}
        found += [result(row, **said) for row in chosen(rows, name, spec)]
    return found


def draw_split_mnist() -> None:
    """Tables 6 and 7."""
    specs = [spec for spec in table_specs(RESULTS / "split_mnist.md") if "grid" in spec]
    kept = read_csv("split_mnist")
    rows = [
        result(row, labels=cell.labels)
        for number, spec in zip((7, 6), specs, strict=True)
        for cell in tables.cells(number)
        for row in chosen(kept, cell.name, spec)
    ]
    tables.draw(FIGURES / "split_mnist.png", rows)


def draw_growing_memory() -> None:
    """Whose slots the images of each task attend to, layer by layer, and accuracy over slots."""
    rows, (spec, *_) = read_csv("growing_memory"), table_specs(RESULTS / "growing_memory.md")
    figure = Figure((11, 3), layout="constrained")
    *maps, sizes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    shares = np.mean([row["details"]["slots"] for row in chosen(rows, "grow", spec)], axis=0)
    tasks = range(shares.shape[0])
    for layer, axes in enumerate(maps):
        axes.imshow(shares[:, layer], vmin=0, vmax=1, cmap="Blues")
        for shown, whose in np.ndindex(shares[:, layer].shape):
            share = shares[shown, layer, whose]
            colour = "white" if share > 0.5 else "0.3"
            axes.text(whose, shown, f"{share:.2f}", ha="center", va="center", c=colour, fontsize=7)
        digits = [f"{2 * task}, {2 * task + 1}" for task in tasks]
        axes.set_xticks(tasks, digits, fontsize=8)
        axes.set_yticks(tasks, digits, fontsize=8)
        axes.set_title(f"attention of layer {layer + 1}", fontsize=10)
        axes.set_xlabel("slots of the task")
    maps[0].set_ylabel("images of the task")
    found = (re.fullmatch(r"grow, (\d+) slots", name) for name in spec["runs"])
    names = {"grow": 100} | {match[0]: int(match[1]) for match in found if match}
    names = {name: size for name, size in sorted(names.items(), key=lambda pair: pair[1])}
    for metric in ("learn", "accuracy"):
        mean = [np.mean(values_of(chosen(rows, name, spec), metric)) for name in names]
        sizes.plot(list(names.values()), mean, "o-", label=f"grow, {metric}")
    routed = np.mean(values_of(chosen(rows, "routed", spec), "accuracy"))
    sizes.axhline(routed, color="0.4", linestyle=":", label="routed, accuracy")
    sizes.set(xlabel="slots for each task", ylabel="%", ylim=(80, 100))
    sizes.legend(fontsize=8)
    figure.savefig(FIGURES / "growing_memory.png", dpi=100)


if __name__ == "__main__":
    # The MLPs alone: those of LeNet are too far away for one axis.
    mlps = [row for row in results_of("cifar") if row.name.startswith("MLP ")]
    cifar.draw(FIGURES / "cifar.png", mlps)
    # The curves alone: the rest of the figure needs trained networks, which are not kept.
    polynomial.draw(FIGURES / "polynomial.png", results_of("polynomial"), {}, "chunk_mse")
    algorithms.draw(FIGURES / "algorithms.png", results_of("algorithms"))
    features.draw_accuracy(FIGURES / "split_cifar.png", results_of("split_cifar"))
    draw_split_mnist()
    draw_growing_memory()
