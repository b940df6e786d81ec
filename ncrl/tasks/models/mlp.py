"""Coded layers, multilayer perceptrons, and the classifier behind a fixed random projection.

B stands for inputs. Which layers are coded is counted from the output: `num_coded=2` means the
last two, None all. Sizes are checked where recipes are read, not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.baselines.lowrank import LowRankLinear
from ncrl.layers import make_layer


class Coded(NamedTuple):
    """A kind of layer: its name in `ncrl.layers.LAYERS`, and its options."""

    layer: str = "linear"
    options: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, in_features: int, out_features: int, *, bias: bool = True) -> Any:
        """A layer that is called like `nn.Linear`; its options may decide otherwise on the bias.

        Raises:
            ValueError: for an unknown layer or option, or an impossible size.
        """
        return make_layer(self.layer, in_features, out_features, **{"bias": bias, **self.options})


PLAIN = Coded()


def dense_layers(
    widths: Sequence[int], coded: Coded, *, num_coded: int | None = None, bias: bool = True
) -> nn.ModuleList:
    """Layers between consecutive widths, the last `num_coded` of them coded."""
    total = len(widths) - 1
    if num_coded is None:
        num_coded = total
    if not 0 <= num_coded <= total:
        raise ValueError(f"num_coded must lie in 0 .. {total}, the number of layers: {num_coded}")
    kinds = [PLAIN] * (total - num_coded) + [coded] * num_coded
    return nn.ModuleList(
        kind(*sizes, bias=bias) for kind, sizes in zip(kinds, pairwise(widths), strict=True)
    )


class Mlp(nn.Module):
    """ReLU layers and an output layer (paper, section 4.2: 3072-512-256-classes on CIFAR).

    The paper prints the size of its CIFAR network but not its widths, which its parameter count
    gives (Table 9). With no hidden layer this is the linear classifier of section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_outputs: int,
        *,
        num_coded: int | None = None,
        coded: Coded = PLAIN,
    ) -> None:
        super().__init__()
        self.layers = dense_layers([in_features, *hidden, num_outputs], coded, num_coded=num_coded)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] with `in_features` numbers each -> logits [B, num_outputs]."""
        x = x.flatten(1)
        for dense in self.layers[:-1]:
            x = F.relu(dense(x))
        logits: Tensor = self.layers[-1](x)
        return logits


class SplitMlp(nn.Module):
    """Hidden layers shared by all tasks, and one output layer for each (paper, section 4.4).

    Follows the MLP of Hsu et al., "Re-evaluating Continual Learning Scenarios", 2018: hidden layers
    have no bias. One head serves every task of the domain-incremental scenario.

    Args:
        in_features: numbers per input; 1024 for MNIST padded to 32x32.
        hidden: widths of the hidden layers.
        num_outputs: logits of a head.
        num_tasks: heads; 1 if all tasks share one.
        hidden_rank: rank of the hidden layers' weights, which are then two factors and not coded,
            the control of the tables; None for layers of full rank.
        context: whether all layers, which are Neurocoder layers then, compose their programs from
            the network's input.
        coded: kind of all layers.

    Raises:
        ValueError: for a rank and a context.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_outputs: int,
        *,
        num_tasks: int = 1,
        hidden_rank: int | None = None,
        context: bool = False,
        coded: Coded = PLAIN,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.context = context
        if context:
            if hidden_rank is not None:
                raise ValueError(f"{hidden_rank=} makes static layers, which read no context")
            coded = coded._replace(options={**coded.options, "context_features": in_features})
        if hidden_rank is None:
            self.hidden = dense_layers(widths, coded, bias=False)
        else:
            self.hidden = nn.ModuleList(
                LowRankLinear(*sizes, rank=hidden_rank, bias=False) for sizes in pairwise(widths)
            )
        self.heads = nn.ModuleList(coded(widths[-1], num_outputs) for _ in range(num_tasks))

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """[B, ...] with `in_features` numbers each -> logits [B, num_outputs] of a task's head."""
        x = x.flatten(1)
        context = [x] if self.context else []
        for dense in self.hidden:
            x = F.relu(dense(x, *context))
        logits: Tensor = self.heads[task](x, *context)
        return logits


class ProjectedLinear(nn.Module):
    """One coded layer behind a fixed random projection (paper, section 4.1: 784 -> 200 -> 10).

    The projection is N(0, 1 / in_features), drawn at construction: a buffer, saved with the model
    but not trained and not counted.
    """

    projection: Tensor

    def __init__(
        self,
        in_features: int = 784,
        num_features: int = 200,
        num_outputs: int = 10,
        *,
        coded: Coded = PLAIN,
    ) -> None:
        super().__init__()
        projection = torch.randn(in_features, num_features) * in_features**-0.5
        self.register_buffer("projection", projection)  # [in, features]
        self.output = coded(num_features, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] with `in_features` numbers each -> logits [B, num_outputs]."""
        logits: Tensor = self.output(x.flatten(1) @ self.projection)
        return logits
