"""FiLMLinear: its start."""

import torch
from torch import nn

from ncrl.baselines import FiLMLinear
from tests.ncrl.baselines.cases import Case, cases_of
from tests.ncrl.layers import random_input


@cases_of(FiLMLinear)
def test_at_the_start_it_is_a_linear_layer(case: Case) -> None:
    layer = case.make()
    x = 10 * random_input(8, case.sizes[0])
    assert torch.equal(layer(x), layer.linear(x))
    layer(x).sum().backward()
    last = [m for m in layer.film_net if isinstance(m, nn.Linear)][-1]
    gamma, beta = last.weight.grad.chunk(2)
    assert gamma.abs().max() > 0 and beta.abs().max() > 0, "both can leave their start"
