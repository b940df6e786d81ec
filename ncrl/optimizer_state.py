"""Whether the state of an optimiser fits its parameters, before any kernel writes into it.

torch takes over whatever a file holds. Its fused kernels then trust the shapes: a state that is too
small is written past its end.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ncrl.shell.tensors import check_like

STEP = "step"
"""Counts the updates of a parameter, in the state of torch's optimisers."""


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Any, *, most_steps: int | None = None
) -> None:
    """Raise ValueError, saying what differs, unless `state`, read from a file, is what the
    optimiser itself would make, in names, shapes and types.

    A parameter that was never updated may lack a state; none was updated more than `most_steps`
    times. The optimiser may be on the `meta` device.
    """
    if not (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
    ):
        raise ValueError("the optimiser's state must hold 'state' and 'param_groups'")
    _check_groups(state["param_groups"], optimizer.state_dict()["param_groups"])
    expected = _expected_state(optimizer)
    for index, entry in state["state"].items():
        if type(index) is not int or not 0 <= index < len(expected):
            raise ValueError(f"the optimiser has a state for {index!r}, which is no parameter")
        if not isinstance(entry, Mapping):
            raise ValueError(f"the optimiser's state of parameter {index} is no dict")
        wanted = expected[index]
        if not entry or wanted is None:
            continue
        if set(entry) != set(wanted):
            raise ValueError(
                f"the optimiser's state of parameter {index} must hold "
                f"{', '.join(sorted(wanted))}, got {', '.join(sorted(map(str, entry)))}"
            )
        for name, value in entry.items():
            where = f"the optimiser's {name!r} of parameter {index}"
            if name == STEP:
                _check_step(value, most_steps, where)
            else:
                check_like(value, wanted[name], where)


def _check_groups(groups: list[Any], ours: list[dict[str, Any]]) -> None:
    if len(groups) != len(ours):
        raise ValueError(f"the optimiser must have {len(ours)} groups, got {len(groups)}")
    for group, own in zip(groups, ours, strict=True):
        indices = own.pop("params")
        if not isinstance(group, Mapping) or group.get("params") != indices:
            held = f"{indices[0]} to {indices[-1]}" if indices else "none"
            raise ValueError(f"the optimiser's groups must hold parameters {held}")
        for name in own.keys() & group.keys():
            check_like(group[name], own[name], f"the optimiser's {name!r}")


def _expected_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state of every parameter after an update, on the meta device, where tensors have sizes
    but no numbers. None if the optimiser has to read numbers, as Adafactor does: such a one has no
    fused kernel, and finds wrong shapes itself."""
    known = inspect.signature(type(optimizer)).parameters
    plain = dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), False)

    def options(given: Mapping[str, Any]) -> dict[str, Any]:
        return {n: plain.get(n, v) for n, v in given.items() if n in known and n != "params"}

    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        params = [torch.empty_like(p, device="meta", requires_grad=True) for p in group["params"]]
        for parameter in params:
            parameter.grad = torch.empty_like(parameter)
        groups.append({**options(group), "params": params})
    probe = type(optimizer)(groups, **options(optimizer.defaults))
    try:
        probe.step()
    except (RuntimeError, NotImplementedError):
        probe.state = defaultdict(lambda: None)
    return [probe.state[one] for group in groups for one in group["params"]]


def _check_step(value: Any, most: int | None, where: str) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1 or value.is_complex():
            raise ValueError(f"{where} must be one number, got shape {list(value.shape)}")
        value = value.item()
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a number, got {str(value)[:80]!r}")
    if value != int(value) or value < 0 or (most is not None and value > most):
        limit = "" if most is None else f" .. {most}"
        raise ValueError(f"{where} must be a whole number of at least 0{limit}, got {value:g}")
