"""The command: train, resume, evaluate and watch A3C with Neurocoder heads on an Atari game."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ncrl.agents.atari.config import EXPLORING, RunConfig
from ncrl.agents.atari.evaluate import evaluate
from ncrl.agents.atari.summary import PROGRAM
from ncrl.agents.atari.train import failed, learn, prepare
from ncrl.agents.playing.sizes import available_cores, learner_threads
from ncrl.files import given_path
from ncrl.settings import EXIT_SIGINT, add_flags, make_parser, parse, usage_error
from ncrl.shell.hardware import keep_freed_memory
from ncrl.shell.screen import Screen
from ncrl.shell.signals import leave_at_once, stop_signals

MODES: dict[str, tuple[type, str]] = {
    "config": (str, "file of settings in YAML, or pong or a3c; flags win over it"),
    "resume": (str, "go on with a run exactly"),
    "profile": (bool, "where the time of each process goes: a table at the end, and curves"),
    "evaluate": (str, "play whole games with a trained run"),
    "episodes": (int, "games to evaluate (default: 10); 0 with --video: film alone"),
    "video": (str, "with --evaluate: an .mp4 or .webm of one game"),
    "best": (bool, "with --evaluate: best_model.zip, not the last checkpoint"),
    "deterministic": (bool, "with --evaluate: the likeliest action, not a sampled one"),
}
"""Flags that are not settings of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    flags = parse(build_parser(), sys.argv[1:] if arguments is None else arguments)
    modes = {name: flags.pop(name, None) for name in MODES}
    screen = Screen(sys.stdout)
    with stop_signals(leave_at_once) as signals:
        try:
            if modes["evaluate"] is not None:
                # In one thread: for a few images at a time several would only wait for each other,
                # which beside a training takes far longer.
                with learner_threads(available_cores()):
                    return evaluate(given_path(modes["evaluate"]), flags, modes, screen)
            with prepare(flags, modes) as job:
                return learn(job, screen, signals)
        except KeyboardInterrupt:
            screen.line("left at once; a checkpoint from before stays as it is")
            return signals.exit_code or EXIT_SIGINT
        except ValueError as error:
            usage_error(PROGRAM, str(error))
        except OSError as error:  # for example, a film cannot be written
            return failed(str(error))


def build_parser() -> argparse.ArgumentParser:
    """One flag per field of `RunConfig`, and those that choose what to do."""
    parser = make_parser(
        "Train, resume, evaluate and watch A3C with Neurocoder heads on an Atari game.",
        "Everything can also be given as 'name: value' lines of a YAML file (--config). With an "
        "intrinsic reward, which some games have by default, the defaults are "
        + ", ".join(f"{name} {value}" for name, value in EXPLORING.items())
        + ".",
    )
    parser.prog = PROGRAM
    add_flags(parser, RunConfig)
    for name, (kind, text) in MODES.items():
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        else:
            metavar = "RUN_DIR" if name in ("resume", "evaluate") else None
            parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    return parser
