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

from ncrl.tasks.figures import save_figure
from ncrl.tasks.results import Result, Summary, by_name, summarise


def draw(path: Path, rows: Sequence[Result], maps: Sequence[Result], images: Tensor) -> None:
    """Draw all three parts.

    Args:
        path: file to write.
        rows: of Neurocoder with several J, and of the linear classifier.
        maps: rows with attention maps; the last one makes the tree.
        images: an example of every digit, [10, height, width], the one whose attention is shown.
    """
    figure: Any = Figure(figsize=(11, 8.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.6))
    draw_errors(left, rows)
    right.axis("off")
    tree = maps[-1].details["tree"]
    draw_tree(right, tree, 0.0, float(_count_leaves(tree)))
    right.set_title(f"tree of attention patterns, {_sizes(maps[-1])}", fontsize=9)
    _draw_maps(bottom, maps, images)
    save_figure(figure, path)


def draw_errors(axes: Axes, rows: Sequence[Result]) -> None:
    """Test error against J, with every seed as a point, and the linear classifier as a line."""
    coded: dict[int, Summary] = {}
    sizes = set()
    for group in by_name(rows).values():
        summary = summarise(group, "error")
        if summary is None:
            continue
        mean, std, _ = summary
        if group[0].layer == "neurocoder":
            coded[int(group[0].recipe["layer_options"]["num_steps"])] = summary
            sizes.add(group[0].parameters)
        else:
            label = f"{group[0].layer}, {group[0].parameters:,} parameters"
            axes.axhline(mean, linestyle="--", color="gray", label=label)
            axes.axhspan(mean - std, mean + std, color="gray", alpha=0.2)
    if coded:
        steps = sorted(coded)
        label = f"Neurocoder, {' to '.join(f'{size:,}' for size in sorted(sizes))} parameters"
        means, stds = [coded[j].mean for j in steps], [coded[j].std for j in steps]
        axes.errorbar(steps, means, stds, marker="o", capsize=3, label=label)
        for j, (_, _, values) in coded.items():
            axes.plot([j] * len(values), values, ".", color="black", markersize=3)
        axes.set_xticks(steps)
    seeds = len({row.seed for row in rows})
    axes.set_xlabel("composition steps J")
    axes.set_ylabel(f"test error, % ({seeds} seed{'s' if seeds > 1 else ''})")
    axes.set_title(rows[0].data, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def draw_tree(
    axes: Axes,
    node: Mapping[str, Any],
    left: float,
    right: float,
    depth: int = 0,
    above: tuple[float, float] | None = None,
) -> None:
    """A node with the digits that share a path, and its children below it, between two places."""
    x, y = (left + right) / 2, -float(depth)
    if above is not None:
        axes.plot([above[0], x], [above[1], y], color="gray", linewidth=1, zorder=1)
    digits = re.sub(r"((?:\d ){4}\d) ", r"\1\n", " ".join(map(str, node["digits"])))
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "gray"}
    axes.text(x, y, digits, ha="center", va="center", fontsize=8, bbox=box)
    for child in node["children"]:
        width = (right - left) * _count_leaves(child) / _count_leaves(node)
        draw_tree(axes, child, left, left + width, depth + 1, (x, y))
        left += width


def _count_leaves(node: Mapping[str, Any]) -> int:
    return sum(map(_count_leaves, node["children"])) if node["children"] else 1


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
                weights = np.asarray(shown[kind][digit]).T  # [P, R]
                options = {"aspect": "auto", "interpolation": "nearest", "origin": "lower"}
                line[digit].imshow(weights, vmin=0, vmax=largest, cmap="viridis", **options)
                line[digit].set(xticks=[], yticks=[])
            line[0].set_ylabel(f"{_sizes(row)}\n{said}", fontsize=7)
    figure.supxlabel("attention w^u: components to the right, slots upwards", fontsize=8)


def _sizes(row: Result) -> str:
    options = row.recipe["layer_options"]
    return f"P={options['num_slots']} J={options['num_steps']} H={options['num_heads']}"
