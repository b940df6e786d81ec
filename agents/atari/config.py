"""The configuration of a run on an Atari game: its settings, and how flags and files make one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ncrl import NeurocoderConfig
from ncrl.agents.arguments import check_batch
from ncrl.agents.defaults import (
    BONUS_LEARNING_RATE,
    BONUS_WARMUP,
    DEFAULT_ENVS,
    IMAGE_HEADS,
    IMAGES,
    MAX_GRAD_NORM,
    RMS_PROP_EPS,
    image_heads,
)
from ncrl.agents.learning.intrinsic import SOURCES
from ncrl.agents.learning.objective import Objective
from ncrl.agents.playing.sizes import Sizes, available_cores, choose_sizes, worker_cores
from ncrl.agents.playing.supervision import Limits
from ncrl.agents.runs.directory import RunDirectory
from ncrl.envs import AtariFactory, atari
from ncrl.files import given_path
from ncrl.layers import LAYERS
from ncrl.settings import configure, same_as, setting
from ncrl.yaml_files import find_config, read_yaml

FRAMES_PER_TIMESTEP = 4

CONFIGS = (Path(__file__).parent / "configs").resolve()
"""The settings of this package: a link to `configs/atari/` in a clone, a folder once installed."""

EXPLORING_ENVS = 64
"""About so many games with an intrinsic reward. More than 16 find more, and many more than 64 learn
less from the same frames (results/atari.md, results/montezuma.md)."""

EXPLORING_PER_WORKER = 4
"""With an intrinsic reward, games of a worker are a multiple of this. With fewer, most of its time
goes into the calls that choose actions."""

HARD_GAMES = {
    "montezuma_revenge": "0 to 2 points after 200 million frames",
    "private_eye": "about 100 points after 200 million frames",
    "pitfall": "0 points after 200 million frames",
    "venture": "0 points after 200 million frames",
    "frostbite": "about 300 points (PPO 1,600) after 200 million frames",
}
"""Games whose rewards are rare, and what actor-critics without a bonus are known to reach there
(results/atari.md has two of them)."""

EXPLORED = {
    "montezuma_revenge": "0 for 2 to 13 million frames; most runs then took the key in most "
    "games, and had 143 to 475 points a game at 10 to 12 million; with today's defaults one had "
    "1,047 at 20 million and, gone on with, 1,850 at 36 (results/montezuma.md)",
}
"""What our own runs with a bonus reached."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that fixes a run. Flags, YAML keys and `config.yaml` have these names."""

    # The run.
    env: str = setting("", "game, such as Pong, montezuma_revenge or ALE/Pong-v5")
    protocol: str = setting(
        "machado",
        "machado: sticky actions 0.25, 18 actions, a game ends when it is over; classic: no-ops, "
        "minimal actions, a lost life cuts the return",
        choices=("machado", "classic"),
    )
    game_frames: int = setting(
        108_000, "frames after which a game is cut short; 108,000: 30 minutes", low=1, high=10**9
    )
    frames: int = setting(10_000_000, "emulator frames in all, 4 per timestep", low=1, high=10**12)
    seed: int = setting(0, "seed of everything", low=0, high=2**31 - 1)
    device: str = setting("auto", "where the learner computes", choices=("auto", "cpu", "cuda"))
    logdir: str = setting("runs", "folder in which the run directory is made")
    workers: int | None = setting(
        None, "worker processes, 0: none, reproducible (default: by cores, GPU)", low=0, high=1024
    )
    games: int | None = setting(
        None,
        "games of all workers (default: 16, or 8 each if that is more; with a bonus about 64)",
        low=1,
        high=16_384,
    )
    envs_per_worker: int | None = setting(None, "games per worker, not --games", low=1, high=1024)
    cluster: str | None = setting(
        None, "play on a Ray cluster: auto, host:port of its head, or none (docs/cluster.md)"
    )
    stack: int = setting(1, "timesteps shown in one observation", low=1, high=64)
    # The network.
    layer: str = setting("neurocoder", "heads of actor and critic", choices=tuple(LAYERS))
    encoder: str = setting(
        "a3c", "convolutional trunk; paper is the slowest", choices=("a3c", "nature", "paper")
    )
    lstm_hidden_size: int = setting(512, "width of the LSTM", low=1, high=8192)
    num_slots: int = setting(
        IMAGE_HEADS["num_slots"], "Neurocoder: slots P of the program memory", low=1, high=65_536
    )
    key_dim: int = setting(
        NeurocoderConfig.key_dim, "Neurocoder: width K of keys", low=1, high=4096
    )
    num_heads: int = setting(
        IMAGE_HEADS["num_heads"], "Neurocoder: attention heads H", low=1, high=4096
    )
    num_steps: int = setting(
        NeurocoderConfig.num_steps, "Neurocoder: steps J of the controller", low=1, high=256
    )
    num_least_used: int = setting(
        IMAGE_HEADS["num_least_used"], "Neurocoder: least-used slots l_I", low=0, high=65_536
    )
    controller_size: int = setting(
        NeurocoderConfig.controller_size, "Neurocoder: width of the controller", low=1, high=4096
    )
    sharpness: float = setting(
        IMAGE_HEADS["sharpness"], "Neurocoder: factor in the softmax; 1 in the paper", low=1e-6
    )
    residual: bool = setting(True, "Neurocoder: whether programs have the residual part")
    residual_gate: bool | None = setting(
        None, "Neurocoder: whether a gate scales that part, as in the paper (default: with a bonus)"
    )
    # The algorithm.
    n_steps: int = setting(IMAGES.n_steps, "timesteps per rollout", low=1, high=100_000)
    batch_size: int | None = setting(
        None,
        "timesteps per update (default: of 4 games, up to 8 on a GPU, up to 32 with a bonus)",
        low=1,
        high=10**9,
    )
    optimizer: str = setting(
        "adam", "adam, or rmsprop as in A3C (--config a3c)", choices=("adam", "rmsprop")
    )
    learning_rate: float = setting(IMAGES.learning_rate, "learning rate at the start", low=0)
    anneal: bool = setting(True, "whether the learning rate falls linearly to 0")
    gamma: float = same_as(Objective, "gamma")
    gae_lambda: float = setting(IMAGES.gae_lambda, "1 for n-step returns", low=0, high=1)
    ent_coef: float = same_as(Objective, "ent_coef")
    entropy_floor: float = same_as(Objective, "entropy_floor")
    vf_coef: float = same_as(Objective, "vf_coef")
    max_grad_norm: float = setting(MAX_GRAD_NORM, "limit on the gradient's norm", low=0)
    rms_prop_eps: float = setting(RMS_PROP_EPS, "rmsprop: epsilon, inside the root", low=0)
    orth_coef: float = same_as(Objective, "orth_coef")
    balance_coef: float = same_as(Objective, "balance_coef")
    correction: str = same_as(Objective, "correction")
    # Exploration.
    intrinsic_reward: str = setting(
        "auto",
        "bonus for what is new; auto: snd for games whose rewards are rare, none for all others",
        choices=("auto", "none", *SOURCES),
    )
    int_coef: float = same_as(Objective, "int_coef")
    ext_coef: float = same_as(Objective, "ext_coef")
    int_gamma: float = same_as(Objective, "int_gamma")
    imitation_coef: float = same_as(Objective, "imitation_coef")
    bonus_encoder: str = setting(
        "a3c", "rnd and snd: size of target and predictor", choices=("a3c", "nature")
    )
    bonus_learning_rate: float = setting(
        BONUS_LEARNING_RATE, "rnd and snd: learning rate", low=1e-9
    )
    update_proportion: float | None = setting(
        None,
        "rnd and snd: share of timesteps learnt from (default: all; half with over 32 games)",
        low=1e-3,
        high=1,
    )
    bonus_warmup: int = setting(
        BONUS_WARMUP, "bonus: timesteps to gather statistics", low=0, high=10**12
    )
    # What is written.
    log_every: int = setting(
        10, "rollouts of all games between points of the curves", low=1, high=10**9
    )
    checkpoint_every: int = setting(1_000_000, "frames between checkpoints", low=1, high=10**12)
    keep_checkpoints: int = setting(3, "checkpoints to keep", low=1, high=10**6)
    stop_on_save_error: bool = setting(False, "whether a full disk ends the run")
    # Workers.
    heartbeat_timeout: float = setting(
        Limits.heartbeat_timeout, "seconds until a silent worker is replaced", low=0.1, high=10**6
    )
    max_restarts: int = setting(
        Limits.max_restarts,
        "failures in a row that a worker may have; four times as many in 10 minutes",
        low=0,
        high=1000,
    )


BASELINE_OPTIONS: dict[str, dict[str, Any]] = {
    "hypernet": {"num_layers": 2, "hidden": 192},
    "film": {"num_layers": 2, "hidden": 64},
    "moe": {"num_experts": 10, "top_k": 5},
    "nsm": {"num_slots": 5, "key_dim": 5},
}
"""Options of the baselines' heads, from the paper's search grids; but HyperNet's width is the one
that makes 3.65 million parameters with the encoder `paper`, where the paper prints 3.6 million."""

FIXED_FIELDS = (
    *("env", "protocol", "stack", "layer", "encoder", "lstm_hidden_size", "num_slots", "key_dim"),
    *("num_heads", "num_steps", "num_least_used", "controller_size", "sharpness", "residual"),
    *("residual_gate", "optimizer", "seed", "intrinsic_reward", "bonus_encoder", "logdir"),
)
"""Settings that a resumed run cannot change. With others, weights or optimiser would not fit, or
mean something else; random numbers and the directory stay those of the run."""

EXPLORING: dict[str, Any] = {
    "frames": 20_000_000,
    "game_frames": 18_000,
    "gamma": 0.999,
    "ent_coef": 0.003,
    "entropy_floor": 1.0,
    "max_grad_norm": 1000.0,
}
"""Defaults of a run with an intrinsic reward, where they differ from `RunConfig`'s. The bonus alone
keeps a policy varied; more entropy drives it back to chance. An agent that waits in a safe place
forgets how games begin, so games end sooner, after the 18,000 frames of Burda et al. 2018. Scores
last while the learning rate falls to 0 (results/montezuma.md)."""


def choose_config(
    flags: dict[str, Any], modes: dict[str, Any]
) -> tuple[RunConfig, RunDirectory | None]:
    """The configuration of the run, and its directory if it exists already."""
    if modes["resume"] is None:
        file = modes["config"]
        values = {} if file is None else read_yaml(find_config(file, CONFIGS))

        def chosen(base: RunConfig) -> RunConfig:
            return with_game(with_flags(configure(values, base, str(file)), flags))

        config = chosen(RunConfig())
        if config.intrinsic_reward != "none":  # which brings other defaults
            config = chosen(replace(RunConfig(), **EXPLORING))
        if config.layer == "neurocoder":
            NeurocoderConfig(**head_options(config))  # ValueError if they do not go together
        return with_sizes(config), None
    if modes["config"] is not None:
        raise ValueError("--resume takes the run's own config.yaml; leave --config out")
    path = given_path(modes["resume"])
    before = with_game(stored_config(path))
    config = with_sizes(with_game(with_flags(before, flags)))
    _check_unchanged(before, config)
    return config, RunDirectory(path)


def with_flags(config: RunConfig, flags: dict[str, Any]) -> RunConfig:
    """The settings of a file with the flags on top. A flag for the number of games (`games` or
    `envs_per_worker`) replaces either setting of the file."""
    if "games" in flags or "envs_per_worker" in flags:
        config = replace(config, games=None, envs_per_worker=None)
    return configure(flags, config, "the flags")


def stored_config(run: Path) -> RunConfig:
    """The configuration in a run directory."""
    path = run / "config.yaml"
    if not os.path.isfile(path):  # false also for a name that is too long
        raise ValueError(f"{run} is no run directory: it has no config.yaml")
    # What settings were before there were flags for them: no bonus, and a gate.
    earlier = replace(RunConfig(), intrinsic_reward="none", residual_gate=True)
    return configure(read_yaml(path), earlier, str(path))


def make_factory(config: RunConfig) -> AtariFactory:
    """The game under its protocol."""
    return atari(
        config.env, protocol=config.protocol, stack=config.stack, max_frames=config.game_frames
    )


def camel_case(game: str) -> str:
    """`montezuma_revenge` -> `MontezumaRevenge`."""
    return game.title().replace("_", "")


def with_game(config: RunConfig) -> RunConfig:
    """Settings that depend on the game, where they are not given: the intrinsic reward, and by that
    the gate of the residual program. The game's name gets one form, `Pong` for `pong`.

    Raises:
        ValueError: without a game, or for one that does not exist.
    """
    if not config.env:
        raise ValueError("--env is needed: a game such as MontezumaRevenge")
    game = make_factory(config).game
    bonus = config.intrinsic_reward
    if bonus == "auto":
        bonus = "snd" if game in HARD_GAMES else "none"
    gate = config.residual_gate
    if gate is None:
        gate = image_heads(explores=bonus != "none")["residual_gate"]
    return replace(config, env=camel_case(game), intrinsic_reward=bonus, residual_gate=gate)


def with_sizes(config: RunConfig) -> RunConfig:
    """Numbers of workers and games, where they are not given; checks them with `batch_size`.

    A run keeps its games, which workers share out equally. A number of workers that does not divide
    them is replaced by the nearest one that does, with a warning. The cluster `none` becomes None.

    Raises:
        ValueError: if `batch_size` does not divide what the games play in a rollout, if games are
            given in two ways, or if there is no such cluster.
    """
    if config.games is not None and config.envs_per_worker is not None:
        raise ValueError(
            f"games ({config.games}) and envs_per_worker ({config.envs_per_worker}) both say how "
            "many games there are; leave one out"
        )
    if config.cluster == "none":
        config = replace(config, cluster=None)
    asked = config.workers
    if config.cluster is not None and asked != 0:
        cores = worker_cores(config.cluster)  # asked for in any case: there may be no such cluster
        asked = cores if asked is None else asked
    if asked is None:
        asked = machine_sizes(config).workers
    games = config.games or default_games(config, asked)
    divisors = [n for n in range(1, games + 1) if games % n == 0]
    workers = min(divisors, key=lambda n: abs(n - asked)) if asked else 0
    if workers != asked and config.workers is not None:
        logging.warning(
            "%d workers cannot share out %d games equally: taking %d", asked, games, workers
        )
    if config.batch_size is not None:
        check_batch(config.batch_size, config.n_steps, games)
    return replace(config, workers=workers, games=games, envs_per_worker=None)


def default_games(config: RunConfig, workers: int) -> int:
    """Games of all workers together, where their number is not given."""
    if config.envs_per_worker is not None:
        return max(1, workers) * config.envs_per_worker
    if config.intrinsic_reward != "none":
        count, least = max(1, workers), EXPLORING_PER_WORKER
        return count * least * max(1, round(EXPLORING_ENVS / (count * least)))
    is_chosen = config.workers is None or (workers > 0 and uses_gpu(config))
    return machine_sizes(config).games * workers if is_chosen else DEFAULT_ENVS


def machine_sizes(config: RunConfig) -> Sizes:
    """Numbers of workers and games that fit this machine."""
    return choose_sizes(available_cores(), uses_gpu(config))


def uses_gpu(config: RunConfig) -> bool:
    """Whether the learner computes on a GPU."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _check_unchanged(before: RunConfig, after: RunConfig) -> None:
    changed = [
        f"{name} {getattr(before, name)!r} -> {getattr(after, name)!r}"
        for name in FIXED_FIELDS
        if getattr(before, name) != getattr(after, name)
    ]
    if before.intrinsic_reward != "none" and bool(before.int_coef) != bool(after.int_coef):
        # Whether there is a head for intrinsic values.
        changed.append(f"int_coef {before.int_coef!r} -> {after.int_coef!r}")
    if changed:
        raise ValueError(
            "a resumed run keeps its directory, game, network, optimiser and seed; "
            f"changed: {', '.join(changed)}"
        )


def bonus_options(config: RunConfig) -> dict[str, Any]:
    """Options of the intrinsic reward, for `A3C(intrinsic_kwargs=...)`."""
    options: dict[str, Any] = {"warmup_timesteps": config.bonus_warmup}
    if config.intrinsic_reward != "count":
        options |= {"encoder": config.bonus_encoder, "learning_rate": config.bonus_learning_rate}
        if config.update_proportion is not None:
            options["update_proportion"] = config.update_proportion
    return options


def head_options(config: RunConfig) -> dict[str, Any]:
    """Options of the output layers, for `ncrl.layers.make_layer`."""
    if config.layer != "neurocoder":
        return BASELINE_OPTIONS.get(config.layer, {})
    values = {entry.name: getattr(config, entry.name, None) for entry in fields(NeurocoderConfig)}
    return {name: value for name, value in values.items() if value is not None}
