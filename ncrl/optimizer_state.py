"""Whether the state of an optimiser fits its parameters, before any kernel writes into it.

torch takes over whatever a file holds. Its fused kernels then trust the shapes: a state that is too
small is written past its end.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ncrl.shell.tensors import check_like


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raise ValueError, saying what differs, unless `state`, read from a file, is what the
    optimiser itself would make, in names, shapes and types.

    A parameter that was never updated may lack a state. The optimiser may be on the `meta` device.
    """
    if not (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
    ):
        raise ValueError("the optimiser's state must hold 'state' and 'param_groups'")
    ours, theirs = (
        [group["params"] for group in groups]
        for groups in (optimizer.state_dict()["param_groups"], state["param_groups"])
    )
    if theirs != ours:
        raise ValueError(f"the optimiser's groups must hold parameters {ours}, got {theirs}")
    expected = _expected_state(optimizer)
    for index, entry in state["state"].items():
        if index not in range(len(expected)):
            raise ValueError(f"the optimiser has a state for {index!r}, which is no parameter")
        wanted = expected[index]
        if not entry or wanted is None:
            continue
        if set(entry) != set(wanted):
            raise ValueError(
                f"the optimiser's state of parameter {index} must hold "
                f"{', '.join(sorted(wanted))}, got {', '.join(sorted(map(str, entry)))}"
            )
        for name, tensor in wanted.items():
            if isinstance(tensor, Tensor):
                check_like(entry[name], tensor, f"the optimiser's {name!r} of parameter {index}")


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
