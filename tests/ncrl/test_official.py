"""The official variant against literal loops, the authors' own outputs, and by property.

Shape letters: B batch, P slots, K key, H heads, J steps, R = J*H components.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ncrl import NeurocoderConfig, NeurocoderLinear, orthogonal_loss
from ncrl.layers import make_layer as make_named_layer
from ncrl.neurocoder import OfficialNeurocoderLinear
from ncrl.neurocoder.official import (
    least_used_attention,
    scaled_cosine,
)
from tests.ncrl.layers import (
    assert_gradients_equal_those_of,
    assert_same_gradients,
    parameters_of,
    random_input,
    relative_error,
    touched,
)
from tests.official_reference import (
    OfficialSizes,
    official_orthogonality_reference,
    official_reference,
)
from tests.reference import orthogonal_norm_reference

AUTHORS = json.loads((Path(__file__).parent / "official_outputs.json").read_text())["cases"]
"""Numbers that the authors' module gave; the file says how."""


class Case(NamedTuple):
    """One configuration; the defaults are those of a small but complete layer."""

    in_features: int = 4
    out_features: int = 3
    num_slots: int = 6
    key_dim: int = 3
    num_heads: int = 2
    num_steps: int = 1
    num_least_used: int = 2
    sharpness: float = 1.0
    residual: bool = True
    bias: bool = True
    key_mode: str = "cb"
    controller: str = "auto"

    @property
    def lstm(self) -> bool:
        return self.num_steps > 1 or self.controller == "lstm"

    @property
    def sizes(self) -> OfficialSizes:
        return OfficialSizes(
            self.num_slots,
            self.key_dim,
            self.num_heads,
            self.num_steps,
            self.num_least_used,
            self.sharpness,
            self.key_mode,
            self.lstm,
            self.bias,
        )


CASES = {
    "single": Case(),
    "single-linear": Case(controller="linear", residual=False),
    "single-stored-keys": Case(key_mode="lk", bias=False, num_least_used=0),
    "single-sharp": Case(sharpness=20.0, key_mode="lk", num_heads=3),
    "single-bare": Case(residual=False, bias=False, num_least_used=3),
    "lstm": Case(controller="lstm"),
    "lstm-stored-keys": Case(controller="lstm", key_mode="lk", residual=False),
    "lstm-without-usage": Case(controller="lstm", num_least_used=0, bias=False),
    "two-steps": Case(num_steps=2, residual=False),
    "five-steps": Case(num_steps=5),
    "five-steps-stored-keys": Case(num_steps=5, key_mode="lk", num_least_used=3, bias=False),
    "five-steps-without-usage": Case(num_steps=5, num_least_used=0, key_mode="lk"),
    "five-steps-one-head": Case(num_steps=5, num_heads=1, num_least_used=1, residual=False),
    "five-steps-sharp": Case(num_steps=5, sharpness=3.0, num_least_used=3),
    "all-but-one-least-used": Case(num_steps=3, num_slots=4, num_least_used=3),
    "one-key-one-output": Case(num_steps=3, key_dim=1, out_features=1, num_heads=3),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def empty_layer(
    case: Case, dtype: torch.dtype = torch.float64, **options: Any
) -> OfficialNeurocoderLinear:
    return OfficialNeurocoderLinear(**case._asdict(), preset="official", dtype=dtype, **options)


def make_layer(case: Case, seed: int = 0) -> OfficialNeurocoderLinear:
    """A float64 layer whose parameters are all random, so that no bias or gate is at its start."""
    layer = empty_layer(case)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.8 * noise)
    return layer


# Values


@all_cases
def test_everything_equals_the_reference(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(3, case.in_features)
    with torch.no_grad():
        expected = official_reference(parameters_of(layer), case.sizes, x)
    attention = layer.attend(x)
    assert attention.u.shape == (3, case.num_steps * case.num_heads, case.num_slots)
    assert relative_error(attention.u, expected["u"]) < 1e-10
    assert relative_error(attention.v, expected["v"]) < 1e-10
    assert relative_error(attention.s, expected["s"]) < 1e-10
    assert relative_error(layer.singular_values(x), expected["sigma"]) < 1e-10
    assert relative_error(layer.program(x), expected["program"]) < 1e-10
    assert relative_error(layer(x), expected["output"]) < 1e-10
    with torch.no_grad():
        assert relative_error(layer(x), expected["output"]) < 1e-10


GRADIENT_CASES = [name for name in CASES if not name.startswith("one-key")]


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    """Including the parameters that get none."""
    case = CASES[name]

    def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return official_reference(state, case.sizes, x)["output"]

    assert_gradients_equal_those_of(
        reference, make_layer(case), random_input(2, case.in_features), some_idle=True
    )


def authors_layer(options: dict[str, Any]) -> OfficialNeurocoderLinear:
    """A layer of the sizes that all layers in the table have."""
    return OfficialNeurocoderLinear(
        3,
        2,
        num_slots=5,
        key_dim=2,
        num_heads=2,
        preset="official",
        dtype=torch.float64,
        **options,
    )


@pytest.mark.parametrize("name", AUTHORS)
def test_outputs_and_gradients_are_those_of_the_authors(name: str) -> None:
    table = AUTHORS[name]
    layer = authors_layer(table["options"])
    weights = {
        key: torch.tensor(value, dtype=torch.float64) for key, value in table["weights"].items()
    }
    layer.load_authors_state_dict(weights)
    x = torch.tensor(table["input"], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert relative_error(y, torch.tensor(table["output"], dtype=torch.float64)) < 1e-10
    gradient = torch.tensor(table["input_gradient"], dtype=torch.float64)
    assert relative_error(x.grad, gradient) < 1e-10
    assert orthogonal_loss(layer).item() == pytest.approx(table["orthogonality"], rel=1e-10)


# What differs from the paper, by hand


def test_short_vectors_meet_all_three_epsilons() -> None:
    """|q| = |k| = 1e-6 and K = 2: 1e-12 / (2 * 2e-6 * 2e-6 + 1e-6)."""
    keys = torch.tensor([1e-6, 0.0], dtype=torch.float64).expand(3, 1, 2)
    cosine = scaled_cosine(keys, keys, 1.0)
    expected = 1e-12 / (2 * (2e-6) ** 2 + 1e-6)
    torch.testing.assert_close(cosine, torch.full_like(cosine, expected), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ["single", "five-steps", "five-steps-without-usage"])
def test_zero_input_and_zero_parameters_are_finite(name: str) -> None:
    case = CASES[name]
    layer = empty_layer(case)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    x = torch.zeros(2, case.in_features, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    gradients = [("x", x.grad), *((n, p.grad) for n, p in layer.named_parameters())]
    for parameter_name, gradient in gradients:
        assert gradient is None or gradient.isfinite().all(), parameter_name


@pytest.mark.parametrize("num_least_used", [1, 2, 4])
def test_open_gates_of_the_first_step_choose_the_first_slots(num_least_used: int) -> None:
    """The gate multiplies usage, not content, and before any usage the first slots stand in."""
    layer = make_layer(Case(controller="lstm", num_least_used=num_least_used))
    with torch.no_grad():
        layer.get_parameter("composition.gate.bias").fill_(1000.0)
    expected = torch.zeros(3, 2, 6, dtype=torch.float64)
    expected[..., :num_least_used] = 1
    for weights in layer.attend(random_input(3, 4)):
        assert torch.equal(weights, expected)


@pytest.mark.parametrize(
    ("usage", "num_least_used", "expected"),
    [
        ([0.3, 0.1, 0.5, 0.2], 2, [0.0, 0.9, 0.0, 0.8]),
        ([0.3, 0.1, 0.5, 0.2], 3, [0.7, 0.9, 0.0, 0.8]),
        ([0.2, 0.1, 0.5, 0.2], 2, [0.0, 0.9, 0.0, 0.0]),
        ([0.2, 0.1, 0.5, 0.2], 3, [0.8, 0.9, 0.0, 0.8]),
        ([0.1, 0.1, 0.1, 0.5], 2, [0.0, 0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], 1, [0.0, 0.0, 0.0, 0.0]),
        # 1 - usage rounds to 1 in all three: that is a tie, too.
        ([1e-18, 2e-18, 3e-18, 0.5], 2, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_ties_select_fewer_slots(
    usage: list[float], num_least_used: int, expected: list[float]
) -> None:
    used = torch.tensor(usage, dtype=torch.float64).expand(3, 2, 1, 4)
    least_used = least_used_attention(used, num_least_used)
    wanted = torch.tensor(expected, dtype=torch.float64).expand(3, 2, 1, 4)
    torch.testing.assert_close(least_used, wanted, rtol=1e-12, atol=0.0)


# Gradients


@pytest.mark.parametrize("key_mode", ["cb", "lk"])
@pytest.mark.parametrize("widths", [(4, 3, 6), (9, 8, 5), (3, 9, 8)])
def test_orthogonality_includes_the_key_columns(
    key_mode: str, widths: tuple[int, int, int]
) -> None:
    in_features, out_features, num_slots = widths
    layer = make_layer(Case(in_features, out_features, num_slots, key_mode=key_mode))
    state = parameters_of(layer)
    loss, expected = orthogonal_loss(layer), official_orthogonality_reference(state)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    loss.backward()
    expected.backward()
    assert_same_gradients(layer, state, some_idle=True)
    stored = {name for name, value in state.items() if value.grad is not None}
    assert stored == {"memory.u", "memory.v", "memory.key_columns.u", "memory.key_columns.v"}


def test_squared_orthogonality() -> None:
    layer = make_layer(Case())
    state = parameters_of(layer)
    rows = [torch.cat([state[f"memory.key_columns.{n}"], state[f"memory.{n}"]], 1) for n in "uv"]
    expected = sum(orthogonal_norm_reference(memory).item() ** 2 for memory in rows)
    assert layer.memory.orthogonality(squared=True).item() == pytest.approx(expected, rel=1e-10)


def test_floor_counts_the_key_columns() -> None:
    """P = 50 rows of width K + out = 7 cannot come closer than sqrt(43); K + in = 54 can."""
    layer = empty_layer(Case(49, 2, 50, key_dim=5))
    assert layer.memory.orthogonality_floor() == pytest.approx(math.sqrt(43))
    assert layer.memory.orthogonality_floor() == pytest.approx(6.557, abs=6e-4)


# Counts


def count(module: nn.Module, *, without: str = "nothing") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith(without))


def expected_count(case: Case) -> int:
    """The formulas by which the paper's Table 9 was taken apart."""
    i, o, P, K, H = case[:5]
    n = 3 * H * K + 1
    total = P * (3 * K + i + o + 1) + o
    if case.lstm:
        total += 4 * n * (i + n) + 10 * n + i * (n + 1)
        total += 3 * P * (i + 1) if case.num_least_used else 0
    else:
        total += 3 * H * K * (i + 1) + i + 1
    total += K * (i + o + 2) if case.key_mode == "cb" else 0
    return total + (i * o if case.residual else 0)


@all_cases
def test_count_formula(case: Case) -> None:
    """The bias counts even where it is not added."""
    layer = empty_layer(case)
    assert count(layer) == expected_count(case)
    assert layer.state_dict()["bias"].shape == (case.out_features,)


def test_count_of_the_mnist_classifier() -> None:
    """7.3K, without what the authors' layer holds and does not use."""
    case = Case(200, 10, 5, 2, 1, num_steps=5, num_least_used=0, residual=False)
    assert count(empty_layer(case), without="composition.unused") == 7_385
    case = case._replace(num_slots=6, key_mode="lk")
    assert count(empty_layer(case), without="composition.unused") == 7_178


def split_mnist(hidden: int, **options: Any) -> nn.Sequential:
    """The authors' network: 32 x 32 pixels, two hidden layers, one head."""
    widths = [(1024, hidden), (hidden, hidden), (hidden, 2)]
    options = {"preset": "official", "num_slots": 50, "num_heads": 10, "key_dim": 5, **options}
    return nn.Sequential(
        *(OfficialNeurocoderLinear(i, o, residual=False, bias=False, **options) for i, o in widths)
    )


def test_frozen_controller_count() -> None:
    """In the authors' first public state only the stored rows and the biases were trained."""
    model = split_mnist(400, frozen_controller=True)
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(trainable) == 134_502
    assert count(model) == 423_539


@all_cases
def test_what_a_frozen_controller_still_trains(case: Case) -> None:
    layer = empty_layer(case, frozen_controller=True)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    columns = {f"memory.key_columns.{name}" for name in "uvs"}
    residual = {"integration.residual"} if case.residual else set()
    assert trained == {"memory.u", "memory.v", "memory.s", "bias"} | columns | residual
    x = random_input(2, case.in_features).requires_grad_()
    layer(x).sum().backward()
    assert touched(x)


# The authors' weights


@pytest.mark.parametrize("name", AUTHORS)
def test_names_shapes_and_values_survive_the_round_trip(name: str) -> None:
    """The names are those that the authors' module listed for the same options."""
    table = AUTHORS[name]
    layer = authors_layer(table["options"])
    given = {
        key: torch.tensor(value, dtype=torch.float64) for key, value in table["weights"].items()
    }
    parameters = dict(layer.named_parameters())
    layer.load_authors_state_dict(given)
    returned = layer.authors_state_dict()
    assert returned.keys() == given.keys()
    for key, value in returned.items():
        assert torch.equal(value, given[key]), key
        value.add_(1.0)
    for key, parameter in layer.named_parameters():
        assert parameter is parameters[key]
        assert parameter.requires_grad
    assert torch.equal(layer.authors_state_dict()["PM_U"], given["PM_U"])


@all_cases
def test_every_parameter_has_a_name_of_the_authors(case: Case) -> None:
    layer, other = make_layer(case), make_layer(case, seed=7)
    state = layer.authors_state_dict()
    assert sum(value.numel() for value in state.values()) == count(layer)
    assert not any(value.requires_grad for value in state.values())
    other.load_authors_state_dict(state)
    for (name, value), copied in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, copied), name


def drop(state: dict[str, Tensor]) -> None:
    del state["PM_U"]


def add(state: dict[str, Tensor]) -> None:
    state["res_weight_l"] = torch.zeros(2)


def reshape(state: dict[str, Tensor]) -> None:
    state["bias"] = state["bias"].unsqueeze(0)


def flatten_initial_state(state: dict[str, Tensor]) -> None:
    name = "rnn_program_controller.lstm_h_bias"
    state[name] = state[name].squeeze(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([drop], ["missing PM_U"]),
        ([add], ["unexpected res_weight_l"]),
        ([reshape], ["bias", "[1, 3]", "[3]"]),
        ([flatten_initial_state], ["lstm_h_bias", "[1, 19]", "[1, 1, 19]"]),
        ([drop, add, reshape], ["missing PM_U", "unexpected res_weight_l", "[1, 3]"]),
    ],
)
def test_unfitting_weights_are_refused_whole(
    changes: list[Callable[[dict[str, Tensor]], None]], words: list[str]
) -> None:
    state = make_layer(CASES["five-steps"], seed=7).authors_state_dict()
    for change in changes:
        change(state)
    layer = make_layer(CASES["five-steps"])
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError) as error:
        layer.load_authors_state_dict(state)
    for word in words:
        assert word in str(error.value)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_mode_are_refused() -> None:
    state = make_layer(CASES["single"]).authors_state_dict()
    with pytest.raises(ValueError, match="read_mode"):
        make_layer(CASES["five-steps"]).load_authors_state_dict(state)
    with pytest.raises(ValueError, match="unexpected p2ku"):
        make_layer(CASES["single-sharp"]).load_authors_state_dict(state)


def test_each_preset_has_its_class() -> None:
    """The registry takes either; a class refuses the other's."""
    assert type(make_named_layer("neurocoder", 4, 3, preset="official")) is OfficialNeurocoderLinear
    assert type(make_named_layer("neurocoder", 4, 3)) is NeurocoderLinear
    with pytest.raises(ValueError, match=r"preset='official'.*make_layer"):
        NeurocoderLinear(4, 3, preset="official")
    with pytest.raises(ValueError, match="preset='paper'"):
        OfficialNeurocoderLinear(4, 3, NeurocoderConfig())
    assert OfficialNeurocoderLinear(4, 3).config.preset == "official"


# Start


def assert_uniform(values: Tensor, bound: float) -> None:
    """Within the bound, and spread over it: to 4.5 standard errors."""
    values = values.detach()
    assert float(values.abs().max()) <= bound
    spread = 2 / math.sqrt(values.numel())
    assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=spread)


def assert_normal(values: Tensor, std: float) -> None:
    """Mean and spread to 4.5 standard errors."""
    values = values.detach()
    root = math.sqrt(values.numel())
    assert float(values.std()) == pytest.approx(std, rel=3.2 / root)
    assert float(values.mean()) == pytest.approx(0.0, abs=4.5 * std / root)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_initial_values(num_steps: int, residual: bool, reset: bool) -> None:
    torch.manual_seed(4)
    layer = empty_layer(Case(30, 40, 50, 5, 6, num_steps, residual=residual), torch.float32)
    if reset:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(9.0)
        layer.reset_parameters()
    value = dict(layer.named_parameters())
    for name, width in (("u", 30), ("v", 40), ("s", 1)):
        bound = math.sqrt(6 / (50 + 5 + width))
        assert_uniform(value[f"memory.{name}"], bound)
        assert_uniform(value[f"memory.key_columns.{name}"], bound)
    assert_uniform(value["memory.key_net_u.weight"], 1 / math.sqrt(30))
    assert_uniform(value["memory.key_net_v.weight"], 1 / math.sqrt(40))
    if num_steps == 1:
        for name in "uvs":
            assert_uniform(value[f"composition.query.{name}.weight"], math.sqrt(6 / (30 + 30)))
            assert_normal(value[f"composition.query.{name}.bias"], 0.01)
        assert_uniform(value["integration.gate.weight"], math.sqrt(6 / 31))
        assert abs(value["integration.gate.bias"].item()) < 0.05
    else:
        for name in ("weight_ih", "weight_hh"):
            assert_uniform(value[f"composition.lstm.{name}"], 5 / math.sqrt(30 + 91))
        assert not value["composition.lstm.bias_ih"].any()
        assert not value["composition.lstm.bias_hh"].any()
        assert_normal(value["composition.lstm.h0"], 0.05)
        assert_normal(value["composition.lstm.c0"], 0.05)
        assert_uniform(value["composition.gate.weight"], 1 / math.sqrt(30))
        assert_uniform(value["composition.unused.weight"], 1 / math.sqrt(91))
    if residual:
        assert_uniform(value["integration.residual"], math.sqrt(6 / 70))
        assert_normal(value["bias"], 0.01)
    else:
        assert not value["bias"].any()


def test_in_place_of_a_linear_layer() -> None:
    linear = nn.Linear(4, 3).double()
    options: dict[str, Any] = {"preset": "official", "num_slots": 6}
    layer = OfficialNeurocoderLinear.from_linear(linear, keep_weight=True, **options)
    assert torch.equal(layer.get_parameter("integration.residual"), linear.weight.T)
    assert torch.equal(layer.get_parameter("bias"), linear.bias)
    with pytest.raises(ValueError, match="needs a residual program"):
        options_without = options | {"residual": False}
        OfficialNeurocoderLinear.from_linear(linear, keep_weight=True, **options_without)
    without = OfficialNeurocoderLinear.from_linear(nn.Linear(4, 3, bias=False), **options)
    x = random_input(2, 4).float()
    before = without(x)
    with torch.no_grad():
        without.get_parameter("bias").fill_(9.0)
    assert torch.equal(without(x), before)
