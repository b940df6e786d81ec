"""What a growing memory does on split MNIST, domain scenario, beside its controls.

python benchmarks/growing_memory.py --data-dir ~/data --seeds 0 1 2 3 4
python benchmarks/growing_memory.py --data-dir ~/data --only grow routed --images 100

A finished run is not repeated. `python benchmarks/results.py pack LOGDIR` keeps the rows.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from ncrl.shell.lock import locked
from ncrl.tasks.command import in_one_line
from ncrl.tasks.continual.methods import Grow, Method
from ncrl.tasks.continual.split import SplitLearning, Task, prepare, split_tasks
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.models.mlp import SplitMlp
from ncrl.tasks.recipes import CONFIGS, ContinualRecipe, read_recipes
from ncrl.tasks.training import Run, train

REPLAYED = 200
"""Images that the control with replay keeps of all tasks together."""

RECIPES = read_recipes(CONFIGS / "split_mnist.yaml")

NUM_CHANGES = 10
"""Tasks of all digits, each changed in its own way."""

STEP = 15.0
"""Degrees by which each of ten tasks of all digits is turned further than the one before."""

RETURNED, TIMES = 100, 60
"""Images of the first two tasks when they come back, and how often each is in an epoch."""

FEW_UPDATES = 188
"""Of each task at least, however few its images: half as many as all of its images give."""


class Returning(SplitLearning):
    """Tasks of which the last two are the first two again."""

    def evaluate(self) -> dict[str, float]:
        """As usual, and accuracy right before the two tasks come back and after the last update: of
        the two, and of all others."""
        before, after = self.accuracy[-3], self.accuracy[-1]
        returned = {"before": float(before[:2].mean()), "after": float(after[:2].mean())}
        others = {"others_before": float(before[2:-2].mean()), "others": float(after[2:-2].mean())}
        return {**super().evaluate(), **returned, **others}


class OneMemory(Grow):
    """All slots from the start, all trained on every task, their keys pulled to whichever it is."""

    def begin_task(self, inputs: Tensor, optimizer: Optimizer | None) -> None:
        if not self.num_tasks:
            super().begin_task(inputs, optimizer)


class Routed(SplitMlp):
    """A network of rank 10 for each task; an input gets that of the nearest of 100 keys a task.

    Queries are those of `grow`: five random projections, 128 wide, which vote here.
    """

    projection: Tensor
    center: Tensor

    def __init__(self, num_tasks: int, num_outputs: int) -> None:
        super().__init__(1024, [1], 2)  # not used
        self.networks = torch.nn.ModuleList(
            SplitMlp(1024, [400, 400], num_outputs, hidden_rank=10) for _ in range(num_tasks)
        )
        self.register_buffer("projection", torch.randn(1024, 5, 128) / 32)
        self.register_buffer("center", torch.zeros(1024))
        keys = torch.zeros(num_tasks, 5, 100, 128)
        self.keys = torch.nn.Parameter(keys, requires_grad=False)
        self.task = -1

    def queries(self, x: Tensor) -> Tensor:
        """[B, 1024] -> [5, B, 128]."""
        projected = torch.einsum("bi,ihk->hbk", x - self.center, self.projection)
        return F.normalize(projected, dim=2)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        if self.training:
            return self.networks[self.task](x)
        known = self.keys[: self.task + 1]
        nearness = (self.queries(x) @ known.mT).amax(3).mean(1)  # [T, B]
        outputs = torch.stack([network(x) for network in self.networks[: len(known)]])
        return outputs[nearness.argmax(0), torch.arange(len(x))]


class Route(Method):
    """Finds the keys of a task by ten rounds of k-means, as the pull of `grow` does on its way."""

    model: Routed

    @torch.no_grad()
    def begin_task(self, inputs: Tensor, optimizer: Optimizer | None) -> None:
        model = self.model
        if model.task < 0:
            model.center.copy_(inputs.mean(0))
        model.task += 1
        queries = model.queries(inputs)
        keys = queries[:, torch.randperm(len(inputs))[:100]].clone()
        for _ in range(10):
            nearest = (queries @ keys.mT).argmax(2)  # [5, N]
            sums = torch.zeros_like(keys)
            sums.scatter_add_(1, nearest[..., None].expand_as(queries), queries)
            keys = torch.where(sums.any(2, keepdim=True), F.normalize(sums, dim=2), keys)
        model.keys[model.task, :, : keys.shape[1]] = keys

    def state(self) -> dict[str, Any]:
        return {"task": self.model.task}

    def restore(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        self.model.task = state["task"]


def fewer(tasks: list[Task], count: int) -> list[Task]:
    """The first images of each."""
    return [t._replace(images=t.images[:count], labels=t.labels[:count]) for t in tasks]


def repeated(task: Task, times: int) -> Task:
    """The task with its training images several times."""
    return task._replace(images=task.images.repeat(times, 1), labels=task.labels.repeat(times))


def with_replay(tasks: list[Task]) -> list[Task]:
    """Each task with as many images of earlier tasks as of its own, all out of `REPLAYED`."""
    mixed = tasks[:1]
    for number, task in enumerate(tasks[1:], start=1):
        (kept,) = at_once(fewer(tasks[:number], REPLAYED // number))
        kept = repeated(kept, -(-len(task.images) // len(kept.images)))
        (both,) = at_once([task, kept])
        mixed.append(task._replace(images=both.images, labels=both.labels))
    return mixed


def returning(tasks: list[Task]) -> list[Task]:
    """All tasks, and then few images of the first two."""
    return [*tasks, *(repeated(few, TIMES) for few in fewer(tasks[:2], RETURNED))]


def ten_tasks(data: Images, change: Callable[[Tensor, int], Tensor]) -> list[Task]:
    """Tasks of all digits, each time other images, changed by the task's number."""
    tasks = []
    for number in range(NUM_CHANGES):
        parts: list[Tensor] = []
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        ):
            first, behind = (n * len(images) // NUM_CHANGES for n in (number, number + 1))
            parts += [prepare(change(images[first:behind], number)), labels[first:behind]]
        tasks.append(Task(*parts))
    return tasks


def turned(images: Tensor, number: int) -> Tensor:
    """Images [N, 1, side, side] turned by as many steps."""
    angle = math.radians(STEP * number)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def permuted(images: Tensor, number: int) -> Tensor:
    """Images [N, 1, side, side] with their pixels in an order that belongs to the number."""
    order = torch.randperm(images[0].numel(), generator=torch.Generator().manual_seed(number))
    return images.flatten(1)[:, order].view_as(images)


def at_once(tasks: list[Task]) -> list[Task]:
    """One task of all."""
    return [Task(*(torch.cat(parts) for parts in zip(*tasks, strict=True)))]


def changed(variant: str, num_outputs: int, **changes: Any) -> ContinualRecipe:
    """A variant of split MNIST's recipe with other outputs and settings."""
    recipe = RECIPES[variant]
    assert isinstance(recipe, ContinualRecipe)
    options = {**recipe.network_options, "num_outputs": num_outputs}
    return replace(recipe, network_options=options, **changes)


def grow(num_slots: int = 100, num_outputs: int = 2, **changes: Any) -> ContinualRecipe:
    """The recipe of `grow` with another number of slots."""
    options = {**RECIPES["grow"].layer_options, "num_slots": num_slots}
    return changed("grow", num_outputs, layer_options=options, **changes)


def plain(num_outputs: int = 2) -> ContinualRecipe:
    """The MLP's recipe."""
    return changed("linear_400", num_outputs, method="adam")


class Study(NamedTuple):
    """What one of the runs learns, and how."""

    recipe: ContinualRecipe
    method: type[Method] | None = None  # in place of the recipe's; `Route` brings its network
    arrange: Callable[[list[Task]], list[Task]] = list  # what is done to the tasks
    change: Callable[[Tensor, int], Tensor] | None = None  # of ten tasks; None: tasks of two digits


CHANGES = {"turned": turned, "permuted": permuted}

RUNS: dict[str, Study] = {
    "grow": Study(grow()),
    **{f"grow, {size} slots": Study(grow(size)) for size in (5, 20, 50)},
    "grow, no pull": Study(grow(penalty_coef=0.0)),
    "one memory, 100 slots": Study(grow(100), OneMemory),
    "routed": Study(plain(), Route),
    "mlp, replay": Study(plain(), arrange=with_replay),
    "mlp, all at once": Study(plain(), arrange=at_once),
    "grow, 20 slots, returning": Study(grow(20), arrange=returning),
    "routed, returning": Study(plain(), Route, returning),
    **{
        f"{run}, {said}": Study(recipe, method, change=change)
        for said, change in CHANGES.items()
        for run, recipe, method in (
            ("grow, 20 slots", grow(20, 10), None),
            ("routed", plain(10), Route),
            ("one memory, 40 slots", grow(40, 10), OneMemory),
            ("one memory, 200 slots", grow(200, 10), OneMemory),  # as `grow` has in the end
        )
    },
}


def tasks_of(study: Study, data: Images, count: int | None = None) -> list[Task]:
    """The tasks of a run, with the first `count` images of each."""
    tasks = split_tasks(data) if study.change is None else ten_tasks(data, study.change)
    return study.arrange(tasks if count is None else fewer(tasks, count))


def make(name: str, study: Study, tasks: list[Task], seed: int) -> SplitLearning:
    """The experiment of a run, its weights from the seed."""
    torch.manual_seed(seed)
    kind = Returning if study.arrange is returning else SplitLearning
    experiment = kind(study.recipe, tasks, "MNIST", seed, {"run": name})
    if study.method is Route:
        experiment.model = Routed(len(tasks), experiment.num_classes)
    if study.method is not None:
        experiment.method = study.method(experiment.model, 1.0)
        experiment.method.begin_task(tasks[0].images, None)
    return experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--logdir", default="runs", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--images", type=int, help="of each task, in place of all")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    data = load_mnist(flags.data_dir)
    for seed in flags.seeds:
        for name in flags.only:
            study, title = RUNS[name], name
            if flags.images:
                title += f", {flags.images} images"
                updates = -(-flags.images // study.recipe.batch_size)
                recipe = replace(study.recipe, epochs=-(-FEW_UPDATES // updates))
                study = study._replace(recipe=recipe)
            folder = flags.logdir / "growing_memory" / title.replace(", ", "-") / f"seed-{seed}"
            run = Run("growing_memory", title, study.recipe, seed, torch.device("cpu"), folder)
            with locked(folder, wait=True):
                row = run.result
                if row is None:
                    tasks = tasks_of(study, data, flags.images)
                    row = train(run, make(name, study, tasks, seed))
            print(row.line(), flush=True)


if __name__ == "__main__":
    sys.exit(in_one_line("growing_memory.py", main))
