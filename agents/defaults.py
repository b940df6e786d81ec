"""Default numbers of `A3C` and its command, except for those of the loss.

Those are fields of `ncrl.agents.learning.objective.Objective`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

DEFAULT_ENVS = 16
"""Environments that are built from an id or a factory, unless `n_envs` says otherwise."""

MAX_GRAD_NORM = 40.0
"""Limit on the gradient's norm."""

RMS_PROP_EPS = 0.1
"""Epsilon of RMSProp, inside the square root."""

BONUS_LEARNING_RATE = 1e-4
"""Of the networks behind an intrinsic reward."""

BONUS_WARMUP = 100_000
"""Timesteps of play from which an intrinsic reward gathers statistics before it counts."""

FEW_ENVS = 4
"""Fewer environments than this in this process count as few."""

IMAGE_HEADS = {"num_slots": 80, "num_heads": 15, "num_least_used": 5, "sharpness": 10.0}
"""Options of Neurocoder heads on images: the paper's sizes on Atari. With the paper's sharpness 1
they hardly attend."""


def image_heads(explores: bool) -> dict[str, Any]:
    """`IMAGE_HEADS`, and whether their residual program has the paper's gate.

    With an intrinsic reward they have it: seven seeds on two cores came to take the key of
    MontezumaRevenge in most games, while the only run without the gate had it in 15 of 100 games,
    and later in none (results/montezuma.md). Without an intrinsic reward the gate shuts the program
    off before anything is learnt (results/atari.md).
    """
    return {**IMAGE_HEADS, "residual_gate": explores}


class Defaults(NamedTuple):
    """Defaults that depend on what plays."""

    n_steps: int
    learning_rate: float
    """At the start; it falls linearly to 0."""
    gae_lambda: float
    use_rms_prop: bool
    """False means Adam."""
    small_updates: bool
    """Whether an update is made of a few environments (`sizes.envs_per_update`), not of all."""


FEW = Defaults(5, 1e-2, 1.0, use_rms_prop=True, small_updates=False)
"""For fewer than `FEW_ENVS` environments in this process. Rollouts are short, to make more updates:
tiny tasks end before rollouts of 20 timesteps have made a hundred."""

MANY = Defaults(20, 7e-4, 1.0, use_rms_prop=True, small_updates=False)
"""For all others."""

IMAGES = Defaults(20, 1e-3, 0.95, use_rms_prop=False, small_updates=True)
"""For those others whose policy sees images (`Cnn` in its name), as in `run_atari.py`."""


def defaults_for(num_envs: int, n_workers: int, sees_images: bool) -> Defaults:
    """The defaults for `num_envs` environments of all workers together."""
    if not n_workers and num_envs < FEW_ENVS:
        return FEW
    return IMAGES if sees_images else MANY
