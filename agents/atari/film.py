"""One visible game of a trained model: for a film of it, and for the rooms that it entered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.atari.video import GameVideo, Moment, view_heads
from ncrl.envs import AtariPlayer
from ncrl.sb3 import Latent

FILM_FPS = 15
"""Timesteps per second of video: the speed at which the game was made to be played."""


class Decision(NamedTuple):
    """One timestep: what the model saw, and what it made of it."""

    timestep: int
    images: Tensor
    """[1, stack, height, width]."""

    latent: Latent
    distribution: Distribution
    action: int
    score: float
    """Raw rewards of the game before the action."""


def play(
    model: A3C, player: AtariPlayer, watch: Callable[[Decision], None], *, deterministic: bool
) -> float:
    """Play one whole game; returns its raw score.

    Args:
        model: who plays.
        player: the game.
        watch: is shown every decision before its action is taken.
        deterministic: take the likeliest action, not a sampled one.
    """
    policy = model.policy
    policy.set_training_mode(False)
    state, starts = policy.initial_state(1), torch.ones(1, dtype=torch.bool, device=policy.device)
    obs, score, timestep, game_over, lives = player.reset(), 0.0, 0, False, 0
    with torch.no_grad():
        while not game_over:
            images = torch.from_numpy(np.array(obs)).to(policy.device)
            latent, state = policy.encode(images, state, starts)
            distribution = policy.distribution(latent)
            action = int(distribution.get_actions(deterministic=deterministic))
            watch(Decision(timestep, images, latent, distribution, action, score))
            obs, reward, game_over, remaining = player.step(action)
            score += reward
            timestep += 1
            # In training a lost life starts the LSTM anew where it cuts the return.
            life_lost = player.factory.rules.life_ends_return and remaining < lives
            starts = torch.full_like(starts, life_lost)
            lives = remaining
    return score


def film(model: A3C, player: AtariPlayer, path: Path, *, deterministic: bool) -> float:
    """Write a video of one game beside what the heads attend to; returns its raw score."""
    names = player.factory.action_meanings

    def add(seen: Decision) -> None:
        video.add(
            Moment(
                frame=player.frame(),
                score=seen.score,
                timestep=seen.timestep,
                action=names[seen.action],
                value=float(model.policy.values(seen.latent)),
                probabilities=probabilities(seen.distribution),
                action_names=names,
                heads=view_heads(model.policy, seen.latent),
                bonus=bonus(model, seen.images),
            )
        )

    with GameVideo(path, fps=FILM_FPS) as video:
        return play(model, player, add, deterministic=deterministic)


def visit(model: A3C, player: AtariPlayer, *, deterministic: bool) -> tuple[float, int, set[int]]:
    """Play one game; returns its raw score, its timesteps and the rooms that it entered."""
    rooms: list[int] = []
    score = play(
        model, player, lambda _seen: rooms.append(player.room()), deterministic=deterministic
    )
    return score, len(rooms), set(rooms)


def bonus(model: A3C, images: Tensor) -> float | None:
    """How new the images [1, stack, height, width] are to a model with an intrinsic reward."""
    exploration = model.exploration
    return None if exploration is None else float(exploration.source.score(images))


def probabilities(distribution: Distribution) -> np.ndarray:
    """Of the actions of one game, [num_actions]."""
    categorical = distribution.distribution
    assert isinstance(categorical, torch.distributions.Categorical)
    return categorical.probs[0].cpu().numpy()
