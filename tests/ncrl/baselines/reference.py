"""The baselines' mathematics once more, literally: one input, one slot, one number at a time.

Every function takes the layer's parameters by name and one input x [in], and returns y [out].
Nothing here calls the code under test.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, number by number."""
    assert len(a) == len(b)
    total = a.new_zeros(())
    for i in range(len(a)):
        total = total + a[i] * b[i]
    return total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight [out, in] times x, plus bias."""
    rows = [dot(weight[o], x) for o in range(len(weight))]
    if bias is not None:
        rows = [row + bias[o] for o, row in enumerate(rows)]
    return torch.stack(rows)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    exps = [torch.exp(logit) for logit in logits]
    total = sum(exps[1:], exps[0])
    return [e / total for e in exps]


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def relu_network(p: Parameters, name: str, x: Tensor) -> Tensor:
    """Linear layers `name.0`, `name.2`, ... with max(0, .) between them."""
    places = sorted({int(key.split(".")[1]) for key in p if key.startswith(name + ".")})
    for place in places:
        x = linear(x, p[f"{name}.{place}.weight"], p[f"{name}.{place}.bias"])
        if place != places[-1]:
            x = torch.stack([value if value > 0 else 0 * value for value in x])
    return x


def hypernet(p: Parameters, x: Tensor, *, scale: str) -> Tensor:
    """y_o = sum_i s_i x_i W_io + b_o, or s_o sum_i x_i W_io + b_o."""
    s = relu_network(p, "scale_net", x)
    outputs = []
    for o in range(len(p["weight"])):
        y = x.new_zeros(())
        for i in range(len(x)):
            y = y + (s[i] if scale == "input" else s[o]) * x[i] * p["weight"][o, i]
        outputs.append(y + p["bias"][o] if "bias" in p else y)
    return torch.stack(outputs)


def film(p: Parameters, x: Tensor) -> Tensor:
    """y_o = (1 + gamma_o) (x W + b)_o + beta_o; the network gives all gammas, then all betas."""
    y = linear(x, p["linear.weight"], p.get("linear.bias"))
    modulation = relu_network(p, "film_net", x)
    return torch.stack([(1 + modulation[o]) * y[o] + modulation[len(y) + o] for o in range(len(y))])


def nsm_attention(p: Parameters, x: Tensor, *, key_dim: int, official_cosine: bool) -> list[Tensor]:
    """Weight of each slot."""
    query = torch.tanh(linear(x, p["query.weight"], p["query.bias"]))
    strength = softplus(linear(x, p["strength.weight"], p["strength.bias"])[0])
    logits = []
    for row in p["memory"]:
        key = torch.tanh(row[:key_dim])
        cosine = dot(query, key) / torch.sqrt(dot(query, query) * dot(key, key))
        logits.append(strength * (cosine / key_dim if official_cosine else cosine))
    return softmax(logits)


def nsm(
    p: Parameters, x: Tensor, *, out: int, key_dim: int, official_cosine: bool, bias: bool
) -> Tensor:
    """The mixed weight matrix and bias are built, then applied."""
    attention = nsm_attention(p, x, key_dim=key_dim, official_cosine=official_cosine)
    row = sum((a * slot for a, slot in zip(attention, p["memory"], strict=True)), x.new_zeros(()))
    matrix = row[key_dim : key_dim + len(x) * out]
    outputs = []
    for o in range(out):
        y = sum((x[i] * matrix[i * out + o] for i in range(len(x))), x.new_zeros(()))
        outputs.append(y + row[key_dim + len(x) * out + o] if bias else y)
    return torch.stack(outputs)


def moe_noise_scale(p: Parameters, x: Tensor) -> Tensor:
    """Standard deviation of each expert's noise, [E]."""
    return softplus(linear(x, p["gate.noise_weight"])) + 0.01


def moe_gates(p: Parameters, x: Tensor, noise: Tensor | None, top_k: int) -> dict[int, Tensor]:
    """Weight of each expert that is kept; `noise` [E] are the standard normal numbers drawn."""
    logits = linear(x, p["gate.weight"])
    if noise is not None:
        logits = logits + noise * moe_noise_scale(p, x)
    kept = sorted(range(len(logits)), key=logits.tolist().__getitem__, reverse=True)[:top_k]
    return dict(zip(kept, softmax([logits[e] for e in kept]), strict=True))


def moe(p: Parameters, x: Tensor, *, top_k: int, noise: Tensor | None = None) -> Tensor:
    """sum_e gate_e (W_e x + b_e)."""
    total = x.new_zeros(p["weight"].shape[1])
    for expert, gate in moe_gates(p, x, noise, top_k).items():
        bias = p["bias"][expert] if "bias" in p else None
        total = total + gate * linear(x, p["weight"][expert], bias)
    return total


def moe_load(p: Parameters, x: Tensor, noise: Tensor, top_k: int) -> list[float]:
    """Probability that each expert is kept if its own noise is drawn again, that of others not."""
    clean, scale = linear(x, p["gate.weight"]).detach(), moe_noise_scale(p, x).detach()
    noisy = clean + noise * scale
    chances = []
    for expert in range(len(clean)):
        others = sorted((float(noisy[e]) for e in range(len(clean)) if e != expert), reverse=True)
        if top_k > len(others):
            chances.append(1.0)
            continue
        needed = others[top_k - 1]
        chances.append(normal_cdf((float(clean[expert]) - needed) / float(scale[expert])))
    return chances


def cv_squared(amounts: Sequence[float]) -> float:
    mean = sum(amounts) / len(amounts)
    return sum((a - mean) ** 2 for a in amounts) / len(amounts) / mean**2
