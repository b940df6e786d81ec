"""Noticing that weights have changed, so that nothing computed from them outlives them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ncrl.neurocoder.tracing import is_watched


class Source:
    """What the weights of a module were when something was computed from them.

    Comparing the weights themselves notices every change, also those that leave no trace in a
    tensor's version: writes through `.data`, through numpy, or by another process. 100,000 weights
    take 20 microseconds.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = _tensors(module)
        self.layouts = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]
        # Views hold on to the storage, so that no other weight can appear at its address.
        self.views = [tensor.detach().numpy() for tensor in tensors]
        self.bytes = [view.tobytes() for view in self.views]

    def is_unchanged(self, module: nn.Module) -> bool:
        """Whether `module` has the same tensors in the same order, with the same values."""
        layouts = [(tensor.data_ptr(), tensor.stride()) for tensor in _tensors(module)]
        return self.layouts == layouts and all(
            view.tobytes() == kept for view, kept in zip(self.views, self.bytes, strict=True)
        )


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers (masks of pruned weights are such), at any depth."""
    return [
        tensor
        for part in module.modules()
        for owned in (part._parameters, part._buffers)
        for tensor in owned.values()
        if tensor is not None
    ]


def is_comparable(weight: Tensor) -> bool:
    """Whether a weight can be compared, and more cheaply than computed with: on the CPU."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and not is_watched()
    )
