"""NeurocoderLinear against the literal loops of tests/reference.py, and by property.

Shape letters: B batch, P slots, K key, H heads, J steps, R = J*H components.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ncrl import Attention, NeurocoderConfig, NeurocoderLinear
from ncrl.layers import make_layer as make_named_layer
from ncrl.neurocoder.integration import (
    Composed,
    active_program,
    mix_slots,
    read_memory,
    singular_values,
    sum_components,
)
from tests.ncrl.layers import (
    CASES,
    Case,
    LargestTensor,
    all_cases,
    assert_gradients_equal_those_of,
    close,
    empty_layer,
    make_layer,
    parameters_of,
    random_input,
    reference_output,
    relative_error,
)
from tests.reference import neurocoder_reference

# Values


@all_cases
def test_everything_equals_the_reference(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(3, case.in_features)
    with torch.no_grad():
        expected = neurocoder_reference(parameters_of(layer), case.sizes, x)
    attention = layer.attend(x)
    assert attention.u.shape == (3, case.num_components, case.num_slots)
    assert relative_error(attention.u, expected["u"]) < 1e-9
    assert relative_error(attention.v, expected["v"]) < 1e-9
    assert relative_error(attention.s, expected["s"]) < 1e-9
    assert relative_error(layer.singular_values(x), expected["sigma"]) < 1e-9
    assert relative_error(layer.program(x), expected["program"]) < 1e-9
    assert relative_error(layer(x), expected["output"]) < 1e-9


@pytest.mark.parametrize("leading", [(), (1,), (4,), (3, 2), (2, 1, 2), (0,), (3, 0)])
def test_leading_dimensions_are_free(leading: tuple[int, ...]) -> None:
    case = CASES["default"]
    layer = make_layer(case)
    x = random_input(*leading, case.in_features)
    rows = x.reshape(-1, case.in_features)
    attention = layer.attend(x)
    pairs = [
        (layer(x), layer(rows)),
        (layer.program(x), layer.program(rows)),
        (layer.singular_values(x), layer.singular_values(rows)),
        (attention.u, layer.attend(rows).u),
        (attention.v, layer.attend(rows).v),
        (attention.s, layer.attend(rows).s),
    ]
    trailing = [
        (case.out_features,),
        (case.in_features, case.out_features),
        (case.num_components,),
        *[(case.num_components, case.num_slots)] * 3,
    ]
    for (actual, flat), shape in zip(pairs, trailing, strict=True):
        assert actual.shape == (*leading, *shape)
        torch.testing.assert_close(actual.reshape(-1, *shape), flat, rtol=1e-10, atol=1e-12)


def test_backward_of_an_empty_batch() -> None:
    layer = make_layer(CASES["default"])
    layer(torch.zeros(0, 5, dtype=torch.float64)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_singular_values_of_very_negative_memory_in_float32() -> None:
    """softplus(-80) = 1.8e-35 is a float32; softplus(-200) is 0 there, and sigma may be 0 too."""
    layer = empty_layer(CASES["sharp-without-usage"], torch.float32)
    x = random_input(3, 5).float()
    with torch.no_grad():
        layer.memory.s.fill_(-80.0)
        sigma = layer.singular_values(x)
        assert (sigma > 0).all()
        assert (sigma[:, 1:] < sigma[:, :-1]).all()
        layer.memory.s.fill_(-200.0)
        sigma = layer.singular_values(x)
        assert (sigma >= 0).all()
        assert (sigma[:, 1:] <= sigma[:, :-1]).all()


def test_vectors_are_read_slot_by_slot_and_components_summed_one_by_one() -> None:
    """Equations 3 and 1 as they are written."""
    weights, u, v = (random_input(*shape) for shape in ((2, 3, 5), (5, 4), (5, 6)))
    left, right = read_memory(weights, u), read_memory(weights, v)
    sigma = random_input(2, 3)
    program = sum_components(sigma, left, right)
    assert program.shape == (2, 4, 6)
    for b in range(2):
        expected = torch.zeros(4, 6, dtype=torch.float64)
        for n in range(3):
            u_n = sum(weights[b, n, p] * u[p] for p in range(5))
            v_n = sum(weights[b, n, p] * v[p] for p in range(5))
            close(left[b, n], u_n)
            expected += sigma[b, n] * torch.outer(u_n, v_n)
        close(program[b], expected)


@pytest.mark.parametrize(("in_features", "out_features"), [(6, 4), (3, 7), (5, 5), (4, 1)])
def test_any_matrix_can_be_stored_exactly(in_features: int, out_features: int) -> None:
    """One slot per singular triple of W and one-hot attention: y = x W.

    Eq. 4 sums softplus(M_S) from component n on, so M_S holds softplus^-1 of the differences.
    Softmax cannot be one-hot, hence the functions behind the layer.
    """
    rank = min(in_features, out_features)
    matrix = random_input(in_features, out_features, seed=11)
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    differences = sigma - torch.cat([sigma[1:], torch.zeros(1, dtype=sigma.dtype)])
    memory_s = differences.expm1().log()[:, None]  # [P, 1]
    x = random_input(3, in_features)
    one_hot = torch.eye(rank, dtype=torch.float64).expand(3, -1, -1)  # [B, R, P]
    stored = singular_values(one_hot, memory_s)  # [B, R]
    torch.testing.assert_close(stored, sigma.expand(3, -1), rtol=1e-10, atol=1e-10)
    composed = Composed(Attention(one_hot, one_hot, one_hot), stored, None, x @ left)
    y = mix_slots(composed) @ right
    torch.testing.assert_close(y, x @ matrix, rtol=1e-10, atol=1e-10)
    program = active_program(composed, left.T, right)
    torch.testing.assert_close(program, matrix.expand(3, -1, -1), rtol=1e-10, atol=1e-10)


# Attention


def constant_head(
    layer: NeurocoderLinear, case: Case, query: list[float], gate_logits: list[float]
) -> None:
    """The same query and gates for every memory, head and step, whatever the input."""
    head = query + gate_logits if case.num_least_used else query
    with torch.no_grad():
        layer.composition.head.weight.zero_()
        layer.composition.head.bias.copy_(torch.tensor(head).repeat(3 * case.num_heads))


def sign_keys(layer: NeurocoderLinear) -> None:
    """Keys [1] that are +1 for slot 0 and -1 for the others (key_dim 1)."""
    with torch.no_grad():
        layer.memory.s.fill_(-1.0)
        layer.memory.s[0] = 1.0
        layer.memory.key_net.weight.zero_()
        layer.memory.key_net.weight[:, -1] = 1.0
        layer.memory.key_net.bias.zero_()


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize("num_slots", [2, 5, 30])
def test_largest_possible_attention_by_hand(sharpness: float, num_slots: int) -> None:
    """Cosines +1 and -1: e^b / (e^b + (P-1) e^-b), whatever the length of the query."""
    case = Case(num_slots=num_slots, key_dim=1, num_steps=1, num_least_used=0, sharpness=sharpness)
    layer = make_layer(case)
    sign_keys(layer)
    constant_head(layer, case, [50.0], [])
    bound = math.exp(sharpness) / (math.exp(sharpness) + (num_slots - 1) * math.exp(-sharpness))
    rest = (1 - bound) / (num_slots - 1)
    expected = torch.full((2, 3, num_slots), rest, dtype=torch.float64)
    expected[..., 0] = bound
    attention = layer.attend(random_input(2, 5))
    for weights in (attention.u, attention.v, attention.s):
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("num_least_used", [1, 2, 4])
def test_second_step_adds_the_least_used_slots_by_hand(num_least_used: int) -> None:
    """Gates of 1/2 and one constant query: w_1 = m = c/2 and w_2 = c/2 + (max m - m)/2.

    The usage term is on exactly the l_I slots of least content, all contents being different.
    """
    case = Case(num_steps=2, num_heads=2, num_least_used=num_least_used)
    layer = make_layer(case)
    constant_head(layer, case, [0.4, -1.0, 0.7], [0.0] * case.num_slots)
    attention = layer.attend(random_input(2, case.in_features))
    for weights in (attention.u, attention.v, attention.s):
        for sample in range(2):
            for head in range(case.num_heads):
                first = weights[sample, head].tolist()
                assert len(set(first)) == case.num_slots
                least = sorted(first)[:num_least_used]
                expected = [m + 0.5 * (max(first) - m) if m in least else m for m in first]
                second = weights[sample, case.num_heads + head].tolist()
                assert second == pytest.approx(expected, rel=1e-9)


def test_ties_at_the_threshold_are_all_selected() -> None:
    """Slot 0 open, the others closed: m = (c_0, 0, .., 0), so l_2 = c_0 on every closed slot."""
    case = Case(num_steps=3, num_heads=1, num_least_used=2)
    layer = make_layer(case)
    constant_head(layer, case, [0.4, -1.0, 0.7], [1000.0] + [-1000.0] * (case.num_slots - 1))
    attention = layer.attend(random_input(1, case.in_features))
    for weights in (attention.u, attention.v, attention.s):
        first, second, third = weights[0]
        assert first[0] > 0
        assert not first[1:].any()
        torch.testing.assert_close(second, first[0].expand_as(second), rtol=1e-9, atol=0.0)
        # Now all slots are used alike, up to rounding: the usage term is gone again.
        torch.testing.assert_close(third, first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [1e-9, 3e-7, 1e-5])
def test_short_queries_and_keys_are_divided_by_the_floor(length: float) -> None:
    """Below 1e-6 a query or a key fades instead of keeping unit length."""
    case = Case(num_steps=1, num_least_used=0, sharpness=4.0)
    short_query, short_keys = make_layer(case), make_layer(case)
    constant_head(short_query, case, [length, -length, 0.0], [])
    with torch.no_grad():
        short_keys.memory.key_net.weight.mul_(length)
        short_keys.memory.key_net.bias.mul_(length)
    x = random_input(2, case.in_features)
    for layer in (short_query, short_keys):
        with torch.no_grad():
            expected = neurocoder_reference(parameters_of(layer), case.sizes, x)
        assert relative_error(layer.attend(x).u, expected["u"]) < 1e-9


@pytest.mark.parametrize("name", ["default", "one-step-without-usage"])
def test_zero_input_and_zero_parameters_are_finite(name: str) -> None:
    case = CASES[name]
    x = torch.zeros(2, case.in_features, dtype=torch.float64, requires_grad=True)
    zero = make_layer(case)
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    for layer in (make_layer(case), zero):
        y = layer(x)
        assert y.isfinite().all()
        y.square().sum().add(y.sum()).backward()
        gradients = [("x", x.grad), *((n, p.grad) for n, p in layer.named_parameters())]
        for parameter_name, gradient in gradients:
            assert gradient is not None, parameter_name
            assert gradient.isfinite().all(), parameter_name


# Gradients

GRADIENT_CASES = [
    "default",
    "one-step",
    "five-steps-one-head",
    "without-usage",
    "sharp",
    "many-slots",
    "all-but-one-least-used",
]


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    """The reference reads keys from detached memories, so an extra or a missing path shows."""
    case = CASES[name]

    def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return neurocoder_reference(state, case.sizes, x)["output"]

    assert_gradients_equal_those_of(reference, make_layer(case), random_input(2, case.in_features))


# State


def by_state_dict(layer: NeurocoderLinear) -> NeurocoderLinear:
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = empty_layer(CASES["default"])
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


COPIES: dict[str, Callable[[NeurocoderLinear], NeurocoderLinear]] = {
    "state-dict": by_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_copies_give_bit_equal_outputs(
    make_copy: Callable[[NeurocoderLinear], NeurocoderLinear],
) -> None:
    case = CASES["default"]
    layer = make_layer(case).eval()
    x = random_input(4, case.in_features)
    duplicate = make_copy(layer).eval()
    assert torch.equal(layer(x), duplicate(x))
    with torch.no_grad():
        assert torch.equal(layer(x), duplicate(x))
        # The copy lives on its own: what changes the layer does not change it.
        before = duplicate(x)
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        assert torch.equal(duplicate(x), before)
        for parameter in duplicate.parameters():
            parameter.mul_(0.5)
        assert relative_error(duplicate(x), reference_output(duplicate, case, x)) < 1e-9


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_forward_keeps_nothing(preset: str) -> None:
    """So no result can be stale, whatever changes the weights, and pickles stay small."""
    options = {"num_slots": 6, "num_heads": 2, "num_steps": 2, "preset": preset}
    layer = make_named_layer("neurocoder", 5, 4, **options)
    before = copy.deepcopy([vars(module) for module in layer.modules()])
    x = random_input(3, 5).float()
    for training in (True, False):
        layer.train(training)
        layer(x).sum()
        with torch.no_grad():
            layer(x)
            layer.program(x)
    assert not list(layer.buffers())
    for module, old in zip(layer.train().modules(), before, strict=True):
        assert vars(module).keys() == old.keys()
        for name in vars(module).keys() - {"_parameters", "_modules", "_load_state_dict_pre_hooks"}:
            assert vars(module)[name] == old[name], name


# Precision and cost


@pytest.mark.parametrize("name", ["default", "sharp", "without-usage", "many-slots"])
def test_float32_is_close_to_float64(name: str) -> None:
    case = CASES[name]
    layer = make_layer(case)
    single = copy.deepcopy(layer).float()
    x = random_input(16, case.in_features)
    y = single(x.float())
    assert y.dtype == torch.float32
    assert relative_error(y.double(), layer(x)) < 1e-4


@pytest.mark.parametrize("name", ["default", "one-step", "without-usage", "bare"])
def test_autocast_is_close_and_leaves_attention_and_cumulative_sums_in_float32(name: str) -> None:
    """Eight bits cannot hold usage, whose ties matter, nor a sum that must strictly decrease."""
    case = CASES[name]
    layer = make_layer(case).float()
    x = random_input(16, case.in_features).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        attention = layer.attend(x)
        sigma = layer.singular_values(x)
    assert relative_error(y.float(), layer(x)) < 0.1
    for label, tensor in [*attention._asdict().items(), ("sigma", sigma)]:
        assert tensor.dtype == torch.float32, label
    assert (sigma[:, 1:] < sigma[:, :-1]).all()
    y.float().square().sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


WIDE = Case(160, 160, 4, 3, 2, 2, 1, 4, residual=False)
"""So few slots and units that B*R*in exceeds every tensor that the folded form needs."""


def test_neither_programs_nor_vectors_are_built() -> None:
    """Not W [B, in, out], and not even u_n [B, R, in], forward or backward."""
    batch = 8
    x = random_input(batch, WIDE.in_features)
    layer = make_layer(WIDE)
    with LargestTensor() as seen:
        layer(x).sum().backward()
    assert 0 < seen.largest < batch * WIDE.num_components * WIDE.in_features
    with LargestTensor() as seen:
        layer.program(x)
    assert seen.largest >= batch * WIDE.in_features * WIDE.out_features


def test_the_residual_is_applied_to_the_output() -> None:
    batch = 8
    layer = make_layer(WIDE._replace(residual=True))
    with LargestTensor() as seen:
        layer(random_input(batch, WIDE.in_features)).sum().backward()
    # The residual matrix itself and its gradient are shared by the batch.
    assert seen.largest <= WIDE.in_features * WIDE.out_features


# Construction


BAD_SIZES: list[tuple[dict[str, Any], list[str]]] = [
    ({"num_slots": 4, "num_least_used": 4}, ["num_least_used", "4"]),
    ({"num_slots": 4, "num_least_used": 9}, ["num_least_used", "4", "9"]),
    ({"num_least_used": -1}, ["num_least_used", "-1"]),
    *[
        ({name: value, "num_least_used": 0}, [name, str(value)])
        for name in ("num_slots", "num_heads", "num_steps", "key_dim", "controller_size")
        for value in (0, -3)
    ],
    *[({name: -6}, [name, "-6"]) for name in ("in_features", "out_features")],
    *[
        ({"sharpness": value}, ["sharpness", str(value)])
        for value in (0.0, -1.0, math.nan, math.inf)
    ],
]


@pytest.mark.parametrize(("changes", "words"), BAD_SIZES, ids=lambda value: str(value))
def test_impossible_sizes_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        empty_layer(Case()._replace(**changes))
    for word in words:
        assert word in str(error.value)


def test_a_config_is_the_same_as_its_fields() -> None:
    case = Case()
    i, o, bias = case.in_features, case.out_features, case.bias
    fields = {name: value for name, value in case._asdict().items() if name in CONFIG_FIELDS}
    config = NeurocoderConfig(**fields | {"num_heads": 9})
    layer = NeurocoderLinear(i, o, config, num_heads=3, bias=bias, dtype=torch.float64)
    full = make_layer(case)
    layer.load_state_dict(full.state_dict())
    x = random_input(2, i)
    assert torch.equal(layer(x), full(x))


CONFIG_FIELDS = set(Case._fields) - {"in_features", "out_features", "bias"}


@pytest.mark.parametrize("method", ["__call__", "attend", "singular_values", "program"])
@pytest.mark.parametrize("shape", [(2, 13), (13,), (3, 2, 13)])
def test_wrong_input_width_names_both(method: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(Case(in_features=11))
    with pytest.raises((ValueError, RuntimeError)) as error:
        getattr(layer, method)(random_input(*shape))
    assert "11" in str(error.value)
    assert "13" in str(error.value)


def test_same_seed_same_layer() -> None:
    layers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layers.append(empty_layer(Case()))
    x = random_input(2, 5)
    assert torch.equal(layers[0](x), layers[1](x))
    assert not torch.equal(layers[0](x), layers[2](x))


@pytest.mark.parametrize("reset", [False, True])
def test_initial_values(reset: bool) -> None:
    """Memories Xavier uniform, gates half open, bias zero, residual within nn.Linear's range."""
    case = Case(in_features=40, out_features=30, num_slots=50)
    torch.manual_seed(0)
    layer = make_layer(case) if reset else empty_layer(case)
    if reset:
        layer.reset_parameters()
    for memory in (layer.memory.u, layer.memory.v, layer.memory.s):
        limit = math.sqrt(6 / sum(memory.shape))
        assert memory.abs().max() <= limit
        assert memory.abs().max() > 0.8 * limit
        assert abs(memory.mean().item()) < 0.3 * limit
    gates = layer.composition.head.bias.view(3, case.num_heads, -1)[..., case.key_dim :]
    assert not gates.any()
    assert layer.bias is not None
    assert not layer.bias.any()
    residual = dict(layer.named_parameters())["integration.residual"]
    limit = 1 / math.sqrt(case.in_features)
    assert 0.8 * limit < residual.abs().max().item() <= limit
