"""The command `ncrl`: training runs and the paper's experiments under one name.

    ncrl train --env Pong --frames 4_000_000
    ncrl resume runs/Pong-1
    ncrl evaluate runs/Pong-1 --episodes 10
    ncrl watch runs/Pong-1 pong.mp4
    ncrl task mnist --seeds 0 1 2

What follows a command are the flags of `run_atari.py` and of `python -m ncrl.tasks.NAME`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ncrl import __version__
from ncrl.checks import suggest
from ncrl.settings import EXIT_SIGINT, usage_error

PAPER_TASKS = ("mnist", "cifar", "polynomial", "algorithms", "split_mnist", "split_cifar")
TASKS = {
    **{name: f"ncrl.tasks.{name}.experiment" for name in PAPER_TASKS},
    "parameters": "ncrl.tasks.parameters",
}
"""The module whose `main` is a task's command."""

COMMANDS = {
    "train": ("rl", "train on a game: ncrl train --env Pong"),
    "resume": ("rl", "go on with a run exactly: ncrl resume RUN_DIR"),
    "evaluate": ("rl", "play whole games with a run: ncrl evaluate RUN_DIR --episodes 10"),
    "watch": ("video", "film one game of a run: ncrl watch RUN_DIR [FILE.mp4]"),
    "task": ("tasks", "an experiment of the paper: ncrl task mnist (ncrl task --help)"),
}
"""Which extra of the package each command needs, and what it does."""

OF_RUNS = {
    "resume": "--frames, --workers, --games, --learning-rate, and more",
    "evaluate": "--episodes, --best, --deterministic, --video, --device, --seed",
    "watch": "--best, --deterministic, --device, --seed",
}
"""Flags of the commands that begin with the folder of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for unusable arguments."""
    command, *words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()]
        last = "`ncrl COMMAND --help` lists its flags, `ncrl --version` tells the version."
        print("\n".join(["usage: ncrl COMMAND ...", "", *lines, "", last]))
        return 0
    if command == "--version":
        print(f"ncrl {__version__}")
        return 0
    if command in OF_RUNS and words[:1] in (["-h"], ["--help"]):
        print(f"usage: ncrl {command} RUN_DIR ...\n\n{COMMANDS[command][1]}\n")
        print(f"Flags: {OF_RUNS[command]};\n`ncrl train --help` explains them.")
        return 0
    if command not in COMMANDS:
        usage_error("ncrl", f"unknown command {command!r}; {suggest(command, COMMANDS)}")
    try:
        if command == "task":
            return run_task(words)
        from ncrl.agents.atari.command import main as run_atari

        return run_atari(atari_arguments(command, words))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "ncrl":
            raise
        needed = f"pip install 'ncrl[{COMMANDS[command][0]}]'"
        usage_error(f"ncrl {command}", f"{error.name} is not installed: {needed}")
    except KeyboardInterrupt:  # Ctrl-C while the imports take their seconds
        return EXIT_SIGINT


def atari_arguments(command: str, words: Sequence[str]) -> list[str]:
    """The arguments of `run_atari.py` that a command stands for."""
    if command == "train":
        return list(words)
    if not words or words[0].startswith("-"):
        usage_error(f"ncrl {command}", f"the folder of a run comes first: ncrl {command} RUN_DIR")
    run, *rest = words
    if command == "resume":
        return ["--resume", run, *rest]
    if command == "evaluate":
        return ["--evaluate", run, *rest]
    film = f"{Path(run).resolve().name}.mp4"
    for i, word in enumerate(rest):  # it may come after flags
        is_film = i == 0 or (Path(word).suffix != "" and rest[i - 1] != "--video")
        if is_film and not word.startswith("-"):
            film = rest.pop(i)
            break
    return ["--evaluate", run, "--episodes", "0", "--video", film, *rest]


def run_task(words: Sequence[str]) -> int:
    """Run an experiment as `python -m ncrl.tasks.NAME` would; returns its exit code."""
    name, *rest = list(words) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: ncrl task NAME ...\n\nNAME is one of {', '.join(TASKS)}.")
        return 0
    if name not in TASKS:
        usage_error("ncrl task", f"unknown task {name!r}; {suggest(name, TASKS)}")
    code: int = import_module(TASKS[name]).main(rest)
    return code
