"""Parameters of the paper's networks beside its Table 9: `python -m ncrl.tasks.parameters`.

Networks are built on torch's meta device, where parameters have sizes but no numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ncrl.settings import make_parser, parse, usage_error
from ncrl.tasks.recipes import CONFIGS, Recipe, count_parameters, outline_network, read_recipes
from ncrl.tasks.results import markdown, program

# Relative difference up to which a count of Table 9, printed with two digits, is reproduced.
TOLERANCE = 0.05


class ParameterCount(NamedTuple):
    """One recipe beside what the paper prints for it."""

    name: str  # file, and after a colon the variant
    recipe: Recipe
    parameters: int

    @property
    def difference(self) -> float | None:
        """Relative to the paper's count; None where it prints none."""
        paper = self.recipe.paper_parameters
        return None if paper is None else self.parameters / paper - 1

    @property
    def reached(self) -> bool:
        """Whether the paper's count is reproduced, if it prints one."""
        return self.difference is None or abs(self.difference) <= TOLERANCE


def count_file(path: Path) -> list[ParameterCount]:
    """The counts of every recipe in a file."""
    counts = []
    for variant, recipe in read_recipes(path).items():
        name = f"{path.name}: {variant}" if variant else path.name
        try:
            counts.append(ParameterCount(name, recipe, count_parameters(outline_network(recipe))))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return counts


def table(counts: Sequence[ParameterCount]) -> str:
    """A line for each, as Markdown."""
    lines = [
        [
            count.name,
            count.recipe.network,
            count.recipe.layer,
            f"{count.parameters:,}",
            None if count.recipe.paper_parameters is None else short(count.recipe.paper_parameters),
            None if count.difference is None else f"{count.difference:+.1%}",
            ": ".join(filter(None, ["" if count.reached else "not reached", count.recipe.note])),
        ]
        for count in counts
    ]
    header = ["recipe", "network", "layer", "parameters", "paper", "difference", "remark"]
    return markdown(header, lines)


def short(count: float) -> str:
    """A count as the paper prints it: 7.3K, 255K, 12.6M."""
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.4g}K"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = make_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.prog = program("parameters")
    every, said = sorted(CONFIGS.glob("*.yaml")), "recipes (default: all of configs/tasks/)"
    parser.add_argument("configs", nargs="*", type=Path, default=every, help=said)
    options = parse(parser, sys.argv[1:] if arguments is None else arguments)
    try:
        counts = [count for path in options["configs"] for count in count_file(path)]
    except ValueError as error:
        usage_error(parser.prog, str(error))
    print(table(counts))
    missed = sum(not count.reached for count in counts)
    printed = sum(count.difference is not None for count in counts)
    said = f"recipes reach the paper's count within {TOLERANCE:.0%}."
    print(f"\n{printed - missed} of {printed} {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
