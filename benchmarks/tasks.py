"""What a training step with Neurocoder costs beside the plain network's, for the paper's tasks.

python benchmarks/tasks.py                            # every row, one thread, 10 seconds each
python benchmarks/tasks.py --only mlp lenet           # rows whose name contains one of these

A step is what `ncrl.tasks` does between two evaluations: batch, forward, all losses, backward,
optimiser. All layers' steps are taken in turn and their CPU time is counted, so that others may be
at work as well. What the data shows does not change the time, so images are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import machine, medians, print_header, print_row

from ncrl.shell.hardware import keep_freed_memory
from ncrl.tasks.algorithms.experiment import MultiAlgorithm
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import named_recipes
from ncrl.tasks.continual.split import SplitLearning, Task
from ncrl.tasks.data import Images
from ncrl.tasks.experiment import Experiment
from ncrl.tasks.polynomial.experiment import Polynomials
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.split_mnist.experiment import recipe_of
from ncrl.tasks.split_mnist.tables import LAYERS, Cell
from ncrl.tasks.training import Run, Training

CPU = torch.device("cpu")
SPLIT_MNIST = "split MNIST"
TASK_SIZES = (12665, 12089, 11263, 12183, 11800)  # training images of the five tasks of MNIST


class Row(NamedTuple):
    """A task's coded networks beside its plain one."""

    name: str
    config: str  # file in configs/tasks/; the plain network is its variant `linear`
    make: Callable[[Recipe, int, torch.device], Experiment]
    most: float  # largest ratio of the steps' times that is good enough
    variant: str = "base"  # of the coded network

    def recipes(self) -> dict[str, Recipe]:
        """The recipes by the layer's name, the plain one first."""
        if self.name == SPLIT_MNIST:
            layers = [LAYERS[name] for name in ("mlp", "official", "paper")]
            return {one.name: recipe_of(Cell("domain", "adam", one), {}).recipe for one in layers}
        variants = {"linear": "linear", "neurocoder": self.variant}
        named = named_recipes({"variant": list(variants.values())}, self.config)
        return {layer: one.recipe for layer, one in zip(variants, named, strict=True)}


def cifar(recipe: Recipe, seed: int, _device: torch.device) -> Experiment:
    """Ten batches of random images in the size of CIFAR's."""
    count = 10 * recipe.batch_size
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
    data = Images("random", "random", images, labels, images[:1], labels[:1], 10)
    return Classification(recipe, data, seed)


def split_mnist(recipe: Any, seed: int, _device: torch.device) -> Experiment:
    """As many random images as MNIST's tasks have, and a sixth for testing."""
    tasks = []
    for size in TASK_SIZES:
        (x, y), test = ((torch.randn(n, 1024), torch.randint(2, (n,))) for n in (size, size // 6))
        tasks.append(Task(x, y, *test))
    return SplitLearning(recipe, tasks, "random", seed)


ROWS = [
    Row("CIFAR MLP", "cifar_mlp", cifar, 1.15),
    Row("CIFAR LeNet", "cifar_lenet", cifar, 1.15),
    Row("NTM", "algorithms", MultiAlgorithm, 1.5),
    Row("polynomial GRU, J = 1", "polynomial", Polynomials, 2.0, variant="j1"),
    Row("polynomial GRU, J = 5", "polynomial", Polynomials, 4.0),
    Row(SPLIT_MNIST, "split_mnist", split_mnist, 2.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=10.0, help="per row")
    add("--only", nargs="+", default=[""], help="parts of names of rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the commands do
    parts = [part.lower() for part in arguments.only]
    chosen = [row for row in ROWS if any(part in row.name.lower() for part in parts)]
    if not chosen:
        names = ", ".join(row.name for row in ROWS)
        parser.error(f"no row's name contains {' or '.join(arguments.only)}: {names}")
    print(f"{machine()}, one thread, CPU time, median of {arguments.seconds:g} s a row\n")
    print_header("training step", "batch", "layer", "ms", "beside plain", "wanted")
    for row in chosen:
        measure(row, arguments.seconds)


def measure(row: Row, seconds: float) -> None:
    """Print the time of every layer's step."""
    recipes, steps = row.recipes(), []
    for recipe in recipes.values():
        torch.manual_seed(0)
        experiment = row.make(recipe, 0, CPU)
        experiment.model.train()
        steps.append(Training(Run("", "", recipe, 0, CPU, Path()), experiment).step)
    plain, *_ = times = medians(seconds, *steps, clock=time.process_time)
    for (layer, recipe), ms in zip(recipes.items(), times, strict=True):
        wanted = "" if layer in ("linear", "mlp") else f"<= {row.most:.2f}"
        print_row(row.name, recipe.batch_size, layer, f"{ms:.3g}", f"{ms / plain:.2f}", wanted)


if __name__ == "__main__":
    main()
