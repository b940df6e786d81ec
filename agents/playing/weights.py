"""Versioned weights in shared memory: one writer, any number of readers, no lock.

A reader never blocks the writer and takes nothing with it when it is killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

VERSIONS = 2  # copies kept: the writer fills one while readers copy the other


class SharedWeights:
    """Parameters and floating-point buffers of a module, published whole under a version number.

    Version v lies in copy v % 2. The writer announces v in `_started` before it touches that copy,
    and in `_version` when the copy is complete, so a reader that finds `_started` still below
    v + 2 after copying has read nothing of a later version.

    This takes a processor that shows stores in their order, as x86 does. Elsewhere a reader could
    get parts of two versions (not checked on ARM). V-trace would still correct what it plays, by
    the log-probabilities that it really had.
    """

    def __init__(self, module: nn.Module) -> None:
        self._copies = torch.zeros(VERSIONS, flatten(module).numel()).share_memory_()
        self._version = torch.full((1,), -1, dtype=torch.int64).share_memory_()
        self._started = torch.full((1,), -1, dtype=torch.int64).share_memory_()

    @property
    def version(self) -> int:
        """The newest complete version; -1 before the first."""
        return int(self._version.item())

    @staticmethod
    def bytes_for(module: nn.Module) -> int:
        """Size in bytes."""
        numbers = sum(tensor.numel() for tensor in _floats(module))
        return VERSIONS * numbers * torch.get_default_dtype().itemsize

    def publish(self, module: nn.Module, version: int) -> None:
        """Make the module's present weights version `version`, which must be the next one."""
        self._started.fill_(version)
        self._copies[version % VERSIONS].copy_(flatten(module))
        self._version.fill_(version)

    def read_into(self, module: nn.Module) -> int:
        """Copy the newest version into the module and return its number."""
        while True:
            version = self.version
            copy = self._copies[version % VERSIONS].clone()
            if int(self._started.item()) < version + VERSIONS:
                break
            time.sleep(0)  # overtaken twice while copying: there is a newer version to read
        fill(module, copy)
        return version


def flatten(module: nn.Module) -> Tensor:
    """All that is shared of a module in one vector; from another device, one copy is one wait."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in _floats(module)])


def fill(module: nn.Module, flat: Tensor) -> None:
    """Set what is shared of a module, in place, to what `flatten` made of another."""
    tensors = list(_floats(module))
    parts = flat.split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def layout(module: nn.Module) -> list[tuple[str, torch.Size | None]]:
    """Names and shapes of what is shared, and the kinds of all parts: equal where one module can
    have the weights of another. A compiled module counts as what it was made of."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    shapes = [(name.replace("_orig_mod.", ""), tensor.shape) for name, tensor in tensors]
    parts = [part for part in module.modules() if not hasattr(part, "_orig_mod")]
    return [*shapes, *((type(part).__qualname__, None) for part in parts)]


def _floats(module: nn.Module) -> Iterator[Tensor]:
    tensors = (*module.parameters(), *module.buffers())
    return (tensor for tensor in tensors if tensor.is_floating_point())
