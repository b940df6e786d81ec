"""Every option of a Neurocoder layer against the literal loops of tests/reference.py.

Shape letters: B batch, P slots, K key, H heads, J steps, h controller width.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ncrl import NeurocoderConfig, NeurocoderLinear, layers, orthogonal_loss
from ncrl.neurocoder.config import CHOICES, PAPER_ONLY, SWITCHES
from tests.ncrl.layers import Case, close, empty_layer, make_layer, parameters_of, random_input
from tests.reference import neurocoder_reference

SMALL = Case(4, 3, num_slots=5, key_dim=2, num_heads=2, controller_size=3, sharpness=2.0)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate-slot": {"gate": "slot"},
    "gate-head": {"gate": "head"},
    "gate-slot-one-head": {"gate": "slot", "num_heads": 1},
    "gate-head-one-head": {"gate": "head", "num_heads": 1},
    "learned-sharpness": {"learned_sharpness": True},
    "linear": {"controller": "linear"},
    "residual-rank-1": {"residual_rank": 1},
    "residual-rank-2": {"residual_rank": 2},
    "residual-rank-surplus": {"residual_rank": 6},
    "without-residual": {"residual": False},
    "residual-without-gate": {"residual_gate": False},
    "residual-rank-1-without-gate": {"residual_rank": 1, "residual_gate": False},
    "linear-residual-without-gate": {"controller": "linear", "residual_gate": False},
    "detach-usage": {"detach_usage": True},
    "detach-usage-gate-head": {"detach_usage": True, "gate": "head"},
    "frozen-controller": {"frozen_controller": True},
    "all": {
        "gate": "slot",
        "learned_sharpness": True,
        "residual_rank": 2,
        "detach_usage": True,
        "bias": False,
    },
    "all-linear": {
        "controller": "linear",
        "gate": "head",
        "learned_sharpness": True,
        "residual_rank": 1,
    },
}

TABLE = {
    f"{name}-J{steps}-l{least}": SMALL._replace(num_steps=steps, num_least_used=least, **options)
    for name, options in OPTIONS.items()
    for steps in (1, 3)
    for least in (0, 2)
    if not (options.get("controller") == "linear" and steps > 1)
}
whole_table = pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())


def gradients(layer: NeurocoderLinear, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed function of layer(x), by the name of the parameter; `x` for the input."""
    x = x.clone().requires_grad_()
    target = random_input(*x.shape[:-1], layer.out_features, seed=5)
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(layer(x).mul(target).sum(), [x, *parameters.values()])
    return dict(zip(["x", *parameters], found, strict=True))


@whole_table
def test_values_and_gradients_equal_the_reference(case: Case) -> None:
    layer = make_layer(case, seed=3)
    x = random_input(2, case.in_features)
    state = parameters_of(layer)
    reference_x = x.clone().requires_grad_()
    expected = neurocoder_reference(state, case.sizes, reference_x)

    attention = layer.attend(x)
    for name in "uvs":
        close(getattr(attention, name), expected[name])
    close(layer.singular_values(x), expected["sigma"])
    close(layer.program(x), expected["program"])
    close(layer(x), expected["output"])
    residual = 0.0 if layer.integration is None else layer.integration.matrix()
    scaled = layer.residual_scale(x)[:, None, None] * residual
    close(layer.active_program(x) + scaled, expected["program"])
    with torch.no_grad():  # rows, where there is one step
        close(layer(x), expected["output"])

    target = random_input(2, case.out_features, seed=5)
    expected["output"].mul(target).sum().backward()
    slopes = {"x": reference_x} | state
    for name, gradient in gradients(layer, x).items():
        wanted = slopes[name].grad
        assert wanted is not None, name
        close(gradient, wanted)


@whole_table
def test_state_dict_names_and_shapes(case: Case) -> None:
    i, o, P, K, H = case.in_features, case.out_features, *SMALL[2:4], case.num_heads
    h, r = case.controller_size, case.residual_rank
    per_memory = {"slot-head": P * H, "slot": P, "head": H}[case.gate]
    rows = 3 * (H * K + (per_memory if case.num_least_used else 0))
    expected = {
        "memory.u": (P, i),
        "memory.v": (P, o),
        "memory.s": (P, 1),
        "memory.key_net.weight": (3 * K, i + o + 1),
        "memory.key_net.bias": (3 * K,),
        "composition.head.weight": (rows, h),
        "composition.head.bias": (rows,),
    }
    if case.controller == "linear":
        expected |= {"composition.linear.weight": (h, i), "composition.linear.bias": (h,)}
    else:
        expected |= {
            "composition.lstm.weight_ih": (4 * h, i),
            "composition.lstm.weight_hh": (4 * h, h),
            "composition.lstm.bias_ih": (4 * h,),
            "composition.lstm.bias_hh": (4 * h,),
        }
    if case.learned_sharpness:
        expected["composition.log_sharpness"] = ()
    if case.residual:
        if case.residual_gate:
            expected |= {"integration.gate.weight": (1, i), "integration.gate.bias": (1,)}
        if r is None:
            expected["integration.residual"] = (i, o)
        else:
            expected |= {"integration.left": (i, r), "integration.right": (r, o)}
    if case.bias:
        expected["bias"] = (o,)
    layer = empty_layer(case)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected
    assert {name for name, _ in layer.named_parameters()} == set(expected)


@pytest.mark.parametrize("gate", CHOICES["gate"])
def test_gates_start_half_open(gate: str) -> None:
    """With the weights of the head at zero every gate is sigmoid(bias) = 1/2 at the start."""
    case = SMALL._replace(gate=gate, num_steps=1)
    layer = empty_layer(case)
    with torch.no_grad():
        layer.composition.head.weight.zero_()
    for weights in layer.attend(random_input(3, case.in_features)):
        close(weights.sum(-1), torch.full_like(weights.sum(-1), 0.5), 1e-6)


# frozen_controller

FROZEN = {
    "default": SMALL._replace(num_steps=3, frozen_controller=True),
    "one-step": SMALL._replace(num_steps=1, frozen_controller=True, learned_sharpness=True),
    "linear": SMALL._replace(num_steps=1, frozen_controller=True, controller="linear"),
    "low-rank": SMALL._replace(frozen_controller=True, residual_rank=2),
    "bare": SMALL._replace(frozen_controller=True, residual=False, bias=False),
}


def is_control(name: str) -> bool:
    return name.startswith(("composition.", "memory.key_net.", "integration.gate."))


@pytest.mark.parametrize("case", FROZEN.values(), ids=FROZEN.keys())
def test_a_frozen_controller_stays_while_the_memory_learns(case: Case) -> None:
    layer = make_layer(case)
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad != is_control(name), name
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=0.1)
    x, target = random_input(8, case.in_features), random_input(8, case.out_features, seed=5)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean() + 0.01 * orthogonal_loss(layer)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == is_control(name), name
        assert (parameter.grad is None) == is_control(name), name


def test_resetting_does_not_thaw() -> None:
    layer = empty_layer(FROZEN["default"])
    layer.reset_parameters()
    assert {n for n, p in layer.named_parameters() if not p.requires_grad} == {
        n for n, _ in layer.named_parameters() if is_control(n)
    }


# memory_init and the orthogonality loss

WIDTHS = {"fewer-slots": (7, 6, 4), "more-slots": (3, 2, 6), "between": (9, 2, 5), "one": (3, 1, 1)}


def widths_case(widths: tuple[int, int, int], memory_init: str = "orthogonal") -> Case:
    return SMALL._replace(
        in_features=widths[0],
        out_features=widths[1],
        num_slots=widths[2],
        num_least_used=0,
        memory_init=memory_init,
    )


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("squared", [False, True])
def test_orthogonal_memories_start_at_the_floor(
    widths: tuple[int, int, int], squared: bool
) -> None:
    layer = empty_layer(widths_case(widths))
    layer.reset_parameters()  # now in float64
    P = widths[2]
    missing = [max(0, P - width) for width in widths[:2]]
    floor = sum(missing) if squared else sum(math.sqrt(m) for m in missing)
    loss = orthogonal_loss(layer, squared=squared)
    assert loss.item() == pytest.approx(floor, abs=1e-10)
    loss.backward()
    for memory in (layer.memory.u, layer.memory.v):
        assert memory.grad is not None
        assert memory.grad.isfinite().all()
        if squared:
            assert float(memory.grad.abs().max()) < 1e-10
    other = orthogonal_loss(empty_layer(widths_case(widths, "xavier")), squared=squared)
    assert P == 1 or other.item() > floor + 0.01


def test_orthogonal_memories_in_float32() -> None:
    """Where the loss is rounding error the norm still has a gradient of unit length, no more."""
    layer = empty_layer(widths_case((20, 16, 12)), torch.float32)
    loss = orthogonal_loss(layer)
    assert loss.item() < 1e-4
    loss.backward()
    for memory in (layer.memory.u, layer.memory.v):
        assert memory.grad is not None
        assert memory.grad.isfinite().all()
        assert float(memory.grad.norm()) < 2.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orthogonal_memories_in_half_precision(dtype: torch.dtype) -> None:
    """Where there is no QR: built as the default type, reset, and grown."""
    torch.set_default_dtype(dtype)
    try:
        layer = NeurocoderLinear(12, 9, num_slots=4, memory_init="orthogonal")
    finally:
        torch.set_default_dtype(torch.float32)
    layer.reset_parameters()
    layer.grow(2)
    for memory in (layer.memory.u, layer.memory.v):
        assert memory.dtype == dtype
        rows = memory.detach().float()
        torch.testing.assert_close(rows @ rows[:4].T, torch.eye(6, 4), rtol=0, atol=0.02)


# learned_sharpness


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 10.0])
def test_learned_sharpness_starts_at_the_given_one(steps: int, sharpness: float) -> None:
    fixed = SMALL._replace(num_steps=steps, sharpness=sharpness)
    learning = empty_layer(fixed._replace(learned_sharpness=True))
    start = learning.composition.log_sharpness
    assert start.shape == ()
    assert start.item() == pytest.approx(math.log(sharpness), abs=1e-6)
    # The same weights behind a fixed temperature, which is that of the parameter in float64.
    twin = empty_layer(fixed._replace(sharpness=math.exp(start.item())))
    twin.load_state_dict(
        {k: v for k, v in learning.state_dict().items() if not k.endswith("log_sharpness")}
    )
    x = random_input(3, fixed.in_features)
    close(learning(x), twin(x), 1e-12)


# What is refused

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"controller": "linear", "num_steps": 2}, ["linear", "num_steps=2", "lstm"]),
    ({"residual_rank": 3, "residual": False}, ["residual_rank=3", "residual=True"]),
    ({"residual_rank": 0}, ["residual_rank", "0"]),
    ({"residual_rank": -1}, ["residual_rank", "-1"]),
    ({"residual_rank": 1.5}, ["residual_rank", "1.5"]),
    ({"key_mode": "lk"}, ["key_mode", "lk", "official"]),
    ({"sharpness": "1e1"}, ["sharpness", "positive number", "1e1"]),  # YAML reads it as text
    *[({name: "maybe"}, [name, "True or False", "maybe"]) for name in SWITCHES],
    ({"residual": None}, ["residual", "True or False", "None"]),
    *[({name: "none-such"}, [name, "none-such", *choices]) for name, choices in CHOICES.items()],
]

OFFICIAL_REFUSES: dict[str, Any] = {
    "gate": "head",
    "learned_sharpness": True,
    "detach_usage": True,
    "residual_rank": 2,
    "residual_gate": False,
    "memory_init": "orthogonal",
}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *REFUSED,
        *[
            ({name: value, "preset": "official"}, [name, str(value), "official"])
            for name, value in OFFICIAL_REFUSES.items()
        ],
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_impossible_options_are_refused(options: dict[str, Any], words: list[str]) -> None:
    for build in (NeurocoderConfig, lambda **o: NeurocoderLinear(4, 3, **o)):
        with pytest.raises(ValueError) as error:
            build(**options)
        for word in words:
            assert word in str(error.value)


def test_an_option_that_is_misspelt_has_the_nearest_one_named() -> None:
    with pytest.raises(TypeError, match="no option 'num_slot'; nearest: num_slots"):
        NeurocoderLinear(4, 3, num_slot=5)
    with pytest.raises(ValueError, match="'neurocoder': there is no option 'slots'; nearest: "):
        layers.make_layer("neurocoder", 4, 3, slots=5)


@pytest.mark.parametrize("integer", [int, np.int64])
def test_every_integer_is_a_size(integer: Any) -> None:
    """Those of numpy, too, which searches for hyper-parameters draw."""
    sizes = {name: integer(2) for name in ("key_dim", "num_heads", "num_steps", "num_least_used")}
    layer = NeurocoderLinear(5, 4, num_slots=integer(6), controller_size=integer(3), **sizes)
    assert layer(torch.zeros(3, 5)).shape == (3, 4)


def test_each_option_of_the_paper_alone_is_tried_with_the_official_preset() -> None:
    assert set(OFFICIAL_REFUSES) == set(PAPER_ONLY)
