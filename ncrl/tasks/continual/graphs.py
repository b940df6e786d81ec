"""The graph of one sample's gradients: last products are cut off, the rest is made for batches."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ncrl.tasks.continual.summation import (
    SHAPE,
    Combined,
    Part,
    Products,
    Summation,
    Whole,
    shape_of,
)

_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_TRANSPOSES = (_aten.t.default, _aten.transpose.int, _aten.permute.default)
_COPIES = (_aten.detach.default, _aten.alias.default, _aten.clone.default)
_REARRANGES = (
    *(*_TRANSPOSES, *_COPIES, _aten.slice.Tensor, _aten.slice_backward.default),
    *(_aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim),
)
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)


def cut(traced: fx.GraphModule) -> list[Summation]:
    """Plans for the outputs of a traced function, whose outputs become the parts of the plans."""
    graph = traced.graph
    (output,) = graph.find_nodes(op="output")
    *_, sample = graph.find_nodes(op="placeholder")
    batched = {sample}
    for node in graph.nodes:
        if any(argument in batched for argument in node.all_input_nodes):
            batched.add(node)
    with graph.inserting_before(output):
        cutter = _Cutter(graph, batched)
        plans = [cutter.plan(node) for node in output.args[0]]
    output.args = ([part.node for plan in plans for part in plan.parts],)
    graph.eliminate_dead_code()
    traced.recompile()
    return plans


class _Cutter:
    """Looks from the result of a graph backwards for products."""

    def __init__(self, graph: fx.Graph, batched: set[fx.Node]) -> None:
        self.graph, self.batched = graph, batched

    def plan(self, node: fx.Node) -> Summation:
        """The plan for the tensor that a node stands for."""
        if node not in self.batched:
            return Whole(self._part(node))
        pairs = self.factors(node)
        if pairs:
            plan = Products([(self._part(left), self._part(right)) for left, right in pairs])
            return plan if plan.is_worthwhile else Whole(self._part(node))
        if node.target in _RESHAPES:
            inner = self.plan(_argument(node))
            return Combined([inner], partial(torch.reshape, shape=shape_of(node)))
        if node.target in _REARRANGES:
            rest = node.args[1:]
            inner = self.plan(_argument(node))
            return Combined([inner], lambda sums: node.target(sums, *rest))  # type: ignore[operator]
        if node.target == _aten.cat.default:
            arguments: tuple[Any, ...] = node.args
            tensors, *dim = arguments
            return Combined([self.plan(t) for t in tensors], lambda *sums: torch.cat(sums, *dim))
        if node.target == _aten.add.Tensor and not node.kwargs:
            first, second = node.args
            if not _overlap(_filled(first), _filled(second)):
                assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
                return Combined([self.plan(first), self.plan(second)], torch.add)
        return Whole(self._part(node))

    def factors(self, node: Any) -> list[tuple[fx.Node, fx.Node]] | None:
        """Pairs of nodes [..., rows, k], [..., k, columns] whose products sum up to a node; None
        where it is no product."""
        if not isinstance(node, fx.Node):
            return None
        if node.target in _PRODUCTS:
            left, right = node.args
            assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
            return [(left, right)]
        if node.target in _COPIES:
            return self.factors(node.args[0])
        if node.target in _TRANSPOSES and len(shape_of(node)) == 2:
            inner = self.factors(node.args[0])
            return inner and [(self._transposed(b), self._transposed(a)) for a, b in inner]
        if node.target == _aten.add.Tensor and not node.kwargs:
            first, second = (self.factors(argument) for argument in node.args)
            return first + second if first and second else None
        if node.target == _aten.slice.Tensor and len(shape_of(node)) == 2:
            matrix, *where = node.args
            return self._sliced(self.factors(matrix), *where[:4])
        if node.target == operator.getitem:
            return self._piece(*node.args)
        return None

    def _piece(self, split: Any, index: Any) -> list[tuple[fx.Node, fx.Node]] | None:
        """Factors of one of the tensors into which a matrix is split."""
        if split.target != _aten.split_with_sizes.default or len(shape_of(split.args[0])) != 2:
            return None
        matrix, sizes = split.args[:2]
        dim = split.args[2] if len(split.args) > 2 else 0
        begin = sum(sizes[:index])
        return self._sliced(self.factors(matrix), dim, begin, begin + sizes[index])

    def _sliced(
        self,
        pairs: list[tuple[fx.Node, fx.Node]] | None,
        dim: Any = 0,
        begin: Any = None,
        end: Any = None,
        step: Any = 1,
    ) -> list[tuple[fx.Node, fx.Node]] | None:
        """Factors of some rows or columns of a product."""
        if pairs is None or step != 1:
            return None
        if dim % 2 == 0:
            return [(self._cut_out(left, 0, begin, end), right) for left, right in pairs]
        return [(left, self._cut_out(right, 1, begin, end)) for left, right in pairs]

    def _cut_out(self, matrix: fx.Node, dim: int, begin: Any, end: Any) -> fx.Node:
        shape = list(shape_of(matrix))
        shape[dim] = len(range(shape[dim])[begin:end])
        return self._new(_aten.slice.Tensor, (matrix, dim, begin, end), shape)

    def _transposed(self, matrix: fx.Node) -> fx.Node:
        return self._new(_aten.t.default, (matrix,), shape_of(matrix)[::-1])

    def _new(self, target: Any, args: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta[SHAPE] = tuple(shape)
        if args[0] in self.batched:
            self.batched.add(node)
        return node

    def _part(self, node: fx.Node) -> Part:
        return Part(node, node in self.batched)


_Region = tuple[Any, list[range]]
"""An axis and its parts outside which a tensor is zero."""


def _filled(node: Any) -> _Region | None:
    """Where a node can be other than zero, if that is known."""
    if not isinstance(node, fx.Node):
        return None
    if node.target == _aten.slice_backward.default:
        arguments: tuple[Any, ...] = node.args
        _, sizes, dim, begin, end, step = arguments
        return (dim, [range(sizes[dim])[begin:end]]) if step == 1 else None
    if node.target == _aten.add.Tensor and not node.kwargs:
        first, second = map(_filled, node.args)
        if first and second and first[0] == second[0]:
            return first[0], first[1] + second[1]
    return None


def _overlap(first: _Region | None, second: _Region | None) -> bool:
    """Whether two tensors may differ from zero in the same place."""
    if not first or not second or first[0] != second[0]:
        return True
    return any(max(a.start, b.start) < min(a.stop, b.stop) for a in first[1] for b in second[1])


def _argument(node: fx.Node) -> fx.Node:
    (argument, *_) = node.args
    assert isinstance(argument, fx.Node)
    return argument


# Making a graph fit for batches: a matrix that is the same for all samples is shared by them, where
# `vmap` would copy it for each, and a view does not rely on how one sample lies in memory.


def prepare(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        if node.target in _PRODUCTS:
            node.target = _matmul
        elif node.target == _aten.addmm.default and not node.kwargs:
            node.target = _addmm
        elif node.target in _RESHAPES:
            node.target = torch.reshape
    traced.recompile()


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = _SharedMatmul.apply(left, right)  # type: ignore[no-untyped-call]
    return product


def _addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return bias + _matmul(left, right)


class _SharedMatmul(torch.autograd.Function):
    """A matrix product, or a batch of them, with a rule of its own under `vmap`."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Nothing is kept: nobody differentiates a gradient here."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any], left: Tensor, right: Tensor) -> Any:
        if in_dims[0] is None and in_dims[1] is not None:
            product, _ = _SharedMatmul.vmap(info, in_dims[::-1], right.mT, left.mT)
            return product.mT, 0
        left = left.movedim(in_dims[0], 0)
        if in_dims[1] is not None:
            return left @ right.movedim(in_dims[1], 0), 0
        # Samples become more rows: [B, ..., rows, k] as [..., B rows, k].
        rows = left.movedim(0, -3)
        product = rows.flatten(-3, -2) @ right
        return torch.unflatten(product, -2, rows.shape[-3:-1]).movedim(-3, 0), 0
