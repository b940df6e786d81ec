"""Environments to train on: Atari games and small test environments, all built by factories."""

from envs.atari import AtariFactory, AtariVecEnv, atari, game_name

__all__ = ["AtariFactory", "AtariVecEnv", "atari", "game_name"]
