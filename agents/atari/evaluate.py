"""Playing whole games with a trained run, for its score."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from stable_baselines3.common.evaluation import evaluate_policy

from ncrl.agents import A3C
from ncrl.agents.atari.config import FRAMES_PER_TIMESTEP, camel_case, make_factory, stored_config
from ncrl.agents.atari.film import moments, play
from ncrl.agents.atari.train import build_model
from ncrl.agents.atari.video import check_path, write_video
from ncrl.agents.runs.checkpoints import load_weights, newest_checkpoint
from ncrl.envs import ROOM_ADDRESS, AtariFactory, AtariPlayer
from ncrl.settings import configure, shown
from ncrl.shell.hardware import choose_device
from ncrl.shell.screen import Screen

MOST_EPISODES = 1_000_000

EVALUATION_ENVS = 8
"""Games that are evaluated side by side."""

UNPLAYED = 1_000_000_007
"""Added to the seed of a run: games that training has not played."""


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
    if not 1 <= episodes <= MOST_EPISODES:
        raise ValueError(f"episodes must lie in 1 .. {MOST_EPISODES}, got {shown(episodes)}")
    config = configure(flags, stored_config(path), "the flags")
    choose_device(config.device)
    if modes["video"] is not None:
        check_path(Path(modes["video"]))
    weights, after = chosen_weights(path, best=bool(modes["best"]))
    screen.line(f"playing {episodes} whole games with {weights}")
    model = build_model(config, n_workers=0, n_envs=1, batch_size=None, cluster=None)
    load_weights(model, weights, optimizer=False)
    deterministic = bool(modes["deterministic"])
    factory, seed = make_factory(config), (config.seed + UNPLAYED) % 2**31
    play_all = visit_rooms if factory.game in ROOM_ADDRESS else play_games
    scores, lengths = play_all(model, factory, seed, episodes, deterministic, screen)
    rules = factory.describe()
    screen.line(
        f"{camel_case(factory.game)} {after}raw score of {episodes} whole "
        f"games: mean {statistics.fmean(scores):.2f}, std {statistics.pstdev(scores):.2f}, "
        f"min {min(scores):g}, max {max(scores):g}; mean length {statistics.fmean(lengths):.0f} "
        "timesteps"
    )
    screen.line(
        f"protocol {config.protocol} (sticky actions {rules['sticky_actions']:g}, "
        f"{rules['action_set']} actions, no-ops {rules['no_ops']}), "
        f"{'likeliest' if deterministic else 'sampled'} actions, "
        f"{'best model' if modes['best'] else 'last checkpoint'}, seed {config.seed}"
    )
    if modes["video"] is not None:
        screen.line("filming one more game")
        player = AtariPlayer(factory, seed)
        write_video(Path(modes["video"]), moments(model, player, deterministic=deterministic))
        screen.line(f"video of one game (score {player.score:g}): {modes['video']}")
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
