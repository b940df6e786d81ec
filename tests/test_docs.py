"""The examples of docs/layers.md run as they stand there."""

import re
from pathlib import Path

import pytest

from ncrl.agents.atari.config import RunConfig, head_options, with_game
from ncrl.layers import LAYERS, make_layer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "layers.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = {
    TEXT[: match.start()].count("\n") + 2: match[1]
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
}
"""Python examples by the line on which their code begins."""


@pytest.mark.parametrize("line", BLOCKS)
def test_an_example_runs(line: int) -> None:
    # Blank lines before it make the page's own line numbers appear in tracebacks.
    source = "\n" * (line - 1) + BLOCKS[line]
    exec(compile(source, str(PAGE), "exec"), {"__name__": "example"})


def test_no_example_is_missed() -> None:
    assert len(BLOCKS) == TEXT.count("```python") == TEXT.count("```") / 2 >= 6


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_on_the_page(name: str) -> None:
    layer = type(make_layer(name, 4, 3))
    assert layer.__name__ in TEXT
    if layer.__module__.startswith("ncrl."):
        assert any(f"{layer.__name__}(" in block for block in BLOCKS.values())


@pytest.mark.parametrize("name", LAYERS)
def test_the_sizes_of_heads_are_right(name: str) -> None:
    names, _, sizes = re.search(r"512 -> 18.*?\n\n(.*?)\n\n", TEXT, re.DOTALL)[1].splitlines()
    stated = dict(zip(names.split(" | "), sizes.split(" | "), strict=True))
    stated = {key.strip("| "): value.strip("| ") for key, value in stated.items()}
    layer = make_layer(name, 512, 18, **head_options(with_game(RunConfig(env="Pong", layer=name))))
    assert stated[name] == f"{sum(p.numel() for p in layer.parameters()):,}"
