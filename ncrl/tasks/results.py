"""Result rows: what a finished run writes, and what tables and figures are made of."""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ncrl.files import read_bytes, write_atomically
from ncrl.neurocoder.memory import SlotMemory

RESULT_FILE = "result.json"

CHECKSUM = "details_checksum"
"""Beside the fields of a row in its file; rows of earlier releases have none."""

LARGEST_ROW = 256 << 20
"""Bytes of a row; curves and maps take most of them."""


@dataclass(frozen=True)
class Result:
    """One run: a recipe trained with one seed."""

    task: str
    """Module of ncrl.tasks."""

    name: str
    """The recipe, as tables call it."""

    seed: int

    layer: str

    parameters: int
    """Of the network, frozen ones included, buffers not."""

    metrics: Mapping[str, float]
    """What was measured at the end, and `best_...` of metrics for which the paper reports that."""

    data: str
    """Name of the data set."""

    updates: int

    seconds: float
    """Of training and its evaluations, on `hardware`."""

    recipe: Mapping[str, Any]
    """Every setting, those that flags changed included."""

    readings: Mapping[str, Any] = field(default_factory=dict)
    """Decisions where the paper is silent, beyond those that the recipe holds."""

    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the task found out about the trained network: per layer, class, task, ..."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """What tables and figures group rows by, such as the variant of the recipe."""

    curve: Sequence[Mapping[str, float]] = ()
    """Metrics at every evaluation, with `update` and the mean training `loss` since the last."""

    command: str = ""
    """That it was made with."""

    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    """When it ended, ISO 8601."""

    def line(self) -> str:
        """The row in one line."""
        measured = ", ".join(f"{name} {number(value)}" for name, value in self.metrics.items())
        return (
            f"{self.name}, seed {self.seed}: {measured}; {self.parameters:,} parameters, "
            f"{self.updates:,} updates in {self.seconds:.0f} s, on {self.data}"
        )


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable."""
    return f"{value:.4g}"


def write_result(folder: Path, result: Result) -> None:
    """Write a row, whole or not at all."""
    values = asdict(result) | {CHECKSUM: fingerprint(result.details)}
    write_atomically(folder / RESULT_FILE, json.dumps(values, indent=1).encode())


def fingerprint(values: Mapping[str, Any]) -> str:
    """Eight characters that differ between different values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_result(path: Path) -> Result:
    """The row in a file.

    Raises:
        ValueError: naming the file, if it holds none.
    """
    data = read_bytes(path, LARGEST_ROW)
    try:
        values = json.loads(data)
    except RecursionError as error:
        raise ValueError(f"cannot read {path}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    checksum = values.pop(CHECKSUM, None) if isinstance(values, dict) else None
    known = {entry.name: str(entry.type).partition("[")[0] for entry in fields(Result)}
    if not isinstance(values, dict) or set(values) - set(known):
        raise ValueError(f"{path} is no result of ncrl.tasks")
    for name, value in values.items():
        if type(value) not in JSON_TYPES[known[name]]:
            raise ValueError(
                f"{path} is no result of ncrl.tasks: {name} must be of type {known[name]}, "
                f"got {str(value)[:80]!r}"
            )
    try:
        row = Result(**values)
    except TypeError as error:
        raise ValueError(f"{path} is no result of ncrl.tasks: {error}") from error
    if fault := _fault(row, checksum):
        raise ValueError(f"{path} is no result of ncrl.tasks: {fault}")
    return row


def _fault(row: Result, checksum: object) -> str | None:
    """What is wrong with a row whose fields have their types."""
    if min(row.seed, row.parameters, row.updates, row.seconds) < 0 or not is_number(row.seconds):
        return "a counter in it is negative"
    if not all(isinstance(label, str) for label in row.labels.values()):
        return "a label in it is no text"
    if not (is_curve([row.metrics]) and is_curve(row.curve)):
        return "a metric in it is no number"
    if checksum not in (None, fingerprint(row.details)):
        return "its details were changed since it was written (their checksum differs)"
    return None


JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "Mapping": (dict,),
    "Sequence": (list,),
}
"""What JSON may hold for a field of `Result`, by its annotation."""


LARGEST_NUMBER = 1e300


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


def is_curve(points: object) -> bool:
    """Whether it is a list of numbers (not finite ones, too) by name, as `Result.curve` is."""
    return isinstance(points, (list, tuple)) and all(
        isinstance(point, dict) and all(type(v) is float or is_number(v) for v in point.values())
        for point in points
    )


def read_results(folder: Path, task: str | None = None) -> list[Result]:
    """The rows of all runs below a folder, in order of name and seed.

    Raises:
        ValueError: naming a file that is no row.
    """
    rows = [read_result(path) for path in sorted(folder.rglob(RESULT_FILE))]
    wanted = [row for row in rows if task is None or row.task == task]
    return sorted(wanted, key=lambda row: (row.name, row.seed))


class Summary(NamedTuple):
    """A metric over seeds."""

    mean: float
    std: float
    """Of the population (ddof 0), as the continual-learning literature prints it."""
    values: list[float]
    """In the order of the rows."""

    def __str__(self) -> str:
        return f"{number(self.mean)} +- {self.std:.2g} ({len(self.values)})"


def summarise(rows: Iterable[Result], metric: str) -> Summary | None:
    """Mean and spread over the rows that have the metric; None if none has."""
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.pstdev(values), values)


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
    paper: Callable[[str], str | None] | None = None,
) -> str:
    """A Markdown table: a line for each recipe, with mean and spread of metrics over its seeds.

    Args:
        rows: of any number of recipes.
        metrics: columns.
        paper: what the paper prints for a recipe, by its name; None for no such column.
    """
    lines = []
    for name, group in by_name(rows).items():
        summaries = [summarise(group, metric) for metric in metrics]
        seeds = " ".join(str(row.seed) for row in group)
        printed = [] if paper is None else [paper(name)]
        lines.append([name, f"{group[0].parameters:,}", seeds, *summaries, *printed])
    last = [] if paper is None else ["paper"]
    return markdown(["recipe", "parameters", "seeds", *metrics, *last], lines)


def count_parameters(model: torch.nn.Module) -> int:
    """Frozen ones and frozen slots included, other buffers not."""
    memories = [module for module in model.modules() if isinstance(module, SlotMemory)]
    buffers = [buffer for memory in memories for buffer in memory.buffers()]
    frozen = sum(buffer.numel() for buffer in buffers if buffer.is_floating_point())
    return frozen + sum(parameter.numel() for parameter in model.parameters())


def command_line() -> str:
    """The command that this process was started with."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = "" if main is None else main.name.removesuffix(".__main__")
    program = f"-m {name}" if name else sys.argv[0]
    return " ".join(["python", program, *sys.argv[1:]])
