"""Numbers that `A3C` and its command take where nobody gives them, besides those of the loss.

The loss's are fields of `ncrl.agents.learning.objective.Objective`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

DEFAULT_ENVS = 16
"""Environments that are built from an id or a factory, unless `n_envs` says otherwise."""

MAX_GRAD_NORM = 40.0
"""Limit on the gradient's norm."""

FEW_ENVS = 4
"""Number of environments in this process from which on they are many."""

IMAGE_HEADS = {"num_slots": 80, "num_heads": 15, "num_least_used": 5, "sharpness": 10.0}
"""Options of Neurocoder heads on images: the paper's sizes on Atari. With the paper's sharpness 1
they hardly attend."""


def image_heads(explores: bool) -> dict[str, Any]:
    """`IMAGE_HEADS`, and whether their residual program has the paper's gate.

    With an intrinsic reward it has: seven seeds on two cores so came to take the key of
    MontezumaRevenge in most games; the only run without had it in 15 of 100, and then in none
    (results/montezuma.md). Without a reward of that kind the gate shuts the program off before
    anything is learnt (results/atari.md).
    """
    return {**IMAGE_HEADS, "residual_gate": explores}


class Defaults(NamedTuple):
    """Of an agent."""

    n_steps: int
    learning_rate: float
    """At the start; it falls linearly to 0."""
    gae_lambda: float
    use_rms_prop: bool
    """False: Adam."""
    small_updates: bool
    """Whether an update is made of a few games (`games_per_update`), not of all environments."""


FEW = Defaults(5, 1e-2, 1.0, use_rms_prop=True, small_updates=False)
"""Of fewer than `FEW_ENVS` environments in this process. They make small updates, so that there
must be more of them: tiny tasks end before rollouts of 20 have made a hundred."""

MANY = Defaults(20, 7e-4, 1.0, use_rms_prop=True, small_updates=False)
"""Of all others."""

IMAGES = Defaults(20, 1e-3, 0.95, use_rms_prop=False, small_updates=True)
"""Of those others whose policy sees images (`Cnn` in its name). `run_atari.py` plays with them."""


def defaults_for(num_envs: int, n_workers: int, sees_images: bool) -> Defaults:
    """The row of the table for an agent, of environments of all workers together."""
    if not n_workers and num_envs < FEW_ENVS:
        return FEW
    return IMAGES if sees_images else MANY
