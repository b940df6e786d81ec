"""What a run will do, in words, before it begins."""

from __future__ import annotations

import contextlib
import shlex
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import ncrl
from ncrl.agents import A3C
from ncrl.agents.atari.config import (
    EXPLORED,
    FRAMES_PER_TIMESTEP,
    HARD_GAMES,
    RunConfig,
    camel_case,
    machine_sizes,
    make_factory,
    with_sizes,
)
from ncrl.agents.runs.directory import RunDirectory
from ncrl.settings import is_ncrl

SCRIPT = Path(ncrl.__file__).resolve().parent.parent / "run_atari.py"
"""In a clone; an installed package has the command `ncrl` alone."""

PROGRAM = "ncrl" if is_ncrl() else SCRIPT.name
"""The name that this was started under: `ncrl`, also as `python -m ncrl`, or a clone's script."""

COLUMNS = 79
"""Width of the summary."""


def summary(model: A3C, config: RunConfig, run: RunDirectory) -> list[str]:
    """Lines for the screen that say what the run will do."""
    factory = make_factory(config)
    rules = factory.describe()
    heads = {"actor": model.policy.action_net, "critic": model.policy.value_net}
    sizes = ", ".join(f"{name} {_parameters(head):,}" for name, head in heads.items())
    played = f", {model.num_timesteps * FRAMES_PER_TIMESTEP:,} played" if model._n_updates else ""
    workers = f"serial, {model.n_envs} games in this process"
    if model.n_workers:
        workers = "1 worker" if model.n_workers == 1 else f"{model.n_workers} workers"
        workers += f" of {model.n_envs // model.n_workers} games"
        workers += f" on the Ray cluster {config.cluster}" if config.cluster is not None else ""
    lines = [
        f"game       {camel_case(factory.game)}, {config.frames:,} frames{played}",
        f"protocol   {config.protocol}: sticky actions {rules['sticky_actions']:g}, "
        f"{rules['action_set']} actions, no-ops {rules['no_ops']}, a lost life: "
        f"{rules['life_loss']}; games of at most {config.game_frames:,} frames; rewards are "
        "clipped for learning, scores are raw",
        f"playing    {workers}, {config.n_steps} timesteps per rollout",
        f"learner    {model.device}, seed {config.seed}",
        f"network    {_parameters(model.policy):,} parameters: encoder {config.encoder}, "
        f"LSTM {config.lstm_hidden_size}, {config.layer} heads ({sizes})",
    ]
    if config.intrinsic_reward != "none":
        lines.append(
            f"bonus      {config.intrinsic_reward}, weight {config.int_coef:g} beside "
            f"{config.ext_coef:g} of the game's rewards, after {config.bonus_warmup:,} timesteps"
        )
    if config.cluster is None:  # sizes that nobody asked for are told with their reason
        unasked = replace(config, workers=None, games=None, batch_size=None)
        if config == with_sizes(replace(unasked, n_steps=RunConfig.n_steps)):
            lines.insert(
                3,
                f"chosen     {model.envs_per_update * config.n_steps} timesteps per update and "
                f"these games for {machine_sizes(config).reason}",
            )
    lines = [part for line in lines for part in wrapped(line)]
    curves = shell_command("-m", "tensorboard.main", "--logdir", str(run.path.parent))
    lines += [f"run        {run.path}", f"curves     {curves}"]  # to be pasted, so never wrapped
    if hard := HARD_GAMES.get(factory.game):
        reached = EXPLORED.get(factory.game, f"no run of ours with a bonus yet; without, {hard}")
        if config.intrinsic_reward == "none":
            reached = f"{hard} without a bonus; a score of 0 is no fault"
        lines += wrapped(f"expect     {reached}")
    return lines


def wrapped(line: str) -> list[str]:
    """A line of the summary in lines of `COLUMNS`, below each other after its first word."""
    return textwrap.wrap(line, COLUMNS, subsequent_indent=" " * 11, break_long_words=False)


def resume_line(run: Path, *flags: str) -> str:
    """What goes on with a run, to be pasted."""
    if SCRIPT.is_file():
        return shell_command(shown_path(str(SCRIPT)), "--resume", str(run), *flags)
    return shell_command("-m", "ncrl", "resume", str(run), *flags)


def shell_command(*words: str) -> str:
    """What to paste into the shell: this Python with these words."""
    return shlex.join([shown_path(sys.executable or "python"), *words])


def shown_path(path: str) -> str:
    """A path as short as the current folder allows."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
