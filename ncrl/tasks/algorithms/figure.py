"""The picture of the algorithms experiment: bit error over updates, and at the end for every n
(paper, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ncrl.tasks.figures import LAYER_NAMES, draw_curves, save_figure
from ncrl.tasks.results import Result, by_name

GUESSING = 50.0
"""Per cent of the bits that are wrong by chance."""


def draw_figure(
    path: Path, rows: Sequence[Result], trained_tasks: int, tested_tasks: Sequence[int]
) -> None:
    """Draw curves at the n trained on, and bars at every n tested.

    Raises:
        ValueError: if the figure cannot be written.
    """
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1.5, 1])
    groups = by_name(rows)
    labels = {name: LAYER_NAMES[group[0].layer] for name, group in groups.items()}
    if len(set(labels.values())) < len(labels):  # recipes of the same layer
        labels = {name: name for name in groups}
    draw_curves(curves, rows, f"error_n{trained_tasks}", labels)
    curves.axhline(GUESSING, color="grey", linestyle=":", linewidth=1)
    curves.set_ylabel(f"wrong bits at n = {trained_tasks} (%)")
    curves.legend(fontsize=7)

    width = 0.8 / len(groups)
    for index, (name, group) in enumerate(groups.items()):
        values = np.array([[row.metrics[f"error_n{n}"] for n in tested_tasks] for row in group])
        places = np.arange(len(tested_tasks)) + (index - (len(groups) - 1) / 2) * width
        bars.bar(places, values.mean(0), width, yerr=values.std(0), capsize=2, label=labels[name])
    bars.axhline(GUESSING, color="grey", linestyle=":", linewidth=1)
    bars.set_xticks(range(len(tested_tasks)), [f"n = {n}" for n in tested_tasks])
    bars.set_ylabel("wrong bits at the end (%)")
    save_figure(figure, path)
