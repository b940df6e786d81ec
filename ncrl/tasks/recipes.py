"""Recipes: what an experiment trains and how, read from the short YAML files in `configs/tasks/`.

A file holds the fields of `Recipe`, and under `variants` what other recipes of the same experiment
change. Options of the network or the layer are changed one by one, except by a variant that names
another network or layer: that one starts without options.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import sysconfig
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ncrl.layers import LAYERS
from ncrl.neurocoder import NeurocoderConfig
from ncrl.settings import check, nearest, setting, typed_values
from ncrl.tasks.models import NETWORKS
from ncrl.yaml_files import read_yaml

TASKS = ("mnist", "cifar", "polynomial", "algorithms", "split_mnist", "split_cifar", "atari")
OPTIMIZERS = ("sgd", "adam", "adagrad", "rmsprop")
SCHEDULES = ("constant", "steps")
REQUIRED = ("task", "network")
OPTIONS_OF = {"network_options": "network", "layer_options": "layer"}
"""Fields that hold options, and the field that says whose."""

LARGEST_BATCH_SIZE = 1 << 16
MOST_EPOCHS = 100_000
MOST_ITERATIONS = 10**9

LARGEST_OPTION = 100_000
"""Of a network or layer: widths, counts and so on, far beyond the largest of any recipe."""

MOST_LAYERS = 100
"""Widths in a list of options."""

MOST_PARAMETERS = 1 << 30
"""Of a network: 4 GiB, of which training takes several."""

Options = Mapping[str, Any]

INSTALLED_CONFIGS = "share/ncrl/configs/tasks"
"""Where `pip install` puts configs/tasks/, below the prefix (see pyproject.toml)."""


def configs_folder() -> Path:
    """The recipes of this repository, or those that were installed with the package."""
    candidates = [Path(__file__).resolve().parents[2] / "configs" / "tasks"]
    candidates.append(Path(sysconfig.get_path("data")) / INSTALLED_CONFIGS)
    # Schemes with a prefix of their own, such as --user: the installer's list of files.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("ncrl") or []:
            if file.match(f"{INSTALLED_CONFIGS}/*.yaml"):
                candidates.append(Path(str(file.locate())).resolve().parent)
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


CONFIGS = configs_folder()


def described(text: str) -> Mapping[str, Any]:
    """The metadata of a `setting` whose default cannot be a plain value."""
    metadata: Mapping[str, Any] = setting(None, text).metadata
    return metadata


@dataclass(frozen=True)
class Recipe:
    """One experiment: network, layer and training.

    Raises:
        ValueError: at construction, for an impossible value or an option that the network or the
            layer has not got.
    """

    task: str = setting("mnist", "experiment, a module of ncrl.tasks", choices=TASKS)
    network: str = setting("projected_linear", "main network", choices=tuple(NETWORKS))
    network_options: Options = field(
        default_factory=dict, metadata=described("the network's own options, such as num_coded")
    )
    layer: str = setting("linear", "kind of the coded layers", choices=tuple(LAYERS))
    layer_options: Options = field(
        default_factory=dict, metadata=described("the layer's own options, such as num_slots")
    )

    optimizer: str = setting("adam", "optimiser", choices=OPTIMIZERS)
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
        check_names("network_options", self.network_options, network_option_names(self.network))
        check_names("layer_options", self.layer_options, layer_option_names(self.layer))
        if self.epochs is not None and self.iterations is not None:
            raise ValueError(
                f"epochs={self.epochs} and iterations={self.iterations} exclude each other"
            )


METHODS = ("adam", "adagrad", "l2", "si", "ewc", "online-ewc")
"""Against forgetting; see `ncrl.tasks.continual.methods`."""

GROW = "grow"
"""The method that adds slots for each task; no row of the paper's tables."""

SCENARIOS = ("domain", "task")
"""Whether all tasks share one output layer (incremental domain), or each has its own, and the task
of an image is known (incremental task)."""


@dataclass(frozen=True)
class ContinualRecipe(Recipe):
    """A recipe with a scenario and a method against forgetting."""

    scenario: str = setting("domain", "shared or separate output layers", choices=SCENARIOS)
    method: str | None = setting(
        None, "against forgetting; null: what the command does by itself", choices=(*METHODS, GROW)
    )
    penalty_coef: float | None = setting(
        None, "weight of the method's penalty (grow: pull); null: Hsu et al.'s (1)", low=0
    )
    fisher_orthogonality: bool = setting(
        False, "ewc: square the gradient of the orthogonality loss into the Fisher information"
    )
    double_orth_coef: bool = setting(False, "with a penalty, double orth_coef after the first task")


CONTINUAL_NETWORKS = ("split_mlp", "resnet_mlp")


def recipe_class(values: Options) -> type[Recipe]:
    """The recipes that settings make: those of networks that learn task after task say more."""
    return ContinualRecipe if values.get("network") in CONTINUAL_NETWORKS else Recipe


def network_option_names(network: str) -> list[str]:
    """What `network_options` may hold for a network of `NETWORKS`."""
    names = inspect.signature(NETWORKS[network]).parameters
    return [name for name in names if name not in ("layer", "layer_options")]


def layer_option_names(layer: str) -> list[str]:
    """What `layer_options` may hold for a layer of `ncrl.layers.LAYERS`."""
    if layer == "neurocoder":
        return [*(entry.name for entry in fields(NeurocoderConfig)), "bias"]
    elsewhere = ("in_features", "out_features", "device", "dtype")
    return [name for name in inspect.signature(LAYERS[layer]).parameters if name not in elsewhere]


def check_names(field_name: str, options: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless `options` is a mapping whose keys are all `allowed`, with no number
    beyond `LARGEST_OPTION`."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{field_name} must be a mapping of options, got {options!r}")
    for name in options:
        if name not in allowed:
            hint = nearest(str(name), allowed)
            raise ValueError(f"unknown option {name!r} in {field_name}; nearest: {hint}")
        values = options[name] if isinstance(options[name], (list, tuple)) else [options[name]]
        if len(values) > MOST_LAYERS:
            raise ValueError(f"{name} must have at most {MOST_LAYERS} parts, got {len(values)}")
        for value in values:
            if isinstance(value, (int, float)) and not abs(value) <= LARGEST_OPTION:
                raise ValueError(f"{name} must be at most {LARGEST_OPTION:,}, got {value}")


def read_recipes(path: Path) -> dict[str, Recipe]:
    """All recipes of a file: the one at its top under the name "", then its variants.

    Raises:
        ValueError: for a file that cannot be read or does not hold recipes.
    """
    values = read_yaml(path)
    variants = values.pop("variants", None) or {}
    if not isinstance(variants, dict):
        raise ValueError(f"variants in {path} must be a mapping of names to changes")
    for name in REQUIRED:
        if name not in values:
            raise ValueError(f"{path} is no recipe: it does not say {name!r}")
    recipes = {"": make_recipe(values, str(path))}
    for name, changes in variants.items():
        source = f"variant {name!r} of {path}"
        if not isinstance(changes, dict):
            raise ValueError(f"{source} must be a mapping of settings, got {changes!r}")
        recipes[str(name)] = make_recipe(with_changes(values, changes, source), source)
    return recipes


def with_changes(values: Options, changes: Options, source: str) -> dict[str, Any]:
    """The settings of a variant.

    Raises:
        ValueError: for options that are no mapping.
    """
    merged = {**values, **changes}
    for name, owner in OPTIONS_OF.items():
        own = changes.get(name, {})
        inherited = {} if owner in changes else values.get(name, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"{name} in {source} must be a mapping of options, got {own!r}")
        merged[name] = {**inherited, **own}
    # What Table 9 prints for one recipe says nothing of another.
    for name in ("paper_parameters", "note"):
        if name not in changes:
            merged.pop(name, None)
    return merged


def make_recipe(values: Options, source: str) -> Recipe:
    """A recipe from settings by name; `source` says in messages where they come from.

    Raises:
        ValueError: for an unknown setting or an impossible value.
    """
    kind = recipe_class(values)
    plain = {name: value for name, value in values.items() if name not in OPTIONS_OF}
    options = {name: values[name] for name in OPTIONS_OF if name in values}
    typed = typed_values(plain, kind, source)
    try:
        return kind(**typed, **options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def build_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe, freshly initialised.

    Raises:
        ValueError: for sizes that the network or the layer refuses.
    """
    try:
        return NETWORKS[recipe.network](
            **recipe.network_options, layer=recipe.layer, layer_options=recipe.layer_options
        )
    except TypeError as error:
        raise ValueError(f"network {recipe.network!r}: {error}") from error


def outline_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe on torch's meta device, where parameters have sizes but no numbers.

    Raises:
        ValueError: as `build_network`.
    """
    with torch.device("meta"):
        network = build_network(recipe)
    if (total := sum(parameter.numel() for parameter in network.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"a network may have {MOST_PARAMETERS:,} parameters, this has {total:,}")
    return network
