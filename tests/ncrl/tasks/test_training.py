"""The training loop: what it minimises, resuming bit for bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncrl.baselines import balance_loss, record_gates
from ncrl.diagnostics import describe
from ncrl.layers import make_layer
from ncrl.neurocoder import NeurocoderConv2d, orthogonal_loss
from ncrl.shell.screen import say
from ncrl.shell.tensors import write_tensors
from ncrl.tasks import training
from ncrl.tasks.experiment import (
    Experiment,
    attention_bound,
    describe_layers,
    evaluating,
    random_stream,
)
from ncrl.tasks.recipes import Recipe
from ncrl.tasks.results import read_result
from ncrl.tasks.training import (
    CHECKPOINT_FILE,
    NonFiniteError,
    Run,
    Stopped,
    fingerprint,
    identity,
    learning_rate,
    load_weights,
    make_optimizer,
    train,
)

LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "neurocoder": {"num_slots": 4, "num_heads": 2, "num_steps": 2, "num_least_used": 1},
    "moe": {"num_experts": 3, "top_k": 2},
}
UPDATES = 9


class Toy(Experiment):
    """Learn to halve the input, with dropout, so that the random stream matters."""

    data = "generated"
    best = {"mse": "min"}  # noqa: RUF012 - as in the documentation

    def __init__(self, recipe: Recipe, seed: int = 0) -> None:
        torch.manual_seed(seed)
        options = LAYER_OPTIONS.get(recipe.layer, {})
        layer = make_layer(recipe.layer, 5, 5, **options)
        self.model = nn.Sequential(nn.Dropout(0.2), layer)
        self.seed = seed
        self.num_updates = recipe.iterations or UPDATES
        self.evaluate_every = 4
        self.after: Callable[[int], None] = lambda update: None
        self.count = 0

    def loss(self, update: int) -> Tensor:
        x = torch.randn(8, 5, generator=random_stream(self.seed, "train", update))
        return (self.model(x) - x / 2).square().mean()

    def after_update(self, update: int) -> None:
        self.count += 1
        self.after(update)

    def evaluate(self) -> dict[str, float]:
        assert not self.model.training and not torch.is_grad_enabled()
        x = torch.randn(8, 5, generator=random_stream(0, "test", 0))
        return {"mse": float((self.model(x) - x / 2).square().mean())}

    def report(self) -> dict[str, Any]:
        return {"count": self.count}

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def make_run(folder: Path, recipe: Recipe, seed: int = 0) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run("toy", "toy", recipe, seed, torch.device("cpu"), folder)


def toy_recipe(**changes: Any) -> Recipe:
    recipe = Recipe(layer="neurocoder", learning_rate=0.01, orth_coef=0.1)
    return dataclasses.replace(recipe, **changes)


def weights(experiment: Experiment) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in experiment.model.state_dict().items()}


def stop_after(update: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    return lambda current: os.kill(os.getpid(), number) if current == update else None


OPTIMIZERS = [
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "adam"},
    {"optimizer": "adagrad"},
    {"optimizer": "rmsprop", "momentum": 0.9, "rmsprop_alpha": 0.95},
]


@pytest.mark.parametrize("layer", ["neurocoder", "moe", "linear"])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda options: options["optimizer"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], layer: str
) -> None:
    recipe = toy_recipe(layer=layer, **options)
    whole = Toy(recipe, 7)
    expected = train(make_run(tmp_path / "a", recipe, 7), whole)

    run = make_run(tmp_path / "b", recipe, 7)
    first = Toy(recipe, 7)
    first.after = stop_after(5)
    with pytest.raises(Stopped) as stopped:
        train(run, first)
    assert stopped.value.exit_code == 143
    assert run.result is None and (run.folder / CHECKPOINT_FILE).is_file()
    second = Toy(recipe, 7)
    torch.manual_seed(12345)  # the state of a new process does not matter
    result = train(run, second)

    final = weights(second)
    assert all(torch.equal(value, final[name]) for name, value in weights(whole).items())
    assert result.curve == expected.curve and result.metrics == expected.metrics
    assert result.details == {"count": UPDATES}
    assert not (run.folder / CHECKPOINT_FILE).exists()
    assert run.result == result == read_result(run.folder / "result.json")


@pytest.mark.parametrize("layer", ["neurocoder", "moe", "linear"])
def test_an_update_is_the_gradient_of_all_losses(tmp_path: Path, layer: str) -> None:
    """One step of plain SGD, computed apart: task + a L_o + balance, limited, and decayed."""
    recipe = toy_recipe(
        layer=layer,
        iterations=1,
        optimizer="sgd",
        learning_rate=0.5,
        weight_decay=0.1,
        max_grad_norm=0.05,
        orth_coef=0.3,
        balance_coef=0.7,
    )
    expected = Toy(recipe)
    with record_gates(expected.model) as gates:
        loss = expected.loss(0)
    loss = loss + 0.3 * orthogonal_loss(expected.model)
    if layer == "moe":
        loss = loss + 0.7 * balance_loss(gates)
    parameters = list(expected.model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]  # noqa: B905
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    scale = min(1.0, 0.05 / norm)
    assert scale < 1, "the limit must matter"
    before = [parameter.detach().clone() for parameter in parameters]
    experiment = Toy(recipe)
    train(make_run(tmp_path, recipe), experiment)
    for old, gradient, new in zip(before, gradients, experiment.model.parameters(), strict=True):
        if gradient.any():
            step = scale * gradient + 0.1 * old
            assert torch.allclose(new, old - 0.5 * step, atol=1e-6)


def test_the_learning_rate_falls_to_a_tenth_after_half_and_three_quarters() -> None:
    recipe = toy_recipe(schedule="steps", learning_rate=8.0)
    rates = [learning_rate(recipe, update, 8) for update in range(8)]
    assert rates == pytest.approx([8, 8, 8, 8, 0.8, 0.8, 0.08, 0.08])
    assert {learning_rate(toy_recipe(), update, 8) for update in range(8)} == {0.01}


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda options: options["optimizer"])
def test_optimisers_have_the_recipes_settings(options: dict[str, Any]) -> None:
    recipe = toy_recipe(**options)
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(recipe, model)
    assert type(optimizer).__name__.lower() == options["optimizer"]
    (group,) = optimizer.param_groups
    assert group["params"] == [model.weight] and group["lr"] == 0.01
    assert group["weight_decay"] == options.get("weight_decay", 0)
    for ours, theirs in (("momentum", "momentum"), ("rmsprop_alpha", "alpha")):
        if ours in options:
            assert group[theirs] == options[ours]


def test_best_metrics_are_over_all_evaluations(tmp_path: Path) -> None:
    recipe = toy_recipe(learning_rate=0.1, iterations=16)
    row = train(make_run(tmp_path, recipe), Toy(recipe))
    assert [point["update"] for point in row.curve] == [4, 8, 12, 16]
    assert row.metrics["best_mse"] == min(point["mse"] for point in row.curve)
    assert row.metrics["mse"] == row.curve[-1]["mse"]
    assert row.updates == 16 and row.data == "generated" and row.layer == "neurocoder"
    assert row.recipe["learning_rate"] == 0.1 and row.seconds >= 0
    assert row.hardware and row.versions["torch"] == torch.__version__ and row.command


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path: Path) -> None:
    recipe = toy_recipe(optimizer="sgd", learning_rate=1e30, orth_coef=0.0, iterations=60)
    run = make_run(tmp_path, recipe)
    with pytest.raises(NonFiniteError, match=r"toy, seed 0: the loss of update \d+ is (nan|inf)"):
        train(run, Toy(recipe))
    assert not (tmp_path / CHECKPOINT_FILE).exists() and run.result is None


@pytest.mark.parametrize("stops", [False, True])
def test_a_weight_that_the_last_update_broke_leaves_neither_row_nor_checkpoint(
    stops: bool, tmp_path: Path
) -> None:
    def break_weight(update: int) -> None:
        if update == UPDATES - 1:
            next(experiment.model.parameters()).data.fill_(math.nan)
            if stops:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = toy_recipe(iterations=2 * UPDATES if stops else UPDATES)
    run, experiment = make_run(tmp_path, recipe), Toy(recipe)
    experiment.evaluate_every, experiment.after = 100, break_weight
    with pytest.raises(NonFiniteError, match=f"is not finite after {UPDATES} updates; lower"):
        train(run, experiment)
    assert run.result is None and not (tmp_path / CHECKPOINT_FILE).exists()


def interrupted(folder: Path, recipe: Recipe) -> Run:
    run, experiment = make_run(folder, recipe), Toy(recipe)
    experiment.after = stop_after(2, signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        train(run, experiment)
    assert stopped.value.exit_code == 130
    return run


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    recipe = toy_recipe()
    run = interrupted(tmp_path, recipe)
    path = tmp_path / CHECKPOINT_FILE
    good = path.read_bytes()
    without_checksum = io.BytesIO()
    torch.save(torch.load(path, weights_only=True), without_checksum)
    for data in (good[:-200], b"", b"no checkpoint", without_checksum.getvalue()):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"checkpoint.pt.*delete it to start anew") as error:
            train(run, Toy(recipe))
        assert "\n" not in str(error.value)
    path.write_bytes(good)
    assert train(run, Toy(recipe)).updates == UPDATES


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    recipe = toy_recipe(optimizer="sgd", layer="linear")
    run = interrupted(tmp_path, recipe)
    path = tmp_path / CHECKPOINT_FILE
    good = path.read_bytes()
    for place in random.Random(0).sample(range(len(good)), 150):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot read .*checkpoint.pt.*delete it to start"):
            train(run, Toy(recipe))


def test_a_checkpoint_that_is_no_file_is_no_reason_to_start_anew(tmp_path: Path) -> None:
    recipe = toy_recipe()
    path = tmp_path / CHECKPOINT_FILE
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"checkpoint.pt: it is no regular file"):
        train(make_run(tmp_path, recipe), Toy(recipe))


def first(state: dict[str, Any], name: str, value: Any) -> None:
    state["optimizer"]["state"][0][name] = value


def set_in(state: dict[str, Any], name: str, value: Any) -> None:
    state[name] = value


SPOILT: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda s: first(s, "exp_avg", torch.zeros(1)), "'exp_avg' of parameter 0 must be .* shape"),
    (lambda s: first(s, "exp_avg", torch.zeros(5, 5, dtype=torch.int64)), "torch.float32"),
    (lambda s: first(s, "exp_avg", 1.0), "must be a tensor"),
    (lambda s: first(s, "step", torch.tensor(-1.0)), "at least 0"),
    (lambda s: first(s, "step", torch.tensor(4.0)), "0 .. 3, got 4"),
    (lambda s: first(s, "step", torch.tensor(math.nan)), "must be a number"),
    (lambda s: first(s, "step", torch.zeros(5)), "must be one number"),
    (lambda s: first(s, "more", torch.zeros(5)), "must hold exp_avg, exp_avg_sq, step"),
    (lambda s: s["optimizer"]["state"].update({99: {}}), "99, which is no parameter"),
    (lambda s: s["optimizer"]["param_groups"][0].update(eps="x"), "'eps' must be like"),
    (lambda s: s["optimizer"]["param_groups"][0].update(params=[0]), "must hold parameters 0 to"),
    (lambda s: set_in(s, "optimizer", []), "must hold 'state'"),
    (lambda s: set_in(s, "update", 2.0), "update must lie in 0 .. 9"),
    (lambda s: set_in(s, "update", -1), "update must lie in 0 .. 9"),
    (lambda s: set_in(s, "model", {"x": 1}), "cannot be used"),
    (lambda s: set_in(s, "random", {"cpu": 1}), "cannot be used"),
    (lambda s: set_in(s, "big", torch.zeros(1).expand(10**9)), "would take 4,000"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_a_state_that_does_not_fit_is_refused_before_it_is_used(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    """With a right checksum: a stranger may have written it."""
    recipe = toy_recipe(layer="linear")
    run = interrupted(tmp_path, recipe)
    path = tmp_path / CHECKPOINT_FILE
    state = torch.load(path, weights_only=True)
    spoil(state)
    write_tensors(path, state)
    with pytest.raises(ValueError, match=rf"checkpoint.pt.*{message}") as error:
        train(run, Toy(recipe))
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = toy_recipe()
    run = interrupted(tmp_path, recipe)
    other = toy_recipe(orth_coef=0.2)
    with pytest.raises(ValueError, match="is no checkpoint of this run"):
        train(run._replace(recipe=other), Toy(other))
    with pytest.raises(ValueError, match="is no checkpoint of this run"):
        train(run._replace(seed=1), Toy(recipe))


def test_a_checkpoint_does_not_choose_the_kernel_of_the_optimiser(tmp_path: Path) -> None:
    """Older ones say that SGD with momentum was fused, which takes no layer that starts later."""
    recipe = toy_recipe(layer="linear", optimizer="sgd", momentum=0.9)
    run = interrupted(tmp_path, recipe)
    path = tmp_path / CHECKPOINT_FILE
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = True
    write_tensors(path, state)
    resumed = training.Training(run, Toy(recipe))
    resumed.resume()
    assert not resumed.optimizer.param_groups[0]["fused"]


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (Path("canary"),)

    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / CHECKPOINT_FILE, {"model": Malicious()})
    with pytest.raises(ValueError, match=r"cannot read .*checkpoint.pt.*more than tensors"):
        train(make_run(tmp_path, toy_recipe()), Toy(toy_recipe()))
    assert not (tmp_path / "canary").exists()


def test_checkpoints_are_written_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no least time between them: after every update."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    recipe, seen = toy_recipe(), []
    experiment = Toy(recipe)
    experiment.after = lambda update: seen.append((tmp_path / CHECKPOINT_FILE).exists())
    train(make_run(tmp_path, recipe), experiment)
    assert seen == [False] + [True] * (UPDATES - 1)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, toy_recipe())
    train(run, Toy(run.recipe))
    with pytest.raises(ValueError, match=r"model.pt does not fit"):
        load_weights(run, nn.Linear(2, 2))


def test_random_streams_follow_from_their_arguments() -> None:
    def numbers(*key: Any) -> Tensor:
        return torch.rand(4, generator=random_stream(*key))

    assert torch.equal(numbers(1, "train", 2), numbers(1, "train", 2))
    keys = [(1, "train", 2), (1, "train", 3), (2, "train", 2), (1, "test", 2), (2**31, "train", 2)]
    streams = torch.stack([numbers(*key) for key in keys])
    assert len(streams.unique(dim=0)) == len(keys)
    state = torch.get_rng_state()
    numbers(1, "train", 2)
    assert torch.equal(torch.get_rng_state(), state), "the global stream is not touched"


def test_the_fingerprint_is_of_what_matters() -> None:
    recipe = toy_recipe()

    def mark(recipe: Recipe, data: str = "data", **readings: str) -> str:
        experiment = Toy(toy_recipe())
        experiment.data, experiment.readings = data, readings
        return fingerprint(identity(recipe, experiment))

    base = mark(recipe)
    assert base == mark(toy_recipe(note="x", paper_parameters=3))
    others = [
        mark(toy_recipe(learning_rate=0.02)),
        mark(toy_recipe(layer_options={"num_slots": 9})),
        mark(recipe, "other data"),
        mark(recipe, pixels="0 to 1"),
    ]
    assert len({base, *others}) == 5


def test_layers_are_described_by_name_and_left_as_they_were() -> None:
    torch.manual_seed(0)
    layers = [make_layer("neurocoder", 6, 6, num_slots=5, num_heads=2) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Linear(6, 2))
    x = torch.randn(7, 6)
    reports = describe_layers(model, x)
    assert list(reports) == ["0", "2"] and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        inner = model[1](model[0](x))
        largest = max(float(part.max()) for part in layers[1].attend(inner))
    assert reports["2"]["max_attention"] == pytest.approx(largest)
    assert reports["2"]["attention_bound"] == pytest.approx(math.e / (math.e + 4 / math.e))
    assert reports["0"]["max_attention"] <= reports["0"]["attention_bound"]
    assert reports["0"]["parameters"] == sum(p.numel() for p in layers[0].parameters())
    assert reports["0"]["parameters_of_plain"] == 6 * 6 + 6
    assert len(reports["0"]["singular_values"]) == 2


def test_a_convolution_is_described_on_what_its_programs_are_composed_from() -> None:
    torch.manual_seed(0)
    layer = NeurocoderConv2d(3, 4, 3, num_slots=5, num_heads=2)
    images = torch.randn(6, 3, 8, 8)
    report = describe_layers(nn.Sequential(layer), images)["0"]
    expected = describe(layer, layer.description(images))
    assert report["max_attention"] == pytest.approx(expected.max_attention)


def test_what_a_described_layer_does_not_have_is_not_counted() -> None:
    """The authors' layer stores a bias without adding it; attention within groups of slots is no
    softmax over all of them."""
    official = make_layer("neurocoder", 6, 4, bias=False, preset="official", num_slots=5)
    grown = make_layer("neurocoder", 6, 4, num_slots=4, controller="projection", num_least_used=0)
    grown.freeze_slots()
    grown.grow(4)
    x = torch.randn(3, 6)
    assert describe_layers(nn.Sequential(official), x)["0"]["parameters_of_plain"] == 24
    assert "attention_bound" not in describe_layers(nn.Sequential(grown), x)["0"]


def test_layers_are_described_on_all_their_calls_that_count() -> None:
    torch.manual_seed(0)
    layer = make_layer("neurocoder", 6, 6, num_slots=5, num_heads=2)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.stack([self.layer(x) for x in inputs])

    x = torch.randn(4, 3, 6)  # [T, B, features]
    counted = torch.arange(4)[:, None] < torch.tensor([1, 4, 2])
    for keep in (None, counted):
        used = x.flatten(0, 1) if keep is None else x[keep]
        report = describe_layers(Loop(), x, counted=None if keep is None else keep.flatten())
        with torch.no_grad():
            largest = max(float(part.max()) for part in layer.attend(used))
        assert report["layer"]["max_attention"] == pytest.approx(largest)
        expected = describe(layer, used).attention_entropy
        assert report["layer"]["attention_entropy"] == pytest.approx(expected)


def test_the_bound_is_that_of_the_most_unequal_cosines() -> None:
    for slots, sharpness in ((5, 1.0), (30, 10.0), (1, 3.0)):
        scores = torch.tensor([sharpness] + [-sharpness] * (slots - 1), dtype=torch.float64)
        assert attention_bound(slots, sharpness) == pytest.approx(float(scores.softmax(0)[0]))


def test_evaluating_restores_the_modes_after_an_error() -> None:
    """Of every part: a frozen backbone stays in eval mode while the model is trained."""
    model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Dropout())
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert [part.training for part in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


def test_a_reader_who_has_gone_is_no_reason_to_stop() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"what any other writer meets")
        say("nobody reads this", stream)
        say("nor this", stream)
    assert stream.closed, "closing flushes what is left, which must not fail either"
