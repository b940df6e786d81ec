"""Curves of runs with an intrinsic reward: a small CSV from a run's `progress.csv`, and a figure.

python benchmarks/exploration.py curve runs/MontezumaRevenge-1 results/montezuma/rnd.csv
python benchmarks/exploration.py figure results/montezuma/*.csv docs/figures/montezuma.png
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

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
    "kept_rollouts": "train/kept_rollouts",
    "imitation_loss": "train/imitation_loss",
}
"""Columns of the small CSV, and what SB3 calls them."""

MOST_ROWS = 300

SHOWN = {
    "score": "mean raw score of 100 games",
    "rewarded_share": "share of games with any reward",
    "int_reward_raw": "bonus before it is normalised",
}
"""What the figure shows over frames."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    curve = commands.add_parser("curve", help="write the small CSV of a run")
    curve.add_argument("run", type=Path)
    curve.add_argument("out", type=Path)
    figure = commands.add_parser("figure", help="draw small CSVs; a curve is called as its file")
    figure.add_argument("curves", type=Path, nargs="+")
    figure.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "curve":
        write_curve(options.run, options.out)
    else:
        draw(options.curves, options.out)


def write_curve(run: Path, out: Path) -> None:
    """At most `MOST_ROWS` rows of what a run has logged."""
    rows = read_rows(run / "progress.csv")
    every = math.ceil(len(rows) / MOST_ROWS)
    kept = rows[::every] + (rows[-1:] if (len(rows) - 1) % every else [])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in kept:
            cells = [row.get(name) or "" for name in COLUMNS.values()]
            writer.writerow([f"{float(cell):.6g}" if cell else "" for cell in cells])


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(curves: Sequence[Path], out: Path) -> None:
    """One panel for each of `SHOWN`, one line for each file."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, 3), SHOWN.items(), strict=True):
        for path in curves:
            rows = [row for row in read_rows(path) if row[column]]
            frames = [float(row["frames"]) / 1e6 for row in rows]
            axes.plot(frames, [float(row[column]) for row in rows], label=path.stem)
        axes.set(title=title, xlabel="million frames")
        axes.grid(alpha=0.3)
        if column == "int_reward_raw":
            axes.set_yscale("log")
    axes.legend(fontsize="small")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
