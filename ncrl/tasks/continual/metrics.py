"""What an accuracy matrix says, and how large and how spread the composed weights are.

A[i, j] is the test accuracy on task j after training on tasks 0 to i; T tasks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncrl.baselines import NSMLinear
from ncrl.baselines.lowrank import LowRankLinear
from ncrl.diagnostics import participation_ratio, spread
from ncrl.neurocoder import NeurocoderLinear
from ncrl.seat import LinearSeat
from ncrl.tasks.experiment import layer_inputs

RANK_SAMPLES = 8  # inputs whose weights are composed in full, from everywhere in the batch


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

    rank: float | None
    """Participation ratio of their singular values: 1 for rank 1, at most min(in, out). None for
    layers that are no sum of stored matrices: HyperNet, FiLM, mixtures of experts."""
    attention: float | None  # largest attention weight; None for layers that do not attend


@torch.no_grad()
def describe_weights(model: nn.Module, *inputs: Tensor | int) -> dict[str, Weights]:
    """The layers that a model applies to a batch of inputs, by name.

    Composed weights are measured on a few inputs, attention on all.
    """
    found = layer_inputs(model, (nn.Linear, LinearSeat), *inputs)
    return {name: _describe(layer, x) for name, (layer, x) in found.items()}


def _describe(layer: Any, x: Tensor) -> Weights:
    if isinstance(layer, (nn.Linear, LowRankLinear)):
        matrix = layer.weight if isinstance(layer, nn.Linear) else layer.matrix()
        return Weights(float(participation_ratio(matrix)), None)
    if not isinstance(layer, (NSMLinear, NeurocoderLinear)):
        return Weights(None, None)
    rank = float(participation_ratio(layer.program(spread(x, RANK_SAMPLES))).mean())
    parts = [layer.attend(x)] if isinstance(layer, NSMLinear) else [*layer.attend(x)]
    return Weights(rank, max(float(weights.max()) for weights in parts))
