"""What the figures of the task commands share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncrl.shell.screen import say
from ncrl.tasks.results import Result, by_name

DPI = 100


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends in, and say so."""
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:  # a full disk's does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    say(f"drawn: {path}")


def legend_name(row: Result) -> str:
    """The recipe's name; with the layer where it is the one at the top of its file, which has no
    name of its own."""
    return f"{row.name}, {row.layer}" if row.labels.get("variant") == "" else row.name


def draw_curves(axes: Axes, rows: Iterable[Result], metric: str) -> None:
    """A metric of `Result.curve` over updates: for each recipe its mean over seeds, between the
    standard deviations. Updates that not all seeds of a recipe have are left out."""
    for group in by_name(rows).values():
        curves = [
            {point["update"]: point[metric] for point in row.curve if metric in point}
            for row in group
        ]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        if shared:
            values = [[curve[update] for update in shared] for curve in curves]
            draw_band(axes, shared, values, legend_name(group[0]))
    axes.set_xlabel("updates")


def draw_band(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any
) -> None:
    """The mean over seeds, between the standard deviations; a row of values for each seed."""
    if len(x) == 1:  # a line of one point would not be seen
        style.setdefault("marker", "o")
    mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    (line,) = axes.plot(x, mean, label=label, linewidth=1.3, **style)
    if len(values) > 1:
        axes.fill_between(x, mean - std, mean + std, alpha=0.2, color=line.get_color())


def draw_attention(axes: Axes, weights: Any, largest: float, **options: Any) -> Any:
    """Attention weights [slots, components or timesteps] as an image with slots upwards."""
    options = {"aspect": "auto", "interpolation": "nearest", "origin": "lower", **options}
    return axes.imshow(np.asarray(weights), vmin=0, vmax=largest, cmap="viridis", **options)
