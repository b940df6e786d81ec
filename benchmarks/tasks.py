"""What a training step with Neurocoder costs beside the plain network's, for the paper's tasks.

python benchmarks/tasks.py                     # every row, one thread, 10 seconds each
python benchmarks/tasks.py --only mlp lenet    # rows whose name contains one of these
python benchmarks/tasks.py --all               # the other layers as well
python benchmarks/tasks.py --check             # exit status 1 if a target is missed

A step is what `ncrl.tasks` does between two evaluations: batch, forward, all losses, backward,
optimiser. Plain and coded steps are taken in turn, so that a busy machine meets both alike. What
the data shows does not change the time, so images are random.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from common import Target, machine, medians, print_header, print_row, print_targets

from ncrl.layers import LAYERS
from ncrl.tasks.algorithms.experiment import MultiAlgorithm
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import keep_freed_memory, plans
from ncrl.tasks.data import Images
from ncrl.tasks.experiment import Experiment
from ncrl.tasks.polynomial.experiment import Polynomials
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.training import make_step


class Row(NamedTuple):
    """A task's coded network beside its plain one."""

    name: str
    config: str
    """File in configs/tasks/; the plain network is its variant `linear`."""
    make: Callable[[Recipe], Experiment]
    most: float
    """Largest ratio of the steps' times that is good enough."""
    variant: str = "base"
    """Of the coded network."""


def cifar(recipe: Recipe) -> Experiment:
    """Ten batches of random images in the size of CIFAR's."""
    count = 10 * recipe.batch_size
    images = torch.randn(count, 3, 32, 32)
    labels = torch.randint(10, (count,))
    data = Images("random", "random", images, labels, images[:1], labels[:1], 10)
    return Classification(recipe, data, 0)


def polynomial(recipe: Recipe) -> Experiment:
    """As the command trains it: batches are drawn anew for every step."""
    return Polynomials(recipe, 0, torch.device("cpu"))


def algorithms(recipe: Recipe) -> Experiment:
    """Likewise."""
    return MultiAlgorithm(recipe, 0, torch.device("cpu"))


ROWS = [
    Row("CIFAR MLP", "cifar_mlp", cifar, 1.15),
    Row("CIFAR LeNet", "cifar_lenet", cifar, 1.15),
    Row("NTM", "algorithms", algorithms, 1.5),
    Row("polynomial GRU, J = 1", "polynomial", polynomial, 2.0, variant="j1"),
    Row("polynomial GRU, J = 5", "polynomial", polynomial, 4.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="per row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of this process's CPUs, for a machine that others use as well",
    )
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of rows")
    parser.add_argument("--all", action="store_true", help="the other layers as well")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the commands do
    chosen = [row for row in ROWS if wanted(row.name, arguments.only)]
    if not chosen:
        names = ", ".join(row.name for row in ROWS)
        parser.error(f"no row's name contains {' or '.join(arguments.only)}: {names}")
    clock = "CPU time" if arguments.cpu_time else "wall clock"
    print(
        f"{machine()}, {arguments.threads} thread(s), {clock}, median of "
        f"{arguments.seconds:g} s a row\n"
    )
    print_header("training step", "batch", "layer", "ms", "beside plain")
    targets = [target for row in chosen for target in measure(row, arguments)]
    print()
    print_targets(targets)
    if arguments.check and any(target.failed for target in targets):
        sys.exit(1)


def wanted(name: str, parts: Sequence[str]) -> bool:
    """Whether the name contains one of the parts, or there are none."""
    return not parts or any(part.lower() in name.lower() for part in parts)


def measure(row: Row, arguments: argparse.Namespace) -> list[Target]:
    """Print the time of every layer's step."""
    layers = ["linear", "neurocoder"]
    if arguments.all:
        layers += [name for name in ("hypernet", "film", "moe", "nsm") if name in LAYERS]
    recipes = {layer: recipe_of(row, layer) for layer in layers}
    steps = []
    for recipe in recipes.values():
        torch.manual_seed(0)
        steps.append(make_step(recipe, row.make(recipe)))
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    times = dict(zip(layers, medians(arguments.seconds, *steps, clock=clock), strict=True))
    for layer, milliseconds in times.items():
        ratio = milliseconds / times["linear"]
        batch = recipes[layer].batch_size
        print_row(row.name, batch, layer, f"{milliseconds:.3g}", f"{ratio:.2f}")
    ratio = times["neurocoder"] / times["linear"]
    return [Target(f"step of {row.name}, Neurocoder", ratio, row.most, at_least=False)]


def recipe_of(row: Row, layer: str) -> Recipe:
    """The recipe of a row's task with another layer."""
    variant = row.variant if layer == "neurocoder" else "base"
    (plan,) = plans({"layer": [layer], "variant": [variant]}, row.config)
    return plan.recipe


if __name__ == "__main__":
    main()
