"""FiLMLinear: its start and its sizes."""

import torch
from torch import nn

from ncrl.baselines import FiLMLinear
from tests.ncrl.baselines.cases import Case, cases_of, count
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


def test_gamma_comes_first_and_scales_the_bias_too() -> None:
    layer = FiLMLinear(4, 2, num_layers=1, dtype=torch.float64)
    x = random_input(4)
    plain = layer.linear(x)
    with torch.no_grad():
        layer.film_net[-1].bias.copy_(torch.tensor([0.5, 0.0, 0.0, 3.0]))
    expected = torch.stack([1.5 * plain[0], plain[1] + 3])
    torch.testing.assert_close(layer(x), expected)


def test_the_size_of_the_polynomial_network() -> None:
    """GRU 32 over (x_t, y_{t-1}) with a coded output: 3,555 parameters (Table 9: 3.6K)."""
    assert count(nn.GRU(2, 32), FiLMLinear(32, 1, num_layers=1)) == 3_555
