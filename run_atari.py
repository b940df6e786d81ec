#!/usr/bin/env python3
"""Train, resume, evaluate and watch A3C with Neurocoder heads on an Atari game.

python run_atari.py --env MontezumaRevenge
python run_atari.py --resume runs/MontezumaRevenge-1
python run_atari.py --evaluate runs/MontezumaRevenge-1 --episodes 10 --video out.mp4
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule

from ncrl import NeurocoderConfig
from ncrl.agents import A3C, Limits, NonFiniteError, WorkerError
from ncrl.agents.a3c import default_workers
from ncrl.agents.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_weights,
    newest_checkpoint,
    resume,
)
from ncrl.agents.intrinsic import SOURCES
from ncrl.agents.progress import Progress, Screen
from ncrl.agents.runs import RunDirectory, SaveCheckpoints, read_config
from ncrl.agents.video import GameVideo, Moment, check_path, view_heads
from ncrl.envs import AtariFactory, AtariPlayer, atari
from ncrl.layers import LAYERS
from ncrl.settings import add_flags, configure, make_parser, parse, setting, usage_error

PROGRAM = "run_atari.py"
FRAMES_PER_TIMESTEP = 4
DEFAULT_ENVS = 16
"""Games of all workers together, as in A3C."""

EXPLORING_ENVS = 64
"""The same with an intrinsic reward: more games find more, and are faster by the timestep."""

GAMES_PER_UPDATE = 4
"""Small updates learn faster from the same games than one update from all of them (RESULTS.md)."""

EVALUATION_ENVS = 8
"""Games that are evaluated side by side."""

FILM_FPS = 15
"""Timesteps per second of video: the speed at which the game was made to be played."""

EXIT_FAILED, EXIT_SIGINT, EXIT_SIGTERM = 1, 130, 143

HARD_GAMES = {
    "montezuma_revenge": "0 to 14 points after 200 million frames",
    "private_eye": "about 100 points after 200 million frames",
    "pitfall": "0 points after 200 million frames",
    "venture": "0 points after 200 million frames",
    "frostbite": "about 300 points after 200 million frames",
}
"""What plain actor-critics without an exploration bonus are known to reach."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that fixes a run. Flags, YAML keys and `config.yaml` have these names."""

    # The run.
    env: str = setting("", "game: MontezumaRevenge, montezuma_revenge or ALE/MontezumaRevenge-v5")
    protocol: str = setting(
        "machado",
        "machado: sticky actions 0.25, 18 actions, a game ends when it is over; classic: no-ops, "
        "minimal actions, a lost life cuts the return",
        choices=("machado", "classic"),
    )
    frames: int = setting(10_000_000, "emulator frames of the whole run, 4 per timestep", low=1)
    seed: int = setting(0, "seed of everything", low=0, high=2**31 - 1)
    device: str = setting("auto", "where the learner computes", choices=("auto", "cpu", "cuda"))
    logdir: str = setting("runs", "folder in which the run directory is made")
    workers: int | None = setting(
        None, "worker processes, 0 for none (reproducible); one per core if not given", low=0
    )
    envs_per_worker: int | None = setting(
        None, "games per worker; 16 games in all if not given", low=1
    )
    cluster: str | None = setting(
        None, "play on a Ray cluster: auto, or host:port of its head (docs/cluster.md)"
    )
    stack: int = setting(1, "timesteps shown in one observation", low=1)
    # The network.
    layer: str = setting(
        "neurocoder",
        f"output layers of actor and critic: {', '.join(LAYERS)}",
        choices=tuple(LAYERS),
    )
    encoder: str = setting(
        "a3c", "convolutional trunk; paper is the slowest", choices=("a3c", "nature", "paper")
    )
    lstm_hidden_size: int = setting(512, "width of the LSTM", low=1)
    num_slots: int = setting(80, "Neurocoder: slots P of the program memory", low=1)
    key_dim: int = setting(3, "Neurocoder: width K of keys", low=1)
    num_heads: int = setting(15, "Neurocoder: attention heads H", low=1)
    num_steps: int = setting(1, "Neurocoder: steps J of the composition network", low=1)
    num_least_used: int = setting(5, "Neurocoder: least-used slots l_I", low=0)
    controller_size: int = setting(8, "Neurocoder: width of the composition network", low=1)
    sharpness: float = setting(
        10.0,
        "Neurocoder: softmax temperature beta; 1 in the paper, where heads hardly attend",
        low=1e-6,
    )
    residual: bool = setting(True, "Neurocoder: whether programs have the residual part")
    # The algorithm.
    n_steps: int = setting(20, "timesteps per rollout", low=1)
    batch_size: int | None = setting(
        None, "timesteps per update; whole rollouts of 4 games if not given", low=1
    )
    optimizer: str = setting(
        "adam", "adam, or rmsprop as in A3C (configs/a3c.yaml)", choices=("adam", "rmsprop")
    )
    learning_rate: float = setting(1e-3, "learning rate at the start", low=0)
    anneal: bool = setting(True, "whether the learning rate falls linearly to 0")
    gamma: float = setting(0.99, "discount", low=0, high=1)
    gae_lambda: float = setting(0.95, "1 for n-step returns", low=0, high=1)
    ent_coef: float = setting(0.01, "weight of the entropy", low=0)
    vf_coef: float = setting(0.5, "weight of the value loss", low=0)
    max_grad_norm: float = setting(40.0, "limit on the gradient's norm", low=0)
    rms_prop_eps: float = setting(0.1, "rmsprop: epsilon, inside the root", low=0)
    orth_coef: float = setting(0.1, "weight of the orthogonality loss", low=0)
    balance_coef: float = setting(0.01, "moe: weight of the balance loss", low=0)
    correction: str = setting(
        "vtrace", "for rollouts played by older weights", choices=("vtrace", "none")
    )
    # Exploration.
    intrinsic_reward: str = setting(
        "auto",
        "bonus for what is new: rnd, snd, count or none; auto: rnd for games whose rewards are "
        "rare, none for all others",
        choices=("auto", "none", *SOURCES),
    )
    int_coef: float = setting(0.5, "bonus: weight of its advantages, of deviation 1", low=0)
    ext_coef: float = setting(2.0, "bonus: weight of the game's own advantages beside it", low=0)
    int_gamma: float = setting(0.99, "bonus: discount of its return", low=0, high=1)
    imitation_coef: float = setting(
        0.1, "bonus: weight of rollouts that led to a score, learnt from again", low=0
    )
    bonus_encoder: str = setting(
        "a3c", "rnd and snd: size of target and predictor", choices=("a3c", "nature")
    )
    bonus_learning_rate: float = setting(1e-4, "rnd and snd: learning rate", low=1e-9)
    update_proportion: float | None = setting(
        None,
        "rnd and snd: share of timesteps learnt from; those of 32 games if not given",
        low=1e-3,
        high=1,
    )
    bonus_warmup: int = setting(
        100_000, "bonus: timesteps in which statistics are gathered first", low=0
    )
    # What is written.
    log_every: int = setting(10, "updates between points of the curves", low=1)
    checkpoint_every: int = setting(1_000_000, "frames between checkpoints", low=1)
    keep_checkpoints: int = setting(3, "checkpoints to keep", low=1)
    stop_on_save_error: bool = setting(False, "whether a full disk ends the run")
    # Workers.
    heartbeat_timeout: float = setting(
        60.0, "seconds after which a silent worker is replaced", low=0.1
    )
    max_restarts: int = setting(5, "deaths in a row that a worker is replaced after", low=0)


BASELINE_OPTIONS: dict[str, dict[str, Any]] = {
    "hypernet": {"num_layers": 2, "hidden": 192},
    "film": {"num_layers": 2, "hidden": 64},
    "moe": {"num_experts": 10, "top_k": 5},
    "nsm": {"num_slots": 5, "key_dim": 5},
}
"""Options of the baselines' heads, from the paper's search grids; but HyperNet's width is the one
that makes 3.65 million parameters with the encoder `paper`, where the paper prints 3.6 million."""

NETWORK_FIELDS = (
    *("env", "protocol", "stack", "layer", "encoder", "lstm_hidden_size", "num_slots", "key_dim"),
    *("num_heads", "num_steps", "num_least_used", "controller_size", "sharpness", "residual"),
    *("intrinsic_reward", "bonus_encoder"),
)
"""What a resumed run cannot change: the weights would not fit, or mean something else."""

EXPLORING: dict[str, Any] = {
    "frames": 200_000_000,
    "learning_rate": 3e-4,
    "gamma": 0.999,
    "anneal": False,
}
"""Defaults of a run with an intrinsic reward, where they differ from `RunConfig`'s."""

SAME_IN_A3C = (
    *(
        "n_steps",
        "batch_size",
        "gamma",
        "gae_lambda",
        "ent_coef",
        "vf_coef",
        "max_grad_norm",
        "rms_prop_eps",
    ),
    *("orth_coef", "balance_coef", "correction"),
    *("intrinsic_reward", "int_coef", "ext_coef", "int_gamma", "imitation_coef"),
)
"""Fields that are arguments of `A3C` under the same name."""

MODES = ("config", "resume", "profile", "evaluate", "episodes", "video", "deterministic")
"""Flags that are not settings of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    flags = parse(build_parser(), sys.argv[1:] if arguments is None else arguments)
    modes = {name: flags.pop(name, None) for name in MODES}
    screen = Screen(sys.stdout)
    signals = StopSignals()
    try:
        with signals:
            if modes["evaluate"] is not None:
                return evaluate(Path(modes["evaluate"]), flags, modes, screen)
            with prepare(flags, modes) as job:
                return learn(job, screen, signals)
    except KeyboardInterrupt:
        screen.line("left at once; the last checkpoint is the one before")
        return signals.exit_code or EXIT_SIGINT
    except ValueError as error:
        usage_error(PROGRAM, str(error))


def build_parser() -> argparse.ArgumentParser:
    """One flag per field of `RunConfig`, and those that choose what to do."""
    parser = make_parser(
        (__doc__ or "").splitlines()[0],
        "Everything can also be given as 'name: value' lines of a YAML file (--config).",
    )
    add_flags(parser, RunConfig)
    parser.add_argument("--config", help="YAML file of settings; flags win over it")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run exactly")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="measure where the time of each process goes; a table at the end, and curves",
    )
    parser.add_argument("--evaluate", metavar="RUN_DIR", help="play whole games with a trained run")
    parser.add_argument("--episodes", type=int, help="games to evaluate (default: 10)")
    parser.add_argument("--video", help="with --evaluate: an .mp4 or .webm of one game")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="with --evaluate: the likeliest action, not a sampled one",
    )
    return parser


# Training.


class Job(NamedTuple):
    """Everything that training needs, checked."""

    model: A3C
    config: RunConfig
    run: RunDirectory


@contextlib.contextmanager
def prepare(flags: dict[str, Any], modes: dict[str, Any]) -> Iterator[Job]:
    """A new run, or one to go on with; nothing is written before every argument is checked.

    Raises:
        ValueError: for arguments or a run directory that cannot be used.
    """
    for name in ("episodes", "video", "deterministic"):
        if modes[name] is not None:
            raise ValueError(f"--{name} goes with --evaluate RUN_DIR")
    config, resumed = choose_config(flags, modes)
    _check_device(config.device)
    with resumed or RunDirectory.create(Path(config.logdir), config.env) as run:
        checkpoint = None if resumed is None else newest_unfinished(run, config)
        model = make_model(config, profile=bool(modes["profile"]))
        if checkpoint is not None:
            resume(model, checkpoint)
        run.write_config(asdict(config))
        model.set_logger(run.make_logger(model.num_timesteps))
        yield Job(model, config, run)


def choose_config(
    flags: dict[str, Any], modes: dict[str, Any]
) -> tuple[RunConfig, RunDirectory | None]:
    """The configuration of the run, and its directory if it exists already."""
    if modes["resume"] is None:
        file = modes["config"]
        values = {} if file is None else read_config(Path(file))

        def chosen(base: RunConfig) -> RunConfig:
            return configure(flags, configure(values, base, str(file)), "the flags")

        config = with_bonus(chosen(RunConfig()))
        if config.intrinsic_reward != "none":
            config = with_bonus(chosen(replace(RunConfig(), **EXPLORING)))
        _check_heads(config)
        return with_sizes(canonical(config)), None
    if modes["config"] is not None:
        raise ValueError("--resume takes the run's own config.yaml; leave --config out")
    path = Path(modes["resume"])
    before = stored_config(path)
    if before.intrinsic_reward == "auto":  # a run from before there was a bonus
        before = replace(before, intrinsic_reward="none")
    config = with_sizes(canonical(configure(flags, before, "the flags")))
    _check_same_network(before, config)
    return config, RunDirectory.open(path)


def with_bonus(config: RunConfig) -> RunConfig:
    """With an intrinsic reward chosen by the game, unless one was asked for.

    Raises:
        ValueError: without a game, or for one that does not exist.
    """
    if not config.env:
        raise ValueError("--env is needed: a game such as MontezumaRevenge")
    if config.intrinsic_reward != "auto":
        return config
    is_hard = make_factory(config).game in HARD_GAMES
    return replace(config, intrinsic_reward="rnd" if is_hard else "none")


def newest_unfinished(run: RunDirectory, config: RunConfig) -> Checkpoint:
    """The checkpoint to go on from; ValueError if nothing is left to play."""
    checkpoint = run.newest_checkpoint()
    if checkpoint.timesteps * FRAMES_PER_TIMESTEP >= config.frames:
        raise ValueError(
            f"{run.path} has played its {config.frames:,} frames; give a larger --frames to go on"
        )
    return checkpoint


def make_factory(config: RunConfig) -> AtariFactory:
    """The game under its protocol."""
    return atari(config.env, protocol=config.protocol, stack=config.stack)


def make_model(config: RunConfig, **options: Any) -> A3C:
    """A fresh model; `options` replace arguments of `A3C`."""
    rate = config.learning_rate
    optimizer: dict[str, Any] = {}
    if config.optimizer == "adam":
        optimizer = {"optimizer_class": torch.optim.Adam, "optimizer_kwargs": {"eps": 1e-5}}
    arguments: dict[str, Any] = {
        "env": make_factory(config),
        "learning_rate": LinearSchedule(rate, 0.0, 1.0) if config.anneal else rate,
        "n_workers": config.workers or 0,
        "n_envs": num_games(config),
        "cluster": config.cluster,
        "batch_size": timesteps_per_update(config, config.batch_size),
        "policy_kwargs": {
            "head": config.layer,
            "head_kwargs": head_options(config),
            "encoder": config.encoder,
            "lstm_hidden_size": config.lstm_hidden_size,
            **optimizer,
        },
        "limits": Limits(
            heartbeat_timeout=config.heartbeat_timeout, max_restarts=config.max_restarts
        ),
        "seed": config.seed,
        "device": config.device,
    }
    for name in SAME_IN_A3C:
        arguments[name] = getattr(config, name)
    if config.intrinsic_reward != "none":
        arguments["intrinsic_kwargs"] = bonus_options(config)
    return A3C("CnnLstmPolicy", **(arguments | options))


def learn(job: Job, screen: Screen, signals: StopSignals) -> int:
    """Train to the end, or to a signal; a checkpoint is written in either case."""
    model, config, run = job
    for line in summary(job):
        screen.line(line)
    checkpoints = SaveCheckpoints(
        run,
        math.ceil(config.checkpoint_every / FRAMES_PER_TIMESTEP),
        config.keep_checkpoints,
        stop_on_error=config.stop_on_save_error,
    )
    checkpoints.init_callback(model)
    total = math.ceil(config.frames / FRAMES_PER_TIMESTEP)
    signals.watch(model)
    try:
        try:
            model.learn(
                total - model.num_timesteps,
                callback=[checkpoints, Progress(config.frames, screen)],
                log_interval=config.log_every,
                reset_num_timesteps=False,
            )
        finally:
            if model.time_spent is not None:
                screen.line(model.time_spent.table())
        saved = checkpoints.save()
        model.dump_logs()
    except (WorkerError, NonFiniteError, CheckpointError, OSError) as error:
        return failed(str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return failed(
            f"out of memory ({type(error).__name__}); lower envs_per_worker "
            f"({config.envs_per_worker}) or n_steps ({config.n_steps}), that is n_envs and n_steps "
            "of A3C"
        )
    except Exception as error:
        logging.exception("training failed")
        return failed(f"{type(error).__name__}: {error}")
    assert model.env is not None
    model.env.close()
    if not saved:
        return failed(f"the last checkpoint could not be written to {run.path}")
    screen.line(
        f"{model.num_timesteps * FRAMES_PER_TIMESTEP:,} frames played; go on with: "
        f"python run_atari.py --resume {run.path}"
    )
    return signals.exit_code


def failed(message: str) -> int:
    """Say why the run ended; returns the exit code."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return EXIT_FAILED


class StopSignals:
    """Ctrl-C and SIGTERM end training after the update it is in; a second one ends it at once.

    Before there is a model to `watch`, the first one ends the process at once.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._model: A3C | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._before = {}
            return
        self._before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, model: A3C) -> None:
        """From now on the first signal lets `model` finish its update."""
        self._model = model

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        second = bool(self.exit_code)
        self.exit_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
        if second or self._model is None:
            raise KeyboardInterrupt
        self._model.request_stop()


def summary(job: Job) -> list[str]:
    """What the run will do, for the screen."""
    model, config, run = job
    factory = make_factory(config)
    rules = factory.describe()
    heads = {"actor": model.policy.action_net, "critic": model.policy.value_net}
    sizes = ", ".join(f"{name} {_parameters(head):,}" for name, head in heads.items())
    played = f", {model.num_timesteps * FRAMES_PER_TIMESTEP:,} played" if model._n_updates else ""
    workers = (
        f"{model.n_workers} workers of {model.n_envs // model.n_workers} games"
        if model.n_workers
        else f"serial, {model.n_envs} games in this process"
    )
    lines = [
        f"game       {camel_case(factory.game)}, {config.frames:,} frames{played}",
        f"protocol   {config.protocol}: sticky actions {rules['sticky_actions']:g}, "
        f"{rules['action_set']} actions, no-ops {rules['no_ops']}, a lost life: "
        f"{rules['life_loss']}; rewards are clipped for learning, scores are raw",
        f"playing    {workers}, {config.n_steps} timesteps per rollout",
        f"learner    {model.device}, seed {config.seed}",
        f"network    {_parameters(model.policy):,} parameters: encoder {config.encoder}, "
        f"LSTM {config.lstm_hidden_size}, {config.layer} heads ({sizes})",
        f"run        {run.path}",
        f"curves     tensorboard --logdir {run.path.parent}",
    ]
    if factory.game in HARD_GAMES:
        lines.append(
            f"expect     plain actor-critics reach {HARD_GAMES[factory.game]}; "
            "a score of 0 is no fault"
        )
    return lines


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def camel_case(game: str) -> str:
    """`montezuma_revenge` -> `MontezumaRevenge`."""
    return game.title().replace("_", "")


def canonical(config: RunConfig) -> RunConfig:
    """With the game's name in one form, so that `Pong` and `pong` are the same game."""
    return replace(config, env=camel_case(make_factory(config).game))


def with_sizes(config: RunConfig) -> RunConfig:
    """Numbers of workers and games, where they are not given; checks them with `batch_size`.

    The default is 16 games whatever the number of cores, so that results do not depend on it.

    Raises:
        ValueError: if `batch_size` does not divide what the games play in a rollout.
    """
    games = DEFAULT_ENVS if config.intrinsic_reward == "none" else EXPLORING_ENVS
    default = default_workers(games, config.cluster)  # raises where there is no such cluster
    workers = default if config.workers is None else config.workers
    envs = config.envs_per_worker or max(1, games // max(1, workers))
    config = replace(config, workers=workers, envs_per_worker=envs)
    size, whole = config.batch_size, config.n_steps * num_games(config)
    if size is not None and (size % config.n_steps or whole % size):
        raise ValueError(
            f"batch_size must be a multiple of n_steps that divides the {whole} timesteps of a "
            f"rollout of all games, got batch_size={size} with n_steps={config.n_steps} and "
            f"{num_games(config)} games; nearest: {timesteps_per_update(config, None)}"
        )
    return config


def num_games(config: RunConfig) -> int:
    """Games of all workers together."""
    return max(1, config.workers or 0) * (config.envs_per_worker or DEFAULT_ENVS)


def timesteps_per_update(config: RunConfig, batch_size: int | None) -> int:
    """`batch_size`, or the rollouts of the default number of games."""
    games = max(n for n in range(1, GAMES_PER_UPDATE + 1) if num_games(config) % n == 0)
    return batch_size or games * config.n_steps


def stored_config(run: Path) -> RunConfig:
    """The configuration in a run directory."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run directory: it has no config.yaml")
    return configure(read_config(path), RunConfig(), str(path))


def _check_same_network(before: RunConfig, after: RunConfig) -> None:
    changed = [
        f"{name} {getattr(before, name)!r} -> {getattr(after, name)!r}"
        for name in NETWORK_FIELDS
        if getattr(before, name) != getattr(after, name)
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its game and network; changed: {', '.join(changed)}")


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available on this machine; nearest: cpu")


def _check_heads(config: RunConfig) -> None:
    if config.layer == "neurocoder":
        NeurocoderConfig(**head_options(config))


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
    names = [entry.name for entry in fields(RunConfig) if "Neurocoder:" in entry.metadata["help"]]
    return {name: getattr(config, name) for name in names}


# Evaluating and watching.


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
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    config = configure(flags, stored_config(path), "the flags")
    _check_device(config.device)
    if modes["video"] is not None:
        check_path(Path(modes["video"]))
    checkpoint = newest_checkpoint(path / "checkpoints")
    model = make_model(config, n_workers=0, n_envs=1, batch_size=None, cluster=None)
    load_weights(model, checkpoint.path, optimizer=False)
    deterministic = bool(modes["deterministic"])
    scores, lengths = play_games(model, config, episodes, deterministic)
    rules = make_factory(config).describe()
    screen.line(
        f"{camel_case(make_factory(config).game)} after {checkpoint.timesteps:,} timesteps "
        f"({checkpoint.timesteps * FRAMES_PER_TIMESTEP:,} frames): raw score of {episodes} whole "
        f"games: mean {statistics.fmean(scores):.2f}, std {statistics.pstdev(scores):.2f}, "
        f"min {min(scores):g}, max {max(scores):g}; mean length {statistics.fmean(lengths):.0f} "
        "timesteps"
    )
    screen.line(
        f"protocol {config.protocol} (sticky actions {rules['sticky_actions']:g}, "
        f"{rules['action_set']} actions, no-ops {rules['no_ops']}), "
        f"{'likeliest' if deterministic else 'sampled'} actions, last checkpoint, "
        f"seed {config.seed}"
    )
    if modes["video"] is not None:
        score = film(model, config, Path(modes["video"]), deterministic)
        screen.line(f"video of one game (score {score:g}): {modes['video']}")
    return 0


def play_games(
    model: A3C, config: RunConfig, episodes: int, deterministic: bool
) -> tuple[list[float], list[int]]:
    """Raw scores and lengths (in timesteps) of whole games."""
    env = make_factory(config)(min(episodes, EVALUATION_ENVS), evaluation_seed(config))
    try:
        scores, lengths = evaluate_policy(
            model,
            env,
            n_eval_episodes=episodes,
            deterministic=deterministic,
            return_episode_rewards=True,
        )
    finally:
        env.close()
    assert isinstance(scores, list) and isinstance(lengths, list)
    return scores, lengths


def film(model: A3C, config: RunConfig, path: Path, deterministic: bool) -> float:
    """Write a video of one game beside what the heads attend to; returns its raw score."""
    factory = make_factory(config)
    player = AtariPlayer(factory, evaluation_seed(config))
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


def evaluation_seed(config: RunConfig) -> int:
    """Games that training has not played."""
    return (config.seed + 1_000_000_007) % 2**31


if __name__ == "__main__":
    sys.exit(main())
