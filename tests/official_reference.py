"""Slow, literal reading of the authors' published layer: the ground truth of its tests.

A companion of `tests.reference`, in the same manner: nothing of the library, a Python loop for
every sample, step, head and slot, tensors for their autograd, float64. It starts from a description
of the authors' code, not from the code. Parameters go by our names.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference import dot, lstm_cell, norm, orthogonal_norm_reference, sigmoid, softplus

EPSILON = 1e-6


class OfficialSizes(NamedTuple):
    """What a state_dict does not tell."""

    num_slots: int  # P
    key_dim: int  # K
    num_heads: int  # H
    num_steps: int  # J
    num_least_used: int  # l_I
    sharpness: float  # beta
    key_mode: str  # cb, lk
    lstm: bool  # False: the single step without LSTM
    add_bias: bool


Weights = list[Tensor]
"""Weights [P] of every component."""


def keys_reference(state: Mapping[str, Tensor], sizes: OfficialSizes) -> list[list[Tensor]]:
    """keys[t][p] [K] for t in (u, v, s)."""
    keys: list[list[Tensor]] = []
    for name in "uvs":
        rows = []
        for p in range(sizes.num_slots):
            if sizes.key_mode == "cb" and name != "s":
                weight = state[f"memory.key_net_{name}.weight"]
                bias = state[f"memory.key_net_{name}.bias"]
                content = state[f"memory.{name}"][p]
                rows.append(
                    torch.stack([dot(weight[k], content) + bias[k] for k in range(sizes.key_dim)])
                )
            else:
                rows.append(state[f"memory.key_columns.{name}"][p])
        keys.append(rows)
    return keys


def cosine_reference(query: Tensor, key: Tensor) -> Tensor:
    """Their cosine: the product of norms is summed over the K places that either was copied to."""
    denominator = query.new_zeros(())
    for _ in range(len(query)):
        denominator = denominator + (norm(query) + EPSILON) * (norm(key) + EPSILON)
    return dot(query, key) / (denominator + EPSILON)


def softmax_reference(logits: Sequence[Tensor]) -> list[Tensor]:
    scores = [torch.exp(logit) for logit in logits]
    total = sum(scores[1:], scores[0])
    return [score / total for score in scores]


def least_used_reference(usage: Sequence[Tensor], num_least_used: int) -> list[Tensor]:
    """1 - usage where that exceeds its (l_I + 1)-th largest value, else 0."""
    unused = [1 - m for m in usage]
    threshold = sorted((v.item() for v in unused), reverse=True)[num_least_used]
    return [v if v.item() > threshold else torch.zeros_like(v) for v in unused]


def single_step_weights(
    state: Mapping[str, Tensor], sizes: OfficialSizes, x: Tensor
) -> list[Weights]:
    """w^u, w^v, w^s for one sample x [in], each a list over heads."""
    keys = keys_reference(state, sizes)
    weights: list[Weights] = [[], [], []]
    for t, name in enumerate("uvs"):
        for h in range(sizes.num_heads):
            rows = slice(h * sizes.key_dim, (h + 1) * sizes.key_dim)
            weight = state[f"composition.query.{name}.weight"][rows]
            query = weight @ x + state[f"composition.query.{name}.bias"][rows]
            logits = [sizes.sharpness * cosine_reference(query, key) for key in keys[t]]
            weights[t].append(torch.stack(softmax_reference(logits)))
    return weights


def lstm_weights(
    state: Mapping[str, Tensor], sizes: OfficialSizes, x: Tensor
) -> tuple[list[Weights], Tensor]:
    """w^u, w^v, w^s for one sample x [in], each a list over n = (j-1)*H + h; the residual gate."""
    P, K, H, J, least_used, beta, *_ = sizes
    lstm = {
        name.removeprefix("composition.lstm."): value
        for name, value in state.items()
        if name.startswith("composition.lstm.")
    }
    keys = keys_reference(state, sizes)
    hidden, cell = lstm["h0"][0], lstm["c0"][0]
    one, zero = x.new_ones(()), x.new_zeros(())
    least = [[one if p < least_used else zero for p in range(P)] for _ in range(3)]
    usage = [[zero for _ in range(P)] for _ in range(3)]
    weights: list[Weights] = [[], [], []]
    for _ in range(J):
        hidden, cell = lstm_cell(lstm, x, hidden, cell)
        for t in range(3):
            for h in range(H):
                start = (t * H + h) * K
                query = hidden[start : start + K]
                logits = [10 * beta * cosine_reference(query, key) for key in keys[t]]
                w = softmax_reference(logits)
                if least_used > 0:
                    largest = max(w, key=Tensor.item)
                    for p in range(P):
                        row = t * P + p
                        gate = sigmoid(
                            dot(state["composition.gate.weight"][row], x)
                            + state["composition.gate.bias"][row]
                        )
                        w[p] = w[p] / largest * (1 - gate) + least[t][p] * gate
                weights[t].append(torch.stack(w))
            if least_used > 0:
                usage[t] = [
                    max([usage[t][p], *(w[p] for w in weights[t])], key=Tensor.item)
                    for p in range(P)
                ]
                least[t] = least_used_reference(usage[t], least_used)
    return weights, sigmoid(hidden[3 * H * K])


def official_reference(
    state: Mapping[str, Tensor], sizes: OfficialSizes, x: Tensor
) -> dict[str, Tensor]:
    """One official layer on a batch x [B, in], sample by sample, W built.

    Returns attention `u`, `v`, `s` [B, R, P], `sigma` [B, R], `program` [B, in, out] and
    `output` [B, out].
    """
    results: dict[str, list[Tensor]] = {
        name: [] for name in ("u", "v", "s", "sigma", "program", "output")
    }
    for b in range(len(x)):
        if sizes.lstm:
            weights, gate = lstm_weights(state, sizes, x[b])
        else:
            weights = single_step_weights(state, sizes, x[b])
            logit = dot(state["integration.gate.weight"][0], x[b])
            gate = sigmoid(logit + state["integration.gate.bias"][0])
        sums = []
        total = x.new_zeros(())
        for w in weights[2]:
            total = total + softplus(dot(w, state["memory.s"][:, 0]))
            sums.append(total)
        sigma = sums[::-1] if sizes.lstm else sums
        program = x.new_zeros(x.shape[1], state["memory.v"].shape[1])
        for n in range(len(sigma)):
            left = x.new_zeros(x.shape[1])
            right = x.new_zeros(program.shape[1])
            for p in range(sizes.num_slots):
                left = left + weights[0][n][p] * state["memory.u"][p]
                right = right + weights[1][n][p] * state["memory.v"][p]
            program = program + sigma[n] * torch.outer(left, right)
        if "integration.residual" in state:
            program = program + sums[0] * gate * state["integration.residual"]
        output = x[b] @ program
        if sizes.add_bias:
            output = output + state["bias"]
        for name, components in zip("uvs", weights, strict=True):
            results[name].append(torch.stack(components))
        results["sigma"].append(torch.stack(sigma))
        results["program"].append(program)
        results["output"].append(output)
    return {name: torch.stack(values) for name, values in results.items()}


def official_orthogonality_reference(state: Mapping[str, Tensor]) -> Tensor:
    """L_o of rows that begin with their key columns."""
    norms = []
    for name in "uv":
        rows = torch.cat([state[f"memory.key_columns.{name}"], state[f"memory.{name}"]], dim=1)
        norms.append(orthogonal_norm_reference(rows))
    return norms[0] + norms[1]
