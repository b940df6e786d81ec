"""Several algorithms in a sequence, by a Neural Turing machine (paper, section 4.3, Fig. 6).

python -m ncrl.tasks.algorithms                             # all layers: many hours on a CPU
python -m ncrl.tasks.algorithms --variant linear base --iterations 5000 --figure algorithms.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ncrl.shell.screen import say
from ncrl.tasks.algorithms.data import NUM_BITS, NUM_INPUTS, TASKS, Algorithms, algorithms
from ncrl.tasks.command import Session, run_command, task_parser
from ncrl.tasks.experiment import SequenceLearning, describe_layers, random_stream
from ncrl.tasks.figures import draw_curves, save_figure
from ncrl.tasks.models.recurrent import Ntm
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.results import Result, results_table

CONFIG = "algorithms.yaml"
VARIANTS = ("linear", "hypernet", "film", "nsm", "base")  # what the paper compares
TRAINED_TASKS = 4
TESTED_TASKS = (4, 8)  # n, how many algorithms are asked for in a sequence
TEST_SEQUENCES = 256
REPORT_SEQUENCES = 8  # test sequences on which the layers are described
GUESSING = 50.0  # per cent of the bits that are wrong by chance
PAPER = "lowest error at n=4 and alone in generalising to n=8 (Fig. 6, no number printed)"


class MultiAlgorithm(SequenceLearning):
    """A Neural Turing machine that learns n algorithms at once, on new sequences every time."""

    network = "ntm"
    model: Ntm

    def __init__(self, recipe: Recipe, seed: int, device: torch.device) -> None:
        super().__init__(recipe, seed, device)
        in_features = self.model.controller.input_size - self.model.read_start.shape[0]
        if in_features != NUM_INPUTS:
            raise ValueError(f"in_features must be {NUM_INPUTS}, got {in_features}")
        self.num_outputs = self.model.output.out_features
        self.data = f"algorithms, n = {TRAINED_TASKS}"
        self.readings = {
            "identity": "one of four bits and both channels",
            "answers": "after all questions, each followed by an end"
            if self.num_outputs > NUM_BITS
            else "after all questions",
            "loss": "cross-entropy of all outputs while answers are given",
        }
        self.best = {f"error_n{n}": "min" for n in TESTED_TASKS}
        self.test = {
            n: self.generate(TEST_SEQUENCES, n, random_stream(0, "test", n)) for n in TESTED_TASKS
        }

    def generate(self, number: int, num_tasks: int, generator: torch.Generator) -> Algorithms:
        """Sequences for the network, on its device."""
        made = algorithms(number, num_tasks, generator, num_outputs=self.num_outputs)
        return Algorithms(*(tensor.to(self.device) for tensor in made))

    def loss(self, update: int) -> Tensor:
        stream = random_stream(self.seed, "train", update)
        batch = self.generate(self.batch_size, TRAINED_TASKS, stream)
        logits, _ = self.model(batch.inputs)
        asked = (batch.task >= 0).float()
        total = F.binary_cross_entropy_with_logits(
            logits, batch.targets, asked[..., None], reduction="sum"
        )
        return total / (asked.sum() * self.num_outputs)

    def evaluate(self) -> dict[str, float]:
        """Wrong bits in per cent, for every n and, at the n trained on, every algorithm."""
        metrics: dict[str, float] = {}
        for n, test in self.test.items():
            logits, _ = self.model(test.inputs)
            by_task = bit_errors(logits, test)
            metrics[f"error_n{n}"] = by_task["all"]
            if n == TRAINED_TASKS:
                metrics |= {f"error_{task}": by_task[task] for task in TASKS}
        return metrics

    def report(self) -> dict[str, Any]:
        """Errors of every algorithm at every n, and what the layers do."""
        details: dict[str, Any] = {
            f"errors_n{n}": bit_errors(self.model(test.inputs)[0], test)
            for n, test in self.test.items()
        }
        test = self.test[TRAINED_TASKS]
        goes_on = (test.task >= 0).flip(0).cummax(0).values.flip(0)  # an answer is still to come
        inputs, counted = (part[:, :REPORT_SEQUENCES] for part in (test.inputs, goes_on))
        layers = describe_layers(self.model, inputs, counted=counted.flatten())
        return {**details, "layers": layers} if layers else details


def bit_errors(logits: Tensor, test: Algorithms) -> dict[str, float]:
    """Wrong bits in per cent of the bits of the answers, ends not counted: of `all` and by task.
    Logits [T, N, 8 or 9] above 0 mean 1."""
    counted = (test.task >= 0) & ~test.is_end
    said, true = (tensor[..., :NUM_BITS] > 0 for tensor in (logits, test.targets))
    wrong = (said != true).float().mean(2)  # [T, N]
    errors = {"all": 100 * float(wrong[counted].mean())}
    for index, task in enumerate(TASKS):
        errors[task] = 100 * float(wrong[counted & (test.task == index)].mean())
    return errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = task_parser("algorithms", __doc__, has_images=False)
    return run_command("algorithms", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the figure."""
    rows = session.run(session.recipes(CONFIG, default_variants=VARIANTS), MultiAlgorithm)
    if session.figure is not None and rows:
        draw(session.figure, rows)
    say(table(rows))


def table(rows: Sequence[Result]) -> str:
    """Bit errors at the end."""
    metrics = [f"error_n{n}" for n in TESTED_TASKS] + [f"error_{task}" for task in TASKS]
    paper = {"neurocoder": PAPER}
    return results_table(rows, metrics, {"paper": lambda group: paper.get(group[0].layer)})


def draw(path: Path, rows: Sequence[Result]) -> None:
    """The paper's Fig. 6: bit error over updates, a panel for each n."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(TESTED_TASKS), sharey=True)
    for axes, n in zip(panels, TESTED_TASKS, strict=True):
        draw_curves(axes, rows, f"error_n{n}")
        axes.axhline(GUESSING, color="0.4", linestyle=":", label="guessing")
        longer = "as in training" if n == TRAINED_TASKS else "twice as long"
        axes.set_title(f"algorithms, n = {n}, {longer}", fontsize=10)
        axes.set_ylim(0, 55)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("wrong bits, %")
    panels[0].legend(fontsize=8, loc="lower left")
    save_figure(figure, path)
