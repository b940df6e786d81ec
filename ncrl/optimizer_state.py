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

STEP = "step"
"""Counts the updates of a parameter, in the state of torch's optimisers."""


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Any, *, most_steps: int | None = None
) -> None:
    """Compare a `state_dict` with the optimiser that is to load it.

    Names, shapes and types of the tensors must be those that the optimiser itself would make. A
    parameter that was never updated may lack a state.

    Args:
        optimizer: on any device, also `meta`; not changed.
        state: what was read from a file.
        most_steps: updates that any parameter can have had.

    Raises:
        ValueError: in one line that says what differs.
    """
    if not (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
    ):
        raise ValueError("the optimiser's state must hold 'state' and 'param_groups'")
    _check_groups(optimizer, state["param_groups"])
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    expected = _expected_state(optimizer)
    for index, entry in state["state"].items():
        if type(index) is not int or not 0 <= index < len(expected):
            raise ValueError(f"the optimiser has a state for {index!r}, which is no parameter")
        if not isinstance(entry, Mapping):
            raise ValueError(f"the optimiser's state of parameter {index} is no dict")
        if not entry:
            continue
        if expected[index] is None:
            _check_broadcast(entry, parameters[index], index)
            continue
        if set(entry) != set(expected[index]):
            raise ValueError(
                f"the optimiser's state of parameter {index} must hold "
                f"{', '.join(sorted(expected[index]))}, got {', '.join(sorted(map(str, entry)))}"
            )
        for name, value in entry.items():
            where = f"the optimiser's {name!r} of parameter {index}"
            if name == STEP:
                _check_step(value, most_steps, where)
            else:
                _check_value(value, expected[index][name], where)


def _check_groups(optimizer: torch.optim.Optimizer, groups: list[Any]) -> None:
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimiser must have {len(optimizer.param_groups)} groups, got {len(groups)}"
        )
    first = 0
    for group, ours in zip(groups, optimizer.param_groups, strict=True):
        last = first + len(ours["params"])
        if not isinstance(group, Mapping) or group.get("params") != list(range(first, last)):
            raise ValueError(f"the optimiser's groups must hold parameters {first} to {last - 1}")
        for name, value in ours.items():
            if name != "params" and name in group and not _is_like(group[name], value):
                raise ValueError(
                    f"the optimiser's {name!r} must be like {value!r}, got "
                    f"{str(group[name])[:80]!r}"
                )
        first = last


def _is_like(value: Any, ours: Any) -> bool:
    """Whether an option can stand for another: a finite number for a number, and so on."""
    if isinstance(ours, (tuple, list)):
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(ours)
            and all(map(_is_like, value, ours))
        )
    if isinstance(ours, bool) or ours is None:  # switches: on, off, or as torch decides
        return value is None or isinstance(value, bool)
    if isinstance(ours, (int, float)):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(ours)


def _expected_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state of every parameter after an update, on the meta device, where tensors have sizes
    but no numbers. None for each if the optimiser has to read numbers, as Adafactor does."""
    known = inspect.signature(type(optimizer)).parameters
    plain = dict.fromkeys(("foreach", "fused", "capturable", "differentiable"), False)
    groups = []
    for group in optimizer.param_groups:
        options = {n: v for n, v in group.items() if n in known and n != "params"}
        options |= {n: v for n, v in plain.items() if n in options}
        params = []
        for parameter in group["params"]:
            one = torch.empty_like(parameter, device="meta", requires_grad=True)
            one.grad = torch.empty_like(one)
            params.append(one)
        groups.append({**options, "params": params})
    defaults = {n: v for n, v in optimizer.defaults.items() if n in known}
    probe = type(optimizer)(groups, **{**defaults, **{n: False for n in plain if n in defaults}})
    try:
        probe.step()
    except (RuntimeError, NotImplementedError):
        probe.state = defaultdict(lambda: None)
    return [probe.state[one] for group in groups for one in group["params"]]


def _check_broadcast(entry: Mapping[str, Any], parameter: Tensor, index: int) -> None:
    """Every tensor has to broadcast to its parameter: some optimisers keep rows and columns."""
    for name, value in entry.items():
        if not isinstance(value, Tensor):
            continue
        try:
            fits = torch.broadcast_shapes(value.shape, parameter.shape) == parameter.shape  # type: ignore[no-untyped-call]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"the optimiser's {name!r} of parameter {index} has shape {list(value.shape)}, "
                f"expected {list(parameter.shape)}"
            )


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


def _check_value(value: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} must be a tensor, got {type(value).__name__}")
        if (value.shape, value.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{where} must be {expected.dtype} of shape {list(expected.shape)}, got "
                f"{value.dtype} of shape {list(value.shape)}"
            )
    elif not _is_like(value, expected):
        raise ValueError(f"{where} must be like {expected!r}, got {str(value)[:80]!r}")
