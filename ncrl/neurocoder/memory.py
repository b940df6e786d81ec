"""The program memory: singular vectors and values of stored programs, and their keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ncrl.neurocoder.attention import unit
from ncrl.neurocoder.caching import Source, is_comparable
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.orthogonality import (
    distance_from_orthonormal,
    orthonormality_floor,
    squared_distance_from_orthonormal,
)


class ProgramMemory(nn.Module):
    """P slots, each a left singular vector, a right singular vector and a singular value.

    `u`, `v` and `s` are the paper's M_U, M_V and M_S (section 2.1). The keys of all three memories
    come from one key network, which reads the memories but does not train them.
    """

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.u = nn.Parameter(torch.empty(config.num_slots, in_features))  # [P, in]
        self.v = nn.Parameter(torch.empty(config.num_slots, out_features))  # [P, out]
        self.s = nn.Parameter(torch.empty(config.num_slots, 1))  # [P, 1]
        self.key_net = nn.Linear(in_features + out_features + 1, 3 * config.key_dim)
        self._cache: tuple[Source, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Memories as `config.memory_init` says; the key network as torch initialises a Linear."""
        orthogonal = self.config.memory_init == "orthogonal"
        for memory in (self.u, self.v):
            (nn.init.orthogonal_ if orthogonal else nn.init.xavier_uniform_)(memory)
        nn.init.xavier_uniform_(self.s)
        self.key_net.reset_parameters()

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: the key network."""
        return self.key_net.parameters()

    def keys(self) -> Tensor:
        """Unit keys of the three memories, [3, P, K]; a gradient reaches `key_net` only.

        Where no gradient is recorded, keys are kept from call to call for as long as the weights
        behind them stay the same.
        """
        if torch.is_grad_enabled() or not is_comparable(self.u):
            return self._compute_keys()
        if self._cache is not None:
            source, keys = self._cache
            if source.is_unchanged(self):
                return keys
        keys = self._compute_keys()
        self._cache = Source(self), keys
        return keys

    def _compute_keys(self) -> Tensor:
        slots = torch.cat([self.u, self.v, self.s], dim=1).detach()  # [P, in + out + 1]
        # Slots last: twice as fast as slots first, as there are more of them than key numbers.
        keys = torch.addmm(self.key_net.bias.unsqueeze(1), self.key_net.weight, slots.T)
        return unit(keys.view(3, self.config.key_dim, len(slots)), dim=1).transpose(1, 2)

    def orthogonality(self, squared: bool = False) -> Tensor:
        """L_o = |M_U M_U^T - I| + |M_V M_V^T - I| in Frobenius norms, a scalar (section 2.3).

        Args:
            squared: square both norms.
        """
        distance = squared_distance_from_orthonormal if squared else distance_from_orthonormal
        return distance(self.u) + distance(self.v)

    def orthogonality_floor(self) -> float:
        """The least value L_o can take: P rows of width d < P cannot all be orthonormal."""
        return sum(orthonormality_floor(memory) for memory in (self.u, self.v))

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles start without cached keys.
        return {**self.__dict__, "_cache": None}
