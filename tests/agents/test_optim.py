"""`SharedRMSProp` against a loop over numbers and against a value by hand."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ncrl.agents.learning.optim import (
    SharedRMSProp,
    can_scale,
    optimizer_options,
    scaled_step,
)
from tests.reference import rmsprop_reference


def run(
    values: list[float], gradients: list[list[float]], **options: float
) -> tuple[torch.nn.Parameter, SharedRMSProp]:
    parameter = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    optimizer = SharedRMSProp([parameter], **{"initial_average": 0.0, **options})
    for row in gradients:
        parameter.grad = torch.tensor(row, dtype=torch.float64)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("alpha", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("initial", [0.0, 1.0])
def test_equals_the_loop(alpha: float, eps: float, initial: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    gradients[::5, 0] = 0
    values = [1.0, -2.0, 0.0, 3e3]
    parameter, _ = run(
        values, gradients.tolist(), lr=0.01, alpha=alpha, eps=eps, initial_average=initial
    )
    expected = rmsprop_reference(
        values, gradients.tolist(), learning_rate=0.01, alpha=alpha, eps=eps, initial_square=initial
    )
    assert parameter.tolist() == pytest.approx(expected, rel=1e-12)


def test_by_hand() -> None:
    """m = .5*0 + .5*4 = 2, step 2 / sqrt(2 + 2) = 1; then m = 1, step 0; then m = 1.5, -1/sqrt."""
    options = {"lr": 0.5, "alpha": 0.5, "eps": 2.0}
    assert run([1.0], [[2.0]], **options)[0].tolist() == [0.5]
    assert run([1.0], [[2.0], [0.0]], **options)[0].tolist() == [0.5]
    third = 0.5 + 0.5 * math.sqrt(2) / math.sqrt(1.5 + 2)
    parameter, _ = run([1.0], [[2.0], [0.0], [-math.sqrt(2)]], **options)
    assert parameter.item() == pytest.approx(third, rel=1e-14)


def test_unless_told_otherwise_it_is_that_of_a3c_with_an_average_from_1() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = SharedRMSProp([parameter])
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    assert parameter.item() == pytest.approx(-7e-4 * 2 / math.sqrt(0.99 * 1 + 0.01 * 4 + 0.1))


def test_several_parameters_groups_and_missing_gradients() -> None:
    torch.manual_seed(1)
    first, second, idle = (torch.nn.Parameter(torch.randn(n).double()) for n in (2, 3, 1))
    before = [p.tolist() for p in (first, second, idle)]
    own = {"lr": 0.3, "alpha": 0.6, "eps": 0.7, "initial_average": 2.0}
    groups = [{"params": [first, idle]}, {"params": []}, {"params": [second], **own}]
    optimizer = SharedRMSProp(groups, lr=0.1, alpha=0.8, eps=0.2, initial_average=0.0)
    gradients = [[[0.5, -1.0], [2.0, 0.1]], [[1.0, 2.0, -3.0], [0.0, 1.0, 4.0]]]
    for row in range(2):
        first.grad = torch.tensor(gradients[0][row]).double()
        second.grad = torch.tensor(gradients[1][row]).double()
        optimizer.step()
    for parameter, start, rows, lr, alpha, eps, initial in (
        (first, before[0], gradients[0], 0.1, 0.8, 0.2, 0.0),
        (second, before[1], gradients[1], *own.values()),
    ):
        expected = rmsprop_reference(
            start, rows, learning_rate=lr, alpha=alpha, eps=eps, initial_square=initial
        )
        assert parameter.tolist() == pytest.approx(expected, rel=1e-6)
    assert idle.tolist() == before[2]


def test_a_restored_optimiser_goes_on_exactly() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(8, 3, generator=generator).double().tolist()
    whole, _ = run([1.0, 2.0, 3.0], gradients, lr=0.05, alpha=0.9, eps=0.1)
    half, optimizer = run([1.0, 2.0, 3.0], gradients[:4], lr=0.05, alpha=0.9, eps=0.1)
    restored = torch.nn.Parameter(half.detach().clone())
    other = SharedRMSProp([restored], lr=9.0, alpha=0.1, eps=9.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05
    for row in gradients[4:]:
        restored.grad = torch.tensor(row).double()
        other.step()
    assert torch.equal(restored, whole)


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = SharedRMSProp([parameter], lr=0.1, eps=0.1, initial_average=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert parameter.item() < 3.0


@pytest.mark.parametrize(
    "wrong",
    [
        *({"lr": -1.0}, {"alpha": 1.0}, {"alpha": -0.1}, {"eps": -1.0}, {"initial_average": -1.0}),
        *({"lr": float("nan")}, {"eps": float("nan")}, {"initial_average": float("inf")}),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SharedRMSProp([torch.nn.Parameter(torch.zeros(1))], **wrong)


def fused_adam(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, eps=1e-5, fused=True)


def rmsprop(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return SharedRMSProp(parameters, lr=lr)


both = pytest.mark.parametrize("make", [fused_adam, rmsprop])
Make = Callable[[list[torch.nn.Parameter], Any], torch.optim.Optimizer]


def some_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 5)]


def give_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = 10 * torch.randn(parameter.shape, generator=generator)


@both
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_a_scaled_step_is_a_step_along_smaller_gradients(make: Make, scale: float) -> None:
    parameters, others = some_parameters(), some_parameters()
    scaled, plain = make(parameters, lr=0.1), make(others, lr=0.1)
    for step in range(4):
        give_gradients(parameters, step)
        give_gradients(others, step)
        for other in others:
            assert other.grad is not None
            other.grad /= scale
        scaled_step(scaled, torch.tensor(scale), torch.tensor(0.0))
        plain.step()
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other)


@both
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_after_a_scaled_one_is_not_scaled(make: Make, fails: bool) -> None:
    """Also where the scaled one was interrupted."""
    parameters, others = some_parameters(), some_parameters()
    once_scaled, plain = make(parameters, lr=0.1), make(others, lr=0.1)
    if fails:

        def fail(*_: Any) -> None:
            raise RuntimeError("interrupted")

        handle = once_scaled.register_step_pre_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            scaled_step(once_scaled, torch.tensor(7.0), torch.tensor(1.0))
        handle.remove()
    else:
        give_gradients(parameters, 0)
        scaled_step(once_scaled, torch.tensor(7.0), torch.tensor(1.0))  # it is left out
    for each, optimizer in ((parameters, once_scaled), (others, plain)):
        give_gradients(each, 1)
        optimizer.step()
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)


@both
def test_a_step_that_the_device_leaves_out_changes_nothing(make: Make) -> None:
    parameters = some_parameters()
    optimizer = make(parameters, lr=0.1)
    for skipped in (True, False, True):
        give_gradients(parameters, 0)
        if skipped:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad[0], parameter.grad[1] = float("nan"), float("inf")
        before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
        scaled_step(optimizer, torch.tensor(2.0), torch.tensor(float(skipped)))
        for one, other in zip(parameters, before[0], strict=True):
            assert torch.equal(one, other) == skipped
        now = optimizer.state_dict()["state"]
        for index, state in before[1].items():
            for name, value in state.items():
                assert torch.equal(value, now[index][name]) == skipped, name


@both
def test_the_learning_rate_may_be_a_tensor(make: Make) -> None:
    parameters, others = some_parameters(), some_parameters()
    rate = torch.tensor(0.1)
    optimizers = make(parameters, lr=rate), make(others, lr=0.1)
    for step, lr in enumerate((0.1, 0.05, 0.0)):
        rate.fill_(lr)
        optimizers[1].param_groups[0]["lr"] = lr
        give_gradients(parameters, step)
        give_gradients(others, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other)


def test_who_can_scale() -> None:
    parameters = some_parameters()
    assert can_scale(rmsprop(parameters, 0.1)) and can_scale(fused_adam(parameters, 0.1))
    assert not can_scale(torch.optim.Adam(parameters))
    assert not can_scale(torch.optim.RMSprop(parameters))
    sgd = torch.optim.SGD(parameters, momentum=0.9, fused=True)
    assert not can_scale(sgd), "its momentum is not made where a first step is left out"
    groups = [{"params": [one], "fused": i == 0} for i, one in enumerate(parameters)]
    assert not can_scale(torch.optim.Adam(groups)), "one of its groups cannot"


Adam, AdamW = torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(
    ("use_rms_prop", "policy_kwargs", "kind", "expected"),
    [
        (True, {}, SharedRMSProp, {"alpha": 0.99, "eps": 0.3}),
        (True, {"optimizer_kwargs": {"eps": 0.2}}, SharedRMSProp, {"alpha": 0.99, "eps": 0.2}),
        (True, {"optimizer_kwargs": {"alpha": 0.5}}, SharedRMSProp, {"alpha": 0.5, "eps": 0.3}),
        (True, {"optimizer_class": Adam}, Adam, {"eps": 1e-5, "fused": True}),
        (True, {"optimizer_class": AdamW}, AdamW, {"eps": 1e-8, "fused": None}),
        (False, {}, Adam, {"eps": 1e-5, "fused": True}),
        (False, {"optimizer_kwargs": {}}, Adam, {"eps": 1e-8, "fused": True}),
        (False, {"optimizer_kwargs": {"fused": False}}, Adam, {"fused": False}),
        (False, {"optimizer_kwargs": {"foreach": True}}, Adam, {"foreach": True, "fused": None}),
        (
            *(False, {"optimizer_kwargs": {"differentiable": True}}, Adam),
            {"differentiable": True, "fused": None},
        ),
    ],
)
def test_an_optimiser_has_what_it_is_told_and_the_default_else(
    use_rms_prop: bool, policy_kwargs: dict[str, Any], kind: type, expected: dict[str, Any]
) -> None:
    found = optimizer_options(policy_kwargs, use_rms_prop=use_rms_prop, rms_prop_eps=0.3)
    chosen = {"optimizer_class": Adam, "optimizer_kwargs": {}} | policy_kwargs | found
    optimizer = chosen["optimizer_class"](some_parameters(), **chosen["optimizer_kwargs"])
    assert type(optimizer) is kind
    assert {name: optimizer.defaults[name] for name in expected} == expected
