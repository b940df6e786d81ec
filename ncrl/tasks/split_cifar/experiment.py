"""Split CIFAR: tasks of 2 or 5 classes, on frozen ResNet-18 features (paper, Fig. 7 and 8).

python -m ncrl.tasks.split_cifar                       # anywhere: on digits that scikit-learn ships
python -m ncrl.tasks.split_cifar --data-dir DIR --seeds 0 1 --figure split_cifar.png
python -m ncrl.tasks.split_cifar --data-dir DIR --classes 100 --backbone resnet18-f37072fd.pth
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ncrl.checks import require_range
from ncrl.files import given_path
from ncrl.shell.screen import say
from ncrl.tasks.command import NamedRecipe, Session, chosen, run_command, task_parser
from ncrl.tasks.continual.methods import METHODS, make_method
from ncrl.tasks.continual.split import (
    COEFS,
    METRICS,
    check_penalty_coef,
    class_tasks,
    method_changes,
    says_length,
)
from ncrl.tasks.data import Images, load_cifar
from ncrl.tasks.formats import CIFAR_SIDE
from ncrl.tasks.models.resnet import CLASSIFIER_WIDTHS, ResNet18
from ncrl.tasks.recipes import (
    CONFIGS,
    MOST_EPOCHS,
    ContinualRecipe,
    Recipe,
    outline_network,
    read_recipes,
)
from ncrl.tasks.results import results_table
from ncrl.tasks.split_cifar.backbone import (
    IMAGENET_SIDE,
    TURNS,
    Backbone,
    Rotations,
    features_of,
    frozen,
    load_backbone,
    pixel_statistics,
)
from ncrl.tasks.split_cifar.features import SplitFeatures, draw_accuracy, draw_slots, slots_figure
from ncrl.yaml_files import find_config

CONFIG = "split_cifar.yaml"

CLASSES_PER_TASK = {10: 2, 100: 5}  # by number of classes
DEFAULT_VARIANTS = ["linear", "tuned_residual"]
DEFAULT_METHODS = ["adam", "si"]

BACKBONE = "backbone"  # variant that is trained where there are no weights to load
BACKBONE_SEED = 0  # one backbone serves all seeds, as ImageNet's would
# Images are enlarged to this for a backbone of our own: of 32x32, one pixel is left.
TRAINED_SIDE = 64
# On the embedded digits, where an epoch of a task has 3 updates.
DIGITS_EPOCHS, DIGITS_BACKBONE_EPOCHS = 10, 5
HELD_OUT_EVERY = 5  # with --validate, one of so many training images is measured on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = task_parser("split_cifar", __doc__, HELD_OUT_EVERY)
    add = parser.add_argument_group("split CIFAR").add_argument
    add("--classes", type=int, metavar="INT", help="10: 5 tasks of 2 (default); 100: 20 of 5")
    add("--method", nargs="+", metavar="NAME", help=f"{', '.join(METHODS)} (default: adam si)")
    add("--penalty-coef", type=float, metavar="FLOAT", help="in place of the methods' own")
    add(
        "--backbone",
        metavar="FILE",
        help="torchvision's ResNet-18 weights for ImageNet, a state_dict; without it a narrow "
        "ResNet-18 is trained first, to tell rotations of the training images apart",
    )
    said = "of a backbone that is trained here; 0: random weights (default: the recipe's)"
    add("--backbone-epochs", type=int, metavar="INT", help=said)
    said = f"{IMAGENET_SIDE} with --backbone, else {TRAINED_SIDE}"
    said = f"images are enlarged to this for the backbone (default: {said})"
    add("--image-side", type=int, metavar="INT", help=said)
    return run_command("split_cifar", parser, arguments, work)


def work(session: Session) -> None:
    """Train what the flags name; print the table and draw the figures."""
    flags = session.flags
    side = flags.get("image_side", IMAGENET_SIDE if "backbone" in flags else TRAINED_SIDE)
    require_range("--image-side", side, CIFAR_SIDE, IMAGENET_SIDE)
    of_backbone = backbone_recipe(flags)
    bases = session.recipes(CONFIG, default_variants=DEFAULT_VARIANTS)
    pairs = [(base, method) for base in bases for method in methods_of(base, flags)]
    check_penalty_coef(flags, [method for _, method in pairs])
    num_classes = flags.get("classes", 10)
    data = load_cifar(session.data_dir, num_classes, download=session.download)
    epochs = DIGITS_EPOCHS if data.is_embedded and not says_length(flags) else None
    num_features = num_features_of(of_backbone)
    wanted = [classifier_recipe(*pair, flags, num_classes, num_features, epochs) for pair in pairs]
    say(f"data: {data.source}")
    data = data.to(session.device)
    backbone = make_backbone(session, of_backbone, side, data)
    say(f"backbone: {backbone.title}")
    features = features_of(backbone, data)
    if flags.get("validate"):
        features = features.held_out(HELD_OUT_EVERY)
        say(f"measured on: {features.name}")
    if epochs is not None:
        say(f"{epochs} epochs for each task: the recipe's are for CIFAR's size")
    tasks = class_tasks(features, CLASSES_PER_TASK[num_classes])
    readings = {
        "backbone": f"{backbone.title}; {backbone.mark}",
        "image_side": backbone.side,
        "features": f"{'means of the four stages' if backbone.pooled else 'outputs'}, standardised",
        **data.readings,
    }

    def make(recipe: ContinualRecipe, seed: int, _device: torch.device) -> SplitFeatures:
        return SplitFeatures(recipe, tasks, features.name, seed, readings)

    rows = session.run(wanted, make)
    if session.figure is not None and rows:
        draw_accuracy(session.figure, rows)
        if any("top_slots" in row.details for row in rows):
            draw_slots(slots_figure(session.figure), rows)
    shown = results_table(rows, [*METRICS, "slot_information"])
    say(f"\n{shown}\n\nbackbone: {backbone.title}; data: {features.name}")


# From flags to recipes


def backbone_recipe(flags: Mapping[str, Any]) -> Recipe | None:
    """How the frozen network is trained; None if a file has its weights."""
    epochs = flags.get("backbone_epochs")
    if "backbone" in flags:
        if epochs is not None:
            raise ValueError("--backbone-epochs is for a backbone trained here, not --backbone")
        path = given_path(flags["backbone"])
        if not path.is_file():
            reason = "is a folder" if path.is_dir() else "does not exist"
            raise ValueError(f"--backbone must be a file of weights: {path} {reason}")
        return None
    if epochs is not None:
        require_range("--backbone-epochs", epochs, 0, MOST_EPOCHS)
    config = find_config(flags.get("config", CONFIG), CONFIGS)
    recipe = read_recipes(config).get(BACKBONE)
    if recipe is None:
        raise ValueError(f"{config} has no variant {BACKBONE!r}; give --backbone FILE")
    outputs = recipe.network_options.get("num_outputs")
    if recipe.network != "resnet18" or outputs != TURNS or recipe.epochs is None:
        raise ValueError(
            f"the backbone needs epochs and network resnet18 with num_outputs={TURNS}, "
            f"got {recipe.network} with {outputs}"
        )
    return recipe


def num_features_of(backbone: Recipe | None) -> int:
    """Numbers for each image that a backbone will give; see `Backbone.pooled`."""
    if backbone is None:
        return ResNet18.IMAGENET_CLASSES
    return ResNet18.STAGE_WIDTHS * int(backbone.network_options.get("width", 64))


def methods_of(base: NamedRecipe, flags: Mapping[str, Any]) -> list[str]:
    """The methods that a flag names, without repetition; else the recipe's, else both of Fig. 7."""
    recipe = base.recipe
    if not isinstance(recipe, ContinualRecipe) or recipe.network != "resnet_mlp":
        raise ValueError(f"{base.name!r} has network {recipe.network}, expected resnet_mlp")
    default = [recipe.method] if recipe.method else DEFAULT_METHODS
    return chosen(flags, "method", list(METHODS), default)


def classifier_recipe(
    base: NamedRecipe,
    method: str,
    flags: Mapping[str, Any],
    num_classes: int,
    num_features: int,
    epochs: int | None = None,
) -> NamedRecipe:
    """The recipe of the classifier behind a backbone, with a method."""
    coef = flags.get("penalty_coef") if method in COEFS["task"] else None
    changes, coef_said = method_changes(base.recipe, "task", method, flags, coef)
    if epochs is not None:
        changes["epochs"] = epochs
    per_task = CLASSES_PER_TASK[num_classes]
    options = {
        "hidden": CLASSIFIER_WIDTHS,
        **base.recipe.network_options,
        "in_features": num_features,
        "num_outputs": per_task,
        "num_tasks": num_classes // per_task,
    }
    words = " ".join(filter(None, (base.labels["variant"], base.labels["changes"]))) or "printed"
    name = f"{num_classes // per_task}x{per_task} {method} {words} {coef_said}".rstrip()
    recipe = dataclasses.replace(
        base.recipe, network="split_mlp", network_options=options, **changes
    )
    if recipe.epochs is None:
        raise ValueError(f"{base.name}: the recipe has to say how many epochs each task takes")
    # What does not fit is said before hours of features.
    make_method(method, outline_network(recipe), changes["penalty_coef"])
    return NamedRecipe(name, recipe, base.labels)


# The backbone


def make_backbone(session: Session, recipe: Recipe | None, side: int, data: Images) -> Backbone:
    """The frozen network: loaded, or trained to the end if it is not yet."""
    if recipe is None:
        return load_backbone(given_path(session.flags["backbone"]), side, session.device)
    usual = DIGITS_BACKBONE_EPOCHS if data.is_embedded else recipe.epochs
    epochs = session.flags.get("backbone_epochs", usual)

    def make(recipe: Recipe, seed: int, _device: torch.device) -> Rotations:
        return Rotations(recipe, data, side, seed)

    if epochs == 0:
        torch.manual_seed(BACKBONE_SEED)
        network = make(recipe, BACKBONE_SEED, session.device).model
        said = " with random weights"
    else:
        recipe = dataclasses.replace(recipe, epochs=epochs)
        wanted = NamedRecipe(f"{BACKBONE} {epochs} epochs", recipe)
        rows = session.run([wanted], make, seeds=[BACKBONE_SEED])
        if not rows:
            raise ValueError(f"there is no finished run {wanted.name!r}, which features come from")
        network = session.experiment(wanted, BACKBONE_SEED, make).model
        said = (
            f", trained here for {epochs} epochs to tell rotations of the training images "
            f"apart, without labels (test accuracy {rows[0].metrics['rotation_accuracy']:.1f} %, "
            "chance 25 %)"
        )
    assert isinstance(network, ResNet18)
    title = f"no ImageNet weights: frozen ResNet-18 of width {network.width}{said}"
    mean, std = pixel_statistics(data.train_images)
    return Backbone(frozen(network, session.device), title, side, mean, std, pooled=True)
