"""Result rows: what a finished run writes, and what tables and figures are made of."""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ncrl.files import read_bytes, write_atomically
from ncrl.settings import is_ncrl
from ncrl.shell.hardware import hardware, versions

RESULT_FILE = "result.json"

CHECKSUM = "details_checksum"  # beside the fields of a row in its file; unpacked rows may have none
LARGEST_ROW = 256 << 20  # bytes of a row; curves and maps take most of them
LARGEST_NUMBER = 1e300


@dataclass(frozen=True)
class Result:
    """One run: a recipe trained with one seed."""

    task: str  # module of ncrl.tasks
    name: str  # the recipe, as tables call it
    seed: int
    layer: str
    parameters: int  # of the network, frozen ones included, buffers not
    # What was measured at the end, and `best_...` of metrics for which the paper reports that.
    metrics: Mapping[str, float]
    data: str  # name of the data set
    updates: int
    seconds: float  # of training and its evaluations, on `hardware`
    recipe: Mapping[str, Any]  # every setting, those that flags changed included
    # Decisions where the paper is silent, beyond those that the recipe holds.
    readings: Mapping[str, Any] = field(default_factory=dict)
    # What else the task found out about the trained network: per layer, class, task and so on
    details: Mapping[str, Any] = field(default_factory=dict)
    # What tables and figures group rows by, such as the variant of the recipe.
    labels: Mapping[str, str] = field(default_factory=dict)
    # Metrics at every evaluation, with `update` and the mean training `loss` since the last.
    curve: Sequence[Mapping[str, float]] = ()
    command: str = ""  # that it was made with
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""  # when it ended, ISO 8601

    def line(self) -> str:
        """The row in one line."""
        measured = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return (
            f"{self.name}, seed {self.seed}: {measured}; {self.parameters:,} parameters, "
            f"{self.updates:,} updates in {self.seconds:.0f} s, on {self.data}"
        )


def write_result(folder: Path, result: Result) -> None:
    """Write a row, whole or not at all."""
    values = asdict(result) | {CHECKSUM: fingerprint(result.details)}
    write_atomically(folder / RESULT_FILE, json.dumps(values, indent=1).encode())


def fingerprint(values: Mapping[str, Any]) -> str:
    """Eight characters that differ between different values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_result(path: Path) -> Result:
    """The row in a file; ValueError naming the file, if it holds none."""
    data = read_bytes(path, LARGEST_ROW)
    try:
        return _row(json.loads(data))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as a result of ncrl.tasks: {error}") from error


def _row(values: dict[str, Any]) -> Result:
    checksum = values.pop(CHECKSUM, None)
    row = Result(**values)
    for entry in fields(Result):
        value, kind = getattr(row, entry.name), str(entry.type).partition("[")[0]
        if type(value) not in JSON_TYPES[kind]:
            raise ValueError(f"{entry.name} must be of type {kind}, got {str(value)[:80]!r}")
    counters = row.seed, row.parameters, row.updates, row.seconds
    if not all(0 <= counter < LARGEST_NUMBER for counter in counters):
        raise ValueError("a counter in it is negative or infinite")
    for point in (row.metrics, *row.curve):
        if not isinstance(point, dict) or not all(map(is_metric, point.values())):
            raise ValueError("a metric in it is no number")
    if checksum not in (None, fingerprint(row.details)):
        raise ValueError("its details were changed since it was written (their checksum differs)")
    return row


# What JSON may hold for a field of `Result`, by its annotation.
JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "Mapping": (dict,),
    "Sequence": (list, tuple),
}


def is_metric(value: object) -> bool:
    """Whether it is a number that a float can hold, infinities and NaN included."""
    return type(value) is float or (type(value) is int and abs(value) < LARGEST_NUMBER)


def read_results(folder: str | Path, task: str | None = None) -> list[Result]:
    """The rows of all runs below a folder, in order of name and seed."""
    rows = [read_result(path) for path in sorted(Path(folder).rglob(RESULT_FILE))]
    wanted = [row for row in rows if task is None or row.task == task]
    return sorted(wanted, key=lambda row: (row.name, row.seed))


@dataclass(frozen=True)
class Summary:
    """A metric over seeds, one at least: `f"{summary:.1f}"` is its mean and spread."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation of the population, as the continual-learning literature has it."""
        return statistics.pstdev(self.values)

    def __format__(self, form: str) -> str:
        if len(self.values) == 1:
            return f"{self.mean:{form}} (1 seed)"
        return f"{self.mean:{form}}±{self.std:{form}}"


def summarise(rows: Iterable[Result], metric: str) -> Summary | None:
    """A metric over the rows that have it, in their order; None if none has."""
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    return Summary(values) if values else None


def mean_and_spread(rows: Iterable[Result], metric: str, form: str) -> str | None:
    """A metric over rows as tables show it; None, an empty cell, if no row has it."""
    summary = summarise(rows, metric)
    return None if summary is None else f"{summary:{form}}"


def by_name(rows: Iterable[Result]) -> dict[str, list[Result]]:
    """Rows of the same recipe together, in the order in which recipes first appear."""
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    return groups


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    table = [header, ["---"] * len(header)]
    table += [["" if cell is None else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def results_table(
    rows: Iterable[Result],
    metrics: Sequence[str],
    columns: Mapping[str, Callable[[list[Result]], object]] = MappingProxyType({}),
) -> str:
    """A Markdown table: a line for each recipe, with mean and spread of metrics over its seeds, and
    `columns` by title: what stands there for a recipe's rows. Columns with nothing in them are left
    out."""
    titles = ["recipe", "parameters", "seeds", *metrics, *columns]
    lines = []
    for name, group in by_name(rows).items():
        cells = [name, f"{group[0].parameters:,}", " ".join(str(row.seed) for row in group)]
        summaries = [mean_and_spread(group, metric, ".4g") for metric in metrics]
        lines.append([*cells, *summaries, *(cell(group) for cell in columns.values())])
    empty = [bool(lines) and all(line[i] is None for line in lines) for i in range(len(titles))]
    kept = [i for i, nothing in enumerate(empty) if not nothing]
    return markdown([titles[i] for i in kept], [[line[i] for i in kept] for line in lines])


def program(task: str) -> str:
    """The name that a task's command was started under."""
    return f"ncrl task {task}" if is_ncrl() else f"python -m ncrl.tasks.{task}"


def provenance(device: torch.device) -> dict[str, Any]:
    """The fields of a row that say where it comes from, for a run that ends now."""
    return {
        "command": command_line(),
        "hardware": hardware(device),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that this process was started with, to be pasted into a shell."""
    script, *words = sys.argv
    if Path(script).stem == "ncrl":  # the installed command
        return shlex.join(["ncrl", *words])
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = [script] if main is None else ["-m", main.name.removesuffix(".__main__")]
    return shlex.join(["python", *program, *words])
