"""The authors' published layer, in all that differs from the paper (`preset="official"`).

It computes what `cl/models/nsa.py` of github.com/thaihungle/Neurocoder (commit fc8e0f0) computes,
oddities included, in folded form; `load_authors_state_dict` takes weights over from there. Where it
leaves the paper is said at each class and function.

Shapes: B inputs, P slots, H heads, J steps, R = J * H components, K key width, n = 3HK + 1. The
leading 3 stands for the memories u, v, s, and the batch comes last, as in
`ncrl.neurocoder.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.neurocoder.attention import kth_smallest
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.integration import Composed
from ncrl.neurocoder.orthogonality import (
    distance_from_orthonormal,
    orthonormality_floor,
    squared_distance_from_orthonormal,
)

if TYPE_CHECKING:
    from ncrl.neurocoder.layer import NeurocoderLinear

MEMORIES = ("u", "v", "s")

EPSILON = 1e-6
"""Added to either norm, and once more to their product, in `scaled_cosine`."""

RECURRENT_SHARPNESS = 10.0
"""Temperature of the authors' LSTM form; their single step has none."""

BIAS_STD = 0.01
"""Standard deviation that several biases start with."""

INITIAL_STATE_STD = 0.05
"""Standard deviation that the learned initial state of the LSTM starts with."""


class OfficialMemory(nn.Module):
    """P slots with K key columns beside each stored vector.

    The key columns are the keys of all memories in mode `lk`, of memory s alone in mode `cb`, where
    the keys of u and v are linear in their content and train it. Unused or not, key columns count
    as part of the rows that the orthogonality loss wants orthonormal.
    """

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        slots, key_dim = config.num_slots, config.key_dim
        self.u = nn.Parameter(torch.empty(slots, in_features))  # [P, in]
        self.v = nn.Parameter(torch.empty(slots, out_features))  # [P, out]
        self.s = nn.Parameter(torch.empty(slots, 1))  # [P, 1]
        self.key_columns = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(slots, key_dim)) for name in MEMORIES}  # [P, K]
        )
        computed = config.key_mode == "cb"
        self.key_net_u = nn.Linear(in_features, key_dim) if computed else None
        self.key_net_v = nn.Linear(out_features, key_dim) if computed else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform stored rows, key columns included; key networks as torch does."""
        for name in MEMORIES:
            content, columns = getattr(self, name), self.key_columns[name]
            bound = math.sqrt(6 / (content.shape[0] + content.shape[1] + columns.shape[1]))
            nn.init.uniform_(content, -bound, bound)
            nn.init.uniform_(columns, -bound, bound)
        for network in (self.key_net_u, self.key_net_v):
            if network is not None:
                network.reset_parameters()

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: the key networks."""
        for network in (self.key_net_u, self.key_net_v):
            if network is not None:
                yield from network.parameters()

    def keys(self) -> Tensor:
        """Keys of the three memories, of any length, [3, P, K]."""
        u, v, s = (self.key_columns[name] for name in MEMORIES)
        if self.key_net_u is not None and self.key_net_v is not None:
            u, v = self.key_net_u(self.u), self.key_net_v(self.v)
        return torch.stack([u, v, s])

    def orthogonality(self, squared: bool = False) -> Tensor:
        """L_o of the stored rows, key columns included, a scalar.

        Args:
            squared: square both norms.
        """
        distance = squared_distance_from_orthonormal if squared else distance_from_orthonormal
        rows_u, rows_v = self._rows()
        return distance(rows_u) + distance(rows_v)

    def orthogonality_floor(self) -> float:
        """The least value L_o can take: P rows of width d < P cannot all be orthonormal."""
        return sum(orthonormality_floor(rows) for rows in self._rows())

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The stored rows of u [P, K + in] and v [P, K + out]."""
        columns = self.key_columns
        return torch.cat([columns["u"], self.u], dim=1), torch.cat([columns["v"], self.v], dim=1)


class OfficialIntegration(nn.Module):
    """The residual program Rho, and in single-step form its gate.

    Without Rho the gate is dead: it gets no gradient, but counts as a parameter. The LSTM form has
    none, because there the controller's state is the gate.
    """

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.residual = (
            nn.Parameter(torch.empty(in_features, out_features)) if config.residual else None
        )
        self.gate = nn.Linear(in_features, 1) if is_single_step(config) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights; the gate's bias near zero."""
        if self.residual is not None:
            nn.init.xavier_uniform_(self.residual)
        if self.gate is not None:
            _reset_linear(self.gate)

    def reset_bias(self, bias: Tensor) -> None:
        """Initialise the layer's own bias: normal beside a residual program, else zero."""
        nn.init.normal_(bias, std=BIAS_STD if self.residual is not None else 0.0)

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: the gate."""
        if self.gate is not None:
            yield from self.gate.parameters()

    @torch.no_grad()
    def start_from(self, matrix: Tensor) -> None:
        """Set Rho to `matrix` [in, out]."""
        self.matrix().copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """x Rho, [B, out], for x [B, in]; only with a residual program."""
        return x @ self.matrix()

    def matrix(self) -> Tensor:
        """Rho, [in, out]."""
        assert self.residual is not None
        return self.residual


class OfficialSingleStep(nn.Module):
    """Composition without LSTM, gates and usage: three linear maps from x to queries.

    Its sigma grow with n, where those of the paper shrink, and the residual is scaled by sigma_1.
    """

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.key_dim
        self.query = nn.ModuleDict({name: nn.Linear(in_features, width) for name in MEMORIES})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, biases near zero."""
        for linear in self.query.values():
            assert isinstance(linear, nn.Linear)
            _reset_linear(linear)

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: everything."""
        return self.parameters()

    def forward(
        self, x: Tensor, keys: Tensor, memory_s: Tensor, integration: OfficialIntegration
    ) -> Composed:
        """The active program for x [B, in], from keys [3, P, K] and M_S [P, 1]."""
        projections = []
        for linear in self.query.values():
            assert isinstance(linear, nn.Linear)
            projections.append(torch.addmm(linear.bias.unsqueeze(1), linear.weight, x.T))
        sizes = (3, self.config.num_heads, self.config.key_dim, x.shape[0])
        queries = torch.stack(projections).view(sizes)
        weights = scaled_cosine(queries, keys, self.config.sharpness).softmax(dim=1)
        sigma = increments(weights[2], memory_s).cumsum(0)  # [H, B]
        weights = weights.transpose(1, 2)  # [3, H, P, B]
        if integration.residual is None:
            return Composed(weights, sigma, None)
        assert integration.gate is not None
        gate = integration.gate(x).squeeze(1).sigmoid()  # [B]
        return Composed(weights, sigma, gate * sigma[0])


class OfficialLSTM(nn.Module):
    """Parameters of an LSTM with a learned initial state; torch's gate order i, f, g, o."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * width, in_features))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(4 * width))
        self.bias_hh = nn.Parameter(torch.empty(4 * width))
        self.h0 = nn.Parameter(torch.empty(1, width))
        self.c0 = nn.Parameter(torch.empty(1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Wide uniform weights, no biases, and an initial state near zero."""
        out_features, in_features = self.weight_ih.shape
        bound = 5 / math.sqrt(in_features + out_features // 4)
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.bias_ih, self.bias_hh):
            nn.init.zeros_(bias)
        for state in (self.h0, self.c0):
            nn.init.normal_(state, std=INITIAL_STATE_STD)

    def forward(self, x: Tensor, num_steps: int) -> list[Tensor]:
        """Hidden states [n, B] of `num_steps` steps that all read the same x [B, in]."""
        bias = (self.bias_ih + self.bias_hh).unsqueeze(1)
        from_input = torch.addmm(bias, self.weight_ih, x.T)  # [4n, B], shared by all steps
        hidden, cell = self.h0.T, self.c0.T  # [n, 1], broadcast over the batch
        states: list[Tensor] = []
        for _ in range(num_steps):
            i, f, g, o = (from_input + self.weight_hh @ hidden).chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()  # [n, B]
            hidden = o.sigmoid() * cell.tanh()  # [n, B]
            states.append(hidden)
        return states


class OfficialRecurrent(nn.Module):
    """Composition by an LSTM whose hidden state, 3HK + 1 wide, is the control signal itself.

    The state's parts are the queries of u, v and s, each [H, K], and last the residual gate. Where
    the paper gates content, this gates usage: one gate per slot and memory, computed from x and
    shared by heads and steps. Usage is pooled over heads. Singular values are summed before their
    order is flipped, so that sigma_n contains the increments of components 1 to R + 1 - n.
    """

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = 3 * config.num_heads * config.key_dim + 1
        self.lstm = OfficialLSTM(in_features, width)
        self.gate = nn.Linear(in_features, 3 * config.num_slots) if config.num_least_used else None
        # No computation reads it: it is here for the parameter count and for foreign weights.
        self.unused = nn.Linear(width, in_features)

    def reset_parameters(self) -> None:
        """The LSTM as it does itself, the rest as torch initialises a Linear."""
        self.lstm.reset_parameters()
        self.unused.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: everything."""
        return self.parameters()

    def forward(
        self, x: Tensor, keys: Tensor, memory_s: Tensor, integration: OfficialIntegration
    ) -> Composed:
        """The active program for x [B, in], from keys [3, P, K] and M_S [P, 1]."""
        config = self.config
        states = self.lstm(x, config.num_steps)  # [3HK + 1, B] each
        sizes = (3, config.num_heads, config.key_dim, x.shape[0])
        queries = torch.cat([state[:-1].view(sizes) for state in states], dim=1)  # [3, R, K, B]
        logits = scaled_cosine(queries, keys, RECURRENT_SHARPNESS * config.sharpness)
        weights = logits.softmax(dim=1) if self.gate is None else self._gated(x, logits)
        s = increments(weights[2], memory_s)  # [R, B]
        sigma = s.cumsum(0).flip(0)
        weights = weights.transpose(1, 2)  # [3, R, P, B]
        if integration.residual is None:
            return Composed(weights, sigma, None)
        return Composed(weights, sigma, states[-1][-1].sigmoid() * s[0])

    def _gated(self, x: Tensor, logits: Tensor) -> Tensor:
        """Content and usage attention mixed, [3, P, R, B], for logits of the same shape."""
        assert self.gate is not None
        config = self.config
        # Softmax divided by its largest entry, which is 1 then.
        content = (logits - logits.amax(dim=1, keepdim=True)).exp()
        rows = torch.addmm(self.gate.bias.unsqueeze(1), self.gate.weight, x.T)  # [3P, B]
        gates = rows.sigmoid().view(3, config.num_slots, 1, x.shape[0])
        # Before anything has been used, the first slots stand for the least used.
        least_used = content.new_zeros(config.num_slots, 1, 1)
        least_used[: config.num_least_used] = 1
        usage: Tensor | None = None
        weights: list[Tensor] = []
        for step in content.chunk(config.num_steps, dim=2):  # [3, P, H, B]
            if weights:
                largest = weights[-1].amax(dim=2, keepdim=True)  # [3, P, 1, B]
                usage = largest if usage is None else torch.maximum(usage, largest)
                least_used = least_used_attention(usage, config.num_least_used)
            weights.append(torch.lerp(step, least_used, gates))
        return torch.cat(weights, dim=2)


def official_composition(
    in_features: int, config: NeurocoderConfig
) -> OfficialSingleStep | OfficialRecurrent:
    """The composition network that `config` asks for."""
    form = OfficialSingleStep if is_single_step(config) else OfficialRecurrent
    return form(in_features, config)


def is_single_step(config: NeurocoderConfig) -> bool:
    """Whether the authors' form without LSTM is meant (their `rnn_step=0`)."""
    return config.num_steps == 1 and config.controller != "lstm"


def scaled_cosine(queries: Tensor, keys: Tensor, sharpness: float) -> Tensor:
    """Sharpened cosine, a K-th of the true one, with an epsilon in three places.

    sharpness <q, k> / (K (|q| + eps) (|k| + eps) + eps)

    Args:
        queries: [3, R, K, B].
        keys: [3, P, K].
        sharpness: temperature.

    Returns:
        [3, P, R, B].
    """
    _, num_components, key_dim, batch = queries.shape
    queries = queries.transpose(1, 2).flatten(2)  # [3, K, R B]
    product = (sharpness * keys) @ queries  # [3, P, R B]
    query_norm = torch.linalg.vector_norm(queries, dim=1, keepdim=True) + EPSILON  # [3, 1, R B]
    key_norm = torch.linalg.vector_norm(keys, dim=2, keepdim=True) + EPSILON  # [3, P, 1]
    norms = torch.addcmul(keys.new_full((), EPSILON), key_dim * key_norm, query_norm)
    # Not a division, whose gradient divides three times over.
    return (product * norms.reciprocal()).view(3, keys.shape[1], num_components, batch)


def least_used_attention(usage: Tensor, num_least_used: int) -> Tensor:
    """1 - usage on the l_I least used slots, 0 elsewhere; fewer slots where the next one ties.

    Args:
        usage: [3, P, 1, B], the largest weight of each slot so far, over heads and steps.
        num_least_used: l_I.
    """
    unused = 1 - usage
    # The selection is a constant to the gradient; the weights themselves are not.
    threshold = 1 - kth_smallest(usage.detach(), num_least_used + 1)
    return unused * (unused > threshold)


def increments(weight_s: Tensor, memory_s: Tensor) -> Tensor:
    """s_n = softplus(w^s_n M_S), [R, B], for weights [P, R, B] and M_S [P, 1]."""
    return F.softplus((memory_s.T @ weight_s.flatten(1)).view(weight_s.shape[1:]))


def _reset_linear(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.normal_(linear.bias, std=BIAS_STD)


# Weights of the authors' own module


def authors_state_dict(layer: NeurocoderLinear) -> dict[str, Tensor]:
    """The parameters of an official layer under the authors' names and in their shapes, copied."""
    return {
        name: torch.cat(tensors, dim=-1).detach().view(shape)
        for name, (tensors, shape) in _correspondence(layer).items()
    }


def load_authors_state_dict(layer: NeurocoderLinear, state: Mapping[str, Tensor]) -> None:
    """Copy a state_dict of the authors' layer into `layer`, which keeps its device and type.

    Raises:
        ValueError: if `layer` is not official, or any entry is missing, unexpected or of another
            shape; nothing has been changed then.
    """
    expected = _correspondence(layer)
    faults = [f"missing {name}" for name in expected if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in expected]
    for name, (_, shape) in expected.items():
        if name in state and tuple(state[name].shape) != shape:
            faults.append(f"{name} of shape {list(state[name].shape)} instead of {list(shape)}")
    if faults:
        raise ValueError(f"not the weights of this layer ({layer.config}): {'; '.join(faults)}")
    with torch.no_grad():
        for name, (tensors, _) in expected.items():
            widths = [tensor.shape[-1] for tensor in tensors]
            for tensor, part in zip(tensors, torch.split(state[name], widths, dim=-1), strict=True):
                tensor.copy_(part.reshape(tensor.shape))


_Correspondence = dict[str, tuple[list[Tensor], tuple[int, ...]]]
"""From an authors' name to our tensors, which are its columns, and to the authors' shape."""


def _correspondence(layer: NeurocoderLinear) -> _Correspondence:
    memory, composition, integration = layer.memory, layer.composition, layer.integration
    if not isinstance(memory, OfficialMemory) or not isinstance(integration, OfficialIntegration):
        raise ValueError(f"expected a layer with preset='official', got {layer.config}")
    ours: dict[str, list[Tensor]] = {
        f"PM_{name.upper()}": [memory.key_columns[name], getattr(memory, name)] for name in MEMORIES
    }
    if integration.residual is not None:
        ours["res_weight"] = [integration.residual]
    assert layer.bias is not None
    ours["bias"] = [layer.bias]
    linears: dict[str, nn.Module | None] = {"p2ku": memory.key_net_u, "p2kv": memory.key_net_v}
    if isinstance(composition, OfficialSingleStep):
        linears |= {f"program_key_{name}": composition.query[name] for name in MEMORIES}
        linears["res_s"] = integration.gate
    else:
        assert isinstance(composition, OfficialRecurrent)
        lstm = composition.lstm
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            ours[f"rnn_program_controller.lstm.{name}_l0"] = [getattr(lstm, name)]
        linears |= {"component_map": composition.unused, "read_mode": composition.gate}
    for name, linear in linears.items():
        if linear is not None:
            ours |= {f"{name}.{part}": [value] for part, value in linear.named_parameters()}
    table = {
        name: (tensors, (*tensors[0].shape[:-1], sum(tensor.shape[-1] for tensor in tensors)))
        for name, tensors in ours.items()
    }
    if isinstance(composition, OfficialRecurrent):
        for name, state in (("h", composition.lstm.h0), ("c", composition.lstm.c0)):
            table[f"rnn_program_controller.lstm_{name}_bias"] = ([state], (1, *state.shape))
    return table
