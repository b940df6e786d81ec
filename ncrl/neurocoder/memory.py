"""The program memory: singular vectors and values of stored programs, and their keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.orthogonality import distances_from_orthonormal, orthonormality_floor


class SlotMemory(nn.Module):
    """P slots, each a left singular vector, a right singular vector and a singular value.

    `u`, `v` and `s` are the paper's M_U, M_V and M_S (section 2.1).
    """

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.u = nn.Parameter(torch.empty(config.num_slots, in_features))  # [P, in]
        self.v = nn.Parameter(torch.empty(config.num_slots, out_features))  # [P, out]
        self.s = nn.Parameter(torch.empty(config.num_slots, 1))  # [P, 1]

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        """What `frozen_controller` freezes: the key networks."""
        raise NotImplementedError

    def keys(self) -> Tensor:
        """Keys of the three memories, of any length, [3, P, K]."""
        raise NotImplementedError

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
        return self.u, self.v


class ProgramMemory(SlotMemory):
    """The paper's memory: the keys of all three parts come from one key network, which reads the
    parts but does not train them."""

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__(in_features, out_features, config)
        self.key_net = nn.Linear(in_features + out_features + 1, 3 * config.key_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Memories as `config.memory_init` says; the key network as torch initialises a Linear."""
        orthogonal = self.config.memory_init == "orthogonal"
        for memory in (self.u, self.v):
            (nn.init.orthogonal_ if orthogonal else nn.init.xavier_uniform_)(memory)
        nn.init.xavier_uniform_(self.s)
        self.key_net.reset_parameters()

    def controller_parameters(self) -> Iterator[nn.Parameter]:
        return self.key_net.parameters()

    def keys(self) -> Tensor:
        """Keys of the three memories, [3, P, K]; a gradient reaches `key_net` only."""
        slots = torch.cat([self.u, self.v, self.s], dim=1).detach()  # [P, in + out + 1]
        keys: Tensor = self.key_net(slots)
        return keys.view(len(slots), 3, self.config.key_dim).transpose(0, 1)
