"""Playing whole games with a trained run: for its score, the rooms that it enters, or a film."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.atari.config import FRAMES_PER_TIMESTEP, camel_case, make_factory, stored_config
from ncrl.agents.atari.train import make_model
from ncrl.agents.atari.video import Moment, check_path, view_heads, write_video
from ncrl.agents.runs.checkpoints import load_weights, newest_checkpoint
from ncrl.checks import require_range
from ncrl.envs import ROOM_ADDRESS, AtariFactory, AtariPlayer
from ncrl.envs.atari import life_lost
from ncrl.files import given_path
from ncrl.sb3 import Latent
from ncrl.settings import configure
from ncrl.shell.hardware import choose_device
from ncrl.shell.screen import Screen

EVALUATION_ENVS = 8
"""Games that are evaluated side by side."""

UNPLAYED = 1_000_000_007
"""Added to the seed of a run, for games that training has not played."""


def evaluate(path: Path, flags: dict[str, Any], modes: dict[str, Any], screen: Screen) -> int:
    """Play whole games and print the raw score; returns the exit code."""
    for name in ("resume", "config", "profile"):
        if modes[name] is not None:
            raise ValueError(f"--evaluate and --{name} exclude each other")
    allowed = {"seed", "device"}
    if extra := set(flags) - allowed:
        raise ValueError(
            f"--evaluate plays the run as it was trained; leave --{min(extra)} out "
            f"(allowed: {', '.join(sorted(allowed))})"
        )
    episodes = 10 if modes["episodes"] is None else modes["episodes"]
    require_range("episodes", episodes, 1 if modes["video"] is None else 0, 10**6)
    config = configure(flags, stored_config(path), "the flags")
    choose_device(config.device)
    film = None if modes["video"] is None else given_path(modes["video"])
    if film is not None:
        check_path(film)
    weights, after = chosen_weights(path, best=bool(modes["best"]))
    games = "1 whole game" if episodes == 1 else f"{episodes} whole games"
    screen.line(f"playing {f'{games} ' if episodes else ''}with {weights}")
    model = make_model(config, n_workers=0, n_envs=1, batch_size=None, cluster=None)
    load_weights(model, weights, optimizer=False)
    deterministic = bool(modes["deterministic"])
    factory, seed = make_factory(config), (config.seed + UNPLAYED) % 2**31
    if episodes:
        play_all = visit_rooms if factory.game in ROOM_ADDRESS else play_games
        scores, lengths = play_all(model, factory, seed, episodes, deterministic, screen)
        screen.line(
            f"{camel_case(factory.game)} {after}raw score of {games}: "
            f"mean {statistics.fmean(scores):.2f}, std {statistics.pstdev(scores):.2f}, "
            f"min {min(scores):g}, max {max(scores):g}; "
            f"mean length {statistics.fmean(lengths):.0f} timesteps"
        )
    rules = factory.describe()
    screen.line(
        f"protocol {config.protocol} (sticky actions {rules['sticky_actions']:g}, "
        f"{rules['action_set']} actions, no-ops {rules['no_ops']}), games of at most "
        f"{config.game_frames:,} frames, "
        f"{'likeliest' if deterministic else 'sampled'} actions, "
        f"{'best model' if modes['best'] else 'last checkpoint'}, seed {config.seed}"
    )
    if film is not None:
        screen.line(f"filming one {'more ' if episodes else ''}game")
        player = AtariPlayer(factory, seed)
        write_video(film, moments(model, player, deterministic=deterministic))
        screen.line(f"video of one game (score {player.score:g}): {film}")
    return 0


def chosen_weights(run: Path, *, best: bool) -> tuple[Path, str]:
    """The file to play with, and in words after how much training it was written."""
    if best:
        path = run / "best_model.zip"
        if not path.is_file():
            raise ValueError(f"{run} has no best_model.zip yet; leave --best out")
        return path, "with its best model: "
    checkpoint = newest_checkpoint(run / "checkpoints")
    frames = checkpoint.timesteps * FRAMES_PER_TIMESTEP
    return checkpoint.path, f"after {checkpoint.timesteps:,} timesteps ({frames:,} frames): "


def play_games(
    model: A3C, factory: AtariFactory, seed: int, episodes: int, deterministic: bool, screen: Screen
) -> tuple[list[float], list[int]]:
    """Raw scores and lengths (in timesteps) of whole games, each told when it is over."""
    told = 0

    def tell(scores: list[float], lengths: list[int]) -> None:
        nonlocal told
        for score, length in zip(scores[told:], lengths[told:], strict=True):
            told += 1
            screen.line(f"game {told} of {episodes}: score {score:g}, {length:,} timesteps")

    env = factory(min(episodes, EVALUATION_ENVS), seed)
    scores, lengths = evaluate_policy(
        model,
        env,
        n_eval_episodes=episodes,
        deterministic=deterministic,
        callback=lambda seen, _: tell(seen["episode_rewards"], seen["episode_lengths"]),
        return_episode_rewards=True,
    )
    env.close()
    assert isinstance(scores, list) and isinstance(lengths, list)
    tell(scores, lengths)
    return scores, lengths


def visit_rooms(
    model: A3C, factory: AtariFactory, seed: int, episodes: int, deterministic: bool, screen: Screen
) -> tuple[list[float], list[int]]:
    """`play_games` for a game of rooms, one after the other, with the rooms that were entered."""
    results: list[tuple[float, int]] = []
    entered: set[int] = set()
    for game in range(episodes):
        player = AtariPlayer(factory, (seed + game) % 2**31)
        rooms = {player.room() for _ in play(model, player, deterministic=deterministic)}
        screen.line(
            f"game {game + 1} of {episodes}: score {player.score:g}, {player.timesteps:,} "
            f"timesteps, rooms {', '.join(map(str, sorted(rooms)))}"
        )
        results.append((player.score, player.timesteps))
        entered |= rooms
    screen.line(f"rooms entered: {len(entered)} ({', '.join(map(str, sorted(entered)))})")
    return [score for score, _ in results], [length for _, length in results]


# One visible game.


class Decision(NamedTuple):
    """What the model made of one timestep."""

    images: Tensor  # [1, stack, height, width]
    latent: Latent
    distribution: Distribution
    action: int


@torch.no_grad()
def play(model: A3C, player: AtariPlayer, *, deterministic: bool) -> Iterator[Decision]:
    """Play one whole game; yields every decision before its action is taken."""
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
        # As in training, where the LSTM starts anew when the return is cut.
        is_cut = player.factory.rules.life_ends_return and life_lost(lives, remaining)
        starts = torch.full_like(starts, is_cut)
        lives = remaining


@torch.no_grad()
def moments(model: A3C, player: AtariPlayer, *, deterministic: bool) -> Iterator[Moment]:
    """One whole game for a film: each timestep beside what the heads attend to."""
    names = player.factory.action_meanings
    source = None if model.exploration is None else model.exploration.source
    for seen in play(model, player, deterministic=deterministic):
        categorical = seen.distribution.distribution
        assert isinstance(categorical, torch.distributions.Categorical)
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
