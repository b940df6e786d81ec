"""The protocol: tasks, order of the images, what happens at a task's end, resuming."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl import orthogonal_loss
from ncrl.tasks import training
from ncrl.tasks.continual.methods import OnlineEwc
from ncrl.tasks.continual.split import (
    SplitLearning,
    Task,
    prepare,
    split_tasks,
)
from ncrl.tasks.data import Images, load_digits
from ncrl.tasks.recipes import ContinualRecipe, Recipe
from ncrl.tasks.results import Result
from ncrl.tasks.training import CHECKPOINT_FILE, Run, train
from tests.ncrl.tasks.continual.test_gradients import NEUROCODER

NUMBERS = (21, 13, 8)
"""Training images of three small tasks, in batches of 5."""


def small_tasks() -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for count in NUMBERS:
        images = torch.randn(count + 4, 6, generator=generator)
        labels = (images[:, 0] > 0).long()
        tasks.append(Task(images[:-4], labels[:-4], images[-4:], labels[-4:]))
    return tasks


def recipe(scenario: str = "domain", **changes: Any) -> ContinualRecipe:
    heads = 1 if scenario == "domain" else len(NUMBERS)
    base = ContinualRecipe(
        task="split_mnist",
        network="split_mlp",
        network_options={
            "in_features": 6,
            "hidden": [5],
            "num_outputs": 2,
            "num_tasks": heads,
        },
        scenario=scenario,
        epochs=2,
        batch_size=5,
    )
    return replace(base, **changes)


def make(changed: ContinualRecipe, seed: int = 0) -> SplitLearning:
    torch.manual_seed(seed)
    return SplitLearning(changed, small_tasks(), "generated", seed)


def run(experiment: SplitLearning, folder: Path, seed: int = 0) -> Any:
    folder.mkdir(exist_ok=True)
    return train(
        Run("split_mnist", "x", experiment.recipe, seed, torch.device("cpu"), folder), experiment
    )


def test_tasks_are_pairs_of_classes_padded_and_normalised() -> None:
    data = load_digits(28)
    tasks = split_tasks(data)
    assert len(tasks) == 5
    for index, task in enumerate(tasks):
        wanted = [
            (image, int(label) - 2 * index)
            for image, label in zip(data.train_images, data.train_labels, strict=True)
            if int(label) in (2 * index, 2 * index + 1)
        ]
        assert task.labels.tolist() == [label for _, label in wanted]
        assert len(task.images) == len(wanted) and task.images.shape[1] == 1024
        image = task.images[3].view(32, 32)
        torch.testing.assert_close(image[2:-2, 2:-2], (wanted[3][0][0] / 255 - 0.1) / 0.2752)
        assert image[:2].unique().tolist() == pytest.approx([-0.1 / 0.2752])
    assert sum(len(task.test_images) for task in tasks) == len(data.test_images)


def test_images_of_other_shapes_are_refused() -> None:
    image, label = torch.zeros(4, 3, 28, 28, dtype=torch.uint8), torch.arange(4)
    colour = Images("colour", "", image, label, image, label, 4)
    with pytest.raises(ValueError, match=r"grey square images .* got 3x28x28"):
        split_tasks(colour)
    grey = colour._replace(train_images=image[:, :1], test_images=image[:, :1], num_classes=6)
    with pytest.raises(ValueError, match="no images of class 4"):
        split_tasks(grey)
    assert prepare(image[:, :1]).shape == (4, 1024)


def test_every_epoch_shows_every_image_of_its_task_once() -> None:
    experiment = make(recipe())
    tasks = small_tasks()
    seen: list[tuple[int, Tensor]] = []
    for update in range(experiment.num_updates):
        task, images, labels = experiment.batch(update)
        seen.append((task, images))
        assert torch.equal(labels, (images[:, 0] > 0).long())
    begin = 0
    orders = []
    for index, count in enumerate(NUMBERS):
        batches = -(-count // 5)
        for _epoch in range(2):
            part = seen[begin : begin + batches]
            begin += batches
            assert {task for task, _ in part} == {index}
            images = torch.cat([images for _, images in part])
            orders.append(images)
            expected = tasks[index].images
            assert torch.equal(images[images[:, 1].argsort()], expected[expected[:, 1].argsort()])
    assert begin == len(seen)
    assert not torch.equal(orders[0], orders[1])
    # A batch follows from seed and update alone.
    again = make(recipe())
    assert torch.equal(again.batch(9)[1], seen[9][1])
    assert not torch.equal(make(recipe(), seed=1).batch(9)[1], seen[9][1])


OPTIMIZERS: dict[str, Any] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adagrad": partial(torch.optim.Adagrad, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, momentum=0.9),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_accuracy_is_measured_after_every_task_on_all(
    scenario: str, kind: str, tmp_path: Path
) -> None:
    """Beside training written out."""
    changed = recipe(scenario, optimizer=kind, momentum=0.9)
    experiment, other = make(changed), make(changed)
    model, tasks = other.model, small_tasks()
    optimizer = OPTIMIZERS[kind](model.parameters(), 1e-3)
    expected = []
    for update in range(other.num_updates):
        task, images, labels = other.batch(update)
        optimizer.zero_grad(set_to_none=False)
        head = task if scenario == "task" else 0
        F.cross_entropy(model(images, head), labels).backward()
        optimizer.step()
        if update + 1 in other.ends:
            row = []
            for tested, each in enumerate(tasks):
                head = tested if scenario == "task" else 0
                right = model(each.test_images, head).argmax(1) == each.test_labels
                row.append(100 * right.double().mean().item())
            expected.append(row)
    result = run(experiment, tmp_path)
    assert result.details["accuracy"] == expected
    assert result.metrics["accuracy"] == pytest.approx(sum(expected[-1]) / 3)
    for ours, theirs in zip(experiment.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_information_is_measured_at_the_end_of_all_tasks_but_the_last() -> None:
    experiment = make(recipe("task", method="online-ewc", penalty_coef=10.0))
    seen = []
    end_task = experiment.method.end_task

    def record(inputs: Tensor, sample_loss: Any) -> None:
        seen.append((update, len(inputs)))
        end_task(inputs, sample_loss)

    experiment.method.end_task = record  # type: ignore[method-assign]
    for update in range(experiment.num_updates):
        experiment.after_update(update)
    assert seen == [(9, 21), (15, 13)]
    method = experiment.method
    assert isinstance(method, OnlineEwc)
    assert method.importance["heads.1.weight"].any()
    assert not method.importance["heads.2.weight"].any()


def coded(**changes: Any) -> ContinualRecipe:
    return recipe(
        layer="neurocoder",
        layer_options={**NEUROCODER, "preset": "official", "residual": False},
        orth_coef=0.5,
        penalty_coef=10.0,
        **changes,
    )


def test_orth_coef_doubles_after_the_first_task_of_a_penalty() -> None:
    for method, extra in (("ewc", 0.5), ("adam", 0.0)):
        experiment = make(coded(method=method, double_orth_coef=True))
        first, later = 0, experiment.ends[0]
        for update, added in ((first, 0.0), (later, extra)):
            _, images, labels = experiment.batch(update)
            plain = F.cross_entropy(experiment.model(images), labels)
            expected = plain + added * orthogonal_loss(experiment.model)
            torch.testing.assert_close(experiment.loss(update), expected)


def test_fisher_information_with_and_without_orthogonality() -> None:
    found = []
    for quirk in (False, True):
        experiment = make(coded(method="online-ewc", fisher_orthogonality=quirk))
        experiment.after_update(experiment.ends[0] - 1)
        assert isinstance(experiment.method, OnlineEwc)
        found.append(experiment.method.importance["hidden.0.memory.key_columns.u"])
    # The first key columns of the authors' mode `cb` meet nothing but the orthogonality loss.
    assert not found[0].any()
    assert found[1].any()


def test_fisher_information_of_a_network_without_a_memory_has_no_orthogonality() -> None:
    found = []
    for quirk in (False, True):
        experiment = make(recipe(method="online-ewc", orth_coef=0.5, fisher_orthogonality=quirk))
        experiment.after_update(experiment.ends[0] - 1)
        assert isinstance(experiment.method, OnlineEwc)
        found.append(experiment.method.importance["hidden.0.weight"])
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("method", ["si", "ewc", "l2"])
def test_a_stopped_run_ends_as_if_it_had_not_been(method: str, tmp_path: Path) -> None:
    changed = recipe("task", method=method, penalty_coef=10.0)
    assert_goes_on_exactly(lambda: make(changed), changed, tmp_path, 12)


def assert_goes_on_exactly(
    make: Callable[[], Any], recipe: Recipe, folder: Path, update: int
) -> Result:
    """A run that is killed after an update, and then goes on, ends as one that was not killed."""
    ended = []
    for is_killed in (False, True):
        run = Run("x", "x", recipe, 0, torch.device("cpu"), folder / f"killed={is_killed}")
        run.folder.mkdir()
        if is_killed:
            with pytest.raises(KeyboardInterrupt):
                train(run, killed_after(make(), update))
            assert (run.folder / CHECKPOINT_FILE).is_file()
        experiment = make()
        ended.append((train(run, experiment), experiment.model.state_dict()))
    (expected, weights), (found, weights_found) = ended
    assert found.metrics == expected.metrics and found.details == expected.details
    assert weights.keys() == weights_found.keys()
    assert all(torch.equal(weights_found[name], tensor) for name, tensor in weights.items())
    return expected


def killed_after(experiment: Any, update: int) -> Any:
    """The experiment, whose training writes a checkpoint after an update, and is killed two updates
    later."""
    loss, seconds = experiment.loss, training.CHECKPOINT_SECONDS

    def killed(number: int) -> Tensor:
        training.CHECKPOINT_SECONDS = 0.0 if number == update - 1 else seconds
        if number == update + 2:
            raise KeyboardInterrupt
        return loss(number)

    experiment.loss = killed
    return experiment


def test_recipes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs network split_mlp with num_tasks=3"):
        make(replace(recipe("task"), network_options=recipe("domain").network_options))
    with pytest.raises(ValueError, match="scenario must be one of domain, task"):
        recipe("class")
