"""Sizes and switches of a Neurocoder layer, validated in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from ncrl.checks import nearest, require_choice, require_switch, whole_number

CHOICES = {
    "preset": ("paper", "official"),
    "controller": ("auto", "lstm", "linear", "projection"),
    "gate": ("slot-head", "slot", "head"),
    "memory_init": ("xavier", "orthogonal"),
    "key_mode": ("cb", "lk"),
}
"""The values that the named switches can take; the first is the default."""

SWITCHES = ("learned_sharpness", "residual", "residual_gate", "detach_usage", "frozen_controller")
"""What is either on or off."""

PAPER_ONLY = (
    "gate",
    "learned_sharpness",
    "residual_gate",
    "residual_rank",
    "detach_usage",
    "memory_init",
)
"""Switches of the paper's equations that the authors' published layer has not got."""

PROJECTION_NEEDS = {"num_least_used": 0, "learned_sharpness": False, "preset": "paper"}
"""What goes with `controller="projection"`."""


@dataclass(frozen=True)
class NeurocoderConfig:
    """Everything that fixes a Neurocoder layer except its input and output widths.

    Raises:
        ValueError: at construction, for an impossible size or combination; the message names every
            value involved.
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
    """Least-used slots l_I that usage attention may favour; 0 switches gates and usage off, which
    leaves content attention alone: cheaper, and with one step nearly as expressive."""

    controller_size: int = 8
    """Hidden width h of the composition network. The official LSTM has its own width, 3HK + 1."""

    sharpness: float = 1.0
    """Factor beta of the cosines in the softmax, an inverse temperature. 1 is the paper's equation,
    under which no weight can exceed e / (e + (P - 1) / e), so that with many slots every input gets
    nearly the same program; raise it (10 is typical) for attention that can settle on few slots.
    With `preset="official"` it multiplies the authors' own factor."""

    learned_sharpness: bool = False
    """Whether beta is trained, through its logarithm (`composition.log_sharpness`), from
    `sharpness` on. Spares a search; costs one parameter."""

    residual: bool = True
    """Whether the program has the residual part Rho, a plain matrix. It carries most of the
    accuracy on images, and costs as much as the linear layer that it is."""

    residual_gate: bool = True
    """Whether the residual part, if there is one, is scaled by a gate of the input and the smallest
    singular value (Eq. 7), or added as it is. In policies both tend to shrink, and the matrix with
    them learns less: `ncrl.agents.A3C` goes without on images."""

    residual_rank: int | None = None
    """Rank of the residual: None stores Rho [in, out] whole; r stores two factors [in, r] and
    [r, out], for r (in + out) instead of in * out parameters and operations."""

    controller: str = "auto"
    """What turns the input into attention: `lstm` reads it J times with memory of the steps before;
    `linear` (one step only) is a linear bottleneck of the same width, the ablation of the LSTM.
    `projection` is for memories that grow: a head's query is a random projection of the input that
    is never trained, and slots store a key for each head, the same for u, v and s: by what old
    slots are found cannot drift. It needs `num_least_used=0`.
    `auto` is the preset's own: `lstm`, but `linear` for the single step of `official`."""

    gate: str = "slot-head"
    """What shares one gate between content and usage attention: nothing (`slot-head`, the paper's
    text read literally, 3HP gates a step), the heads (`slot`, 3P) or the slots (`head`, 3H). Gates
    are most of the layer's cost when P is large; `head` costs next to nothing."""

    detach_usage: bool = False
    """Whether usage counts as a constant in the gradient: steps then do not learn to steer later
    steps through what they use."""

    frozen_controller: bool = False
    """Whether only the memory, residual and bias are trained: composition network, key networks and
    residual gate stay as initialised (`requires_grad=False`). The authors' first public code
    trained this way; a cheap test of what learned attention contributes."""

    memory_init: str = "xavier"
    """`xavier` (uniform), or `orthogonal`: rows of M_U and M_V start orthonormal (columns, where
    there are more slots than columns), at the minimum of the orthogonality loss."""

    preset: str = "paper"
    """`paper`: the equations of the paper. `official`: everything in which the authors' published
    layer differs from it (see `ncrl.neurocoder.official`)."""

    key_mode: str = "cb"
    """`official` only: whether keys are computed from the memory's content (`cb`, all that the
    authors' script runs) or stored as columns of their own (`lk`)."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "key_dim", "num_heads", "num_steps", "controller_size"):
            whole_number(name, getattr(self, name))
        if self.residual_rank is not None:
            whole_number("residual_rank", self.residual_rank)
        whole_number("num_least_used", self.num_least_used, least=0)
        if self.num_least_used >= self.num_slots:
            raise ValueError(
                "num_least_used must be less than num_slots, got "
                f"num_least_used={self.num_least_used} with num_slots={self.num_slots}"
            )
        sharp = self.sharpness
        if not (isinstance(sharp, Real) and math.isfinite(sharp) and sharp > 0):
            raise ValueError(f"sharpness must be a positive number, got {sharp!r}")
        for name in SWITCHES:
            require_switch(name, getattr(self, name))
        for name, choices in CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        self._check_combination()

    def _check_combination(self) -> None:
        if self.controller in ("linear", "projection") and self.num_steps > 1:
            raise ValueError(
                f"controller={self.controller!r} reads its input once, got num_steps="
                f"{self.num_steps}; use controller='lstm' for several steps"
            )
        if self.controller == "projection":
            for name, needed in PROJECTION_NEEDS.items():
                if getattr(self, name) != needed:
                    raise ValueError(
                        f"controller='projection' needs {name}={needed!r}, got "
                        f"{getattr(self, name)!r}"
                    )
        if self.residual_rank is not None and not self.residual:
            raise ValueError(f"residual_rank={self.residual_rank} needs residual=True")
        defaults = {field.name: field.default for field in fields(self)}
        if self.preset == "official":
            for name in PAPER_ONLY:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} does not exist with preset='official'; "
                        f"leave it at {defaults[name]!r}"
                    )
        elif self.key_mode != defaults["key_mode"]:
            raise ValueError(f"key_mode={self.key_mode!r} needs preset='official'")

    @property
    def num_components(self) -> int:
        """Components R of the active program."""
        return self.num_steps * self.num_heads


def configured(
    config: NeurocoderConfig | None, preset: str, options: Mapping[str, Any]
) -> NeurocoderConfig:
    """`config`, or that of the preset if None, with some fields changed; TypeError for others."""
    known = [entry.name for entry in fields(NeurocoderConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; nearest: {nearest(name, known)}")
    if config is None:
        config = NeurocoderConfig(preset=preset)
    elif not isinstance(config, NeurocoderConfig):
        raise ValueError(
            f"config must be a NeurocoderConfig, got {config!r:.80}; sizes are given by name, such "
            "as num_slots=80"
        )
    return replace(config, **options)
