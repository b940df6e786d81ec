"""The kept results: rows in one CSV per experiment, the tables of its page, the table of claims.

    python benchmarks/results.py pack runs        # finished runs below `runs` into results/*.csv
    python benchmarks/results.py unpack rows      # and back: `--logdir rows --finished --tables`
    python benchmarks/results.py tables           # write the tables in results/*.md anew
    python benchmarks/results.py tables --check   # exit with 1 where a table is not what rows say

A CSV has a line per run, and a column per setting and metric. The curve and the details of a run
have no columns: they are a line of `<task>.details.jsonl`. `results/claims.yaml` holds the claims.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ncrl.tasks.results import RESULT_FILE, Summary, markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
LONG = ("curve", "details")  # fields of a row that are kept beside the CSV
FIRST_SEED_OF_DEVELOPMENT = 100
"""Rows with this seed and later ones were for choosing settings: no table of results has them."""
MARKS = {"holds": "✔", "in part": "◐", "not found": "✘", "open": "open"}
BLOCK = re.compile(r"(<!-- table\n(.*?)-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

Row = dict[str, Any]
"""A run as its `result.json` has it, and under `folder` the one that it stood in."""


# Rows <-> files


def read_runs(logdir: Path) -> list[Row]:
    """All finished runs below a folder."""
    rows = []
    for path in sorted(logdir.rglob(RESULT_FILE)):
        row = json.loads(path.read_text(encoding="utf-8"))
        rows.append({**row, "folder": path.parent.parent.name})
    return rows


def write_runs(rows: Iterable[Row], logdir: Path) -> None:
    """Each row as the `result.json` that it came from."""
    for row in rows:
        folder = logdir / row["task"] / row["folder"] / f"seed-{row['seed']}"
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in row.items() if key != "folder"}
        (folder / RESULT_FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `outer.inner`; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    values: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, last = path.split(".")
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return values


def encode(value: object) -> str:
    """A cell: text as it stands, anything else, and text that would be mistaken for it, as JSON."""
    if isinstance(value, str) and value and decode(value) == value:
        return value
    return json.dumps(value)


def decode(cell: str) -> Any:
    """The inverse of `encode`."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def order(row: Row) -> tuple[str, int, str]:
    """What rows are sorted by."""
    return row["name"], row["seed"], row["folder"]


def write_csv(task: str, rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """A task's rows as `<task>.csv` and `<task>.details.jsonl`."""
    rows = sorted(rows, key=order)
    flat = [flatten({k: v for k, v in row.items() if k not in LONG}) for row in rows]
    # The row's own fields, what was measured, everything else, settings.
    places = {"metrics": 1, "recipe": 3}
    columns = sorted(
        {key: None for line in flat for key in line},
        key=lambda column: places.get(column.split(".")[0], 2 if "." in column else 0),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for line in flat:
        writer.writerow([encode(line[key]) if key in line else "" for key in columns])
    (folder / f"{task}.csv").write_text(text.getvalue(), encoding="utf-8")
    lines = [json.dumps({key: row[key] for key in LONG}) for row in rows]
    (folder / f"{task}.details.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_csv(task: str, folder: Path = RESULTS) -> list[Row]:
    """What `write_csv` wrote; no rows where there is no file."""
    path = folder / f"{task}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            unflatten({key: decode(cell) for key, cell in line.items() if cell != ""})
            for line in csv.DictReader(file)
        ]
    long = (folder / f"{task}.details.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**row, **json.loads(line)} for row, line in zip(rows, long, strict=True)]


def pack(logdir: Path, folder: Path = RESULTS) -> None:
    """Add finished runs to the CSVs; a run of the same settings and seed takes the place of its
    row."""
    by_task: dict[str, list[Row]] = {}
    for row in read_runs(logdir):
        by_task.setdefault(row["task"], []).append(row)
    for task, new in by_task.items():
        kept = {order(row): row for row in [*read_csv(task, folder), *new]}
        write_csv(task, kept.values(), folder)
        print(f"{folder / task}.csv: {len(kept)} rows, {len(new)} of them from {logdir}")


# Tables of rows


def runs_table(rows: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """A line per recipe with its metrics.

    `spec` has `runs`: labels of recipes, or `[label, what the paper has]`. `metrics` has for each
    metric `[label, format]` or `[label, format, factor]`; its column is mean and spread. `by_seed`
    and `curve: {metric: [format, factor, *updates]}` make columns with the value of each seed. A
    recipe without a metric that others have leaves its cell empty.
    `seeds` leaves all other seeds out, and without it those of development are.
    """
    with_paper = any(isinstance(label, list) for label in spec["runs"].values())
    metrics, by_seed = spec.get("metrics", {}), spec.get("by_seed", {})
    points = [
        (metric, form, factor, update)
        for metric, (form, factor, *updates) in spec.get("curve", {}).items()
        for update in updates
    ]
    titles = [title for title, *_ in [*metrics.values(), *by_seed.values()]]
    header = ["", "parameters", *titles, *(f"{update:,}" for *_, update in points)]
    measured = {metric for n in spec["runs"] for metric in chosen(rows, n, spec)[0]["metrics"]}
    lines = []
    for name, label in spec["runs"].items():
        label, *paper = label if isinstance(label, list) else [label, ""]
        group = chosen(rows, name, spec)
        cells = [label, f"{group[0]['parameters']:,}"]
        for metric, (_, form, *factor) in metrics.items():
            has = metric in group[0]["metrics"] or metric not in measured
            cells.append(f"{Summary(values_of(group, metric, *factor)):{form}}" if has else "")
        for metric, (_, form, *factor) in by_seed.items():
            cells.append(", ".join(f"{v:{form}}" for v in values_of(group, metric, *factor)))
        for metric, form, factor, update in points:
            values = [p[metric] for row in group for p in row["curve"] if p["update"] == update]
            cells.append(", ".join(f"{value * factor:{form}}" for value in values))
        lines.append([*cells, *map(str, paper)] if with_paper else cells)
    return markdown([*header, "paper"] if with_paper else header, lines)


def chosen(rows: Sequence[Row], name: str, spec: Mapping[str, Any]) -> list[Row]:
    """The rows of a recipe, at least one, with the seeds that a table wants."""
    seeds = spec.get("seeds", range(FIRST_SEED_OF_DEVELOPMENT))
    group = [row for row in rows if row["name"] == name and row["seed"] in seeds]
    if not group:
        raise ValueError(f"no row of {spec['task']} is called {name!r}")
    if len({r["folder"] for r in group}) > 1:
        raise ValueError(f"rows called {name!r} of {spec['task']} differ in their settings")
    return group


def values_of(rows: Sequence[Row], metric: str, factor: float = 1) -> list[float]:
    """A metric of each row, times a factor."""
    return [row["metrics"][metric] * factor for row in rows]


def grid_table(rows: Sequence[Row], spec: Mapping[str, Any]) -> str:
    """A metric of the recipes `spec["grid"].format(row, column)`, the paper's values in brackets.

    Where the metric `spec["mark"]` is above zero for a seed, the cell has a dagger.
    """
    lines = []
    for name, printed in spec["rows"].items():
        line = [name]
        for column, paper in zip(spec["columns"], printed, strict=True):
            group = chosen(rows, spec["grid"].format(name, column), spec)
            text = f"{Summary(values_of(group, spec['metric'])):.1f}"
            text += " †" * any(value > 0 for value in values_of(group, spec["mark"]))
            line.append(text + f" ({paper})" * (paper is not None))
        lines.append(line)
    return markdown(["", *map(str, spec["columns"])], lines)


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """The claims of the paper and what was found, in one table under its count."""
    counts = [sum(claim["verdict"] == verdict for claim in claims) for verdict in MARKS]
    legend = ", ".join(
        f"{count} {MARKS[verdict]} {verdict}" if verdict != "open" else f"{count} open"
        for verdict, count in zip(MARKS, counts, strict=True)
    )
    head = ["", "claim", "paper", "ours", "seeds", "command", "page"]
    lines = [
        [
            MARKS[claim["verdict"]],
            f"{claim['claim']} ({claim['where']})",
            claim["paper"],
            claim["ours"],
            claim["seeds"],
            f"`{claim['command']}`" if claim["command"] else "",
            f"[{claim['page']}]({claim['page']}.md)",
        ]
        for claim in claims
    ]
    return f"{len(claims)} claims: {legend}.\n\n{markdown(head, lines)}"


def table_specs(page: Path) -> list[dict[str, Any]]:
    """The descriptions of a page's tables."""
    text = page.read_text(encoding="utf-8")
    return [yaml.safe_load(match[2]) for match in BLOCK.finditer(text)]


def filled(text: str) -> str:
    """A page with each table made anew from the description that stands in a comment over it."""

    def table(match: re.Match[str]) -> str:
        spec = yaml.safe_load(match[2])
        if "claims" in spec:
            claims = yaml.safe_load((RESULTS / spec["claims"]).read_text(encoding="utf-8"))
            made = claims_table(claims)
        else:
            rows = read_csv(spec["task"])
            made = (grid_table if "grid" in spec else runs_table)(rows, spec)
        return f"{match[1]}\n{made}\n\n{match[4]}"

    return BLOCK.sub(table, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, said in (("pack", "finished runs into CSVs"), ("unpack", "CSVs into runs")):
        commands.add_parser(name, help=said).add_argument("logdir", type=Path)
    tables = commands.add_parser("tables", help="write the tables of the pages anew")
    tables.add_argument("--check", action="store_true", help="write nothing; 1 if one differs")
    flags = parser.parse_args(arguments)
    if flags.command == "pack":
        if not read_runs(flags.logdir):
            parser.error(f"no finished run below {flags.logdir}")
        pack(flags.logdir)
        return 0
    if flags.command == "unpack":
        for path in sorted(RESULTS.glob("*.details.jsonl")):
            write_runs(read_csv(path.name.split(".")[0]), flags.logdir)
        return 0
    stale = 0
    for page in sorted(RESULTS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'differs' if flags.check else 'written'}")
            if not flags.check:
                page.write_text(new, encoding="utf-8")
    return 1 if flags.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
