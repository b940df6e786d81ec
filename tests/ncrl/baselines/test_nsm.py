"""NSMLinear: its attention and its initialisation."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ncrl.baselines import NSMLinear
from tests.ncrl.baselines import reference
from tests.ncrl.baselines.cases import Case, cases_of, make_layer
from tests.ncrl.layers import parameters_of, random_input


@cases_of(NSMLinear)
def test_attention_equals_the_literal_reading(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(2, 3, case.sizes[0])
    attention = layer.attend(x)
    assert attention.shape == (2, 3, layer.num_slots)
    for row, weights in zip(x.flatten(0, 1), attention.flatten(0, 1), strict=True):
        expected = reference.nsm_attention(
            parameters_of(layer),
            row,
            key_dim=layer.key_dim,
            official_cosine=layer.cosine == "official",
        )
        torch.testing.assert_close(weights, torch.stack(expected))


@pytest.mark.parametrize("bias", [False, True])
def test_a_program_is_the_matrix_that_an_input_is_multiplied_with(bias: bool) -> None:
    """W = sum_i a_i W_i; the output is x W and the mixed bias."""
    layer = NSMLinear(3, 2, num_slots=4, key_dim=2, bias=bias, dtype=torch.float64)
    x = random_input(2, 5, 3)
    programs = layer.program(x)
    assert programs.shape == (2, 5, 3, 2)
    for row, program in zip(x.flatten(0, 1), programs.flatten(0, 1), strict=True):
        attention, expected = layer.attend(row), torch.zeros(3, 2, dtype=torch.float64)
        for slot, weight in zip(layer.memory, attention, strict=True):
            expected += weight * slot[2:8].view(3, 2)
        torch.testing.assert_close(program, expected, rtol=1e-12, atol=1e-12)
        mixed = row @ program
        if bias:
            mixed = mixed + attention @ layer.memory[:, 8:]
        torch.testing.assert_close(layer(row), mixed, rtol=1e-12, atol=1e-12)


def test_a_zero_key_has_a_finite_gradient() -> None:
    layer = NSMLinear(3, 2)
    with torch.no_grad():
        layer.memory.zero_()
        layer.query.weight.zero_()
        layer.query.bias.zero_()
    layer(torch.randn(4, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_the_start_is_the_authors() -> None:
    torch.manual_seed(0)
    layer = NSMLinear(60, 50, num_slots=20, key_dim=40)
    rows, width = layer.memory.shape
    bound = 1.4 * math.sqrt(6 / (rows + width))
    assert width == 40 + 61 * 50
    assert bound * 0.99 < layer.memory.abs().max() <= bound
    bound = 1.4 * math.sqrt(6 / (60 + 40))
    assert bound * 0.95 < layer.query.weight.abs().max() <= bound
    assert 0.005 < layer.query.bias.std() < 0.015


def test_no_weight_matrix_is_built_for_an_input() -> None:
    layer = NSMLinear(64, 48, num_slots=5)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(100, 64))
    products = 2 * 100 * 5 * 64 * 48
    addressing = 2 * 100 * (64 * (5 + 1) + 5 * 5)
    assert counter.get_total_flops() == products + addressing
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.zeros(100, 64))
    assert max(saved) < 100 * 64 * 48, "one matrix for each of 100 inputs"


def test_unused_networks_change_nothing() -> None:
    options = {"num_slots": 3, "dtype": torch.float64}
    lean, padded = NSMLinear(5, 4, **options), NSMLinear(5, 4, variant="official_count", **options)
    padded.load_state_dict(lean.state_dict(), strict=False)
    x = random_input(6, 5)
    assert torch.equal(lean(x), padded(x))
    padded(x).sum().backward()
    unused = {name for name, p in padded.named_parameters() if p.grad is None}
    assert unused == {name for name, _ in padded.named_parameters() if name.startswith("unused.")}
