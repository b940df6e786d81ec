"""The controls of the growing memory do what their names say."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import growing_memory as study

from ncrl.tasks.continual.split import Task, prepare
from ncrl.tasks.data import Images
from ncrl.tasks.training import make_optimizer
from tests.ncrl.tasks.continual.test_split import assert_goes_on_exactly


def tasks(count: int = 3, images: int = 250) -> list[Task]:
    """Images of task t have t everywhere, but for some noise."""
    torch.manual_seed(0)
    made = []
    for number in range(count):
        pixels = number + 0.1 * torch.randn(images, 1024)
        labels = torch.full((images,), number % 2)
        made.append(Task(pixels, labels, pixels[:20], labels[:20]))
    return made


def test_replay_is_half_of_the_images_and_of_earlier_tasks_alone() -> None:
    for number, task in enumerate(study.with_replay(tasks())):
        owners = task.images.mean(1).round().long()
        own = owners == number
        assert own.sum() == 250
        if number:
            assert abs(int((~own).sum()) - 250) < 200 and owners.max() == number
            distinct = task.images[~own].unique(dim=0)
            assert len(distinct) == study.REPLAYED // number * number


def test_an_image_gets_the_network_of_its_task() -> None:
    given = tasks()
    experiment = study.make("routed", study.RUNS["routed"], given, 0)
    model = experiment.model
    assert isinstance(model, study.Routed)
    for task in given[1:]:
        experiment.method.begin_task(task.images, None)
    model.eval()
    with torch.no_grad():
        for number in (1, 2):  # the mean of the first is subtracted, which leaves it noise alone
            images = given[number].test_images
            assert torch.equal(model(images), model.networks[number](images))
    optimizer = make_optimizer(study.plain(), model)
    assert not any(p is model.keys for group in optimizer.param_groups for p in group["params"])


def test_a_routed_run_that_was_killed_goes_on_with_the_network_of_its_task(tmp_path: Path) -> None:
    recipe = replace(study.plain(), epochs=1)
    routed = study.Study(recipe, study.Route)
    given = [t._replace(labels=(t.images[:, 0] > t.images[:, 1]).long()) for t in tasks()]
    # Two updates for each of three tasks.
    assert_goes_on_exactly(lambda: study.make("routed", routed, given, 0), recipe, tmp_path, 3)


def test_one_memory_does_not_grow() -> None:
    one = study.Study(study.grow(20), study.OneMemory)
    experiment = study.make("one memory, 20 slots", one, tasks(), 0)
    before = [p.clone() for p in experiment.model.parameters()]
    experiment.method.begin_task(tasks()[1].images, None)
    after = list(experiment.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_memory_that_does_not_grow_is_offered_in_the_size_of_the_one_that_has_grown() -> None:
    for change in study.CHANGES:
        grown = study.RUNS[f"grow, 20 slots, {change}"]
        slots = 20 * study.NUM_CHANGES
        one = study.RUNS[f"one memory, {slots} slots, {change}"]
        options = {**grown.recipe.layer_options, "num_slots": slots}
        assert one.recipe == replace(grown.recipe, layer_options=options)
        assert one.method is study.OneMemory and one.change is grown.change


def ten_digits() -> Images:
    pixels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(40)
    return Images("x", "x", pixels, labels, pixels[:20], labels[:20], 40)


def test_turned_tasks_share_no_image_and_the_first_is_upright(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(study, "STEP", 90.0)
    data = ten_digits()
    first, second, *_ = study.tasks_of(study.RUNS["routed, turned"], data)
    assert torch.equal(first.labels, data.train_labels[:4])
    assert torch.equal(second.labels, data.train_labels[4:8])
    assert torch.equal(second.test_labels, data.test_labels[2:4])
    upright, quarter = data.train_images[:4], data.train_images[4:8].rot90(1, (2, 3))
    torch.testing.assert_close(first.images, prepare(upright), atol=1e-4, rtol=0)
    torch.testing.assert_close(second.images, prepare(quarter), atol=1e-3, rtol=0)


def test_permuted_tasks_have_one_order_of_pixels_each() -> None:
    data = ten_digits()
    tasks = study.tasks_of(study.RUNS["routed, permuted"], data)
    again = study.tasks_of(study.RUNS["routed, permuted"], data)
    orders = set()
    for number, (task, same) in enumerate(zip(tasks, again, strict=True)):
        assert torch.equal(task.images, same.images)
        assert torch.equal(task.test_labels, data.test_labels[2 * number : 2 * number + 2])
        originals = data.train_images[4 * number : 4 * number + 4].flatten(1)
        shown = task.images.view(-1, 32, 32)[:, 2:-2, 2:-2].flatten(1)
        values = prepare(originals.view(-1, 1, 28, 28)).view(-1, 32, 32)[:, 2:-2, 2:-2].flatten(1)
        # Four images tell nearly all pixels apart.
        where = {tuple(column): i for i, column in enumerate(values.T.tolist())}
        orders.add(tuple(where[tuple(column)] for column in shown.T.tolist()))
    assert len(orders) == 10
    assert all(len(set(order)) > 780 for order in orders)


def test_few_images_are_taken_before_tasks_are_arranged() -> None:
    data = ten_digits()._replace(train_labels=torch.arange(40) % 10, num_classes=10)
    data = data._replace(test_labels=data.train_labels[:20])
    few = study.tasks_of(study.RUNS["routed"], data, 3)
    assert [len(task.images) for task in few] == [3] * 5
    returned = study.tasks_of(study.RUNS["routed, returning"], data, 3)
    assert [len(task.images) for task in returned] == [3] * 5 + [3 * study.TIMES] * 2


def test_two_tasks_come_back_with_few_images_and_are_measured_before_and_after() -> None:
    given = study.returning(tasks())
    assert [len(task.images) for task in given] == [250, 250, 250, 6000, 6000]
    assert torch.equal(given[4].images[-100:], given[1].images[:100])
    assert torch.equal(given[4].labels[-100:], given[1].labels[:100])
    assert len(given[4].images.unique(dim=0)) == 100
    experiment = study.make("routed, returning", study.RUNS["routed, returning"], given, 0)
    accuracy = torch.full((5, 5), torch.nan, dtype=torch.float64)
    accuracy[2] = torch.tensor([90, 80, 70, 90, 80])  # the last before they come back
    accuracy[4] = torch.tensor([60, 50, 65, 60, 50])
    experiment.accuracy = accuracy
    found = experiment.evaluate()
    assert (found["before"], found["after"]) == (85, 55)
    assert (found["others_before"], found["others"]) == (70, 65)
