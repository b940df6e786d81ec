"""Neurocoder layers for tests: a table of configurations, random weights and inputs.

Shape letters: B batch, P slots, K key, H heads, J steps, R = J*H components.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ncrl import NeurocoderLinear
from tests.reference import Sizes, neurocoder_reference


class Case(NamedTuple):
    """One configuration; the defaults are those of a small but complete layer."""

    in_features: int = 5
    out_features: int = 4
    num_slots: int = 7
    key_dim: int = 3
    num_heads: int = 3
    num_steps: int = 3
    num_least_used: int = 2
    controller_size: int = 6
    sharpness: float = 1.0
    residual: bool = True
    bias: bool = True
    gate: str = "slot-head"
    learned_sharpness: bool = False
    controller: str = "auto"
    residual_rank: int | None = None
    detach_usage: bool = False
    frozen_controller: bool = False
    memory_init: str = "xavier"
    residual_gate: bool = True

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            self.num_slots,
            self.key_dim,
            self.num_heads,
            self.num_steps,
            self.num_least_used,
            self.sharpness,
            self.gate,
            self.detach_usage,
        )

    @property
    def num_components(self) -> int:
        return self.num_steps * self.num_heads


CASES = {
    "default": Case(),
    "one-step": Case(num_steps=1),
    "one-step-without-usage": Case(num_steps=1, num_least_used=0),
    "one-of-everything": Case(num_heads=1, num_steps=1, num_least_used=0, key_dim=1),
    "five-steps": Case(num_steps=5),
    "five-steps-one-head": Case(num_steps=5, num_heads=1, residual=False),
    "without-usage": Case(num_least_used=0, bias=False),
    "sharp": Case(sharpness=10.0, num_steps=5),
    "sharp-without-usage": Case(sharpness=10.0, num_least_used=0, residual=False),
    "bare": Case(residual=False, bias=False),
    "few-slots": Case(in_features=9, out_features=8, num_slots=3, num_least_used=2),
    "many-slots": Case(in_features=3, out_features=2, num_slots=13, num_heads=2),
    "one-output": Case(out_features=1, num_slots=6, num_heads=2),
    "one-input": Case(in_features=1, out_features=6, num_steps=1),
    "one-least-used": Case(num_least_used=1, num_heads=1, num_steps=5),
    "all-but-one-least-used": Case(num_slots=4, num_least_used=3, num_heads=2),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def empty_layer(case: Case, dtype: torch.dtype = torch.float64) -> NeurocoderLinear:
    return NeurocoderLinear(**case._asdict(), dtype=dtype)


def make_layer(case: Case, seed: int = 0) -> NeurocoderLinear:
    """A float64 layer whose parameters are all random, so that no bias or gate is at its start."""
    layer = empty_layer(case)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.7 * noise)
    return layer


def random_input(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to rounding, in terms of the largest entry; empty tensors need the same shape."""
    assert actual.shape == expected.shape
    if actual.numel():
        assert relative_error(actual, expected) < tolerance


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.largest = max(self.largest, tensor.numel())
        return result


def tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for item in result:
            yield from tensors_in(item)


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    """Float64 copies that carry their own gradients."""
    return {
        name: parameter.detach().double().clone().requires_grad_()
        for name, parameter in layer.named_parameters()
    }


def reference_output(layer: nn.Module, case: Case, x: Tensor) -> Tensor:
    with torch.no_grad():
        return neurocoder_reference(parameters_of(layer), case.sizes, x)["output"]


def assert_gradients_equal_those_of(
    reference: Callable[[dict[str, Tensor], Tensor], Tensor],
    layer: nn.Module,
    x: Tensor,
    *,
    some_idle: bool = False,
) -> None:
    """Of every parameter and of x, for a random loss.

    Args:
        reference: outputs from parameters by name and inputs.
        layer: what is tested.
        x: inputs.
        some_idle: as for `assert_same_gradients`.
    """
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    target = random_input(*y.shape, seed=5)
    y.mul(target).sum().backward()
    state, reference_x = parameters_of(layer), x.detach().clone().requires_grad_()
    reference(state, reference_x).mul(target).sum().backward()
    assert x.grad is not None and reference_x.grad is not None
    assert relative_error(x.grad, reference_x.grad) < 1e-9
    assert_same_gradients(layer, state, some_idle=some_idle)


def assert_same_gradients(
    layer: nn.Module, state: dict[str, Tensor], *, some_idle: bool = False
) -> None:
    """Of every parameter, and of the reference's copies of them.

    With `some_idle`, a parameter that the reference does not use has no gradient or one of zeros;
    else there must be none such.
    """
    for name, parameter in layer.named_parameters():
        expected = state[name].grad
        if expected is None and some_idle:
            assert not touched(parameter), name
            continue
        assert parameter.grad is not None, name
        assert expected is not None, name
        assert relative_error(parameter.grad, expected) < 1e-9, name


def touched(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max())
    return float((actual - expected).detach().abs().max()) / max(scale, 1e-30)
