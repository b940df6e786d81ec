"""Sums over samples of per-sample gradients and of their squares, exactly, for any model.

The gradient of the weight of a product x W by one sample is x^T g, where g is the gradient of the
product. So the sums over samples are X^T G and (X^2)^T (G^2), and gradients as large as the model
are not built for every sample. Only what is not the weight of one such product is differentiated
sample by sample, with `vmap`.

Shapes: N samples, B of them in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CHUNK = 512  # samples that are differentiated together, where memory allows
# In the gradients that are built for a chunk: a gibibyte in single precision.
MOST_NUMBERS = 1 << 28
MATMULS = (torch.matmul, Tensor.matmul)

Parameters = dict[str, Tensor]

SampleLoss = Callable[[Callable[..., Tensor], Tensor], Tensor]
"""Called with the model and inputs [B, ...]; returns the sum of the samples' losses, each of which
follows from its own sample alone."""

Leaf = tuple[str, int]  # Name of a parameter, and which of the pieces that the model splits it into
Split = tuple[Any, int]  # sizes and dimension

Pair = tuple[Tensor, Tensor]  # the sum of a tensor over samples, and that of its elementwise square
ELSE = -1  # in place of a product's number: another use


class Sums(NamedTuple):
    """Over samples; by name of the parameter, of its shape."""

    gradients: Parameters
    squares: Parameters


class SampleGradients:
    """The gradients of a loss by every sample, to be summed.

    Between calls the values of parameters and buffers may change, but nothing else about the model:
    neither its mode, training or evaluation, nor what requires a gradient. The loss has to call the
    model that it is given; of `sample`, the inputs of one, shape and type count.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, sample: Tensor) -> None:
        self._model, self._loss = model, loss
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        two, three = (sample.expand(size, *sample.shape) for size in (2, 3))
        self._splits: dict[str, Split] = {}
        self._generated: set[int] = set()
        first, other = self._watch(two), self._watch(three)
        self._splits = first.splits
        # What follows from samples has an axis for them, and is no weight.
        self._generated = {
            index
            for index, pair in enumerate(zip(first.products, other.products, strict=True))
            if pair[0].weight.shape != pair[1].weight.shape
        }
        whole = self._watch(two)
        cut = {name for name in self._splits if not whole.reaches(self._parameters[name])}
        self._splits = {name: self._splits[name] for name in self._splits if name in cut}
        watch = self._watch(two)
        uses = _uses(watch, self._watch(three))
        self._product_of = {leaf: u[0] for leaf, u in uses.items() if len(u) == 1 and u[0] != ELSE}
        self._others = [leaf for leaf, u in uses.items() if u and leaf not in self._product_of]
        numbers = sum(watch.leaves[leaf].numel() for leaf in self._others)
        self._chunk = min(CHUNK, max(1, MOST_NUMBERS // max(1, numbers)))

    def sums(self, inputs: Tensor, *, chunk: int | None = None) -> Sums:
        """Sums for every parameter that requires a gradient, over inputs [N, ...], of which `chunk`
        are differentiated together; None for `CHUNK`, or as many as keep within `MOST_NUMBERS`."""
        if len(inputs) == 0:
            raise ValueError("gradients of no samples: inputs must hold at least one")
        totals = {
            leaf: (torch.zeros_like(tensor), torch.zeros_like(tensor))
            for leaf, tensor in self._leaves().items()
        }
        for samples in torch.split(inputs, chunk or self._chunk):
            found = self._of_weights(samples) | self._of_others(samples)
            for leaf, pair in found.items():
                for total, part in zip(totals[leaf], pair, strict=True):
                    total += part
        gradients, squares = ({leaf: pair[i] for leaf, pair in totals.items()} for i in range(2))
        return Sums(self._joined(gradients), self._joined(squares))

    def _leaves(self) -> dict[Leaf, Tensor]:
        """What gradients are taken by: parameters, or the pieces that the model splits them into,
        because the gradient of a piece would else be as large as the whole."""
        leaves: dict[Leaf, Tensor] = {}
        for name, parameter in self._parameters.items():
            if name in self._splits:
                pieces = torch.split(parameter.detach(), *self._splits[name])
                leaves |= {(name, i): p.requires_grad_() for i, p in enumerate(pieces)}
            else:
                leaves[name, 0] = parameter
        return leaves

    def _joined(self, values: Mapping[Leaf, Tensor]) -> Parameters:
        """Values of leaves as those of whole parameters."""
        pieces: dict[str, list[Tensor]] = {name: [] for name in self._parameters}
        for (name, _), value in values.items():
            pieces[name].append(value)
        return {
            name: torch.cat(parts, self._splits[name][1]) if name in self._splits else parts[0]
            for name, parts in pieces.items()
        }

    @torch.enable_grad()
    def _watch(self, samples: Tensor) -> _Watch:
        """A forward pass whose products are kept and have their weights cut off."""
        watch = _Watch(self._parameters, self._leaves(), cut=True, generated=self._generated)
        with watch:
            watch.loss = self._loss(self._model, samples)
        return watch

    def _of_weights(self, samples: Tensor) -> dict[Leaf, Pair]:
        """Sums for the leaves that are weights of products."""
        if not self._product_of:
            return {}
        watch = self._watch(samples)
        products = {index: watch.products[index] for index in self._product_of.values()}
        results = torch.autograd.grad(watch.loss, [product.y for product in products.values()])
        found = {}
        for (index, product), g in zip(products.items(), results, strict=True):
            x = product.x.detach().flatten(0, -2).mT
            g = g.flatten(0, -2) if product.weight.ndim == 2 else g
            of_weight = x @ g, x.square() @ g.square()
            for leaf in (leaf for leaf, own in self._product_of.items() if own == index):
                own = watch.leaves[leaf]
                total, squares = (_pull_back(product.weight, own, part) for part in of_weight)
                assert total is not None and squares is not None
                found[leaf] = total, squares
        return found

    @torch.no_grad()
    def _of_others(self, samples: Tensor) -> dict[Leaf, Pair]:
        """Sums for the other leaves, from a gradient for every sample."""
        if not self._others:
            return {}
        leaves = self._leaves()

        def sample_loss(others: dict[Leaf, Tensor], sample: Tensor) -> Tensor:
            whole = {n: t for (n, _), t in others.items() if n not in self._splits}

            def call(*args: Any, **kwargs: Any) -> Tensor:
                output: Tensor = functional_call(self._model, whole, args, kwargs)
                return output

            with _Watch(self._parameters, leaves | others, cut=False):
                return self._loss(call, sample.unsqueeze(0))

        others = {leaf: leaves[leaf].detach() for leaf in self._others}
        gradients = vmap(grad(sample_loss), in_dims=(None, 0))(others, samples)
        return {leaf: (g.sum(0), g.square().sum(0)) for leaf, g in gradients.items()}


class _Product(NamedTuple):
    """y = x W. W is cut off, so that no gradient reaches it through y, unless it depends on the
    samples."""

    x: Tensor
    weight: Tensor
    y: Tensor


class _Watch(TorchFunctionMode):
    """Hands out the pieces of split parameters in a forward pass, and if it is to cut weights off,
    keeps the products that they were in; those whose numbers are in `generated` keep theirs
    attached."""

    loss: Tensor

    def __init__(
        self,
        wholes: Mapping[str, Tensor],
        leaves: Mapping[Leaf, Tensor],
        *,
        cut: bool,
        generated: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.wholes, self.leaves, self.cut, self.generated = wholes, leaves, cut, generated
        self.products: list[_Product] = []
        self.splits: dict[str, Split] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.split:
            name = next((n for n, whole in self.wholes.items() if whole is args[0]), None)
            if name is not None:
                self.splits[name] = args[1], kwargs.get("dim", 0)
                pieces = tuple(leaf for (n, _), leaf in self.leaves.items() if n == name)
                return pieces if len(pieces) > 1 else func(*args, **kwargs)
        has_weight = len(args) > 1 and getattr(args[1], "requires_grad", False)
        if has_weight and self.cut and func is F.linear:
            y = self._product(args[0], args[1].T)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return y if bias is None else y + bias
        if has_weight and self.cut and func in MATMULS:
            return self._product(*args)
        if func in MATMULS and args[0].ndim == 2 and args[1].ndim == 3:
            # One matrix for all: `vmap` would copy a stack of them for every sample.
            flat = args[0] @ args[1].transpose(0, 1).flatten(1)
            return flat.unflatten(1, (args[1].shape[0], -1)).transpose(0, 1)
        return func(*args, **kwargs)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ (weight if len(self.products) in self.generated else weight.detach())
        if not y.requires_grad:
            y.requires_grad_()
        self.products.append(_Product(x, weight, y))
        return y.clone()  # which may be changed in place

    def reaches(self, tensor: Tensor) -> bool:
        """Whether the loss follows from a tensor, weights that are cut off included."""
        outputs = [self.loss, *(product.weight for product in self.products)]
        return any(_pull_back(out, tensor, torch.ones_like(out)) is not None for out in outputs)


def _pull_back(output: Tensor, tensor: Tensor, gradient: Tensor) -> Tensor | None:
    """The gradient by a tensor, from that by what may follow from it; None where it does not."""
    if not output.requires_grad:
        return None
    (found,) = torch.autograd.grad(output, [tensor], gradient, retain_graph=True, allow_unused=True)
    return found


def _uses(two: _Watch, three: _Watch) -> dict[Leaf, list[int]]:
    """By leaf, the numbers of the products of samples whose weights it is rearranged into; `ELSE`
    for every other use. The axis of samples is told from others by batches of two and three."""
    uses: dict[Leaf, list[int]] = {leaf: [] for leaf in two.leaves}
    for index, (one, other) in enumerate(zip(two.products, three.products, strict=True)):
        rows = one.x.shape[:-1].numel(), other.x.shape[:-1].numel()
        is_batch = rows == (2, 3) and (one.x.ndim == 2 or one.weight.ndim == 2)
        is_shared = index not in two.generated
        mark = torch.rand(one.weight.shape, generator=torch.Generator().manual_seed(0))
        mark = mark.to(one.weight)
        for leaf, tensor in two.leaves.items():
            pulled, squares = (_pull_back(one.weight, tensor, m) for m in (mark, mark.square()))
            if pulled is not None and squares is not None:
                # Of a rearrangement, and only of that, squares come back as squares.
                rearranged = torch.equal(pulled.square(), squares)
                uses[leaf].append(index if is_batch and is_shared and rearranged else ELSE)
    for leaf, tensor in two.leaves.items():
        if _pull_back(two.loss, tensor, torch.ones_like(two.loss)) is not None:
            uses[leaf].append(ELSE)
    return uses
