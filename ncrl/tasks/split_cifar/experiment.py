"""Split CIFAR: tasks of 2 or 5 classes, on frozen ResNet-18 features (paper, Fig. 7 and 8).

python -m ncrl.tasks.split_cifar                       # anywhere: on digits that scikit-learn ships
python -m ncrl.tasks.split_cifar --data-dir DIR --seeds 0 1 --figure split_cifar.png
python -m ncrl.tasks.split_cifar --data-dir DIR --classes 100 --backbone resnet18-f37072fd.pth
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ncrl.shell.screen import say
from ncrl.tasks.command import (
    Plan,
    Session,
    add_validate,
    check_range,
    chosen,
    find_config,
    run_command,
    task_parser,
)
from ncrl.tasks.continual.split import COEFS, class_tasks
from ncrl.tasks.data import Images, load_cifar
from ncrl.tasks.formats import CIFAR_SIDE
from ncrl.tasks.models import ResNet18
from ncrl.tasks.recipes import (
    METHODS,
    MOST_EPOCHS,
    ContinualRecipe,
    Recipe,
    build_network,
    read_recipes,
)
from ncrl.tasks.results import results_table
from ncrl.tasks.split_cifar.backbone import (
    IMAGENET_SIDE,
    Backbone,
    Rotations,
    check_backbone_recipe,
    features_of,
    frozen,
    load_backbone,
    pixel_statistics,
)
from ncrl.tasks.split_cifar.features import SplitFeatures
from ncrl.tasks.split_cifar.figure import draw_accuracy, draw_slots, slots_figure

CONFIG = "split_cifar.yaml"

CLASSES_PER_TASK = {10: 2, 100: 5}
"""By number of classes."""

DEFAULT_VARIANTS = ["linear", "tuned_residual"]
DEFAULT_METHODS = ["adam", "si"]

PENALTY_COEFS: Mapping[str, float] = COEFS["task"]
"""Weights of the penalties, where --penalty-coef says nothing."""

BACKBONE = "backbone"
"""Variant that is trained where there are no weights to load."""

BACKBONE_SEED = 0
"""One backbone serves all seeds, as ImageNet's would."""

TRAINED_SIDE = 64
"""Images are enlarged to this for a backbone of our own: of 32x32, one pixel is left."""

DIGITS = "digits"
DIGITS_EPOCHS, DIGITS_BACKBONE_EPOCHS = 10, 5
"""On the embedded digits, where an epoch of a task has 3 updates."""

HELD_OUT_EVERY = 5
"""With --validate, one of so many training images is measured on."""

METRICS = (
    *("accuracy", "learn", "failed_tasks", "forgetting", "transfer"),
    *("rank", "attention", "slot_information"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = task_parser("split_cifar", __doc__)
    own = parser.add_argument_group("split CIFAR")
    add = own.add_argument
    add("--classes", type=int, metavar="INT", help="10: 5 tasks of 2 (default); 100: 20 of 5")
    add("--method", nargs="+", metavar="NAME", help=f"{', '.join(METHODS)} (default: adam si)")
    add("--penalty-coef", type=float, metavar="FLOAT", help="in place of the methods' own")
    add(
        "--backbone",
        metavar="FILE",
        help="torchvision's ResNet-18 weights for ImageNet, a state_dict; without it a narrow "
        "ResNet-18 is trained first, to tell rotations of the training images apart",
    )
    add(
        "--backbone-epochs",
        type=int,
        metavar="INT",
        help="of a backbone that is trained here; 0: random weights (default: the recipe's)",
    )
    add(
        "--image-side",
        type=int,
        metavar="INT",
        help=f"images are enlarged to this for the backbone (default: {IMAGENET_SIDE} with "
        f"--backbone, else {TRAINED_SIDE})",
    )
    add_validate(parser, "every fifth training image")
    return run_command("split_cifar", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the figures."""
    flags = session.flags
    source = backbone_source(flags)
    bases = base_plans(session)
    num_classes = flags.get("classes", 10)
    if num_classes not in CLASSES_PER_TASK:
        raise ValueError(f"--classes takes 10 or 100, got {num_classes}")
    data = load_cifar(session.data_dir, num_classes, download=session.download)
    is_digits = data.name.startswith(DIGITS)
    plans = [
        plan(base, method, flags, num_classes, source.num_features, is_digits)
        for base in bases
        for method in methods_of(base.recipe, flags)
    ]
    say(f"data: {data.source}")
    data = data.to(session.device)
    backbone = make_backbone(session, source, data, is_digits)
    say(f"backbone: {backbone.title}")
    features = features_of(backbone, data)
    if flags.get("validate"):
        features = features.held_out(HELD_OUT_EVERY)
        say(f"measured on: {features.name}")
    if is_digits and "epochs" not in flags:
        say(f"{DIGITS_EPOCHS} epochs for each task: the recipe's are for CIFAR's size")
    tasks = class_tasks(features, CLASSES_PER_TASK[num_classes])
    readings = {
        "backbone": f"{backbone.title}; {backbone.mark}",
        "image_side": backbone.side,
        "features": f"{'means of the four stages' if backbone.pooled else 'outputs'}, standardised",
        **data.readings,
    }

    def make(recipe: Recipe, seed: int, _device: torch.device) -> SplitFeatures:
        assert isinstance(recipe, ContinualRecipe)
        return SplitFeatures(recipe, tasks, features.name, seed, readings)

    rows = session.run(plans, make)
    if session.figure is not None and rows:
        draw_accuracy(session.figure, rows)
        say(f"drawn: {session.figure}")
        if any("top_slots" in row.details for row in rows):
            path = slots_figure(session.figure)
            draw_slots(path, rows)
            say(f"drawn: {path}")
    say(f"\n{results_table(rows, METRICS)}\n\nbackbone: {backbone.title}; data: {features.name}")


# From flags to recipes


class BackboneSource(NamedTuple):
    """Where the frozen network comes from."""

    file: Path | None
    """With ImageNet's weights; None for one that is trained here."""

    recipe: Recipe | None
    """Of one that is trained here."""

    epochs: int | None
    """In place of the recipe's."""

    side: int
    """Images are enlarged to this."""

    @property
    def num_features(self) -> int:
        """Numbers for each image."""
        if self.recipe is None:
            return ResNet18.IMAGENET_CLASSES
        return ResNet18.STAGE_WIDTHS * int(self.recipe.network_options.get("width", 64))


def backbone_source(flags: Mapping[str, Any]) -> BackboneSource:
    """What the flags say about the backbone.

    Raises:
        ValueError: for a file that is not there, flags that do not go together, and a file of
            recipes without one for the backbone.
    """
    side = flags.get("image_side", IMAGENET_SIDE if "backbone" in flags else TRAINED_SIDE)
    if not CIFAR_SIDE <= side <= IMAGENET_SIDE:
        raise ValueError(f"--image-side must lie in {CIFAR_SIDE} .. {IMAGENET_SIDE}, got {side}")
    epochs = flags.get("backbone_epochs")
    if "backbone" in flags:
        if epochs is not None:
            raise ValueError("--backbone-epochs is for a backbone trained here, not --backbone")
        path = Path(flags["backbone"])
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"--backbone must be a file of weights: {path} {reason}")
        return BackboneSource(path, None, None, side)
    if epochs is not None:
        check_range("--backbone-epochs", epochs, 0, MOST_EPOCHS)
    config = find_config(flags.get("config", CONFIG))
    recipes = read_recipes(config)
    if BACKBONE not in recipes:
        raise ValueError(f"{config} has no variant {BACKBONE!r}; give --backbone FILE")
    check_backbone_recipe(recipes[BACKBONE])
    return BackboneSource(None, recipes[BACKBONE], epochs, side)


def base_plans(session: Session) -> list[Plan]:
    """The recipes that the flags name, methods apart; the MLP and Neurocoder without any.

    Raises:
        ValueError: for recipes of other networks.
    """
    plans = session.plans(CONFIG, default_variants=DEFAULT_VARIANTS)
    for base in plans:
        if base.recipe.network != "resnet_mlp":
            raise ValueError(
                f"{base.name!r} has network {base.recipe.network}, expected resnet_mlp"
            )
        methods_of(base.recipe, session.flags)
    return plans


def methods_of(recipe: Recipe, flags: Mapping[str, Any]) -> list[str]:
    """The methods that a flag names, without repetition; else the recipe's, else both of Fig. 7.

    Raises:
        ValueError: for an unknown one.
    """
    assert isinstance(recipe, ContinualRecipe)
    default = [recipe.method] if recipe.method else DEFAULT_METHODS
    return chosen(flags, "method", METHODS, default)


def plan(
    base: Plan,
    method: str,
    flags: Mapping[str, Any],
    num_classes: int,
    num_features: int,
    is_digits: bool = False,
) -> Plan:
    """The recipe of the classifier behind a backbone, with a method.

    Raises:
        ValueError: for settings that make no sense.
    """
    assert isinstance(base.recipe, ContinualRecipe)
    per_task = CLASSES_PER_TASK[num_classes]
    options = {
        "hidden": (500, 500, 500),
        **base.recipe.network_options,
        "in_features": num_features,
        "num_outputs": per_task,
        "num_tasks": num_classes // per_task,
    }
    changes: dict[str, Any] = {"network": "split_mlp", "network_options": options}
    if method == "adagrad" and "optimizer" not in flags:
        changes["optimizer"] = "adagrad"
        if "learning_rate" not in flags:
            changes["learning_rate"] = 1e-2
    if is_digits and "epochs" not in flags:
        changes["epochs"] = DIGITS_EPOCHS
    words = " ".join(filter(None, (base.labels["variant"], base.labels["changes"]))) or "printed"
    name = f"{num_classes // per_task}x{per_task} {method} {words}"
    coef = flags.get("penalty_coef", base.recipe.penalty_coef)
    if coef is None:
        coef = PENALTY_COEFS.get(method, 0.0)
    else:
        name += f" penalty_coef={coef:g}"
    changes |= {"scenario": "task", "method": method, "penalty_coef": coef}
    recipe = dataclasses.replace(base.recipe, **changes)
    if recipe.epochs is None:
        raise ValueError(f"{base.name}: the recipe has to say how many epochs each task takes")
    with torch.device("meta"):
        build_network(recipe)  # what does not fit is said before hours of features
    return Plan(name, recipe, base.labels)


# Backbone and tasks


def make_backbone(
    session: Session, source: BackboneSource, data: Images, is_digits: bool
) -> Backbone:
    """The frozen network: loaded, or trained to the end if it is not yet."""
    if source.file is not None:
        return load_backbone(source.file, source.side, session.device)
    recipe, epochs = source.recipe, source.epochs
    assert recipe is not None
    if epochs is None and is_digits:
        epochs = DIGITS_BACKBONE_EPOCHS
    mean, std = pixel_statistics(data.train_images)
    kind = f"no ImageNet weights: frozen ResNet-18 of width {recipe.network_options['width']}"
    if epochs == 0:
        torch.manual_seed(BACKBONE_SEED)
        network = build_network(recipe)
        assert isinstance(network, ResNet18)
        title = f"{kind} with random weights"
        return Backbone(frozen(network, session.device), title, source.side, mean, std, pooled=True)
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs, iterations=None)
    wanted = Plan(f"{BACKBONE} {recipe.epochs} epochs", recipe)

    def make(recipe: Recipe, seed: int, _device: torch.device) -> Rotations:
        return Rotations(recipe, data, source.side, seed)

    (row,) = session.run([wanted], make, seeds=[BACKBONE_SEED])
    network = session.experiment(wanted, BACKBONE_SEED, make).model
    assert isinstance(network, ResNet18)
    title = (
        f"{kind}, trained here for {recipe.epochs} epochs to tell rotations of the training images "
        f"apart, without labels (test accuracy {row.metrics['rotation_accuracy']:.1f} %, chance "
        "25 %)"
    )
    return Backbone(frozen(network, session.device), title, source.side, mean, std, pooled=True)
