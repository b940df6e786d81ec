"""The program memory: singular vectors and values of stored programs, and their keys.

Shapes: P slots, F of them frozen, H heads, K key width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.growth import replace_parameter
from ncrl.neurocoder.orthogonality import (
    distances_from_orthonormal,
    orthogonal_part,
    orthonormality_floor,
)


class ProgramMemory(nn.Module):
    """P slots, each a left singular vector, a right singular vector and a singular value.

    `u`, `v` and `s` are the paper's M_U, M_V and M_S (section 2.1), of the slots that are trained.
    Frozen slots are buffers, which no optimiser moves; `stored` has both. The keys of all three
    parts come from one key network, which reads the parts but does not train them. With
    `controller="projection"` keys are parameters instead.
    """

    frozen_keys: Tensor | None
    """Keys of the F frozen slots, [3 or H, F, K]; like `frozen_u`, ... None where F is 0."""

    frozen_groups: Tensor | None
    """How many slots were frozen each time, in order."""

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.u = nn.Parameter(torch.empty(config.num_slots, in_features))  # [P, in]
        self.v = nn.Parameter(torch.empty(config.num_slots, out_features))  # [P, out]
        self.s = nn.Parameter(torch.empty(config.num_slots, 1))  # [P, 1]
        for name in ("u", "v", "s", "keys", "groups"):
            self.register_buffer(f"frozen_{name}", None)
        self._groups: list[int] = []  # `frozen_groups`, without a look at the device
        self.parts = ["u", "v", "s"]
        self._build_keys(in_features, out_features)
        self.reset_parameters()

    def _build_keys(self, in_features: int, out_features: int) -> None:
        """Create what `keys` are made from."""
        config = self.config
        if config.controller == "projection":
            width = config.num_heads * config.key_dim
            self.key = nn.Parameter(torch.empty(config.num_slots, width))
            self.parts.append("key")
        else:
            self.key_net = nn.Linear(in_features + out_features + 1, 3 * config.key_dim)

    def stored(self, name: str) -> Tensor:
        """All rows of M_U (`u`), M_V (`v`) or M_S (`s`), [P, ...]; frozen slots come first."""
        trained: Tensor = getattr(self, name)
        frozen: Tensor | None = getattr(self, f"frozen_{name}")
        return trained if frozen is None else torch.cat([frozen, trained])

    def groups(self) -> list[int]:
        """How many slots were frozen each time, in order, and last how many are trained."""
        return [count for count in (*self._groups, len(self.s)) if count]

    def reset_parameters(self) -> None:
        """Memories as `config.memory_init` says; the key network as torch initialises a Linear."""
        for name in self.parts:
            self._initialise(name, getattr(self, name))
        if "key" not in self.parts:
            self.key_net.reset_parameters()

    def _initialise(self, name: str, rows: Tensor) -> None:
        if name == "key":
            nn.init.normal_(rows)
        elif name == "s" or self.config.memory_init == "xavier":
            nn.init.xavier_uniform_(rows)
        else:
            rows = rows.detach()
            exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
            rows.copy_(nn.init.orthogonal_(exact))  # which has no half precision

    def keys(self) -> Tensor:
        """Keys of the three memories, [3, P, K], whose gradient reaches `key_net` only; or stored
        keys for each head, [H, P, K]."""
        keys: Tensor
        if "key" in self.parts:
            keys, groups = self.key, self.config.num_heads
        else:
            slots = torch.cat([self.u, self.v, self.s], dim=1).detach()  # [slots, in + out + 1]
            keys, groups = self.key_net(slots), 3
        keys = keys.view(len(keys), groups, self.config.key_dim).transpose(0, 1)
        return keys if self.frozen_keys is None else torch.cat([self.frozen_keys, keys], 1)

    def orthogonality(self, squared: bool = False) -> Tensor:
        """L_o = |M_U M_U^T - I| + |M_V M_V^T - I| in Frobenius norms, a scalar (section 2.3).

        Args:
            squared: square both norms.
        """
        distances = distances_from_orthonormal(self._rows())
        return (distances.square() if squared else distances).sum()

    def orthogonality_floor(self) -> float:
        """The least value L_o can take: P rows of width d < P cannot all be orthonormal."""
        return sum(orthonormality_floor(rows) for rows in self._rows())

    def _rows(self) -> tuple[Tensor, Tensor]:
        """The rows that the orthogonality loss wants orthonormal."""
        return self.stored("u"), self.stored("v")

    @torch.no_grad()
    def freeze(self, count: int, optimizer: Optimizer | None = None) -> None:
        """Freeze the first `count` slots, as far as they are not frozen yet."""
        fresh = count - sum(self._groups)
        if fresh <= 0:
            return
        keys = self.keys()[:, :count]
        for name in self.parts:
            if name != "key":
                setattr(self, f"frozen_{name}", self.stored(name)[:count].clone())
            replace_parameter(self, name, lambda rows: rows[fresh:], optimizer)
        self.frozen_keys = keys.clone()
        self.set_groups([*self._groups, fresh])

    def set_groups(self, counts: list[int]) -> None:
        """Note how many of the frozen slots were frozen each time, in order."""
        self._groups, self.frozen_groups = counts, torch.tensor(counts, device=self.s.device)

    @torch.no_grad()
    def grow(self, num_slots: int, optimizer: Optimizer | None = None) -> None:
        """Add slots; see `NeurocoderLinear.grow`."""
        for name in self.parts:
            trained: Tensor = getattr(self, name)
            rows = trained.new_empty(num_slots, trained.shape[1])
            self._initialise(name, rows)
            if name in ("u", "v"):
                rows = orthogonal_part(rows, self.stored(name))
            replace_parameter(self, name, lambda old: F.pad(old, (0, 0, 0, num_slots)), optimizer)
            getattr(self, name)[-num_slots:] = rows
