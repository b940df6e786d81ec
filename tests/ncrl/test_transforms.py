"""The Neurocoder layer under torch's own tools: transforms, compilers, tracers, checkpoints."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ncrl import NeurocoderLinear
from tests.ncrl.layers import Case, close, make_layer, random_input

LAYERS = {
    "three-steps": Case(),
    "one-step": Case(num_steps=1, learned_sharpness=True),
    "detached": Case(detach_usage=True, gate="slot", residual_rank=2),
    "content": Case(num_steps=2, num_least_used=0, gate="head", residual=False),
    "linear": Case(num_steps=1, controller="linear", gate="head"),
}
every_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


def loss_of(y: Tensor) -> Tensor:
    return (y * random_input(*y.shape, seed=5).to(y.dtype)).sum() + y.square().sum()


@every_layer
def test_jacobians(case: Case) -> None:
    """By forward and by backward mode, and by one backward pass for each output."""
    layer = make_layer(case)
    x = random_input(case.in_features)
    slopes = []
    for output in range(case.out_features):
        at = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(layer(at)[output], at)[0])
    expected = torch.stack(slopes)
    close(torch.func.jacrev(layer)(x), expected, 1e-10)
    close(torch.func.jacfwd(layer)(x), expected, 1e-10)
    direction = random_input(case.in_features, seed=7)
    value, slope = torch.func.jvp(layer, (x,), (direction,))
    close(value, layer(x), 1e-12)
    close(slope, expected @ direction, 1e-10)
    for vectorize in (False, True):
        found = torch.autograd.functional.jacobian(layer, x, vectorize=vectorize)
        close(found, expected, 1e-10)


@pytest.mark.parametrize("no_grad", [False, True])
def test_dual_numbers_without_a_transform(no_grad: bool) -> None:
    """`torch.autograd.forward_ad` on its own, with gradients enabled and without."""
    layer = make_layer(LAYERS["one-step"])
    x = random_input(3, 5)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    along = {n: random_input(*p.shape, seed=i) for i, (n, p) in enumerate(parameters.items())}

    def call(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,))

    _, expected = torch.func.jvp(call, (parameters,), (along,))
    with forward_ad.dual_level(), torch.set_grad_enabled(not no_grad):
        dual = {n: forward_ad.make_dual(p, along[n]) for n, p in parameters.items()}
        slope = forward_ad.unpack_dual(call(dual)).tangent
    assert slope is not None
    close(slope, expected, 1e-10)


@every_layer
def test_checkpointed(case: Case) -> None:
    layer = make_layer(case)
    x = random_input(3, case.in_features).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(loss_of(y), [x, *layer.parameters()])
    expected = torch.autograd.grad(loss_of(layer(x)), [x, *layer.parameters()])
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.equal(actual, wanted)


# Autocast


def head_gradient(layer: NeurocoderLinear, x: Tensor, *, inside: bool, create_graph: bool) -> Any:
    """Gradient of the attention weights' own parameters under bfloat16 autocast."""
    sources = [layer.composition.head.weight, layer.composition.head.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).float().square().sum()
        if inside:
            return torch.autograd.grad(loss, sources, create_graph=create_graph)
    return torch.autograd.grad(loss, sources, create_graph=create_graph)


@pytest.mark.parametrize("name", ["three-steps", "one-step", "content"])
def test_backward_of_autocast_inside_and_outside_of_it(name: str) -> None:
    """The gradient of attention is computed in float32 wherever backward is called, and however:
    so all four ways agree to float32's precision, where bfloat16 has three digits."""
    case = LAYERS[name]
    layer = make_layer(case).float()
    x = random_input(16, case.in_features).float()
    exact = torch.autograd.grad(
        layer(x).square().sum(), [layer.composition.head.weight, layer.composition.head.bias]
    )
    outside = head_gradient(layer, x, inside=False, create_graph=False)
    for inside in (False, True):
        for create_graph in (False, True):
            found = head_gradient(layer, x, inside=inside, create_graph=create_graph)
            for gradient, other, wanted in zip(found, outside, exact, strict=True):
                assert gradient.dtype == torch.float32
                assert gradient.isfinite().all()
                close(gradient, wanted, 0.1)
                # Inside, the gradient that comes in has passed the product with M_V in bfloat16,
                # and that of the weight a product with the LSTM's state.
                close(gradient, other, 0.02 if inside else 1e-5)


# Parts without gradients

FREEZES: dict[str, Callable[[str], bool]] = {
    "memory": lambda name: name in ("memory.u", "memory.v", "memory.s"),
    "keys": lambda name: name.startswith("memory.key_net"),
    "head": lambda name: name.startswith("composition.head"),
    "controller": lambda name: name.startswith("composition."),
    "residual": lambda name: name.startswith("integration."),
    "all-but-u": lambda name: name != "memory.u",
    "all": lambda name: True,
}


@pytest.mark.parametrize("name", ["three-steps", "one-step"])
@pytest.mark.parametrize("freezes", FREEZES.values(), ids=FREEZES.keys())
@pytest.mark.parametrize("with_x", [False, True])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    name: str, freezes: Callable[[str], bool], with_x: bool
) -> None:
    layer = make_layer(LAYERS[name])
    x = random_input(3, 5).requires_grad_()
    names = [n for n, _ in layer.named_parameters()]
    slopes = torch.autograd.grad(loss_of(layer(x)), [x, *layer.parameters()])
    expected = dict(zip(["x", *names], slopes, strict=True))
    for n, parameter in layer.named_parameters():
        parameter.requires_grad_(not freezes(n))
    x = x.detach().requires_grad_(with_x)
    y = layer(x)
    assert y.requires_grad == (with_x or not all(freezes(n) for n in names))
    if not y.requires_grad:
        return
    loss_of(y).backward()
    for n, tensor in [("x", x), *layer.named_parameters()]:
        if tensor.requires_grad:
            assert tensor.grad is not None, n
            torch.testing.assert_close(tensor.grad, expected[n], rtol=1e-10, atol=1e-11)
        else:
            assert tensor.grad is None, n
