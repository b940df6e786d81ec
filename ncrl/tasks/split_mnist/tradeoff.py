"""What the weight of a penalty trades: what is learnt at all for what is kept of it.

A network that learns nothing forgets nothing, so that methods and layers compare only where they
have learnt equally well. A sweep of the coefficient shows that: every layer is a curve.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncrl.tasks.figures import save_figure
from ncrl.tasks.results import Result, summarise
from ncrl.tasks.split_mnist.tables import by_cell

LEAST_ERROR, MOST_ERROR = 0.2, 60.0
"""Per cent: ends of the axis of errors, which is logarithmic because most networks learn well."""


class Point(NamedTuple):
    """Means over seeds, per cent, under one coefficient."""

    coef: float
    learn: float
    accuracy: float


def curves(rows: Sequence[Result]) -> Mapping[str, Mapping[str, list[Point]]]:
    """By scenario and method, then by layer: points in the order of the coefficient.

    Args:
        rows: of split MNIST.
    """
    found: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for (scenario, method, layer), group in by_cell(rows, changes=True).items():
        by_coef: dict[float, list[Result]] = defaultdict(list)
        for row in group:
            by_coef[row.recipe["penalty_coef"]].append(row)
        found[f"{scenario} {method}"][layer] = [
            Point(coef, _mean(by_coef[coef], "learn"), _mean(by_coef[coef], "accuracy"))
            for coef in sorted(by_coef)
        ]
    return found


def _mean(rows: Sequence[Result], metric: str) -> float:
    summary = summarise(rows, metric)
    assert summary is not None
    return summary.mean


def draw(rows: Sequence[Result], path: Path) -> None:
    """A panel for every scenario and method: accuracy after all tasks over the error on each right
    after training on it, with the coefficients beside the points."""
    found = curves(rows)
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.2 * columns, 4 * lines), layout="constrained")
    layers = list(dict.fromkeys(layer for by_layer in found.values() for layer in by_layer))
    lowest = min(row.metrics["accuracy"] for row in rows)
    errors = [LEAST_ERROR * (MOST_ERROR / LEAST_ERROR) ** (i / 50) for i in range(51)]
    for index, (where, by_layer) in enumerate(found.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        for layer, points in by_layer.items():
            _draw_curve(axes, points, layer, f"C{layers.index(layer)}")
        axes.plot(errors, [100 - error for error in errors], color="0.8", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(LEAST_ERROR, MOST_ERROR)
        axes.set_ylim(lowest - 3, 101)
        axes.set_xlabel("error on a task right after training on it, %")
        axes.set_ylabel("accuracy after all tasks, %")
        axes.set_title(f"{where}; grey: nothing forgotten", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))
    save_figure(figure, path)


def _draw_curve(axes: Axes, points: Sequence[Point], label: str, color: str) -> None:
    x = [max(100 - point.learn, LEAST_ERROR) for point in points]
    y = [point.accuracy for point in points]
    axes.plot(x, y, "o-", markersize=4, linewidth=1, label=label, color=color)
    for point, error in zip(points, x, strict=True):
        axes.annotate(
            f"{point.coef:g}",
            (error, point.accuracy),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=6,
            color=color,
        )
