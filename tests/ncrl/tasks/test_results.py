"""Result rows: written, read, summarised and put into tables."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncrl.tasks.results import (
    Result,
    command_line,
    markdown,
    read_result,
    read_results,
    results_table,
    summarise,
    write_result,
)


def row(name: str = "a", seed: int = 0, task: str = "toy", **metrics: float) -> Result:
    return Result(
        task=task,
        name=name,
        seed=seed,
        layer="linear",
        parameters=1234,
        metrics=metrics,
        data="generated",
        updates=10,
        seconds=1.5,
        recipe={"learning_rate": 0.1, "layer_options": {}},
        curve=[{"update": 5, "error": 2.0}],
    )


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    for index, written in enumerate([row(error=1.25), row("b", 3, error=1e-9)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        write_result(folder, written)
        assert read_result(folder / "result.json") == written
        assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_rows_are_found_below_a_folder_in_order(tmp_path: Path) -> None:
    for name, seed, task in (("b", 0, "toy"), ("a", 10, "toy"), ("a", 2, "toy"), ("c", 0, "other")):
        folder = tmp_path / name / str(seed)
        folder.mkdir(parents=True)
        write_result(folder, row(name, seed, task))
    assert [(r.name, r.seed) for r in read_results(tmp_path, "toy")] == [
        ("a", 2),
        ("a", 10),
        ("b", 0),
    ]
    assert len(read_results(str(tmp_path))) == 4


def changed(**fields: Any) -> str:
    return json.dumps({**asdict(row(error=1.0)), **fields})


WRONG_ROWS = [
    *("", "[]", '{"task": "x"}', '{"strange": 1}', "{", "[" * 100_000),
    *(changed(metrics=None), changed(metrics={"error": []}), changed(metrics=[1.0])),
    *(changed(seed=-1), changed(seed=1.0), changed(updates=math.inf), changed(seconds=math.inf)),
    *(changed(seconds=True), changed(curve=[[1]]), changed(curve=[{"error": "x"}])),
    *(changed(metrics={"error": 10**400}), changed(name=None), changed(details=[])),
]


@pytest.mark.parametrize("text", WRONG_ROWS)
def test_a_file_that_is_no_row_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result.json") as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)


def test_details_that_were_changed_are_named(tmp_path: Path) -> None:
    write_result(tmp_path, replace(row(error=1.0), details={"seen": [50.0]}))
    path = tmp_path / "result.json"
    assert read_results(tmp_path)[0].details == {"seen": [50.0]}
    path.write_text(path.read_text().replace('"seen"', '"sean"'))
    with pytest.raises(ValueError, match=r"result.json .*details were changed"):
        read_results(tmp_path)


def test_mean_and_spread_are_those_of_the_population() -> None:
    values = [3.0, 4.5, 9.0]
    rows = [row(seed=seed, error=value) for seed, value in enumerate(values)]
    found = summarise([*rows, row(seed=9)], "error")
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values))
    assert found.values == values
    assert f"{found:.1f}" == "5.5±2.5"
    assert summarise(rows, "accuracy") is None


def test_tables_are_markdown() -> None:
    assert markdown(["a", "b"], [[1, None]]) == "| a | b |\n| --- | --- |\n| 1 |  |"
    rows = [row("x", 1, error=2.0), row("y", 0, error=8.0), row("x", 4, error=4.0)]
    lines = results_table(
        rows, ["error"], {"paper": lambda group: {"x": "3.3"}.get(group[0].name)}
    ).splitlines()
    assert lines[0] == "| recipe | parameters | seeds | error | paper |"
    assert lines[2:] == [
        "| x | 1,234 | 1 4 | 3±1 | 3.3 |",
        "| y | 1,234 | 0 | 8 (1 seed) |  |",
    ]
    bare = results_table(rows, ["error", "accuracy"], {"paper": lambda group: None})
    assert bare.splitlines()[0] == "| recipe | parameters | seeds | error |", "what there is"
    assert bare.splitlines()[3] == "| y | 1,234 | 0 | 8 (1 seed) |"


def test_the_line_names_what_a_reader_needs() -> None:
    line = row("mnist", 3, error=7.654321).line()
    for part in ("mnist", "seed 3", "error 7.654", "1,234 parameters", "10 updates", "generated"):
        assert part in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("script", "module", "said"),
    [
        ("/usr/bin/ncrl", None, "ncrl task mnist"),
        ("/x/ncrl/__main__.py", "ncrl.__main__", "python -m ncrl task mnist"),
        ("/x/parameters.py", "ncrl.tasks.parameters", "python -m ncrl.tasks.parameters task mnist"),
        ("benchmarks/programs.py", None, "python benchmarks/programs.py task mnist"),
    ],
)
def test_the_command_of_a_row_can_be_repeated(
    script: str, module: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [script, "task", "mnist"])
    assert command_line() == said
    monkeypatch.setattr(sys, "argv", [script, "task", "mnist", "--only", "rank 4", "hidden=[8]"])
    assert command_line() == f"{said} --only 'rank 4' 'hidden=[8]'"
