"""The MNIST command on the embedded digits, its attention maps and its tree."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ncrl.settings import parse
from ncrl.tasks.command import Session, task_parser
from ncrl.tasks.mnist import experiment
from ncrl.tasks.mnist.experiment import (
    attention_patterns,
    decision_tree,
    main,
    maps_by_class,
)
from ncrl.tasks.results import read_results
from tests.ncrl.tasks import files
from tests.ncrl.tasks.refusals import assert_refused


def leaves(node: dict[str, Any], path: str = "") -> dict[str, list[int]]:
    if not node["children"]:
        return {path: node["digits"]}
    found: dict[str, list[int]] = {}
    for index, child in enumerate(node["children"]):
        found |= leaves(child, f"{path}{index}")
    return found


def test_the_command_draws_its_figure_from_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "mnist.png"
    words = ["--num-steps", "1", "2", "--epochs", "2", "--learning-rate", "0.3"]
    words += ["--schedule", "constant", "--device", "cpu"]
    words += ["--logdir", str(tmp_path / "runs"), "--figure", str(figure)]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "digits of 8x8 pixels that scikit-learn ships" in output
    rows = read_results(tmp_path / "runs", "mnist")
    layers = [row.layer for row in rows]
    assert sorted(layers) == ["linear"] + ["neurocoder"] * 4
    assert figure.stat().st_size > 10_000
    for row in rows:
        assert row.curve[-1]["loss"] < row.curve[0]["loss"]
        assert row.metrics["best_error"] <= row.metrics["error"]
        assert f"| {row.name} |" in output or "maps" in row.name
        if row.layer == "neurocoder":
            options = row.recipe["layer_options"]
            components = options["num_steps"] * options["num_heads"]
            shape = (10, components, options["num_slots"])
            assert np.shape(row.details["maps"]["mean"]) == shape
            assert np.shape(row.details["patterns"]) == shape[:2]
            tree = leaves(row.details["tree"])
            assert sorted(digit for digits in tree.values() for digit in digits) == [*range(10)]
            assert row.details["layers"]["output"]["max_attention"] <= 1
    coded = [row.parameters for row in rows if "maps" not in row.name and row.layer != "linear"]
    assert set(coded) == {7466}, "at most 7.5K"

    # The same command again repeats nothing, and draws the same figure.
    before, when = figure.read_bytes(), [path.stat() for path in tmp_path.rglob("model.pt")]
    assert main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 5
    assert [path.stat() for path in tmp_path.rglob("model.pt")] == when
    assert figure.read_bytes() == before


def test_a_figure_without_finished_maps_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "mnist.png"
    words = ["--variant", "linear", "--epochs", "1", "--device", "cpu"]
    words += ["--logdir", str(tmp_path / "runs")]
    assert main(words) == 0
    assert main([*words, "--finished", "--figure", str(figure)]) == 0
    assert "no figure: the runs whose attention it shows, " in capsys.readouterr().out
    assert not figure.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--layer", "hypernet", "--layer-options", "hidden=32"],
        ["--variant", "linear", "--network-options", "hidden=[8]"],
        ["--variant", "linear", "--layer", "neurocoder"],
    ],
)
def test_the_figure_has_its_maps_whatever_else_is_trained(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(experiment, "save_figure", lambda figure, _: figures.append(figure))
    words = [*words, "--epochs", "1", "--device", "cpu", "--logdir", str(tmp_path / "runs")]
    assert main([*words, "--figure", str(tmp_path / "mnist.png")]) == 0
    (figure,) = figures
    errors = {
        row.name: row.metrics["error"] for row in read_results(tmp_path) if "maps" in row.name
    }
    assert len(errors) == 2 and min(errors.values()) > 50
    tree = figure.axes[1].get_title()
    assert tree.endswith(f"error {errors['mnist maps_j5 epochs=1']:.0f} %, untrained")
    said = "\n".join(axes.get_ylabel() for axes in figure.axes)
    for error in errors.values():
        assert said.count(f"error {error:.0f} %, untrained") >= 2, "beside its maps"


def test_settings_can_be_chosen_on_held_out_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layer", "linear", "--validate", "--epochs", "1", "--logdir", str(tmp_path)]
    assert main([*words, "--device", "cpu"]) == 0
    (row,) = read_results(tmp_path)
    assert "one of 6 training images held out" in row.data
    assert row.updates == (1438 - 239) // 32
    (path,) = tmp_path.rglob("recipe.json")
    assert json.loads(path.read_text())["data"] == row.data
    assert "held out" in capsys.readouterr().out


def test_attention_maps_are_means_and_first_examples() -> None:
    torch.manual_seed(0)
    attention, labels = torch.rand(9, 4, 6), torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 0])
    means, examples = maps_by_class(attention, labels)
    for digit in range(3):
        own = [attention[i] for i in range(9) if labels[i] == digit]
        assert torch.allclose(means[digit], sum(own) / len(own), atol=1e-6)
        assert torch.equal(examples[digit], own[0])


def test_patterns_are_two_clusters_of_columns() -> None:
    kinds = np.array([[0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]], bool)
    noise = 0.01 * np.random.default_rng(0).random((4, 3, 5))
    means = np.where(kinds[:, :, None], np.eye(5)[1], np.eye(5)[3]) + noise
    assert np.array_equal(attention_patterns(torch.from_numpy(means)), kinds)
    same = torch.ones(4, 3, 5)
    assert not attention_patterns(same).any()


def test_paths_of_the_tree_are_the_patterns() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        patterns = rng.random((10, 4)) < 0.4
        tree = decision_tree(patterns)

        def check(node: dict[str, Any], depth: int, patterns: np.ndarray = patterns) -> None:
            digits = node["digits"]
            assert len({tuple(patterns[digit, :depth]) for digit in digits}) == 1
            if depth == 4:
                assert not node["children"]
                return
            parts = [child["digits"] for child in node["children"]]
            assert sorted(digit for part in parts for digit in part) == digits and all(parts)
            bits = [bool(patterns[part[0], depth]) for part in parts]
            assert bits == sorted(set(bits))
            for child in node["children"]:
                check(child, depth + 1)

        check(tree, 0)
        assert len(leaves(tree)) == len({tuple(row) for row in patterns})


def test_other_images_of_the_same_name_are_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layer", "linear", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    words += ["--logdir", str(tmp_path / "runs"), "--data-dir"]
    for place, count in (("one", 20), ("other", 24), ("copy", 20)):
        files.write_mnist(tmp_path / place, count=count)
        assert main([*words, str(tmp_path / place)]) == 0
        assert ("finished before" in capsys.readouterr().out) is (place == "copy")
    rows = read_results(tmp_path / "runs")
    assert [row.data for row in rows] == ["MNIST", "MNIST"]
    assert len({row.readings["images"] for row in rows}) == 2


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_mnist(tmp_path / "data", count=20)
    words = ["--layer", "linear", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    assert main([*words, "--logdir=~/runs", "--data-dir=~/data"]) == 0
    assert len(read_results(tmp_path / "runs")) == 1


def test_the_same_number_of_steps_twice_is_one_recipe() -> None:
    flags = parse(task_parser("mnist", "MNIST."), ["--layer", "neurocoder"])
    (named,) = experiment.wanted_recipes(Session("mnist", flags | {"num_steps": [2, 2]}))
    assert named.recipe.layer_options["num_steps"] == 2


def test_steps_of_no_layer_are_refused(tmp_path: Path, capsys: Any) -> None:
    words = ["--layer", "linear", "--num-steps", "3"]
    assert_refused(main, words, "--num-steps is for Neurocoder layers", tmp_path, capsys)


def test_test_images_must_show_every_digit(tmp_path: Path, capsys: Any) -> None:
    files.write_mnist(tmp_path)
    labels = np.arange(10, dtype=np.uint8) % 9
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(files.idx(labels)))
    words = ["--data-dir", str(tmp_path)]
    assert_refused(main, words, "no test image shows a 9", tmp_path / "runs", capsys)
