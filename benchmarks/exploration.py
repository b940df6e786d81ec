"""What intrinsic rewards see on MontezumaRevenge, and the curves of runs with them.

python benchmarks/exploration.py places          # bonus of places that chance never reaches
python benchmarks/exploration.py kept runs/MontezumaRevenge-1   # how well it imitates
python benchmarks/exploration.py curve runs/MontezumaRevenge-1 results/montezuma/rnd.csv
python benchmarks/exploration.py figure results/montezuma/*_seed_*.csv montezuma.png
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import print_header, print_row
from gymnasium import spaces
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.learning.intrinsic import SOURCES, make_source
from ncrl.agents.runs.checkpoints import newest_checkpoint
from ncrl.envs import AtariPlayer, atari

X, Y, ROOM, ITEMS, KEY = 42, 43, 3, 65, 67
"""Bytes of the emulator's memory: where the player stands, the room, what he carries, and whether
the key still hangs in the first room. Written here alone, to show a place; no agent reads them."""

PLACES: dict[str, dict[int, int]] = {
    "start": {},
    "rope": {X: 112, Y: 215},
    "right ledge": {X: 130, Y: 192},
    "floor, right": {X: 130, Y: 148},
    "floor, left": {X: 21, Y: 148},
    "left ledge, below the key": {X: 21, Y: 192},
    "start, with the key": {ITEMS: 2, KEY: 0},
    "room to the left": {ROOM: 0},
    "room to the right": {ROOM: 2},
    "room below": {ROOM: 4},
}

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
    kept = commands.add_parser("kept", help="likelihood of the kept actions under the last weights")
    kept.add_argument("run", type=Path)
    curve = commands.add_parser("curve", help="write the small CSV of a run")
    curve.add_argument("run", type=Path)
    curve.add_argument("out", type=Path)
    figure = commands.add_parser("figure", help="draw small CSVs; a curve is called as its file")
    figure.add_argument("curves", type=Path, nargs="+")
    figure.add_argument("out", type=Path)
    places = commands.add_parser("places", help="bonus of places, in that of the usual ones")
    places.add_argument("--timesteps", type=int, default=12_000, help="of random play")
    places.add_argument("--steps", type=int, default=300, help="of the source, on 640 of them each")
    options = parser.parse_args()
    if options.command == "places":
        print_places(options.timesteps, options.steps)
    elif options.command == "kept":
        print_kept(options.run)
    elif options.command == "curve":
        write_curve(options.run, options.out)
    else:
        draw(options.curves, options.out)


def print_places(timesteps: int, steps: int) -> None:
    """Train every source on random play, which stays in the first room and hardly ever gets to its
    left; print the bonus of `PLACES` over the median of random play."""
    play = random_play(timesteps)
    shown = {name: frames_at(memory) for name, memory in PLACES.items()}
    space = spaces.Box(0, 255, tuple(play.shape[1:]), np.uint8)
    columns = {}
    for name in SOURCES:
        torch.manual_seed(0)
        source = make_source(name, space)
        source.watch(play)
        for _ in range(steps):
            chosen = torch.randint(len(play) - 1, (640,))
            source.learn(play[chosen], play[chosen + 1])
        median = torch.cat([source.score(part) for part in play.split(1000)]).median()
        columns[name] = [float(source.score(frames).mean() / median) for frames in shown.values()]
    print_header("place", *columns)
    for place, ratios in zip(shown, zip(*columns.values(), strict=True), strict=True):
        print_row(place, *(f"{ratio:.1f}" for ratio in ratios))


def print_kept(run: Path) -> None:
    """How likely kept actions are to the policy of the newest checkpoint, where the LSTM's state is
    what that policy itself makes of their pictures, as in play."""
    model = A3C.load(newest_checkpoint(run / "checkpoints").path, device="cpu")
    memory = None if model.exploration is None else model.exploration.memory
    if memory is None or not len(memory):
        print("no demonstration is kept")
        return
    print_header(
        "rewards", "demonstrations", "timesteps", "mean log-probability", "value", "return"
    )
    for depth, demonstrations in memory.demonstrations().items():
        rows = []
        for demonstration in demonstrations:
            with torch.no_grad():
                evaluation = model.policy.evaluate_rollout(
                    demonstration.obs[:, None],
                    demonstration.actions[:, None],
                    model.policy.initial_state(1),
                    demonstration.episode_start[:, None],
                )
            columns = (evaluation.log_prob, evaluation.values[:-1], demonstration.returns[:, None])
            rows.append(torch.cat(columns, dim=1))
        means = torch.cat(rows).mean(0).tolist()
        timesteps = sum(map(len, rows))
        print_row(depth, len(rows), timesteps, *(f"{mean:.2f}" for mean in means))


def random_play(timesteps: int) -> Tensor:
    """Frames of uniformly random actions, [timesteps, 1, 84, 84]."""
    player = AtariPlayer(atari("MontezumaRevenge", protocol="machado"), seed=0)
    random = np.random.default_rng(0)
    frames, over = [], True
    for _ in range(timesteps):
        if over:
            player.reset()
        obs, _, over, _ = player.step(int(random.integers(18)))
        frames.append(obs[0])
    return torch.from_numpy(np.stack(frames))


def frames_at(memory: dict[int, int]) -> Tensor:
    """Eight frames after bytes of the emulator's memory were set, [8, 1, 84, 84]."""
    player = AtariPlayer(atari("MontezumaRevenge", protocol="machado"), seed=3)
    player.reset()
    for _ in range(10):
        player.step(0)
    frames = []
    for timestep in range(9):
        for address, value in memory.items():
            if timestep == 0 or address in (X, Y):  # where nothing holds him he falls
                player._emulator.setRAM(address, value)
        frames.append(player.step(0)[0][0])
    return torch.from_numpy(np.stack(frames[1:]))


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
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, 3), SHOWN.items(), strict=True):
        axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
        for path in curves:
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
