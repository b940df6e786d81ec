"""What all layers share: the seat of a linear layer.

`...` stands for any leading dimensions, B for their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ncrl.checks import require_choice, shown, whole_number

NORM_FLOOR = 1e-6
"""Smallest norm that a vector, such as a key or a query, is divided by."""


class NoWeight:
    """What stands where `nn.Linear` has its weight: using it raises.

    The fast paths of `nn.TransformerEncoder`, which would read the weights of linear layers in eval
    mode, ask first whether any of them has `__torch_function__`, and then call the layers.
    """

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any, **__: Any) -> NoReturn:
        cls._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # the protocols of copy, pickle and inspect
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise AttributeError(
            "this layer has no weight as nn.Linear has: it composes one for every input. Call the "
            "layer instead, or do not put it where the host computes with the weight itself"
        )


NO_WEIGHT = NoWeight()


class LinearSeat(nn.Module):
    """A layer that is called like `nn.Linear`; subclasses define `_transform`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        dtype: of the parameters, to be checked; None for torch's default.
        options: the layer's own, kept as attributes: sizes, and choices among `CHOICES`.

    Raises:
        ValueError: for an impossible size, type or choice, naming it.
    """

    CHOICES: ClassVar[Mapping[str, Collection[str]]] = {}

    in_features: int
    out_features: int
    bias: Any
    """None or False where there is none, which hosts may ask for; else a Parameter or True."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if dtype is not None and not getattr(dtype, "is_floating_point", False):
            raise ValueError(
                f"dtype must be a type of real floating-point numbers, got {shown(dtype)}; "
                "nearest: torch.float32"
            )
        self._options = tuple(options)
        options = {"in_features": in_features, "out_features": out_features, **options}
        for name, value in options.items():
            if name in self.CHOICES:
                require_choice(name, value, self.CHOICES[name])
            else:
                whole_number(name, value)
            setattr(self, name, value)

    @property
    def weight(self) -> NoWeight:
        """No matrix, also where the state_dict has one of this name: see `_stored_weight`."""
        return NO_WEIGHT

    def _store_weight(self, weight: Tensor) -> None:
        """Add a parameter that is called `weight` in the state_dict, but not as an attribute."""
        self._parameters["weight"] = nn.Parameter(weight)

    @property
    def _stored_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None:  # torch asks for every attribute when it traces
            raise AttributeError(f"{type(self).__name__} stores no weight of its own")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; ValueError if the last dimension is not `in_features`."""
        return self._transform(self._flatten(x)).reshape(*x.shape[:-1], self.out_features)

    def _transform(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        raise NotImplementedError

    def _flatten(self, x: Tensor) -> Tensor:
        return flatten(x, in_features=self.in_features)

    def extra_repr(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in self._options]
        bias = self.bias is not None and self.bias is not False
        return ", ".join([f"{self.in_features}, {self.out_features}", *options, f"bias={bias}"])


def flatten(x: Tensor, **width: int) -> Tensor:
    """[..., width] -> [B, width]; raises ValueError, which names the width, for another one."""
    ((name, expected),) = width.items()
    if x.dim() == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"expected an input whose last dimension is {name}={expected}, "
            f"got shape {list(x.shape)}"
        )
    return x.reshape(-1, expected)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the device of x, where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; then every part has the mode that it had, such as a frozen
    backbone in a model that is trained."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def has_hooks(module: nn.Module) -> bool:
    """Whether calls of the module set something off: hooks, weight norm, pruning."""
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def total(losses: list[Tensor]) -> Tensor:
    """Sum of scalars from any devices, on that of the first of them; 0 if there are none."""
    return torch.stack([loss.to(losses[0].device) for loss in losses] or [torch.zeros(())]).sum()


def reset_linear(weight: Tensor, bias: Tensor | None) -> None:
    """Initialise weight [..., out, in] and bias [..., out] as torch initialises a Linear."""
    bound = 1 / math.sqrt(weight.shape[-1])
    for tensor in (weight, bias):
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)
