"""Recipes: what an experiment trains and how, read from the short YAML files in `configs/tasks/`.

A file holds the fields of `Recipe`, and under `variants` what other recipes of the same experiment
change. Options of the network or the layer are changed one by one, except by a variant that names
another network or layer: that one starts without options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ncrl.checks import require_switch, suggest, whole_number
from ncrl.layers import LAYERS
from ncrl.neurocoder import NeurocoderConfig
from ncrl.neurocoder.memory import ProgramMemory
from ncrl.settings import check, setting, typed_values
from ncrl.tasks.continual.methods import METHODS
from ncrl.tasks.models import NETWORKS
from ncrl.tasks.models.mlp import Coded
from ncrl.yaml_files import read_yaml

TASKS = ("mnist", "cifar", "polynomial", "algorithms", "split_mnist", "split_cifar", "atari")
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
SCHEDULES = ("constant", "steps")
# Fields that hold options, and the field that says whose.
OPTIONS_OF = {"network_options": "network", "layer_options": "layer"}
LARGEST_BATCH_SIZE = 1 << 16
MOST_EPOCHS = 100_000
MOST_ITERATIONS = 10**9
# The largest width, count and so on, and the most widths in a list: far beyond any recipe's.
LARGEST_OPTION, MOST_LAYERS = 100_000, 100
MOST_PARAMETERS = 1 << 30  # of a network: 4 GiB, and training takes several times that
Options = Mapping[str, Any]

OWN_OPTIONS: Options = setting(None, "options of its own, see docs/layers.md").metadata

CONFIGS = (Path(__file__).parent / "configs").resolve()
"""The recipes of this package: a link to `configs/tasks/` in a clone, a folder once installed."""


@dataclass(frozen=True)
class Recipe:
    """One experiment: network, layer and training; refuses impossible values and options."""

    task: str = setting("mnist", "experiment, a module of ncrl.tasks", choices=TASKS)
    network: str = setting("projected_linear", "main network", choices=tuple(NETWORKS))
    network_options: Options = field(default_factory=dict, metadata=OWN_OPTIONS)
    layer: str = setting("linear", "kind of the coded layers", choices=tuple(LAYERS))
    layer_options: Options = field(default_factory=dict, metadata=OWN_OPTIONS)

    optimizer: str = setting("adam", "optimiser", choices=tuple(OPTIMIZERS))
    learning_rate: float = setting(1e-3, "learning rate at the start", low=0)
    schedule: str = setting(
        "constant",
        "learning rate over time; steps: a tenth after half the training, and again after 3/4",
        choices=SCHEDULES,
    )
    momentum: float = setting(0.0, "sgd and rmsprop: momentum", low=0, high=1)
    rmsprop_alpha: float = setting(0.99, "rmsprop: smoothing of squared gradients", low=0, high=1)
    weight_decay: float = setting(0.0, "weight decay", low=0)
    max_grad_norm: float | None = setting(None, "limit on the gradient's norm; null: none", low=0)
    batch_size: int = setting(128, "inputs or sequences per update", low=1, high=LARGEST_BATCH_SIZE)
    epochs: int | None = setting(
        None, "passes over the data (of each task)", low=1, high=MOST_EPOCHS
    )
    iterations: int | None = setting(
        None, "updates, in place of epochs", low=1, high=MOST_ITERATIONS
    )
    orth_coef: float = setting(0.0, "weight a of the orthogonality loss", low=0)
    balance_coef: float = setting(0.01, "moe: weight of the balance loss", low=0)

    paper_parameters: float | None = setting(
        None, "parameters in the paper (Table 9); null: not printed", low=1
    )
    note: str = setting("", "what a reader of its parameter count should know")

    def __post_init__(self) -> None:
        check(self)
        for name in OPTIONS_OF:
            check_options(name, getattr(self, name), option_types(self, name))
        if self.epochs is not None and self.iterations is not None:
            raise ValueError(
                f"epochs={self.epochs} and iterations={self.iterations} exclude each other"
            )


SCENARIOS = ("domain", "task")
"""Whether all tasks share one output layer (incremental domain), or each has its own, and the task
of an image is known (incremental task)."""


@dataclass(frozen=True)
class ContinualRecipe(Recipe):
    """A recipe with a scenario and a method against forgetting."""

    scenario: str = setting("domain", "shared or separate output layers", choices=SCENARIOS)
    method: str | None = setting(
        None, "against forgetting; null: what the command does by itself", choices=tuple(METHODS)
    )
    penalty_coef: float | None = setting(
        None, "weight of the method's penalty; null: Hsu et al.'s", low=0
    )
    fisher_orthogonality: bool = setting(
        False, "ewc: square the gradient of the orthogonality loss into the Fisher information"
    )
    double_orth_coef: bool = setting(False, "with a penalty, double orth_coef after the first task")


# Those that learn task after task, so that their recipes say more.
CONTINUAL_NETWORKS = ("split_mlp", "resnet_mlp")


def option_types(recipe: Recipe, field_name: str) -> dict[str, str]:
    """What `network_options` or `layer_options` of a recipe may hold, with annotations; those of a
    layer, which looks at the values itself, are empty."""
    if field_name == "network_options":
        parameters = inspect.signature(NETWORKS[recipe.network]).parameters
        return {name: str(p.annotation) for name, p in parameters.items() if name != "coded"}
    names = list(inspect.signature(LAYERS[recipe.layer]).parameters)
    if recipe.layer == "neurocoder":
        names = [*(entry.name for entry in fields(NeurocoderConfig)), "bias"]
    elsewhere = ("in_features", "out_features", "device", "dtype")
    return {name: "" for name in names if name not in elsewhere}


def check_options(field_name: str, options: Any, types: Mapping[str, str]) -> None:
    """Raise ValueError unless `options` is a mapping with names, types and sizes that make sense;
    an annotation of int means a size, of at least 1."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{field_name} must be a mapping of options, got {options!r}")
    for name, option in options.items():
        if name not in types:
            hint = suggest(str(name), types)
            raise ValueError(f"unknown option {name!r} in {field_name}; {hint}")
        values = option if isinstance(option, (list, tuple)) else [option]
        if len(values) > MOST_LAYERS:
            raise ValueError(f"{name} must have at most {MOST_LAYERS} parts, got {len(values)}")
        for value in values:
            if isinstance(value, (int, float)) and not abs(value) <= LARGEST_OPTION:
                raise ValueError(f"{name} must be at most {LARGEST_OPTION:,}, got {value}")
            if types[name] == "Sequence[int]":
                whole_number(f"{name}: width", value)
        if types[name] == "int":
            whole_number(name, option)
        if types[name] == "bool":
            require_switch(name, option)


def read_recipes(path: Path) -> dict[str, Recipe]:
    """All recipes of a file: the one at its top under the name "", then its variants."""
    values = read_yaml(path)
    variants = values.pop("variants", None) or {}
    if not isinstance(variants, dict):
        raise ValueError(f"variants in {path} must be a mapping of names to changes")
    for name in ("task", "network"):
        if name not in values:
            raise ValueError(f"{path} is no recipe: it does not say {name!r}")
    recipes = {"": make_recipe(values, str(path))}
    for name, changes in variants.items():
        source = f"variant {name!r} of {path}"
        if not isinstance(changes, dict):
            raise ValueError(f"{source} must be a mapping of settings, got {changes!r}")
        recipes[str(name)] = make_recipe(_variant(values, changes, source), source)
    return recipes


def _variant(values: Options, changes: Options, source: str) -> dict[str, Any]:
    # What Table 9 prints for one recipe says nothing of another.
    merged = {**values, "paper_parameters": None, "note": "", **changes}
    for name, owner in OPTIONS_OF.items():
        own = changes.get(name, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"{name} in {source} must be a mapping of options, got {own!r}")
        merged[name] = own if owner in changes else {**values.get(name, {}), **own}
    return merged


def make_recipe(values: Options, source: str) -> Recipe:
    """A recipe from settings by name; `source` says in messages where they come from."""
    kind = ContinualRecipe if values.get("network") in CONTINUAL_NETWORKS else Recipe
    plain = {name: value for name, value in values.items() if name not in OPTIONS_OF}
    options = {name: values[name] for name in OPTIONS_OF if name in values}
    typed = typed_values(plain, kind, source)
    try:
        return kind(**typed, **options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def build_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe, freshly initialised; ValueError for sizes that it refuses."""
    coded = Coded(recipe.layer, recipe.layer_options)
    try:
        return NETWORKS[recipe.network](**recipe.network_options, coded=coded)
    except TypeError as error:
        raise ValueError(f"network {recipe.network!r}: {error}") from error


def outline_network(recipe: Recipe) -> nn.Module:
    """`build_network` on torch's meta device, where parameters have sizes but no numbers."""
    with torch.device("meta"):
        network = build_network(recipe)
    if (total := count_parameters(network)) > MOST_PARAMETERS:
        raise ValueError(f"a network may have {MOST_PARAMETERS:,} parameters, this has {total:,}")
    return network


def count_parameters(model: nn.Module) -> int:
    """Frozen ones and frozen slots included, other buffers not."""
    memories = [module for module in model.modules() if isinstance(module, ProgramMemory)]
    buffers = [buffer for memory in memories for buffer in memory.buffers()]
    frozen = sum(buffer.numel() for buffer in buffers if buffer.is_floating_point())
    return frozen + sum(parameter.numel() for parameter in model.parameters())
