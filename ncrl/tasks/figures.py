"""What the figures of the task commands share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncrl.tasks.results import Result, by_name

DPI = 100

LAYER_NAMES: Mapping[str, str] = {
    "linear": "plain",
    "neurocoder": "Neurocoder",
    "hypernet": "HyperNet",
    "film": "FiLM",
    "moe": "MoE",
    "nsm": "NSM",
}
"""As the paper writes them."""


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name ends in.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def draw_curves(
    axes: Axes, rows: Iterable[Result], metric: str, labels: Mapping[str, str] | None = None
) -> None:
    """A metric over updates: for each recipe its mean over seeds, between the standard deviations.

    Args:
        axes: to draw on.
        rows: of any number of recipes; updates that not all seeds of a recipe have are left out.
        metric: a metric of `Result.curve`.
        labels: of recipes, in place of their names.
    """
    for name, group in by_name(rows).items():
        curves = [
            {point["update"]: point[metric] for point in row.curve if metric in point}
            for row in group
        ]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not shared:
            continue
        values = [[curve[update] for update in shared] for curve in curves]
        draw_band(axes, shared, values, (labels or {}).get(name, name))
    axes.set_xlabel("updates")


def draw_band(
    axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any
) -> None:
    """The mean over seeds, between the standard deviations; a row of values for each seed."""
    mean, std = np.mean(values, axis=0), np.std(values, axis=0)
    (line,) = axes.plot(x, mean, label=label, linewidth=1.3, **style)
    if len(values) > 1:
        axes.fill_between(x, mean - std, mean + std, alpha=0.2, color=line.get_color())


def draw_map(axes: Axes, weights: Sequence[Sequence[float]], largest: float) -> None:
    """Attention weights [R, P] as an image with slots downwards and components to the right."""
    axes.imshow(
        np.asarray(weights).T,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=largest,
        origin="lower",
    )
    axes.set_xticks([])
    axes.set_yticks([])
