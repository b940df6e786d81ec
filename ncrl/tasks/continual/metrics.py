"""What an accuracy matrix says, and how large and how spread the composed weights are.

A[i, j] is the test accuracy on task j after training on tasks 0 to i; T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncrl.baselines import NSMLinear
from ncrl.baselines.lowrank import LowRankLinear
from ncrl.diagnostics import participation_ratio, spread
from ncrl.neurocoder import NeurocoderLinear

RANK_SAMPLES = 8
"""Inputs whose weights are composed in full, from everywhere in the batch."""


def final_accuracy(accuracy: Tensor) -> float:
    """Mean over all tasks after the last one."""
    return float(accuracy[-1].mean())


def learning_accuracy(accuracy: Tensor) -> float:
    """Mean over tasks, each right after training on it.

    Without it the final accuracy misleads: a network that cannot learn has nothing to forget.
    """
    return float(accuracy.diagonal().mean())


def forgetting(accuracy: Tensor) -> float:
    """Mean over all tasks but the last of how far each fell below the best that it had since it was
    learnt; 0 if there is one task. (Chaudhry et al. 2018 count what it had before as well.)"""
    if len(accuracy) == 1:
        return 0.0
    falls = [accuracy[j:-1, j].max() - accuracy[-1, j] for j in range(len(accuracy) - 1)]
    return float(torch.stack(falls).mean())


def backward_transfer(accuracy: Tensor) -> float:
    """Mean over all tasks but the last of the change since it was learnt (Lopez-Paz & Ranzato
    2017), negative where tasks are forgotten; 0 if there is one task."""
    changes = (accuracy[-1] - accuracy.diagonal())[:-1]
    return float(changes.mean()) if len(changes) else 0.0


class Weights(NamedTuple):
    """The weight matrices that one layer applies to inputs."""

    rank: float
    """Participation ratio of their singular values: 1 for rank 1, at most min(in, out)."""

    attention: float | None
    """Largest attention weight; None for layers that do not attend."""


@torch.no_grad()
def describe_weights(model: nn.Module, *inputs: Tensor | int) -> dict[str, Weights]:
    """The layers that a model applies to a batch of inputs, by name.

    Composed weights are measured on a few inputs, attention on all.
    """
    report: dict[str, Weights] = {}
    handles = [
        layer.register_forward_hook(_describer(name, report)) for name, layer in _layers(model)
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return report


LAYERS = (nn.Linear, LowRankLinear, NSMLinear, NeurocoderLinear)


def _layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost layers: not the networks inside of them."""
    for name, module in model.named_children():
        if isinstance(module, LAYERS):
            yield prefix + name, module
        else:
            yield from _layers(module, f"{prefix}{name}.")


def _describer(name: str, report: dict[str, Weights]) -> Any:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> None:
        report[name] = _describe(layer, given[-1])  # the context, where there is one

    return hook


def _describe(layer: nn.Module, x: Tensor) -> Weights:
    attention = None
    if isinstance(layer, NeurocoderLinear):
        matrices = layer.program(spread(x, RANK_SAMPLES))
        attention = max(float(weights.max()) for weights in layer.attend(x))
    elif isinstance(layer, NSMLinear):
        matrices = layer.program(spread(x, RANK_SAMPLES))
        attention = float(layer.attend(x).max())
    elif isinstance(layer, LowRankLinear):
        matrices = layer.matrix()
    else:
        assert isinstance(layer, nn.Linear)
        matrices = layer.weight
    return Weights(float(participation_ratio(matrices).mean()), attention)
