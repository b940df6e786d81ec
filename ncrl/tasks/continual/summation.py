"""How sums of a gradient over samples come about, from parts that a graph computes for each.

Shapes: B samples in a chunk, k inner width of a product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

WIDEST = 8
"""Largest k up to which factors are kept apart: it takes k (k + 1) / 2 products over the chunk."""

SHAPE = "ncrl_shape"
"""Where nodes keep the shape of their tensor that the tracer has not made."""


def shape_of(node: Any) -> tuple[int, ...]:
    if SHAPE in node.meta:
        shape: tuple[int, ...] = node.meta[SHAPE]
        return shape
    traced = node.meta.get("tensor_meta")
    return tuple(getattr(traced, "shape", ()))


class Part(NamedTuple):
    """A tensor that the graph computes for every sample, or one that is the same for all."""

    node: fx.Node
    batched: bool


Pair = tuple[Tensor, Tensor]
"""The sum of a tensor over samples, and that of its elementwise square."""


class Summation(ABC):
    """Sums of a tensor over samples, from parts of it."""

    parts: Sequence[Part]

    @abstractmethod
    def add(self, values: Sequence[Tensor], batch: int) -> None:
        """Take the parts of `batch` more samples: [B, ...], or [...] if not batched."""

    @abstractmethod
    def sums(self) -> Pair:
        """Over all samples so far."""

    @abstractmethod
    def clear(self) -> None:
        """Begin anew."""


class Counted(Summation):
    """Adds up what it finds in each chunk."""

    def __init__(self) -> None:
        self._sums: Pair | None = None

    def add(self, values: Sequence[Tensor], batch: int) -> None:
        more = self.sums_of(values, batch)
        before = self._sums
        self._sums = more if before is None else (before[0] + more[0], before[1] + more[1])

    def sums(self) -> Pair:
        assert self._sums is not None
        return self._sums

    def clear(self) -> None:
        self._sums = None

    @abstractmethod
    def sums_of(self, values: Sequence[Tensor], batch: int) -> Pair:
        """Two tensors of one chunk, to be added up: where nothing else is said, its sums."""


class Whole(Counted):
    """The tensor as it is."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.parts = [part]

    def sums_of(self, values: Sequence[Tensor], batch: int) -> Pair:
        (value,) = values
        if self.parts[0].batched:
            return value.sum(0), value.square().sum(0)
        return batch * value, batch * value.square()


class Products(Counted):
    """A sum of matrix products [..., rows, k] [..., k, columns]."""

    def __init__(self, pairs: Sequence[tuple[Part, Part]]) -> None:
        super().__init__()
        self.parts = [part for pair in pairs for part in pair]
        self._constant = torch.empty(0)  # the factor that is the same for all samples

    @property
    def has_constant(self) -> bool:
        """Whether it is one product, with a factor that is the same for all samples."""
        return len(self.parts) == 2 and not all(part.batched for part in self.parts)

    @property
    def is_worthwhile(self) -> bool:
        """Whether factors are cheaper than the tensor itself."""
        width = sum(shape_of(left.node)[-1] for left in self.parts[::2])
        if not self.has_constant:
            return width <= WIDEST
        left, right = self.parts
        return width < (shape_of(right.node)[-1] if left.batched else shape_of(left.node)[-2])

    def sums_of(self, values: Sequence[Tensor], batch: int) -> Pair:
        if not self.has_constant:
            return self._of_rank_one(values, batch)
        left, self._constant = self._constant_last(values)
        of_row = left.movedim(0, -2)  # [..., rows, B, k]
        return left.sum(0), of_row.mT @ of_row  # its Gram matrix: [..., rows, k, k]

    def sums(self) -> Pair:
        totals = super().sums()
        if not self.has_constant:
            return totals
        # What meets the constant factor is added up first: the products are as large as the tensor.
        (left, gram), right = totals, self._constant  # [..., rows, k], ..., [..., k, columns]
        of_row = right.unsqueeze(-3)  # [..., 1, k, columns]
        total, squares = left @ right, ((gram @ of_row) * of_row).sum(-2)
        return (total, squares) if self.parts[0].batched else (total.mT, squares.mT)

    def _constant_last(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The factors [B, ..., rows, k] and [..., k, columns], transposed if need be."""
        left, right = values
        return (left, right) if self.parts[0].batched else (right.mT, left.mT)

    def _of_rank_one(self, values: Sequence[Tensor], batch: int) -> Pair:
        """From all columns of left factors and all rows of right ones."""
        expanded = [
            value if part.batched else value.expand(batch, *value.shape)
            for value, part in zip(values, self.parts, strict=True)
        ]
        lefts = [column for left in expanded[::2] for column in left.unbind(-1)]  # [B, ..., rows]
        rights = [row for right in expanded[1::2] for row in right.unbind(-2)]  # [B, ..., columns]
        terms = list(zip(lefts, rights, strict=True))
        total = sum(_outer_sum(left, right) for left, right in terms)
        squares = sum(_outer_sum(left.square(), right.square()) for left, right in terms)
        for (a, b), (c, d) in combinations(terms, 2):
            squares = squares + 2 * _outer_sum(a * c, b * d)
        assert isinstance(total, Tensor) and isinstance(squares, Tensor)
        return total, squares


def _outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Sum over samples of outer products: [B, ..., rows] and [B, ..., columns] give
    [..., rows, columns]."""
    return left.movedim(0, -1) @ right.movedim(0, -2)


class Combined(Summation):
    """A tensor whose every element is one element of other tensors, or zero: its sums are theirs,
    combined alike."""

    def __init__(self, plans: Sequence[Summation], combine: Callable[..., Tensor]) -> None:
        self.parts = [part for plan in plans for part in plan.parts]
        self._plans, self._combine = plans, combine

    def add(self, values: Sequence[Tensor], batch: int) -> None:
        rest = iter(values)
        for plan in self._plans:
            plan.add([next(rest) for _ in plan.parts], batch)

    def sums(self) -> Pair:
        totals, squares = zip(*(plan.sums() for plan in self._plans), strict=True)
        return self._combine(*totals), self._combine(*squares)

    def clear(self) -> None:
        for plan in self._plans:
            plan.clear()
