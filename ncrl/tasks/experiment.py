"""What a task trains and measures, and what tasks need for it: random streams, reports."""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncrl import NeurocoderLinear
from ncrl.diagnostics import describe
from ncrl.tasks.results import count_parameters


class Experiment(ABC):
    """A network with its task: what one run trains and measures.

    It is constructed right after the random stream was seeded, so weights follow from the seed.
    """

    model: nn.Module
    num_updates: int
    """Updates of the whole run."""

    evaluate_every: int
    """Updates between evaluations; there is one at the end in any case."""

    data: str
    """Name of the data set; part of what makes a run another one."""

    readings: Mapping[str, Any] = {}
    """Decisions where the paper is silent, beyond those in the recipe; part of the identity."""

    optimizer: torch.optim.Optimizer | None = None
    """Of the model; `train` sets it, for experiments that replace parameters."""

    best: Mapping[str, str] = {}
    """Metrics whose best value over all evaluations is reported too: `max` or `min`."""

    @abstractmethod
    def loss(self, update: int) -> Tensor:
        """The task's loss on the batch of this update, a scalar with a gradient.

        Orthogonality and balance losses are added by `train`.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on data that is not trained on. The model is in eval mode, without gradient."""

    def after_update(self, update: int) -> None:  # noqa: B027 - most tasks need none
        """Called after the optimiser's step, with gradients still there."""

    def report(self) -> dict[str, Any]:
        """Details for the result row; called once, after training, in eval mode without gradient.
        Plain values only."""
        return {}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values beyond model, optimiser and random stream, to resume from."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - see `state`
        """Take over what `state` returned."""


def random_stream(seed: int, stream: str, index: int) -> torch.Generator:
    """A random stream on the CPU that follows from its arguments alone.

    torch's own seeding ignores all but 32 bits, which a plain combination would waste.
    """
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "little")
    (number,) = np.random.SeedSequence((seed, key, index)).generate_state(1)
    return torch.Generator().manual_seed(int(number))


def try_network(model: nn.Module, x: Tensor, said: str) -> Tensor:
    """What the model answers to inputs before it is trained, in eval mode without gradient.

    Raises:
        ValueError: if it does not take them; `said` is what they are.
    """
    with evaluating(model):
        try:
            answer: Tensor = model(x)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the network does not take {said}: {error}") from error
    return answer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient inside the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def describe_layers(
    model: nn.Module, *inputs: Tensor, counted: Tensor | None = None
) -> dict[str, dict[str, Any]]:
    """What the Neurocoder layers of a model do with a batch, by the layer's name.

    See `ncrl.diagnostics.LayerReport`; beside the largest attention weight stands the largest one
    that the layer's sharpness allows, and beside the layer's parameters those of `nn.Linear`.

    Args:
        model: called once.
        inputs: that it is called with.
        counted: which of a layer's inputs count, in the order in which they come, [T * B] bool for
            a model that calls its layers T times on B inputs; all if None.
    """
    seen: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NeurocoderLinear)}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    reports = {}
    for name, calls in seen.items():
        x = torch.cat(calls)
        if counted is not None:
            x = x[counted]
        layer = layers[name]
        report = describe(layer, x)._asdict()
        for values in ("slot_usage", "singular_values"):
            report[values] = [round(value, 4) for value in report[values].tolist()]
        report["parameters"] = count_parameters(layer)
        has_bias = layer.bias is not None
        report["parameters_of_plain"] = (layer.in_features + has_bias) * layer.out_features
        config = layer.config
        if config.preset == "paper" and not config.learned_sharpness:
            report["attention_bound"] = attention_bound(config.num_slots, config.sharpness)
        reports[name] = report
    return reports


def attention_bound(num_slots: int, sharpness: float) -> float:
    """The largest weight that a softmax over sharpened cosines can give to a slot."""
    return 1 / (1 + (num_slots - 1) * math.exp(-2 * sharpness))


def mutual_information(counts: Tensor) -> Tensor:
    """Information in bits that the row of a table of counts has about the column, [..., rows,
    columns] -> [...]; 0 where they are independent."""
    joint = counts.double() / counts.sum((-1, -2), keepdim=True)
    apart = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    bits = torch.where(joint > 0, joint * torch.log2(joint / apart), 0.0).sum((-1, -2))
    return bits.clamp_min(0)


def count_pairs(first: Tensor, second: Tensor) -> Tensor:
    """How often labels meet: integers from 0 on, [..., N] each, give counts [..., A, B]."""
    one, two = (torch.nn.functional.one_hot(labels).double() for labels in (first, second))
    return one.transpose(-1, -2) @ two
