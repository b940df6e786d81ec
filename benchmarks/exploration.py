"""What intrinsic rewards see on MontezumaRevenge, and what a run does and imitates there.

python benchmarks/exploration.py places          # bonus of places that chance never reaches
python benchmarks/exploration.py kept runs/MontezumaRevenge-1
python benchmarks/exploration.py rooms runs/MontezumaRevenge-1 --games 6
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from common import print_header, print_row
from gymnasium import spaces
from torch import Tensor

from ncrl.agents import A3C
from ncrl.agents.atari.config import make_factory, stored_config
from ncrl.agents.atari.evaluate import UNPLAYED, play
from ncrl.agents.learning.intrinsic import SOURCES, make_source
from ncrl.agents.runs.checkpoints import newest_checkpoint
from ncrl.envs import AtariPlayer, atari

TIMESTEPS = 12_000  # of random play
STEPS = 300  # of a source, on 640 of these each

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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    kept = commands.add_parser("kept", help="likelihood of the kept actions under the last weights")
    kept.add_argument("run", type=Path)
    commands.add_parser("places", help="bonus of places, in that of the usual ones")
    rooms = commands.add_parser("rooms", help="entropy and bonus in the rooms that a run plays in")
    rooms.add_argument("run", type=Path)
    rooms.add_argument("--games", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "places":
        print_places()
    elif options.command == "kept":
        print_kept(options.run)
    else:
        print_rooms(options.run, options.games)


def print_places() -> None:
    """Train every source on random play, which stays in the first room and hardly ever gets to its
    left; print the bonus of `PLACES` over the median of random play."""
    play = random_play()
    shown = {name: frames_at(memory) for name, memory in PLACES.items()}
    space = spaces.Box(0, 255, tuple(play.shape[1:]), np.uint8)
    columns = {}
    for name in SOURCES:
        torch.manual_seed(0)
        source = make_source(name, space)
        source.watch(play)
        for _ in range(STEPS):
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
    if model.exploration is None or not len(model.exploration.memory):
        print("no demonstration is kept")
        return
    print_header(
        "rewards", "demonstrations", "timesteps", "mean log-probability", "value", "return"
    )
    for depth, demonstrations in model.exploration.memory.demonstrations().items():
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


def print_rooms(run: Path, games: int) -> None:
    """Play games that training has not played with the newest checkpoint. For each score and room:
    in how many games, for how many timesteps, and the means of the policy's entropy and the bonus.

    An entropy of log 18 = 2.89 is chance. ValueError for a run without a bonus.
    """
    model = A3C.load(newest_checkpoint(run / "checkpoints").path, device="cpu")
    if model.exploration is None:
        raise ValueError(f"{run} has no bonus")
    config = stored_config(run)
    seen: dict[tuple[float, int], list[tuple[int, float, float]]] = defaultdict(list)
    for game in range(games):
        player = AtariPlayer(make_factory(config), config.seed + UNPLAYED + game)
        for decision in play(model, player, deterministic=False):
            entropy = decision.distribution.entropy()
            assert entropy is not None
            bonus = model.exploration.source.score(decision.images)
            seen[player.score, player.room()].append((game, float(entropy), float(bonus)))
    print_header("score", "room", "games", "timesteps", "entropy", "bonus")
    for (score, room), timesteps in sorted(seen.items()):
        played, entropies, bonuses = zip(*timesteps, strict=True)
        means = f"{np.mean(entropies):.2f}", f"{np.mean(bonuses):.3f}"
        print_row(f"{score:g}", room, len(set(played)), len(timesteps), *means)


def random_play() -> Tensor:
    """Frames of uniformly random actions, [TIMESTEPS, 1, 84, 84]."""
    player = AtariPlayer(atari("MontezumaRevenge", protocol="machado"), seed=0)
    random = np.random.default_rng(0)
    frames, over = [], True
    for _ in range(TIMESTEPS):
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


if __name__ == "__main__":
    main()
