"""Sizes and switches of a Neurocoder layer, validated in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral


@dataclass(frozen=True)
class NeurocoderConfig:
    """Everything that fixes a Neurocoder layer except its input and output widths.

    Raises:
        ValueError: at construction, for an impossible size; the message names every value involved.
    """

    num_slots: int = 30
    """Slots P of the program memory."""

    key_dim: int = 3
    """Width K of keys and queries."""

    num_heads: int = 5
    """Attention heads H; each step composes H components of the program."""

    num_steps: int = 1
    """Steps J of the composition network; the program has R = J * H components."""

    num_least_used: int = 2
    """Least-used slots l_I that usage attention may favour; 0 switches gates and usage off."""

    controller_size: int = 8
    """Hidden width h of the composition network's LSTM."""

    sharpness: float = 1.0
    """Softmax temperature beta. 1 is the paper's equation, under which no weight can exceed
    e / (e + (P - 1) / e); raise it for attention that can settle on few slots."""

    residual: bool = True
    """Whether the program has the residual part Rho, a plain matrix gated by the input."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "key_dim", "num_heads", "num_steps", "controller_size"):
            require_positive(name, getattr(self, name))
        least = self.num_least_used
        if not isinstance(least, int) or not 0 <= least < self.num_slots:
            raise ValueError(
                f"num_least_used must be an integer in 0 .. num_slots - 1, got "
                f"num_least_used={self.num_least_used} with num_slots={self.num_slots}"
            )
        if not (math.isfinite(self.sharpness) and self.sharpness > 0):
            raise ValueError(f"sharpness must be a positive number, got {self.sharpness}")

    @property
    def num_components(self) -> int:
        """Components R of the active program."""
        return self.num_steps * self.num_heads


def require_positive(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
