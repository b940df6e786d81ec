"""Training on an Atari game: the model of a configuration, and a run from its start to its end."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from inspect import signature
from typing import Any

import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from ncrl.agents import A3C, Limits, NonFiniteError, WorkerError
from ncrl.agents.atari.config import (
    FRAMES_PER_TIMESTEP,
    RunConfig,
    bonus_options,
    choose_config,
    head_options,
    make_factory,
)
from ncrl.agents.atari.summary import PROGRAM, resume_line, summary
from ncrl.agents.playing.buffers import RolloutShape
from ncrl.agents.playing.sizes import check_memory
from ncrl.agents.runs.checkpoints import CheckpointError, newest_checkpoint, resume
from ncrl.agents.runs.directory import RunDirectory, SaveCheckpoints, cannot_write
from ncrl.agents.runs.progress import Progress
from ncrl.files import given_path
from ncrl.settings import EXIT_FAILED
from ncrl.shell.hardware import choose_device, is_lack_of_memory
from ncrl.shell.screen import Screen
from ncrl.shell.signals import StopSignals

Job = tuple[A3C, RunConfig, RunDirectory]
"""Everything that training needs, checked."""


@contextlib.contextmanager
def prepare(flags: dict[str, Any], modes: dict[str, Any]) -> Iterator[Job]:
    """A new run, or one to go on with; nothing is written before every argument is checked.

    Raises:
        ValueError: for arguments or a run directory that cannot be used.
    """
    for name in ("episodes", "video", "deterministic", "best"):
        if modes[name] is not None:
            raise ValueError(f"--{name} goes with --evaluate RUN_DIR")
    config, resumed = choose_config(flags, modes)
    choose_device(config.device)
    with resumed or RunDirectory.create(given_path(config.logdir), config.env) as run:
        model: A3C | None = None
        try:
            checkpoint = None if resumed is None else newest_checkpoint(run.checkpoints)
            frames = checkpoint.timesteps * FRAMES_PER_TIMESTEP if checkpoint else 0
            if frames >= config.frames:
                raise ValueError(
                    f"{run.path} has played {frames:,} frames, of {config.frames:,}; give a larger "
                    "--frames to go on"
                )
            model = make_model(config, profile=bool(modes["profile"]))
            if checkpoint is not None:
                resume(model, checkpoint)
            try:
                if resumed is None:  # else with the first checkpoint
                    run.write_config(asdict(config))
                curves = run.make_logger(model.num_timesteps)
                settings = yaml.safe_dump(asdict(config), sort_keys=False)
                curves.record("settings", f"```\n{settings}```", exclude="csv")
                model.set_logger(curves)
            except OSError as error:
                raise cannot_write(run.path, error) from error
            yield model, config, run
        finally:
            if resumed is None and (model is None or not model.num_timesteps):
                run.remove()


def out_of_memory(config: RunConfig) -> str:
    """What to lower, in one line."""
    return (
        f"out of memory; lower games ({config.games}; n_envs of A3C), n_steps "
        f"({config.n_steps}) or lstm_hidden_size ({config.lstm_hidden_size})"
    )


def make_model(config: RunConfig, **options: Any) -> A3C:
    """A fresh model; `options` replace arguments of `A3C`.

    Raises:
        ValueError: on a machine that is too small for it, and for impossible arguments.
    """
    rate, factory = config.learning_rate, make_factory(config)
    shared = {name for name in signature(A3C).parameters if hasattr(config, name)}
    arguments: dict[str, Any] = {name: getattr(config, name) for name in shared} | {
        "env": factory,
        "learning_rate": LinearSchedule(rate, 0.0, 1.0) if config.anneal else rate,
        "use_rms_prop": config.optimizer == "rmsprop",
        "n_workers": config.workers or 0,
        "n_envs": config.games,
        "policy_kwargs": {
            "head": config.layer,
            "head_kwargs": head_options(config),
            "encoder": config.encoder,
            "lstm_hidden_size": config.lstm_hidden_size,
        },
        "limits": Limits(
            heartbeat_timeout=config.heartbeat_timeout, max_restarts=config.max_restarts
        ),
    }
    if config.intrinsic_reward != "none":
        arguments["intrinsic_kwargs"] = bonus_options(config)
    arguments |= options
    sizes = config.n_steps, arguments["n_envs"]
    spaces = factory.observation_space, factory.action_space
    # A3C asks, too, but in a serial run not before all games are built: thousands take an hour.
    check_memory(2 * RolloutShape(*sizes, *spaces, lstm_layers=0, lstm_size=0).nbytes)
    try:
        model = A3C("CnnLstmPolicy", **arguments)
        model.check_machine()
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        raise ValueError(out_of_memory(config)) from error
    return model


def learn(job: Job, screen: Screen, signals: StopSignals) -> int:
    """Train to the end, or to a signal; a checkpoint is written in either case."""
    model, config, run = job
    for line in summary(model, config, run):
        screen.line(line)
    checkpoints = SaveCheckpoints(
        run,
        math.ceil(config.checkpoint_every / FRAMES_PER_TIMESTEP),
        config.keep_checkpoints,
        stop_on_error=config.stop_on_save_error,
        config=asdict(config),
    )
    checkpoints.init_callback(model)
    total = math.ceil(config.frames / FRAMES_PER_TIMESTEP)

    def stop() -> None:
        model.request_stop()
        screen.line_from_signal(
            "stopping after this update, with a checkpoint; once more leaves at once, without"
        )

    signals.on_stop = stop
    callbacks = [checkpoints, Progress(config.frames, screen)]
    before, saved = model.num_timesteps, True
    try:
        lost_workers = _play_on(model, config, total, callbacks, screen)
        # A checkpoint without new play could lose what the old one has, such as the games.
        if model.num_timesteps > before:
            saved = checkpoints.save()
            model.dump_logs()
    except (NonFiniteError, CheckpointError, OSError) as error:
        return failed(str(error))
    except Exception as error:
        if is_lack_of_memory(error):
            return failed(out_of_memory(config))
        logging.exception("training failed")
        return failed(f"{type(error).__name__}: {error}")
    assert model.env is not None
    model.env.close()
    code = failed(str(lost_workers)) if lost_workers else signals.exit_code
    if not model.num_timesteps:
        screen.line("stopped before the first timestep; nothing was kept")
        return code
    if not saved:
        return failed(f"the last checkpoint could not be written to {run.path}")
    # A run that is over needs more frames to go on. Where nothing was played, new frames have to be
    # given again: settings are stored with the next checkpoint.
    frames = config.frames if model.num_timesteps < total else 2 * config.frames
    more = [] if before < model.num_timesteps < total else ["--frames", str(frames)]
    screen.line(
        f"{model.num_timesteps * FRAMES_PER_TIMESTEP:,} frames played; go on with: "
        f"{resume_line(run.path, *more)}"
    )
    return code


def _play_on(
    model: A3C, config: RunConfig, total: int, callbacks: list[BaseCallback], screen: Screen
) -> WorkerError | None:
    """Train until `total` timesteps. An error of the workers is returned, not raised: what was
    learnt before it is sound, and is saved."""
    try:
        model.learn(
            total - model.num_timesteps,
            callback=callbacks,
            log_interval=config.log_every,
            reset_num_timesteps=False,
        )
    except WorkerError as error:
        return error
    finally:
        if model.time_spent is not None:
            screen.line(model.time_spent.table())
    return None


def failed(message: str) -> int:
    """Say why the run ended; returns the exit code."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return EXIT_FAILED
