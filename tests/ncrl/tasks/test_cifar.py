"""The CIFAR command on the embedded digits and on small files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from ncrl.tasks.cifar import experiment as cifar
from ncrl.tasks.cifar.experiment import main, paper_accuracy
from ncrl.tasks.classification import Classification
from ncrl.tasks.command import Session, task_parser
from ncrl.tasks.data import Images, load_digits
from ncrl.tasks.recipes import CONFIGS, Recipe
from ncrl.tasks.results import Result, read_results
from tests.ncrl.tasks import files
from tests.ncrl.tasks.files import read_recipe
from tests.ncrl.tasks.refusals import assert_refused

SMALL = ["--network-options", "hidden=[16,8]", "--batch-size", "128", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCRL_DATA", raising=False)


def test_all_four_layers_learn_and_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "cifar.png"
    words = ["--layer", "linear", "moe", "nsm", "neurocoder", *SMALL, "--epochs", "3"]
    words += ["--learning-rate", "0.01", "--logdir", str(tmp_path), "--figure", str(figure)]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "not the paper's data" in output
    rows = read_results(tmp_path, "cifar")
    assert sorted(row.layer for row in rows) == ["linear", "moe", "neurocoder", "nsm"]
    for row in rows:
        assert row.curve[-1]["loss"] < 0.95 * row.curve[0]["loss"]
        assert row.metrics["best_accuracy"] == max(point["accuracy"] for point in row.curve)
        assert (
            f"| {row.name} | {row.parameters:,} | 0 |" in output
            and f"| {row.layer} | 33 |" in output
        )
    coded = next(row for row in rows if row.layer == "neurocoder")
    assert list(coded.details["layers"]) == ["layers.1", "layers.2"]
    assert figure.stat().st_size > 10_000


def test_one_evaluation_is_seen_and_no_marks_are_named_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(cifar, "save_figure", lambda figure, _: figures.append(figure))
    words = ["--layer", "linear", *SMALL, "--epochs", "1", "--logdir", str(tmp_path)]
    assert main([*words, "--figure", str(tmp_path / "cifar.png")]) == 0
    (axes,) = figures[0].axes
    (line,) = axes.lines
    assert len(line.get_xdata()) == 1 and line.get_marker() == "o"  # type: ignore[arg-type]
    assert "digits" in axes.get_title() and "triangles" not in axes.get_title()


@pytest.mark.parametrize("layer", ["linear", "neurocoder"])
def test_a_small_densenet_takes_a_few_steps(tmp_path: Path, layer: str) -> None:
    words = ["--config", "cifar_densenet", "--layer", layer, "--network-options", "depth=7"]
    words += ["growth=4", "--iterations", "3", "--batch-size", "8", "--device", "cpu"]
    words += ["--classes", "10", "--logdir", str(tmp_path)]
    assert main(words) == 0
    (row,) = read_results(tmp_path)
    assert row.updates == 3 and row.layer == layer
    assert row.recipe["network_options"].get("num_outputs", 10) == 10


def test_the_ablation_of_table_2_is_there() -> None:
    for variant, heads, residual, accuracy in (
        ("", 3, True, 95.61),
        ("h1", 1, True, 88.9),
        ("h1_no_residual", 1, False, 77.4),
        ("h3_no_residual", 3, False, 80.8),
    ):
        recipe = read_recipe(CONFIGS / "cifar_densenet.yaml", variant)
        options = recipe.layer_options
        assert (options["num_heads"], options["residual"]) == (heads, residual)
        assert paper_accuracy(row_of(recipe)) == accuracy


def row_of(recipe: Recipe, data: str = "CIFAR-10") -> Result:
    return Result(
        task="cifar",
        name="x",
        seed=0,
        layer=recipe.layer,
        parameters=1,
        metrics={},
        data=data,
        updates=1,
        seconds=1,
        recipe={
            name: getattr(recipe, name)
            for name in ("layer", "layer_options", "network", "network_options")
        },
    )


def test_the_papers_numbers_stand_beside_the_right_rows() -> None:
    expected = {
        ("cifar_mlp", "linear"): 52.06,
        ("cifar_mlp", "cifar100"): 26.24,
        ("cifar_mlp", "nsm"): 52.76,
        ("cifar_lenet", ""): 78.92,
        ("cifar_lenet", "linear_cifar100"): 42.73,
        ("cifar_densenet", "moe"): 69.48,
        ("cifar_densenet", "cifar100"): 79.34,
    }
    for (file, variant), accuracy in expected.items():
        assert paper_accuracy(row_of(read_recipe(CONFIGS / f"{file}.yaml", variant))) == accuracy
    film = Recipe(task="cifar", network="lenet", layer="film")
    assert paper_accuracy(row_of(film)) is None
    lenet = read_recipe(CONFIGS / "cifar_lenet.yaml")
    assert paper_accuracy(row_of(lenet, "digits")) is None
    held_out = load_digits(32).held_out(5).name.replace("digits of scikit-learn", "CIFAR-10")
    assert paper_accuracy(row_of(lenet, held_out)) is None
    for change in ({"sharpness": 5}, {"num_steps": 1}, {"preset": "official"}):
        other = dataclasses.replace(lenet, layer_options={**lenet.layer_options, **change})
        assert paper_accuracy(row_of(other)) is None


def plans_of(*words: str) -> dict[str, int]:
    parser = task_parser("cifar", "CIFAR.")
    parser.add_argument("--classes", type=int)
    flags = vars(parser.parse_args(words))
    wanted = cifar.wanted_recipes(Session("cifar", flags))
    return {named.name: cifar.num_outputs(named.recipe) for named in wanted}


def test_all_layers_of_a_comparison_tell_the_same_classes_apart() -> None:
    words = ["--config", "cifar_densenet", "--layer", "neurocoder", "moe", "nsm"]
    assert set(plans_of(*words).values()) == {10}
    assert set(plans_of(*words, "--variant", "cifar100").values()) == {100}
    assert set(plans_of(*words, "--classes", "100").values()) == {100}
    assert plans_of() == {"cifar_mlp linear": 10, "cifar_mlp": 10}
    assert plans_of("--layer-options", "sharpness=5") == {
        "cifar_mlp linear": 10,
        "cifar_mlp sharpness=5": 10,
    }
    options = "--layer-options", "top_k=10"
    assert plans_of("--layer", "moe", *options) == {"cifar_mlp moe top_k=10": 10}
    with pytest.raises(ValueError, match="say --classes"):
        plans_of("--layer", "linear", "neurocoder", "--variant", "base", "cifar100")


REFUSED = [
    (["--classes", "11"], "CIFAR has 10 or 100 classes, got 11"),
    (["--network-options", "num_outputs=20", "--data-dir", "."], "100 classes, got 20"),
    (["--variant", "cifar100"], "10 embedded digits; CIFAR-100 needs --data-dir"),
    (["--config", "mnist"], "'mnist' is a recipe for mnist, not for cifar"),
    (["--network-options", "in_features=7"], "does not take images of shape [3, 32, 32]"),
    (["--batch-size", "2000"], "batch_size=2000 is more than the 1,438"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_makes_no_sense_is_one_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main, words, message, tmp_path, capsys)


def test_cifar_100_is_read_and_trained_on(tmp_path: Path) -> None:
    files.write_cifar(tmp_path, 100)
    words = ["--data-dir", str(tmp_path), "--variant", "cifar100", "--layer", "linear"]
    words += ["--iterations", "1", "--batch-size", "2", "--logdir", str(tmp_path / "runs")]
    assert main([*words, *SMALL[:2], "--device", "cpu"]) == 0
    (row,) = read_results(tmp_path / "runs")
    assert row.data == "CIFAR-100"


def small_images() -> Images:
    digits = load_digits(28)
    return digits._replace(
        train_images=digits.train_images[:70], train_labels=digits.train_labels[:70]
    ).standardised()


ONE_LAYER = Recipe(
    network="mlp",
    network_options={"in_features": 784, "hidden": [], "num_outputs": 10},
    batch_size=16,
    epochs=3,
)


def test_an_epoch_takes_every_image_once_in_an_order_of_its_own() -> None:
    images = small_images()
    experiment = Classification(ONE_LAYER, images, 5)
    assert (experiment.batches.per_epoch, experiment.num_updates) == (4, 12)
    flat = images.train_images.flatten(1)
    orders = []
    for epoch in range(3):
        order = []
        for index in range(4):
            x, labels = experiment.batch(4 * epoch + index)
            found = [int((flat == image).all(1).nonzero()[0]) for image in x.flatten(1)]
            assert torch.equal(images.train_labels[found], labels)
            order += found
        assert len(set(order)) == 64
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    again = Classification(ONE_LAYER, images, 5)
    assert torch.equal(again.batch(9)[0], experiment.batch(9)[0])
    assert not torch.equal(Classification(ONE_LAYER, images, 6).batch(0)[0], experiment.batch(0)[0])


def test_accuracy_and_error_are_shares_of_the_test_images() -> None:
    images = small_images()
    for measure in ("accuracy", "error"):
        experiment = Classification(ONE_LAYER, images, 0, measure=measure)
        with torch.no_grad():
            found = experiment.evaluate()
            logits = experiment.model(images.test_images)
        right = sum(
            int(row.argmax()) == int(label)
            for row, label in zip(logits, images.test_labels, strict=True)
        )
        share = 100 * right / len(logits)
        assert found[measure] == pytest.approx(share if measure == "accuracy" else 100 - share)
        picked = logits.log_softmax(1)[torch.arange(len(logits)), images.test_labels]
        assert found["test_loss"] == pytest.approx(-float(picked.mean()), rel=1e-5)
