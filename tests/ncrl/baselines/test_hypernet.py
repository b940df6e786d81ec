"""HyperNetLinear: its start and its sizes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncrl.baselines import HyperNetLinear
from tests.ncrl.baselines.cases import Case, cases_of, count
from tests.ncrl.layers import random_input

all_hypernets = cases_of(HyperNetLinear)


@all_hypernets
def test_at_the_start_it_is_a_linear_layer(case: Case) -> None:
    layer = case.make()
    x = 10 * random_input(8, case.sizes[0])
    assert torch.equal(layer.scale_net(x), torch.ones_like(layer.scale_net(x)))
    torch.testing.assert_close(layer(x), F.linear(x, layer._parameters["weight"], layer.bias))
    layer(x).sum().backward()
    last = [m for m in layer.scale_net if isinstance(m, nn.Linear)][-1]
    assert last.weight.grad.abs().max() > 0, "the scales can leave their start"


def test_the_weight_starts_as_that_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer, linear = HyperNetLinear(100, 300), nn.Linear(100, 300)
    assert layer._parameters["weight"].abs().max().item() == pytest.approx(
        linear.weight.abs().max().item(), rel=1e-2
    )
    assert layer._parameters["weight"].std().item() == pytest.approx(
        linear.weight.std().item(), rel=2e-2
    )
    assert layer.bias.abs().max() <= 0.1


def test_scales_belong_to_what_they_are_said_to() -> None:
    """Doubling one scale doubles one input's share, or one output before its bias."""
    for scale, place in (("input", 2), ("output", 1)):
        layer = HyperNetLinear(4, 3, scale=scale, num_layers=1, dtype=torch.float64)
        x = random_input(4)
        before = layer(x)
        with torch.no_grad():
            layer.scale_net[-1].bias[place] = 2
        change = layer(x) - before
        if scale == "input":
            torch.testing.assert_close(change, x[place] * layer._parameters["weight"][:, place])
        else:
            expected = torch.zeros(3, dtype=torch.float64)
            expected[place] = (before - layer.bias)[place]
            torch.testing.assert_close(change, expected)


def test_the_size_of_the_polynomial_network() -> None:
    """GRU 28 over (x_t, y_{t-1}) with a coded output: 3,529 parameters (Table 9: 3.5K)."""
    assert count(nn.GRU(2, 28), HyperNetLinear(28, 1, num_layers=1)) == 3_529


def test_the_size_of_the_atari_network() -> None:
    """512-256-1024 shared by both heads, and `hidden=192` for each apart, are one size."""
    linear_heads = 3_255_795
    shared = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1024))
    apart = [HyperNetLinear(512, out, num_layers=2, hidden=192) for out in (18, 1)]
    added = count(*apart) - count(nn.Linear(512, 18), nn.Linear(512, 1))
    assert linear_heads + count(shared) == 3_650_291
    assert linear_heads + added == 3_650_419
