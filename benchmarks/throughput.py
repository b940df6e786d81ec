"""Timesteps per second of A3C, what its parts alone allow, and peers on the same machine.

The parts are games and acting on all cores, and learning on one thread or the GPU, each alone. They
give the ceiling: the slower of both on a GPU; on the CPU learning takes its time from playing.

Peers are sb3-contrib's RecurrentPPO on the same network, and Stable-Baselines3's A2C, which has no
LSTM and sees four stacked frames instead. At equal work they use T = 20 and our environments and
encoder; both are also run as their users have them, with SB3's make_atari_env and NatureCNN.
Sample Factory is one more where it is installed: see `against_sample_factory.py`.

Rounds go through all rows in turn, and ratios are taken within a round, since the speed of a
machine drifts; the table shows medians over the rounds. The machine has to be idle otherwise: other
load slows rows of several torch threads, the peers', far more than those of several processes.
Where the time of a run goes is what `run_atari.py --profile` says.

python benchmarks/throughput.py --workers 1 2        # encoders a3c and nature
python benchmarks/throughput.py --encoder a3c --no-peers --seconds 10
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from against_sample_factory import sample_factory
from common import (
    HEADS,
    N_STEPS,
    STACK,
    build_a3c,
    games_of_sb3,
    machine,
    medians,
    played_alone,
    print_header,
    print_row,
)
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from ncrl.agents import A3C
from ncrl.agents.playing.sizes import available_cores, default_workers, learner_threads
from ncrl.envs import atari
from ncrl.networks import ENCODERS, AtariEncoder

GAMES_PER_WORKER = 8
"""In the rows that show how the rate grows with workers; their batch grows with them."""

EQUAL_PPO = f"RecurrentPPO, one epoch over T = {N_STEPS}"
EQUAL_A2C = f"A2C without LSTM, T = {N_STEPS}"
USUAL = "as usual: make_atari_env, NatureCNN"

Options = dict[str, Any]


class Row(NamedTuple):
    """A system, or a part of one, to be measured."""

    name: str
    rate: Callable[[float], float]
    """Measures timesteps per second, for so many seconds."""
    n_cores: int | None = None
    """Cores that it may use; None for all."""
    parts: tuple[str, str] | None = None
    """Rows of its parts: games and acting, and learning."""


def main() -> None:
    arguments = parse_arguments()
    print(
        f"Pong, LSTM 512, T = {N_STEPS}, {machine()}, medians of {arguments.rounds} "
        f"round(s), {arguments.seconds:g} s counted per row; load before: {os.getloadavg()[0]:.2f}"
    )
    seconds = arguments.seconds / arguments.rounds
    for encoder in arguments.encoder:
        rows = [*our_rows(arguments, encoder)]
        if arguments.peers:
            rows += peer_rows(arguments, encoder)
        if arguments.sample_factory and encoder == "nature":
            for n in arguments.n_envs:
                rate = partial(sample_factory, arguments.sample_factory, n)
                rows.append(Row(f"Sample Factory APPO, encoder nature, {n} games", rate))
        rates: dict[str, list[float]] = {row.name: [] for row in rows}
        for i in range(arguments.rounds):
            for row in rows:
                with on_cores(row.n_cores):
                    rates[row.name].append(row.rate(seconds))
                progress = f"round {i + 1} of {arguments.rounds}, {encoder}: {row.name}"
                print(f"{progress}: {rates[row.name][-1]:,.0f}", file=sys.stderr, flush=True)
        print(f"\n## Encoder {encoder}\n")
        print_rates(arguments, rows, rates)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", nargs="+", default=["a3c", "nature"], choices=ENCODERS)
    parser.add_argument("--n-envs", type=int, nargs="+", default=[16, 32])
    more = f"rows for growing numbers of workers, {GAMES_PER_WORKER} games and one core each"
    parser.add_argument("--workers", type=int, nargs="+", default=[], help=more)
    parser.add_argument("--device", default="auto", help="of the learner, ours and the peers'")
    parser.add_argument("--seconds", type=float, default=30.0, help="counted, for each row")
    parser.add_argument("--rounds", type=int, default=3, help="that the seconds are divided over")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sample-factory", type=Path, help="the python that has it, as a peer")
    return parser.parse_args()


# Rows.


def our_rows(arguments: argparse.Namespace, encoder: str) -> Iterator[Row]:
    factory, device = atari("Pong"), arguments.device

    def a3c(head: str, n_envs: int, n_workers: int | None) -> Callable[[], A3C]:
        build = partial(build_a3c, factory, head, encoder, device=device)
        return partial(build, n_envs=n_envs, n_workers=n_workers)

    for n, head in itertools.product(arguments.n_envs, HEADS):
        workers = default_workers(n)
        playing = f"games + acting alone, {n // workers} games per core, {head} heads"
        learning = f"learning alone, {n} games, {head} heads"
        yield Row(playing, partial(played_alone, factory, head, encoder, n // workers))
        yield Row(learning, partial(learned_alone, a3c(head, n, 0)))
        name = f"A3C, {workers} workers, {n} games, {head} heads"
        yield Row(name, partial(measure, a3c(head, n, None)), parts=(playing, learning))
    few = arguments.n_envs[0]
    for head in HEADS:
        name = f"A3C serial, {few} games, {head} heads"
        yield Row(name, partial(measure, a3c(head, few, 0)))
    for n in arguments.workers:
        name = f"A3C, {n} workers of {GAMES_PER_WORKER} games on as many cores, plain heads"
        build = a3c("plain", n * GAMES_PER_WORKER, n)
        yield Row(name, partial(measure, build), n_cores=min(n, available_cores()))


def peer_rows(arguments: argparse.Namespace, encoder: str) -> Iterator[Row]:
    """Peers with the first number of environments."""
    n_envs = arguments.n_envs[0]
    features = {
        "features_extractor_class": AtariEncoder,
        "features_extractor_kwargs": {"encoder": encoder},
    }
    lstm = dict(net_arch=[], lstm_hidden_size=512, shared_lstm=True, enable_critic_lstm=False)
    one_epoch = {"n_steps": N_STEPS, "batch_size": N_STEPS * n_envs, "n_epochs": 1}

    def build(make_env: Callable[[], VecEnv], policy: Options, settings: Options) -> Any:
        options = {"device": arguments.device, "policy_kwargs": policy, **settings}
        if "lstm_hidden_size" in policy:
            return RecurrentPPO("CnnLstmPolicy", make_env(), **options)
        return A2C("CnnPolicy", make_env(), **options)

    usual = partial(games_of_sb3, "Pong", n_envs, seed=0)
    ours = partial(atari("Pong"), n_envs, 0)
    stacked = partial(atari("Pong", stack=STACK), n_envs, 0)
    peers: dict[str, tuple[Callable[[], VecEnv], Options, Options]] = {
        EQUAL_PPO: (ours, features | lstm, one_epoch),
        "RecurrentPPO, its usual settings": (ours, features | lstm, {}),
        EQUAL_A2C: (stacked, features, {"n_steps": N_STEPS}),
        f"A2C {USUAL}, T = 5": (lambda: VecFrameStack(usual(), STACK), {}, {}),
        f"RecurrentPPO {USUAL}, one epoch over T = {N_STEPS}": (usual, lstm, one_epoch),
    }
    for name, how in peers.items():
        yield Row(name, partial(measure, partial(build, *how)))


# Measuring.


class Meter(BaseCallback):
    """Ends the training after a quarter of the seconds for warming up, and as many that count."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.first: float | None = None
        self.marks: list[tuple[float, int]] = []
        """Time and timesteps at the starts of rollouts that count."""

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:  # workers start in the first rollout
            now = time.monotonic()
            self.first = self.first or now
            if now > self.first + self.seconds / 4:
                self.marks.append((now, self.num_timesteps))

    def _on_step(self) -> bool:
        return len(self.marks) < 2 or self.marks[-1][0] < self.marks[0][0] + self.seconds


def measure(build: Callable[[], OnPolicyAlgorithm], seconds: float) -> float:
    """Timesteps per second in whole cycles of playing and learning."""
    model, meter = build(), Meter(seconds)
    model.learn(10**9, callback=meter)
    (began, before), *_, (ended, after) = meter.marks
    if model.env is not None:
        model.env.close()
    del model
    gc.collect()  # models are cycles, and hold the threads of emulators
    return (after - before) / (ended - began)


def learned_alone(build: Callable[[], A3C], seconds: float) -> float:
    """Timesteps per second that one thread learns from, or the GPU, with nothing else running."""
    model = build()
    with learner_threads(available_cores()):
        model.learn(N_STEPS * model.n_envs)  # gives it a batch to learn from
        (milliseconds,) = medians(seconds, model.train)
    return 1000 * N_STEPS * model.n_envs / milliseconds


@contextmanager
def on_cores(number: int | None) -> Iterator[None]:
    """Keep this thread, and the processes that it starts, on the first `number` cores."""
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def print_rates(
    arguments: argparse.Namespace, rows: Sequence[Row], rates: dict[str, list[float]]
) -> None:
    peers = (EQUAL_PPO, EQUAL_A2C) if arguments.peers else ()
    shares = ("share of games + acting", "share of the ceiling")
    columns = ("timesteps/s", "rounds", "frames/s", *shares)
    print_header("", *columns, *(f"against {peer}" for peer in peers))
    for row in rows:
        mine = rates[row.name]
        rate = statistics.median(mine)
        of_parts = ["", ""]
        if row.parts is not None:
            playing, learning = (rates[part] for part in row.parts)
            bounds = [*map(partial(ceiling, arguments.device), playing, learning)]
            of_parts = [f"{100 * median_ratio(mine, most):.0f} %" for most in (playing, bounds)]
        print_row(
            row.name,
            f"{rate:,.0f}",
            f"{min(mine):,.0f} to {max(mine):,.0f}",
            f"{atari('Pong').frame_skip * rate:,.0f}",
            *of_parts,
            *(f"{median_ratio(mine, rates[peer]):.2f}" for peer in peers),
        )
    print("\nWorkers have one thread each; games of peers and of serial rows are stepped by one.")


def ceiling(device: str, playing: float, learning: float) -> float:
    """Timesteps per second where all cores play at this rate, and one or the GPU learns at that."""
    if get_device(device).type == "cuda":
        return min(playing, learning)
    return 1 / (1 / playing + 1 / (available_cores() * learning))


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
