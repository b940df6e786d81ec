"""The functions of attention, each against its definition."""

import math

import pytest
import torch
from torch import Tensor

from ncrl.neurocoder.attention import (
    compose_attention,
    content_attention,
    two_level_attention,
    usage_attention,
)
from ncrl.seat import NORM_FLOOR
from tests.ncrl.layers import random_input

LENGTHS = [1e3, 1.0, 1e-3, 2e-6, 5e-7, 1e-9, 0.0]


def cosine(query: Tensor, key: Tensor) -> Tensor:
    """Of two vectors [K], as `content_attention` sees it: with a second key of zeros, whose cosine
    is 0, the odds of the first are e^cosine."""
    keys = torch.stack([key, torch.zeros_like(key)]).expand(3, -1, -1)
    content = content_attention(query.expand(3, 1, -1), keys, 1.0)
    return (content[0, 0, 0] / content[0, 0, 1]).log()


@pytest.mark.parametrize("length", LENGTHS)
def test_cosines_of_long_and_short_vectors(length: float) -> None:
    """Either vector is divided by its length, or by the floor where it is shorter."""
    one, other = random_input(2, 3)
    expected = float(one @ other / one.norm() / other.norm()) * min(1.0, length / NORM_FLOOR)
    for query, key in ((one / one.norm() * length, other), (other, one / one.norm() * length)):
        assert float(cosine(query, key)) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 3e-7, 2e-6, 1.0])
def test_slope_of_short_vectors(dtype: torch.dtype, length: float) -> None:
    """Below the floor 1e6 times the other direction, also at zero; above it what is orthogonal to
    the query, by its length."""
    direction = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    key = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    query = (length * direction).to(dtype).requires_grad_()
    cosine(query, key.to(dtype)).backward()
    expected = key / NORM_FLOOR
    if length > NORM_FLOOR:
        expected = (key - direction * (direction @ key)) / length
    assert query.grad is not None
    tolerance = 100 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(query.grad.double(), expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("sharpness", [2.0, 60.0, 1e4])
def test_sharpness_sets_the_largest_weight(sharpness: float) -> None:
    """e^b / (e^b + (P - 1) e^-b), which no sharpness makes overflow."""
    keys = torch.tensor([1.0, -1, -1, -1], dtype=torch.float64)[None, :, None].expand(3, -1, -1)
    queries = torch.full((3, 10, 1), 2.0, dtype=torch.float64)
    for beta in (sharpness, torch.tensor(sharpness)):
        content = content_attention(queries, keys, beta)
        best = torch.full((3, 10), 1 / (1 + 3 * math.exp(-2 * sharpness)), dtype=torch.float64)
        torch.testing.assert_close(content[..., 0], best)
        torch.testing.assert_close(content.sum(-1), torch.ones(3, 10, dtype=torch.float64))


USAGE = [
    # usage of each slot, l_I, weight of each slot
    ([0.1, 0.5, 0.3], 1, [0.4, 0.0, 0.0]),
    ([0.1, 0.5, 0.3], 2, [0.4, 0.0, 0.2]),
    ([0.1, 0.1, 0.3], 1, [0.2, 0.2, 0.0]),
    ([0.1, 0.1, 0.3, 0.5], 2, [0.4, 0.4, 0.0, 0.0]),
    ([0.1, 0.3, 0.3], 2, [0.2, 0.0, 0.0]),
    ([0.2, 0.2, 0.2], 1, [0.0, 0.0, 0.0]),
    ([0.0, 0.0, 0.0, 1.0], 1, [1.0, 1.0, 1.0, 0.0]),
]


@pytest.mark.parametrize(("usage", "num_least_used", "expected"), USAGE)
def test_usage_attention_by_hand(
    usage: list[float], num_least_used: int, expected: list[float]
) -> None:
    used = torch.tensor(usage, dtype=torch.float64).expand(3, 4, 2, -1)
    weights = usage_attention(used, num_least_used)
    wanted = torch.tensor(expected, dtype=torch.float64).expand_as(weights)
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-15)


def test_of_equally_used_slots_the_first_counts_as_the_most_used() -> None:
    """A convention, for a slope that is not defined there."""
    usage = torch.tensor([0.3, 0.3, 0.2], dtype=torch.float64).expand(3, 1, 1, 3).clone()
    usage_attention(usage.requires_grad_(), 1)[..., 2].sum().backward()
    expected = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    assert usage.grad is not None
    torch.testing.assert_close(usage.grad, expected.expand_as(usage))


def test_of_equal_weights_of_a_slot_the_latest_counts_as_its_usage() -> None:
    """Likewise. Slot 0 gets 0.5 twice and slot 1 0.2 and 0.1, so that slot 1 gets at the third step
    the 0.5 of the second."""
    content = torch.tensor([[0.5, 0.2], [0.5, 0.1], [0.0, 0.0]], dtype=torch.float64)  # [J, P]
    content = content[None, None, :, None].expand(3, 1, -1, -1, -1).clone().requires_grad_()
    logits = torch.tensor([1000.0, 1000.0, -1000.0], dtype=torch.float64)  # open, open, shut
    weights = compose_attention(content, logits[None, None, :, None, None], 1, False)
    last = weights[:, 0, 2, 0, 1]
    torch.testing.assert_close(last, torch.full_like(last, 0.3))
    last.sum().backward()
    expected = torch.tensor([[0.0, -1.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert content.grad is not None
    torch.testing.assert_close(content.grad[:, 0, :, 0], expected.expand(3, -1, -1))


def test_attention_of_two_levels_slot_by_slot() -> None:
    """A group's share by its largest logit, summed over heads; within it, each head by itself."""
    logits, sizes = 3 * random_input(2, 5, 7), (4, 1, 2)
    found = two_level_attention(logits, sizes)
    heads, inputs, _ = logits.shape
    for b in range(inputs):
        groups = [
            [
                [logits[h, b, p].item() for p in range(sum(sizes[:g]), sum(sizes[: g + 1]))]
                for g in range(3)
            ]
            for h in range(heads)
        ]
        evidence = [math.exp(sum(max(groups[h][g]) for h in range(heads))) for g in range(3)]
        for h in range(heads):
            expected = [
                math.exp(logit) / sum(map(math.exp, group)) * own / sum(evidence)
                for group, own in zip(groups[h], evidence, strict=True)
                for logit in group
            ]
            assert found[h, b].tolist() == pytest.approx(expected, rel=1e-9), (h, b)
    one = two_level_attention(logits, (7,))
    torch.testing.assert_close(one, logits.softmax(dim=2))
