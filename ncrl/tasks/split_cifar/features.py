"""Classifiers of frozen features that learn one task after the other, and what they attend to.

T tasks, P slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ncrl import NeurocoderLinear
from ncrl.shell.tensors import check_like
from ncrl.tasks.continual.split import DESCRIBED_IMAGES, SplitLearning
from ncrl.tasks.experiment import describe_layers, evaluating, layer_inputs, mutual_information
from ncrl.tasks.figures import draw_band, legend_name, save_figure
from ncrl.tasks.models.mlp import SplitMlp
from ncrl.tasks.results import Result, by_name

SLOT_STEPS = 100  # Training steps of each task at which attention is looked at (Fig. 8)
SLOT_IMAGES = 32  # images of the batch that are looked at


class SplitFeatures(SplitLearning):
    """`SplitLearning` of features in the task scenario, and what the coded hidden layers attend to;
    `readings` say how features came about."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coded = [x for x in self.model.hidden if isinstance(x, NeurocoderLinear)]
        self.watched = watched_updates(self.ends) if coded else {}
        self.top_slots = torch.full((len(self.tasks), SLOT_STEPS, len(coded)), -1)
        """Top slots of the coded layers at steps of training, [T, SLOT_STEPS, layers]; -1 where a
        task has fewer steps."""

    def after_update(self, update: int) -> None:
        # Before the end of a task changes the memory for the next one.
        if update in self.watched:
            task, step = self.watched[update]
            _, x, _ = self.batch(update)
            with evaluating(self.model):
                attention = hidden_attention(self.model, x[:SLOT_IMAGES])
            for layer, weights in enumerate(attention):
                self.top_slots[task, step, layer] = weights.mean(0).argmax()
        super().after_update(update)

    def evaluate(self) -> dict[str, float]:
        """Beside what `SplitLearning` measures: `slot_information`, in bits how much the top slot
        of an image tells about its task, mean over hidden layers; 0 if all tasks use the same."""
        found = super().evaluate()
        if self.watched:
            found["slot_information"] = float(mutual_information(self._slot_counts()).mean())
        return found

    def _slot_counts(self) -> Tensor:
        """Test images by their top slot, in the network as it is: [layers, T, P]."""
        counts = []
        for task in self.tasks:
            tops = [
                torch.bincount(weights.argmax(1), minlength=weights.shape[1])
                for weights in hidden_attention(self.model, task.test_images)
            ]
            counts.append(torch.stack(tops))
        return torch.stack(counts, dim=1)

    def report(self) -> dict[str, Any]:
        details = super().report()
        # Mean over the tasks learnt so far, after each (Fig. 7).
        means = (row[: task + 1].mean() for task, row in enumerate(self.accuracy))
        details["seen"] = [float(mean) for mean in means]
        if self.watched:
            details["top_slots"] = self.top_slots.tolist()
            details["watched"] = sorted(self.watched)
            details["slot_counts"] = self._slot_counts().tolist()
            images = torch.cat([task.test_images[:DESCRIBED_IMAGES] for task in self.tasks])
            details["attention"] = describe_layers(self.model, images)
        return details

    def state(self) -> dict[str, Any]:
        return {**super().state(), "top_slots": self.top_slots}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.top_slots = check_like(state["top_slots"], self.top_slots, "top_slots")


def watched_updates(ends: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Task and number of the look, by update: SLOT_STEPS evenly spread over each task, or every
    update of a task that has fewer, for the updates after which tasks end."""
    watched = {}
    for task, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        steps = min(SLOT_STEPS, end - begin)
        for step in range(steps):
            watched[begin + (end - begin) * (step + 1) // steps - 1] = task, step
    return watched


def hidden_attention(model: SplitMlp, x: Tensor) -> list[Tensor]:
    """Attention to the left vectors, M_U, of the coded hidden layers, mean over components:
    [B, P] each, for features [B, F]."""
    inputs = layer_inputs(model, NeurocoderLinear, x)
    layers = (read for name, read in inputs.items() if name.startswith("hidden"))
    return [layer.attend(given).u.mean(1) for layer, given in layers]


# Figures


def draw_accuracy(path: Path, rows: Sequence[Result]) -> None:
    """Mean accuracy on the tasks seen so far over their number (Fig. 7)."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for group in by_name(rows).values():
        values = [row.details["seen"] for row in group]  # [seeds, T]
        numbers = range(1, len(values[0]) + 1)
        label = f"{legend_name(group[0])} ({len(group)})"
        draw_band(axes, numbers, values, label, marker="o", markersize=3)
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
            axes.set_ylim(-2, len(row.details["slot_counts"][layer][0]) + 1)
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
