"""Memory for attention that is used again.

Attention takes megabytes. On the CPU the C library gives freed blocks of this size back to the
kernel, and to be handed them anew, page by page, costs as much time as all the computing. So blocks
wait here for the next call instead. On other devices torch does the same by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_WAITING = 1 << 27
"""Bytes that may wait for their next use."""

ALIGNMENT = 64
"""Bytes at whose multiples pieces begin: a cache line, and the widest vector register."""

_waiting: dict[tuple[int, torch.dtype], list[Tensor]] = {}


class Workspace:
    """Uninitialised memory, handed out in pieces with names.

    A piece is a part of one block that is given back when the object dies, so whoever uses a piece
    has to hold on to the object.
    """

    def __init__(self, like: Tensor, numel: int, num_pieces: int) -> None:
        """Memory for `num_pieces` tensors of `numel` elements in all, of the type of `like`."""
        self._align = ALIGNMENT // like.element_size()
        self._pieces: dict[str, Tensor] = {}
        self._used = 0
        self._block = _borrow(like, numel + num_pieces * self._align)

    def take(self, name: str, *shape: int) -> Tensor:
        """The piece with this name, as a tensor of this shape, at most as large as the first."""
        if name not in self._pieces:
            begin, size = self._used, math.prod(shape)
            self._used += math.ceil(size / self._align) * self._align
            self._pieces[name] = self._block[begin : begin + size]
        return self._pieces[name][: math.prod(shape)].view(shape)

    def __del__(self) -> None:
        if self._block.device.type == "cpu":
            _give_back(self._block)


def release() -> None:
    """Free all memory that waits for its next use."""
    _waiting.clear()


def _borrow(like: Tensor, numel: int) -> Tensor:
    if like.device.type == "cpu":
        try:
            return _waiting[numel, like.dtype].pop()
        except (KeyError, IndexError):
            pass
    with torch.inference_mode(
        False
    ):  # what is made in inference mode could not be used in training
        return torch.empty(numel, dtype=like.dtype, device=like.device)


def _give_back(block: Tensor) -> None:
    # Copies, because other threads may give back at the same time.
    waiting = sum(b.nbytes for blocks in list(_waiting.values()) for b in list(blocks))
    if waiting + block.nbytes > MOST_WAITING:
        release()  # sizes change now and then; what is in use will come back
    if block.nbytes <= MOST_WAITING:
        _waiting.setdefault((block.numel(), block.dtype), []).append(block)
