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

LOWEST = 45.0
"""Per cent: just below chance, where the axes begin."""


class Point(NamedTuple):
    """Means over seeds, per cent, under one coefficient."""

    coef: float
    learn: float
    accuracy: float


def curves(rows: Sequence[Result]) -> Mapping[str, Mapping[str, list[Point]]]:
    """By scenario and method, then by layer: points in the order of the coefficient.

    Args:
        rows: of split MNIST, named `scenario method layer ...`.
    """
    groups: dict[tuple[str, str], dict[float, list[Result]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        scenario, method, layer = row.name.split(" ", 2)
        coef = row.recipe["penalty_coef"]
        layer = layer.replace(f" {coef_words(coef)}", "")
        groups[f"{scenario} {method}", layer][coef].append(row)
    found: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for (where, layer), by_coef in groups.items():
        found[where][layer] = [
            Point(coef, _mean(by_coef[coef], "learn"), _mean(by_coef[coef], "accuracy"))
            for coef in sorted(by_coef)
        ]
    return found


def coef_words(coef: float) -> str:
    """How the name of a run says its coefficient."""
    return f"penalty_coef={coef:g}"


def _mean(rows: Sequence[Result], metric: str) -> float:
    summary = summarise(rows, metric)
    assert summary is not None
    return summary.mean


def draw(rows: Sequence[Result], path: Path) -> None:
    """A panel for every scenario and method: accuracy after all tasks over that right after each,
    with the coefficients beside the points."""
    found = curves(rows)
    columns = min(2, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    layers = list(dict.fromkeys(layer for by_layer in found.values() for layer in by_layer))
    for index, (where, by_layer) in enumerate(found.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        for layer, points in by_layer.items():
            _draw_curve(axes, points, layer, f"C{layers.index(layer)}")
        axes.plot([LOWEST, 100], [LOWEST, 100], color="0.8", linewidth=0.8, zorder=0)
        axes.set_xlim(LOWEST, 101)
        axes.set_ylim(LOWEST, 101)
        axes.set_xlabel("accuracy on a task right after it, %")
        axes.set_ylabel("accuracy after all tasks, %")
        axes.set_title(f"{where}; grey: nothing forgotten", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
    save_figure(figure, path)


def _draw_curve(axes: Axes, points: Sequence[Point], label: str, color: str) -> None:
    x, y = [point.learn for point in points], [point.accuracy for point in points]
    axes.plot(x, y, "o-", markersize=4, linewidth=1, label=label, color=color)
    for point in points:
        axes.annotate(
            f"{point.coef:g}",
            (point.learn, point.accuracy),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=6,
            color=color,
        )
