"""`MoELinear`: a mixture of linear experts behind a noisy top-k gate, and its balance loss.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
ICLR 2017; equation numbers are that paper's. Shapes: E experts, k experts kept per input, B inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import LinearSeat, require_positive, reset_linear

NOISE_FLOOR = 1e-2
"""Least standard deviation of the gate's noise: without it the noise could be learned away."""

MEAN_FLOOR = 1e-10
"""Added to the squared mean in `cv_squared`, so that no inputs give no loss."""


class Gating(NamedTuple):
    """Which experts B inputs are given to, and what `balance_loss` needs to know about it."""

    weights: Tensor
    """Weights of the experts that are kept, [B, k], each row summing to 1."""

    indices: Tensor
    """Those experts, [B, k]."""

    logits: Tensor
    """x W_g, [B, E]."""

    noisy_logits: Tensor
    """What the experts were chosen by, [B, E]; equal to `logits` without noise."""

    noise_scale: Tensor | None
    """Standard deviation of the noise, [B, E]; None without noise."""

    def importance(self) -> Tensor:
        """Sum of each expert's weights over the inputs, [E] (Eq. 6)."""
        total = self.weights.new_zeros(self.logits.shape[1])
        return total.index_add(0, self.indices.flatten(), self.weights.flatten())

    def load(self) -> Tensor:
        """Expected number of inputs given to each expert, [E] (Eqs. 8 to 10).

        The expectation is over the noise of the expert itself, that of the others held fixed,
        which makes it smooth. Without noise it is the number counted, which has no gradient.
        """
        num_experts, top_k = self.logits.shape[1], self.weights.shape[1]
        chosen = torch.zeros_like(self.logits, dtype=torch.bool).scatter(1, self.indices, True)
        if self.noise_scale is None or top_k == num_experts:
            return chosen.to(self.logits.dtype).sum(0)
        top = self.noisy_logits.topk(top_k + 1, dim=1).values  # [B, k + 1]
        # The k-th largest among the others: one place further down for an expert that is chosen.
        threshold = torch.where(chosen, top[:, -1:], top[:, -2:-1])  # [B, E]
        chance: Tensor = torch.special.ndtr((self.logits - threshold) / self.noise_scale)  # [B, E]
        return chance.sum(0)


class NoisyTopKGate(nn.Module):
    """Softmax over the k largest of x W_g, with learned noise in training (Eqs. 3 to 5).

    Both matrices are zero at the start, where all experts are equally likely.

    Args:
        in_features: width of the input.
        num_experts: E.
        top_k: k.
        device: where the parameters are created.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        shape = num_experts, in_features
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))  # W_g^T
        self.noise_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))  # W_n^T
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x: Tensor) -> Gating:
        """x [B, in] -> the experts of each input.

        Always in the parameters' own precision: half precision would make ties of close experts.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            logits = noisy_logits = F.linear(x, self.weight)  # [B, E]
            noise_scale = None
            if self.training:
                noise_scale = F.softplus(F.linear(x, self.noise_weight)) + NOISE_FLOOR
                noisy_logits = logits + torch.randn_like(logits) * noise_scale
            kept, indices = noisy_logits.topk(self.top_k, dim=1)  # [B, k]
            return Gating(kept.softmax(1), indices, logits, noisy_logits, noise_scale)


class MoELinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = sum_e gate_e(x) E_e(x), with experts E_e that are Linear layers.

    Each expert computes only for the inputs that are given to it. A gate left alone soon gives
    everything to a few experts; the caller adds a loss against it:

        with record_gates(model) as gates:
            y = model(x)
        loss = task_loss(y) + 0.01 * balance_loss(gates)

    In training mode the gate is noisy, so that two forward passes differ; in eval mode it is not.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        num_experts: E; each has as many parameters as the linear layer that is replaced.
        top_k: k, experts that each input is given to. With 1 the weight is always 1, and the gate
            learns from the balance loss alone.
        bias: whether experts have a bias.
        device: where the parameters are created.
        dtype: type of the parameters.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size, naming it; k can be at most E.

    Example:
        >>> layer = MoELinear(512, 18, num_experts=10, top_k=2)
        >>> layer(torch.zeros(20, 16, 512)).shape
        torch.Size([20, 16, 18])
    """

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
        super().__init__(in_features, out_features)
        require_positive("num_experts", num_experts)
        require_positive("top_k", top_k)
        if top_k > num_experts:
            raise ValueError(
                f"top_k must lie in 1 .. num_experts, got top_k={top_k} with "
                f"num_experts={num_experts}"
            )
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = NoisyTopKGate(in_features, num_experts, top_k, device=device, dtype=dtype)
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype))
            if bias
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts as torch initialises a Linear; the gate zero."""
        self.gate.reset_parameters()
        reset_linear(self.weight, self.bias)

    # Never compiled, even inside compiled models: how many inputs an expert gets is data, and
    # compiled code would not see the hooks of `record_gates`. `torch.compiler.disable` would import
    # the compiler here and now, which every worker process would have to wait for.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _transform(self, x: Tensor) -> Tensor:
        gating: Gating = self.gate(x)
        pairs = gating.indices.flatten()  # [B * k], the expert of each (input, place)
        order = pairs.argsort()  # all pairs of expert 0, then of expert 1, ...
        counts = pairs.bincount(minlength=self.num_experts).tolist()
        inputs = order // self.top_k  # [B * k]

        # unbind, not weight[e]: its gradient is one stack instead of E tensors of all experts.
        weights = self.weight.unbind()
        biases = [None] * self.num_experts if self.bias is None else self.bias.unbind()
        parts = torch.split(x.index_select(0, inputs), counts)
        # Experts without inputs take part with none, so that they get a gradient, zero, as well.
        outputs = torch.cat(
            [F.linear(part, w, b) for part, w, b in zip(parts, weights, biases, strict=True)]
        )  # [B * k, out]
        weighted = gating.weights.flatten()[order].unsqueeze(1) * outputs
        y = weighted.new_zeros(len(x), self.out_features).index_add(0, inputs, weighted)
        return y.to(outputs.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, bias={self.bias is not None}"
        )


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, list[Gating]]]:
    """Keep what the gates in `model` decide inside the `with` block, noise and gradients included.

    Yields:
        By name of each `MoELinear` in `model`, its decisions, one per forward pass. The record
        belongs to the caller; nothing is kept in the model.
    """
    record: dict[str, list[Gating]] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, MoELinear):
            decisions = record[name] = []

            def keep(
                _gate: Any, _inputs: Any, gating: Gating, to: list[Gating] = decisions
            ) -> None:
                to.append(gating)

            handles.append(layer.gate.register_forward_hook(keep))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(gates: Mapping[str, list[Gating]]) -> Tensor:
    """CV^2(importance) + CV^2(load), summed over the layers of a `record_gates`, a scalar.

    Zero where every expert is equally used. Several forward passes of a layer count as one batch.
    The caller adds it: `loss = task_loss + 0.01 * balance_loss(gates)`, with the coefficient that
    the Neurocoder paper's baselines have for both terms (Eqs. 7 and 11).

    Raises:
        ValueError: if there are layers, but none was called while they were recorded.
    """
    if gates and not any(gates.values()):
        raise ValueError(
            f"no forward pass was recorded of {', '.join(map(repr, gates))}; call the model inside "
            "`with record_gates(model) as gates:`"
        )
    losses = [
        cv_squared(sum_of([g.importance() for g in layer]))
        + cv_squared(sum_of([g.load() for g in layer]))
        for layer in gates.values()
        if layer
    ]
    return sum_of(losses) if losses else torch.zeros(())


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return torch.stack(tensors).sum(0)


def cv_squared(amounts: Tensor) -> Tensor:
    """Squared coefficient of variation of amounts [E], a scalar: variance (over E) / mean^2."""
    return amounts.var(correction=0) / (amounts.mean().square() + MEAN_FLOOR)
