"""The paper's Figures 7 and 8: accuracy over tasks, and where attention goes over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ncrl.tasks.figures import draw_band, save_figure
from ncrl.tasks.results import Result, by_name


def draw_accuracy(path: Path, rows: Sequence[Result]) -> None:
    """Mean accuracy on the tasks seen so far over their number (Fig. 7)."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, group in by_name(rows).items():
        values = [row.details["seen"] for row in group]  # [seeds, T]
        numbers = range(1, len(values[0]) + 1)
        draw_band(axes, numbers, values, f"{name} ({len(group)})", marker="o", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tasks learnt")
    axes.set_ylabel("accuracy on them, %")
    axes.set_title(f"{rows[0].data}; {title_of(rows[0])}", fontsize=7, wrap=True)
    beside: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # where it hides no curve
    axes.legend(fontsize=7, title="recipe (seeds)", title_fontsize=7, frameon=False, **beside)
    save_figure(figure, path)


def slots_figure(path: Path) -> Path:
    """File of Fig. 8 beside that of Fig. 7: `figure.png` gives `figure_slots.png`."""
    return path.with_name(f"{path.stem}_slots{path.suffix}")


def draw_slots(path: Path, rows: Sequence[Result]) -> None:
    """The slot of M_U that most attention goes to, over training, with lines between the tasks
    (Fig. 8): a column for each recipe with coded layers, of its first seed; a row for each layer.
    """
    drawn = [g[0] for g in by_name(rows).values() if "top_slots" in g[0].details]
    layers = max(len(row.details["top_slots"][0][0]) for row in drawn)
    figure = Figure(figsize=(3.2 * len(drawn) + 1, 1.5 * layers + 1), layout="constrained")
    grid = figure.subplots(layers, len(drawn), squeeze=False, sharex="col")
    for column, row in enumerate(drawn):
        slots = np.array(row.details["top_slots"])  # [T, SLOT_STEPS, layers]
        seen = slots[:, :, 0] >= 0
        borders = np.cumsum(seen.sum(1))
        for layer in range(slots.shape[2]):
            axes = grid[layer][column]
            axes.plot(slots[:, :, layer][seen], "k.", markersize=1.5)
            for border in borders[:-1]:
                axes.axvline(border - 0.5, color="red", linewidth=0.8)
            axes.set_ylim(-2, row.recipe["layer_options"].get("num_slots", 100) + 1)
            axes.set_ylabel(f"layer {layer + 1}: top slot", fontsize=7)
            axes.tick_params(labelsize=6)
        grid[0][column].set_title(f"{row.name}, seed {row.seed}", fontsize=7)
        grid[-1][column].set_xlabel("look during training", fontsize=7)
    figure.suptitle(f"{rows[0].data}; {title_of(rows[0])}", fontsize=7)
    save_figure(figure, path)


def title_of(row: Result) -> str:
    """What features a row is about, in short."""
    title: str = row.readings["backbone"]
    return title.partition(",")[0].partition("; ")[0]
