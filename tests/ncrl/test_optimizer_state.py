"""What an optimiser may load: exactly the state that it would make itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ncrl.agents.learning.optim import SharedRMSProp
from ncrl.optimizer_state import check_optimizer_state

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "shared_rmsprop": SharedRMSProp,
    "groups": lambda p: torch.optim.Adam([{"params": [one], "lr": 0.1} for one in p]),
}


def trained(kind: str, *, steps: int = 2, width: int = 3) -> torch.optim.Optimizer:
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    unused = nn.Parameter(torch.zeros(2))  # never gets a gradient, hence no state
    optimizer = KINDS[kind]([*model.parameters(), unused])
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_optimiser_wrote_is_accepted(kind: str) -> None:
    state = trained(kind).state_dict()
    fresh = trained(kind, steps=0)
    before = fresh.state_dict()
    check_optimizer_state(fresh, state)
    check_optimizer_state(fresh, before)
    assert fresh.state_dict()["state"].keys() == before["state"].keys()


def test_a_parameter_whose_state_was_only_looked_at_has_an_empty_one() -> None:
    """torch makes it then, and writes it."""
    optimizer = trained("adam", steps=0)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]] == {}
    state = optimizer.state_dict()
    assert state["state"] == {0: {}}
    check_optimizer_state(trained("adam"), state)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"adafactor"}))
def test_the_state_of_other_shapes_is_refused(kind: str) -> None:
    state = trained(kind, width=5).state_dict()
    with pytest.raises(ValueError, match=r"parameter \d must be"):
        check_optimizer_state(trained(kind), state)


@pytest.mark.parametrize("other", ["sgd", "rmsprop", "groups"])
def test_the_state_of_another_optimiser_is_refused(other: str) -> None:
    with pytest.raises(ValueError, match="must h"):
        check_optimizer_state(trained("adam"), trained(other).state_dict())


@pytest.mark.parametrize("state", [None, {}, {"state": [], "param_groups": []}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="must hold 'state' and 'param_groups'"):
        check_optimizer_state(trained("adam"), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_that_is_not_finite_is_refused(value: float) -> None:
    state = trained("adam").state_dict()
    state["param_groups"][0]["eps"] = value
    with pytest.raises(ValueError, match="'eps' must be like"):
        check_optimizer_state(trained("adam"), state)


def test_a_group_without_parameters_is_compared_like_any_other() -> None:
    one = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([{"params": [one]}, {"params": []}])
    state = optimizer.state_dict()
    check_optimizer_state(optimizer, state)
    state["param_groups"][1]["params"] = [0]
    with pytest.raises(ValueError, match="must hold parameters none"):
        check_optimizer_state(optimizer, state)
