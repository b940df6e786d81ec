"""Multilayer perceptrons, and the linear classifier behind a fixed random projection.

B stands for inputs. Which layers are coded is counted from the output: `num_coded=2` means the
last two, None all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.baselines.lowrank import LowRankLinear
from ncrl.layers import make_layer
from ncrl.seat import require_positive

MOST_TASKS = 1000
"""Output layers of a `SplitMlp`."""


def dense_layers(
    widths: Sequence[int],
    *,
    num_coded: int | None = None,
    bias: bool = True,
    layer: str = "linear",
    layer_options: Mapping[str, Any] | None = None,
) -> nn.ModuleList:
    """Layers between consecutive widths, the last `num_coded` of them from the registry.

    Args:
        widths: of the input and of every layer's output.
        num_coded: layers that are coded, counted from the last; None for all. The others are
            `nn.Linear`.
        bias: whether layers have a bias; `layer_options` may decide otherwise for coded ones.
        layer: name in `ncrl.layers.LAYERS`.
        layer_options: its options.

    Raises:
        ValueError: for an impossible width or number of coded layers, or an unknown layer.
    """
    for width in widths:
        require_positive("a layer's width", width)
    total = len(widths) - 1
    if num_coded is None:
        num_coded = total
    if not 0 <= num_coded <= total:
        raise ValueError(f"num_coded must lie in 0 .. {total}, the number of layers: {num_coded}")
    options = {"bias": bias} | dict(layer_options or {})
    plain = total - num_coded
    return nn.ModuleList(
        make_layer(layer, *sizes, **options) if index >= plain else nn.Linear(*sizes, bias=bias)
        for index, sizes in enumerate(pairwise(widths))
    )


class Mlp(nn.Module):
    """ReLU layers and an output layer (paper, section 4.2: 3072-512-256-classes on CIFAR).

    The paper prints the size of its CIFAR network but not its widths, which its parameter count
    gives (Table 9). With no hidden layer this is the linear classifier of section 4.1.

    Args:
        in_features: numbers per input.
        hidden: widths of the hidden layers.
        num_outputs: logits.
        num_coded: coded layers, counted from the output; None for all.
        layer: name in `ncrl.layers.LAYERS`.
        layer_options: its options.

    Shapes: [B, ...] with `in_features` numbers each -> [B, num_outputs].

    Raises:
        ValueError: for an impossible size or an unknown layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_outputs: int,
        *,
        num_coded: int | None = None,
        layer: str = "linear",
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layers = dense_layers(
            [in_features, *hidden, num_outputs],
            num_coded=num_coded,
            layer=layer,
            layer_options=layer_options,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> logits [B, num_outputs]."""
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
        layer: name in `ncrl.layers.LAYERS`, of all layers.
        layer_options: its options.

    Shapes: [B, ...] with `in_features` numbers each -> [B, num_outputs].

    Raises:
        ValueError: for an impossible size or an unknown layer.
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
        layer: str = "linear",
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_positive("num_tasks", num_tasks)
        if num_tasks > MOST_TASKS:
            raise ValueError(f"num_tasks must be at most {MOST_TASKS}, got {num_tasks}")
        widths = [in_features, *hidden]
        self.context = context
        if context:
            layer_options = {**(layer_options or {}), "context_features": in_features}
        if hidden_rank is None:
            self.hidden = dense_layers(widths, bias=False, layer=layer, layer_options=layer_options)
        else:
            self.hidden = nn.ModuleList(
                LowRankLinear(*sizes, rank=hidden_rank, bias=False) for sizes in pairwise(widths)
            )
        self.heads = nn.ModuleList(
            dense_layers([widths[-1], num_outputs], layer=layer, layer_options=layer_options)[0]
            for _ in range(num_tasks)
        )

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        """[B, ...] -> logits [B, num_outputs] of the head of one task."""
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

    Args:
        in_features: pixels.
        num_features: width of the projection.
        num_outputs: logits.
        layer: name in `ncrl.layers.LAYERS`.
        layer_options: its options.

    Shapes: [B, ...] with `in_features` numbers each -> [B, num_outputs].

    Raises:
        ValueError: for an impossible size or an unknown layer.
    """

    projection: Tensor

    def __init__(
        self,
        in_features: int = 784,
        num_features: int = 200,
        num_outputs: int = 10,
        *,
        layer: str = "linear",
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_positive("in_features", in_features)
        require_positive("num_features", num_features)
        require_positive("num_outputs", num_outputs)
        projection = torch.randn(in_features, num_features) * in_features**-0.5
        self.register_buffer("projection", projection)  # [in, features]
        self.output = make_layer(layer, num_features, num_outputs, **dict(layer_options or {}))

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> logits [B, num_outputs]."""
        logits: Tensor = self.output(x.flatten(1) @ self.projection)
        return logits
