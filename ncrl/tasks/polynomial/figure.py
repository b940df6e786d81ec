"""The picture of the polynomial experiment: learning curves, and attention over time beside
prediction and truth (paper, Figs. 2d-e and 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ncrl.tasks.figures import draw_curves, save_figure
from ncrl.tasks.results import Result

LARGEST_STEP = 0.02  # the top of the scale of attention is rounded up to a multiple of this


class Example(NamedTuple):
    """One sequence as a trained network sees it."""

    attention: Tensor  # of the component shown, [P, T]
    targets: Tensor  # [T]
    predictions: Tensor  # [T]
    chunk: Tensor  # [T]


def draw_figure(
    path: Path, rows: Sequence[Result], examples: Mapping[str, Example], metric: str
) -> None:
    """Draw curves of all rows, and for every trained Neurocoder its attention on one sequence.

    Args:
        path: of the figure.
        rows: of all runs.
        examples: by the recipe's name.
        metric: error inside chunks to draw, a metric of `Result.curve`.
    """
    heights = [2.8, *([2.3] * len(examples))]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curves = parts[0].subplots()
    draw_curves(curves, rows, metric)
    curves.set_yscale("log")
    curves.set_ylabel("squared error inside chunks")
    curves.legend(fontsize=7)
    for part, (name, example) in zip(parts[1:], examples.items(), strict=True):
        map_axes, y_axes = part.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
        part.suptitle(name, fontsize=9)
        draw_example(map_axes, y_axes, example)
    save_figure(figure, path)


def draw_example(map_axes: Axes, y_axes: Axes, example: Example) -> None:
    """Attention, slots by time, over prediction and truth, with the borders of the chunks."""
    weights = example.attention.cpu().numpy()  # [P, T]
    top = math.ceil(float(weights.max()) / LARGEST_STEP) * LARGEST_STEP
    image = map_axes.imshow(
        weights, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top
    )
    map_axes.figure.colorbar(image, ax=[map_axes, y_axes], pad=0.01)
    map_axes.set_ylabel("slot")
    map_axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    y_axes.plot(example.targets.cpu().numpy(), color="tab:blue", label="y")
    y_axes.plot(
        example.predictions.cpu().numpy(), color="tab:orange", label="prediction", linewidth=1
    )
    y_axes.set_ylabel("y")
    y_axes.set_xlabel("timestep")
    y_axes.legend(fontsize=7, loc="upper right")
    for begin in (example.chunk.diff().nonzero()[:, 0] + 1).tolist():
        for axes in (map_axes, y_axes):
            axes.axvline(begin - 0.5, color="tab:green", linestyle="--", linewidth=1)
