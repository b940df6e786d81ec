"""The Neural Turing machine against a literal reading, and where its addressing meets zeros."""

import pytest
import torch
from torch import Tensor

from ncrl.tasks.models import Ntm
from ncrl.tasks.models.recurrent import content_weights, sharpened
from ncrl.tasks.recipes import Recipe
from tests.reference import cosine, dot, lstm_cell, sigmoid, softplus

N, M, H = 5, 3, 4  # rows, row size, controller size


def slow_softmax(x: list[Tensor]) -> list[Tensor]:
    exponentials = [torch.exp(value) for value in x]
    return [value / sum(exponentials) for value in exponentials]


def slow_address(o: Tensor, memory: Tensor, previous: Tensor, tanh: bool) -> Tensor:
    """Graves et al. 2014, Eqs. 5 to 9, for one sequence; o [M + 6], memory [N, M]."""
    key = torch.tanh(o[:M]) if tanh else o[:M]
    strength, gate, sharpening = softplus(o[M]), sigmoid(o[M + 1]), 1 + softplus(o[M + 5])
    shift = slow_softmax([o[M + 2], o[M + 3], o[M + 4]])  # by +1, 0, -1
    content = slow_softmax([strength * cosine(key, memory[i]) for i in range(N)])
    gated = [gate * content[i] + (1 - gate) * previous[i] for i in range(N)]
    moved = []
    for i in range(N):
        total = torch.zeros((), dtype=o.dtype)
        for by, share in zip((1, 0, -1), shift, strict=True):
            total = total + gated[(i - by) % N] * share
        moved.append(total)
    powers = [value**sharpening for value in moved]
    return torch.stack([value / sum(powers) for value in powers])


def slow_ntm(network: Ntm, inputs: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """One sequence [T, in] -> outputs [T, out] and the last memory [N, M]."""
    w = dict(network.controller.named_parameters())
    linear = {
        name: getattr(network, name) for name in ("read_interface", "write_interface", "output")
    }

    def apply(name: str, x: Tensor) -> Tensor:
        weight, bias = linear[name].weight, linear[name].bias
        return torch.stack([dot(weight[i], x) + bias[i] for i in range(len(bias))])

    hidden, cell = network.hidden_start, network.cell_start
    memory, read = network.memory_start, network.read_start
    read_at = write_at = torch.zeros(N, dtype=inputs.dtype)
    outputs = []
    for x in inputs:
        hidden, cell = lstm_cell(w, torch.cat([x, read]), hidden, cell)
        read_at = slow_address(apply("read_interface", hidden), memory, read_at, tanh)
        read = torch.stack([dot(read_at, memory[:, j]) for j in range(M)])
        o = apply("write_interface", hidden)
        write_at = slow_address(o[: M + 6], memory, write_at, tanh)
        erase, add = sigmoid(o[M + 6 : 2 * M + 6]), o[2 * M + 6 :]
        add = torch.tanh(add) if tanh else add
        rows = []
        for i in range(N):
            row = [
                memory[i, j] * (1 - write_at[i] * erase[j]) + write_at[i] * add[j] for j in range(M)
            ]
            rows.append(torch.stack(row))
        memory = torch.stack(rows)
        outputs.append(apply("output", torch.cat([hidden, read])))
    return torch.stack(outputs), memory


def make(tanh: bool = False, **options: object) -> Ntm:
    torch.manual_seed(0)
    network = Ntm(2, 3, H, num_rows=N, row_size=M, tanh=tanh, **options).double()
    with torch.no_grad():  # strong enough addressing that each part of it shows
        for layer in (network.read_interface, network.write_interface):
            layer.weight.mul_(6)
    return network


def test_values_and_gradients_equal_a_literal_reading() -> None:
    for tanh in (False, True):
        network = make(tanh)
        inputs = torch.randn(4, 2, 2, dtype=torch.float64)
        outputs, state = network(inputs)
        direction = torch.randn_like(outputs)
        parameters = list(network.parameters())
        gradients = torch.autograd.grad((outputs * direction).sum(), parameters)
        expected = torch.zeros((), dtype=torch.float64)
        for b in range(2):
            slow, memory = slow_ntm(network, inputs[:, b], tanh)
            torch.testing.assert_close(outputs[:, b], slow, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.memory[b], memory, rtol=1e-10, atol=1e-10)
            expected = expected + (slow * direction[:, b]).sum()
        slow_gradients = torch.autograd.grad(expected, parameters)
        for actual, slow in zip(gradients, slow_gradients, strict=True):
            torch.testing.assert_close(actual, slow, rtol=1e-8, atol=1e-10)


def test_an_empty_memory_and_key_have_finite_gradients() -> None:
    memory = torch.zeros(1, N, M, requires_grad=True)
    key = torch.zeros(1, 1, M, requires_grad=True)
    weights = content_weights(memory, key, torch.ones(1, 1, 1))
    torch.testing.assert_close(weights, torch.full((1, 1, N), 1 / N))
    weights[0, 0, 0].backward()
    assert memory.grad is not None and memory.grad.isfinite().all()
    assert key.grad is not None and key.grad.isfinite().all()


def test_sharpening_is_finite_where_weights_are_zero() -> None:
    weights = torch.zeros(1, N, requires_grad=True)
    exponent = torch.full((1, 1), 1.5, requires_grad=True)
    sharp = sharpened(weights, exponent)
    assert torch.equal(sharp, torch.zeros(1, N))
    sharp.sum().backward()
    assert weights.grad is not None and weights.grad.isfinite().all()
    assert exponent.grad is not None and exponent.grad.isfinite().all()


def test_the_start_is_saved() -> None:
    network, other = make(), Ntm(2, 3, H, num_rows=N, row_size=M).double()
    inputs = torch.randn(4, 1, 2, dtype=torch.float64)
    assert not torch.equal(network(inputs)[0], other(inputs)[0])
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(inputs)[0], other(inputs)[0])


def test_the_authors_unused_norms_are_counted_and_nothing_else() -> None:
    counted = Ntm(official_count=True)
    unused = [p for n, p in counted.named_parameters() if n.startswith("unused_norms")]
    assert sum(p.numel() for p in unused) == 2 * (26 + 66)
    counted(torch.randn(2, 1, 10))[0].sum().backward()
    assert all(p.grad is None for p in unused)
    assert not any("unused" in name for name, _ in Ntm().named_parameters())


@pytest.mark.parametrize("name", ["tanh", "official_count"])
def test_switches_are_on_or_off(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 7"):
        Recipe(network="ntm", network_options={name: 7})
