"""The kept results: rows come back as they were, tables say what rows say, links lead somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import results_figures  # noqa: E402

import results  # noqa: E402
from ncrl.cli import TASKS  # noqa: E402

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]


def row(name: str, seed: int, **changes: object) -> results.Row:
    values = {"task": "t", "name": name, "seed": seed, "folder": f"{name}-0", "curve": []}
    return {**values, "details": {}, "metrics": {"error": 1.5}, **changes}


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        row("a", 0, command='x "y", z', empty="", recipe={"list": [1, 2], "none": None, "map": {}}),
        row(
            "a",
            1,
            number=0.1 + 0.2,
            text="1",
            labels={"variant": "x"},
            truth=True,
            word="true",
            recipe={"deep": {"b": 1}},
        ),
        row("b", 0, curve=[{"update": 1, "error": 2.0}], details={"layers": {"x": [[1.0]]}}),
    ]
    results.write_csv("t", reversed(rows), tmp_path)
    assert results.read_csv("t", tmp_path) == rows


def test_packing_replaces_a_run_that_is_there_and_unpacking_writes_it(tmp_path: Path) -> None:
    kept, logdir = tmp_path / "kept", tmp_path / "runs"
    kept.mkdir()
    results.write_csv("t", [row("a", 0), row("a", 1)], kept)
    results.write_runs([row("a", 1, metrics={"error": 9.0}), row("a", 2)], logdir)
    results.pack(logdir, kept)
    packed = results.read_csv("t", kept)
    assert [(r["seed"], r["metrics"]["error"]) for r in packed] == [(0, 1.5), (1, 9.0), (2, 1.5)]
    written = json.loads((logdir / "t/a-0/seed-1/result.json").read_text(encoding="utf-8"))
    assert "folder" not in written and written["metrics"] == {"error": 9.0}


def test_a_table_has_means_spreads_and_the_chosen_seeds() -> None:
    rows = [
        row("a", s, parameters=1000, metrics={"error": v}) for s, v in [(0, 1), (1, 3), (100, 9)]
    ]
    spec = {
        "task": "t",
        "seeds": [0, 1],
        "runs": {"a": ["A", 7.5]},
        "metrics": {"error": ["e", ".1f"]},
    }
    assert results.runs_table(rows, spec).splitlines()[2] == "| A | 1,000 | 2.0±1.0 | 7.5 |"
    del spec["seeds"]  # seed 100 is one of development
    assert results.runs_table(rows, spec).splitlines()[2] == "| A | 1,000 | 2.0±1.0 | 7.5 |"
    other = row("c", 0, parameters=5, metrics={"error": 2.0, "rank": 3.0})
    both = {**spec, "runs": {"a": "A", "c": "C"}, "metrics": {"rank": ["r", ".1f"]}}
    lines = results.runs_table([*rows, other], both).splitlines()
    assert lines[2:] == ["| A | 1,000 |  |", "| C | 5 | 3.0 (1 seed) |"]
    with pytest.raises(KeyError):  # a metric that no recipe has is a slip of the pen
        results.runs_table([*rows, other], {**both, "metrics": {"rnak": ["r", ".1f"]}})
    with pytest.raises(ValueError, match="no row of t is called 'b'"):
        results.runs_table(rows, {**spec, "runs": {"b": "B"}})
    with pytest.raises(ValueError, match="called 'a' of t differ in their settings"):
        results.runs_table([*rows, {**rows[0], "folder": "other"}], spec)


def test_the_tables_of_all_pages_are_what_the_rows_say() -> None:
    assert results.main(["tables", "--check"]) == 0


def test_every_claim_has_a_verdict_a_page_and_a_command_that_exists() -> None:
    claims = yaml.safe_load((ROOT / "results/claims.yaml").read_text(encoding="utf-8"))
    assert len({claim["claim"] for claim in claims}) == len(claims)
    for claim in claims:
        assert claim["verdict"] in results.MARKS
        assert (ROOT / "results" / f"{claim['page']}.md").is_file()
        program, *words = claim["command"].split()
        if program == "ncrl":
            assert words[0] == "train" or (words[0] == "task" and words[1] in TASKS), claim
        else:
            assert program == "python" and (ROOT / words[0]).is_file(), claim


def test_figures_are_of_the_rows_and_names_of_the_table() -> None:
    rows = [row for row in results_figures.results_of("cifar") if row.name == "MLP Neurocoder"]
    kept = [row for row in results.read_csv("cifar") if row["name"] == "cifar_mlp epochs=20"]
    assert len(rows) == 2
    assert [(r.seed, r.metrics, r.curve) for r in rows] == [
        (row["seed"], row["metrics"], row["curve"]) for row in kept
    ]


@pytest.mark.parametrize("task", ["polynomial", "algorithms", "split_cifar"])
def test_kept_rows_are_rows_of_the_task(task: str) -> None:
    rows = results_figures.results_of(task)
    assert rows and all(row.task == task and row.curve for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
