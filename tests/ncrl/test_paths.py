"""All ways of computing a layer give the same: plain equations, one node, rows, and torch's own.

`composition.attend` with `integration.mix_slots` are the plain equations, which tests/reference.py
is the judge of in other modules. Here they judge `node` and `acting`, and whatever torch makes of
the layer. Shape letters: B batch, P slots, K key, H heads, J steps, R = J*H, h controller width.
"""

import copy
import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ncrl import NeurocoderConfig, NeurocoderLinear
from ncrl.neurocoder import acting, composition, controller, fused, node
from ncrl.neurocoder.attention import unit
from ncrl.neurocoder.composition import Constants, Control, attend, split_slots
from ncrl.neurocoder.controller import plain_states
from ncrl.neurocoder.integration import Composed, mix_slots, singular_values
from ncrl.neurocoder.memory import ProgramMemory
from tests.ncrl.layers import Case, close, make_layer, random_input

Program = Callable[..., tuple[Tensor, Tensor, Tensor]]

INPUTS = (
    *("x", "rows", "controller_weight", "controller_bias"),
    *("weight", "bias", "sharpness", "keys", "memory_s"),
)
OUTPUTS = "mixture", "sigma", "others"

IN, OTHERS = 3, 2
"""Width of x, and rows that are neither memory nor controller."""


def plain_layer(
    x: Tensor, rows: Tensor, constants: Constants, keys: Tensor, memory_s: Tensor, config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `node.run_layer` computes, from the plain equations."""
    weights = attention_of(x, rows, constants, keys, config)
    sigma = singular_values(weights[2], memory_s)
    projection = rows[: config.num_slots] @ x.T
    others = rows[config.num_slots + len(constants.controller_bias) :] @ x.T
    return mix_slots(Composed(weights, sigma, None), projection), sigma, others


def attention_of(
    x: Tensor, rows: Tensor, constants: Constants, keys: Tensor, config: NeurocoderConfig
) -> Tensor:
    """Weights, [3, R, P, B]."""
    weight_hh, bias, *head = constants
    from_input = rows[config.num_slots :][: len(bias)] @ x.T
    states = plain_states(from_input, weight_hh, bias, config.num_steps)
    return attend(Control(states, *head), keys, config)


def config_of(**options: Any) -> NeurocoderConfig:
    sizes = {"num_slots": 5, "key_dim": 3, "num_heads": 2, "controller_size": 4, "sharpness": 2.0}
    return NeurocoderConfig(**{**sizes, **options})


CONFIGS = {
    f"{name}-J{steps}": config_of(num_steps=steps, **options)
    for name, options in {
        "usual": {},
        "content": {"num_least_used": 0},
        "slot": {"gate": "slot"},
        "head": {"gate": "head"},
        "detached": {"detach_usage": True},
        "detached-head": {"detach_usage": True, "gate": "head"},
        "one-head": {"num_heads": 1, "gate": "slot", "num_least_used": 1},
        "one-key": {"key_dim": 1},
        "two-slots": {"num_slots": 2, "num_least_used": 1},
        "all-but-one": {"num_slots": 6, "num_least_used": 5, "sharpness": 10.0},
        "sharp": {"sharpness": fused.LARGEST_EXPONENT},
        "sharper": {"sharpness": 2 * fused.LARGEST_EXPONENT},
        "many-slots": {"num_slots": 33, "num_heads": 3, "num_least_used": 7},
        "many-heads": {"num_slots": 4, "num_heads": 9, "key_dim": 5, "controller_size": 1},
    }.items()
    for steps in (1, 2, 5)
} | {"linear-J1": config_of(controller="linear", num_steps=1)}


def rows_of(config: NeurocoderConfig) -> int:
    gates = {
        "slot-head": config.num_slots * config.num_heads,
        "slot": config.num_slots,
        "head": config.num_heads,
    }[config.gate]
    return 3 * (config.key_dim * config.num_heads + (gates if config.num_least_used else 0))


def random_inputs(config: NeurocoderConfig, batch: int, kind: str = "random") -> list[Tensor]:
    """The tensors that `run_layer` takes, in float64 and wanting gradients.

    Kinds: `zero-queries` makes every slot tie; `twins` makes slots tie in pairs, for random
    queries; `short-queries` stay below the floor of a norm.
    """
    P, K, h = config.num_slots, config.key_dim, config.controller_size
    gates = h if config.controller == "linear" else 4 * h
    recurrent = (0 if config.controller == "linear" else gates, h)
    rows = rows_of(config)
    shapes = ((batch, IN), (P + gates + OTHERS, IN), recurrent, (gates,))
    shapes += ((rows, h), (rows,), (), (3, P, K), (P, 1))
    tensors = [random_input(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    named = dict(zip(INPUTS, tensors, strict=True))
    named["sharpness"].fill_(config.sharpness)
    named["keys"].copy_(unit(named["keys"], dim=2))
    if kind == "twins":  # slots 0 and 1 are equal, 2 and 3, ...
        # Along axes, so that cosines are entries of the query, in whatever order they are summed.
        named["keys"].copy_(torch.eye(K)[torch.arange(P) // 2 % K])
    for tensor in (named["weight"], named["bias"].unsqueeze(1)):
        queries, head_gates = split_slots(tensor, config)
        queries *= {"short-queries": 1e-8, "zero-queries": 0.0}.get(kind, 1.0)
        if head_gates is not None and kind in ("zero-queries", "twins"):
            # Half open: ties have to be exact, in whatever order numbers are summed and however
            # a sigmoid is rounded.
            head_gates.zero_()
    return [tensor.clone().requires_grad_() for tensor in tensors]


def run_program(program: Program, inputs: list[Tensor], config: NeurocoderConfig) -> list[Tensor]:
    x, rows, *constants, keys, memory_s = inputs
    return list(program(x, rows, Constants(*constants), keys, memory_s, config))


def all_gradients(program: Program, inputs: list[Tensor], config: NeurocoderConfig) -> list[Tensor]:
    outputs = run_program(program, inputs, config)
    towards = [random_input(*output.shape, seed=9 + i) for i, output in enumerate(outputs)]
    # The state of a linear controller, which has none, is used nowhere.
    slopes = torch.autograd.grad(outputs, inputs, towards, materialize_grads=True)
    return [output.detach() for output in outputs] + list(slopes)


# Attention and program in one node


def agree(config: NeurocoderConfig, inputs: list[Tensor]) -> None:
    """Fused outputs, with and without gradients, and all gradients are the plain ones."""
    found = all_gradients(node.run_layer, inputs, config)
    expected = all_gradients(plain_layer, inputs, config)
    for name, actual, wanted in zip((*OUTPUTS, *INPUTS), found, expected, strict=True):
        if wanted.numel():
            # Gradients of short queries are 1e6 times as large as others.
            scale = max(1.0, float(wanted.abs().max()))
            assert float((actual - wanted).abs().max()) < 1e-10 * scale, name
        assert actual.shape == wanted.shape, name
    with torch.no_grad():
        for actual, wanted in zip(
            run_program(node.run_layer, inputs, config), found[:3], strict=True
        ):
            close(actual, wanted, 1e-12)


every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_fused_is_plain(config: NeurocoderConfig, batch: int) -> None:
    agree(config, random_inputs(config, batch))


@every_config
@pytest.mark.parametrize("kind", ["zero-queries", "twins", "short-queries"])
def test_fused_is_plain_where_slots_tie_or_queries_are_short(
    config: NeurocoderConfig, kind: str
) -> None:
    # Unit queries of one number tie in all steps but for rounding, and so do slots with attention
    # that is nothing beside the largest.
    if kind == "twins" and (config.key_dim == 1 or config.sharpness > 10):
        kind = "random"
    agree(config, random_inputs(config, 3, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [1.0, fused.LARGEST_EXPONENT, 1e4])
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)])
def test_no_sharpness_is_too_large(
    dtype: torch.dtype, sharpness: float, signs: tuple[int, int]
) -> None:
    """Cosines of 1 and -1, where powers are the largest and the smallest."""
    keys = torch.tensor(signs, dtype=dtype).repeat(3, 40).unsqueeze(2)  # [3, 80, 1]
    queries = torch.tensor([1, -1], dtype=dtype).expand(3, 1, 2)
    scores, content = (torch.empty(3, 80, 2, dtype=dtype) for _ in range(2))
    of_keys = keys, torch.tensor(sharpness, dtype=dtype)
    fused._attend(*of_keys, queries, scores, content, largest=sharpness)
    expected = (sharpness * (keys.double() @ queries.double())).softmax(dim=1)
    close(content.double(), expected, 4 * torch.finfo(dtype).eps * max(1, sharpness))


@every_config
@pytest.mark.parametrize("weights_in_a_block", [1, 100])
def test_blocks_are_one(
    config: NeurocoderConfig, weights_in_a_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One input in a block, and a few, the last block being smaller than the others."""
    monkeypatch.setattr(fused, "BLOCK", weights_in_a_block)
    agree(config, random_inputs(config, 7))


@pytest.mark.parametrize("kind", ["random", "twins"])
def test_the_first_largest_is_that_of_max(kind: str) -> None:
    values = random_input(3, 5, 2, 4, seed=1)
    if kind == "twins":
        values[:, 3] = values[:, 1] = values.amax(1)
    largest, index = fused.first_largest(values)
    expected = values.max(dim=1, keepdim=True)
    assert torch.equal(largest, expected.values)
    assert torch.equal(index, expected.indices)


def test_the_first_largest_of_nan_is_a_slot() -> None:
    _, index = fused.first_largest(torch.full((3, 5, 1, 1), math.nan))
    assert ((index >= 0) & (index < 5)).all()


def test_twins_do_tie() -> None:
    """Else the test above would be empty."""
    config = CONFIGS["usual-J2"]
    x, rows, *constants, keys, _ = random_inputs(config, 3, "twins")
    weights = attention_of(x, rows, Constants(*constants), keys, config)
    assert torch.equal(weights[:, :, 0], weights[:, :, 1])
    assert not torch.equal(weights[:, :, 0], weights[:, :, 2])
    assert (weights[:, 2:] > 0).all(), "usage attention"


def test_a_short_query_has_the_slope_of_the_floor_in_float32_too() -> None:
    """Where 1e-12 has no exact square root, a query just at the floor must not be taken for one
    above it, whose gradient is a million times another."""
    config = CONFIGS["usual-J2"]
    single = [
        t.detach().float().requires_grad_() for t in random_inputs(config, 3, "short-queries")
    ]
    found = all_gradients(node.run_layer, single, config)
    expected = all_gradients(plain_layer, single, config)
    for name, actual, wanted in zip(INPUTS, found[3:], expected[3:], strict=True):
        torch.testing.assert_close(
            actual, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()), msg=name
        )


CHECKED = {
    "usual-J1": config_of(num_slots=3, key_dim=2, num_steps=1, controller_size=2),
    "usual-J2": config_of(num_slots=3, key_dim=2, num_steps=2, controller_size=2),
    "slot-J3": config_of(
        num_slots=3, key_dim=2, num_steps=3, controller_size=2, gate="slot", num_least_used=1
    ),
    "head-J2": config_of(num_slots=4, key_dim=2, num_steps=2, controller_size=2, gate="head"),
    "content-J2": config_of(
        num_slots=3, key_dim=2, num_steps=2, controller_size=2, num_least_used=0
    ),
    "linear-J1": config_of(
        num_slots=3, key_dim=2, num_steps=1, controller_size=2, controller="linear"
    ),
}


@pytest.mark.parametrize("config", CHECKED.values(), ids=CHECKED.keys())
def test_finite_differences(config: NeurocoderConfig) -> None:
    """Of the function, and of its gradient: a second derivative goes by the plain equations."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(run_program(node.run_layer, list(inputs), config))

    inputs = tuple(random_inputs(config, 2))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_finite_differences_of_a_gradient_entry_by_entry() -> None:
    config = config_of(num_slots=3, key_dim=1, num_heads=1, num_steps=2, controller_size=1)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(run_program(node.run_layer, list(inputs), config))

    assert torch.autograd.gradgradcheck(function, tuple(random_inputs(config, 2)))


@pytest.mark.parametrize("name", ["usual-J1", "usual-J5", "detached-J5", "content-J2", "head-J2"])
def test_second_derivatives_are_plain(name: str) -> None:
    """Also behind a first backward pass that retained the graph, and one more after them."""
    config = CONFIGS[name]

    def hessian_products(program: Program) -> list[Tensor]:
        inputs = random_inputs(config, 2)
        outputs = run_program(program, inputs, config)
        towards = [random_input(*o.shape, seed=9 + i) for i, o in enumerate(outputs)]
        grad = functools.partial(torch.autograd.grad, outputs, inputs, towards)
        first = grad(retain_graph=True)
        differentiable = grad(create_graph=True)
        again = grad(retain_graph=True)
        for one, two, three in zip(first, differentiable, again, strict=True):
            close(one, two, 1e-10)
            assert torch.equal(one, three)
        total = sum((g * random_input(*g.shape, seed=3)).sum() for g in differentiable)
        second = torch.autograd.grad(total, inputs, create_graph=True)
        total = sum((g * random_input(*g.shape, seed=4)).sum() for g in second)
        third = torch.autograd.grad(total, inputs, allow_unused=True)
        return [*first, *second, *(t for t in third if t is not None)]

    found, expected = hessian_products(node.run_layer), hessian_products(plain_layer)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-9)


def test_second_derivatives_after_a_first_call_in_inference_mode() -> None:
    """Nothing that the first call leaves behind may be an inference tensor."""
    composition._slot_order.cache_clear()
    layer = make_layer(Case())
    x = random_input(40, 5).requires_grad_()
    with torch.inference_mode():
        layer(x)
    slopes = torch.autograd.grad(layer(x).square().sum(), layer.parameters(), create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "wanted",
    [("keys",), ("x", "memory_s"), ("rows",), ("sharpness", "bias"), ("controller_weight",)],
)
def test_gradients_of_some_inputs(wanted: tuple[str, ...], create_graph: bool) -> None:
    """Whether the others are not asked about, or do not require a gradient at all."""
    config = CONFIGS["usual-J2"]
    inputs = random_inputs(config, 3)
    towards = [random_input(size, 3, seed=size) for size in (5, 4, OTHERS)]
    expected = dict(
        zip(
            INPUTS,
            torch.autograd.grad(run_program(plain_layer, inputs, config), inputs, towards),
            strict=True,
        )
    )
    frozen = [t.detach().requires_grad_(n in wanted) for n, t in zip(INPUTS, inputs, strict=True)]
    for given in (inputs, frozen):
        outputs = run_program(node.run_layer, given, config)
        sources = [given[INPUTS.index(name)] for name in wanted]
        found = torch.autograd.grad(outputs, sources, towards, create_graph=create_graph)
        for name, gradient in zip(wanted, found, strict=True):
            close(gradient, expected[name], 1e-10)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_gradient_of_one_output(output: int) -> None:
    config = CONFIGS["usual-J2"]
    inputs = random_inputs(config, 3)
    found, expected = (
        torch.autograd.grad(
            run_program(program, inputs, config)[output].square().sum(), inputs, allow_unused=True
        )
        for program in (node.run_layer, plain_layer)
    )
    for name, actual, wanted in zip(INPUTS, found, expected, strict=True):
        if wanted is None:
            assert actual is None or not actual.any(), name
        else:
            close(actual, wanted, 1e-10)


@pytest.mark.parametrize("name", ["usual-J1", "usual-J2"])
def test_gradients_in_many_directions_at_once(name: str) -> None:
    """By `torch.func.vmap`, and by the older way behind `jacobian(vectorize=True)`."""
    config = CONFIGS[name]
    inputs = random_inputs(config, 3)
    outputs = run_program(node.run_layer, inputs, config)
    towards = [random_input(4, *o.shape, seed=9 + i) for i, o in enumerate(outputs)]
    grad = functools.partial(torch.autograd.grad, outputs, inputs, retain_graph=True)
    singles = [grad([t[i] for t in towards]) for i in range(4)]
    for batched in (
        grad(towards, is_grads_batched=True),
        torch.func.vmap(lambda *directions: grad(directions))(*towards),
    ):
        for i, single in enumerate(singles):
            for many, one in zip(batched, single, strict=True):
                close(many[i], one, 1e-10)


def test_several_graphs_at_a_time() -> None:
    """Of equal and of other sizes, some never used: none may write over what another needs."""
    config = CONFIGS["usual-J2"]
    batches = [random_inputs(config, batch) for batch in (3, 3, 5, 3)]
    expected = [all_gradients(plain_layer, inputs, config) for inputs in batches]
    alive = [run_program(node.run_layer, inputs, config) for inputs in batches]
    alive[1] = []
    with torch.no_grad():
        run_program(node.run_layer, batches[0], config)
    for i in (3, 0, 2):
        towards = [random_input(*o.shape, seed=9 + n) for n, o in enumerate(alive[i])]
        for _ in range(2):
            found = torch.autograd.grad(alive[i], batches[i], towards, retain_graph=True)
            for actual, wanted in zip([*alive[i], *found], expected[i], strict=True):
                close(actual, wanted, 1e-10)


@pytest.mark.parametrize("name", ["usual-J2", "linear-J1"])
def test_under_hooks_a_graph_keeps_its_inputs_alone(name: str) -> None:
    """Or checkpointing and offloading would save nothing: attention is most of the memory."""
    config = CONFIGS[name]
    inputs = random_inputs(config, 7)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    expected = all_gradients(node.run_layer, inputs, config)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run_program(node.run_layer, inputs, config)
    assert sum(sizes) == sum(t.numel() for t in (*inputs, outputs[1]))
    assert not tensors_kept(outputs[0].grad_fn)
    towards = [random_input(*output.shape, seed=9 + i) for i, output in enumerate(outputs)]
    for _ in range(2):
        found = torch.autograd.grad(outputs, inputs, towards, retain_graph=True)
        for actual, wanted in zip(found, expected[len(outputs) :], strict=True):
            assert torch.equal(actual, wanted)


def tensors_kept(function: Any) -> list[Tensor]:
    """What a node of the graph holds beside what it saves as torch wants it."""
    return list(tensors_behind(vars(function)))


def test_inputs_changed_before_backward_are_noticed() -> None:
    """Like torch's own operations, and unlike a silently wrong gradient."""
    config = CONFIGS["usual-J2"]
    inputs = [t.detach().clone().requires_grad_() for t in random_inputs(config, 3)]
    mixture, *_ = run_program(node.run_layer, inputs, config)
    with torch.no_grad():
        inputs[INPUTS.index("keys")].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mixture.sum().backward()


# The controller by itself


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("width", "batch"), [(1, 1), (3, 0), (3, 4)])
def test_the_controller_is_plain(steps: int, width: int, batch: int) -> None:
    shapes = ((4 * width, batch), (4 * width, width), (4 * width,))
    inputs = [random_input(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    towards = random_input(width, steps * batch, seed=9)
    expected = plain_states(*inputs, steps)
    wanted = torch.autograd.grad(expected, inputs, towards)
    with torch.no_grad():
        found, kept = controller.states(*inputs, steps)
        slopes = controller.gradients(inputs[1], found, kept, towards)
    close(found, expected, 1e-12)
    for actual, slope in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(actual, slope, rtol=1e-10, atol=1e-12)


# Rows

ONE_STEP = {
    "usual": Case(num_steps=1),
    "content": Case(num_steps=1, num_least_used=0),
    "slot": Case(num_steps=1, gate="slot", residual=False),
    "head": Case(num_steps=1, gate="head", bias=False),
    "linear": Case(num_steps=1, controller="linear", sharpness=5.0),
    "sharp": Case(num_steps=1, learned_sharpness=True, residual_rank=2),
    "low-rank-linear": Case(
        num_steps=1, controller="linear", gate="slot", residual_rank=1, bias=False
    ),
    "one-of-everything": Case(1, 1, 2, 1, 1, 1, 1, 1),
    "one-head": Case(9, 2, 33, 2, 1, 1, 3, 5, residual=False, bias=False),
    "frozen": Case(num_steps=1, frozen_controller=True),
}
AROUND_FEW = [0, 1, 7, acting.FEW - 1, acting.FEW, acting.FEW + 1]


@pytest.mark.parametrize("case", ONE_STEP.values(), ids=ONE_STEP.keys())
def test_rows_are_plain(case: Case) -> None:
    layer = make_layer(case)
    for batch in AROUND_FEW:
        x = random_input(batch, case.in_features)
        expected = torch.einsum("bi,bio->bo", x, layer.program(x))
        if layer.bias is not None:
            expected = expected + layer.bias
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                close(layer(x), expected, 1e-12)


def test_rows_of_short_queries() -> None:
    layer = make_layer(ONE_STEP["usual"])
    with torch.no_grad():
        rows = layer.composition.head.weight.unflatten(0, (3, 3, -1)), layer.composition.head.bias
        rows[0][:, :, :3] = 0
        rows[1].unflatten(0, (3, 3, -1))[:, :, :3] = torch.tensor([3e-7, -2e-7, 1e-9])
        x = random_input(4, 5)
        close(layer(x), torch.einsum("bi,bio->bo", x, layer.program(x)) + layer.bias, 1e-12)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (4, 0), (2, 40)])
def test_rows_of_any_leading_shape(leading: tuple[int, ...]) -> None:
    layer = make_layer(ONE_STEP["usual"])
    x = random_input(*leading, 5)
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (*leading, 4)
    close(y, layer(x), 1e-12)


def test_rows_do_not_change_their_input() -> None:
    for case in ONE_STEP.values():
        layer = make_layer(case)
        x = random_input(3, case.in_features)
        before = [t.detach().clone() for t in (x, *layer.parameters())]
        with torch.no_grad():
            first, second = layer(x), layer(x)
        assert torch.equal(first, second)
        for old, new in zip(before, (x, *layer.parameters()), strict=True):
            assert torch.equal(old, new)


# The layer under torch's tools

LAYERS = {
    "three-steps": Case(),
    "one-step": Case(num_steps=1, learned_sharpness=True),
    "detached": Case(detach_usage=True, gate="slot", residual_rank=2),
    "content": Case(num_steps=2, num_least_used=0, gate="head", residual=False),
    "linear": Case(num_steps=1, controller="linear", gate="head"),
}
every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


def loss_of(y: Tensor) -> Tensor:
    return (y * random_input(*y.shape, seed=5).to(y.dtype)).sum() + y.square().sum()


def eager_gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of `loss_of(layer(x))` for the parameters that want one."""
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss_of(layer(x)), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.shape == expected[name].shape, name
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


@every_layer
def test_gradients_of_each_sample(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(4, case.in_features)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (sample,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(len(x)):
        expected = torch.autograd.grad(layer(x[b]).square().sum(), list(layer.parameters()))
        same_gradients(
            {name: gradient[b] for name, gradient in per_sample.items()},
            dict(zip(parameters, expected, strict=True)),
        )


@every_layer
def test_jacobians(case: Case) -> None:
    """By forward and by backward mode, and by one backward pass for each output."""
    layer = make_layer(case)
    x = random_input(case.in_features)
    slopes = []
    for output in range(case.out_features):
        at = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(layer(at)[output], at)[0])
    expected = torch.stack(slopes)
    close(torch.func.jacrev(layer)(x), expected, 1e-10)
    close(torch.func.jacfwd(layer)(x), expected, 1e-10)
    direction = random_input(case.in_features, seed=7)
    value, slope = torch.func.jvp(layer, (x,), (direction,))
    close(value, layer(x), 1e-12)
    close(slope, expected @ direction, 1e-10)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(layer, x, vectorize=vectorize)
        close(found, expected, 1e-10)


@pytest.mark.parametrize("no_grad", [False, True])
def test_transforms_after_a_call_that_kept_something(no_grad: bool) -> None:
    """Nothing kept without gradients may enter a derivative, be it taken under no_grad."""
    layer = make_layer(LAYERS["one-step"])
    x = random_input(3, 5)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    with torch.no_grad():
        layer(x)

    def call(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,))

    # Finite differences would see the keys' detached memories, so the memories stay as they are.
    along = {
        n: random_input(*p.shape, seed=i) * (n not in ("memory.u", "memory.v", "memory.s"))
        for i, (n, p) in enumerate(parameters.items())
    }
    with torch.set_grad_enabled(not no_grad):
        _, slope = torch.func.jvp(call, (parameters,), (along,))
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (
            call({n: p + s * along[n] for n, p in parameters.items()}) for s in (step, -step)
        )
    close(slope, (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("no_grad", [False, True])
def test_dual_numbers_without_a_transform(no_grad: bool) -> None:
    """`torch.autograd.forward_ad` on its own, with gradients enabled and without."""
    layer = make_layer(LAYERS["one-step"])
    x = random_input(3, 5)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    along = {n: random_input(*p.shape, seed=i) for i, (n, p) in enumerate(parameters.items())}

    def call(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,))

    _, expected = torch.func.jvp(call, (parameters,), (along,))
    with forward_ad.dual_level(), torch.set_grad_enabled(not no_grad):
        dual = {n: forward_ad.make_dual(p, along[n]) for n, p in parameters.items()}
        slope = forward_ad.unpack_dual(call(dual)).tangent
    assert slope is not None
    close(slope, expected, 1e-10)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@every_layer
def test_compiled(case: Case) -> None:
    """In one piece, without and with the backward pass of the compiler's own."""
    layer = make_layer(case)
    x = random_input(3, case.in_features)
    expected = eager_gradients(layer, x)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        close(compiled(x), layer(x), 1e-12)
        found = torch.autograd.grad(loss_of(compiled(x)), list(layer.parameters()))
        same_gradients(dict(zip(expected, found, strict=True)), expected)
        with torch.no_grad():
            close(compiled(x), layer(x), 1e-12)
            for parameter in layer.parameters():
                parameter.mul_(1.1)
            close(compiled(x), layer(x), 1e-12)
        expected = eager_gradients(layer, x)


@pytest.mark.parametrize("no_grad", [False, True])
@every_layer
def test_traced(case: Case, no_grad: bool) -> None:
    """A trace holds for other inputs, another number of them and changed weights."""
    layer = make_layer(case)
    x = random_input(3, case.in_features)
    with torch.set_grad_enabled(not no_grad):
        layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that the trace takes for constants
            traced = torch.jit.trace(layer, x, check_trace=True)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.1)
        for batch in (3, 1, 50):
            other = random_input(batch, case.in_features, seed=batch)
            close(traced(other), layer(other), 1e-12)
    same_gradients(
        {
            n: g
            for (n, _), g in zip(
                layer.named_parameters(),
                torch.autograd.grad(loss_of(traced(x)), list(layer.parameters())),
                strict=True,
            )
        },
        eager_gradients(layer, x),
    )


@pytest.mark.parametrize("no_grad", [False, True])
@every_layer
def test_exported(case: Case, no_grad: bool) -> None:
    layer = make_layer(case)
    x = random_input(3, case.in_features)
    with torch.set_grad_enabled(not no_grad):
        layer(x)
        shapes = ({0: torch.export.Dim("batch", min=2, max=1000)},)
        exported = torch.export.export(layer, (x,), dynamic_shapes=shapes).module()
        for batch in (3, 7, 50):
            other = random_input(batch, case.in_features, seed=batch)
            close(exported(other), layer(other), 1e-12)


@every_layer
def test_checkpointed(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(3, case.in_features).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(loss_of(y), [x, *layer.parameters()])
    expected = torch.autograd.grad(loss_of(layer(x)), [x, *layer.parameters()])
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


# Autocast


def head_gradient(layer: NeurocoderLinear, x: Tensor, *, inside: bool, create_graph: bool) -> Any:
    """Gradient of the attention weights' own parameters under bfloat16 autocast."""
    sources = [layer.composition.head.weight, layer.composition.head.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).float().square().sum()
        if inside:
            return torch.autograd.grad(loss, sources, create_graph=create_graph)
    return torch.autograd.grad(loss, sources, create_graph=create_graph)


@pytest.mark.parametrize("name", ["three-steps", "one-step", "content"])
def test_backward_of_autocast_inside_and_outside_of_it(name: str) -> None:
    """The gradient of attention is computed in float32 wherever backward is called, and however:
    so all four ways agree to float32's precision, where bfloat16 has three digits."""
    case = LAYERS[name]
    layer = make_layer(case).float()
    x = random_input(16, case.in_features).float()
    exact = torch.autograd.grad(
        layer(x).square().sum(), [layer.composition.head.weight, layer.composition.head.bias]
    )
    outside = head_gradient(layer, x, inside=False, create_graph=False)
    for inside in (False, True):
        for create_graph in (False, True):
            found = head_gradient(layer, x, inside=inside, create_graph=create_graph)
            for gradient, other, wanted in zip(found, outside, exact, strict=True):
                assert gradient.dtype == torch.float32
                assert gradient.isfinite().all()
                close(gradient, wanted, 0.1)
                # Inside, the gradient that comes in has passed the product with M_V in bfloat16,
                # and that of the weight a product with the LSTM's state.
                close(gradient, other, 0.02 if inside else 1e-5)


@pytest.mark.parametrize("name", ["usual-J1", "usual-J2", "head-J5"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_the_node_itself_is_exact_under_autocast(name: str, create_graph: bool) -> None:
    config = CONFIGS[name]
    inputs = [t.detach().float().requires_grad_() for t in random_inputs(config, 7)]
    outputs = run_program(node.run_layer, inputs, config)
    towards = [random_input(*o.shape, seed=9).float() for o in outputs]
    expected = torch.autograd.grad(outputs, inputs, towards, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(outputs, inputs, towards, create_graph=create_graph)
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        close(gradient, wanted, 1e-5)


# Parts without gradients

FREEZES: dict[str, Callable[[str], bool]] = {
    "memory": lambda name: name in ("memory.u", "memory.v", "memory.s"),
    "keys": lambda name: name.startswith("memory.key_net"),
    "head": lambda name: name.startswith("composition.head"),
    "controller": lambda name: name.startswith("composition."),
    "residual": lambda name: name.startswith("integration."),
    "all-but-u": lambda name: name != "memory.u",
    "all": lambda name: True,
}


@pytest.mark.parametrize("name", ["three-steps", "one-step"])
@pytest.mark.parametrize("freezes", FREEZES.values(), ids=FREEZES.keys())
@pytest.mark.parametrize("with_x", [False, True])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    name: str, freezes: Callable[[str], bool], with_x: bool
) -> None:
    layer = make_layer(LAYERS[name])
    x = random_input(3, 5).requires_grad_()
    names = [n for n, _ in layer.named_parameters()]
    slopes = torch.autograd.grad(loss_of(layer(x)), [x, *layer.parameters()])
    expected = dict(zip(["x", *names], slopes, strict=True))
    for n, parameter in layer.named_parameters():
        parameter.requires_grad_(not freezes(n))
    x = x.detach().requires_grad_(with_x)
    y = layer(x)
    assert y.requires_grad == (with_x or not all(freezes(n) for n in names))
    if not y.requires_grad:
        return
    loss_of(y).backward()
    for n, tensor in [("x", x), *layer.named_parameters()]:
        if tensor.requires_grad:
            assert tensor.grad is not None, n
            torch.testing.assert_close(tensor.grad, expected[n], rtol=1e-10, atol=1e-11)
        else:
            assert tensor.grad is None, n


# Copies


def by_torch_save(layer: NeurocoderLinear) -> NeurocoderLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded: NeurocoderLinear = torch.load(buffer, weights_only=False)
    return loaded


def tensors_behind(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that the attributes of a module or object lead to, but for parameters."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Parameter):
        return
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for item in thing.values():
            yield from tensors_behind(item, seen)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from tensors_behind(item, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from tensors_behind(vars(thing), seen)


@pytest.mark.parametrize("name", ["three-steps", "one-step"])
@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), by_torch_save, copy.copy],
    ids=["deepcopy", "pickle", "torch-save", "copy"],
)
def test_copies_carry_nothing_kept_from_call_to_call(
    name: str, copier: Callable[[NeurocoderLinear], NeurocoderLinear]
) -> None:
    layer = make_layer(LAYERS[name])
    with torch.no_grad():
        layer(random_input(3, 5))
    assert list(tensors_behind(layer)), "something is kept, or this tests nothing"
    duplicate = copier(layer)
    if copier is not copy.copy:  # which shares the memory, and so its keys
        assert not list(tensors_behind(duplicate))
    with torch.no_grad():
        close(duplicate(random_input(3, 5)), layer(random_input(3, 5)), 1e-12)
        duplicate.memory.u.data.mul_(1.5)
        x = random_input(3, 5)
        close(duplicate(x), torch.einsum("bi,bio->bo", x, duplicate.program(x)) + duplicate.bias)


# What is kept between calls is used


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one entry each time that keys are computed."""
    calls: list[str] = []
    original = ProgramMemory._compute_keys

    def counting(memory: ProgramMemory) -> Tensor:
        calls.append("keys")
        return original(memory)

    monkeypatch.setattr(ProgramMemory, "_compute_keys", counting)
    return calls


@pytest.mark.parametrize("case", [Case(), Case(num_steps=1)], ids=["three-steps", "one-step"])
@pytest.mark.parametrize(
    "contexts",
    [
        [torch.no_grad] * 4,
        [torch.inference_mode] * 4,
        [torch.inference_mode, torch.no_grad] * 2,
        [torch.no_grad, torch.inference_mode] * 2,
    ],
    ids=["no-grad", "inference", "inference-first", "no-grad-first"],
)
def test_keys_are_computed_once_while_nothing_changes(
    case: Case, contexts: list[Callable[[], Any]], computed: list[str]
) -> None:
    layer = make_layer(case)
    inputs = [random_input(b, 5, seed=b) for b in (3, 1, 50, 3)]
    for context, x in zip(contexts, inputs, strict=True):
        with context():
            y = layer(x)
            layer.attend(x)
        assert len(computed) == 1
        with torch.enable_grad():
            expected = layer(x)
        computed.pop()  # a training forward has computed its own
        close(y, expected, 1e-12)
    with torch.no_grad():
        layer.memory.key_net.bias.add_(1.0)
        layer(inputs[0])
        layer(inputs[1])
    assert len(computed) == 2


def test_a_training_forward_computes_its_own_keys(computed: list[str]) -> None:
    layer = make_layer(Case())
    x = random_input(3, 5)
    for count in range(1, 4):
        layer(x)
        assert len(computed) == count
    with torch.no_grad():
        layer(x)
        layer(x)
    assert len(computed) == 4


# Loops over time


@every_layer
def test_prepared_in_a_loop_is_forward(case: Case) -> None:
    """Values and all gradients, where what goes in depends on what came out before."""
    layer = make_layer(case)
    x = random_input(3, case.in_features).requires_grad_()
    back = random_input(case.out_features, case.in_features, seed=8)

    def loop(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = function(x)
        for _ in range(2):
            y = function(x + y @ back)
        return [y, *torch.autograd.grad(loss_of(y), [x, *layer.parameters()])]

    for actual, expected in zip(loop(layer.prepare()), loop(layer), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_prepared_is_the_layer_where_nothing_is_gained() -> None:
    layer, official = make_layer(LAYERS["one-step"]), NeurocoderLinear(3, 2, preset="official")
    with torch.no_grad():
        assert layer.prepare() is layer
    assert official.prepare() is official
    assert layer.prepare() is not layer
