"""The command: flags, rows, tables, bad input."""

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ncrl.tasks.continual.split import COEFS
from ncrl.tasks.recipes import CONFIGS, ContinualRecipe, build_network
from ncrl.tasks.results import Result, read_results
from ncrl.tasks.split_mnist import tables
from ncrl.tasks.split_mnist.experiment import cells, main, recipe_of
from ncrl.tasks.split_mnist.tables import LAYERS, Cell, static_rank
from ncrl.tasks.training import count_parameters
from tests.ncrl.tasks.refusals import assert_refused

ROOT = Path(__file__).resolve().parents[3]

SMALL = ["--network-options", "hidden=[8, 8]", "--epochs", "1", "--device", "cpu"]


def small(folder: Path, *words: str) -> list[str]:
    return [*words, *SMALL, "--logdir", str(folder)]


@pytest.fixture(autouse=True)
def embedded_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCRL_DATA", raising=False)


def recipe(cell: Cell, **flags: Any) -> ContinualRecipe:
    found = recipe_of(cell, flags).recipe
    assert isinstance(found, ContinualRecipe)
    return found


# Parameters of sections 3, 4 and 10 of experiments.md, hidden width 400.
PARAMETERS = {
    ("domain", "mlp"): 570_402,
    ("domain", "official"): 423_539,
    ("domain", "paper"): 413_342,
    ("domain", "paper residual"): 985_569,
    ("domain", "rank 1"): 3_026,
    ("domain", "nsm"): 3_833_984,
    ("task", "mlp"): 573_610,
    ("task", "official"): 757_431,
    ("task", "paper"): 778_166,
    ("task", "paper residual"): 1_355_197,
}


@pytest.mark.parametrize(("scenario", "name"), PARAMETERS)
def test_networks_of_the_tables_have_the_sizes_they_should(scenario: str, name: str) -> None:
    network = build_network(recipe(Cell(scenario, "adam", LAYERS[name])))
    assert count_parameters(network) == PARAMETERS[scenario, name]


def test_the_protocol_is_that_of_hsu_et_al() -> None:
    for scenario in ("domain", "task"):
        for method in tables.METHODS:
            found = recipe(Cell(scenario, method, LAYERS["mlp"]))
            assert (found.epochs, found.batch_size, found.schedule) == (4, 128, "constant")
            rate = ("adagrad", 1e-2) if method == "adagrad" else ("adam", 1e-3)
            assert (found.optimizer, found.learning_rate) == rate
            assert found.penalty_coef == COEFS[scenario].get(method, 0)
            assert found.network_options["num_outputs"] == 2
            heads = found.network_options.get("num_tasks", 1)
            assert heads == (5 if scenario == "task" else 1)


def test_quirks_belong_to_the_official_variant() -> None:
    for layer in LAYERS:
        found = recipe(Cell("domain", "ewc", LAYERS[layer]))
        official = layer in ("official", "official residual")
        assert found.fisher_orthogonality == found.double_orth_coef == official
    cell = Cell("domain", "ewc", LAYERS["official"])
    without = recipe_of(cell, {"fisher_orthogonality": False})
    assert without.name == "domain ewc official fisher_orthogonality=False"
    assert not vars(without.recipe)["fisher_orthogonality"]
    assert vars(without.recipe)["double_orth_coef"]


def test_quirks_can_stand_in_the_file(tmp_path: Path) -> None:
    text = (CONFIGS / "split_mnist.yaml").read_text()
    text = text.replace("double_orth_coef: true", "double_orth_coef: false")
    text = text.replace("  tuned:\n", "  tuned:\n    double_orth_coef: true\n")
    path = tmp_path / "own.yaml"
    path.write_text(text)
    for layer, doubles in (("official", False), ("paper", True), ("paper residual", False)):
        cell = Cell("domain", "ewc", LAYERS[layer])
        assert recipe(cell, config=str(path)).double_orth_coef is doubles
    assert recipe(
        cell._replace(layers=LAYERS["official"]), config=str(path), double_orth_coef=True
    ).double_orth_coef


def test_method_and_coefficient_can_stand_in_the_file(tmp_path: Path) -> None:
    text = (CONFIGS / "split_mnist.yaml").read_text()
    path = tmp_path / "own.yaml"
    path.write_text(f"scenario: task\nmethod: l2\npenalty_coef: 3\n{text}")
    flags = {"config": str(path)}
    (cell,) = cells(flags)
    assert (cell.scenario, cell.method) == ("task", "l2")
    found = recipe_of(cell, flags)
    assert isinstance(found.recipe, ContinualRecipe)
    assert (found.recipe.scenario, found.recipe.method) == ("task", "l2")
    assert found.recipe.penalty_coef == 3 and found.name == "task l2 paper penalty_coef=3"
    assert recipe_of(cell, flags, coef=5.0).recipe == dataclasses.replace(
        found.recipe, penalty_coef=5.0
    )
    (other,) = cells({**flags, "method": ["adam"], "scenario": ["domain"]})
    assert (other.scenario, other.method) == ("domain", "adam")
    assert vars(recipe_of(other, flags).recipe)["penalty_coef"] == 0


def test_flags_change_the_recipe_and_its_name() -> None:
    cell = Cell("task", "adagrad", LAYERS["paper"])
    changed = recipe_of(cell, {"sharpness": 3.0, "epochs": 2, "orth_coef": 7.0}, coef=5.0)
    assert changed.recipe.layer_options["sharpness"] == 3
    found = changed.recipe
    assert (found.epochs, found.orth_coef, found.learning_rate) == (2, 7, 1e-2)
    assert vars(found)["penalty_coef"] == 5
    for said in ("sharpness=3", "penalty_coef=5", "epochs=2", "orth_coef=7"):
        assert said in changed.name
    ewc = Cell("domain", "ewc", LAYERS["mlp"])
    assert recipe_of(ewc, {}, coef=100.0) == recipe_of(ewc, {}), (
        "the coefficient that it has anyway"
    )
    kept = recipe_of(cell, {"learning_rate": 0.5}).recipe
    assert (kept.optimizer, kept.learning_rate) == ("adagrad", 0.5)
    assert recipe_of(Cell("domain", "si", static_rank(7)), {}).name == "domain si rank 7"


def test_options_change_the_cells_whose_layer_has_them() -> None:
    layers = LAYERS["mlp"], static_rank(3), LAYERS["paper"]
    every = [Cell("domain", "ewc", which) for which in layers]
    flags = {"layer_options": ["num_slots=7"]}
    plain, low, coded = (recipe_of(cell, flags, beside=every) for cell in every)
    assert plain == recipe_of(every[0], {}) and low == recipe_of(every[1], {})
    assert coded.recipe.layer_options["num_slots"] == 7 and coded.name.endswith(" num_slots=7")
    with pytest.raises(ValueError, match="unknown option 'num_slots'"):
        recipe_of(every[0], flags, beside=every[:2])


def test_rows_and_runs_that_are_finished_already(tmp_path: Path, capsys: Any) -> None:
    words = small(tmp_path, "--layer", "linear", "lowrank", "--method", "ewc", "--repeats", "2")
    words += ["--scenario", "task"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "not the paper's data" in first
    rows = read_results(tmp_path)
    assert [(row.name.split(" epochs")[0], row.seed) for row in rows] == [
        *(("task ewc mlp", seed) for seed in (0, 1)),
        *(("task ewc rank 1", seed) for seed in (0, 1)),
    ]
    for row in rows:
        matrix = row.details["accuracy"]
        assert row.metrics["accuracy"] == pytest.approx(sum(matrix[4]) / 5)
        assert len(matrix) == len(matrix[0]) == 5
        assert row.recipe["method"] == "ewc" and row.recipe["scenario"] == "task"
        assert row.recipe["network_options"]["num_tasks"] == 5
    assert main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 4
    # Shown without training: of two methods and seeds those that there are.
    others = small(tmp_path, "--layer", "linear", "--method", "ewc", "si", "--seeds", "1", "7")
    assert main([*others, "--scenario", "task", "--finished"]) == 0
    (line,) = (text for text in capsys.readouterr().out.splitlines() if " ewc mlp " in text)
    assert "| 1 |" in line
    assert len(read_results(tmp_path)) == 4


def test_variants_of_the_coded_layer(tmp_path: Path) -> None:
    options = ("--layer-options", "num_slots=6", "num_heads=2", "key_dim=2", "num_least_used=2")
    words = ("--layer", "neurocoder", "--variant", "paper", "official")
    figure = tmp_path / "figure.png"
    methods = ("--method", "online-ewc", "--residual", "--figure", str(figure))
    assert main(small(tmp_path, *words, *options, *methods)) == 0
    rows = read_results(tmp_path)
    assert len(rows) == 2 and figure.is_file()
    for row in rows:
        assert row.recipe["layer_options"]["residual"] is True
        assert row.metrics["rank"] >= 1 and row.metrics["attention"] > 0
        assert set(row.details["layers"]) == {"hidden.0", "hidden.1", "heads.0"}


BAD_INPUT = {
    "iterations": (["--iterations", "3"], "has to say how many epochs each task takes"),
    "method": (["--method", "onlineewc"], "nearest: online-ewc"),
    "scenario": (["--scenario", "class"], "--scenario must be one of domain, task, got 'class'"),
    "layer": (["--layer", "film"], "--layer must be one of linear, lowrank, nsm, neurocoder"),
    "variant": (["--variant", "papers"], "nearest: paper"),
    "repeats": (["--repeats", "0"], "--repeats must lie in 1 .. 1000, got 0"),
    "both seeds": (["--repeats", "2", "--seeds", "1"], "exclude each other"),
    "rank": (["--layer", "lowrank", "--rank", "0"], "rank must be an integer of at least 1"),
    "rank of what": (["--layer", "linear", "--rank", "2"], "--rank needs --layer lowrank"),
    "rank and context": (
        ["--network-options", "context=true", "hidden_rank=2"],
        "hidden_rank=2 makes static layers, which read no context",
    ),
    "sharpness": (["--sharpness", "0"], "sharpness must be a positive number, got 0.0"),
    "of what": (["--layer", "nsm", "--sharpness", "2"], "--sharpness needs --layer neurocoder"),
    "quirk": (["--double-orth-coef"], "--double-orth-coef needs --variant official"),
    "table": (["--tables", "2"], "argument --tables: invalid choice: 2 (choose from 1, 6, 7)"),
    "table of": (["--tables", "--method", "ewc"], "--method and --tables exclude each other"),
    "coef": (
        ["--method", "ewc", "--penalty-coef", "1", "-1"],
        "penalty_coef must lie in 0 .. inf, got -1.0",
    ),
    "coef of what": (["--penalty-coef", "1"], "--penalty-coef needs a method out of l2, si, ewc"),
    "coefs": (["--tables", "1", "--penalty-coef", "1", "2"], "--tables takes one --penalty-coef"),
    "config": (
        ["--config", "polynomial"],
        "is for network gru, expected split_mlp",
    ),
    "clipped": (
        ["--method", "si", "--max-grad-norm", "1"],
        "must not be clipped, got max_grad_nor",
    ),
    "inputs": (["--network-options", "in_features=784"], "does not take 1024 numbers"),
    "outputs": (["--network-options", "num_outputs=1"], "num_outputs must be at least 2, got 1"),
    "flag": (["--scenerio", "task"], "nearest: --scenario"),
    "folder": (["--data-dir", "/no/such/folder"], "/no/such/folder does not exist"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_in_one_line(name: str, tmp_path: Path, capsys: Any) -> None:
    assert_refused(main, *BAD_INPUT[name], tmp_path, capsys)


def test_a_run_that_diverges_does_not_stop_the_others_and_is_not_tried_again(
    tmp_path: Path, capsys: Any
) -> None:
    words = ("--layer", "linear", "lowrank", "--method", "adam", "--learning-rate", "1e38")
    assert main(small(tmp_path, *words)) == 1
    output = capsys.readouterr()
    assert output.err.count("diverged: ") == 2
    assert "2 run(s) diverged, and have no row above" in output.err
    assert "| recipe |" in output.out
    assert not read_results(tmp_path)
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("diverged.txt")}
    assert len(marks) == 2 and main(small(tmp_path, *words)) == 1
    said = capsys.readouterr().err
    for mark, when in marks.items():
        assert f"(found before; delete {mark} to try again)" in said
        assert mark.stat().st_mtime_ns == when


def test_a_rank_that_is_named_twice_is_one_cell() -> None:
    (cell,) = cells({"layer": ["lowrank"], "rank": [1, 1]})
    assert cell.layers == static_rank(1)


def test_tables_with_other_settings_show_their_rows(tmp_path: Path, capsys: Any) -> None:
    words = ["--method", "adam", "--layer", "linear", "--seeds", "0", "2"]
    assert main(small(tmp_path, *words)) == 0
    capsys.readouterr()
    assert main(small(tmp_path, "--tables", "1", "--finished", "--seeds", "0", "2")) == 0
    text = capsys.readouterr().out
    values = " ".join(f"{row.metrics['accuracy']:.1f}" for row in read_results(tmp_path))
    first, second = values.split()
    assert "Table 1, incremental domain; epochs=1" in text
    assert f"| {first} - {second} - - |" in text


def test_processes_share_the_runs(tmp_path: Path, capsys: Any) -> None:
    """Another one, and this one, which begins while the other is at its first run."""
    assert main(small(tmp_path / "before", "--method", "adam", "--layer", "linear")) == 0
    capsys.readouterr()  # all that takes long is imported
    words = small(tmp_path / "shared", "--method", "adam", "l2", "si", "--layer", "linear")
    words += ["--epochs", "10"]
    command = [sys.executable, "-m", "ncrl.tasks.split_mnist", *words, "--threads", "1"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("shared/**/.lock")) and other.poll() is None:
        time.sleep(0.01)
    assert main(words) == 0
    said = [other.communicate(timeout=600)[0], capsys.readouterr().out]
    assert other.returncode == 0
    rows = read_results(tmp_path / "shared")
    assert len(rows) == 3
    assert all(row.name in text for row in rows for text in said)
    assert "".join(said).count("finished before") == 3


def test_the_examples_of_the_documentation_run() -> None:
    page = ROOT / "docs" / "continual.md"
    examples = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    penalty: dict[str, Any] = {}
    grow: dict[str, Any] = {}
    for example, names in zip(examples, (penalty, grow), strict=True):
        exec(compile(example, str(page), "exec"), names)
    assert grow["model"].config.num_slots == 60
    method = penalty["method"]
    # The last task's end is the anchor: the first step away from it would cost something.
    assert method.penalty() == 0
    assert all(bool((fisher > 0).any()) for fisher in method.importance.values())


# What a penalty's weight trades


def test_a_sweep_trains_with_every_coefficient(tmp_path: Path, capsys: Any) -> None:
    figure = tmp_path / "figure.png"
    words = ("--layer", "lowrank", "--method", "l2", "adam", "--penalty-coef", "0", "1e3", "1e3")
    assert main(small(tmp_path, *words, "--figure", str(figure))) == 0
    rows = read_results(tmp_path)
    trained = sorted((row.recipe["method"], row.recipe["penalty_coef"]) for row in rows)
    assert trained == [("adam", 0), ("l2", 0), ("l2", 1000)]
    assert "finished before" not in capsys.readouterr().out, "one that is named twice is one run"
    assert figure.is_file()


def test_points_are_means_over_seeds_in_the_order_of_the_coefficient() -> None:
    cell = Cell("domain", "ewc", static_rank(1))

    def row(coef: float, seed: int, learn: float, accuracy: float, said: str = "") -> Result:
        made = made_up(cell, seed, accuracy, learn=learn)
        labels = {**made.labels, "changes": said, "coef": f"penalty_coef={coef:g}"}
        return dataclasses.replace(made, labels=labels, recipe={"penalty_coef": coef})

    rows = [row(100.0, 0, 80.0, 70.0, "epochs=2"), row(1e-6, 0, 99.0, 50.0, "epochs=2")]
    rows += [row(1e-6, 1, 97.0, 54.0, "epochs=2"), row(7.0, 0, 90.0, 60.0)]
    found = tables.curves(rows)
    assert found == {
        "domain ewc": {
            "rank 1 epochs=2": [(1e-6, 98.0, 52.0), (100.0, 80.0, 70.0)],
            "rank 1": [(7.0, 90.0, 60.0)],
        }
    }


# Tables


def made_up(cell: Cell, seed: int, accuracy: float, **metrics: float) -> Result:
    values = {"accuracy": accuracy, "learn": 99.0, "failed_tasks": 0.0, "forgetting": 1.0}
    return Result(
        *("split_mnist", cell.name, seed, cell.layers.name, 1234),
        {**values, "transfer": -1.0, "rank": 3.0, **metrics},
        *("MNIST", 10, 1.0, {}),
        labels=cell.labels,
    )


def test_the_figure_says_what_each_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(tables, "save_figure", lambda figure, _: figures.append(figure))
    rows = [
        made_up(Cell("domain", "adam", layers), 0, 60.0)
        for layers in (*LAYERS.values(), static_rank(7))
    ]
    changed = made_up(Cell("domain", "adam", LAYERS["official residual"]), 0, 60.0)
    labels = {**changed.labels, "changes": "sharpness=3"}
    tables.draw(Path("unused.png"), [*rows, dataclasses.replace(changed, labels=labels)])
    legends = [axes.get_legend() for axes in figures[0].axes]
    said = [{text.get_text() for text in legend.get_texts()} for legend in legends if legend]
    beside = {"plain MLP", "hollow: what the paper prints"}
    without = {"authors' layer", "the paper's equations"}
    residual = {f"{name}, residual" for name in without}
    assert said == [
        beside | without | {"static rank 1", "static rank 50", "static rank 7"},
        beside | residual | {"authors' layer, residual sharpness=3", "NSM"},
    ]


def test_tables_hold_every_cell_beside_the_printed_number() -> None:
    cell = Cell("domain", "online-ewc", LAYERS["official"])
    rows = [
        made_up(cell, 0, 70.0, attention=0.025),
        made_up(cell, 2, 74.0, attention=0.025, failed_tasks=2.0),
        made_up(Cell("task", "adam", LAYERS["mlp"]), 0, 90.0),
    ]
    text = tables.table(7, rows)
    assert text.startswith("Table 7, incremental domain; 0 of 48 cells have all 5 seeds\n")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(lines) == 1 + len(tables.METHODS) * len(LAYERS)
    (line,) = (line for line in lines if line.startswith("| online-ewc | official |"))
    cells = [part.strip() for part in line.strip("|").split("|")]
    assert cells[2:5] == ["1,234", "72.0±2.0", "70.0 - 74.0 - -"]  # the population's deviation
    assert "1 of 2" in cells and cells[-3:] == ["73.97±1.50", "71.79±2.04", ""]
    assert "| adam | mlp |  |" in text  # a cell of the other scenario does not fill this one
    assert "| 90.0 (1 seed) | 90.0 - - | 99.0 (1 seed) |" in tables.table(6, rows)
    short = tables.table(1, rows, " epochs=1")
    assert short.startswith("Table 1, incremental domain; epochs=1; 0 of 30 cells have all 5 seeds")
    assert line in short and "residual" not in short
    far = tables.table(1, [made_up(cell, 2**31 - 1, 60.0)])
    assert "| - - - - - 60.0 |" in far, "a seed takes one place, however large"
    assert "| seeds 0, 1, 2, 3, 4, 2147483647 |" in far and "| seeds 0, 1, ... |" in text
    whole = [made_up(cell, seed, 70.0) for seed in range(5)]
    assert "; 1 of 48 cells have" in tables.table(7, whole)


def test_every_cell_is_wanted_once_and_known_to_the_paper() -> None:
    assert set(tables.cells(1)) <= set(tables.cells(7))
    for number, scenario in ((7, "domain"), (6, "task")):
        wanted = tables.cells(number)
        assert len(set(wanted)) == len(wanted) == len(tables.METHODS) * len(LAYERS)
        names = {cell.name for cell in wanted}
        assert len(names) == len(wanted)
        for method in tables.METHODS:
            assert tables.printed(scenario, method, "rank 1") is None
            assert float(tables.printed(scenario, method, "nsm").split("±")[0]) > 50


def test_grow_has_a_recipe_of_its_own_and_no_other_column() -> None:
    found = recipe(Cell("domain", "grow", LAYERS["paper"]))
    assert found.layer_options["controller"] == "projection" and found.penalty_coef == 1
    (cell,) = cells({"method": ["grow"]})
    assert cell == Cell("domain", "grow", LAYERS["paper"])
    with pytest.raises(ValueError, match="--method grow needs --layer neurocoder"):
        cells({"method": ["grow"], "layer": ["linear"]})
