"""Tables 1, 6 and 7 of the paper: their cells, what it prints in them, and what we measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncrl.tasks.figures import save_figure
from ncrl.tasks.results import Result, markdown, mean_and_spread, summarise

Groups = defaultdict[tuple[str, ...], list[Result]]  # rows by scenario, method and layer
SCENARIO = {1: "domain", 6: "task", 7: "domain"}  # by number of the table
REPEATS = {"domain": 5, "task": 3}  # of every cell; the paper has 10


class Layers(NamedTuple):
    """What all layers of a network are."""

    name: str  # in tables and rows
    variant: str  # of the recipe
    rank: int | None = None  # of hidden layers that have a static one


def static_rank(rank: int) -> Layers:
    """A control: a plain network whose hidden layers have a low rank whatever the input."""
    return Layers(f"rank {rank}", "linear_400", rank)


LAYERS = {
    layers.name: layers
    for layers in (
        Layers("mlp", "linear_400"),
        Layers("official", "official_logs"),
        Layers("paper", "tuned"),
        static_rank(1),
        static_rank(50),
        Layers("paper residual", "tuned_residual"),
        Layers("official residual", "official_logs_residual"),
        Layers("nsm", "nsm_400"),
    )
}
"""The paper's, and the static controls. Table 1 has the first five: without residual, and what
explains them."""


class Cell(NamedTuple):
    """A place in a table."""

    scenario: str
    method: str
    layers: Layers

    @property
    def labels(self) -> dict[str, str]:
        """Those of the rows that fill it."""
        return {"scenario": self.scenario, "method": self.method, "layer": self.layers.name}

    @property
    def name(self) -> str:
        """The name of the runs that fill it."""
        return " ".join(self.labels.values())


def layers_of(number: int) -> list[str]:
    """The layers of a table."""
    return list(LAYERS)[: 5 if number == 1 else None]


def cells(number: int) -> list[Cell]:
    """All cells of a table, those that say most first."""
    found = product(layers_of(number), METHODS)
    return [Cell(SCENARIO[number], method, LAYERS[layer]) for layer, method in found]


PRINTED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "task": {
        "adam": ("93.46±2.01", "93.75±3.28", "87.55±4.38", "94.91±3.29", "96.54±1.39"),
        "adagrad": ("98.06±0.53", "98.02±0.89", "96.63±1.49", "98.04±0.85", "99.01±0.19"),
        "l2": ("98.18±0.96", "98.14±0.43", "91.44±3.80", "98.13±0.81", "98.35±0.74"),
        "si": ("98.56±0.49", "98.69±0.20", "98.87±0.20", "98.72±0.21", "99.14±0.24"),
        "ewc": ("97.70±0.81", "97.00±1.10", "93.94±2.36", "97.04±0.07", "97.88±0.22"),
        "online-ewc": ("98.04±1.10", "98.23±1.17", "96.11±1.27", "98.27±1.73", "98.30±1.48"),
    },
    "domain": {
        "adam": ("55.16±1.38", "53.55±1.27", "54.85±2.81", "54.72±1.37", "58.46±0.46"),
        "adagrad": ("58.08±1.06", "57.83±2.74", "58.42±1.87", "58.59±2.38", "62.28±4.03"),
        "l2": ("66.00±3.73", "64.37±2.40", "62.83±7.21", "64.18±1.33", "69.89±1.72"),
        "si": ("64.76±3.09", "64.41±3.36", "64.36±2.99", "65.98±4.74", "67.96±3.22"),
        "ewc": ("58.85±2.59", "58.41±2.37", "58.12±3.24", "60.82±2.63", "65.66±1.25"),
        "online-ewc": ("57.33±1.44", "57.78±1.84", "58.55±3.40", "65.17±2.45", "73.97±1.50"),
    },
}
"""The paper's Tables 6 and 7, 10 runs: Hsu et al.'s MLP, its MLP, NSM, Neurocoder with and without
residual."""

METHODS = tuple(PRINTED["domain"])  # the paper's; there may be others
# Position in `PRINTED` by layer; what the paper calls Neurocoder stands beside both variants.
PRINTED_AS = {
    **{"hsu": 0, "mlp": 1, "nsm": 2, "paper residual": 3, "paper": 4},
    **{"official residual": 3, "official": 4},
}
# The authors' own logs of the domain scenario, 10 runs, by layer and method.
LOGGED: Mapping[str, Mapping[str, str]] = {
    "mlp": {
        "adam": "53.38±1.39",
        "adagrad": "56.16±1.79",
        "l2": "63.27±3.94",
        "ewc": "56.88±2.18",
        "online-ewc": "59.64±3.13",
    },
    "official": {
        "adam": "57.07±0.45",
        "adagrad": "60.60±0.49",
        "si": "diverged",
        "ewc": "62.56±1.07",
        "online-ewc": "71.79±2.04",
    },
}


def printed(scenario: str, method: str, layer: str) -> str | None:
    """What the paper prints in a cell."""
    place = PRINTED_AS.get(layer)
    values = PRINTED[scenario].get(method)
    return None if place is None or values is None else values[place]


def by_cell(rows: Iterable[Result], *, changes: bool = False) -> Groups:
    """Rows by scenario, method and layer, or the layer with what flags changed."""
    groups: Groups = defaultdict(list)
    for row in rows:
        labels = row.labels
        layer = changed_layer(row) if changes else labels["layer"]
        groups[labels["scenario"], labels["method"], layer].append(row)
    return groups


def changed_layer(row: Result) -> str:
    """The layer of a row, and behind it what flags changed."""
    return " ".join(filter(None, (row.labels["layer"], row.labels.get("changes"))))


def table(number: int, rows: Sequence[Result], changed: str = "") -> str:
    """The paper's Table 1, 6 or 7 as Markdown, a line for every cell, with its heading, which says
    what is not as in the tables' recipes; rows may be of any scenarios, methods and layers."""
    scenario = SCENARIO[number]
    repeats = REPEATS[scenario]
    found = by_cell(rows)
    wanted = [found[cell.scenario, cell.method, cell.layers.name] for cell in cells(number)]
    seeds = sorted({*range(repeats), *(row.seed for group in wanted for row in group)})
    filled = sum(set(range(repeats)) <= {row.seed for row in group} for group in wanted)
    said = [changed.strip()] if changed else []
    if filled < len(wanted):
        said.append(f"{filled} of {len(wanted)} cells have all {repeats} seeds")
    lines = []
    for method in METHODS:
        for layer in layers_of(number):
            group = found[scenario, method, layer]
            ours = _measured(group, seeds) if group else [None] * 9
            log = LOGGED.get(layer, {}).get(method) if scenario == "domain" else None
            hsu = printed(scenario, method, "hsu") if layer == "mlp" else None
            lines.append([method, layer, *ours, printed(scenario, method, layer), log, hsu])
    shown = "0, 1, ..." if seeds == list(range(len(seeds))) else ", ".join(map(str, seeds))
    header = (
        *("method", "layer", "parameters", "accuracy", f"seeds {shown}", "learn", "failed"),
        *("forgetting", "transfer", "rank", "attention", "paper", "authors' log", "Hsu"),
    )
    title = "; ".join([f"Table {number}, incremental {scenario}", *said])
    return f"{title}\n\n{markdown(header, lines)}"


MISSING = "-"  # in place of the accuracy with a seed that has not been run, or diverged


def _measured(group: Sequence[Result], seeds: Sequence[int]) -> list[str | None]:
    by_seed = {row.seed: f"{row.metrics['accuracy']:.1f}" for row in group}
    failed = sum(row.metrics["failed_tasks"] > 0 for row in group)
    return [
        f"{group[0].parameters:,}",
        mean_and_spread(group, "accuracy", ".1f"),
        " ".join(by_seed.get(seed, MISSING) for seed in seeds),
        mean_and_spread(group, "learn", ".1f"),
        f"{failed} of {len(group)}",
        *(mean_and_spread(group, name, ".1f") for name in ("forgetting", "transfer")),
        *(
            f"{summary.mean:.{digits}f}" if (summary := summarise(group, name)) else None
            for name, digits in (("rank", 1), ("attention", 3))
        ),
    ]


NAMES = {
    **{"mlp": "plain MLP", "nsm": "NSM"},
    **{"official": "authors' layer", "official residual": "authors' layer, residual"},
    **{"paper": "the paper's equations", "paper residual": "the paper's equations, residual"},
}
COLORS = {"official": "C0", "official residual": "C0", "paper": "C2", "paper residual": "C2"}
WITH_RESIDUAL = ("paper residual", "official residual", "nsm")


def draw(path: Path, rows: Sequence[Result]) -> None:
    """Accuracy by method, a line of panels for each scenario: the MLP as a band, layers with a
    residual in a panel of their own, what the paper prints as hollow points.

    What the flags of the command have changed has points of its own.
    """
    found = by_cell(rows, changes=True)
    scenarios = [s for s in REPEATS if any(scenario == s for scenario, _, _ in found)]
    methods = _in_order((method for _, method, _ in found), METHODS)
    kinds = {changed_layer(row): row.labels["layer"] for row in rows}
    layers = [layer for layer in _in_order(kinds, LAYERS) if layer != "mlp"]
    with_residual = [layer for layer in layers if kinds[layer] in WITH_RESIDUAL]
    without = [layer for layer in layers if layer not in with_residual]
    panels = {"without residual": without, "with residual, and NSM": with_residual}
    panels = {title: names for title, names in panels.items() if names} or {"MLP": []}
    size = 5 * len(panels), 3.5 * len(scenarios)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(scenarios), len(panels), sharex=True, sharey="row", squeeze=False)
    for line, scenario in zip(grid, scenarios, strict=True):
        data = next(row.data for row in rows if row.labels["scenario"] == scenario)
        for axes, (title, names) in zip(line, panels.items(), strict=True):
            for place, layer in enumerate(("mlp", *names)):
                groups = {method: found.get((scenario, method, layer), []) for method in methods}
                _draw_layer(axes, scenario, layer, groups, 0.2 * (place - (len(names) + 1) / 2))
            axes.set_xticks(range(len(methods)), methods)
            axes.set_title(f"split {data}, {scenario} scenario: {title}", fontsize=10)
            axes.grid(axis="y", alpha=0.3)
        line[0].set_ylabel("accuracy after five tasks, %")
    for axes, names in zip(grid[0], panels.values(), strict=True):
        if any(printed(*cell) for cell in found if cell[2] in names):
            axes.plot([], [], "o", mfc="none", mec="0.3", label="hollow: what the paper prints")
        axes.legend(fontsize=8, loc="upper left", ncols=2).set_in_layout(False)  # long names
        axes.set_ylim(top=102)
    save_figure(figure, path)


def _in_order(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Names, once each: first those of `order`, in that."""
    there = dict.fromkeys(names)
    return list(dict.fromkeys([*(name for name in order if name in there), *there]))


def _draw_layer(
    axes: Axes, scenario: str, layer: str, groups: Mapping[str, Sequence[Result]], shift: float
) -> None:
    """Mean and standard deviation over seeds by method."""
    summaries = {
        x: summary
        for x, group in enumerate(groups.values())
        if (summary := summarise(group, "accuracy"))
    }
    if not summaries:
        return
    kind = next(row for group in groups.values() for row in group).labels["layer"]
    label = NAMES.get(kind, f"static {kind}") + layer.removeprefix(kind)
    at = np.array([*summaries])
    mean = np.array([summary.mean for summary in summaries.values()])
    std = np.array([summary.std for summary in summaries.values()])
    if layer == "mlp":
        axes.plot(at, mean, ".-", color="0.35", linewidth=1.2, markersize=3, label=label)
        axes.fill_between(at, mean - std, mean + std, color="0.85")
        return
    color = COLORS.get(kind, f"C{4 + len(axes.containers)}")
    axes.errorbar(at + shift, mean, std, label=label, color=color, fmt="o", capsize=2, markersize=5)
    for x, method in enumerate(groups):
        if (text := printed(scenario, method, layer)) is not None:
            value = float(text.partition("±")[0])
            axes.plot(x + shift, value, "o", mfc="none", mec=color, markersize=6)


# Per cent: ends of the axis of errors, which is logarithmic because most networks learn well.
LEAST_ERROR, MOST_ERROR = 0.2, 60.0


class Point(NamedTuple):
    """Means over seeds, per cent, under one coefficient."""

    coef: float
    learn: float
    accuracy: float


def curves(rows: Sequence[Result]) -> Mapping[str, Mapping[str, list[Point]]]:
    """Points in the order of the coefficient, by scenario and method, then by layer."""
    found: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for (scenario, method, layer), group in by_cell(rows, changes=True).items():
        points = []
        for coef in sorted({row.recipe["penalty_coef"] for row in group}):
            metrics = [row.metrics for row in group if row.recipe["penalty_coef"] == coef]
            means = (fmean(own[name] for own in metrics) for name in ("learn", "accuracy"))
            points.append(Point(coef, *means))
        found[f"{scenario} {method}"][layer] = points
    return found


def draw_tradeoff(path: Path, rows: Sequence[Result]) -> None:
    """What the weight of a penalty trades, for each scenario and method: accuracy after all tasks
    over the error on each right after training on it, with the coefficients beside the points.

    A network that learns nothing forgets nothing, so that methods and layers compare only where
    they have learnt equally well.
    """
    found = curves(rows)
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.2 * columns, 4 * lines), layout="constrained")
    layers = list(dict.fromkeys(layer for by_layer in found.values() for layer in by_layer))
    lowest = min(row.metrics["accuracy"] for row in rows)
    errors = [LEAST_ERROR * (MOST_ERROR / LEAST_ERROR) ** (i / 50) for i in range(51)]
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(found) :]:
        axes.remove()
    for axes, (where, by_layer) in zip(grid, found.items(), strict=False):
        for layer, points in by_layer.items():
            style: Any = {"color": f"C{layers.index(layer)}"}
            x = [max(100 - point.learn, LEAST_ERROR) for point in points]
            y = [point.accuracy for point in points]
            axes.plot(x, y, "o-", markersize=4, linewidth=1, label=layer, **style)
            style |= {"fontsize": 6, "xytext": (3, 3), "textcoords": "offset points"}
            for point, error in zip(points, x, strict=True):
                axes.annotate(f"{point.coef:g}", (error, point.accuracy), **style)
        axes.plot(errors, [100 - error for error in errors], color="0.8", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlim=(LEAST_ERROR, MOST_ERROR), ylim=(lowest - 3, 101))
        axes.set(xlabel="error on a task right after training, %", ylabel="accuracy at the end, %")
        axes.set_title(f"{where}; grey: nothing forgotten", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))
    save_figure(figure, path)
