"""The authors' published layer, in all that differs from the paper (`preset="official"`).

It computes what `cl/models/nsa.py` of github.com/thaihungle/Neurocoder (commit fc8e0f0) computes,
oddities included, in folded form. Where it leaves the paper is said at each class and function.

Shapes: B inputs, P slots, H heads, J steps, R = J * H components, K key width, n = 3HK + 1. The
leading 3 stands for the memories u, v, s. Slots come last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.neurocoder.attention import kth_smallest
from ncrl.neurocoder.composition import Composition
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.integration import Attention, Composed, IntegrationNetwork, increments
from ncrl.neurocoder.layer import NeurocoderLinear
from ncrl.neurocoder.memory import ProgramMemory
from ncrl.neurocoder.weights import LinearWeights, LstmWeights

MEMORIES = ("u", "v", "s")

EPSILON = 1e-6
"""Added to either norm, and once more to their product, in `scaled_cosine`."""

RECURRENT_SHARPNESS = 10.0
"""Factor in the softmax of the authors' LSTM form; their single step has none."""

BIAS_STD, INITIAL_STATE_STD = 0.01, 0.05
"""Standard deviations that biases, and the learned initial state of the LSTM, start with."""

AUTHORS_NAMES = {
    "memory.key_net_u": "p2ku",
    "memory.key_net_v": "p2kv",
    "composition.query.u": "program_key_u",
    "composition.query.v": "program_key_v",
    "composition.query.s": "program_key_s",
    "composition.gate": "read_mode",
    "composition.unused": "component_map",
    **{
        f"composition.lstm.{name}": f"rnn_program_controller.lstm.{name}_l0"
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    },
    "composition.lstm.h0": "rnn_program_controller.lstm_h_bias",
    "composition.lstm.c0": "rnn_program_controller.lstm_c_bias",
    "integration.residual": "res_weight",
    "integration.gate": "res_s",
    "bias": "bias",
}
"""Of parameters, and of modules that hold a `weight` and a `bias`."""


class OfficialNeurocoderLinear(NeurocoderLinear):
    """The authors' layer in the seat of `nn.Linear`; arguments are those of `NeurocoderLinear`.

    Switches of the paper's equations that this layer has not got are refused.
    """

    PRESET = "official"

    bias: nn.Parameter
    """Stored even where it is not added."""

    def _build(self) -> None:
        sizes = self.in_features, self.out_features
        if self.context_features is not None:
            raise ValueError(
                "preset='official' composes from its input alone, got "
                f"context_features={self.context_features}"
            )
        self.memory = OfficialMemory(*sizes, self.config)
        is_single = is_single_step(self.config)
        form = OfficialSingleStep if is_single else OfficialRecurrent
        self.composition = form(self.in_features, self.config)
        gate_features = self.in_features if is_single else None
        self.integration = OfficialIntegration(*sizes, self.config, gate_features)
        self.bias = nn.Parameter(torch.empty(self.out_features))

    def _growing_memory(self) -> ProgramMemory:
        raise ValueError(
            f"slots of preset={self.PRESET!r} can neither be frozen nor grow; use preset='paper'"
        )

    def _reset_bias(self) -> None:
        """Normal beside a residual program, else zero."""
        nn.init.normal_(self.bias, std=BIAS_STD if self.config.residual else 0.0)

    def authors_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the authors' names and in their shapes, copied."""
        return {
            name: torch.cat(tensors, dim=-1).detach().view(shape)
            for name, (tensors, shape) in self._correspondence().items()
        }

    def load_authors_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state_dict of the authors' layer into this one, which keeps its device and type.

        Raises:
            ValueError: if any entry is missing, unexpected or of another shape, before any change.
        """
        expected = self._correspondence()
        faults = [f"missing {name}" for name in expected if name not in state]
        faults += [f"unexpected {name}" for name in state if name not in expected]
        for name, (_, shape) in expected.items():
            if name in state and tuple(state[name].shape) != shape:
                faults.append(f"{name} of shape {list(state[name].shape)} instead of {list(shape)}")
        if faults:
            raise ValueError(f"not the weights of this layer ({self.config}): {'; '.join(faults)}")
        with torch.no_grad():
            for name, (tensors, _) in expected.items():
                widths = [tensor.shape[-1] for tensor in tensors]
                parts = torch.split(state[name], widths, dim=-1)
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.reshape(tensor.shape))

    def _correspondence(self) -> dict[str, tuple[list[Tensor], tuple[int, ...]]]:
        """From an authors' name to our tensors, which are its columns, and to their shape."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        table: dict[str, tuple[list[Tensor], tuple[int, ...]]] = {}
        for name in MEMORIES:
            columns = [parameters.pop(f"memory.{part}") for part in (f"key_columns.{name}", name)]
            width = sum(part.shape[1] for part in columns)
            table[f"PM_{name.upper()}"] = columns, (len(columns[0]), width)
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            theirs = AUTHORS_NAMES.get(name) or f"{AUTHORS_NAMES[owner]}.{leaf}"
            # Their initial states have an axis for layers.
            extra = (1,) if leaf in ("h0", "c0") else ()
            table[theirs] = [parameter], (*extra, *parameter.shape)
        return table


def layer_class(preset: str) -> type[NeurocoderLinear]:
    """The class that has a preset's equations; the paper's refuses presets that there are not."""
    is_official = preset == OfficialNeurocoderLinear.PRESET
    return OfficialNeurocoderLinear if is_official else NeurocoderLinear


class OfficialMemory(ProgramMemory):
    """P slots with K key columns beside each stored vector.

    The key columns are the keys of all memories in mode `lk`, of memory s alone in mode `cb`, where
    the keys of u and v are linear in their content and train it. Unused or not, key columns count
    as part of the rows that the orthogonality loss wants orthonormal.
    """

    def _build_keys(self, in_features: int, out_features: int) -> None:
        slots, key_dim = self.config.num_slots, self.config.key_dim
        self.key_columns = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(slots, key_dim)) for name in MEMORIES}  # [P, K]
        )
        computed = self.config.key_mode == "cb"
        self.key_net_u = nn.Linear(in_features, key_dim) if computed else None
        self.key_net_v = nn.Linear(out_features, key_dim) if computed else None

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

    def keys(self) -> Tensor:
        u, v, s = (self.key_columns[name] for name in MEMORIES)
        if self.key_net_u is not None and self.key_net_v is not None:
            u, v = self.key_net_u(self.u), self.key_net_v(self.v)
        return torch.stack([u, v, s])

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The stored rows of u [P, K + in] and v [P, K + out]."""
        columns = self.key_columns
        return torch.cat([columns["u"], self.u], dim=1), torch.cat([columns["v"], self.v], dim=1)


class OfficialIntegration(IntegrationNetwork):
    """The residual program, and in single-step form its gate, which without Rho is dead, but counts
    as a parameter. In the LSTM form the controller's state is the gate."""

    def reset_parameters(self) -> None:
        for matrix in self._factors():
            nn.init.xavier_uniform_(matrix)
        if self.gate is not None:
            _reset_as_authors(self.gate)


class OfficialSingleStep(Composition):
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
        for linear in self.query.values():
            _reset_as_authors(linear)

    def forward(
        self, x: Tensor, memory: ProgramMemory, gate: LinearWeights | None, rows: Tensor | None
    ) -> Composed:
        config = self.config
        queries = torch.stack([linear(x) for linear in self.query.values()])  # [3, B, HK]
        queries = queries.view(3, -1, config.key_dim)  # [3, BH, K]
        weights = scaled_cosine(queries, memory.keys(), config.sharpness).softmax(dim=2)
        weights = weights.view(3, x.shape[0], config.num_heads, config.num_slots)
        attention = Attention(*weights.unbind())
        sigma = increments(attention.s, memory.s).cumsum(1)  # [B, H]
        scale = None
        if gate is not None and config.residual:
            scale = F.linear(x, gate.weight, gate.bias).sigmoid() * sigma[:, :1]
        return Composed(attention, sigma, scale, None if rows is None else x @ rows.T)


class OfficialLSTM(LstmWeights):
    """An LSTM with a learned initial state."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__(in_features, width)
        self.h0 = nn.Parameter(torch.empty(1, width))
        self.c0 = nn.Parameter(torch.empty(1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        out_features, in_features = self.weight_ih.shape
        bound = 5 / math.sqrt(in_features + out_features // 4)
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.bias_ih, self.bias_hh):
            nn.init.zeros_(bias)
        for state in (self.h0, self.c0):
            nn.init.normal_(state, std=INITIAL_STATE_STD)

    def initial_state(self) -> tuple[Tensor, Tensor | None]:
        return self.h0, self.c0


class OfficialRecurrent(Composition):
    """Composition by an LSTM whose hidden state, 3HK + 1 wide, is the control signal itself.

    The state's parts are the queries of u, v and s, each [H, K], and last the residual gate. Where
    the paper gates content, this gates usage: one gate per slot and memory, computed from x and
    shared by heads and steps; usage is pooled over heads. Singular values are summed before their
    order is flipped: sigma_n contains the increments of components 1 to R + 1 - n.
    """

    def __init__(self, in_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        width = 3 * config.num_heads * config.key_dim + 1
        self.lstm = OfficialLSTM(in_features, width)
        self.gate = nn.Linear(in_features, 3 * config.num_slots) if config.num_least_used else None
        # No computation reads it: it is here for the parameter count and for foreign weights.
        self.unused = LinearWeights(width, in_features)

    def reset_parameters(self) -> None:
        self.lstm.reset_parameters()
        self.unused.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(
        self, x: Tensor, memory: ProgramMemory, gate: LinearWeights | None, rows: Tensor | None
    ) -> Composed:
        config = self.config
        states = self.lstm(F.linear(x, self.lstm.weight_ih), config.num_steps)  # [B, J, 3HK + 1]
        # Not unflatten: the older ONNX exporter would take the number of inputs for constant.
        queries = states[..., :-1].view(*states.shape[:2], 3, config.num_heads, config.key_dim)
        queries = queries.permute(2, 0, 1, 3, 4)  # [3, B, J, H, K]
        sharpness = RECURRENT_SHARPNESS * config.sharpness
        logits = scaled_cosine(queries.flatten(1, 3), memory.keys(), sharpness)
        logits = logits.view(*queries.shape[:4], config.num_slots)
        if self.gate is None:
            weights = logits.softmax(dim=-1)
        else:
            gates = self.gate(x).sigmoid().view(x.shape[0], 3, 1, config.num_slots)
            weights = gated_attention(logits, gates.transpose(0, 1), config.num_least_used)
        attention = Attention(*weights.flatten(2, 3).unbind())
        s = increments(attention.s, memory.s)  # [B, R]
        sigma = s.cumsum(1).flip(1)
        scale = states[:, -1, -1:].sigmoid() * s[:, :1] if config.residual else None
        return Composed(attention, sigma, scale, None if rows is None else x @ rows.T)


def is_single_step(config: NeurocoderConfig) -> bool:
    """Whether the authors' form without LSTM is meant (their `rnn_step=0`)."""
    return config.num_steps == 1 and config.controller != "lstm"


def scaled_cosine(queries: Tensor, keys: Tensor, sharpness: float) -> Tensor:
    """sharpness <q, k> / (K (|q| + eps) (|k| + eps) + eps), a K-th of the cosine, of queries
    [3, N, K] and keys [3, P, K]: [3, N, P]."""
    product = torch.bmm(queries, (sharpness * keys).transpose(1, 2))
    query_norm = torch.linalg.vector_norm(queries, dim=2, keepdim=True) + EPSILON  # [3, N, 1]
    key_norm = torch.linalg.vector_norm(keys, dim=2).unsqueeze(1) + EPSILON  # [3, 1, P]
    norms = keys.shape[2] * key_norm * query_norm + EPSILON
    # Not a division, whose gradient divides three times over.
    cosines: Tensor = product * norms.reciprocal()
    return cosines


def gated_attention(logits: Tensor, gates: Tensor, num_least_used: int) -> Tensor:
    """Content attention of logits [3, B, J, H, P] and usage attention, mixed by the gates of the
    usage [3, B, 1, P]: [3, B, J, H, P]."""
    # Softmax divided by its largest entry, which is 1 then.
    content = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    # Before anything has been used, the first slots stand for the least used.
    slots = torch.arange(logits.shape[-1], device=logits.device)
    least_used = (slots < num_least_used).to(logits.dtype)
    weights = [torch.lerp(content[:, :, 0], least_used, gates)]  # [3, B, H, P]
    usage = weights[0].amax(dim=2, keepdim=True)  # [3, B, 1, P]
    for step in range(1, content.shape[2]):
        least_used = least_used_attention(usage, num_least_used)
        weights.append(torch.lerp(content[:, :, step], least_used, gates))
        usage = torch.maximum(usage, weights[-1].amax(dim=2, keepdim=True))
    return torch.stack(weights, dim=2)


def least_used_attention(usage: Tensor, num_least_used: int) -> Tensor:
    """1 - usage [..., P] on the l_I least used slots, 0 elsewhere; fewer where the next ties."""
    unused = 1 - usage
    # The selection is a constant to the gradient; the weights themselves are not.
    threshold = 1 - kth_smallest(usage.detach(), num_least_used + 1)
    return unused * (unused > threshold)


def _reset_as_authors(linear: nn.Module) -> None:
    """Xavier-uniform weight, bias near zero, of a module that has both."""
    nn.init.xavier_uniform_(linear.get_parameter("weight"))
    nn.init.normal_(linear.get_parameter("bias"), std=BIAS_STD)
