"""The paper's Figure 3: Atari games with plain, HyperNet and Neurocoder heads, over seeds.

One run of run_atari.py per game, layer and seed, one after the other; for several at a time start
this several times with other seeds. The same command again goes on where it was stopped. It ends
with LOGDIR/figure3.md and LOGDIR/figure3.png of what is there.

python benchmarks/atari_figure3.py --games Seaquest --layers linear neurocoder --seeds 0 1 \
    --frames 4_000_000 --logdir runs/figure3
python benchmarks/atari_figure3.py --seeds 0 1 2 3 4 -- --encoder paper
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ncrl.agents.atari.command import build_parser as run_atari_parser
from ncrl.agents.atari.config import FRAMES_PER_TIMESTEP, RunConfig, choose_config, stored_config
from ncrl.agents.runs.checkpoints import CheckpointError, newest_checkpoint
from ncrl.files import write_atomically
from ncrl.layers import LAYERS
from ncrl.settings import make_parser, parse, usage_error
from ncrl.shell.hardware import choose_device

SCRIPT = Path(__file__).resolve().parent.parent / "run_atari.py"
PROGRAM = "atari_figure3.py"
GAMES = ("Seaquest", "MsPacman", "Frostbite", "MontezumaRevenge")
FIGURE_LAYERS = ("linear", "hypernet", "neurocoder")
GRID_POINTS = 400
"""Points of a mean curve, to which the curves of its seeds are interpolated."""

OURS = ("env", "layer", "seed", "frames", "logdir")
"""Settings of run_atari.py that this command gives."""


class Cell(NamedTuple):
    """One curve of one seed."""

    game: str
    layer: str
    seed: int

    def run(self, logdir: Path) -> Path:
        """Its newest run directory; nothing else writes beside it."""
        folder = logdir / f"{self.game}-{self.layer}-seed{self.seed}"
        ends = [path.name.rpartition("-")[2] for path in folder.glob(f"{self.game}-*")]
        numbers = [int(end) for end in ends if end.isdigit()]
        return folder / f"{self.game}-{max(numbers, default=1)}"


class Curve(NamedTuple):
    """Mean raw score of the last 100 games, as logged."""

    frames: Sequence[float]
    scores: Sequence[float]


Curves = dict[tuple[str, str], dict[int, Curve]]
"""By game and layer, then by seed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = make_parser((__doc__ or "").splitlines()[0], "What follows -- is for run_atari.py.")
    parser.prog = PROGRAM
    parser.add_argument("--games", nargs="+", help=f"(default: {' '.join(GAMES)})")
    parser.add_argument("--layers", nargs="+", help=f"heads (default: {' '.join(FIGURE_LAYERS)})")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0)")
    parser.add_argument("--frames", type=int, help=f"of each run (default: {RunConfig.frames})")
    parser.add_argument("--logdir", help="folder of all runs (default: runs/figure3)")
    flags, rest = parse(parser, given[:cut]), given[cut + 1 :]
    logdir = Path(flags.get("logdir", "runs/figure3"))
    frames = flags.get("frames", RunConfig.frames)
    exit_code = 0
    try:
        cells = chosen_cells(flags, rest)
        logdir.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            code = play(cell, frames, logdir, rest)
            if code:
                print(f"{PROGRAM}: {cell} ended with exit code {code}", file=sys.stderr)
                exit_code = 1
            if code >= 128:
                print("stopped; the same command goes on")
                exit_code = code
                break
        report(cells, logdir)
    except (OSError, ValueError) as error:
        usage_error(PROGRAM, str(error))
    return exit_code


def chosen_cells(flags: dict[str, Any], rest: Sequence[str]) -> list[Cell]:
    """All of the figure, whose settings have been looked at.

    Raises:
        ValueError: for settings that make no sense.
    """
    parser = run_atari_parser()
    parser.prog = PROGRAM
    passed = parse(parser, rest)
    modes = {"resume": None, "config": passed.pop("config", None)}
    for name in passed:
        if name in OURS or name not in RunConfig.__dataclass_fields__:
            raise ValueError(
                f"--{name} after --; expected settings of runs other than {', '.join(OURS)}"
            )
    cells = {}
    for game, layer, seed in itertools.product(
        flags.get("games", GAMES), flags.get("layers", FIGURE_LAYERS), flags.get("seeds", [0])
    ):
        own = {"env": game, "layer": layer, "seed": seed}
        frames = flags.get("frames", RunConfig.frames)
        config, _ = choose_config(passed | own | {"frames": frames}, modes)
        choose_device(config.device)
        cells[Cell(config.env, layer, seed)] = True  # a game may be named twice, in two spellings
    return list(cells)


def play(cell: Cell, frames: int, logdir: Path, rest: Sequence[str]) -> int:
    """Play a cell to its end, from wherever it is; returns the exit code of run_atari.py.

    Ctrl-C reaches the run itself, which ends with a checkpoint; SIGTERM is handed on to it.
    """
    run, words = cell.run(logdir), list(rest)
    done = frames_of(run)
    if done >= frames:
        return 0
    if done:
        if "--config" in words:  # a resumed run has its own
            at = words.index("--config")
            del words[at : at + 2]
        words = [word for word in words if not word.startswith("--config=")]
        words += ["--resume", str(run)]
    else:
        words += ["--env", cell.game, "--layer", cell.layer, "--seed", str(cell.seed)]
        words += ["--logdir", str(run.parent)]
    print(f"{cell}: from {done:,} to {frames:,} frames", flush=True)
    interrupted = signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--frames", str(frames), *words])
    terminated = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, terminated)
    return code if code >= 0 else 128 - code


def frames_of(run: Path) -> int:
    """Of the newest whole checkpoint of a run; a run without any begins anew."""
    try:
        return FRAMES_PER_TIMESTEP * newest_checkpoint(run / "checkpoints").timesteps
    except CheckpointError:
        return 0


# The table and the figure.


def read_curve(run: Path) -> Curve | None:
    """The curve of a run; None while no game is finished."""
    points = {}
    if (run / "progress.csv").is_file():
        with (run / "progress.csv").open(newline="", errors="replace") as file:
            for row in csv.DictReader(file):
                # Cells are empty before the first game, and half written after a kill.
                frames, score = (number(row.get(k)) for k in ("time/frames", "rollout/ep_rew_mean"))
                if math.isfinite(frames) and math.isfinite(score):
                    points[frames] = score
    return Curve(*zip(*sorted(points.items()), strict=True)) if points else None


def number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def report(cells: Sequence[Cell], logdir: Path) -> None:
    """Write and print the table, and draw the figure."""
    curves: Curves = {}
    for cell in cells:
        seeds = curves.setdefault((cell.game, cell.layer), {})
        if (curve := read_curve(cell.run(logdir))) is not None:
            seeds[cell.seed] = curve
    settings = {
        f"protocol {config.protocol}, encoder {config.encoder}, stack {config.stack}"
        for cell in cells
        if (cell.run(logdir) / "config.yaml").is_file()
        for config in [stored_config(cell.run(logdir))]
    }
    text = make_table(curves, sorted(settings))
    write_atomically(logdir / "figure3.md", text.encode())
    write_atomically(logdir / "figure3.png", draw(curves))
    print(f"{text}\nwritten: {logdir / 'figure3.md'} and {logdir / 'figure3.png'}", flush=True)


def make_table(curves: Curves, settings: Sequence[str]) -> str:
    """Markdown: scores over seeds, by game and layer."""
    lines = [
        "Raw scores of training games: each seed's mean of its last 100 games (of all of them "
        "where there were fewer), then mean +- std (of a sample), min and max over seeds.",
        f"Sampled actions; {'; '.join(settings)}.",
        "",
        "| game | layer | seeds | frames | last 100 games: mean +- std | min | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for (game, layer), seeds in curves.items():
        cells = [game, layer, "none", "0", "no game finished", "", ""]
        if seeds:
            scores = [curve.scores[-1] for curve in seeds.values()]
            frames = sorted({int(curve.frames[-1]) for curve in seeds.values()})
            cells[2:4] = [" ".join(map(str, seeds)), f"{frames[0]:,}"]
            cells[3] += f" to {frames[-1]:,}" if len(frames) > 1 else ""
            spread = f"+- {statistics.stdev(scores):.2f}" if len(scores) > 1 else "(one seed)"
            cells[4] = f"{statistics.fmean(scores):.2f} {spread}"
            cells[5:] = [f"{min(scores):.2f}", f"{max(scores):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames, mean and standard deviation over seeds, where all of them have a score; else empty.

    Elsewhere the mean would jump whenever a seed joins or leaves.
    """
    start = max(curve.frames[0] for curve in curves)
    end = min(curve.frames[-1] for curve in curves)
    grid = np.linspace(start, end, GRID_POINTS if start <= end else 0)
    scores = np.stack([np.interp(grid, curve.frames, curve.scores) for curve in curves])
    spread = scores.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(grid)
    return grid, scores.mean(axis=0), spread


def draw(curves: Curves) -> bytes:
    """A PNG with one panel per game."""
    games = list(dict.fromkeys(game for game, _ in curves))
    columns = min(2, len(games))
    rows = math.ceil(len(games) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    for panel in list(figure.subplots(rows, columns, squeeze=False).flat):
        if not games:
            panel.set_axis_off()
            continue
        game = games.pop(0)
        panel.set(title=game, xlabel="frames", ylabel="raw score, last 100 games")
        panel.xaxis.set_major_formatter(EngFormatter())
        for layer in LAYERS:
            seeds = list(curves.get((game, layer), {}).values())
            if not seeds:
                continue
            frames, mean, spread = mean_curve(seeds)
            color = f"C{list(LAYERS).index(layer)}"
            label = f"{layer} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            # A line through a single point would not be seen.
            marker = "o" if len(set(frames)) == 1 else ""
            panel.plot(frames, mean, color=color, marker=marker, label=label)
            panel.fill_between(frames, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
        if panel.lines:
            panel.legend(fontsize="small")
        else:
            panel.text(0.5, 0.5, "no game finished", ha="center", transform=panel.transAxes)
    figure.suptitle("Mean and standard deviation over seeds", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
