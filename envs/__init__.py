"""Environments to train on: Atari games and small ones, each built by a picklable factory.

A factory is called with a batch size and a seed and returns a Stable-Baselines3 vector environment.
Importing this package does not load ale-py; naming a game does.
"""

if __name__ != "ncrl.envs":
    # Found in a clone under its folder's name. It is the same package, not a second copy of it.
    import importlib
    import sys

    importlib.import_module("ncrl.envs")
    for name, module in list(sys.modules.items()):
        if name == "ncrl.envs" or name.startswith("ncrl.envs."):
            sys.modules[name.removeprefix("ncrl.")] = module

from ncrl.envs.atari import AtariFactory, AtariVecEnv, atari, game_name
from ncrl.envs.player import ROOM_ADDRESS, AtariPlayer
from ncrl.envs.small import GymFactory, key_and_door, light, masked_cartpole, remember

__all__ = [
    "ROOM_ADDRESS",
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
