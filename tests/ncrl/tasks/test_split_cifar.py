"""Split CIFAR: tasks, what is recorded, the command on digits and on CIFAR-100's layout."""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncrl.tasks.command import NamedRecipe
from ncrl.tasks.continual.split import Task, class_tasks
from ncrl.tasks.data import Images
from ncrl.tasks.experiment import mutual_information
from ncrl.tasks.models import SplitMlp
from ncrl.tasks.recipes import CONFIGS, ContinualRecipe, read_recipes
from ncrl.tasks.results import Result, read_results
from ncrl.tasks.split_cifar import features
from ncrl.tasks.split_cifar.experiment import CONFIG, classifier_recipe, main
from ncrl.tasks.split_cifar.features import (
    SLOT_STEPS,
    SplitFeatures,
    hidden_attention,
    watched_updates,
)
from ncrl.tasks.training import Run, train
from tests.ncrl.tasks.continual.test_split import assert_goes_on_exactly
from tests.ncrl.tasks.refusals import assert_refused

SMALL_LAYER = {"num_slots": 6, "num_heads": 2, "key_dim": 2, "num_least_used": 2}
SMALL = [
    *("--network-options", "hidden=[8, 8, 8]", "--epochs", "1", "--device", "cpu"),
    *("--backbone-epochs", "0", "--image-side", "32"),
]
SMALL_CODED = ["--layer-options", *(f"{name}={value}" for name, value in SMALL_LAYER.items())]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: features of the digits are the same for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def embedded_digits(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("NCRL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


# Tasks and measures


def numbers(classes: int = 4, each: int = 6) -> Images:
    """Features that are the index of the image."""
    count = classes * each
    x = torch.arange(2 * count, dtype=torch.float32)[:, None]
    labels = torch.arange(2 * count) % classes
    return Images("numbers", "", x[:count], labels[:count], x[count:], labels[count:], classes)


def test_tasks_are_consecutive_classes() -> None:
    data = numbers()
    tasks = class_tasks(data, 2)
    assert len(tasks) == 2
    for number, task in enumerate(tasks):
        for x, labels in ((task.images, task.labels), (task.test_images, task.test_labels)):
            assert len(x) == 12 and set(labels.tolist()) == {0, 1}
            for index, label in zip(x[:, 0].long().tolist(), labels.tolist(), strict=True):
                assert index % 4 == 2 * number + label
    lacking = data._replace(train_labels=data.train_labels.clamp_max(2))
    with pytest.raises(ValueError, match="numbers has no images of class 3"):
        class_tasks(lacking, 2)


@pytest.mark.parametrize("ends", [[316, 632, 948], [3, 10], [100, 199, 450]])
def test_every_task_is_looked_at_evenly(ends: list[int]) -> None:
    watched = watched_updates(ends)
    for task, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        own = {update: step for update, (of, step) in watched.items() if of == task}
        assert list(own.values()) == list(range(min(SLOT_STEPS, end - begin)))
        updates = list(own)
        assert updates == sorted(updates) and begin <= updates[0] and updates[-1] == end - 1
        gaps = {after - before for before, after in pairwise(updates)}
        assert max(gaps) - min(gaps) <= 1


# What is trained


def small_recipe(**changes: Any) -> ContinualRecipe:
    values = {
        "task": "split_cifar",
        "network": "split_mlp",
        "network_options": {"in_features": 5, "hidden": [6, 6], "num_outputs": 3, "num_tasks": 3},
        "layer": "neurocoder",
        "layer_options": SMALL_LAYER,
        "batch_size": 4,
        "epochs": 2,
        "orth_coef": 0.1,
        "scenario": "task",
        "method": "si",
        "penalty_coef": 10.0,
    }
    return ContinualRecipe(**{**values, **changes})


def small_tasks() -> list[Task]:
    stream = torch.Generator().manual_seed(11)
    tasks = []
    for count in (9, 12, 7):
        parts: list[torch.Tensor] = []
        for size in (count, 15):
            parts += [torch.randn(size, 5, generator=stream)]
            parts += [torch.randint(3, (size,), generator=stream)]
        tasks.append(Task(*parts))
    return tasks


def make(recipe: ContinualRecipe, kind: type[SplitFeatures] = SplitFeatures) -> SplitFeatures:
    torch.manual_seed(1)
    return kind(recipe, small_tasks(), "made up", 1, {"backbone": "none"})


def run(experiment: SplitFeatures, folder: Path) -> Result:
    folder.mkdir(exist_ok=True)
    recipe = experiment.recipe
    return train(Run("split_cifar", "small", recipe, 1, torch.device("cpu"), folder), experiment)


class Watching(SplitFeatures):
    """Notes by a slow reading what the top slots are, at every update."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.notes: list[list[int]] = []

    def after_update(self, update: int) -> None:
        super().after_update(update)
        assert isinstance(self.model, SplitMlp)
        _, x, _ = self.batch(update)
        tops = []
        with torch.no_grad():
            for layer in self.model.hidden:
                attention: Any = layer.attend(x).u  # type: ignore[operator]
                weights = [
                    sum(float(attention[b, r, slot]) for b in range(len(x)) for r in range(2))
                    for slot in range(6)
                ]
                tops.append(max(range(6), key=weights.__getitem__))
                x = F.relu(layer(x))
        self.notes.append(tops)


def test_top_slots_are_those_of_the_training_steps(tmp_path: Path) -> None:
    torch.manual_seed(1)
    experiment = Watching(small_recipe(), small_tasks(), "made up", 1, {"backbone": "none"})
    row = run(experiment, tmp_path)
    slots = np.array(row.details["top_slots"])
    assert slots.shape == (3, SLOT_STEPS, 2)
    found = [slots[task, step].tolist() for task in range(3) for step in range(SLOT_STEPS)]
    # Tasks of 3, 3 and 2 batches, two epochs: every update is looked at.
    assert [tops for tops in found if tops != [-1, -1]] == experiment.notes
    assert len(experiment.notes) == 16 and row.details["watched"] == list(range(16))
    counts = torch.tensor(row.details["slot_counts"])
    assert counts.shape == (2, 3, 6) and (counts.sum(2) == 15).all()
    by_hand = sum(float(mutual_information(layer)) for layer in counts) / 2
    assert row.metrics["slot_information"] == pytest.approx(by_hand)
    matrix = np.array(row.details["accuracy"])
    assert row.details["seen"] == pytest.approx([matrix[k, : k + 1].mean() for k in range(3)])
    diagonal = np.diag(row.details["accuracy"])
    # Three classes: halfway between chance and 100 is 66.7.
    assert row.metrics["failed_tasks"] == (diagonal < 200 / 3).sum()


GROWING = {
    **{"num_slots": 3, "num_heads": 2, "key_dim": 4, "num_least_used": 0, "sharpness": 20.0},
    **{"controller": "projection", "residual": False, "bias": False},
}


def grown_recipe() -> ContinualRecipe:
    options = {**small_recipe().network_options, "context": True}
    changes = {"layer_options": GROWING, "network_options": options, "orth_coef": 0.0}
    return small_recipe(method="grow", penalty_coef=1.0, **changes)


def test_a_memory_that_grows_is_looked_at_before_it_has_slots_of_the_next_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def look(model: SplitMlp, x: torch.Tensor) -> list[torch.Tensor]:
        found = hidden_attention(model, x)
        sizes.append([weights.shape[1] for weights in found])
        return found

    monkeypatch.setattr(features, "hidden_attention", look)
    run(make(grown_recipe()), tmp_path)
    # Updates of tasks of 3, 3 and 2 batches, two epochs; what follows are looks at the end.
    assert sizes[:16] == [[3, 3]] * 6 + [[6, 6]] * 6 + [[9, 9]] * 4


def test_the_figure_of_slots_shows_all_that_have_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = run(make(grown_recipe()), tmp_path)
    figures: list[Any] = []
    monkeypatch.setattr(features, "save_figure", lambda figure, _path: figures.append(figure))
    features.draw_slots(tmp_path / "slots.png", [row])
    for axes in figures[0].axes:
        low, high = axes.get_ylim()
        assert low < 0 and high > 8


def test_attention_of_hidden_layers_is_the_mean_over_components() -> None:
    model = make(small_recipe()).model
    x = torch.randn(7, 5)
    first, second = hidden_attention(model, x)
    layers: Any = model.hidden
    for found, layer, given in (
        (first, layers[0], x),
        (second, layers[1], F.relu(layers[0](x))),
    ):
        components = layer.attend(given).u.unbind(1)
        assert len(components) == 2 and found.shape == (7, 6)
        torch.testing.assert_close(found, (components[0] + components[1]) / 2)
    plain = make(small_recipe(layer="linear", layer_options={}))
    assert hidden_attention(plain.model, x) == [] and not plain.watched


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe = small_recipe()
    assert_goes_on_exactly(lambda: make(recipe), recipe, tmp_path, 9)


# Recipes


def test_classifiers_have_the_heads_of_their_tasks() -> None:
    recipes = read_recipes(CONFIGS / CONFIG)
    for classes, tasks, outputs in ((10, 5, 2), (100, 20, 5)):
        base = NamedRecipe("linear", recipes["linear"], {"variant": "linear", "changes": ""})
        found = classifier_recipe(base, "si", {}, classes, 1000)
        options = found.recipe.network_options
        assert (options["num_tasks"], options["num_outputs"]) == (tasks, outputs)
        assert options["in_features"] == 1000 and tuple(options["hidden"]) == (500, 500, 500)
        assert found.name == f"{tasks}x{outputs} si linear"
        values = vars(found.recipe)
        assert (values["scenario"], values["method"]) == ("task", "si")
    adagrad = classifier_recipe(base, "adagrad", {}, 10, 8).recipe
    assert (adagrad.optimizer, adagrad.learning_rate) == ("adagrad", 1e-2)
    named = classifier_recipe(
        NamedRecipe("split_cifar", recipes[""]), "si", {"penalty_coef": 5.0}, 10, 8
    )
    assert named.name == "5x2 si printed penalty_coef=5"
    assert vars(named.recipe)["penalty_coef"] == 5
    plain = classifier_recipe(base, "adam", {"penalty_coef": 5.0}, 10, 8)  # which has no penalty
    assert plain == classifier_recipe(base, "adam", {}, 10, 8)
    static = classifier_recipe(
        NamedRecipe("split_cifar rank1", recipes["rank1"]), "adam", {}, 10, 8
    ).recipe
    assert static.network_options["hidden_rank"] == 1 and static.layer == "linear"


# The command


def test_rows_figures_and_runs_that_are_finished_already(tmp_path: Path, capsys: Any) -> None:
    figure = tmp_path / "figure.png"
    words = [
        *("--variant", "linear", "rank1", "tuned_residual", "--method", "si", *SMALL),
        *("--logdir", str(tmp_path), "--figure", str(figure)),
    ]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "not the paper's data" in first
    assert "no ImageNet weights: frozen ResNet-18 of width 16 with random weights" in first
    rows = read_results(tmp_path)
    assert [row.name.removesuffix(" epochs=1 hidden=[8, 8, 8]") for row in rows] == [
        *("5x2 si linear", "5x2 si rank1", "5x2 si tuned_residual")
    ]
    for row in rows:
        assert "no ImageNet weights" in row.readings["backbone"]
        matrix = row.details["accuracy"]
        assert row.metrics["accuracy"] == pytest.approx(sum(matrix[4]) / 5)
        assert len(row.details["seen"]) == 5
        assert ("top_slots" in row.details) == (row.layer == "neurocoder")
    assert rows[1].metrics["rank"] == pytest.approx(1)
    slots = tmp_path / "figure_slots.png"
    assert figure.stat().st_size > 1000 and slots.stat().st_size > 1000
    assert main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 3


def test_the_backbone_is_trained_once_and_said(tmp_path: Path, capsys: Any) -> None:
    epochs = ["--backbone-epochs", "1", "--method", "adam", "--logdir", str(tmp_path)]
    words = ["--layer", "linear", *SMALL, *epochs]
    assert main(words) == 0
    said = "trained here for 1 epochs to tell rotations of the training images apart, without"
    assert said in capsys.readouterr().out
    rows = read_results(tmp_path)
    (backbone,) = (row for row in rows if row.name.startswith("backbone"))
    assert backbone.updates == 1437 // 128 and "rotation_accuracy" in backbone.metrics
    (row,) = (row for row in rows if row is not backbone)
    assert said in row.readings["backbone"]
    assert main([*words, "--seeds", "1"]) == 0  # the same backbone
    output = capsys.readouterr().out
    assert output.count("finished before") == 1 and "seed 1" in output


def test_a_memory_that_grows_gives_every_task_its_slots(tmp_path: Path) -> None:
    options = ["num_slots=4", "num_heads=2", "key_dim=8"]
    words = ["--variant", "grow", *SMALL, "--layer-options", *options, "--logdir", str(tmp_path)]
    assert main(words) == 0
    (row,) = read_results(tmp_path)
    assert row.name.startswith("5x2 grow grow")
    assert len(row.details["top_slots"]) > 0
    # u, v and s of 4 slots and their keys of 2 heads: five times in three layers, once in each of
    # the five output layers.
    sizes = [*[(240, 8), (8, 8), (8, 8)] * 5, *[(8, 2)] * 5]
    assert row.parameters == sum(4 * (a + b + 1 + 2 * 8) for a, b in sizes)


def write_cifar100(folder: Path) -> None:
    """CIFAR-100's python version, two training images and a test image of every class."""
    place = folder / "cifar-100-python"
    place.mkdir()
    rng = np.random.default_rng(0)
    for name, each in (("train", 2), ("test", 1)):
        labels = [label for label in range(100) for _ in range(each)]
        pixels = rng.integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
        values = {
            b"data": pixels,
            b"fine_labels": labels,
            b"coarse_labels": [label // 5 for label in labels],
            b"filenames": [b"x.png"] * len(labels),
            b"batch_label": b"batch 1 of 1",
        }
        (place / name).write_bytes(pickle.dumps(values, protocol=2))


def test_cifar_100_in_its_original_layout(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    words = ["--classes", "100", "--data-dir", str(tmp_path), "--logdir", str(tmp_path / "runs")]
    small = [*SMALL, *SMALL_CODED, "--variant", "tuned", "--method", "si"]
    assert main([*words, *small]) == 0
    (row,) = read_results(tmp_path / "runs")
    assert row.data == "CIFAR-100" and row.name.startswith("20x5 si tuned")
    matrix = np.array(row.details["accuracy"])
    assert matrix.shape == (20, 20) and set(np.unique(matrix)) <= {0, 20, 40, 60, 80, 100}
    assert row.recipe["network_options"]["num_outputs"] == 5
    assert row.updates == 20  # 10 images a task, one batch each


BAD_INPUT = {
    "iterations": (["--iterations", "3"], "has to say how many epochs each task takes"),
    "classes": (["--classes", "20"], "CIFAR has 10 or 100 classes, got 20"),
    "no CIFAR-100": (["--classes", "100"], "CIFAR-100 needs --data-dir"),
    "method": (["--method", "sii"], "got 'sii'; nearest: si"),
    "growth": (["--variant", "tuned", "--method", "grow"], "method grow needs slots in place of"),
    "variant": (["--variant", "tunned"], "nearest: tuned"),
    "backbone as variant": (["--variant", "backbone"], "network resnet18, expected resnet_mlp"),
    "config": (["--config", "cifar_lenet"], "has no variant 'backbone'; give --backbone FILE"),
    "coef": (["--method", "si", "--penalty-coef", "-1"], "penalty_coef must lie in 0 .. inf"),
    "coef of what": (["--method", "adam", "--penalty-coef", "1"], "--penalty-coef needs a method"),
    "no file": (["--backbone", "/no/such.pth"], "/no/such.pth does not exist"),
    "folder": (["--backbone", "/"], "--backbone must be a file of weights: / is a folder"),
    "no weights": (["--backbone", __file__], "--backbone: cannot read"),
    "both": (["--backbone", __file__, "--backbone-epochs", "1"], "not --backbone"),
    "epochs": (["--backbone-epochs", "-1"], "--backbone-epochs must lie in 0 .. 100000, got -1"),
    "side": (["--image-side", "31"], "--image-side must lie in 32 .. 224, got 31"),
    "width": (["--network-options", "hidden=[0]"], "width must be an integer of at least 1"),
    "data": (["--data-dir", "/no/such/folder"], "/no/such/folder does not exist"),
    "figure": (["--figure", "figure.txt"], "--figure must end in one of"),
    "flag": (["--backbones", "x"], "nearest: --backbone"),
    "finished": (["--finished"], "there is no finished run 'backbone 5 epochs'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(name: str, tmp_path: Path, capsys: Any) -> None:
    assert_refused(main, *BAD_INPUT[name], tmp_path, capsys)
