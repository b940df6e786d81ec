"""The picture of the polynomial experiment: learning curves, and attention over time beside
prediction and truth (paper, Figs. 2d-e and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncrl.tasks.figures import draw_curves, save_figure
from ncrl.tasks.polynomial import Polynomials
from ncrl.tasks.results import Result
from ncrl.tasks.training import Experiment

LARGEST_SHARE = 0.02
"""Tops of the scale of attention are rounded up to multiples of this."""


def draw_figure(path: Path, rows: Sequence[Result], experiments: Mapping[str, Experiment]) -> None:
    """Draw curves of all rows, and for every trained Neurocoder its attention on one sequence.

    Args:
        path: of the figure.
        rows: of all runs.
        experiments: with a trained network each, by the recipe's name.

    Raises:
        ValueError: if the figure cannot be written.
    """
    figure = Figure(figsize=(8.5, 3.2 + 2.9 * len(experiments)), layout="constrained")
    parts = figure.subfigures(
        1 + len(experiments), 1, height_ratios=[3.2, *([2.9] * len(experiments))], squeeze=False
    )[:, 0]
    curves = parts[0].subplots()
    draw_curves(curves, rows, "chunk_mse")
    curves.set_yscale("log")
    curves.set_ylabel("squared error inside chunks")
    curves.legend(fontsize=7)
    for part, (name, experiment) in zip(parts[1:], experiments.items(), strict=True):
        assert isinstance(experiment, Polynomials)
        map_axes, y_axes = part.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
        part.suptitle(name, fontsize=9)
        draw_sequence(map_axes, y_axes, experiment)
    save_figure(figure, path)


def choose_sequence(experiment: Polynomials) -> int:
    """The test sequence whose flattest chunk is highest: others look empty but for one chunk."""
    y = experiment.test.clean[..., 0].abs()  # [T, N]
    highest = torch.stack([y[experiment.chunk == c].amax(0) for c in range(experiment.num_chunks)])
    return int(highest.amin(0).argmax())


@torch.no_grad()
def draw_sequence(map_axes: Axes, y_axes: Axes, experiment: Polynomials) -> None:
    """Attention of the first component, slots by time, over prediction and truth."""
    chosen = choose_sequence(experiment)
    inputs = experiment.test.inputs[:, chosen : chosen + 1]
    attention = experiment.attention(inputs)
    assert attention is not None
    weights = np.asarray(attention[:, 0, 0].T.cpu())  # [P, T]
    top = np.ceil(weights.max() / LARGEST_SHARE) * LARGEST_SHARE
    image = map_axes.imshow(
        weights, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=top
    )
    map_axes.figure.colorbar(image, ax=[map_axes, y_axes], pad=0.01)
    map_axes.set_ylabel("slot")
    predictions, _ = experiment.model(inputs)
    y_axes.plot(experiment.test.targets[:, chosen, 0].cpu(), color="tab:blue", label="y")
    y_axes.plot(predictions[:, 0, 0].cpu(), color="tab:orange", label="prediction", linewidth=1)
    y_axes.set_ylabel("y")
    y_axes.set_xlabel("timestep")
    y_axes.legend(fontsize=7, loc="upper right")
    length = len(experiment.chunk) // experiment.num_chunks
    for axes in (map_axes, y_axes):
        for chunk in range(1, experiment.num_chunks):
            axes.axvline(chunk * length - 0.5, color="tab:green", linestyle="--", linewidth=1)
