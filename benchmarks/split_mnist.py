"""What continual learning costs: a training step beside the plain MLP's, and whole runs.

python benchmarks/split_mnist.py                   # steps, one thread, half a minute
python benchmarks/split_mnist.py --runs            # also a whole run of every method: half an hour
python benchmarks/split_mnist.py --runs ewc --only nsm paper
python benchmarks/split_mnist.py --fisher          # also Fisher information: a minute
python benchmarks/split_mnist.py --check           # exit status 1 if a target is missed

Images are random numbers in the sizes of MNIST's: what they show does not change the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from common import Target, machine, medians, print_header, print_row, print_targets

from ncrl.tasks.command import keep_freed_memory
from ncrl.tasks.continual.methods import METHODS, OnlineEwc
from ncrl.tasks.continual.split import SplitLearning, Task
from ncrl.tasks.split_mnist.experiment import plan
from ncrl.tasks.split_mnist.tables import COLUMNS, Cell, Column
from ncrl.tasks.training import Run, train

TASK_SIZES = (12665, 12089, 11263, 12183, 11800)
"""Training images of the five tasks of MNIST; each has about 2,000 test images."""

FISHER_IMAGES = 2048

MOST_RATIO = 2.0
"""Of a step of the coded MLP without residual to the plain MLP's."""

MOST_SECONDS = 60.0
"""For a whole run of any method."""

PLAIN = Column("linear")
WANTED = (Column("neurocoder"), Column("neurocoder", "official"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of all steps together")
    parser.add_argument(
        "--runs",
        nargs="*",
        choices=list(METHODS),
        help="whole runs as well, of all methods or these",
    )
    parser.add_argument("--fisher", action="store_true", help="Fisher information as well")
    names = [column.name for column in COLUMNS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="columns")
    parser.add_argument("--epochs", type=int, help="of the runs, in place of the recipe's 4")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images, for runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command does
    print(f"{machine()}, {arguments.threads} thread(s)\n")
    tasks = [random_task(max(2, int(arguments.scale * size))) for size in TASK_SIZES]
    targets = measure_steps(tasks, arguments.seconds)
    chosen = [column for column in COLUMNS if column.name in arguments.only]
    if arguments.fisher:
        measure_fisher(tasks, chosen)
    if arguments.runs is not None:
        flags = {} if arguments.epochs is None else {"epochs": arguments.epochs}
        targets += measure_runs(tasks, chosen, arguments.runs or list(METHODS), flags)
    print()
    print_targets(targets)
    if arguments.check and any(target.failed for target in targets):
        sys.exit(1)


def random_task(size: int) -> Task:
    """As many images as a task of MNIST has, and a sixth for testing."""
    count = max(1, size // 6)
    images, test_images = torch.randn(size, 1024), torch.randn(count, 1024)
    return Task(images, torch.randint(2, (size,)), test_images, torch.randint(2, (count,)))


def measure_steps(tasks: list[Task], seconds: float) -> list[Target]:
    """Print milliseconds of a training step of every column, and its ratio to the MLP's."""
    steps = {column: training_step(tasks, column) for column in COLUMNS}
    times = dict(zip(steps, medians(seconds, *steps.values()), strict=True))
    print_header("training step", "ms", "beside the MLP")
    for column, milliseconds in times.items():
        print_row(column.name, f"{milliseconds:.2f}", f"{milliseconds / times[PLAIN]:.2f}")
    return [
        Target(f"step of {column.name}", times[column] / times[PLAIN], MOST_RATIO, at_least=False)
        for column in WANTED
    ]


def training_step(tasks: list[Task], column: Column) -> Callable[[], None]:
    """What one update of a run of the first task takes, without method."""
    run = experiment(tasks, Cell("domain", "adam", column), {})
    coef = run.recipe.orth_coef
    optimizer = torch.optim.Adam(run.model.parameters(), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss = run.loss(0)
        if coef and column.layer == "neurocoder":
            loss = loss + run.orthogonality()
        loss.backward()
        optimizer.step()
        run.after_update(0)

    return step


def measure_fisher(tasks: list[Task], columns: Sequence[Column]) -> None:
    """Print the seconds that the Fisher information of some images takes."""
    images = tasks[0].images[:FISHER_IMAGES]
    print()
    print_header(f"Fisher information of {len(images):,} images", "s")
    for column in columns:
        run = experiment(tasks, Cell("domain", "online-ewc", column), {})
        assert isinstance(run.method, OnlineEwc)
        information = partial(run.method.fisher, images, run._sample_losses[0])
        (milliseconds,) = medians(0, information)
        print_row(column.name, f"{milliseconds / 1000:.2f}")


def measure_runs(
    tasks: list[Task], columns: Sequence[Column], methods: Sequence[str], flags: Mapping[str, int]
) -> list[Target]:
    """Print the seconds of whole runs, with their evaluations and Fisher information."""
    print()
    print_header("whole run, s", *methods)
    targets = []
    for column in columns:
        seconds = {method: whole_run(tasks, column, method, flags) for method in methods}
        print_row(column.name, *(f"{s:.1f}" for s in seconds.values()))
        slowest = max(seconds, key=lambda method: seconds[method])
        name = f"run of {column.name}, slowest method ({slowest})"
        targets.append(Target(name, seconds[slowest], MOST_SECONDS, at_least=False, unit="s"))
    return targets


def whole_run(tasks: list[Task], column: Column, method: str, flags: Mapping[str, int]) -> float:
    """Seconds."""
    run = experiment(tasks, Cell("domain", method, column), flags)
    with tempfile.TemporaryDirectory() as folder:
        where = Run("split_mnist", column.name, run.recipe, 0, torch.device("cpu"), Path(folder))
        return train(where, run).seconds


def experiment(tasks: list[Task], cell: Cell, flags: Mapping[str, int]) -> SplitLearning:
    """What a cell of the tables trains."""
    recipe = plan(cell, flags).recipe
    torch.manual_seed(0)
    return SplitLearning(recipe, tasks, "random", 0)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
