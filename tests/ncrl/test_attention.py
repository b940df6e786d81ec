"""The functions of attention, each against its definition."""

import math

import pytest
import torch
from torch import Tensor

from ncrl.neurocoder.attention import (
    NORM_FLOOR,
    compose_attention,
    content_attention,
    inverse_norm,
    kth_smallest,
    unit,
    usage_attention,
)
from tests.ncrl.layers import random_input

SLOTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 30, 33, 80]


def ranks(num_slots: int) -> list[int]:
    """k = 1, 2, the middle ones, P - 1 and P; all of them where there are few slots."""
    if num_slots <= 9:
        return list(range(1, num_slots + 1))
    return sorted({1, 2, 3, 5, num_slots // 2, num_slots - 1, num_slots})


def values_of(kind: str, num_slots: int) -> Tensor:
    """[3, P, H, B] of a kind that a selection could get wrong."""
    values = random_input(3, num_slots, 2, 3, seed=num_slots)
    if kind == "ties":
        return (2 * values).round()
    if kind == "all-equal":
        return torch.full_like(values, 0.25)
    if kind == "infinities":
        values[values > 0.8] = math.inf
        values[values < -0.8] = -math.inf
    if kind == "increasing":
        return values.sort(1).values
    if kind == "decreasing":
        return values.sort(1, descending=True).values
    return values


@pytest.mark.parametrize("num_slots", SLOTS)
@pytest.mark.parametrize(
    "kind", ["random", "ties", "all-equal", "infinities", "increasing", "decreasing"]
)
def test_kth_smallest_is_the_kth_after_sorting(kind: str, num_slots: int) -> None:
    values = values_of(kind, num_slots)
    ordered = values.sort(dim=1).values
    for k in ranks(num_slots):
        assert torch.equal(kth_smallest(values, k), ordered[:, k - 1 : k]), k


@pytest.mark.parametrize("shape", [(3, 7, 2, 0), (3, 7, 1, 1), (1, 5, 3, 2)])
def test_kth_smallest_of_other_shapes(shape: tuple[int, ...]) -> None:
    values = random_input(*shape)
    assert torch.equal(kth_smallest(values, 3), values.sort(dim=1).values[:, 2:3])


def test_kth_smallest_leaves_its_input_alone() -> None:
    values = random_input(3, 9, 2, 3)
    before = values.clone()
    kth_smallest(values, 4)
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2])
def test_unit_vectors(dtype: torch.dtype, dim: int) -> None:
    """Divided by their length, or by the floor where they are shorter."""
    precision = torch.finfo(dtype).eps
    vectors = random_input(3, 4, 5).to(dtype)
    lengths = torch.tensor([1e3, 1.0, 1e-3, 2e-6, 5e-7, 1e-9, 0.0], dtype=dtype)
    directions = vectors / vectors.norm(dim=dim, keepdim=True)
    for length in lengths.tolist():
        scaled = directions * length
        expected = scaled / max(length, NORM_FLOOR)
        torch.testing.assert_close(unit(scaled, dim), expected, rtol=10 * precision, atol=precision)
        inverse = inverse_norm(scaled, dim)
        assert inverse.shape[dim] == 1
        torch.testing.assert_close(
            inverse,
            torch.full_like(inverse, 1 / max(length, NORM_FLOOR)),
            rtol=10 * precision,
            atol=0.0,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 3e-7, 2e-6, 1.0])
def test_slope_of_unit_vectors(dtype: torch.dtype, length: float) -> None:
    """Below the floor 1e6 I, also at zero; above it (I - d d^T) / length along direction d."""
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    x = (length * direction).to(dtype)
    slope = torch.autograd.functional.jacobian(lambda v: unit(v, 0), x).double()
    eye = torch.eye(3, dtype=torch.float64)
    expected = eye / NORM_FLOOR
    if length > NORM_FLOOR:
        expected = (eye - torch.outer(direction, direction)) / length
    tolerance = 100 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(slope, expected, rtol=0.0, atol=tolerance)


def test_the_length_of_a_unit_query_is_beta() -> None:
    """`content_attention` is told beta by the length of the query: e^b / (e^b + (P-1) e^-b)."""
    keys = torch.tensor([1.0, -1, -1, -1], dtype=torch.float64)[None, :, None].expand(3, -1, -1)
    queries = torch.full((3, 1, 2, 5), 2.0, dtype=torch.float64)
    content = content_attention(queries, keys.contiguous())
    best = math.exp(2) / (math.exp(2) + 3 * math.exp(-2))
    torch.testing.assert_close(content[:, 0], torch.full((3, 2, 5), best, dtype=torch.float64))
    torch.testing.assert_close(content.sum(1), torch.ones(3, 2, 5, dtype=torch.float64))


USAGE = [
    # usage of each slot, l_I, weight of each slot
    ([0.1, 0.5, 0.3], 1, [0.4, 0.0, 0.0]),
    ([0.1, 0.5, 0.3], 2, [0.4, 0.0, 0.2]),
    ([0.1, 0.1, 0.3], 1, [0.2, 0.2, 0.0]),
    ([0.1, 0.3, 0.3], 2, [0.2, 0.0, 0.0]),
    ([0.2, 0.2, 0.2], 1, [0.0, 0.0, 0.0]),
    ([0.0, 0.0, 0.0, 1.0], 1, [1.0, 1.0, 1.0, 0.0]),
]


@pytest.mark.parametrize(("usage", "num_least_used", "expected"), USAGE)
def test_usage_attention_by_hand(
    usage: list[float], num_least_used: int, expected: list[float]
) -> None:
    column = torch.tensor(usage, dtype=torch.float64)[None, :, None, None].expand(3, -1, 2, 4)
    weights = usage_attention(column, num_least_used)
    wanted = torch.tensor(expected, dtype=torch.float64)[None, :, None, None].expand_as(weights)
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-15)


def test_of_equally_used_slots_the_first_counts_as_the_most_used() -> None:
    """A convention, for a slope that is not defined there: it is that of `ncrl.neurocoder.fused`,
    so that a compiled layer learns as an eager one does."""
    usage = torch.tensor([0.3, 0.3, 0.2], dtype=torch.float64)[None, :, None, None]
    usage = usage.expand(3, -1, 1, 1).clone().requires_grad_()
    usage_attention(usage, 1)[:, 2].sum().backward()
    expected = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)[None, :, None, None]
    assert usage.grad is not None
    torch.testing.assert_close(usage.grad, expected.expand_as(usage))


def test_of_equal_weights_of_a_slot_the_latest_counts_as_its_usage() -> None:
    """Likewise. Slot 0 gets 0.5 twice and slot 1 0.2 and 0.1, so that slot 1 gets at the third step
    the 0.5 of the second."""
    content = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.1, 0.0]], dtype=torch.float64)  # [P, J]
    content = content[None, :, None, :, None].expand(3, -1, 1, -1, 1).clone().requires_grad_()
    logits = torch.tensor([1000.0, 1000.0, -1000.0], dtype=torch.float64)[:, None]  # open, shut
    weights = compose_attention(content, logits, 1, False)
    last = weights[:, 1, 0, 2]
    torch.testing.assert_close(last, torch.full_like(last, 0.3))
    last.sum().backward()
    expected = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    assert content.grad is not None
    torch.testing.assert_close(content.grad[:, :, 0, :, 0], expected.expand(3, -1, -1))
