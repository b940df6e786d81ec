"""Parameters that change their size while an optimiser trains them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer


def replace_parameter(
    module: nn.Module, name: str, change: Callable[[Tensor], Tensor], optimizer: Optimizer | None
) -> None:
    """Put `change` of a parameter in its place, in the module and in the optimiser.

    What the optimiser keeps for each row of the parameter is changed alike; what it keeps for a
    parameter without any number is dropped, except momentum.

    Args:
        module: that has the parameter.
        name: of the parameter.
        change: cuts off or adds rows of zeros, on any tensor of as many rows.
        optimizer: that trains it, if any.
    """
    old = module.get_parameter(name)
    new = nn.Parameter(change(old.detach()).clone(), requires_grad=old.requires_grad)
    setattr(module, name, new)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        # In the list itself, which LBFGS holds.
        group["params"][:] = [new if one is old else one for one in group["params"]]
    state = optimizer.state.pop(old, {})
    # Without dampening, momentum of zeros is as none; SGD's fused kernel wants all or none.
    if state and (old.numel() or list(state) == ["momentum_buffer"]):
        for key, value in state.items():
            is_tensor = isinstance(value, Tensor) and value.dim() == old.dim()
            # Adafactor's columns stay as they are; of a single row they would look like rows.
            if is_tensor and len(value) == len(old) and key != "col_var":
                state[key] = change(value)
        optimizer.state[new] = state
