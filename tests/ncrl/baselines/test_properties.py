"""What every baseline has in common with `nn.Linear`, and with its literal reading."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncrl.baselines import MoELinear
from ncrl.layers import LAYERS
from ncrl.layers import make_layer as make_by_name
from tests.ncrl.baselines.cases import Case, all_cases, make_layer, used
from tests.ncrl.layers import parameters_of, random_input


def reference_output(case: Case, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.stack([case.reference(parameters, row) for row in x])


# Values and gradients


@all_cases
def test_value_and_gradients_equal_the_literal_reading(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(5, case.sizes[0]).requires_grad_()
    weights = random_input(5, case.sizes[1], seed=2)
    (layer(x) * weights).sum().backward()

    parameters, same_x = parameters_of(layer), x.detach().clone().requires_grad_()
    expected = reference_output(case, parameters, same_x)
    (expected * weights).sum().backward()
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, same_x.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in used(layer).items():
        if name == "gate.noise_weight":
            continue  # without noise it has no part in the output; test_moe.py tests it with noise
        gradient = parameters[name].grad
        assert gradient is not None or case.layer is MoELinear, name  # an expert without inputs
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11, msg=name)


# The seat of nn.Linear


@all_cases
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (3, 0)], ids=str)
def test_leading_dimensions_are_free(case: Case, leading: tuple[int, ...]) -> None:
    layer = make_layer(case)
    x = random_input(*leading, case.sizes[0]).requires_grad_()
    y = layer(x)
    assert y.shape == (*leading, case.sizes[1])
    rows = [layer(row) for row in x.reshape(-1, case.sizes[0])]
    expected = torch.stack(rows) if rows else y.new_zeros(0, case.sizes[1])
    torch.testing.assert_close(y.reshape(-1, case.sizes[1]), expected, rtol=1e-10, atol=1e-12)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@all_cases
def test_strides_of_the_input_do_not_matter(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(case.sizes[0], 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=1e-12, atol=1e-14)


@all_cases
@pytest.mark.parametrize("wrong", [1, -1])
def test_a_wrong_width_is_refused_naming_both(case: Case, wrong: int) -> None:
    width = case.sizes[0]
    with pytest.raises(ValueError, match=rf"in_features={width}, got shape \[2, {width + wrong}\]"):
        make_layer(case)(torch.zeros(2, width + wrong))
    with pytest.raises(ValueError, match=rf"in_features={width}, got shape \[\]"):
        make_layer(case)(torch.zeros(()))


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"in_features": 0}, "in_features .*got 0") for name in ("hypernet", "film", "moe")),
    *((name, {"out_features": -1}, "out_features .*got -1") for name in ("film", "moe", "nsm")),
    ("nsm", {"in_features": 2.0}, "in_features .*got 2.0"),
    ("hypernet", {"num_layers": 0}, "num_layers .*at least 1, got 0"),
    ("hypernet", {"hidden": True}, "hidden .*at least 1, got True"),
    ("hypernet", {"scale": "row"}, "scale must be one of input, output, got 'row'"),
    ("film", {"num_layers": -2}, "num_layers .*at least 1, got -2"),
    ("film", {"hidden": 0, "num_layers": 1}, "hidden .*at least 1, got 0"),
    ("moe", {"num_experts": 0}, "num_experts .*at least 1, got 0"),
    ("moe", {"top_k": 0}, "top_k .*at least 1, got 0"),
    ("moe", {"num_experts": 3, "top_k": 4}, r"1 \.\. num_experts, got top_k=4 with num_experts=3"),
    ("nsm", {"num_slots": 0}, "num_slots .*at least 1, got 0"),
    ("nsm", {"key_dim": 0}, "key_dim .*at least 1, got 0"),
    ("nsm", {"variant": "full"}, "variant must be one of lean, official_count, got 'full'"),
    ("nsm", {"cosine": "1/K"}, "cosine must be one of true, official, got '1/K'"),
    ("film", {"num_slots": 3}, "film.*num_slots"),
]


@pytest.mark.parametrize(("name", "options", "message"), IMPOSSIBLE)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_by_name(name, **{"in_features": 5, "out_features": 4, **options})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, "float32"], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linear"])
def test_a_type_that_is_no_real_one_is_refused(name: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match=rf"real floating-point numbers, got '?{dtype}"):
        make_by_name(name, 5, 4, dtype=dtype)


def test_the_registry() -> None:
    assert list(LAYERS) == ["linear", "neurocoder", "hypernet", "film", "moe", "nsm"]
    for name in LAYERS:
        assert make_by_name(name, 6, 3)(torch.zeros(2, 6)).shape == (2, 3)
        bias_free = make_by_name(name, 6, 3, bias=False, dtype=torch.float64).eval()
        assert bias_free(torch.zeros(2, 6, dtype=torch.float64)).abs().max() == 0 or name == "film"


# Parameters


@all_cases
def test_device_and_dtype(case: Case) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = case.make(dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer(torch.zeros(3, case.sizes[0], dtype=dtype)).dtype == dtype
    assert all(p.is_meta for p in case.make(device="meta").parameters())
    moved = case.make(torch.float32).to(torch.float64).eval()
    x = random_input(3, case.sizes[0])
    torch.testing.assert_close(moved(x), moved.float()(x.float()).double(), rtol=1e-4, atol=1e-4)


@all_cases
def test_reset_parameters_starts_afresh(case: Case) -> None:
    torch.manual_seed(2)
    new, other = (dict(case.make().named_parameters()) for _ in range(2))
    layers = [make_layer(case), make_layer(case, seed=1)]
    for layer in layers:
        torch.manual_seed(3)
        layer.reset_parameters()
    reset, again = (used(layer) for layer in layers)
    for name, parameter in reset.items():
        assert torch.equal(parameter, again[name]), f"{name} depends on what it was"
        fresh = new[name].detach()
        if torch.equal(fresh, other[name]):
            assert torch.equal(parameter, fresh), f"{name} has a fixed start"
            continue
        assert not torch.equal(parameter, fresh), f"{name} is drawn"
        if fresh.numel() > 20:  # uniform: the largest of so many numbers is close to the bound
            assert parameter.abs().max().item() == pytest.approx(fresh.abs().max().item(), rel=0.3)


@all_cases
def test_extra_repr_names_every_option(case: Case) -> None:
    text = repr(case.make())
    for name, value in case.options.items():
        assert f"{name}={value!r}" in text
    assert text.startswith(f"{case.layer.__name__}(")
    assert f"{case.sizes[0]}, {case.sizes[1]}" in text


# Life among other code


def same_outputs(first: nn.Module, second: nn.Module, width: int) -> None:
    x = random_input(4, width)
    assert torch.equal(first(x), second(x))


@all_cases
def test_pickle_deepcopy_and_state_dict(case: Case) -> None:
    layer = make_layer(case)
    width = case.sizes[0]
    same_outputs(layer, pickle.loads(pickle.dumps(layer)), width)
    clone = copy.deepcopy(layer)
    same_outputs(layer, clone, width)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert layer(random_input(4, width)).abs().max() > 0, "the copy shares its parameters"
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = case.make().eval()
    loaded.load_state_dict(torch.load(file))
    same_outputs(layer, loaded, width)


@all_cases
def test_forward_keeps_nothing(case: Case) -> None:
    layer = make_layer(case).train()
    before = copy.deepcopy(layer.__dict__)
    buffers, parameters = list(layer.buffers()), parameters_of(layer)
    for _ in range(2):
        layer(random_input(3, case.sizes[0]))
    for module in layer.modules():
        assert not module._forward_hooks
    assert layer.__dict__.keys() == before.keys()
    assert list(layer.buffers()) == buffers == []
    after = dict(layer.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in parameters.items())
