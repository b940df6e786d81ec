"""What the weight of a penalty trades: what is learnt at all for what is kept of it.

A network that learns nothing forgets nothing, so that methods and layers compare only where they
have learnt equally well. A sweep of the coefficient shows that: every layer is a curve.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ncrl.tasks.figures import save_figure
from ncrl.tasks.results import Result
from ncrl.tasks.split_mnist.tables import by_cell

# Per cent: ends of the axis of errors, which is logarithmic because most networks learn well.
LEAST_ERROR, MOST_ERROR = 0.2, 60.0


class Point(NamedTuple):
    """Means over seeds, per cent, under one coefficient."""

    coef: float
    learn: float
    accuracy: float


def curves(rows: Sequence[Result]) -> Mapping[str, Mapping[str, list[Point]]]:
    """By scenario and method, then by layer: points in the order of the coefficient."""
    found: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for (scenario, method, layer), group in by_cell(rows, changes=True).items():
        points = []
        for coef in sorted({row.recipe["penalty_coef"] for row in group}):
            metrics = [row.metrics for row in group if row.recipe["penalty_coef"] == coef]
            means = (fmean(own[name] for own in metrics) for name in ("learn", "accuracy"))
            points.append(Point(coef, *means))
        found[f"{scenario} {method}"][layer] = points
    return found


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
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(found) :]:
        axes.remove()
    for axes, (where, by_layer) in zip(grid, found.items(), strict=False):
        for layer, points in by_layer.items():
            style: Any = {"color": f"C{layers.index(layer)}"}
            x = [max(100 - point.learn, LEAST_ERROR) for point in points]
            y = [point.accuracy for point in points]
            axes.plot(x, y, "o-", markersize=4, linewidth=1, label=layer, **style)
            style |= {"fontsize": 6, "xytext": (3, 3), "textcoords": "offset points"}
            for point, error in zip(points, x, strict=True):
                axes.annotate(f"{point.coef:g}", (error, point.accuracy), **style)
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
