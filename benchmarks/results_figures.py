"""Figures of the kept results, drawn from results/*.csv with the names of each page's table.

python benchmarks/results_figures.py    # writes docs/figures/{cifar,polynomial,algorithms,...}.png
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results import RESULTS, ROOT, Row, chosen, read_csv, table_specs, values_of

FIGURES = ROOT / "docs" / "figures"
Points = tuple[Sequence[float], Sequence[float]]  # x and y of one run


def draw_runs(
    axes: Axes, task: str, points: Callable[[Row], Points], only: str = "", marker: str = ""
) -> dict[str, Any]:
    """A line for each recipe of the first table of a task's page, of the same name: its mean,
    between its seeds. `only` draws the recipes alone whose label starts with it, and leaves it out.
    Returns the colour of each recipe, by its label."""
    rows, spec = read_csv(task), table_specs(RESULTS / f"{task}.md")[0]
    colours: dict[str, Any] = {}
    for name, label in spec["runs"].items():
        label = label[0] if isinstance(label, list) else label
        if not label.startswith(only):
            continue
        drawn = [points(row) for row in chosen(rows, name, spec)]
        x, y = drawn[0][0], np.array([values for _, values in drawn])
        label = label.removeprefix(only)
        (line,) = axes.plot(x, y.mean(0), label=label, marker=marker, markersize=4, linewidth=1.4)
        axes.fill_between(x, y.min(0), y.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
        colours[label] = line.get_color()
    axes.grid(axis="y", alpha=0.3)
    return colours


def curve(metric: str, factor: float = 1) -> Callable[[Row], Points]:
    """A metric over updates."""

    def points(row: Row) -> Points:
        known = [point for point in row["curve"] if metric in point]
        return [point["update"] for point in known], [point[metric] * factor for point in known]

    return points


def save(figure: Figure, name: str) -> None:
    """Into docs/figures/."""
    figure.savefig(FIGURES / f"{name}.png", dpi=100)


def draw_cifar() -> None:
    """Accuracy over epochs; hollow points are what the paper prints."""
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    runs = table_specs(RESULTS / "cifar.md")[0]["runs"].values()
    colours = draw_runs(axes, "cifar", curve("accuracy"), only="MLP ")
    last = axes.get_xlim()[1]
    for label, paper in runs:
        if paper and label.startswith("MLP "):
            colour = colours[label.removeprefix("MLP ")]
            axes.plot(last, paper, "o", mfc="none", mec=colour, clip_on=False)
    axes.plot([], [], "o", mfc="none", mec="0.3", label="the paper's best of 100 epochs")
    axes.set_title("CIFAR-10 (JPEG copies), MLP, 20 epochs", fontsize=10)
    axes.set(xlabel="updates", ylabel="test accuracy, %", ylim=(32, 57))
    axes.legend(fontsize=8, ncols=2)
    save(figure, "cifar")


def draw_polynomial() -> None:
    """Error over updates."""
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    draw_runs(axes, "polynomial", curve("chunk_mse", 1000))
    axes.set_title("4 polynomials in a sequence, seeds 0 and 1", fontsize=10)
    axes.set(xlabel="updates", ylabel="squared error inside chunks, 1e-3", yscale="log")
    axes.legend(fontsize=8)
    save(figure, "polynomial")


def draw_algorithms() -> None:
    """Wrong bits over updates, at the length of training and at twice that."""
    figure = Figure((9, 3.6), layout="constrained")
    for axes, n in zip(figure.subplots(1, 2, sharey=True), (4, 8), strict=True):
        draw_runs(axes, "algorithms", curve(f"error_n{n}"))
        axes.axhline(50, color="0.4", linestyle=":", label="guessing")
        title = "as in training" if n == 4 else "twice as long"
        axes.set_title(f"four algorithms, n = {n}, {title}, one seed", fontsize=10)
        axes.set(xlabel="updates", ylim=(0, 55))
    figure.axes[0].set_ylabel("wrong bits, %")
    figure.axes[0].legend(fontsize=8, loc="lower left")
    save(figure, "algorithms")


def draw_split_cifar() -> None:
    """Mean accuracy on the tasks seen so far over their number (Fig. 7)."""

    def seen(row: Row) -> Points:
        after = row["details"]["accuracy"]
        return [*range(1, 6)], [float(np.mean(line[: k + 1])) for k, line in enumerate(after)]

    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    draw_runs(axes, "split_cifar", seen, marker="o")
    axes.set_title("split CIFAR-10 (JPEG copies, no ImageNet weights), three seeds", fontsize=10)
    axes.set(xlabel="tasks learnt", ylabel="accuracy on them, %", xticks=range(1, 6))
    figure.legend(fontsize=8, loc="outside right center")
    save(figure, "split_cifar")


PANELS = {
    "without residual": {"official": "authors' layer", "paper": "the paper's equations"}
    | {"rank 1": "static rank 1, the same for every input"},
    "with residual, and NSM": {"official residual": "authors' layer, residual"}
    | {"paper residual": "the paper's equations, residual", "nsm": "NSM"},
}
"""What split MNIST's figure compares with the MLP: columns of the tables, and their names."""


def draw_split_mnist() -> None:
    """Split MNIST's tables as points, the MLP as a band and the paper's values as hollow points."""
    rows = read_csv("split_mnist")
    grids = [spec for spec in table_specs(RESULTS / "split_mnist.md") if "grid" in spec]
    figure = Figure((10, 7), layout="constrained")
    axes = figure.subplots(len(grids), len(PANELS), sharex=True, sharey="row")
    for spec, line in zip(grids, axes, strict=True):
        scenario = spec["grid"].split()[0]
        methods = list(spec["rows"])

        def measured(column: str, spec: Any = spec) -> tuple[np.ndarray, np.ndarray]:
            groups = [chosen(rows, spec["grid"].format(m, column), spec) for m in spec["rows"]]
            values = np.array([values_of(group, spec["metric"]) for group in groups])
            return values.mean(1), values.std(1)

        for ax, (title, names) in zip(line, PANELS.items(), strict=True):
            mean, std = measured("mlp")
            at = np.arange(len(methods))
            ax.plot(at, mean, color="0.35", linewidth=1.2, label="plain MLP")
            ax.fill_between(at, mean - std, mean + std, color="0.85")
            for number, (column, label) in enumerate(names.items()):
                x = at + 0.2 * (number - 1)
                mean, std = measured(column)
                points = ax.errorbar(x, mean, std, fmt="o", label=label, capsize=2, markersize=5)
                printed = [cells[spec["columns"].index(column)] for cells in spec["rows"].values()]
                known = [(a, float(p.split(";")[0])) for a, p in zip(x, printed, strict=True) if p]
                hollow = {"mfc": "none", "mec": points[0].get_color(), "markersize": 6}
                ax.plot(*zip(*known, strict=True), "o", **hollow) if known else None
            ax.set_xticks(at, methods)
            ax.set_title(f"split MNIST, {scenario} scenario: {title}", fontsize=10)
            ax.grid(axis="y", alpha=0.3)
        line[0].set_ylabel("accuracy after five tasks, %")
    for ax in axes[0]:
        ax.plot([], [], "o", mfc="none", mec="0.3", label="hollow: what the paper prints")
        ax.legend(fontsize=8, loc="upper left")
        ax.set_ylim(top=100)
    save(figure, "split_mnist")


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
    save(figure, "growing_memory")


if __name__ == "__main__":
    for draw in (
        draw_cifar,
        draw_polynomial,
        draw_algorithms,
        draw_split_cifar,
        draw_split_mnist,
        draw_growing_memory,
    ):
        draw()
