"""What legends of figures say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ncrl.tasks.figures import draw_curves
from ncrl.tasks.results import Result
from ncrl.tasks.split_mnist import tables

ROW = Result(
    task="split_mnist",
    name="toy",
    seed=0,
    layer="neurocoder",
    parameters=10,
    metrics={"accuracy": 70.0},
    data="digits",
    updates=2,
    seconds=1.0,
    recipe={},
    curve=[{"update": 2, "accuracy": 70.0}],
)


def test_a_legend_says_the_layer_of_a_recipe_without_a_name() -> None:
    axes = Figure().subplots()
    named = replace(ROW, name="toy linear", layer="linear", labels={"variant": "linear"})
    at_the_top = replace(ROW, name="toy epochs=1", labels={"variant": ""})
    draw_curves(axes, [at_the_top, named, replace(ROW, name="x")], "accuracy")
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["toy epochs=1, neurocoder", "toy linear", "x"]


@pytest.mark.parametrize("changes", ["", "epochs=1"])
def test_hollow_points_are_named_where_there_are_some(
    changes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(tables, "save_figure", lambda figure, _: figures.append(figure))
    labels = {"scenario": "domain", "method": "online-ewc", "changes": changes}
    rows = [replace(ROW, labels=labels | {"layer": layer}) for layer in ("paper", "rank 1")]
    tables.draw(Path("unused.png"), rows)
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["online-ewc"], "what was run"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    points = [line.get_xydata() for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert sum(map(np.size, points)) == (0 if changes else 2), "x and y of one"
    assert ("hollow: what the paper prints" in legend) == (not changes)
    said = f" {changes}" if changes else ""
    assert {f"the paper's equations{said}", f"static rank 1{said}"} <= set(legend)


def test_hollow_points_are_named_in_the_panel_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plain MLP has none, though the paper prints its accuracies too."""
    figures: list[Figure] = []
    monkeypatch.setattr(tables, "save_figure", lambda figure, _: figures.append(figure))
    labels = {"scenario": "domain", "method": "ewc", "changes": ""}
    layers = ("mlp", "rank 1", "paper residual")
    rows = [replace(ROW, labels=labels | {"layer": layer}) for layer in layers]
    tables.draw(Path("unused.png"), rows)
    legends = [axes.get_legend_handles_labels()[1] for axes in figures[0].axes]
    said = "hollow: what the paper prints"
    assert [said in legend for legend in legends] == [False, True]
