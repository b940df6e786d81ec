"""One visible game of a trained model: for a film of it, and for the rooms that it entered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.atari.video import GameVideo, Moment, view_heads
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
def film(model: A3C, player: AtariPlayer, path: Path, *, deterministic: bool) -> None:
    """Write a video of one game beside what the heads attend to."""
    names = player.factory.action_meanings
    with GameVideo(path) as video:
        for seen in play(model, player, deterministic=deterministic):
            bonus = None
            if model.exploration is not None:
                bonus = float(model.exploration.source.score(seen.images))
            categorical = seen.distribution.distribution
            assert isinstance(categorical, torch.distributions.Categorical)
            video.add(
                Moment(
                    frame=player.frame(),
                    score=player.score,
                    timestep=player.timesteps,
                    action=names[seen.action],
                    value=float(model.policy.values(seen.latent)),
                    probabilities=categorical.probs[0].cpu().numpy(),
                    action_names=names,
                    heads=view_heads(model.policy, seen.latent),
                    bonus=bonus,
                )
            )
