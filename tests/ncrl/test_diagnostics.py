"""`ncrl.diagnostics.describe` against the formulas, written out one number at a time."""

import copy
import math

import pytest
import torch
from torch import Tensor

from ncrl import NeurocoderLinear
from ncrl.diagnostics import RANK_SAMPLES, describe, participation_ratio

SIZES = [
    {"num_slots": 6, "key_dim": 2, "num_heads": 2, "num_steps": 3, "num_least_used": 2},
    {"num_slots": 4, "key_dim": 3, "num_heads": 3, "num_steps": 1, "num_least_used": 0},
    {"num_slots": 9, "key_dim": 2, "num_heads": 2, "num_steps": 2, "residual": False},
]


def make_layer(seed: int, **options: object) -> NeurocoderLinear:
    torch.manual_seed(seed)
    layer = NeurocoderLinear(7, 5, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def active_programs(layer: NeurocoderLinear, x: Tensor) -> list[Tensor]:
    """sum_n sigma_n u_n^T v_n of every input, composed from attention and memory alone."""
    attention, sigma = layer.attend(x), layer.singular_values(x)
    programs = []
    for b in range(len(x)):
        program = torch.zeros(layer.in_features, layer.out_features)
        for n in range(sigma.shape[1]):
            u = attention.u[b, n] @ layer.memory.u
            v = attention.v[b, n] @ layer.memory.v
            program += sigma[b, n] * torch.outer(u, v)
        programs.append(program)
    return programs


@pytest.mark.parametrize("options", SIZES)
def test_report_equals_the_formulas(options: dict) -> None:
    layer = make_layer(0, **options)
    x = torch.randn(RANK_SAMPLES - 5, 7)
    num_slots = layer.config.num_slots
    with torch.no_grad():
        report = describe(layer, x)
        rows = [
            row for weights in layer.attend(x) for row in weights.reshape(-1, num_slots).tolist()
        ]
        ranks = []
        for program in active_programs(layer, x):
            squares = [s * s for s in torch.linalg.svdvals(program).tolist()]
            ranks.append(sum(squares) ** 2 / sum(s * s for s in squares))
        memories = (layer.memory.u, layer.memory.v)
        distance = sum(float((m @ m.T - torch.eye(num_slots)).norm()) for m in memories)
    floor = math.sqrt(max(0, num_slots - 7)) + math.sqrt(max(0, num_slots - 5))

    entropies, usage = [], [0.0] * num_slots
    for row in rows:
        shares = [w / sum(row) for w in row]
        entropies.append(-sum(p * math.log(p) for p in shares if p > 0) / math.log(num_slots))
        usage = [total + p / len(rows) for total, p in zip(usage, shares, strict=True)]
    assert report.attention_entropy == pytest.approx(sum(entropies) / len(rows), rel=1e-4)
    assert report.max_attention == pytest.approx(max(map(max, rows)))
    assert report.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-3)
    assert report.orthogonality == pytest.approx(distance - floor, rel=1e-4, abs=1e-4)
    assert report.slot_usage.tolist() == pytest.approx(usage, rel=1e-4)
    amounts = [  # by input and component
        [math.log1p(math.exp(float(row @ layer.memory.s[:, 0].detach()))) for row in weights]
        for weights in layer.attend(x).s.detach()
    ]
    sigma = [sum(sum(row[n:]) for row in amounts) / len(amounts) for n in range(len(amounts[0]))]
    assert report.singular_values.tolist() == pytest.approx(sigma, rel=1e-4)


def test_rank_is_measured_on_inputs_from_everywhere_in_the_batch() -> None:
    layer = make_layer(1, num_slots=5)
    x = torch.randn(3 * RANK_SAMPLES - 2, 7)
    some = x[:: (len(x) - 1) // (RANK_SAMPLES - 1)]
    assert len(some) == RANK_SAMPLES and (some[-1] == x[-1]).all()
    assert describe(layer, x).effective_rank == describe(layer, some).effective_rank
    assert describe(layer, x).max_attention >= describe(layer, some).max_attention


def test_one_slot_one_input_and_the_layer_is_left_as_it_was() -> None:
    layer = make_layer(4, num_slots=1, num_least_used=0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    report = describe(layer, torch.randn(1, 7))
    assert report.slot_usage.tolist() == [1.0]
    assert report.attention_entropy == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(number) for number in report[:4])
    assert not report.slot_usage.requires_grad
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("values", "ratio"),
    [([1.0, 0, 0], 1), ([2.0, 2.0, 2.0], 3), ([3.0, 1.0, 0], 100 / 82), ([0.0, 0, 0], 0)],
)
def test_participation_ratio_by_hand(values: list[float], ratio: float) -> None:
    matrix = torch.diag(torch.tensor(values))
    for scale in (1, 1e-12, 1e12):  # fourth powers that single precision does not hold
        assert float(participation_ratio(scale * matrix)) == pytest.approx(ratio)


def test_half_precision() -> None:
    """Slots that get nothing have a share of 0, and no logarithm of it."""
    torch.manual_seed(0)
    layer = NeurocoderLinear(16, 14, sharpness=20.0)
    half, x = copy.deepcopy(layer).half(), torch.randn(64, 16)
    assert not torch.stack(half.attend(x.half())).all()
    found, expected = describe(half, x.half()), describe(layer, x)
    assert found.attention_entropy == pytest.approx(expected.attention_entropy, abs=0.01)
    torch.testing.assert_close(found.slot_usage, expected.slot_usage, rtol=0.05, atol=1e-3)
