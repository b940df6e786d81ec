"""The controls of the growing memory do what their names say."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import growing_memory as study

from ncrl.tasks.continual.split import Task
from ncrl.tasks.training import make_optimizer


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
    experiment = study.make("routed", study.plain(), given, 0)
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


def test_one_memory_does_not_grow() -> None:
    experiment = study.make("one memory, 100 slots", study.grow(20), tasks(), 0)
    before = [p.clone() for p in experiment.model.parameters()]
    experiment.method.begin_task(tasks()[1].images, None)
    after = list(experiment.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
