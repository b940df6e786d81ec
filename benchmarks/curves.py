"""The curves of runs on Atari games: kept as small files, compared over seeds, and drawn.

python benchmarks/curves.py keep runs/Pong-1 results/atari/pong_linear_10.csv
python benchmarks/curves.py table results/atari/pong_*.csv --reach 15
python benchmarks/curves.py scores results/atari/pong_*.csv pong.png [--over minutes]
python benchmarks/curves.py bonus results/montezuma/*_seed_*.csv montezuma.png
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import print_header, print_row
from matplotlib import colormaps
from matplotlib.figure import Figure

from ncrl.agents.atari.config import stored_config
from ncrl.tasks.figures import draw_band

SETTINGS = ("env", "layer", "games", "seed")
"""Settings of a run, in every row of its small file."""

GATED = "gated neurocoder"
"""The `layer` of runs with a gate: those with a bonus, and with `--residual-gate`. Rows that were
kept before d9130f9 call them `neurocoder`, those of MontezumaRevenge among them."""

COLUMNS = {
    "frames": "time/frames",
    "seconds": "time/time_elapsed",
    "score": "rollout/ep_rew_mean",
    "rewarded_share": "rollout/rewarded_share",
    "best_score": "rollout/best_score",
    "first_reward_frames": "rollout/first_reward_frames",
    "entropy": "train/entropy_loss",
    "int_reward_raw": "train/int_reward_raw",
    "int_value": "train/int_value",
    "int_explained_variance": "train/int_explained_variance",
    "explained_variance": "train/explained_variance",
    "predictor_loss": "train/predictor_loss",
    "kept_demonstrations": "train/kept_demonstrations",
    "imitation_loss": "train/imitation_loss",
}
"""Columns of the small file that follow, and what SB3 calls them."""

MOST_ROWS = 300
GRID_POINTS = 400  # of a mean over seeds, whose curves are interpolated

SHOWN = {
    "score": "mean raw score of 100 games",
    "rewarded_share": "share of games with any reward",
    "int_reward_raw": "bonus before it is normalised",
}
"""What `bonus` shows over frames."""

Row = Mapping[str, str]

UNITS = ("frames", "minutes")
"""What scores can be shown over."""


class Curve(NamedTuple):
    """Mean raw score of the last 100 games, of one run."""

    along: Sequence[float]  # frames or minutes, one of `UNITS`
    scores: Sequence[float]


Curves = dict[tuple[str, str], dict[int, Curve]]
"""By game and layer, then by seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keep = commands.add_parser("keep", help="write the small file of a run")
    keep.add_argument("run", type=Path)
    keep.add_argument("out", type=Path)
    table = commands.add_parser("table", help="compare small files over seeds")
    table.add_argument("files", type=Path, nargs="+")
    table.add_argument("--reach", type=float, help="also after how many frames a score is reached")
    for name, text in (("scores", "means over seeds, by game"), ("bonus", "a line for each file")):
        figure = commands.add_parser(name, help=f"draw small files: {text}")
        figure.add_argument("files", type=Path, nargs="+")
        figure.add_argument("out", type=Path)
        if name == "scores":
            figure.add_argument("--over", choices=UNITS, default="frames")
    options = parser.parse_args()
    if options.command == "keep":
        write_small(options.run, options.out)
    elif options.command == "table":
        print_table(by_game(options.files), options.reach)
    elif options.command == "scores":
        draw_scores(by_game(options.files, options.over), options.out, options.over)
    else:
        draw_bonus(options.files, options.out)


def write_small(run: Path, out: Path) -> None:
    """At most `MOST_ROWS` rows, and the last, of what a run has logged."""
    config = stored_config(run)
    if config.layer == "neurocoder" and config.residual_gate:
        config = replace(config, layer=GATED)
    settings = [str(getattr(config, name)) for name in SETTINGS]
    rows = read_rows(run / "progress.csv")
    every = max(1, math.ceil(len(rows) / MOST_ROWS))
    kept = rows[::every] + (rows[-1:] if (len(rows) - 1) % every else [])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*SETTINGS, *COLUMNS])
        for row in kept:
            cells = [row.get(name) or "" for name in COLUMNS.values()]
            writer.writerow(settings + [f"{float(cell):.6g}" if cell else "" for cell in cells])


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_game(files: Sequence[Path], over: str = "frames") -> Curves:
    """What small files hold, a curve for each seed; ValueError for two of the same."""
    curves: Curves = {}
    for path in files:
        rows = [row for row in read_rows(path) if row["score"]]
        if not rows:
            continue
        rows.sort(key=lambda row: float(row["frames"]))
        along = list(minutes(rows)) if over == "minutes" else [float(row["frames"]) for row in rows]
        scores = [float(row["score"]) for row in rows]
        seeds = curves.setdefault((rows[0]["env"], rows[0]["layer"]), {})
        if (seed := int(rows[0]["seed"])) in seeds:
            raise ValueError(f"{path} has the game, heads and seed of another file")
        seeds[seed] = Curve(along, scores)
    return curves


def minutes(rows: Iterable[Row]) -> Iterator[float]:
    """Minutes of play at each row; those of a run that was resumed go on."""
    before = last = 0.0
    for row in rows:
        seconds = float(row["seconds"])
        before += last if seconds < last else 0.0
        last = seconds
        yield (before + seconds) / 60


def print_table(curves: Curves, reach: float | None) -> None:
    """Scores at the end over seeds, and frames to a score, by game and layer."""
    more = [] if reach is None else [f"million frames to {reach:g}, by seed"]
    columns = ("heads", "seeds", "million frames", "last 100 games: mean ± std", "by seed", *more)
    print_header("game", *columns)
    for (game, layer), seeds in curves.items():
        ends = [curve.scores[-1] for curve in seeds.values()]
        spread = f" ± {statistics.pstdev(ends):.1f}" if len(ends) > 1 else " (one seed)"
        frames = sorted(curve.along[-1] / 1e6 for curve in seeds.values())
        reached = "" if reach is None else ", ".join(frames_to(seeds.values(), reach))
        print_row(
            game,
            layer,
            ", ".join(map(str, seeds)),
            " to ".join(dict.fromkeys(f"{frames[i]:.1f}" for i in (0, -1))),
            f"{statistics.fmean(ends):.1f}{spread}",
            ", ".join(f"{end:.1f}" for end in ends),
            *([reached] if more else []),
        )


def frames_to(curves: Iterable[Curve], score: float) -> Iterator[str]:
    """Million frames after which each curve first has a score, or `never`."""
    for curve in curves:
        reached = (f for f, s in zip(curve.along, curve.scores, strict=True) if s >= score)
        first = next(reached, None)
        yield "never" if first is None else f"{first / 1e6:.2f}"


def on_one_grid(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Frames or minutes [N] that all curves have, and scores there [curves, N]; N is 0 if none.

    Elsewhere a mean would jump whenever a seed joins or leaves.
    """
    start = max(curve.along[0] for curve in curves)
    end = min(curve.along[-1] for curve in curves)
    grid = np.linspace(start, end, GRID_POINTS if start <= end else 0)
    return grid, np.stack([np.interp(grid, curve.along, curve.scores) for curve in curves])


def draw_scores(curves: Curves, out: Path, over: str = "frames") -> None:
    """A panel for each game: mean over seeds between the standard deviations, by layer."""
    games = list(dict.fromkeys(game for game, _ in curves))
    scale, name = (1e6, "million frames") if over == "frames" else (1.0, over)
    others = sorted({layer for _, layer in curves} - {"linear", "neurocoder"})
    colors = {layer: f"C{i}" for i, layer in enumerate(("linear", "neurocoder", *others))}
    figure = Figure(figsize=(5.5 * len(games), 3.6), layout="constrained")
    for axes, game in zip(figure.subplots(1, len(games), squeeze=False).flat, games, strict=True):
        for (of, layer), seeds in sorted(curves.items()):
            if of != game:
                continue
            grid, scores = on_one_grid(list(seeds.values()))
            label = f"{layer}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
            along = (grid / scale).tolist()
            draw_band(axes, along, scores.tolist(), label, color=colors[layer])
        axes.set(title=game, xlabel=name, ylabel="raw score, last 100 games")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(out, dpi=110)


def draw_bonus(files: Sequence[Path], out: Path) -> None:
    """One panel for each of `SHOWN`, one line for each file, called as it."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, 3), SHOWN.items(), strict=True):
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        for path in files:
            rows = [row for row in read_rows(path) if row[column]]
            frames = [float(row["frames"]) / 1e6 for row in rows]
            axes.plot(frames, [float(row[column]) for row in rows], label=path.stem)
        axes.set(title=title, xlabel="million frames")
        axes.grid(alpha=0.3)
        if column == "int_reward_raw":
            axes.set_yscale("log")
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
