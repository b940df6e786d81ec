"""Timesteps per second of A3C, what its parts alone allow, and peers on the same machine.

The parts are an environment's step, choosing actions, and a step of learning, each timed alone on
one thread. If all cores did nothing else they would give the ceiling,
cores / (environment + acting + learning), in seconds per timestep.

Peers are sb3-contrib's RecurrentPPO on the same network, and Stable-Baselines3's A2C, which has no
LSTM and sees four stacked frames instead. At equal work they use T = 20 and our environments and
encoder; both are also run as their users have them, with SB3's make_atari_env and NatureCNN.

Rounds go through all rows in turn, and ratios are taken within a round, since the speed of a
machine drifts; the tables show medians over the rounds. The machine has to be idle otherwise: other
load slows rows of several torch threads, the peers', far more than those of several processes.

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
from typing import Any, NamedTuple

import ale_py
import gymnasium
import numpy as np
import torch
from common import HEADS, N_STEPS, build_a3c, machine, medians, print_header, print_row
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from ncrl.agents.playing.sizes import available_cores, default_workers
from ncrl.envs import atari
from ncrl.networks import AtariEncoder

STACK = 4
"""Frames that A2C sees at once."""

GAMES_PER_WORKER = 8
"""In the rows that show how the rate grows with workers; their batch grows with them."""

BURST = 20
"""Calls in a row of environment and acting: a worker plays many steps between two rollouts, with
warm caches."""

EQUAL_PPO = f"RecurrentPPO, one epoch over T = {N_STEPS}"
EQUAL_A2C = f"A2C without LSTM, T = {N_STEPS}"
USUAL = "as usual: make_atari_env, NatureCNN"

Options = dict[str, Any]

Key = tuple[str, int]
"""Head and number of environments."""


class Row(NamedTuple):
    """A whole system to be measured."""

    name: str
    build: Callable[[], OnPolicyAlgorithm]
    parts: Key | None = None
    """Whose ceiling the rate is compared with."""
    n_cores: int | None = None
    """Cores that it may use; None for all."""


class Costs(NamedTuple):
    """Seconds per timestep on one thread."""

    environment: float
    acting: float
    learning: float
    learns_here: bool
    """Learning takes time of the CPU's cores, not of a GPU."""

    def ceiling(self) -> float:
        """Timesteps per second that these allow when all cores are always busy."""
        playing = self.environment + self.acting
        if self.learns_here:
            return available_cores() / (playing + self.learning)
        return min(available_cores() / playing, 1 / self.learning)


def main() -> None:
    arguments = parse_arguments()
    print(
        f"{arguments.game}, LSTM 512, T = {N_STEPS}, {machine()}, medians of {arguments.rounds} "
        f"round(s), {arguments.seconds:g} s counted per row; load before: {os.getloadavg()[0]:.2f}"
    )
    seconds = arguments.seconds / arguments.rounds
    for encoder in arguments.encoder:
        rows = [*our_rows(arguments, encoder)]
        if arguments.peers:
            rows += peer_rows(arguments, encoder)
        costs: dict[Key, list[Costs]] = {row.parts: [] for row in rows if row.parts}
        rates: dict[str, list[float]] = {row.name: [] for row in rows}
        for i in range(arguments.rounds):
            for key, seen in costs.items():
                seen.append(time_parts(arguments, encoder, *key, seconds))
            for row in rows:
                with on_cores(row.n_cores):
                    rates[row.name].append(measure(row.build(), seconds))
                progress = f"round {i + 1} of {arguments.rounds}, {encoder}: {row.name}"
                print(f"{progress}: {rates[row.name][-1]:,.0f}", file=sys.stderr, flush=True)
        print(f"\n## Encoder {encoder}\n")
        print_parts(costs)
        print()
        print_rates(arguments, rows, costs, rates)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--game", default="Pong")
    parser.add_argument(
        "--encoder", nargs="+", default=["a3c", "nature"], choices=("a3c", "nature", "paper")
    )
    parser.add_argument("--n-envs", type=int, nargs="+", default=[16, 32])
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[],
        help=f"rows for growing numbers of workers, {GAMES_PER_WORKER} games and one core each",
    )
    parser.add_argument("--device", default="auto", help="of the learner, ours and the peers'")
    parser.add_argument("--seconds", type=float, default=30.0, help="counted, for each row")
    parser.add_argument("--rounds", type=int, default=3, help="that the seconds are divided over")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


# Rows.


def our_rows(arguments: argparse.Namespace, encoder: str) -> Iterator[Row]:
    def a3c(head: str, n_envs: int, n_workers: int | None) -> Callable[[], OnPolicyAlgorithm]:
        build = partial(build_a3c, atari(arguments.game), head, encoder, device=arguments.device)
        return partial(build, n_envs=n_envs, n_workers=n_workers)

    for n, head in itertools.product(arguments.n_envs, HEADS):
        name = f"A3C, {default_workers(n)} workers, {n} games, {head} heads"
        yield Row(name, a3c(head, n, None), (head, n))
    few = arguments.n_envs[0]
    for head in HEADS:
        yield Row(f"A3C serial, {few} games, {head} heads", a3c(head, few, 0), (head, few))
    for n in arguments.workers:
        name = f"A3C, {n} workers of {GAMES_PER_WORKER} games on as many cores, plain heads"
        build = a3c("plain", n * GAMES_PER_WORKER, n)
        yield Row(name, build, n_cores=min(n, available_cores()))


def peer_rows(arguments: argparse.Namespace, encoder: str) -> Iterator[Row]:
    """Peers with the first number of environments."""
    game, n_envs = atari(arguments.game), arguments.n_envs[0]
    features = {
        "features_extractor_class": AtariEncoder,
        "features_extractor_kwargs": {"encoder": encoder},
    }
    lstm = dict(net_arch=[], lstm_hidden_size=512, shared_lstm=True, enable_critic_lstm=False)
    one_epoch = {"n_steps": N_STEPS, "batch_size": N_STEPS * n_envs, "n_epochs": 1}

    def usual_env() -> VecEnv:
        gymnasium.register_envs(ale_py)
        env_id = game.game.title().replace("_", "") + "NoFrameskip-v4"
        return make_atari_env(env_id, n_envs, seed=0)

    def usual_stacked() -> VecEnv:
        return VecFrameStack(usual_env(), STACK)

    def build(make_env: Callable[[], VecEnv], policy: Options, settings: Options) -> Any:
        options = {"device": arguments.device, "policy_kwargs": policy, **settings}
        if "lstm_hidden_size" in policy:
            return RecurrentPPO("CnnLstmPolicy", make_env(), **options)
        return A2C("CnnPolicy", make_env(), **options)

    ours = partial(game, n_envs, 0)
    stacked = partial(atari(game.game, stack=STACK), n_envs, 0)
    peers: dict[str, tuple[Callable[[], VecEnv], Options, Options]] = {
        EQUAL_PPO: (ours, features | lstm, one_epoch),
        "RecurrentPPO, its usual settings": (ours, features | lstm, {}),
        EQUAL_A2C: (stacked, features, {"n_steps": N_STEPS}),
        f"A2C {USUAL}, T = 5": (usual_stacked, {}, {}),
        f"RecurrentPPO {USUAL}, one epoch over T = {N_STEPS}": (usual_env, lstm, one_epoch),
    }
    for name, how in peers.items():
        yield Row(name, partial(build, *how))


# Measuring.


def time_parts(
    arguments: argparse.Namespace, encoder: str, head: str, n_envs: int, seconds: float
) -> Costs:
    """Medians, which leave out the rare burst in which a game starts anew."""
    game, per_worker = atari(arguments.game), n_envs // default_workers(n_envs)
    build = partial(build_a3c, game, head, encoder, n_workers=0)
    learner = build(n_envs=n_envs, device=arguments.device)
    learner.learn(N_STEPS * n_envs)  # gives it a batch to learn from
    policy = build(n_envs=per_worker, device="cpu").policy  # workers act on the CPU
    policy.set_training_mode(False)
    env, rng = game(per_worker, 0), np.random.default_rng(0)
    obs = torch.from_numpy(env.reset())
    state, starts = policy.initial_state(per_worker), torch.zeros(per_worker, dtype=torch.bool)

    def play() -> None:
        for _ in range(BURST):
            env.step(rng.integers(game.action_space.n, size=per_worker))

    @torch.no_grad()
    def act() -> None:
        for _ in range(BURST):
            policy.act(obs, state, starts)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    played, acted, learnt = medians(seconds, play, act, learner.train)
    torch.set_num_threads(threads)
    each = 1000 * BURST * per_worker
    is_here = learner.device.type == "cpu"
    return Costs(played / each, acted / each, learnt / (1000 * N_STEPS * n_envs), is_here)


class Meter(BaseCallback):
    """Ends the training after a quarter of the seconds for warming up, and as many that count."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.marks: list[tuple[float, int]] = []
        """Time and timesteps at the starts of rollouts, without the first: it starts workers."""

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.marks.append((time.monotonic(), self.num_timesteps))

    def _on_step(self) -> bool:
        return len(self.counted()) < 2 or self.marks[-1][0] < self.counted()[0][0] + self.seconds

    def counted(self) -> list[tuple[float, int]]:
        return [mark for mark in self.marks if mark[0] >= self.marks[0][0] + self.seconds / 4]


def measure(model: OnPolicyAlgorithm, seconds: float) -> float:
    """Timesteps per second in whole cycles of playing and learning."""
    meter = Meter(seconds)
    model.learn(10**9, callback=meter)
    (began, before), *_, (ended, after) = meter.counted()
    if model.env is not None:
        model.env.close()
    del model
    gc.collect()  # models are cycles, and hold the threads of emulators
    return (after - before) / (ended - began)


@contextmanager
def on_cores(number: int | None) -> Iterator[None]:
    """Keep this thread, and the processes that it starts, on the first `number` cores."""
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    yield
    os.sched_setaffinity(0, before)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# Tables.


def print_parts(costs: dict[Key, list[Costs]]) -> None:
    parts = ("environment", "acting", "learning")
    print_header("one thread, ms per timestep", *parts, "ceiling on all cores, timesteps/s")
    for (head, n_envs), seen in costs.items():
        games = n_envs // default_workers(n_envs)
        times = [f"{1000 * statistics.median(cost[i] for cost in seen):.3f}" for i in range(3)]
        name = f"{head} heads, {games} games a worker, batch of {N_STEPS * n_envs}"
        print_row(name, *times, f"{statistics.median(cost.ceiling() for cost in seen):,.0f}")


def print_rates(
    arguments: argparse.Namespace,
    rows: Sequence[Row],
    costs: dict[Key, list[Costs]],
    rates: dict[str, list[float]],
) -> None:
    peers = (EQUAL_PPO, EQUAL_A2C) if arguments.peers else ()
    against = [f"against {peer}" for peer in peers]
    print_header("", "timesteps/s", "rounds", "frames/s", "share of the ceiling", *against)
    for row in rows:
        mine = rates[row.name]
        rate, share = statistics.median(mine), ""
        if row.parts:
            ceilings = [cost.ceiling() for cost in costs[row.parts]]
            share = f"{100 * median_ratio(mine, ceilings):.0f} %"
        print_row(
            row.name,
            f"{rate:,.0f}",
            f"{min(mine):,.0f} to {max(mine):,.0f}",
            f"{atari(arguments.game).frame_skip * rate:,.0f}",
            share,
            *(f"{median_ratio(mine, rates[peer]):.2f}" for peer in peers),
        )
    print("\nWorkers have one thread each; games of peers and of serial rows are stepped by one.")


if __name__ == "__main__":
    main()
