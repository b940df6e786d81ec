"""What a task trains and measures, and what tasks need for it: random streams, looks at layers."""

from __future__ import annotations

import contextlib
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncrl import NeurocoderConv2d, NeurocoderLinear
from ncrl.diagnostics import describe
from ncrl.seat import eval_mode
from ncrl.tasks.recipes import Recipe, build_network, count_parameters

EVALUATION_BATCH = 1000
EVALUATE_EVERY = 100  # updates, where sequences are learnt


class Experiment(ABC):
    """A network with its task: what one run trains and measures.

    It is constructed right after the random stream was seeded, so weights follow from the seed.
    """

    model: nn.Module

    num_updates: int  # updates of the whole run
    evaluate_every: int  # updates between evaluations; there is one at the end in any case
    data: str  # Name of the data set; part of what makes a run another one
    # Decisions where the paper is silent, beyond those in the recipe; part of the identity.
    readings: Mapping[str, Any] = {}
    # The model's optimiser; `train` sets it, for experiments that replace parameters.
    optimizer: torch.optim.Optimizer | None = None
    # Metrics whose best value over all evaluations is reported too: `max` or `min`.
    best: Mapping[str, str] = {}

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
        """Details for the result row, plain values; called once, after training, as `evaluate`."""
        return {}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values beyond model, optimiser and random stream, to resume from."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - see `state`
        """Take over what `state` returned."""


class SequenceLearning(Experiment):
    """A network that learns from new sequences in every update.

    Raises:
        ValueError: for a recipe of another network, or one without iterations.
    """

    network: str
    """The name that the recipe has to give."""

    def __init__(self, recipe: Recipe, seed: int, device: torch.device) -> None:
        if recipe.iterations is None:
            raise ValueError("the recipe does not say iterations; sequences know no epochs")
        if recipe.network != self.network:
            raise ValueError(f"the network must be {self.network!r}, got {recipe.network!r}")
        self.model = build_network(recipe).to(device)
        self.num_updates, self.batch_size = recipe.iterations, recipe.batch_size
        self.evaluate_every = EVALUATE_EVERY
        self.seed, self.device = seed, device


def random_stream(seed: int, stream: str, index: int) -> torch.Generator:
    """A random stream on the CPU that follows from its arguments alone.

    torch's own seeding ignores all but 32 bits, which a plain combination would waste.
    """
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "little")
    (number,) = np.random.SeedSequence((seed, key, index)).generate_state(1)
    return torch.Generator().manual_seed(int(number))


class Batches:
    """The batches of epochs that each go through samples, tensors of the same length, in a new
    random order. An epoch ends with a batch that is not full, or leaves its samples out."""

    def __init__(
        self, samples: Sequence[Tensor], size: int, seed: int, *, keep_last: bool = False
    ) -> None:
        self.samples, self.size, self.seed = samples, size, seed
        total = len(samples[0])
        self.per_epoch = math.ceil(total / size) if keep_last else total // size
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, index: int, epoch: int) -> list[Tensor]:
        """Part `index` of an epoch: [B, ...] of every tensor."""
        first = self.samples[0]
        if epoch != self._epoch:
            stream = random_stream(self.seed, "order", epoch)
            order = torch.randperm(len(first), generator=stream)
            self._epoch, self._order = epoch, order.to(first.device)
        chosen = self._order[index * self.size : (index + 1) * self.size]
        # Whole rows at a time, where indexing copies number by number.
        return [tensor.index_select(0, chosen) for tensor in self.samples]


def try_network(model: nn.Module, x: Tensor, said: str, num_classes: int) -> None:
    """Raise ValueError unless a network takes inputs, which are `said`, and tells classes apart."""
    with evaluating(model):
        try:
            size = model(x).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the network does not take {said}: {error}") from error
    if size < num_classes:
        raise ValueError(f"num_outputs must be at least {num_classes}, got {size}")


def logits_of(model: nn.Module, inputs: Tensor, *more: Any) -> Tensor:
    """What a classifier says of any number of inputs, a thousand at a time, [N, classes]."""
    return torch.cat([model(part, *more) for part in torch.split(inputs, EVALUATION_BATCH)])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient inside the block."""
    with eval_mode(model), torch.no_grad():
        yield


def layer_inputs(model: nn.Module, kinds: Any, *inputs: Any) -> dict[str, tuple[Any, Tensor]]:
    """The outermost layers of some kinds that a model calls, by name, each with what it reads in
    all its calls, [N, in_features], or the context or description of images; in eval mode without
    gradient."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(f"{n}.") for n in names.values()):
            names[module] = name
    seen: dict[nn.Module, list[Tensor]] = {}

    def keep(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        read = given[-1]  # the context, where there is one
        if isinstance(layer, NeurocoderConv2d) and len(given) == 1:
            read = layer.description(read)
        seen.setdefault(layer, []).append(read.reshape(-1, read.shape[-1]))

    with contextlib.ExitStack() as hooks, evaluating(model):
        for layer in names:
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        model(*inputs)
    return {names[layer]: (layer, torch.cat(calls)) for layer, calls in seen.items()}


def describe_layers(
    model: nn.Module, *inputs: Tensor, counted: Tensor | None = None
) -> dict[str, dict[str, Any]]:
    """What the Neurocoder layers of a model do with a batch, by the layer's name.

    See `ncrl.diagnostics.LayerReport`; beside the largest attention weight stands the largest one
    that the layer's sharpness allows, and beside the layer's parameters those of `nn.Linear`.
    `counted` says which of a layer's inputs count, in the order in which they come, [T * B] bool
    for a model that calls its layers T times on B inputs.
    """
    reports = {}
    for name, (layer, x) in layer_inputs(model, NeurocoderLinear, *inputs).items():
        report = describe(layer, x if counted is None else x[counted])._asdict()
        for values in ("slot_usage", "singular_values"):
            report[values] = [round(value, 4) for value in report[values].tolist()]
        report["parameters"] = count_parameters(layer)
        report["parameters_of_plain"] = (layer.in_features + layer.adds_bias) * layer.out_features
        config = layer.config
        is_softmax = config.preset == "paper" and len(layer.memory.groups()) == 1
        if is_softmax and not config.learned_sharpness:
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
