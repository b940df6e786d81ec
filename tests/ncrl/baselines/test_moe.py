"""MoELinear: its gate, the noise, sparse evaluation, and the balance loss.

Shapes: E experts, k experts kept, B inputs.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ncrl.baselines import MoELinear, balance_loss, record_gates
from ncrl.baselines.moe import Gating, first_largest
from tests.ncrl.baselines import reference
from tests.ncrl.baselines.cases import Case, cases_of, make_layer
from tests.ncrl.layers import parameters_of, random_input

all_mixtures = cases_of(MoELinear)


def make(experts: int, top_k: int, *, sizes: tuple[int, int] = (5, 4), seed: int = 0) -> MoELinear:
    layer = make_layer(
        Case(MoELinear, {"num_experts": experts, "top_k": top_k}, reference.moe, sizes), seed
    )
    assert isinstance(layer, MoELinear)
    return layer


def drawn(layer: MoELinear, batch: int, seed: int) -> Tensor:
    """The standard normal numbers [B, E] that a forward pass draws after `manual_seed(seed)`."""
    torch.manual_seed(seed)
    return torch.randn(batch, layer.num_experts, dtype=torch.float64)


# The gate and its noise


def test_the_gate_starts_at_zero_and_stays_open_to_learning() -> None:
    layer = MoELinear(5, 4, num_experts=4, top_k=2)
    assert not layer.gate.weight.any() and not layer.gate.noise_weight.any()
    gating = layer.eval().gate(torch.randn(3, 5))
    torch.testing.assert_close(gating.weights, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(3, -1))
    layer.train()(torch.randn(30, 5)).sum().backward()
    assert layer.gate.weight.grad.abs().max() > 0
    assert layer.gate.noise_weight.grad.abs().max() > 0


def test_noise_only_in_training() -> None:
    layer, x = make(6, 2), random_input(9, 5)
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    assert layer.gate(x).noise_scale is None
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    scale = layer.gate(x).noise_scale
    expected = torch.stack([reference.moe_noise_scale(parameters_of(layer), row) for row in x])
    torch.testing.assert_close(scale, expected)


@all_mixtures
def test_with_noise_value_and_gradients_equal_the_literal_reading(case: Case) -> None:
    layer = make_layer(case).train()
    assert isinstance(layer, MoELinear)
    x = random_input(6, case.sizes[0]).requires_grad_()
    weights = random_input(6, case.sizes[1], seed=2)
    noise = drawn(layer, 6, seed=4)
    torch.manual_seed(4)
    y = layer(x)
    (y * weights).sum().backward()

    parameters, same_x = parameters_of(layer), x.detach().clone().requires_grad_()
    rows = [
        reference.moe(parameters, row, top_k=layer.top_k, noise=n)
        for row, n in zip(same_x, noise, strict=True)
    ]
    expected = torch.stack(rows)
    (expected * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, same_x.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in layer.named_parameters():
        gradient = parameters[name].grad
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_of_equal_logits_the_first_are_chosen(k: int) -> None:
    """On every device, so that an untrained mixture is the same on all."""
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 1.0, 1.0], [2.0, 1.0, 2.0, 2.0]])
    order = [[0, 1, 2, 3], [1, 0, 2, 3], [0, 2, 3, 1]]
    expected = [[e in row[:k] for e in range(4)] for row in order]
    assert first_largest(values, k).tolist() == expected
    layer = MoELinear(5, 3, num_experts=4, top_k=k).eval()
    assert layer.gate(torch.randn(2, 5)).chosen.tolist() == [[e < k for e in range(4)]] * 2


# Importance and load


def gating(weights: list[list[float]]) -> Gating:
    dense = torch.tensor(weights)
    return Gating(dense, dense > 0, 2, torch.zeros_like(dense), torch.zeros_like(dense), None)


def test_the_balance_loss_by_hand() -> None:
    """3 inputs, 3 experts: importance (1.4, 0.6, 1), load (2, 2, 2) without noise."""
    decision = gating([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0], [0.7, 0.3, 0.0]])
    assert decision.importance().tolist() == pytest.approx([1.4, 0.6, 1.0])
    decision = gating([[0.7, 0.3, 0.0], [0.4, 0.0, 0.6], [0.0, 0.3, 0.7]])
    assert decision.importance().tolist() == pytest.approx([1.1, 0.6, 1.3])
    assert decision.load().tolist() == [2, 2, 2]
    variance = (0.1**2 + 0.4**2 + 0.3**2) / 3
    assert balance_loss({"": [decision]}).item() == pytest.approx(variance)


@all_mixtures
def test_importance_and_load_equal_the_literal_reading(case: Case) -> None:
    layer = make_layer(case).train()
    assert isinstance(layer, MoELinear)
    x, noise = random_input(7, case.sizes[0]), drawn(layer, 7, seed=4)
    torch.manual_seed(4)
    with record_gates(layer) as gates:
        layer(x)
    (decision,) = gates[""]
    importance, load = [0.0] * layer.num_experts, [0.0] * layer.num_experts
    for row, n in zip(x, noise, strict=True):
        for expert, gate in reference.moe_gates(parameters_of(layer), row, n, layer.top_k).items():
            importance[expert] += gate.item()
        for expert, chance in enumerate(
            reference.moe_load(parameters_of(layer), row, n, layer.top_k)
        ):
            load[expert] += chance
    assert decision.importance().tolist() == pytest.approx(importance)
    assert decision.load().tolist() == pytest.approx(load)
    expected = reference.cv_squared(importance) + reference.cv_squared(load)
    assert balance_loss(gates).item() == pytest.approx(expected)


def test_load_is_the_frequency_with_which_experts_are_chosen() -> None:
    """Mean of the smooth load over draws of the noise = mean of the counts (5 standard errors)."""
    layer, draws = make(5, 2).train(), 20_000
    x = random_input(1, 5)
    decision = layer.gate(x.expand(draws, 5))
    counts = decision.chosen.sum(0) / draws
    estimate = decision.load() / draws
    assert counts.min() < 0.2 and counts.max() > 0.6, "no symmetric case, where all is 0.4"
    assert (estimate - counts).abs().max() < 5 * (0.25 / draws) ** 0.5


# The loss of a model


class Deep(nn.Module):
    """MoE layers at two depths, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), make(4, 2, sizes=(6, 6)))
        self.head = make(3, 1, sizes=(6, 2), seed=1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body[2](self.body(x)))
        return y


@pytest.fixture
def model() -> Iterator[Deep]:
    torch.manual_seed(0)
    yield Deep().train()


def test_gates_are_recorded_at_any_depth_and_only_inside(model: Deep) -> None:
    x = random_input(7, 5)
    model(x)
    with record_gates(model) as gates:
        assert {name: len(layer) for name, layer in gates.items()} == {"body.2": 0, "head": 0}
        model(x)
        model(x)
    model(x)
    assert {name: len(layer) for name, layer in gates.items()} == {"body.2": 4, "head": 2}
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="stop"), record_gates(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_recordings_inside_each_other_both_hold_what_is_decided() -> None:
    """As where a user records the gates of a policy whose losses do the same."""
    layer, x = make(5, 2), random_input(12, 5)
    with record_gates(layer) as outer:
        layer(x)
        with record_gates(layer) as inner:
            layer(x)
        layer(x)
    assert (len(outer[""]), len(inner[""])) == (3, 1)
    assert outer[""][1] is inner[""][0]


def test_several_forward_passes_count_as_one_batch() -> None:
    layer, x = make(5, 2), random_input(12, 5)
    with record_gates(layer) as whole:
        layer(x)
    with record_gates(layer) as parts:
        layer(x[:7])
        layer(x[7:].view(5, 1, 5))
    torch.testing.assert_close(balance_loss(parts), balance_loss(whole))


def test_gradient_of_the_balance_loss(model: Deep) -> None:
    """By finite differences through the noise, down to the input of the model."""

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        with record_gates(model) as gates:
            model(x)
        return balance_loss(gates)

    x = random_input(6, 5).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))
    loss(x).backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (not name.startswith("head.") or "gate" in name), name


def test_edge_cases_of_the_balance_loss() -> None:
    assert balance_loss({}).item() == 0.0
    with record_gates(nn.Linear(3, 2)) as gates:
        pass
    assert balance_loss(gates).item() == 0.0
    for experts, top_k in ((1, 1), (3, 3)):
        layer = make(experts, top_k).train()
        with record_gates(layer) as gates:
            layer(random_input(4, 5))
        assert torch.equal(gates[""][0].load(), torch.full((experts,), 4.0, dtype=torch.float64))
        balance_loss(gates).backward()
    layer = make(4, 2).train()
    with record_gates(layer) as gates:
        layer(random_input(0, 5))
    loss = balance_loss(gates)
    loss.backward()
    assert loss.item() == 0.0
    assert layer.gate.weight.grad.isfinite().all()


def test_the_balance_loss_of_layers_on_two_devices() -> None:
    first, second = make(4, 2), make(4, 2).to("meta")
    with record_gates(nn.ModuleList([second, first])) as gates:
        first(random_input(4, 5))
        second(random_input(4, 5).to("meta"))
    assert balance_loss(gates).is_meta


def test_a_model_that_was_not_called_is_no_balanced_model(model: Deep) -> None:
    with record_gates(model) as gates:
        pass
    with pytest.raises(ValueError, match=r"'body\.2', 'head'"):
        balance_loss(gates)


def test_a_compiled_model_is_recorded_too(model: Deep) -> None:
    compiled, x = torch.compile(model, backend="eager"), random_input(7, 5)
    compiled(x)
    for _ in range(2):
        with record_gates(model) as gates:
            compiled(x)
        assert [len(layer) for layer in gates.values()] == [2, 1]
