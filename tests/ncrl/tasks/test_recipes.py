"""Recipes: what the files in `configs/tasks/` say, how variants change them, what is refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ncrl.tasks.recipes import CONFIGS, Recipe, build_network, read_recipes
from tests.ncrl.tasks.files import read_recipe

# The paper's Table 8: P J H K l_I a Rho, optimiser, batch.
TABLE_8: dict[tuple[str, str], tuple[Any, ...]] = {
    ("mnist", ""): (5, 5, 1, 2, 2, 0.1, False, "sgd", 32),
    ("cifar_mlp", ""): (30, 5, 3, 5, 5, 0.1, True, "adam", 128),
    ("cifar_lenet", ""): (30, 5, 3, 5, 5, 0.1, True, "adam", 128),
    ("cifar_densenet", ""): (30, 5, 3, 5, 5, 0.1, True, "sgd", 32),
    ("polynomial", "j1"): (10, 1, 15, 3, 0, 0.1, False, "adam", 128),
    ("polynomial", ""): (20, 5, 1, 3, 2, 0.1, False, "adam", 128),
    ("atari", ""): (80, 1, 15, 3, 5, 0.1, True, "rmsprop", 320),
    ("algorithms", ""): (30, 1, 5, 5, 2, 10, True, "rmsprop", 64),
    ("split_mnist", ""): (50, 1, 10, 5, 5, 10, False, "adam", 128),
    ("split_cifar", ""): (100, 1, 10, 5, 5, 10, False, "adam", 128),
}
OPTIONS = ("num_slots", "num_steps", "num_heads", "key_dim", "num_least_used")

BASE = """
task: cifar
network: mlp
network_options: {in_features: 4, hidden: [3], num_outputs: 2}
layer: neurocoder
layer_options: {num_slots: 6, key_dim: 2}
epochs: 2
orth_coef: 0.5
paper_parameters: 100
note: of the first alone
variants:
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("key", "values"), TABLE_8.items(), ids=lambda x: "-".join(map(str, x)))
def test_configs_hold_table_8(key: tuple[str, str], values: tuple[Any, ...]) -> None:
    recipe = read_recipe(CONFIGS / f"{key[0]}.yaml", key[1])
    assert recipe.layer == "neurocoder"
    options = recipe.layer_options
    found = (*(options[name] for name in OPTIONS), recipe.orth_coef, options["residual"])
    assert (*found, recipe.optimizer, recipe.batch_size) == values


def test_every_config_says_which_command_reads_it() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        task = read_recipe(path).task
        assert path.stem.startswith(task)
        command = "parameters" if task == "atari" else task
        config = "" if path.stem == task else f" --config {path.stem}"
        assert path.read_text().startswith(f"# python -m ncrl.tasks.{command}{config}\n")


def test_a_variant_changes_options_one_by_one(tmp_path: Path) -> None:
    text = BASE + "  more: {layer_options: {num_slots: 8}, network_options: {num_outputs: 9}}\n"
    recipe = read_recipe(written(tmp_path, text), "more")
    assert recipe.layer_options == {"num_slots": 8, "key_dim": 2}
    assert recipe.network_options == {"in_features": 4, "hidden": [3], "num_outputs": 9}
    assert (recipe.layer, recipe.epochs, recipe.orth_coef) == ("neurocoder", 2, 0.5)


def test_another_layer_or_network_starts_without_options(tmp_path: Path) -> None:
    text = BASE + "  plain: {layer: linear}\n  other: {network: lenet, orth_coef: 0}\n"
    recipes = read_recipes(written(tmp_path, text))
    assert list(recipes) == ["", "plain", "other"]
    assert recipes["plain"].layer_options == {}
    assert recipes["plain"].network_options["in_features"] == 4
    assert recipes["other"].network_options == {} and recipes["other"].orth_coef == 0
    assert recipes["other"].layer_options == {"num_slots": 6, "key_dim": 2}


def test_what_the_paper_counts_is_not_inherited(tmp_path: Path) -> None:
    recipes = read_recipes(written(tmp_path, BASE + "  a: {epochs: 3}\n"))
    assert (recipes[""].paper_parameters, recipes[""].note) == (100, "of the first alone")
    assert (recipes["a"].paper_parameters, recipes["a"].note) == (None, "")


def bomb(form: str) -> str:
    """Nine levels of aliases, nine in each: 9^9 values in a few hundred bytes."""
    lines = ["a0: &a0 {k: v}"]
    for i in range(1, 10):
        aliases = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {form.replace('ALIASES', aliases)}")
    return "\n".join(lines)


REFUSED = [
    ("task: mnist", "does not say 'network'"),
    ("network: mlp", "does not say 'task'"),
    ("[1, 2]", "must hold settings as 'name: value' lines"),
    ("{", "cannot read .* it is not YAML"),
    ("[" * 2000 + "]" * 2000, "cannot read .* nested too deeply"),
    ("task: !!timestamp x", "cannot read .* it is not YAML"),
    ("task: !!bool x", "cannot read .* it is not YAML"),
    ("task: !!int ''", "cannot read .* it is not YAML"),
    ("task: !!python/name:os.x", "cannot read"),
    ("\xff: \x00", "cannot read"),
    ("task: mnist\nnetwork: mlp\nepochs: 2\nepochs: 3", "'epochs' 2 times"),
    ("task: mnist\nnetwork: mlp\nlayer_options: {a: 1, a: 2, a: 3}", "'a' 3 times"),
    ("1: 2", "must hold settings as 'name: value' lines"),
    ("task: mnist\nnetwork: mlp\nbatch_size: [" + "x, " * 20_000 + "]", "batch_size .* type int"),
    (bomb("[ALIASES]"), "by an alias"),
    (bomb("{<<: [ALIASES]}"), "by an alias"),
    ("task: mnist\nnetwork: &a [*a]", "by an alias"),
    (
        "task: mnist\nnetwork: mlp\nlearning_rate: " + "9" * 400,
        "learning_rate .*float, got a number of about 400 digits",
    ),
    ("task: mnist\nnetwork: mlp\nnetwork_options: {hidden: [1000000]}", "at most 100,000"),
    ("task: mnist\nnetwork: mlp\nnetwork_options: {hidden: [" + "9," * 101 + "]}", "at most 100 p"),
    ("task: mnist\nnetwork: mpl", "network must be one of .*'mpl'; nearest: mlp"),
    ("task: minst\nnetwork: mlp", "task must be one of .*nearest: mnist"),
    ("task: mnist\nnetwork: mlp\nlerning_rate: 1", "'lerning_rate'.*nearest: learning_rate"),
    ("task: mnist\nnetwork: mlp\nlearning_rate: fast", "learning_rate.*float.*'fast'"),
    ("task: mnist\nnetwork: mlp\nbatch_size: 0", "batch_size must lie in 1"),
    ("task: mnist\nnetwork: mlp\nlayer: neurocodr", "'neurocodr'; nearest: neurocoder"),
    ("task: mnist\nnetwork: mlp\nlayer: film\nlayer_options: {hiden: 3}", "'hiden'.*hidden"),
    ("task: mnist\nnetwork: mlp\nlayer_options: {num_slots: 3}", "'num_slots'.*layer_options"),
    ("task: mnist\nnetwork: mlp\nlayer_options: [3]", "layer_options must be a mapping"),
    ("task: mnist\nnetwork: mlp\nnetwork_options: 3", "network_options must be a mapping"),
    ("task: mnist\nnetwork: gru\nnetwork_options: {hidden: 3}", "'hidden'.*hidden_size"),
    ("task: mnist\nnetwork: gru\nnetwork_options: {layer: 3}", "'layer' in network_options"),
    ("task: mnist\nnetwork: mlp\nepochs: 1\niterations: 2", "epochs=1 and iterations=2"),
    ("task: mnist\nnetwork: mlp\nvariants: 3", "variants in .* must be a mapping"),
    ("task: mnist\nnetwork: mlp\nvariants: {a: 3}", "variant 'a' of .* must be a mapping"),
    ("task: mnist\nnetwork: mlp\nvariants: {a: {epoch: 3}}", "'epoch' in variant 'a'.*epochs"),
    ("task: mnist\nnetwork: mlp\nvariants: {a: {layer_options: 3}}", "layer_options in variant"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        read_recipes(written(tmp_path, text))


INPUTS = {
    "projected_linear": (2, 28, 28),
    "mlp": (2, 3, 32, 32),
    "lenet": (2, 3, 32, 32),
    "densenet": (2, 3, 32, 32),
    "gru": (3, 2, 2),
    "ntm": (3, 2, 10),
    "split_mlp": (2, 1, 32, 32),
}


@pytest.mark.parametrize("variant", ["", "linear", "official"])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_networks_of_the_recipes_compute(path: Path, variant: str) -> None:
    """At their real sizes: finite outputs and gradients, one row of outputs per input."""
    torch.manual_seed(0)
    recipe = read_recipe(path, variant)
    network: Any = build_network(recipe)
    if recipe.network == "atari":
        images = torch.randint(255, (2, 1, 80, 80), dtype=torch.uint8)
        y = network.act(images, network.initial_state(2), torch.ones(2, dtype=torch.bool)).log_prob
    elif recipe.network == "mlp" and recipe.task == "mnist":
        y = network(torch.randn(INPUTS["projected_linear"]))
    elif recipe.network == "resnet_mlp":  # whose parts are used apart
        y = network["classify"](torch.randn(2, network["backbone"].num_outputs))
    else:
        y = network(torch.randn(INPUTS[recipe.network]))
    y = y[0] if isinstance(y, tuple) else y
    assert 2 in y.shape[:2] and y.isfinite().all()
    y.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_missing_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"network 'mlp'.*in_features"):
        build_network(Recipe(network="mlp"))


def test_every_setting_is_documented_and_read_from_yaml(tmp_path: Path) -> None:
    recipe = read_recipe(CONFIGS / "cifar_densenet.yaml")
    assert all(entry.metadata["help"] for entry in fields(Recipe))
    values = {entry.name: getattr(recipe, entry.name) for entry in fields(Recipe)}
    assert read_recipe(written(tmp_path, yaml.safe_dump(values))) == recipe
