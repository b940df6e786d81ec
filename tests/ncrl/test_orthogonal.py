"""orthogonal_loss against its definition, its floor and its gradient by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from ncrl import NeurocoderLinear, orthogonal_loss
from tests.reference import orthogonal_loss_reference


def make_layer(
    in_features: int, out_features: int, num_slots: int, *, seed: int = 0
) -> NeurocoderLinear:
    layer = NeurocoderLinear(
        in_features,
        out_features,
        num_slots=num_slots,
        key_dim=2,
        num_heads=2,
        num_steps=1,
        num_least_used=0,
        controller_size=3,
        residual=False,
        bias=True,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for memory in (layer.memory.u, layer.memory.v, layer.memory.s):
            memory.copy_(torch.randn(memory.shape, generator=generator, dtype=torch.float64))
    return layer


def orthonormal(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Orthonormal rows, or orthonormal columns where there are more rows than columns."""
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(
        max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64
    )
    q, _ = torch.linalg.qr(tall)
    return q if rows >= columns else q.T


def memories(layer: NeurocoderLinear) -> tuple[Tensor, Tensor]:
    u, v = layer.memory.u, layer.memory.v
    return u.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()


def test_floor_is_reported_by_the_memory() -> None:
    """L_o is always reported minus its floor; slots that fit their width have none."""
    assert make_layer(3, 5, 7).memory.orthogonality_floor() == pytest.approx(2 + math.sqrt(2))
    assert make_layer(3, 5, 3).memory.orthogonality_floor() == 0.0


WIDTHS = [(6, 5, 4), (3, 2, 7), (3, 8, 5), (4, 4, 4), (1, 1, 6), (5, 5, 1)]


@pytest.mark.parametrize("widths", WIDTHS)
def test_value_and_gradient_equal_the_definition(widths: tuple[int, int, int]) -> None:
    layer = make_layer(*widths)
    loss = orthogonal_loss(layer)
    u, v = memories(layer)
    expected = orthogonal_loss_reference([(u, v)])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    loss.backward()
    expected.backward()
    for memory, reference in ((layer.memory.u, u), (layer.memory.v, v)):
        assert memory.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(memory.grad, reference.grad, rtol=1e-9, atol=1e-10)


def test_loss_of_a_model_is_the_sum_over_its_layers() -> None:
    first, second, third = make_layer(6, 5, 4), make_layer(5, 2, 7, seed=1), make_layer(2, 3, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(5, 5), second, nn.ModuleDict({"x": third}))
    expected = orthogonal_loss_reference(memories(layer) for layer in (first, second, third))
    assert orthogonal_loss(model).item() == pytest.approx(expected.item(), rel=1e-10)
    parts = sum(orthogonal_loss(layer).item() for layer in (first, second, third))
    assert orthogonal_loss(model).item() == pytest.approx(parts, rel=1e-12)


FLOORS = [(2, 50, 6.928), (1, 80, 8.888), (18, 80, 7.874), (10, 30, 4.472)]


@pytest.mark.parametrize(("width", "num_slots", "floor"), FLOORS)
def test_floor_of_more_slots_than_dimensions(width: int, num_slots: int, floor: float) -> None:
    """sqrt(P - d), reached where the columns are orthonormal: the gradient vanishes there."""
    layer = make_layer(num_slots, width, num_slots)
    with torch.no_grad():
        layer.memory.u.copy_(torch.eye(num_slots))
    assert orthogonal_loss(layer).item() > math.sqrt(num_slots - width)
    with torch.no_grad():
        layer.memory.v.copy_(orthonormal(num_slots, width))
    loss = orthogonal_loss(layer)
    assert loss.item() == pytest.approx(math.sqrt(num_slots - width), rel=1e-9)
    assert loss.item() == pytest.approx(floor, abs=6e-4)
    loss.backward()
    assert layer.memory.v.grad is not None
    assert float(layer.memory.v.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("num_slots", [1, 3, 4])
def test_exactly_orthonormal_rows_have_zero_loss_and_zero_gradient(num_slots: int) -> None:
    layer = make_layer(6, 4, num_slots)
    with torch.no_grad():
        layer.memory.u.copy_(torch.eye(num_slots, 6))
        layer.memory.v.copy_(torch.eye(num_slots, 4))
    loss = orthogonal_loss(layer)
    assert loss.item() == 0.0
    loss.backward()
    for memory in (layer.memory.u, layer.memory.v):
        assert memory.grad is not None
        assert not memory.grad.any()


def test_nearly_orthonormal_rows_have_a_finite_gradient() -> None:
    """The norm is not squared: its gradient keeps its length however small the loss is."""
    layer = make_layer(6, 5, 4)
    with torch.no_grad():
        layer.memory.u.copy_(orthonormal(4, 6))
        layer.memory.v.copy_(orthonormal(4, 5, seed=1))
    loss = orthogonal_loss(layer)
    assert loss.item() < 1e-10
    loss.backward()
    for memory in (layer.memory.u, layer.memory.v):
        assert memory.grad is not None
        assert memory.grad.isfinite().all()
        assert float(memory.grad.norm()) < 2 + 1e-6


def test_autocast_changes_neither_the_loss_nor_its_gradient() -> None:
    """In half precision, rows that are nearly orthonormal would look as far off as its rounding."""
    layer = make_layer(16, 12, 8).float()
    with torch.no_grad():
        layer.memory.u.copy_(orthonormal(8, 16))
        layer.memory.v.copy_(orthonormal(8, 12, seed=1))
        layer.memory.u[0, 0] += 0.01
    loss = orthogonal_loss(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = orthogonal_loss(layer)
    assert torch.equal(same, loss)
    (gradient,) = torch.autograd.grad(loss, layer.memory.u)
    assert torch.equal(torch.autograd.grad(same, layer.memory.u)[0], gradient)


def test_layers_on_two_devices() -> None:
    """As of a model whose parts lie on several GPUs: the sum is where the first layer is."""
    model = nn.ModuleList([make_layer(6, 5, 4).to("meta"), make_layer(6, 5, 4)])
    assert orthogonal_loss(model).is_meta
