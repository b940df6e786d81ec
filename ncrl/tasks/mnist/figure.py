"""The paper's Figure 2a-c: error against J, attention maps, and the tree that attention makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ncrl.tasks.figures import draw_map, save_figure
from ncrl.tasks.results import Result, by_name, summarise


def draw(path: Path, rows: Sequence[Result], maps: Sequence[Result], images: Tensor) -> None:
    """Draw all three parts.

    Args:
        path: file to write.
        rows: of Neurocoder with several J, and of the linear classifier.
        maps: rows with attention maps; the last one makes the tree.
        images: an example of every digit, [10, height, width], the one whose attention is shown.

    Raises:
        ValueError: if the file cannot be written.
    """
    figure: Any = Figure(figsize=(11, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.6))
    draw_errors(left, rows)
    draw_tree(right, maps[-1].details["tree"])
    right.set_title(f"tree of attention patterns, {_sizes(maps[-1])}", fontsize=9)
    _draw_maps(bottom, maps, images)
    save_figure(figure, path)


def draw_errors(axes: Axes, rows: Sequence[Result]) -> None:
    """Test error against J, with every seed as a point, and the linear classifier as a line."""
    coded: list[tuple[int, list[Result]]] = []
    for group in by_name(rows).values():
        summary = summarise(group, "error")
        if summary is None:
            continue
        if group[0].layer == "neurocoder":
            coded.append((int(group[0].recipe["layer_options"]["num_steps"]), group))
        else:
            label = f"{group[0].layer}, {group[0].parameters:,} parameters"
            axes.axhline(summary.mean, linestyle="--", color="gray", label=label)
            axes.axhspan(
                summary.mean - summary.std, summary.mean + summary.std, color="gray", alpha=0.2
            )
    coded.sort(key=lambda pair: pair[0])
    if coded:
        steps = [j for j, _ in coded]
        summaries = [s for _, group in coded if (s := summarise(group, "error")) is not None]
        sizes = sorted({group[0].parameters for _, group in coded})
        label = f"Neurocoder, {' to '.join(f'{size:,}' for size in sizes)} parameters"
        means, stds = [s.mean for s in summaries], [s.std for s in summaries]
        axes.errorbar(steps, means, stds, marker="o", capsize=3, label=label)
        for j, summary in zip(steps, summaries, strict=True):
            axes.plot([j] * len(summary.values), summary.values, ".", color="black", markersize=3)
        axes.set_xticks(steps)
    seeds = len({row.seed for row in rows})
    axes.set_xlabel("composition steps J")
    axes.set_ylabel(f"test error, % ({seeds} seed{'s' if seeds > 1 else ''})")
    axes.set_title(rows[0].data, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def draw_tree(axes: Axes, tree: Mapping[str, Any]) -> None:
    """Nodes with the digits that share a path; components from top to bottom."""
    axes.axis("off")
    leaves = _count_leaves(tree)
    _draw_node(axes, tree, 0.0, float(leaves), 0, None)


def _count_leaves(node: Mapping[str, Any]) -> int:
    return sum(_count_leaves(child) for child in node["children"]) if node["children"] else 1


def _draw_node(
    axes: Axes,
    node: Mapping[str, Any],
    left: float,
    right: float,
    depth: int,
    above: tuple[float, float] | None,
) -> None:
    x, y = (left + right) / 2, -float(depth)
    if above is not None:
        axes.plot([above[0], x], [above[1], y], color="gray", linewidth=1, zorder=1)
    text = " ".join(map(str, node["digits"]))
    axes.text(
        x,
        y,
        re.sub(r"((?:\d ){4}\d) ", r"\1\n", text),
        ha="center",
        va="center",
        fontsize=8,
        bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "gray"},
    )
    begin = left
    for child in node["children"]:
        width = (right - left) * _count_leaves(child) / _count_leaves(node)
        _draw_node(axes, child, begin, begin + width, depth + 1, (x, y))
        begin += width


def _draw_maps(figure: Any, maps: Sequence[Result], images: Tensor) -> None:
    """A column for each digit: the image, then for every row its attention and the class's."""
    grid = figure.subplots(
        1 + 2 * len(maps), len(images), squeeze=False, height_ratios=[1] + [1.2] * (2 * len(maps))
    )
    for digit, image in enumerate(images.numpy()):
        grid[0, digit].imshow(image, cmap="gray_r")
        grid[0, digit].axis("off")
    for index, row in enumerate(maps):
        shown = row.details["maps"]
        largest = float(np.max([shown["mean"], shown["example"]]))
        for offset, (kind, said) in enumerate((("example", "this image"), ("mean", "class mean"))):
            line = grid[1 + 2 * index + offset]
            for digit in range(len(images)):
                draw_map(line[digit], shown[kind][digit], largest)
            line[0].set_ylabel(f"{_sizes(row)}\n{said}", fontsize=7)
    figure.supxlabel("attention w^u: components to the right, slots upwards", fontsize=8)


def _sizes(row: Result) -> str:
    options = row.recipe["layer_options"]
    return f"P={options['num_slots']} J={options['num_steps']} H={options['num_heads']}"
