"""Auto-regression of sequences made of polynomials (paper, section 4.1, Figs. 2d-e and 5).

python -m ncrl.tasks.polynomial                             # all layers of the paper
python -m ncrl.tasks.polynomial --variant j1 base --seeds 0 1 --noise 0.3 --figure polynomial.png
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from ncrl import NeurocoderLinear
from ncrl.shell.screen import say
from ncrl.tasks.command import Session, run_command, task_parser
from ncrl.tasks.experiment import (
    SequenceLearning,
    describe_layers,
    mutual_information,
    random_stream,
)
from ncrl.tasks.figures import draw_attention, draw_curves, save_figure
from ncrl.tasks.models.recurrent import GruRegressor
from ncrl.tasks.polynomial import data
from ncrl.tasks.polynomial.data import NUM_CHUNKS, NUM_POINTS, Sequences
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.results import Result, results_table

CONFIG = "polynomial.yaml"
VARIANTS = ("linear", "hypernet", "film", "j1", "base", "no_usage")  # what the paper compares
LARGEST_STEP = 0.02  # the top of the scale of attention is rounded up to a multiple of this
TEST_SEQUENCES = 512
REPORT_SEQUENCES = 8  # test sequences on which the layers are described
SOLVED = 0.1  # share of the error of predicting zero below which a chunk counts as predicted
# What it says of Fig. 5, which has no numbers, by the variant.
PAPER = {
    "base": "converges at about 2,000 updates",
    "linear": "has not converged by 10,000 updates",
    "hypernet": "slower than Neurocoder",
    "film": "slower than Neurocoder",
    "no_usage": "worse than with usage attention",
}


class Polynomials(SequenceLearning):
    """A network that predicts y_t from x_t and the true y_{t-1}, on new sequences every time."""

    network = "gru"
    model: GruRegressor

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        *,
        num_chunks: int = NUM_CHUNKS,
        noise: float = 0.0,
    ) -> None:
        super().__init__(recipe, seed, device)
        self.layer = self.model.output
        self.data = f"polynomials, {num_chunks} chunks, noise {noise:g}"
        self.readings = {
            "points": NUM_POINTS,
            "x": "-5 to 5 in every chunk, fed divided by 5",
            "y": "divided by the largest of its sequence",
            "degrees": list(data.DEGREES),
            "coefficients": "U(-1, 1)",
            "noise": "standard deviation, part of inputs and targets",
        }
        self.best = {chunk_error(noise): "min"}
        self.num_chunks, self.noise = num_chunks, noise
        self.test = self.generate(TEST_SEQUENCES, random_stream(0, "test", 0))
        chunk, place, _ = data.layout(NUM_POINTS, num_chunks)
        self.chunk = chunk.to(device)  # [T]
        self.inside = (place >= data.UNPREDICTABLE).to(device)  # [T]

    def generate(self, number: int, generator: torch.Generator) -> Sequences:
        """Sequences for the network, on its device."""
        made = data.polynomials(number, generator, num_chunks=self.num_chunks, noise=self.noise)
        return Sequences(*(tensor.to(self.device) for tensor in made))

    def loss(self, update: int) -> Tensor:
        batch = self.generate(self.batch_size, random_stream(self.seed, "train", update))
        predictions, _ = self.model(batch.inputs)
        loss: Tensor = (predictions - batch.targets).square().mean()
        return loss

    def evaluate(self) -> dict[str, float]:
        """Mean squared errors: of all points, also undoing the division by the largest |y|, and of
        the points that can be predicted."""
        predictions, _ = self.model(self.test.inputs)
        squared = (predictions - self.test.targets).square()[..., 0]  # [T, N]
        metrics = {
            "mse": float(squared.mean()),
            "chunk_mse": float(squared[self.inside].mean()),
            "raw_mse": float((squared * self.test.scale.square()).mean()),
        }
        if self.noise:  # no network can predict that
            clean = (predictions - self.test.clean).square()[self.inside]
            metrics["clean_chunk_mse"] = float(clean.mean())
        return metrics

    def report(self) -> dict[str, Any]:
        """Errors of predicting zero; what the layer attends to, and what that says of the chunk."""
        squared = self.test.targets.square()[..., 0]
        details: dict[str, Any] = {
            "zero_mse": float(squared.mean()),
            "zero_chunk_mse": float(squared[self.inside].mean()),
        }
        if self.noise:
            clean = self.test.clean.square()[self.inside]
            details["zero_clean_chunk_mse"] = float(clean.mean())
        if isinstance(self.layer, NeurocoderLinear):
            details["information"] = information(self.attention(self.test.inputs), self.chunk)
            few = self.test.inputs[:, :REPORT_SEQUENCES]
            details["layers"] = describe_layers(self.model, few)
        return details

    def attention(self, inputs: Tensor) -> Tensor:
        """w^u of a Neurocoder output layer for inputs [T, N, 2]: [T, N, R, P]."""
        weights: Tensor = self.layer.attend(self.model.gru(inputs)[0]).u
        return weights

    @torch.no_grad()
    def draw_example(self, map_axes: Axes, y_axes: Axes) -> None:
        """One test sequence: attention of the first component, slots by time, over prediction and
        truth, with the borders of the chunks."""
        chosen = flattest_highest(self.test.clean[..., 0], self.chunk)
        inputs = self.test.inputs[:, chosen : chosen + 1]
        weights = self.attention(inputs)[:, 0, 0].T.cpu().numpy()  # [P, T]
        top = math.ceil(float(weights.max()) / LARGEST_STEP) * LARGEST_STEP
        image = draw_attention(map_axes, weights, top, origin="upper")
        map_axes.figure.colorbar(image, ax=[map_axes, y_axes], pad=0.01)
        map_axes.set_ylabel("slot")
        map_axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        predictions = self.model(inputs)[0][:, 0, 0].cpu()
        y_axes.plot(self.test.targets[:, chosen, 0].cpu(), color="tab:blue", label="y")
        y_axes.plot(predictions, color="tab:orange", label="prediction", linewidth=1)
        y_axes.set(xlabel="timestep", ylabel="y")
        y_axes.legend(fontsize=7, frameon=False)  # a frame would hide a part of y
        for begin in (self.chunk.diff().nonzero()[:, 0] + 1).tolist():
            for axes in (map_axes, y_axes):
                axes.axvline(begin - 0.5, color="tab:green", linestyle="--", linewidth=1)


def flattest_highest(y: Tensor, chunk: Tensor) -> int:
    """Which of sequences y [T, N], with the chunk of every timestep [T], has the highest flattest
    chunk; in most, all chunks but one look empty."""
    highest = [y[chunk == c].abs().amax(0) for c in range(int(chunk.max()) + 1)]
    return int(torch.stack(highest).amin(0).argmax())


def information(attention: Tensor, chunk: Tensor) -> dict[str, Any]:
    """What the most attended slot of w^u [T, N, R, P] says about the chunk [T] of every timestep:
    in bits, the mean over sequences, for the first component, which figures show.

    `bits` stand beside those that the same slots give in a random order, which is what chance gives
    in so short a sequence, and the most that there can be.
    """
    slots = attention[:, :, 0].argmax(2).T  # [N, T]
    order = torch.randperm(len(chunk), generator=random_stream(0, "order", 0)).to(chunk.device)
    bits, chance = (
        float(mutual_information(count_pairs(labels.expand(slots.shape), slots)).mean())
        for labels in (chunk, chunk[order])
    )
    found = {"bits": bits, "chance": chance, "most": math.log2(int(chunk.max()) + 1)}
    return {name: round(value, 4) for name, value in found.items()}


def count_pairs(first: Tensor, second: Tensor) -> Tensor:
    """How often labels meet: integers from 0 on, [..., N] each, give counts [..., A, B]."""
    one, two = (F.one_hot(labels).double() for labels in (first, second))
    return one.transpose(-1, -2) @ two


def chunk_error(noise: float) -> str:
    """The metric that says how well chunks are predicted. Noise cannot be, so where there is some,
    predictions are held against what it was added to."""
    return "clean_chunk_mse" if noise else "chunk_mse"


def updates_until(row: Result) -> float | None:
    """Updates at the first evaluation whose `chunk_error` is at most `SOLVED` times that of
    predicting zero; None if there is none."""
    error = next(name for name in ("clean_chunk_mse", "chunk_mse") if name in row.curve[0])
    limit = SOLVED * row.details[f"zero_{error}"]
    return next((point["update"] for point in row.curve if point[error] <= limit), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = task_parser("polynomial", __doc__, has_images=False)
    said = f"polynomials in a sequence (default: {NUM_CHUNKS}; paper: 8)"
    parser.add_argument("--chunks", type=int, help=said)
    said = "standard deviation of noise, as a share of the largest |y| (default: 0; paper: 0.3)"
    parser.add_argument("--noise", type=float, help=said)
    return run_command("polynomial", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the figure."""
    chunks, noise = session.flags.get("chunks", NUM_CHUNKS), session.flags.get("noise", 0.0)
    data.layout(NUM_POINTS, chunks)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a number of at least 0, got {noise}")
    usual = {"chunks": (chunks, NUM_CHUNKS), "noise": (noise, 0.0)}
    said = [f"{key}={own:g}" for key, (own, default) in usual.items() if own != default]
    wanted = [
        named._replace(name=" ".join([named.name, *said]))
        for named in session.recipes(CONFIG, default_variants=VARIANTS)
    ]
    make = partial(Polynomials, num_chunks=chunks, noise=noise)
    rows = session.run(wanted, make)
    say(table(rows, chunk_error(noise)))
    if session.figure is not None and rows:
        ended = {row.name for row in rows if row.seed == session.seeds[0]}
        examples = {
            named.name: session.experiment(named, session.seeds[0], make)
            for named in wanted
            if named.recipe.layer == "neurocoder" and named.name in ended
        }
        draw(session.figure, rows, examples, chunk_error(noise))


def draw(
    path: Path, rows: Sequence[Result], examples: Mapping[str, Polynomials], error: str
) -> None:
    """Curves of all rows, and for every trained Neurocoder, by its recipe's name, what it makes of
    one sequence (paper, Figs. 2d-e and 5)."""
    heights = [2.8, *([2.3] * len(examples))]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    curves = parts[0].subplots()
    draw_curves(curves, rows, error)
    curves.set(yscale="log", ylabel="squared error inside chunks")
    curves.legend(fontsize=7)
    curves.set_title(rows[0].data, fontsize=9)
    for part, (name, example) in zip(parts[1:], examples.items(), strict=True):
        part.suptitle(name, fontsize=9)
        example.draw_example(*part.subplots(2, 1, sharex=True, height_ratios=[1.4, 1]))
    save_figure(figure, path)


def table(rows: Sequence[Result], error: str) -> str:
    """Errors, updates until chunks are predicted, and what the attention says of the chunk."""

    def solved(group: list[Result]) -> str:
        reached = [updates_until(row) for row in group]
        return " ".join("never" if value is None else f"{value:g}" for value in reached)

    def bits(group: list[Result]) -> str | None:
        found = [row.details["information"] for row in group if "information" in row.details]
        said = " ".join(f"{value['bits']:.2f} ({value['chance']:.2f})" for value in found)
        return said or None

    columns: Mapping[str, Callable[[list[Result]], object]] = {
        f"updates to {SOLVED:.0%}": solved,
        "bits of chunk (chance)": bits,
        "paper": lambda group: PAPER.get(group[0].labels.get("variant") or "base"),
    }
    return results_table(rows, ["mse", error], columns)
