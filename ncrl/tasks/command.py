"""What the task commands share: flags, which recipes to train, and running them one by one.

A command's `main` makes a parser with `task_parser`, adds flags of its own, and gives both to
`run_command` with a function that does the work with a `Session`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ncrl.checks import require_choice, require_range, suggest
from ncrl.files import given_path, read_bytes, remove_unfinished, write_atomically
from ncrl.layers import LAYERS
from ncrl.settings import EXIT_FAILED, EXIT_SIGINT, add_flags, make_parser, parse, usage_error
from ncrl.shell.hardware import choose_device, is_lack_of_memory, keep_freed_memory
from ncrl.shell.lock import locked
from ncrl.shell.screen import say
from ncrl.shell.signals import Stopped
from ncrl.tasks.data import Images
from ncrl.tasks.experiment import Experiment
from ncrl.tasks.recipes import (
    CONFIGS,
    Recipe,
    check_options,
    make_recipe,
    option_types,
    outline_network,
    read_recipes,
)
from ncrl.tasks.results import Result, fingerprint, program
from ncrl.tasks.training import RECIPE_FILE, NonFiniteError, Run, identity, load_weights, train
from ncrl.yaml_files import find_config, parse_yaml

# In the folder of a run whose loss was not finite: the same run would end there again.
DIVERGED_FILE = "diverged.txt"
LARGEST_SEED = 2**31 - 1
MOST_THREADS = 1024
MOST_LETTERS = 200  # of a recipe's name in that of a folder, which file systems limit to 255

# Fields of a recipe that are flags, too.
OVERRIDES = (
    *("optimizer", "learning_rate", "schedule", "momentum", "rmsprop_alpha", "weight_decay"),
    *("max_grad_norm", "batch_size", "epochs", "iterations", "orth_coef", "balance_coef"),
)
BASE = "base"  # name on the command line of the recipe at the top of a file
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")

Make = Callable[[Any, int, torch.device], Experiment]
"""From a recipe, a seed and a device to what is trained. It is called right after torch's random
stream was seeded with the seed."""


class NamedRecipe(NamedTuple):
    """A recipe to train, under the name that tables give it.

    See `Result.labels`: at least `variant`, which is empty for the recipe at the top of a file, and
    `changes`, what the flags changed.
    """

    name: str
    recipe: Recipe
    labels: Mapping[str, str] = MappingProxyType({"variant": "", "changes": ""})

    def changed(self, **layer_options: Any) -> NamedRecipe:
        """The same recipe with other options of its layer, which its name says."""
        said = " ".join(f"{key}={value}" for key, value in layer_options.items())
        options = {**self.recipe.layer_options, **layer_options}
        recipe = dataclasses.replace(self.recipe, layer_options=options)
        return NamedRecipe(f"{self.name} {said}", recipe, self.labels)


class Session:
    """A command at work: what its flags say, and its runs.

    Attributes:
        flags: those that were given, by name; the command's own among them.
        seeds: of every recipe.
        device: where networks are trained.
        data_dir: folder with data sets; None if none was named.
        download: whether data may be fetched.
        figure: file to draw to; None if none is wanted.
        only_finished: whether nothing is trained.
        num_diverged: runs so far whose loss was not finite.
    """

    def __init__(self, task: str, flags: Mapping[str, Any]) -> None:
        self.task, self.flags = task, flags
        self.num_diverged = 0
        self.seeds: list[int] = list(dict.fromkeys(flags.get("seeds", [0])))
        for seed in self.seeds:
            require_range("seeds", seed, 0, LARGEST_SEED)
        self.device = choose_device(flags.get("device", "auto"))
        self.data_dir: str | None = flags.get("data_dir")
        self.download: bool = flags.get("download", False)
        self.only_finished: bool = flags.get("finished", False)
        self.logdir = given_path(flags.get("logdir", "runs"))
        self.figure = given_path(flags["figure"]) if "figure" in flags else None
        if self.figure is not None:
            check_figure(self.figure)
        if "threads" in flags:
            require_range("threads", flags["threads"], 1, MOST_THREADS)
            torch.set_num_threads(flags["threads"])

    @property
    def names_recipes(self) -> bool:
        """Whether --config, --variant or --layer is given."""
        return any(name in self.flags for name in ("config", "variant", "layer"))

    def recipes(
        self, default_config: str, *, default_variants: Sequence[str] = (BASE,), **instead: Any
    ) -> list[NamedRecipe]:
        """The recipes that --config, --variant, --layer and the overrides name.

        Without these flags it is some variants of a file in configs/. `instead` has values of flags
        in place of those given; None for a flag not given. Raises ValueError for recipes of another
        task, too.
        """
        default = {} if self.names_recipes else {"variant": list(default_variants)}
        flags = {**default, **self.flags, **instead}
        given = {name: value for name, value in flags.items() if value is not None}
        wanted = named_recipes(given, default_config)
        for named in wanted:
            if named.recipe.task != self.task:
                raise ValueError(
                    f"{named.name!r} is a recipe for {named.recipe.task}, not for {self.task}"
                )
        return wanted

    def validated(self, data: Images, held_out_every: int) -> Images:
        """The data set, or with --validate a part of its training images to measure on."""
        if self.flags.get("validate"):
            data = data.held_out(held_out_every)
        say(f"data: {data.source}")
        return data

    def run(
        self, wanted: Sequence[NamedRecipe], make: Make, *, seeds: Sequence[int] | None = None
    ) -> list[Result]:
        """Train every recipe with every seed, seed by seed, unless it is finished already; with
        --finished train none.

        Runs that another process is at are left to it, and waited for at the end: the same command
        started twice shares the work. A run whose loss is not finite any more is said, counted in
        `num_diverged`, and has no row; the command's exit code will tell. The rows come recipe by
        recipe.
        """
        for named in wanted:  # before hours go into the first of them
            try:
                outline_network(named.recipe)
            except ValueError as error:
                raise ValueError(f"{named.name}: {error}") from error
        seeds = self.seeds if seeds is None else seeds
        numbers = range(len(wanted))
        pending = [(index, seed) for seed in seeds for index in numbers]
        found: dict[tuple[int, int], Result] = {}
        for wait in (False, True):
            elsewhere = []
            for index, seed in pending:
                try:
                    result = self._run_one(wanted[index], seed, make, wait=wait)
                except NonFiniteError as error:
                    say(f"diverged: {error}", sys.stderr)
                    self.num_diverged += 1
                    continue
                if result is not None:
                    found[index, seed] = result
                elif not self.only_finished:
                    elsewhere.append((index, seed))
            pending = elsewhere
        return [found[which] for which in itertools.product(numbers, seeds) if which in found]

    def _run_one(self, named: NamedRecipe, seed: int, make: Make, *, wait: bool) -> Result | None:
        """The row of one run; None if another process is at it, or if it had to be trained first
        and nothing is to be trained."""
        run, experiment = self.made(named, seed, make)
        if self.only_finished:
            return run.result
        diverged = run.folder / DIVERGED_FILE
        with locked(run.folder, wait=wait) as is_ours:
            if not is_ours:
                return None
            remove_unfinished(run.folder)
            result = run.result
            if result is not None:
                say(f"{result.line()} (finished before, {run.folder})")
                return result
            if os.path.lexists(diverged):
                said = read_bytes(diverged).decode(errors="replace")
                raise NonFiniteError(f"{said} (found before; delete {diverged} to try again)")
            what = json.dumps(identity(named.recipe, experiment), indent=1)
            write_atomically(run.folder / RECIPE_FILE, what.encode())
            try:
                result = train(run, experiment)
            except NonFiniteError as error:
                write_atomically(diverged, str(error).encode())
                raise
            say(result.line())
            return result

    def made(self, named: NamedRecipe, seed: int, make: Make) -> tuple[Run, Experiment]:
        """A run with what it trains; it is kept where all that matters for its numbers says."""
        torch.manual_seed(seed)
        experiment = make(named.recipe, seed, self.device)
        mark = fingerprint(identity(named.recipe, experiment))
        label = re.sub(r"[^a-z0-9.=]+", "-", named.name.lower()).strip("-")[:MOST_LETTERS]
        folder = self.logdir / self.task / f"{label}-{mark}" / f"seed-{seed}"
        run = Run(self.task, named.name, named.recipe, seed, self.device, folder, named.labels)
        return run, experiment

    def experiment(self, named: NamedRecipe, seed: int, make: Make) -> Any:
        """A finished run's experiment, with its trained network in eval mode."""
        run, experiment = self.made(named, seed, make)
        load_weights(run, experiment.model)
        experiment.model.eval()
        return experiment


def task_parser(
    task: str, description: str | None, held_out_every: int = 0, *, has_images: bool = True
) -> argparse.ArgumentParser:
    """A parser with the flags that all task commands have, or all that learn from images, the first
    line of a description, and --validate, if it can hold one of so many training images out."""
    parser = make_parser((description or "").partition("\n")[0])
    parser.prog = program(task)
    add = parser.add_argument
    add("--config", metavar="FILE", help=f"recipes: a YAML file, or the name of one in {CONFIGS}")
    add("--variant", nargs="+", metavar="NAME", help="variants of the recipe, or base")
    add("--layer", nargs="+", metavar="NAME", help=f"coded layers: {', '.join(LAYERS)}")
    add("--seeds", nargs="+", type=int, metavar="INT", help="one run for each (default: 0)")
    add("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--threads", type=int, metavar="INT", help="torch's threads on the CPU (default: torch's)")
    if has_images:
        add("--data-dir", metavar="DIR", help="data sets (default: NCRL_DATA, if set)")
        add("--download", action="store_true", help="fetch the data set from OpenML if need be")
    add("--logdir", metavar="DIR", help="runs are kept, resumed and found here (default: runs)")
    add("--finished", action="store_true", help="train nothing, show the runs that are finished")
    add("--figure", metavar="FILE", help="draw the paper's figure to a .png, .svg or .pdf")
    if held_out_every:
        said = f"hold one of {held_out_every} training images out and measure on them"
        add("--validate", action="store_true", help=f"{said}: for the choice of settings")
    changes = parser.add_argument_group("settings in place of the recipe's")
    add_flags(changes, Recipe, only=OVERRIDES, show_defaults=False)
    for name, example in (("layer", "sharpness=5"), ("network", "num_outputs=100")):
        changes.add_argument(
            f"--{name}-options",
            nargs="+",
            metavar="NAME=VALUE",
            help=f"options of the {name}, such as {example}",
        )
    return parser


def run_command(
    task: str,
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[Session], None],
) -> int:
    """Parse, work, and turn what goes wrong into one line; returns the exit code."""
    keep_freed_memory()
    flags = parse(parser, sys.argv[1:] if arguments is None else arguments)

    def session_at_work() -> None:
        session = Session(task, flags)
        work(session)
        if session.num_diverged:
            raise NonFiniteError(f"{session.num_diverged} run(s) diverged, and have no row above")

    return in_one_line(parser.prog, session_at_work)


def in_one_line(program: str, work: Callable[[], None]) -> int:
    """Work, and turn what goes wrong into one line; returns the exit code."""
    try:
        work()
    except ValueError as error:
        usage_error(program, str(error))
    except Stopped as stop:
        say(f"{program}: stopped; the same command goes on from here", sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGINT
    except (NonFiniteError, OSError) as error:
        say(f"{program}: {' '.join(str(error).split())}", sys.stderr)
        return EXIT_FAILED
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        hint = "lower batch_size, or the sizes of network and layer"
        say(f"{program}: out of memory: {hint}", sys.stderr)
        return EXIT_FAILED
    return 0


def check_figure(path: Path) -> None:
    """Raise ValueError, before anything is trained, unless a figure can be written there."""
    if path.suffix not in FIGURE_SUFFIXES:
        raise ValueError(f"--figure must end in one of {', '.join(FIGURE_SUFFIXES)}, got {path}")
    if path.is_dir():
        raise ValueError(f"--figure {path} is a folder")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--figure {path}: its folder does not exist")
    if not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"--figure {path}: its folder cannot be written to")


def named_recipes(flags: Mapping[str, Any], default_config: str) -> list[NamedRecipe]:
    """The recipes that the shared flags name.

    Several variants and layers make all combinations. A layer is the variant of that name where
    the file has one; else the recipe's own layer is replaced by one with default options. Options
    change those recipes whose layer or network has them; ValueError for one that none has.
    """
    path = find_config(flags.get("config", default_config), CONFIGS)
    recipes = read_recipes(path)
    wanted: dict[str, NamedRecipe] = {}
    for variant in flags.get("variant", [BASE]):
        if variant != BASE and variant not in recipes:
            known = [BASE, *filter(None, recipes)]
            raise ValueError(f"unknown variant {variant!r} of {path}; {suggest(variant, known)}")
        for layer in flags.get("layer", [None]):
            named = _with_layer(path, recipes, "" if variant == BASE else variant, layer)
            wanted[named.name] = named
    changes = {name: flags[name] for name in OVERRIDES if name in flags}
    options = {field: named_values(field, flags) for field in ("layer_options", "network_options")}
    for field, values in options.items():
        every = (option_types(named.recipe, field).items() for named in wanted.values())
        check_options(field, values, dict(itertools.chain(*every)))
    return [_override(named, changes, options) for named in wanted.values()]


def named_values(field: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a flag like --layer-options holds, by name."""
    flag = f"--{field.replace('_', '-')}"
    values = {}
    for word in flags.get(field, []):
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{flag} takes NAME=VALUE, got {word!r}")
        try:
            values[name] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"{flag} {word!r}: {error}") from error
    return values


def _with_layer(
    path: Path, recipes: Mapping[str, Recipe], variant: str, layer: str | None
) -> NamedRecipe:
    recipe, label = recipes[variant], variant
    if layer is not None and layer != recipe.layer:
        if layer not in LAYERS:
            raise ValueError(f"unknown layer {layer!r}; {suggest(layer, LAYERS)}")
        named = "_".join(filter(None, [layer, variant]))  # linear, linear_cifar100
        if named in recipes and recipes[named].layer == layer:
            recipe, label = recipes[named], named
        else:
            what: dict[str, Any] = {"paper_parameters": None, "note": ""}
            recipe = dataclasses.replace(recipe, layer=layer, layer_options={}, **what)
            label = f"{variant} {layer}".lstrip()
    return NamedRecipe(f"{path.stem} {label}".rstrip(), recipe, {"variant": label, "changes": ""})


def _override(
    named: NamedRecipe, changes: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]
) -> NamedRecipe:
    """The recipe with other settings, and those options that its layer or network has; its name
    says what."""
    changes = dict(changes)
    said = dict(changes)
    if changes.keys() & {"epochs", "iterations"}:  # one takes the other's place
        changes = {"epochs": None, "iterations": None, **changes}
    for field, values in options.items():
        known = option_types(named.recipe, field)
        if own := {name: value for name, value in values.items() if name in known}:
            said |= own
            changes[field] = {**getattr(named.recipe, field), **own}
    if not changes:
        return named
    recipe = make_recipe({**vars(named.recipe), **changes}, "the flags")
    words = " ".join(f"{k}={v}" for k, v in said.items())
    return NamedRecipe(f"{named.name} {words}", recipe, {**named.labels, "changes": words})


def chosen(
    flags: Mapping[str, Any], flag: str, choices: Sequence[str], default: Sequence[str]
) -> list[str]:
    """The names that a flag holds, without repetition, all among `choices`."""
    names = flags.get(flag, default)
    for name in names:
        require_choice(f"--{flag}", name, choices)
    return list(dict.fromkeys(names))
