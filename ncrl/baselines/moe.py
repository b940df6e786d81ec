"""`MoELinear`: a mixture of linear experts behind a noisy top-k gate, and its balance loss.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
ICLR 2017; equation numbers are that paper's. Shapes: E experts, k experts kept per input, B inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import LinearSeat, reset_linear, total, without_autocast

NOISE_FLOOR = 1e-2
"""Least standard deviation of the gate's noise: without it the noise could be learned away."""

MEAN_FLOOR = 1e-10
"""Added to the squared mean in `cv_squared`, so that no inputs give no loss."""


class Gating(NamedTuple):
    """Which experts B inputs are given to, and what `balance_loss` needs to know about it."""

    weights: Tensor  # of the experts, [B, E], each row summing to 1; 0 but for k of them
    chosen: Tensor  # whether an expert is one of the k, [B, E] bool
    top_k: int
    logits: Tensor  # x W_g, [B, E]
    noisy_logits: Tensor  # what the experts were chosen by, [B, E]
    noise_scale: Tensor | None  # standard deviation of the noise, [B, E]; None without noise

    def importance(self) -> Tensor:
        """Sum of each expert's weights over the inputs, [E] (Eq. 6)."""
        return self.weights.sum(0)

    def load(self) -> Tensor:
        """Expected number of inputs given to each expert, [E] (Eqs. 8 to 10).

        The expectation is over the noise of the expert itself, that of the others held fixed,
        which makes it smooth. Without noise it is the number counted, which has no gradient.
        """
        if self.noise_scale is None or self.top_k == self.logits.shape[1]:
            return self.chosen.to(self.logits.dtype).sum(0)
        top = self.noisy_logits.topk(self.top_k + 1, dim=1).values  # [B, k + 1]
        # The k-th largest among the others: one place further down for an expert that is chosen.
        threshold = torch.where(self.chosen, top[:, -1:], top[:, -2:-1])  # [B, E]
        chance: Tensor = torch.special.ndtr((self.logits - threshold) / self.noise_scale)  # [B, E]
        return chance.sum(0)


class NoisyTopKGate(nn.Module):
    """Softmax over the k largest of x W_g, with learned noise in training (Eqs. 3 to 5).

    Both matrices are zero at the start, where all experts are equally likely.
    """

    records: tuple[list[Gating], ...] = ()
    """Where decisions are written while `record_gates` runs. An attribute, since compiled code
    looks at attributes, and not at hooks."""

    def __init__(self, in_features: int, num_experts: int, top_k: int, **place: Any) -> None:
        super().__init__()
        self.top_k = top_k
        shape = num_experts, in_features
        self.weight = nn.Parameter(torch.zeros(shape, **place))  # W_g^T
        self.noise_weight = nn.Parameter(torch.zeros(shape, **place))  # W_n^T

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor) -> Gating:
        """x [B, in] -> the experts of each input.

        Always in the parameters' own precision: half precision would make ties of close experts.
        """
        with without_autocast(x):
            x = x.to(self.weight.dtype)
            logits = noisy_logits = F.linear(x, self.weight)  # [B, E]
            noise_scale = None
            if self.training:
                noise_scale = F.softplus(F.linear(x, self.noise_weight)) + NOISE_FLOOR
                noisy_logits = logits + torch.randn_like(logits) * noise_scale
            chosen = first_largest(noisy_logits, self.top_k)
            weights = noisy_logits.masked_fill(~chosen, -math.inf).softmax(1)
            gating = Gating(weights, chosen, self.top_k, logits, noisy_logits, noise_scale)
        for record in self.records:
            record.append(gating)
        return gating


def first_largest(values: Tensor, k: int) -> Tensor:
    """Which entries of each row of values [B, E] are its k largest: [B, E] bool.

    Of equal ones the first are taken, whatever the device: at the start all logits of a gate are
    equal, and `topk` would take others on a GPU.
    """
    least = values.topk(k, dim=1).values[:, -1:]
    larger = values > least
    tied = values == least
    missing = k - larger.sum(1, keepdim=True)
    return larger | (tied & (tied.long().cumsum(1) <= missing))


class MoELinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = sum_e gate_e(x) E_e(x), with experts E_e that are Linear layers.

    All experts compute for all inputs, in one product, and the gate mixes k of the outputs: shapes
    then do not depend on data. A gate left alone soon gives everything to a few experts; the caller
    adds a loss against it:

        with record_gates(model) as gates:
            y = model(x)
        loss = task_loss(y) + 0.01 * balance_loss(gates)

    In training mode the gate is noisy, so that two forward passes differ; in eval mode it is not.
    Further arguments are those of `nn.Linear`.

    Args:
        num_experts: E; each has as many parameters as the linear layer that is replaced.
        top_k: k, experts that each input is given to. With 1 the weight is always 1, and the gate
            learns from the balance loss alone.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size, naming it; k can be at most E.
    """

    num_experts: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int = 10,
        top_k: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, dtype=dtype, num_experts=num_experts, top_k=top_k
        )
        if top_k > num_experts:
            raise ValueError(
                f"top_k must lie in 1 .. num_experts, got {top_k=} with {num_experts=}"
            )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = NoisyTopKGate(in_features, num_experts, top_k, **place)
        self._store_weight(torch.empty(num_experts, out_features, in_features, **place))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **place)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts as torch initialises a Linear; the gate zero."""
        self.gate.reset_parameters()
        reset_linear(self._stored_weight, self.bias)

    def _transform(self, x: Tensor) -> Tensor:
        gating: Gating = self.gate(x)
        # In one product: how many inputs an expert gets is data, on which no shape may depend.
        biases = None if self.bias is None else self.bias.flatten()
        outputs = F.linear(x, self._stored_weight.flatten(0, 1), biases)  # [B, E out]
        outputs = outputs.view(x.shape[0], self.num_experts, self.out_features)
        return torch.bmm(gating.weights.to(outputs.dtype).unsqueeze(1), outputs).squeeze(1)


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, list[Gating]]]:
    """Keep what the gates in `model` decide inside the `with` block, noise and gradients included.

    Yields, by name of each `MoELinear` in `model`, its decisions, one per forward pass.
    """
    gates = {name: part.gate for name, part in model.named_modules() if isinstance(part, MoELinear)}
    record: dict[str, list[Gating]] = {name: [] for name in gates}
    before = {name: gate.records for name, gate in gates.items()}
    for name, gate in gates.items():
        gate.records = (*before[name], record[name])
    try:
        yield record
    finally:
        for name, gate in gates.items():
            gate.records = before[name]


def balance_loss(gates: Mapping[str, list[Gating]]) -> Tensor:
    """CV^2(importance) + CV^2(load), summed over the layers of a `record_gates`, a scalar.

    Zero where every expert is equally used. Several forward passes of a layer count as one batch.
    The Neurocoder paper's baselines weigh both terms (Eqs. 7 and 11) with 0.01.

    Raises:
        ValueError: if there are layers, but none was called while they were recorded.
    """
    if gates and not any(gates.values()):
        raise ValueError(
            f"no forward pass was recorded of {', '.join(map(repr, gates))}; call the model inside "
            "`with record_gates(model) as gates:`"
        )
    losses = []
    for layer in filter(None, gates.values()):
        importance = torch.stack([gating.importance() for gating in layer]).sum(0)
        load = torch.stack([gating.load() for gating in layer]).sum(0)
        losses.append(cv_squared(importance) + cv_squared(load))
    return total(losses)


def cv_squared(amounts: Tensor) -> Tensor:
    """Squared coefficient of variation of amounts [E], a scalar: variance (over E) / mean^2."""
    return amounts.var(correction=0) / (amounts.mean().square() + MEAN_FLOOR)
