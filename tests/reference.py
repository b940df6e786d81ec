"""Slow, literal readings of the equations: the ground truth of the tests.

Nothing here imports the library. Every sum over steps, heads, slots, components or time is a Python
loop, so that a reader can lay it beside the paper. Tensors are used for their autograd: a gradient
through these loops is the ground truth of a gradient, too. Meant for float64.

Sources: Le & Venkatesh, "Neurocoder", ICML 2022 (Eq. 1 to 7); Espeholt et al., "IMPALA", ICML 2018
(V-trace); Schulman et al., "High-dimensional continuous control using GAE", ICLR 2016.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NORM_FLOOR = 1e-6
"""A query or a key shorter than this is divided by this instead of by its length."""


class Sizes(NamedTuple):
    """What a state_dict alone does not tell.

    It does tell the other options: a learned sharpness, a linear controller and a residual in two
    factors have parameters of their own.
    """

    num_slots: int  # P
    key_dim: int  # K
    num_heads: int  # H
    num_steps: int  # J
    num_least_used: int  # l_I
    sharpness: float  # beta, where it is not learned
    gate: str = "slot-head"  # one gate per slot and head; or per slot, or per head
    detach_usage: bool = False


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), also where e^x overflows."""
    return torch.logaddexp(x, torch.zeros_like(x))


def dot(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(())
    for i in range(len(a)):
        total = total + a[i] * b[i]
    return total


def norm(a: Tensor) -> Tensor:
    return torch.sqrt(dot(a, a))


def cosine(q: Tensor, k: Tensor) -> Tensor:
    """<q, k> of the two vectors brought to unit length."""
    return dot(q, k) / (norm(q).clamp(min=NORM_FLOOR) * norm(k).clamp(min=NORM_FLOOR))


def lstm_cell(
    weights: Mapping[str, Tensor], x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """One LSTM step for one sample, x [in], hidden and cell [h]; torch's gate order i, f, g, o."""
    h = len(hidden)
    gates: dict[str, Tensor] = {}
    for index, name in enumerate("ifgo"):
        rows = slice(index * h, (index + 1) * h)
        gates[name] = (
            weights["weight_ih"][rows] @ x
            + weights["bias_ih"][rows]
            + weights["weight_hh"][rows] @ hidden
            + weights["bias_hh"][rows]
        )
    i, f, o = sigmoid(gates["i"]), sigmoid(gates["f"]), sigmoid(gates["o"])
    g = torch.tanh(gates["g"])
    cell = f * cell + i * g
    return o * torch.tanh(cell), cell


def lstm_over_time_reference(
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    episode_start: Tensor,
    hidden: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM over time whose state is zeroed where an episode starts.

    inputs [T, B, in], episode_start [T, B] (nonzero: row t is the first of an episode, so the
    state that row t receives is zero), hidden and cell [B, h]. Returns outputs [T, B, h] and the
    last state.
    `weights` carries `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`, without torch's suffix `_l0`.
    """
    num_times, batch = inputs.shape[:2]
    outputs = []
    states = [(hidden[b], cell[b]) for b in range(batch)]
    for t in range(num_times):
        for b in range(batch):
            keep = 0.0 if bool(episode_start[t, b]) else 1.0
            states[b] = lstm_cell(weights, inputs[t, b], keep * states[b][0], keep * states[b][1])
        outputs.append(torch.stack([state[0] for state in states]))
    last_hidden = torch.stack([state[0] for state in states])
    last_cell = torch.stack([state[1] for state in states])
    return torch.stack(outputs), last_hidden, last_cell


def keys_reference(state: Mapping[str, Tensor], sizes: Sizes) -> list[list[Tensor]]:
    """keys[t][p] [K] for t in (u, v, s), not yet of unit length.

    The key network reads the memories without sending a gradient to them.
    """
    P, K = sizes.num_slots, sizes.key_dim
    keys: list[list[Tensor]] = [[], [], []]
    for p in range(P):
        row = torch.cat([state[f"memory.{name}"][p] for name in "uvs"]).detach()
        output = state["memory.key_net.weight"] @ row + state["memory.key_net.bias"]  # [3K]
        for t in range(3):
            keys[t].append(output[t * K : (t + 1) * K])
    return keys


def content_reference(
    query: Tensor, keys: Sequence[Tensor], sharpness: float | Tensor
) -> list[Tensor]:
    """Eq. 5: softmax over slots of sharpness * cosine."""
    scores = [torch.exp(sharpness * cosine(query, key)) for key in keys]
    total = sum(scores[1:], scores[0])
    return [score / total for score in scores]


def least_used_reference(usage: Sequence[Tensor], num_least_used: int) -> list[Tensor]:
    """Eq. 6: max usage minus own usage on the slots up to the l_I-th smallest usage, else 0.

    Ties at the threshold are all selected.
    """
    threshold = sorted(m.item() for m in usage)[num_least_used - 1]
    most = max(usage, key=Tensor.item)  # the first of several
    return [most - m if m.item() <= threshold else torch.zeros_like(m) for m in usage]


def controller_reference(state: Mapping[str, Tensor], sizes: Sizes, x: Tensor) -> list[Tensor]:
    """State [h] of the controller at each step for one sample x [in], which it reads each time."""
    if "composition.linear.weight" in state:
        assert sizes.num_steps == 1
        return [state["composition.linear.weight"] @ x + state["composition.linear.bias"]]
    lstm = {
        name.removeprefix("composition.lstm."): value
        for name, value in state.items()
        if name.startswith("composition.lstm.")
    }
    hidden = cell = x.new_zeros(lstm["weight_hh"].shape[1])
    states = []
    for _j in range(sizes.num_steps):
        hidden, cell = lstm_cell(lstm, x, hidden, cell)
        states.append(hidden)
    return states


def query_reference(control: Tensor, sizes: Sizes, t: int, h: int) -> Tensor:
    """Query [K] of head h for memory t, in what the head network says, `control`.

    For each memory and head it says a query, then the gates of that head. Gates that the heads of
    a memory share come after the queries of all of them.
    """
    P, K, H, _, least_used, *_ = sizes
    per_head = K + gates_per_head(sizes)
    per_memory = H * per_head + (P if least_used > 0 and sizes.gate == "slot" else 0)
    start = t * per_memory + h * per_head
    return control[start : start + K]


def gates_per_head(sizes: Sizes) -> int:
    if sizes.num_least_used == 0:
        return 0
    return {"slot-head": sizes.num_slots, "slot": 0, "head": 1}[sizes.gate]


def gate_reference(control: Tensor, sizes: Sizes, t: int, h: int, p: int) -> Tensor:
    """Gate of slot p for head h of memory t, before the sigmoid."""
    P, K, H, *_ = sizes
    if sizes.gate == "slot":
        return control[t * (H * K + P) + H * K + p]
    if sizes.gate == "head":
        return control[(t * H + h) * (K + 1) + K]
    return control[(t * H + h) * (K + P) + K + p]


def attention_reference(
    state: Mapping[str, Tensor], sizes: Sizes, x: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """w^u, w^v, w^s for one sample x [in]: each a list over n = (j-1)*H + h of [P]."""
    P, _, H, _, least_used, sharpness, *_ = sizes
    beta: float | Tensor = sharpness
    if "composition.log_sharpness" in state:
        beta = torch.exp(state["composition.log_sharpness"])
    keys = keys_reference(state, sizes)
    # usage[t][h][p]: the largest weight that head h has put on slot p in earlier steps
    usage = [[[x.new_zeros(()) for _ in range(P)] for _ in range(H)] for _ in range(3)]
    weights: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for hidden in controller_reference(state, sizes, x):
        control = state["composition.head.weight"] @ hidden + state["composition.head.bias"]
        for t in range(3):
            for h in range(H):
                content = content_reference(query_reference(control, sizes, t, h), keys[t], beta)
                if least_used == 0:
                    weights[t].append(torch.stack(content))
                    continue
                seen = [m.detach() if sizes.detach_usage else m for m in usage[t][h]]
                least = least_used_reference(seen, least_used)
                w = []
                for p in range(P):
                    gate = sigmoid(gate_reference(control, sizes, t, h, p))
                    w.append(gate * content[p] + (1 - gate) * least[p])
                for p in range(P):  # of equal ones the later
                    usage[t][h][p] = w[p] if w[p] >= usage[t][h][p] else usage[t][h][p]
                weights[t].append(torch.stack(w))
    return weights


def residual_reference(state: Mapping[str, Tensor]) -> Tensor | None:
    """Rho [in, out], stored whole or in two factors; None without one."""
    if "integration.left" not in state:
        return state.get("integration.residual")
    left, right = state["integration.left"], state["integration.right"]
    rho = left.new_zeros(left.shape[0], right.shape[1])
    for r in range(len(right)):
        rho = rho + left[:, r, None] * right[None, r]
    return rho


def program_reference(
    state: Mapping[str, Tensor],
    sizes: Sizes,
    x: Tensor,
    weights: tuple[list[Tensor], list[Tensor], list[Tensor]],
) -> tuple[Tensor, Tensor]:
    """sigma [R] and the working program W [in, out] of one sample x [in] (Eq. 1, 3, 4, 7)."""
    memory_u, memory_v, memory_s = (state[f"memory.{name}"] for name in "uvs")
    R = sizes.num_steps * sizes.num_heads
    w_u, w_v, w_s = weights
    s = []
    for n in range(R):
        mixed = x.new_zeros(())
        for p in range(sizes.num_slots):
            mixed = mixed + w_s[n][p] * memory_s[p, 0]
        s.append(softplus(mixed))
    sigma = []
    for n in range(R):
        total = x.new_zeros(())
        for k in range(n, R):
            total = total + s[k]
        sigma.append(total)
    program = x.new_zeros(memory_u.shape[1], memory_v.shape[1])
    for n in range(R):
        u = x.new_zeros(memory_u.shape[1])
        v = x.new_zeros(memory_v.shape[1])
        for p in range(sizes.num_slots):
            u = u + w_u[n][p] * memory_u[p]
            v = v + w_v[n][p] * memory_v[p]
        program = program + sigma[n] * u[:, None] * v[None, :]
    residual = residual_reference(state)
    if residual is not None:
        if "integration.gate.bias" in state:
            gate_weight, gate_bias = (state[f"integration.gate.{n}"] for n in ("weight", "bias"))
            residual = sigmoid(dot(gate_weight[0], x) + gate_bias[0]) * sigma[R - 1] * residual
        program = program + residual
    return torch.stack(sigma), program


def neurocoder_reference(state: Mapping[str, Tensor], sizes: Sizes, x: Tensor) -> dict[str, Tensor]:
    """One Neurocoder layer on a batch x [B, in], sample by sample, W built.

    Returns attention `u`, `v`, `s` [B, R, P], `sigma` [B, R], `program` [B, in, out] and
    `output` [B, out].
    """
    results: dict[str, list[Tensor]] = {
        name: [] for name in ("u", "v", "s", "sigma", "program", "output")
    }
    for b in range(len(x)):
        weights = attention_reference(state, sizes, x[b])
        sigma, program = program_reference(state, sizes, x[b], weights)
        output = x[b] @ program
        if "bias" in state:
            output = output + state["bias"]
        for name, w in zip("uvs", weights, strict=True):
            results[name].append(torch.stack(w))
        results["sigma"].append(sigma)
        results["program"].append(program)
        results["output"].append(output)
    return {name: torch.stack(values) for name, values in results.items()}


def orthogonal_square_reference(memory: Tensor) -> Tensor:
    """|M M^T - I|_F^2, entry by entry, of one memory [P, d]."""
    total = memory.new_zeros(())
    for a in range(len(memory)):
        for b in range(len(memory)):
            entry = dot(memory[a], memory[b]) - (1.0 if a == b else 0.0)
            total = total + entry * entry
    return total


def orthogonal_norm_reference(memory: Tensor) -> Tensor:
    """|M M^T - I|_F of one memory [P, d]."""
    return torch.sqrt(orthogonal_square_reference(memory))


def orthogonal_loss_reference(
    layers: Iterable[tuple[Tensor, Tensor]], *, squared: bool = False
) -> Tensor:
    """Sum over layers (M_U, M_V) of |M_U M_U^T - I|_F + |M_V M_V^T - I|_F, or of their squares."""
    measure = orthogonal_square_reference if squared else orthogonal_norm_reference
    norms = [measure(memory) for layer in layers for memory in layer]
    return sum(norms[1:], norms[0])


def vtrace_reference(
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    *,
    gae_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace targets and advantages, each [T, B], as the explicit sum of IMPALA's Eq. 1.

    v_s = V(x_s) + sum_{t >= s} (prod_{i = s..t-1} discount_i c_i) delta_t,
    delta_t = rho_t (r_t + discount_t V(x_{t+1}) - V(x_t)),
    rho_t = min(1, ratio_t), c_t = gae_lambda min(1, ratio_t).
    The advantage bootstraps from gae_lambda v_{t+1} + (1 - gae_lambda) V(x_{t+1}).
    """
    num_times, batch = rewards.shape
    targets, advantages = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(batch):
        value = [float(values[t, b]) for t in range(num_times)] + [float(bootstrap_value[b])]
        reward = [float(rewards[t, b]) for t in range(num_times)]
        discount = [float(discounts[t, b]) for t in range(num_times)]
        ratio = [math.exp(float(log_rhos[t, b])) for t in range(num_times)]
        rho = [min(1.0, r) for r in ratio]
        c = [gae_lambda * r for r in rho]
        v = []
        for s in range(num_times):
            target = value[s]
            for t in range(s, num_times):
                product = 1.0
                for i in range(s, t):
                    product *= discount[i] * c[i]
                delta = rho[t] * (reward[t] + discount[t] * value[t + 1] - value[t])
                target += product * delta
            v.append(target)
        v.append(value[num_times])
        for t in range(num_times):
            next_value = gae_lambda * v[t + 1] + (1 - gae_lambda) * value[t + 1]
            targets[t, b] = v[t]
            advantages[t, b] = rho[t] * (reward[t] + discount[t] * next_value - value[t])
    return targets, advantages


def n_step_return_reference(
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    n_steps: int,
) -> Tensor:
    """n rewards, then the value reached, for every row [T, B]; fewer rewards where rows run out."""
    num_times, batch = rewards.shape
    returns = torch.zeros_like(rewards)
    for b in range(batch):
        for t in range(num_times):
            end = min(t + n_steps, num_times)
            total, product = 0.0, 1.0
            for k in range(t, end):
                total += product * float(rewards[k, b])
                product *= float(discounts[k, b])
            reached = bootstrap_value[b] if end == num_times else values[end, b]
            returns[t, b] = total + product * float(reached)
    return returns


def gae_reference(
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    *,
    gae_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Lambda returns and GAE advantages, each [T, B], as the weighted mean of n-step returns.

    Weight (1 - lambda) lambda^(n-1) on the n-step return, what is left on the longest one.
    """
    num_times, batch = rewards.shape
    n_step = [
        n_step_return_reference(discounts, rewards, values, bootstrap_value, n)
        for n in range(1, num_times + 1)
    ]
    returns = torch.zeros_like(rewards)
    for b in range(batch):
        for t in range(num_times):
            longest = num_times - t
            for n in range(1, longest):
                weight = (1 - gae_lambda) * gae_lambda ** (n - 1)
                returns[t, b] += weight * n_step[n - 1][t, b]
            returns[t, b] += gae_lambda ** (longest - 1) * n_step[longest - 1][t, b]
    return returns, returns - values


def rmsprop_reference(
    parameters: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    learning_rate: float,
    alpha: float,
    eps: float,
    initial_square: float,
) -> list[float]:
    """The parameters after one RMSProp step per row of `gradients`, epsilon inside the root.

    `initial_square` is the mean square before the first step: 0 in A3C, 1 in TensorFlow and SB3.
    """
    result = list(parameters)
    squares = [initial_square] * len(result)
    for row in gradients:
        for i, gradient in enumerate(row):
            squares[i] = alpha * squares[i] + (1 - alpha) * gradient * gradient
            result[i] -= learning_rate * gradient / math.sqrt(squares[i] + eps)
    return result
