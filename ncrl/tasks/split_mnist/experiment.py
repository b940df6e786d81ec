"""Split MNIST: five tasks of two digits, learnt one after the other (paper, Tables 1, 6 and 7).

python -m ncrl.tasks.split_mnist --method online-ewc --layer linear neurocoder --repeats 5
python -m ncrl.tasks.split_mnist --tables --data-dir ~/data --figure split_mnist.png
python -m ncrl.tasks.split_mnist --method ewc --layer linear lowrank --penalty-coef 1 10 100
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from ncrl.checks import require_range
from ncrl.shell.screen import say
from ncrl.tasks.command import (
    NamedRecipe,
    Session,
    chosen,
    named_recipes,
    run_command,
    task_parser,
)
from ncrl.tasks.continual.methods import METHODS
from ncrl.tasks.continual.split import (
    COEFS,
    METRICS,
    SplitLearning,
    check_penalty_coef,
    method_changes,
    says_length,
    split_tasks,
)
from ncrl.tasks.data import load_mnist
from ncrl.tasks.recipes import CONFIGS, SCENARIOS, ContinualRecipe, read_recipes
from ncrl.tasks.results import Result, results_table
from ncrl.tasks.split_mnist import tables
from ncrl.tasks.split_mnist.tables import Cell, Layers, static_rank
from ncrl.yaml_files import find_config

CONFIG = "split_mnist.yaml"

LAYERS = ("linear", "lowrank", "nsm", "neurocoder")
VARIANTS = ("paper", "official")

ONLY = {"variant": "neurocoder", "residual": "neurocoder", "sharpness": "neurocoder"}
ONLY |= {"rank": "lowrank"}
"""The layer that a flag is for."""

QUIRKS = ("fisher_orthogonality", "double_orth_coef")
OFFICIAL = ("official", "official residual")
"""The layers that have quirks."""

# On the embedded digits, where the protocol's 4 epochs would be 12 updates for a task.
DIGITS_EPOCHS = 40
MOST_REPEATS = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the flags say and print rows and tables; returns the exit code."""
    return run_command("split_mnist", make_parser(), arguments, work)


def make_parser() -> argparse.ArgumentParser:
    """The flags that all task commands have, and those of this one."""
    parser = task_parser("split_mnist", __doc__)
    own = parser.add_argument_group("split MNIST")
    # Variant and layer mean something else here.
    parser.conflict_handler = own.conflict_handler = "resolve"
    add, both = own.add_argument, argparse.BooleanOptionalAction

    def several(flag: str, text: str, kind: type = str) -> None:
        metavar = "NAME" if kind is str else kind.__name__.upper()
        add(flag, nargs="+", type=kind, metavar=metavar, help=text)

    several("--scenario", f"{' or '.join(SCENARIOS)} (default: domain)")
    several("--method", f"{', '.join(METHODS)} (default: adam)")
    several("--layer", f"{', '.join(LAYERS)} (default: neurocoder)")
    several("--variant", "neurocoder: paper (default) or official")
    add("--residual", action=both, help="neurocoder: with the residual program (default: without)")
    add("--sharpness", type=float, metavar="FLOAT", help="neurocoder: in place of the recipe's")
    several("--rank", "lowrank: of hidden layers (default: 1)", int)
    said = "in place of Hsu et al.'s; with several, --figure draws what they trade"
    several("--penalty-coef", said, float)
    said = "official: orthogonality gradients in the Fisher information (default: with)"
    add("--fisher-orthogonality", action=both, help=said)
    said = "official: twice the orth_coef from task 2 on, under a penalty (default: with)"
    add("--double-orth-coef", action=both, help=said)
    add("--repeats", type=int, metavar="INT", help="seeds 0 to INT - 1, in place of --seeds")
    said = "fill Tables 1, 6 and 7, or some of them: every method, layer and control"
    repeats = f"{tables.REPEATS['domain']} repeats (domain) or {tables.REPEATS['task']} (task)"
    some: dict[str, Any] = {"nargs": "*", "type": int, "choices": tables.SCENARIO, "metavar": "INT"}
    add("--tables", help=f"{said}, {repeats}", **some)
    return parser


def work(session: Session) -> None:
    """Train and show what the flags say."""
    flags = session.flags
    groups = table_cells(flags) if "tables" in flags else [(cells(flags), None)]
    coefs: list[float | None] = list(dict.fromkeys(flags.get("penalty_coef", [])))
    every = [cell for own, _ in groups for cell in own]
    data = load_mnist(session.data_dir, download=session.download)

    def recipes(cell: Cell) -> list[NamedRecipe]:
        """One for each coefficient, where the method has a penalty."""
        own = coefs if coefs and cell.method in COEFS[cell.scenario] else [None]
        return [recipe_of(cell, flags, data.is_embedded, coef, every) for coef in own]

    wanted = [([one for cell in own for one in recipes(cell)], repeats) for own, repeats in groups]
    say(f"data: {data.source}")
    if data.is_embedded and not says_length(flags):
        say(f"{DIGITS_EPOCHS} epochs for each task: the protocol's 4 are for MNIST's size")
    tasks = split_tasks(data.to(session.device))

    def make(recipe: ContinualRecipe, seed: int, _device: torch.device) -> SplitLearning:
        return SplitLearning(recipe, tasks, data.name, seed, data.readings)

    rows: list[Result] = []
    for group, repeats in wanted:
        rows += session.run(group, make, seeds=seeds(session, repeats))
    if "tables" in flags:
        labels = [named.labels for group, _ in wanted for named in group]
        changed = sorted({*map(changes_of, labels)} - {""})
        for number in chosen_tables(flags):
            say(f"\n{tables.table(number, rows, ','.join(changed))}")
    else:
        say(f"\n{results_table(rows, METRICS)}")
    if session.figure is not None and rows:
        draw = tables.draw if len(coefs) < 2 else tables.draw_tradeoff
        draw(session.figure, rows)


def seeds(session: Session, repeats: int | None) -> list[int]:
    """The seeds that flags name, else as many as the table has, else 0 alone."""
    if "repeats" in session.flags:
        if "seeds" in session.flags:
            raise ValueError("--repeats and --seeds exclude each other")
        count = session.flags["repeats"]
        require_range("--repeats", count, 1, MOST_REPEATS)
        return list(range(count))
    return session.seeds if "seeds" in session.flags or repeats is None else list(range(repeats))


# From flags to recipes


def cells(flags: Mapping[str, Any]) -> list[Cell]:
    """All combinations that the flags name."""
    path = find_config(flags.get("config", CONFIG), CONFIGS)
    top = read_recipes(path)[""]
    if not isinstance(top, ContinualRecipe):
        raise ValueError(f"{path} is for network {top.network}, expected split_mlp")
    scenarios = chosen(flags, "scenario", SCENARIOS, [top.scenario])
    methods = chosen(flags, "method", list(METHODS), [top.method or "adam"])
    layers = chosen(flags, "layer", LAYERS, ["neurocoder"])
    variants = chosen(flags, "variant", VARIANTS, ["paper"])
    for name, layer in ONLY.items():
        if name in flags and layer not in layers:
            raise ValueError(f"--{name} needs --layer {layer}, got {', '.join(layers)}")
    for name in QUIRKS:
        if name in flags and ("official" not in variants or "neurocoder" not in layers):
            raise ValueError(f"--{name.replace('_', '-')} needs --variant official")
    check_penalty_coef(flags, methods)
    every: list[Layers] = []
    for layer in layers:
        if layer == "neurocoder":
            residual = " residual" if flags.get("residual") else ""
            every += [tables.LAYERS[f"{variant}{residual}"] for variant in variants]
        elif layer == "lowrank":
            every += map(static_rank, dict.fromkeys(flags.get("rank", [1])))
        else:
            every.append(tables.LAYERS["mlp" if layer == "linear" else layer])
    if "grow" in methods and every != [tables.LAYERS["paper"]]:
        raise ValueError("--method grow needs --layer neurocoder --variant paper --no-residual")
    return [Cell(*which) for which in product(scenarios, methods, every)]


def table_cells(flags: Mapping[str, Any]) -> list[tuple[list[Cell], int | None]]:
    """The cells of the tables, by scenario, with their repeats."""
    for name in ("scenario", "method", "layer", *ONLY):
        if name in flags:
            raise ValueError(f"--{name} and --tables exclude each other: tables have every cell")
    if len(flags.get("penalty_coef", [])) > 1:
        raise ValueError("--tables takes one --penalty-coef: a cell has place for one")
    groups: dict[str, dict[Cell, None]] = {}
    for number in chosen_tables(flags):
        groups.setdefault(tables.SCENARIO[number], {}).update(dict.fromkeys(tables.cells(number)))
    return [(list(group), tables.REPEATS[scenario]) for scenario, group in groups.items()]


def chosen_tables(flags: Mapping[str, Any]) -> list[int]:
    """Numbers of the tables to fill."""
    return list(dict.fromkeys(flags["tables"] or tables.SCENARIO))


def variant_of(cell: Cell) -> str:
    """The variant of the recipe that a cell begins with."""
    return "grow" if cell.method == "grow" else cell.layers.variant


def recipe_of(
    cell: Cell,
    flags: Mapping[str, Any],
    is_digits: bool = False,
    coef: float | None = None,
    beside: Sequence[Cell] = (),
) -> NamedRecipe:
    """The recipe of a cell of a table, with what the flags change, and a name that says so; `coef`
    is the weight of the penalty, in place of Hsu et al.'s. Options may be those of cells `beside`
    it."""
    variants = list(dict.fromkeys(map(variant_of, (cell, *beside))))
    shared = {key: value for key, value in flags.items() if key != "layer"}
    base, *_ = named_recipes({**shared, "variant": variants}, CONFIG)
    said, recipe = base.labels["changes"], base.recipe
    changes, coef_said = method_changes(recipe, cell.scenario, cell.method, flags, coef)
    if is_digits and not says_length(flags):
        changes["epochs"] = DIGITS_EPOCHS
    network_options = dict(recipe.network_options)
    if cell.scenario == "task":
        network_options.setdefault("num_tasks", 5)
    if cell.layers.rank is not None:
        network_options["hidden_rank"] = cell.layers.rank
    if recipe.layer == "neurocoder" and "sharpness" in flags:
        changes["layer_options"] = {**recipe.layer_options, "sharpness": flags["sharpness"]}
        said += f" sharpness={flags['sharpness']:g}"
    for name in QUIRKS if cell.layers.name in OFFICIAL else ():
        changes[name] = flags.get(name, getattr(recipe, name))
        if not changes[name]:
            said += f" {name}=False"
    labels = {**cell.labels, "changes": said.strip(), "coef": coef_said}
    name = " ".join(filter(None, (cell.name, changes_of(labels))))
    recipe = dataclasses.replace(recipe, network_options=network_options, **changes)
    return NamedRecipe(name, recipe, labels)


def changes_of(labels: Mapping[str, str]) -> str:
    """What is not as in the tables' recipes."""
    return " ".join(filter(None, (labels["changes"], labels["coef"])))
