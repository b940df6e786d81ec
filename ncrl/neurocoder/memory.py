"""The program memory: singular vectors and values of stored programs, and their keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ncrl.neurocoder.attention import unit
from ncrl.neurocoder.config import NeurocoderConfig


class ProgramMemory(nn.Module):
    """P slots, each a left singular vector, a right singular vector and a singular value.

    `u`, `v` and `s` are the paper's M_U, M_V and M_S (section 2.1). The keys of all three memories
    come from one key network, which reads the memories but does not train them.
    """

    def __init__(self, in_features: int, out_features: int, config: NeurocoderConfig) -> None:
        super().__init__()
        self.key_dim = config.key_dim
        self.u = nn.Parameter(torch.empty(config.num_slots, in_features))  # [P, in]
        self.v = nn.Parameter(torch.empty(config.num_slots, out_features))  # [P, out]
        self.s = nn.Parameter(torch.empty(config.num_slots, 1))  # [P, 1]
        self.key_net = nn.Linear(in_features + out_features + 1, 3 * config.key_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform memories; the key network as torch initialises a Linear."""
        for memory in (self.u, self.v, self.s):
            nn.init.xavier_uniform_(memory)
        self.key_net.reset_parameters()

    def keys(self) -> Tensor:
        """Unit keys of the three memories, [3, P, K]; a gradient reaches `key_net` only."""
        slots = torch.cat([self.u, self.v, self.s], dim=1).detach()  # [P, in + out + 1]
        keys = self.key_net(slots).unflatten(1, (3, self.key_dim))  # [P, 3, K]
        return unit(keys, dim=2).transpose(0, 1)

    def orthogonality(self) -> Tensor:
        """L_o = |M_U M_U^T - I| + |M_V M_V^T - I| in Frobenius norms, a scalar (section 2.3)."""
        return distance_from_orthonormal(self.u) + distance_from_orthonormal(self.v)

    def orthogonality_floor(self) -> float:
        """The least value L_o can take: P rows of width d < P cannot all be orthonormal."""
        num_slots = self.u.shape[0]
        widths = (self.u.shape[1], self.v.shape[1])
        return sum(math.sqrt(max(0, num_slots - width)) for width in widths)


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """|M M^T - I_P| in the Frobenius norm, a scalar; its gradient at exactly 0 is 0.

    Uses |M M^T - I_P|^2 = |M^T M - I_d|^2 + (P - d), so the smaller Gram matrix is the one built.
    """
    num_rows, width = rows.shape
    if width < num_rows:
        gram, missing = rows.T @ rows, num_rows - width
    else:
        gram, missing = rows @ rows.T, 0
    eye = torch.eye(gram.shape[0], dtype=rows.dtype, device=rows.device)
    squared = (gram - eye).square().sum() + missing
    # sqrt has an infinite slope at 0: keep the exact zero, with a zero gradient, out of its reach.
    at_minimum = squared == 0
    return torch.where(at_minimum, squared, squared.masked_fill(at_minimum, 1.0).sqrt())
