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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ncrl.tasks.continual.graphs import cut, prepare
from ncrl.tasks.continual.summation import shape_of

CHUNK = 512
"""Samples that are vectorised together, where memory allows."""

MOST_NUMBERS = 1 << 28
"""In the gradients and factors of a chunk: a gibibyte in single precision."""

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
        self._plans = cut(self._traced)
        parts = [part for plan in self._plans for part in plan.parts]
        per_sample = sum(math.prod(shape_of(part.node)) for part in parts if part.batched)
        self._chunk = min(CHUNK, max(1, MOST_NUMBERS // max(1, per_sample)))
        prepare(self._traced)

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
