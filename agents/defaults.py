"""Numbers that `A3C` and its command take where nobody gives them, besides those of the loss.

The loss's are fields of `ncrl.agents.learning.objective.Objective`.
"""

DEFAULT_ENVS = 16
"""Environments that are built from an id or a factory, unless `n_envs` says otherwise."""

FEW_ENVS = 4
"""Number of environments in this process from which on they are many."""

FEW_STEPS, MANY_STEPS = 5, 20
"""Defaults of `n_steps`. Few environments make small updates, so that there must be more of them:
tiny tasks end before rollouts of 20 have made a hundred."""

FEW_RATE, MANY_RATE = 1e-2, 7e-4
"""Defaults of the learning rate at the start."""
