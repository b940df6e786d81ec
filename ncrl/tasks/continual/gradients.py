"""Sums over samples of per-sample gradients and of their squares, exactly, for any model.

The gradient of a weight matrix by one sample is nearly always a product of two thin ones: that of
`nn.Linear` is an output gradient times an input. So the gradient by one sample is traced as a graph
of tensor operations, the last products are cut off, the rest is vectorised over samples, and the
sums follow from the factors: gradients as large as the model, one for every sample, are not built.
Only where a gradient is no such product is it built, for a chunk of samples at a time.

Shapes: N samples, B of them in a chunk, k inner width of a product.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

CHUNK = 512
"""Samples that are vectorised together, where memory allows."""

MOST_NUMBERS = 1 << 28
"""In the gradients and factors of a chunk: a gibibyte in single precision."""

WIDEST = 8
"""Largest k up to which factors are kept apart: it takes k (k + 1) / 2 products over the chunk."""

Parameters = dict[str, Tensor]

SampleLoss = Callable[[Callable[..., Tensor], Tensor], Tensor]
"""Called with the model and the inputs [1, ...] of one sample; returns a scalar."""


class Sums(NamedTuple):
    """Over samples; by name of the parameter, of its shape."""

    gradients: Parameters
    squares: Parameters


class SampleGradients:
    """The gradient of a loss by one sample, traced once, to be summed over any samples.

    Between calls the values of parameters and buffers may change, but nothing else about the model:
    neither its mode, training or evaluation, nor what requires a gradient.

    Args:
        model: not changed.
        loss: of one sample; has to call the model that it is given.
        sample: inputs of one sample, without batch dimension; their shape and type count.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, sample: Tensor) -> None:
        self._parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def flat_gradients(*arguments: Tensor) -> list[Tensor]:
            """Of all parameters, for arguments parameters and sample."""
            *values, sample = arguments

            def sample_loss(parameters: Parameters) -> Tensor:
                return loss(partial(_call, model, parameters), sample.unsqueeze(0))

            gradients = grad(sample_loss)(dict(zip(self._parameters, values, strict=True)))
            return [gradients[name] for name in self._parameters]

        with torch.no_grad():
            self._traced = make_fx(flat_gradients)(*self._parameters.values(), sample)
        self._plans = _cut(self._traced)
        parts = [part for plan in self._plans for part in plan.parts]
        per_sample = sum(math.prod(_shape(part.node)) for part in parts if part.batched)
        self._chunk = min(CHUNK, max(1, MOST_NUMBERS // max(1, per_sample)))
        _prepare(self._traced)

    @torch.no_grad()
    def sums(self, inputs: Tensor, *, chunk: int | None = None) -> Sums:
        """Sum gradients and their elementwise squares.

        Args:
            inputs: [N, ...].
            chunk: samples that are vectorised together; None for `CHUNK`, or as many as keep
                within `MOST_NUMBERS`.

        Returns:
            Sums for every parameter that requires a gradient.

        Raises:
            ValueError: if there are no samples.
        """
        if len(inputs) == 0:
            raise ValueError("gradients of no samples: inputs must hold at least one")
        plans = self._plans
        evaluate = vmap(
            self._traced,
            in_dims=(*[None] * len(self._parameters), 0),
            out_dims=[0 if part.batched else None for plan in plans for part in plan.parts],  # type: ignore[arg-type]
        )
        for plan in plans:
            plan.clear()
        for samples in torch.split(inputs, chunk or self._chunk):
            values = iter(evaluate(*self._parameters.values(), samples))
            for plan in plans:
                plan.add([next(values) for _ in plan.parts], len(samples))
        found = {name: plan.sums() for name, plan in zip(self._parameters, plans, strict=True)}
        return Sums(
            {name: total for name, (total, _) in found.items()},
            # Sums of products of factors can round to just below zero.
            {name: squares.clamp_min(0) for name, (_, squares) in found.items()},
        )


def _call(model: nn.Module, parameters: Parameters, *args: Any, **kwargs: Any) -> Tensor:
    output: Tensor = functional_call(model, parameters, args, kwargs)
    return output


# How the sums of one parameter's gradient come about


class _Part(NamedTuple):
    """A tensor that the graph computes for every sample, or one that is the same for all."""

    node: fx.Node
    batched: bool


_Pair = tuple[Tensor, Tensor]
"""The sum of a tensor over samples, and that of its elementwise square."""


class _Plan(ABC):
    """Sums of a tensor over samples, from parts of it."""

    parts: Sequence[_Part]

    @abstractmethod
    def add(self, values: Sequence[Tensor], batch: int) -> None:
        """Take the parts of `batch` more samples: [B, ...], or [...] if not batched."""

    @abstractmethod
    def sums(self) -> _Pair:
        """Over all samples so far."""

    @abstractmethod
    def clear(self) -> None:
        """Begin anew."""


class _Counted(_Plan):
    """Adds up what it finds in each chunk."""

    def __init__(self) -> None:
        self._sums: _Pair | None = None

    def add(self, values: Sequence[Tensor], batch: int) -> None:
        more = self.sums_of(values, batch)
        before = self._sums
        self._sums = more if before is None else (before[0] + more[0], before[1] + more[1])

    def sums(self) -> _Pair:
        assert self._sums is not None
        return self._sums

    def clear(self) -> None:
        self._sums = None

    @abstractmethod
    def sums_of(self, values: Sequence[Tensor], batch: int) -> _Pair:
        """Two tensors of one chunk, to be added up: where nothing else is said, its sums."""


class _Whole(_Counted):
    """The tensor as it is."""

    def __init__(self, part: _Part) -> None:
        super().__init__()
        self.parts = [part]

    def sums_of(self, values: Sequence[Tensor], batch: int) -> _Pair:
        (value,) = values
        if self.parts[0].batched:
            return value.sum(0), value.square().sum(0)
        return batch * value, batch * value.square()


class _Products(_Counted):
    """A sum of matrix products [..., rows, k] [..., k, columns]."""

    def __init__(self, pairs: Sequence[tuple[_Part, _Part]]) -> None:
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
        width = sum(_shape(left.node)[-1] for left in self.parts[::2])
        if not self.has_constant:
            return width <= WIDEST
        left, right = self.parts
        return width < (_shape(right.node)[-1] if left.batched else _shape(left.node)[-2])

    def sums_of(self, values: Sequence[Tensor], batch: int) -> _Pair:
        if not self.has_constant:
            return self._of_rank_one(values, batch)
        left, self._constant = self._constant_last(values)
        of_row = left.movedim(0, -2)  # [..., rows, B, k]
        return left.sum(0), of_row.mT @ of_row  # its Gram matrix: [..., rows, k, k]

    def sums(self) -> _Pair:
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

    def _of_rank_one(self, values: Sequence[Tensor], batch: int) -> _Pair:
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


class _Combined(_Plan):
    """A tensor whose every element is one element of other tensors, or zero: its sums are theirs,
    combined alike."""

    def __init__(self, plans: Sequence[_Plan], combine: Callable[..., Tensor]) -> None:
        self.parts = [part for plan in plans for part in plan.parts]
        self._plans, self._combine = plans, combine

    def add(self, values: Sequence[Tensor], batch: int) -> None:
        rest = iter(values)
        for plan in self._plans:
            plan.add([next(rest) for _ in plan.parts], batch)

    def sums(self) -> _Pair:
        totals, squares = zip(*(plan.sums() for plan in self._plans), strict=True)
        return self._combine(*totals), self._combine(*squares)

    def clear(self) -> None:
        for plan in self._plans:
            plan.clear()


# Cutting a graph


_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_TRANSPOSES = (_aten.t.default, _aten.transpose.int, _aten.permute.default)
_COPIES = (_aten.detach.default, _aten.alias.default, _aten.clone.default)
_REARRANGES = (
    *(*_TRANSPOSES, *_COPIES, _aten.slice.Tensor, _aten.slice_backward.default),
    *(_aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim),
)
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)


def _cut(traced: fx.GraphModule) -> list[_Plan]:
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

    def plan(self, node: fx.Node) -> _Plan:
        """The plan for the tensor that a node stands for."""
        if node not in self.batched:
            return _Whole(self._part(node))
        pairs = self.factors(node)
        if pairs:
            plan = _Products([(self._part(left), self._part(right)) for left, right in pairs])
            return plan if plan.is_worthwhile else _Whole(self._part(node))
        if node.target in _RESHAPES:
            inner = self.plan(_argument(node))
            return _Combined([inner], partial(torch.reshape, shape=_shape(node)))
        if node.target in _REARRANGES:
            rest = node.args[1:]
            inner = self.plan(_argument(node))
            return _Combined([inner], lambda sums: node.target(sums, *rest))  # type: ignore[operator]
        if node.target == _aten.cat.default:
            arguments: tuple[Any, ...] = node.args
            tensors, *dim = arguments
            return _Combined([self.plan(t) for t in tensors], lambda *sums: torch.cat(sums, *dim))
        if node.target == _aten.add.Tensor and not node.kwargs:
            first, second = node.args
            if not _overlap(_filled(first), _filled(second)):
                assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
                return _Combined([self.plan(first), self.plan(second)], torch.add)
        return _Whole(self._part(node))

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
        if node.target in _TRANSPOSES and len(_shape(node)) == 2:
            inner = self.factors(node.args[0])
            return inner and [(self._transposed(b), self._transposed(a)) for a, b in inner]
        if node.target == _aten.add.Tensor and not node.kwargs:
            first, second = (self.factors(argument) for argument in node.args)
            return first + second if first and second else None
        if node.target == _aten.slice.Tensor and len(_shape(node)) == 2:
            matrix, *where = node.args
            return self._sliced(self.factors(matrix), *where[:4])
        if node.target == operator.getitem:
            return self._piece(*node.args)
        return None

    def _piece(self, split: Any, index: Any) -> list[tuple[fx.Node, fx.Node]] | None:
        """Factors of one of the tensors into which a matrix is split."""
        if split.target != _aten.split_with_sizes.default or len(_shape(split.args[0])) != 2:
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
        shape = list(_shape(matrix))
        shape[dim] = len(range(shape[dim])[begin:end])
        return self._new(_aten.slice.Tensor, (matrix, dim, begin, end), shape)

    def _transposed(self, matrix: fx.Node) -> fx.Node:
        return self._new(_aten.t.default, (matrix,), _shape(matrix)[::-1])

    def _new(self, target: Any, args: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta[_SHAPE] = tuple(shape)
        if args[0] in self.batched:
            self.batched.add(node)
        return node

    def _part(self, node: fx.Node) -> _Part:
        return _Part(node, node in self.batched)


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


_SHAPE = "ncrl_shape"
"""Where nodes keep the shape of their tensor that the tracer has not made."""


def _shape(node: Any) -> tuple[int, ...]:
    if _SHAPE in node.meta:
        shape: tuple[int, ...] = node.meta[_SHAPE]
        return shape
    traced = node.meta.get("tensor_meta")
    return tuple(getattr(traced, "shape", ()))


# Making a graph fit for batches: a matrix that is the same for all samples is shared by them, where
# `vmap` would copy it for each, and a view does not rely on how one sample lies in memory.


def _prepare(traced: fx.GraphModule) -> None:
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
