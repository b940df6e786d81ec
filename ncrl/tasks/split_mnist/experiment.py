"""Split MNIST: five tasks of two digits, learnt one after the other (paper, Tables 1, 6 and 7).

python -m ncrl.tasks.split_mnist --method online-ewc --layer linear neurocoder --repeats 5
python -m ncrl.tasks.split_mnist --tables --jobs 2 --data-dir ~/data --figure split_mnist.png
python -m ncrl.tasks.split_mnist --method ewc --layer linear lowrank --penalty-coef 1 10 100
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ncrl.shell.screen import say
from ncrl.tasks.command import (
    Plan,
    Session,
    check_range,
    chosen,
    find_config,
    plans,
    run_command,
    task_parser,
)
from ncrl.tasks.continual.split import COEFS, SplitLearning, Task, split_tasks
from ncrl.tasks.data import Images, load_mnist
from ncrl.tasks.recipes import GROW, METHODS, SCENARIOS, ContinualRecipe, Recipe, read_recipes
from ncrl.tasks.results import Result, read_results, results_table
from ncrl.tasks.split_mnist import tables, tradeoff
from ncrl.tasks.split_mnist.tables import Cell, Column
from ncrl.tasks.training import identity

CONFIG = "split_mnist.yaml"

RECIPES = {
    Column("linear"): "linear_400",
    Column("lowrank"): "linear_400",
    Column("nsm"): "nsm_400",
    Column("neurocoder"): "tuned",
    Column("neurocoder", residual=True): "tuned_residual",
    Column("neurocoder", "official"): "official_logs",
    Column("neurocoder", "official", residual=True): "official_logs_residual",
}
"""Variant of the recipe for every layer, ranks apart."""

LAYERS = ("linear", "lowrank", "nsm", "neurocoder")
VARIANTS = ("paper", "official")

ADAGRAD = {"optimizer": "adagrad", "learning_rate": 1e-2}

DIGITS = "digits"
DIGITS_EPOCHS = 40
"""On the embedded digits, where the protocol's 4 epochs would be 12 updates for a task."""

MOST_COUNTED = 1000
"""Processes, or seeds."""

METRICS = ("accuracy", "learn", "failed_tasks", "forgetting", "transfer", "rank", "attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the flags say and print rows and tables; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    return run_command("split_mnist", make_parser(), words, lambda session: work(session, words))


def make_parser() -> argparse.ArgumentParser:
    """The flags that all task commands have, and those of this one."""
    parser = task_parser("split_mnist", __doc__)
    parser.conflict_handler = "resolve"  # variant and layer mean something else here
    own = parser.add_argument_group("split MNIST")
    add = own.add_argument
    own.conflict_handler = "resolve"
    add("--scenario", nargs="+", metavar="NAME", help=f"{' or '.join(SCENARIOS)} (default: domain)")
    add("--method", nargs="+", metavar="NAME", help=f"{', '.join(METHODS)} (default: adam), {GROW}")
    add("--layer", nargs="+", metavar="NAME", help=f"{', '.join(LAYERS)} (default: neurocoder)")
    add("--variant", nargs="+", metavar="NAME", help="neurocoder: paper (default) or official")
    both = argparse.BooleanOptionalAction
    add("--residual", action=both, help="neurocoder: with the residual program (default: without)")
    add("--sharpness", type=float, metavar="FLOAT", help="neurocoder: in place of the recipe's")
    add("--rank", nargs="+", type=int, metavar="INT", help="lowrank: of hidden layers (default: 1)")
    add(
        "--penalty-coef",
        nargs="+",
        type=float,
        metavar="FLOAT",
        help="in place of Hsu et al.'s; with several, --figure draws what they trade",
    )
    add(
        "--fisher-orthogonality",
        action=both,
        help="official: orthogonality gradients in the Fisher information (default: with)",
    )
    add(
        "--double-orth-coef",
        action=both,
        help="official: twice the orth_coef from task 2 on, under a penalty (default: with)",
    )
    add("--repeats", type=int, metavar="INT", help="seeds 0 to INT - 1, in place of --seeds")
    add(
        "--tables",
        nargs="*",
        type=int,
        metavar="INT",
        help="fill Tables 1, 6 and 7, or some of them: every method, layer and control, "
        f"{tables.REPEATS['domain']} repeats (domain) or {tables.REPEATS['task']} (task)",
    )
    add("--finished", action="store_true", help="train nothing, show the runs that are finished")
    add("--jobs", type=int, metavar="INT", help="processes that share the runs (default: 1)")
    return parser


def work(session: Session, words: Sequence[str]) -> None:
    """Train and show what the flags say."""
    flags = session.flags
    jobs = at_least_one(flags, "jobs")
    if jobs > 1 and "threads" not in flags:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    groups = table_cells(flags) if "tables" in flags else [(cells(flags), None)]
    coefs: list[float] = list(dict.fromkeys(flags.get("penalty_coef", [])))
    data = load_mnist(session.data_dir, download=session.download)
    is_digits = data.name.startswith(DIGITS)
    wanted = [
        ([one for cell in group for one in sweep(cell, flags, coefs, is_digits)], repeats)
        for group, repeats in groups
    ]
    say(f"data: {data.source}")
    if is_digits and "epochs" not in flags:
        say(f"{DIGITS_EPOCHS} epochs for each task: the protocol's 4 are for MNIST's size")
    rows: list[Result] = []
    if "finished" in flags:
        for group, repeats in wanted:
            rows += finished(session, group, data, seeds(session, repeats))
    else:
        tasks = split_tasks(data.to(session.device))
        with helpers(words, jobs - 1):
            for group, repeats in wanted:
                rows += run_all(session, group, tasks, data, seeds(session, repeats))
    if "tables" in flags:
        all_plans = [plan for group, _ in wanted for plan in group]
        changed = sorted({changes_of(plan.labels) for plan in all_plans} - {""})
        for number in chosen_tables(flags):
            say(f"\n{tables.table(number, rows, ','.join(changed))}")
    else:
        say(f"\n{results_table(rows, METRICS)}")
    if session.figure is not None and rows:
        (tables if len(coefs) < 2 else tradeoff).draw(rows, session.figure)


def seeds(session: Session, repeats: int | None) -> list[int]:
    """Those that flags name, else as many as the table has, else 0."""
    if "repeats" in session.flags:
        if "seeds" in session.flags:
            raise ValueError("--repeats and --seeds exclude each other")
        return list(range(at_least_one(session.flags, "repeats")))
    return session.seeds if "seeds" in session.flags or repeats is None else list(range(repeats))


def run_all(
    session: Session, wanted: Sequence[Plan], tasks: list[Task], data: Images, seeds: Sequence[int]
) -> list[Result]:
    """Rows of all plans and seeds that did not diverge."""

    def make(recipe: Recipe, seed: int, _device: torch.device) -> SplitLearning:
        assert isinstance(recipe, ContinualRecipe)
        return SplitLearning(recipe, tasks, data.name, seed, data.readings)

    return session.run(wanted, make, seeds=seeds)


def finished(
    session: Session, wanted: Sequence[Plan], data: Images, seeds: Sequence[int]
) -> list[Result]:
    """Rows of those plans and seeds that are there already."""
    recipes = {plan.name: identity(plan.recipe, data.name) for plan in wanted}
    same = {name: json.loads(json.dumps(what["recipe"])) for name, what in recipes.items()}
    labels = {plan.name: dict(plan.labels) for plan in wanted}
    return [
        dataclasses.replace(row, labels=labels[row.name])
        for row in read_results(session.logdir, "split_mnist")
        if row.seed in seeds
        and (row.data, row.readings) == (data.name, data.readings)
        and row.recipe == same.get(row.name)
    ]


@contextmanager
def helpers(words: Sequence[str], count: int) -> Iterator[None]:
    """More processes with the same command, which share its runs."""
    command = [sys.executable, "-m", "ncrl.tasks.split_mnist", *words, "--jobs", "1"]
    if count and "--threads" not in words:
        command += ["--threads", str(torch.get_num_threads())]
    nowhere = subprocess.DEVNULL
    # What a helper fails at stays to be done here, and fails here, too, where it is said.
    processes = [  # in sessions of their own: Ctrl-C reaches this process, which ends them below
        subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def at_least_one(flags: Mapping[str, Any], name: str) -> int:
    """The value of a flag that counts something; 1 if it is not given.

    Raises:
        ValueError: if it is less than 1, or more than anybody wants.
    """
    value: int = flags.get(name, 1)
    check_range(f"--{name}", value, 1, MOST_COUNTED)
    return value


# From flags to recipes


def cells(flags: Mapping[str, Any]) -> list[Cell]:
    """All combinations that the flags name.

    Raises:
        ValueError: for unknown names, and flags that do not go together.
    """
    path = find_config(flags.get("config", CONFIG))
    top = read_recipes(path)[""]
    if not isinstance(top, ContinualRecipe):
        raise ValueError(f"{path} is for network {top.network}, expected split_mlp")
    scenarios = chosen(flags, "scenario", SCENARIOS, [top.scenario])
    methods = chosen(flags, "method", (*METHODS, GROW), [top.method or "adam"])
    layers = chosen(flags, "layer", LAYERS, ["neurocoder"])
    variants = chosen(flags, "variant", VARIANTS, ["paper"])
    only = {
        "neurocoder": ("variant", "residual", "sharpness"),
        "lowrank": ("rank",),
    }
    for layer, names in only.items():
        for name in names:
            if name in flags and layer not in layers:
                raise ValueError(f"--{name} needs --layer {layer}, got {', '.join(layers)}")
    for name in ("fisher_orthogonality", "double_orth_coef"):
        if name in flags and ("official" not in variants or "neurocoder" not in layers):
            raise ValueError(f"--{name.replace('_', '-')} needs --variant official")
    if "penalty_coef" in flags and not any(method in COEFS["domain"] for method in methods):
        raise ValueError(
            f"--penalty-coef needs a method out of {', '.join(COEFS['domain'])}, "
            f"got {', '.join(methods)}"
        )
    columns = columns_of(flags, layers, variants)
    if GROW in methods and columns != [Column("neurocoder")]:
        raise ValueError(f"--method {GROW} needs --layer neurocoder --variant paper --no-residual")
    return [
        Cell(scenario, method, column)
        for scenario in scenarios
        for method in methods
        for column in columns
    ]


def columns_of(
    flags: Mapping[str, Any], layers: Sequence[str], variants: Sequence[str]
) -> list[Column]:
    """A column for every layer, Neurocoder's variants and the ranks of `lowrank` apart."""
    columns: list[Column] = []
    for layer in layers:
        if layer == "neurocoder":
            residual = flags.get("residual", False)
            columns += [Column(layer, variant, residual=residual) for variant in variants]
        elif layer == "lowrank":
            columns += [Column(layer, rank=rank) for rank in dict.fromkeys(flags.get("rank", [1]))]
        else:
            columns.append(Column(layer))
    return columns


def table_cells(flags: Mapping[str, Any]) -> list[tuple[list[Cell], int | None]]:
    """The cells of the tables, by scenario, with their repeats.

    Raises:
        ValueError: for flags that choose cells in another way.
    """
    for name in ("scenario", "method", "layer", "variant", "residual", "sharpness", "rank"):
        if name in flags:
            raise ValueError(f"--{name} and --tables exclude each other: tables have every cell")
    if len(flags.get("penalty_coef", [])) > 1:
        raise ValueError("--tables takes one --penalty-coef: a cell has place for one")
    groups: dict[str, list[Cell]] = {}
    for number in chosen_tables(flags):
        wanted = groups.setdefault(tables.SCENARIO[number], [])
        wanted += [cell for cell in tables.cells(number) if cell not in wanted]
    return [(group, tables.REPEATS[scenario]) for scenario, group in groups.items()]


def chosen_tables(flags: Mapping[str, Any]) -> list[int]:
    """Numbers of the tables to fill.

    Raises:
        ValueError: for others than 1, 6 and 7.
    """
    numbers = flags["tables"] or list(tables.SCENARIO)
    for number in numbers:
        if number not in tables.SCENARIO:
            raise ValueError(f"--tables takes 1, 6 and 7, got {number}")
    return list(dict.fromkeys(numbers))


def sweep(
    cell: Cell, flags: Mapping[str, Any], coefs: Sequence[float], is_digits: bool
) -> Iterator[Plan]:
    """The recipes of a cell, one for each coefficient where its method has a penalty."""
    if not coefs or cell.method not in COEFS[cell.scenario]:
        yield plan(cell, flags, is_digits)
    else:
        for coef in coefs:
            yield plan(cell, flags, is_digits, coef)


def plan(
    cell: Cell, flags: Mapping[str, Any], is_digits: bool = False, coef: float | None = None
) -> Plan:
    """The recipe of a cell, with what the flags change, and a name that says so.

    Args:
        cell: of a table.
        flags: those that were given.
        is_digits: whether the data are the embedded digits.
        coef: weight of the penalty, in place of Hsu et al.'s.

    Raises:
        ValueError: for changes that make no sense.
    """
    grows = cell.method == GROW
    variant = GROW if grows else RECIPES[cell.column._replace(rank=None)]
    shared = {key: value for key, value in flags.items() if key != "layer"}
    (base,) = plans({**shared, "variant": [variant]}, CONFIG)
    said = base.labels["changes"]
    recipe = base.recipe
    assert isinstance(recipe, ContinualRecipe)
    changes: dict[str, Any] = {}
    if cell.method == "adagrad":
        changes |= {name: value for name, value in ADAGRAD.items() if name not in flags}
    if is_digits and "epochs" not in flags:
        changes["epochs"] = DIGITS_EPOCHS
    network_options = dict(recipe.network_options)
    if cell.scenario == "task":
        network_options["num_tasks"] = network_options.get("num_tasks", 5)
    if cell.column.rank is not None:
        network_options["hidden_rank"] = cell.column.rank
    changes["network_options"] = network_options
    is_neurocoder = cell.column.layer == "neurocoder"
    if is_neurocoder and "sharpness" in flags:
        changes["layer_options"] = {**recipe.layer_options, "sharpness": flags["sharpness"]}
        said += f" sharpness={flags['sharpness']:g}"
    usual = COEFS[cell.scenario].get(cell.method, 0.0)
    if coef is None:
        coef = recipe.penalty_coef if cell.method in COEFS[cell.scenario] else 0.0
    if coef is None:
        coef = usual
    changes |= {"scenario": cell.scenario, "method": cell.method, "penalty_coef": coef}
    for name in ("fisher_orthogonality", "double_orth_coef"):
        is_official = is_neurocoder and cell.column.variant == "official"
        changes[name] = is_official and flags.get(name, True)
        if is_official and not changes[name]:
            said += f" {name}=False"
    labels = {**cell.labels, "changes": said.strip()}
    labels["coef"] = "" if coef == usual else f"penalty_coef={coef:g}"
    name = " ".join(filter(None, (cell.name, changes_of(labels))))
    return Plan(name, dataclasses.replace(recipe, **changes), labels)


def changes_of(labels: Mapping[str, str]) -> str:
    """What is not as in the tables' recipes."""
    return " ".join(filter(None, (labels["changes"], labels["coef"])))
