"""Filming one game of a trained model, beside what its heads attend to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.distributions import Distribution

from ncrl.agents import A3C
from ncrl.agents.atari.video import GameVideo, Moment, view_heads
from ncrl.envs import AtariFactory, AtariPlayer

FILM_FPS = 15
"""Timesteps per second of video: the speed at which the game was made to be played."""


def film(model: A3C, factory: AtariFactory, seed: int, path: Path, deterministic: bool) -> float:
    """Write a video of one game beside what the heads attend to; returns its raw score."""
    player = AtariPlayer(factory, seed)
    policy = model.policy
    policy.set_training_mode(False)
    state, starts = policy.initial_state(1), torch.ones(1, dtype=torch.bool, device=policy.device)
    obs, score, timestep, game_over, lives = player.reset(), 0.0, 0, False, 0
    with GameVideo(path, fps=FILM_FPS) as video, torch.no_grad():
        while not game_over:
            images = torch.from_numpy(np.array(obs)).to(policy.device)
            latent, state = policy.encode(images, state, starts)
            distribution = policy.distribution(latent)
            action = int(distribution.get_actions(deterministic=deterministic))
            video.add(
                Moment(
                    frame=player.frame(),
                    score=score,
                    timestep=timestep,
                    action=factory.action_meanings[action],
                    value=float(policy.values(latent)),
                    probabilities=probabilities(distribution),
                    action_names=factory.action_meanings,
                    heads=view_heads(policy, latent),
                )
            )
            obs, reward, game_over, remaining = player.step(action)
            score += reward
            timestep += 1
            # In training a lost life starts the LSTM anew where it cuts the return.
            life_lost = factory.rules.life_ends_return and remaining < lives
            starts = torch.full_like(starts, life_lost)
            lives = remaining
    return score


def probabilities(distribution: Distribution) -> np.ndarray:
    """Of the actions of one game, [num_actions]."""
    categorical = distribution.distribution
    assert isinstance(categorical, torch.distributions.Categorical)
    return categorical.probs[0].cpu().numpy()
