"""HyperNetLinear: its start."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncrl.baselines import HyperNetLinear
from tests.ncrl.baselines.cases import Case, cases_of
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
