"""One visible game of a trained model: for a film of it, and for the rooms that it entered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.atari.video import Moment, view_heads
from ncrl.envs import AtariPlayer
from ncrl.sb3 import Latent


class Decision(NamedTuple):
    """What the model made of one timestep."""

    images: Tensor  # [1, stack, height, width]
    latent: Latent
    distribution: Distribution
    action: int


@torch.no_grad()
def play(model: A3C, player: AtariPlayer, *, deterministic: bool) -> Iterator[Decision]:
    """Play one whole game, stopping at every decision before its action is taken."""
    policy = model.policy
    policy.set_training_mode(False)
    state, starts = policy.initial_state(1), torch.ones(1, dtype=torch.bool, device=policy.device)
    obs, game_over, lives = player.reset(), False, 0
    while not game_over:
        images = torch.from_numpy(obs).to(policy.device)
        latent, state = policy.encode(images, state, starts)
        distribution = policy.distribution(latent)
        action = int(distribution.get_actions(deterministic=deterministic))
        yield Decision(images, latent, distribution, action)
        obs, _, game_over, remaining = player.step(action)
        # In training a lost life starts the LSTM anew where it cuts the return.
        life_lost = player.factory.rules.life_ends_return and remaining < lives
        starts = torch.full_like(starts, life_lost)
        lives = remaining


@torch.no_grad()
def moments(model: A3C, player: AtariPlayer, *, deterministic: bool) -> Iterator[Moment]:
    """One whole game for a film: each timestep beside what the heads attend to."""
    names = player.factory.action_meanings
    for seen in play(model, player, deterministic=deterministic):
        categorical = seen.distribution.distribution
        assert isinstance(categorical, torch.distributions.Categorical)
        source = None if model.exploration is None else model.exploration.source
        yield Moment(
            frame=player.frame(),
            score=player.score,
            timestep=player.timesteps,
            action=names[seen.action],
            value=float(model.policy.values(seen.latent)),
            probabilities=categorical.probs[0].cpu().numpy(),
            action_names=names,
            heads=view_heads(model.policy, seen.latent),
            bonus=None if source is None else float(source.score(seen.images)),
        )
