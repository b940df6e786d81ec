"""Environments to train on: Atari games and small ones, each built by a picklable factory.

A factory is called with a batch size and a seed and returns a Stable-Baselines3 vector environment.
Importing this package does not load ale-py; naming a game does.
"""

if __name__ != "ncrl.envs":  # a second copy of every class would not be the first's
    raise ImportError("this folder is the package ncrl.envs: import ncrl.envs")

from ncrl.envs.atari import AtariFactory, AtariVecEnv, atari, game_name
from ncrl.envs.player import AtariPlayer
from ncrl.envs.small import GymFactory, key_and_door, light, masked_cartpole, remember

__all__ = [
    "AtariFactory",
    "AtariPlayer",
    "AtariVecEnv",
    "GymFactory",
    "atari",
    "game_name",
    "key_and_door",
    "light",
    "masked_cartpole",
    "remember",
]
