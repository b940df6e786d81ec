"""The paper's Figure 3: Atari games with plain, HyperNet and Neurocoder heads, over seeds.

One process of run_atari.py per game, layer and seed. The same command again goes on where it was
stopped, whatever stopped it; at the end it writes LOGDIR/figure3.md and LOGDIR/figure3.png.

python benchmarks/atari_figure3.py --games Seaquest --layers linear neurocoder --seeds 0 1 \
    --frames 4_000_000 --logdir runs/figure3
python benchmarks/atari_figure3.py --logdir runs/figure3 --figure-only
python benchmarks/atari_figure3.py --seeds 0 1 2 3 4 --parallel 4 -- --workers 4 --encoder paper
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ncrl.agents.atari import command as atari_command
from ncrl.agents.atari.config import (
    FRAMES_PER_TIMESTEP,
    RunConfig,
    canonical,
    choose_config,
    stored_config,
)
from ncrl.agents.runs.checkpoints import CheckpointError, newest_checkpoint
from ncrl.agents.runs.directory import RunDirectory
from ncrl.files import write_atomically
from ncrl.layers import LAYERS
from ncrl.settings import configure, make_parser, parse, usage_error
from ncrl.shell.hardware import choose_device

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = "atari_figure3.py"
GAMES = ("Seaquest", "MsPacman", "Frostbite", "MontezumaRevenge")
FIGURE_LAYERS = ("linear", "hypernet", "neurocoder")
TABLE_FILE, FIGURE_FILE, OUTPUT_FILE = "figure3.md", "figure3.png", "output.txt"
DDOF = 1
"""Of every standard deviation over seeds: that of a sample; one seed has none."""

POLL_SECONDS = 0.2
GRID_POINTS = 400
"""Points of a mean curve, to which the curves of its seeds are interpolated."""

OURS = {"env": "games", "layer": "layers", "seed": "seeds", "frames": "frames", "logdir": "logdir"}
"""Settings of run_atari.py that this command gives, and its own flags for them."""

FREE = (
    *("frames", "device", "logdir", "workers", "games", "envs_per_worker", "log_every"),
    *(
        "checkpoint_every",
        "keep_checkpoints",
        "stop_on_save_error",
        "heartbeat_timeout",
        "max_restarts",
    ),
)
"""Settings in which runs of one figure may differ; the number of games is that of the machine."""

FIELD_NAMES = frozenset(entry.name for entry in fields(RunConfig))

EASY = (
    "about 2,500 points for A3C within 32 million steps, HyperNet about 2/3 of Neurocoder "
    "(read from the figure)"
)
HARD = "A3C and HyperNet about 0 over 300 million steps, Neurocoder 1,500 to 3,000"
CLAIMS = {"Seaquest": EASY, "MsPacman": EASY, "Frostbite": HARD, "MontezumaRevenge": HARD}
"""What the paper says, in words and a figure of 5 runs; it prints no score and no protocol."""

PUBLISHED_BY = (
    *("MonoBeast IMPALA", "moolib IMPALA", "Cleanba IMPALA", "Cleanba PPO"),
    "PFRL A3C-FF (largest evaluation)",
)
PUBLISHED = {
    "MontezumaRevenge": (".33 +- .47", ".15 +- .05", ".12 +- .05", ".73 +- .11", "2.2"),
    "Frostbite": ("298", "300 +- 57", "325 +- 19", "1633 +- 1005", "296"),
    "Seaquest": ("1760", "954", "2030 +- 370", "1860", "1782"),
    "MsPacman": ("4402 +- 208", "4551 +- 647", "4881 +- 507", "3346 +- 194", "2808"),
    "Pong": ("18.9", "19.8", "19.1", "18.1", "20.9"),
    "Breakout": ("476", "442", "482", "422", "581"),
}
"""After 200 million frames (sticky actions .25, 18 actions), by the columns above."""

MONTEZUMA = (
    "MontezumaRevenge: about 0 is the expected result of any plain actor-critic, also with coded "
    "heads until shown otherwise."
)


class Cell(NamedTuple):
    """One curve of one seed."""

    game: str
    layer: str
    seed: int

    def __str__(self) -> str:
        return f"{self.game} {self.layer} seed {self.seed}"

    def folder(self, logdir: Path) -> Path:
        """Where its run directories lie; nothing else writes there."""
        return logdir / f"{self.game}-{self.layer}-seed{self.seed}"


class Found(NamedTuple):
    """How far a cell is: `new`, `interrupted` or `finished`."""

    state: str
    frames: int
    """Of the newest whole checkpoint; 0 for a new one."""
    run: Path | None
    """The run directory with that checkpoint."""


class Job(NamedTuple):
    """A cell to be played, as a command."""

    cell: Cell
    folder: Path
    config: RunConfig
    command: list[str]
    found: Found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    flags, rest = parse(build_parser(), given[:cut]), given[cut + 1 :]
    logdir = Path(flags.get("logdir", "runs/figure3"))
    jobs: list[Job] = []
    try:
        if flags.get("figure_only"):
            if rest:
                raise ValueError(f"--figure-only starts nothing; leave {rest[0]} out")
            cells = cells_there(logdir, flags)
        else:
            cells, jobs = prepare(flags, rest, logdir)
    except ValueError as error:
        usage_error(PROGRAM, str(error))
    failed: list[str] = []
    if jobs:
        with StopSignals() as signals:
            failed = run_jobs(jobs, flags.get("parallel", 1), signals)
        if signals.exit_code:
            say("stopped; the same command goes on, --figure-only draws what is there")
            complain(failed)
            return signals.exit_code
    try:
        report(cells, logdir)
    except (OSError, ValueError) as error:
        failed.append(f"no table or figure in {logdir}: {error}")
    complain(failed)
    return 1 if failed else 0


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        (__doc__ or "").splitlines()[0],
        "What follows -- are settings of run_atari.py for all runs: -- --workers 4 --encoder paper",
    )
    parser.prog = PROGRAM
    parser.add_argument("--games", nargs="+", help=f"(default: {' '.join(GAMES)})")
    parser.add_argument("--layers", nargs="+", help=f"heads (default: {' '.join(FIGURE_LAYERS)})")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0)")
    parser.add_argument(
        "--frames", type=int, help=f"emulator frames of each run (default: {RunConfig.frames})"
    )
    parser.add_argument("--logdir", help="folder of all runs (default: runs/figure3)")
    parser.add_argument(
        "--parallel",
        type=int,
        help="runs at a time (default: 1); each has a worker per core unless -- --workers is given",
    )
    parser.add_argument(
        "--figure-only", action="store_true", help="table and figure of what is there; no run"
    )
    return parser


# What there is to do.


def prepare(
    flags: dict[str, Any], rest: Sequence[str], logdir: Path
) -> tuple[list[Cell], list[Job]]:
    """All cells, and a job for each that is not finished. Nothing has been started or written.

    Raises:
        ValueError: for settings that make no sense or do not fit the runs that are there.
    """
    if (parallel := flags.get("parallel", 1)) < 1:
        raise ValueError(f"parallel must be at least 1, got {parallel}; nearest: 1")
    passed = pass_through(rest)
    modes = {"resume": None, "config": passed.get("config")}
    shared = {name: value for name, value in passed.items() if name in FIELD_NAMES}
    cells: list[Cell] = []
    jobs: list[Job] = []
    frames = flags.get("frames", RunConfig.frames)
    for game, layer, seed in itertools.product(
        flags.get("games", GAMES), flags.get("layers", FIGURE_LAYERS), flags.get("seeds", [0])
    ):
        own = {"env": game, "layer": layer, "seed": seed, "frames": frames}
        config, _ = choose_config(shared | own, modes)
        choose_device(config.device)
        cell = Cell(config.env, layer, seed)
        if cell in cells:  # named twice, perhaps in two spellings
            continue
        cells.append(cell)
        job = make_job(cell, config, passed, logdir)
        if job.found.state != "finished":
            jobs.append(job)
    _check_writable(logdir)
    return cells, jobs


def pass_through(rest: Sequence[str]) -> dict[str, Any]:
    """Flags of run_atari.py, by name."""
    parser = atari_command.build_parser()
    parser.prog = PROGRAM
    passed = parse(parser, rest)
    for name in passed:
        if name in OURS:
            raise ValueError(f"--{name} after --; expected before it, nearest: --{OURS[name]}")
        if name in ("resume", "evaluate", "episodes", "video", "deterministic"):
            raise ValueError(
                f"--{name} after --; expected settings of runs to train, and --resume is automatic"
            )
    return passed


def make_job(cell: Cell, config: RunConfig, passed: dict[str, Any], logdir: Path) -> Job:
    """The command that plays a cell, or plays it further."""
    folder = cell.folder(logdir)
    found = find_run(folder, cell.game, config.frames)
    command = [sys.executable, str(ROOT / "run_atari.py"), f"--frames={config.frames}"]
    if found.run is None:
        command += as_flags({"env": cell.game, "layer": cell.layer, "seed": cell.seed})
        command += as_flags({"logdir": str(folder), **passed})
    else:
        _check_same_settings(found.run, config)
        # A resumed run has the settings of the file in its own config.yaml.
        kept = {name: value for name, value in passed.items() if name != "config"}
        command += as_flags({"resume": str(found.run), **kept})
    if found.state != "finished":
        for run in run_folders(folder, cell.game):
            if (run / "config.yaml").is_file():
                RunDirectory.open(run).close()  # ValueError if a process works on it
    return Job(cell, folder, config, command, found)


def as_flags(values: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    return words


def run_folders(folder: Path, game: str) -> list[Path]:
    """Run directories of a cell, oldest first: run_atari.py numbers them."""
    numbered = [
        (int(match[1]), path)
        for path in folder.glob(f"{game}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{game}-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


def find_run(folder: Path, game: str, frames: int) -> Found:
    """How far a cell is. A run that never wrote a whole checkpoint has to begin anew."""
    best = Found("new", 0, None)
    for run in run_folders(folder, game):
        if not (run / "config.yaml").is_file():
            continue
        try:
            played = FRAMES_PER_TIMESTEP * newest_checkpoint(run / "checkpoints").timesteps
        except CheckpointError:
            continue
        if played >= best.frames:
            state = "finished" if played >= frames else "interrupted"
            best = Found(state, played, run)
    return best


def _check_same_settings(run: Path, config: RunConfig) -> None:
    before = stored_config(run)
    for name in sorted(FIELD_NAMES - set(FREE)):
        old, new = getattr(before, name), getattr(config, name)
        if old != new:
            raise ValueError(
                f"{name} is {new!r}, but {run} was played with {old!r}: expected the same in all "
                f"runs of one --logdir, nearest: {old!r}"
            )


def _check_writable(logdir: Path) -> None:
    try:
        logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {logdir}: {error.strerror}") from error
    if not os.access(logdir, os.W_OK):
        raise ValueError(f"cannot write to {logdir}: expected a folder that may be written")


def cells_there(logdir: Path, flags: dict[str, Any]) -> list[Cell]:
    """Cells with a folder in `logdir`, those of the flags where flags are given.

    Raises:
        ValueError: if there are none.
    """
    games = [canonical(RunConfig(env=game)).env for game in flags.get("games", [])]
    for layer in flags.get("layers", []):
        configure({"layer": layer}, RunConfig(), "the flags")
    found = []
    for path in sorted(logdir.glob("*-seed*")):
        match = re.fullmatch(r"(\w+)-(\w+)-seed(\d+)", path.name)
        if match and path.is_dir() and match[2] in LAYERS:
            found.append(Cell(match[1], match[2], int(match[3])))
    chosen = [
        cell
        for cell in found
        if (not games or cell.game in games)
        and cell.layer in flags.get("layers", LAYERS)
        and cell.seed in flags.get("seeds", [cell.seed])
    ]
    if not chosen:
        there = ", ".join(map(str, found)) or "nothing"
        raise ValueError(f"no such run in {logdir}: expected GAME-LAYER-seedN, there is {there}")
    return sorted(chosen, key=lambda cell: (_rank(cell.game, GAMES), *cell))


def _rank(name: str, order: Iterable[str]) -> int:
    """Place in an order; those that are not in it come last."""
    names = list(order)
    return names.index(name) if name in names else len(names)


# Playing.


class StopSignals:
    """Ctrl-C, SIGTERM and a closed terminal, kept until `take` hands them to the runs."""

    # Windows has no SIGHUP.
    NUMBERS = frozenset({signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)})

    def __init__(self) -> None:
        self.exit_code = 0
        self._pending: list[int] = []

    def __enter__(self) -> StopSignals:
        # Under nohup SIGHUP is ignored, and stays so.
        self._before = {
            number: signal.signal(number, self._note)
            for number in self.NUMBERS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.exit_code = self.exit_code or 128 + number
        self._pending.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def take(self) -> list[int]:
        """Signals that have come since the last call."""
        taken, self._pending = self._pending, []
        return taken


def run_jobs(jobs: Sequence[Job], parallel: int, signals: StopSignals) -> list[str]:
    """Play all jobs, `parallel` at a time; returns a line for each that failed.

    After a signal no further one starts, and those that run get the signal and end by themselves.
    """
    waiting = list(jobs)
    running: dict[subprocess.Popen[bytes], Job] = {}
    failed: list[str] = []
    try:
        while running or (waiting and not signals.exit_code):
            while waiting and len(running) < parallel and not signals.exit_code:
                job = waiting.pop(0)
                try:
                    running[start(job)] = job
                except OSError as error:
                    failed.append(f"{job.cell} could not be started: {error}")
                    say(failed[-1])
            time.sleep(POLL_SECONDS)
            for number in signals.take():
                for process in running:
                    process.send_signal(number)
            for process in [process for process in running if process.poll() is not None]:
                message = outcome(running.pop(process), process.returncode, signals)
                if message:
                    failed.append(message)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def start(job: Job) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C reaches it once and through us only:
    run_atari.py takes a second signal as the wish to leave without a checkpoint."""
    job.folder.mkdir(parents=True, exist_ok=True)
    output = job.folder / OUTPUT_FILE
    with output.open("ab") as file:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    begun = "started"
    if job.found.run is not None:
        begun = f"goes on from {job.found.frames:,} frames"
        stored = stored_config(job.found.run)
        if stored.anneal and stored.frames != job.config.frames:
            begun += f" (its learning rate was annealed over {stored.frames:,} frames so far)"
    say(f"{job.cell}: {begun}; output in {output}")
    return process


def outcome(job: Job, code: int, signals: StopSignals) -> str:
    """Say how a run ended; returns a line if it failed."""
    found = find_run(job.folder, job.cell.game, job.config.frames)
    if code == 0 and found.state == "finished":
        say(f"{job.cell}: finished, {found.frames:,} frames")
        return ""
    if signals.exit_code and code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        say(f"{job.cell}: stopped at {found.frames:,} frames")
        return ""
    path = job.folder / OUTPUT_FILE
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    message = f"{job.cell} failed (exit {code}, {found.frames:,} frames saved): {last.strip()}"
    say(message)
    return message


def say(line: str) -> None:
    print(line, flush=True)


def complain(failed: Iterable[str]) -> None:
    for message in failed:
        print(f"{PROGRAM}: {message}", file=sys.stderr)


# The table and the figure.


class Curve(NamedTuple):
    """Mean raw score of the last 100 games, as logged."""

    frames: np.ndarray
    scores: np.ndarray


def read_curve(logdir: Path, cell: Cell) -> Curve | None:
    """The curve of a cell's run; None while no game is finished."""
    folder = cell.folder(logdir)
    runs = [run for run in run_folders(folder, cell.game) if (run / "progress.csv").is_file()]
    run = find_run(folder, cell.game, 0).run or (runs[-1] if runs else None)
    if run is None or not (run / "progress.csv").is_file():
        return None
    points = []
    with (run / "progress.csv").open(newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            frames, score = _number(row, "time/frames"), _number(row, "rollout/ep_rew_mean")
            if math.isfinite(frames) and math.isfinite(score):
                points.append((frames, score))
    if not points:
        return None
    # A row that is logged twice, as at the end of a run, counts once.
    frames_of, scores_of = zip(*sorted(dict(points).items()), strict=True)
    return Curve(np.array(frames_of), np.array(scores_of))


def _number(row: dict[str, str], key: str) -> float:
    """A cell of the table; nan where it is empty or half written."""
    try:
        return float(row.get(key) or "nan")
    except ValueError:
        return math.nan


def report(cells: Sequence[Cell], logdir: Path) -> None:
    """Write and print the table, and draw the figure."""
    curves = {cell: curve for cell in cells if (curve := read_curve(logdir, cell)) is not None}
    text = make_table(cells, curves, logdir)
    write_atomically(logdir / TABLE_FILE, text.encode())
    write_atomically(logdir / FIGURE_FILE, draw(cells, curves))
    say(text)
    say(f"written: {logdir / TABLE_FILE} and {logdir / FIGURE_FILE}")


def groups(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells of all seeds by game and layer, in the order in which they come."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.game, cell.layer), []).append(cell)
    return grouped


def make_table(cells: Sequence[Cell], curves: dict[Cell, Curve], logdir: Path) -> str:
    """Markdown: scores, then what the paper and others have published."""
    lines = [
        "Raw scores of training games: each seed's mean of its last 100 games (of all of them "
        f"where there were fewer), then mean +- std (ddof {DDOF}), min and max over seeds.",
        *describe_settings(cells, logdir),
        "",
        "| game | layer | seeds | frames | last 100 games: mean +- std | min | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for (game, layer), members in groups(cells).items():
        having = [cell for cell in members if cell in curves]
        seeds = " ".join(str(cell.seed) for cell in having) or "none"
        scores = [float(curves[cell].scores[-1]) for cell in having]
        frames = sorted({int(curves[cell].frames[-1]) for cell in having})
        span = " to ".join(f"{count:,}" for count in frames[:1] + frames[1:][-1:]) or "0"
        columns = [game, layer, seeds, span, *summarise(scores)]
        lines.append(f"| {' | '.join(columns)} |")
    games = list(dict.fromkeys(cell.game for cell in cells))
    lines += ["", "The paper (5 runs, a figure and words; no protocol):", ""]
    lines += [f"* {game}: {CLAIMS.get(game, 'no claim')}." for game in games]
    lines += [
        *("", "Published by others after 200 million frames, not by us; mean +- std:", ""),
        f"| game | {' | '.join(PUBLISHED_BY)} |",
        "|---" * (len(PUBLISHED_BY) + 1) + "|",
    ]
    none = ("",) * len(PUBLISHED_BY)
    lines += [f"| {game} | {' | '.join(PUBLISHED.get(game, none))} |" for game in games]
    if "MontezumaRevenge" in games:
        lines += ["", MONTEZUMA]
    return "\n".join(lines) + "\n"


def summarise(scores: Sequence[float]) -> tuple[str, str, str]:
    """Mean with spread, smallest and largest of the seeds' scores."""
    if not scores:
        return "no game finished", "", ""
    mean = f"{statistics.fmean(scores):.2f}"
    spread = f" +- {np.std(scores, ddof=DDOF):.2f}" if len(scores) > DDOF else " (one seed)"
    return mean + spread, f"{min(scores):.2f}", f"{max(scores):.2f}"


def describe_settings(cells: Sequence[Cell], logdir: Path) -> list[str]:
    """The settings that a score cannot be read without, and whether all runs share them."""
    seen: dict[str, set[str]] = {"protocol": set(), "encoder": set(), "stack": set()}
    for cell in cells:
        for run in run_folders(cell.folder(logdir), cell.game)[-1:]:
            if (run / "config.yaml").is_file():
                config = stored_config(run)
                for name, values in seen.items():
                    values.add(str(getattr(config, name)))
    parts = [f"{name} {' and '.join(sorted(values))}" for name, values in seen.items() if values]
    return [f"Sampled actions; {', '.join(parts)}."] if parts else []


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames, mean and standard deviation over seeds, where all of them have a score; else empty.

    Elsewhere the mean would jump whenever a seed joins or leaves.
    """
    start = max(curve.frames[0] for curve in curves)
    end = min(curve.frames[-1] for curve in curves)
    grid = np.linspace(start, end, GRID_POINTS if start <= end else 0)
    scores = np.stack([np.interp(grid, curve.frames, curve.scores) for curve in curves])
    spread = scores.std(axis=0, ddof=DDOF) if len(curves) > DDOF else np.zeros_like(grid)
    return grid, scores.mean(axis=0), spread


def draw(cells: Sequence[Cell], curves: dict[Cell, Curve]) -> bytes:
    """A PNG with one panel per game."""
    games = list(dict.fromkeys(cell.game for cell in cells))
    columns = min(2, len(games))
    rows = math.ceil(len(games) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(games) :]:
        panel.set_axis_off()
    for game, panel in zip(games, panels, strict=False):
        panel.set_title(game)
        panel.set_xlabel("frames")
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.set_ylabel("raw score, last 100 games")
        for (_, layer), members in groups(cell for cell in cells if cell.game == game).items():
            having = [curves[cell] for cell in members if cell in curves]
            if not having:
                continue
            frames, mean, spread = mean_curve(having)
            color = f"C{_rank(layer, LAYERS)}"
            seeds = f"{len(having)} seed{'s' if len(having) > 1 else ''}"
            # A line through a single point would not be seen.
            marker = "o" if len(set(frames)) == 1 else ""
            label = f"{layer} ({seeds})"
            panel.plot(frames, mean, color=color, marker=marker, label=label)
            panel.fill_between(
                frames, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0
            )
        if panel.lines:
            panel.legend(fontsize="small")
        else:
            panel.text(0.5, 0.5, "no game finished", ha="center", transform=panel.transAxes)
            panel.set_xticks([])
            panel.set_yticks([])
    figure.suptitle(f"Mean and standard deviation (ddof {DDOF}) over seeds", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
