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

python benchmarks/throughput.py                      # encoders a3c and nature
python benchmarks/throughput.py --encoder a3c --workers 1 2 4 8 --check
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
from common import (
    HEADS,
    N_STEPS,
    Target,
    build_a3c,
    cores,
    machine,
    print_header,
    print_row,
    print_targets,
    synchronize,
)
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from ncrl.agents.playing.sizes import default_workers
from ncrl.envs import atari
from ncrl.envs.atari import AtariFactory
from ncrl.networks import AtariEncoder

Options = dict[str, Any]

STACK = 4
"""Frames that A2C sees at once."""

GAMES_PER_WORKER = 8
"""In the rows that show how the rate grows with workers; their batch grows with them."""

EQUAL_RECURRENT_PPO = f"RecurrentPPO, one epoch over T = {N_STEPS}"
EQUAL_A2C = f"A2C without LSTM, T = {N_STEPS}"
USUAL_RECURRENT_PPO = (
    f"RecurrentPPO as usual: make_atari_env, NatureCNN, one epoch over T = {N_STEPS}"
)
USUAL_A2C = "A2C as usual: make_atari_env, NatureCNN, T = 5"


class Workload(argparse.Namespace):
    """The flags, and the encoder of one table."""

    encoder: str
    device: str
    n_envs: Sequence[int]
    workers: Sequence[int]
    peers: bool

    @property
    def factory(self) -> AtariFactory:
        return atari(self.game)


class Row(NamedTuple):
    """A whole system to be measured."""

    name: str
    build: Callable[[], OnPolicyAlgorithm]
    parts: tuple[str, int] | None = None
    """Head and number of environments, for the ceiling that the rate is compared with."""
    n_cores: int | None = None
    """Cores that it may use; None for all."""


class Costs(NamedTuple):
    """Seconds per timestep on one thread."""

    environment: float
    acting: float
    learning: float
    learns_here: bool
    """Learning takes time of the CPU's cores, not of an accelerator."""

    def ceiling(self) -> float:
        """Timesteps per second that these allow when all cores are always busy."""
        playing = self.environment + self.acting
        if self.learns_here:
            return cores() / (playing + self.learning)
        return min(cores() / playing, 1 / self.learning)


class Measured(NamedTuple):
    """One value per round, by row or by head and number of environments."""

    costs: dict[tuple[str, int], list[Costs]]
    rates: dict[str, list[float]]
    threads: dict[str, int]
    """Torch threads of the process that learns."""


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.game}, LSTM 512, T = {N_STEPS}, {machine()}, medians of {arguments.rounds} "
        f"round(s), {arguments.seconds:g} s counted per row; load before: {os.getloadavg()[0]:.2f}"
    )
    missed = False
    for encoder in arguments.encoder:
        workload = Workload(**vars(arguments) | {"encoder": encoder})
        rows = list(all_rows(workload))
        measured = measure_rounds(workload, rows, arguments.rounds, arguments.seconds)
        targets = list(all_targets(workload, rows, measured))
        print(f"\n## Encoder {encoder}\n")
        print_parts(measured)
        print()
        print_rates(workload, rows, measured)
        print()
        print_targets(targets)
        sys.stdout.flush()
        missed = missed or any(target.failed for target in targets)
    if arguments.check and missed:
        sys.exit(1)


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
    parser.add_argument(
        "--threads", type=int, help="torch threads of peers and of serial rows; torch's default"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="counted, for each row")
    parser.add_argument("--rounds", type=int, default=3, help="that the seconds are divided over")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args()


# Rows.


def all_rows(workload: Workload) -> Iterator[Row]:
    """Every system, in the order of the table."""

    def a3c(head: str, n_envs: int, n_workers: int | None) -> Callable[[], OnPolicyAlgorithm]:
        return partial(
            build_a3c,
            workload.factory,
            head,
            workload.encoder,
            n_envs=n_envs,
            n_workers=n_workers,
            device=workload.device,
        )

    for n_envs, head in itertools.product(workload.n_envs, HEADS):
        yield Row(our_name(head, n_envs), a3c(head, n_envs, None), (head, n_envs))
    few = workload.n_envs[0]
    for head in HEADS:
        yield Row(f"A3C serial, {few} games, {head} heads", a3c(head, few, 0), (head, few))
    for n in workload.workers:
        yield Row(scaling_name(n), a3c("plain", n * GAMES_PER_WORKER, n), n_cores=min(n, cores()))
    if workload.peers:
        yield from peer_rows(workload)


def our_name(head: str, n_envs: int) -> str:
    return f"A3C, {default_workers(n_envs)} workers, {n_envs} games, {head} heads"


def scaling_name(n_workers: int) -> str:
    return f"A3C, {n_workers} workers of {GAMES_PER_WORKER} games on as many cores, plain heads"


def peer_rows(workload: Workload) -> Iterator[Row]:
    """Peers with the first number of environments."""
    n_envs = workload.n_envs[0]
    env, device = workload.factory, workload.device
    encoder = {
        "features_extractor_class": AtariEncoder,
        "features_extractor_kwargs": {"encoder": workload.encoder},
    }
    lstm = dict(net_arch=[], lstm_hidden_size=512, shared_lstm=True, enable_critic_lstm=False)
    one_epoch = {"n_steps": N_STEPS, "batch_size": N_STEPS * n_envs, "n_epochs": 1}

    def usual_env() -> VecEnv:
        gymnasium.register_envs(ale_py)
        env_id = env.game.title().replace("_", "") + "NoFrameskip-v4"
        return make_atari_env(env_id, n_envs, seed=0)

    def recurrent_ppo(make_env: Callable[[], VecEnv], policy: Options, **settings: Any) -> Any:
        env = make_env()
        return RecurrentPPO("CnnLstmPolicy", env, device=device, policy_kwargs=policy, **settings)

    def a2c(make_env: Callable[[], VecEnv], policy: Options, **settings: Any) -> A2C:
        return A2C("CnnPolicy", make_env(), device=device, policy_kwargs=policy, **settings)

    ours = partial(env, n_envs, 0)
    stacked = partial(atari(env.game, stack=STACK), n_envs, 0)
    ppo = partial(recurrent_ppo, ours, encoder | lstm)
    yield Row(EQUAL_RECURRENT_PPO, partial(ppo, **one_epoch))
    yield Row("RecurrentPPO, its usual settings", ppo)
    yield Row(EQUAL_A2C, partial(a2c, stacked, encoder, n_steps=N_STEPS))
    yield Row("A2C without LSTM, its usual T = 5", partial(a2c, stacked, encoder, n_steps=5))
    yield Row(USUAL_A2C, partial(a2c, lambda: VecFrameStack(usual_env(), STACK), {}))
    yield Row(USUAL_RECURRENT_PPO, partial(recurrent_ppo, usual_env, lstm, **one_epoch))


# Measuring.


def measure_rounds(
    workload: Workload, rows: Sequence[Row], rounds: int, seconds: float
) -> Measured:
    """All parts and rows in turn, `rounds` times."""
    keys = list(dict.fromkeys(row.parts for row in rows if row.parts))
    parts = {key: Parts(workload, *key) for key in keys}
    measured = Measured({key: [] for key in keys}, {row.name: [] for row in rows}, {})
    for i in range(rounds):
        for key in keys:
            measured.costs[key].append(parts[key].time(seconds / rounds))
        for row in rows:
            with on_cores(row.n_cores):
                rate, measured.threads[row.name] = measure(row.build(), seconds / rounds)
            measured.rates[row.name].append(rate)
            progress = f"round {i + 1} of {rounds}, {workload.encoder}"
            print(f"{progress}: {row.name}: {rate:,.0f}", file=sys.stderr, flush=True)
    return measured


class Parts:
    """The three parts of one head and number of environments, each to be timed alone."""

    BURSTS = (20, 20, 1)
    """Calls in a row of environment, acting and learning; a worker plays many steps between two
    rollouts, with warm caches."""

    def __init__(self, workload: Workload, head: str, n_envs: int) -> None:
        build = partial(build_a3c, workload.factory, head, workload.encoder, n_workers=0)
        self.per_worker = n_envs // default_workers(n_envs)
        self.learner = build(n_envs=n_envs, device=workload.device)
        self.learner.learn(N_STEPS * n_envs)  # gives it a batch to learn from
        self.policy = build(n_envs=self.per_worker, device="cpu").policy  # workers act on the CPU
        self.policy.set_training_mode(False)
        self.env = workload.factory(self.per_worker, 0)
        self.obs = torch.from_numpy(self.env.reset())
        n_actions = workload.factory.action_space.n
        actions = np.random.default_rng(0).integers(n_actions, size=(1000, self.per_worker))
        self.actions = itertools.cycle(actions)

    def time(self, seconds: float) -> Costs:
        """Medians, which leave out the rare step in which a game starts anew."""
        functions = (self.play, self.act, self.learn)
        seen: tuple[list[float], ...] = ([], [], [])
        until = time.monotonic() + seconds
        with one_thread():
            for function in functions:
                function()
            while not seen[-1] or time.monotonic() < until:
                for function, burst, times in zip(functions, self.BURSTS, seen, strict=True):
                    for _ in range(burst):
                        began = time.perf_counter()
                        function()
                        times.append(time.perf_counter() - began)
        play, act, learn = (statistics.median(times) for times in seen)
        return Costs(
            play / self.per_worker,
            act / self.per_worker,
            learn / (N_STEPS * self.learner.n_envs),
            self.learner.device.type == "cpu",
        )

    def play(self) -> None:
        self.env.step(next(self.actions))

    @torch.no_grad()
    def act(self) -> None:
        going_on = torch.zeros(self.per_worker, dtype=torch.bool)
        self.policy.act(self.obs, self.policy.initial_state(self.per_worker), going_on)

    def learn(self) -> None:
        """Loss, gradient, its limit, optimiser."""
        self.learner.train()
        synchronize()


class Meter(BaseCallback):
    """Timesteps per second after a warm-up, over a fixed time; then it ends the training."""

    def __init__(self, warm_up: float, seconds: float) -> None:
        super().__init__()
        self.warm_up = warm_up
        self.seconds = seconds
        self.rate = float("nan")
        self.threads = 0

    def _on_training_start(self) -> None:
        self.threads = torch.get_num_threads()
        self.first: float | None = None
        self.counting: tuple[float, int] | None = None

    def _on_rollout_start(self) -> None:
        # Whole cycles of playing and learning only, else a cut would favour one of them. The first
        # one is none of them: it contains the start of the workers.
        now = time.monotonic()
        if self.num_timesteps == 0:
            return
        self.first = self.first or now
        if self.counting is None:
            if now - self.first >= self.warm_up:
                self.counting = now, self.num_timesteps
            return
        since, timesteps = self.counting
        self.rate = (self.num_timesteps - timesteps) / (now - since)

    def _on_step(self) -> bool:
        done = self.counting is not None and time.monotonic() - self.counting[0] > self.seconds
        return not (done and self.rate == self.rate)


def measure(model: OnPolicyAlgorithm, seconds: float) -> tuple[float, int]:
    """Timesteps per second in whole cycles of playing and learning, and threads of the learner."""
    meter = Meter(warm_up=seconds / 4, seconds=seconds)
    try:
        model.learn(10**9, callback=meter)
    finally:
        if model.env is not None:
            model.env.close()
        del model
        gc.collect()  # models are cycles, and hold the threads of emulators
    return meter.rate, meter.threads


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


# Tables.


def print_parts(measured: Measured) -> None:
    parts = ("environment", "acting", "learning")
    print_header("one thread, ms per timestep", *parts, "ceiling on all cores, timesteps/s")
    for (head, n_envs), costs in measured.costs.items():
        games = n_envs // default_workers(n_envs)
        cells = [
            f"{1000 * statistics.median(times):.3f}" for times in list(zip(*costs, strict=True))[:3]
        ]
        ceiling = statistics.median(cost.ceiling() for cost in costs)
        name = f"{head} heads, {games} games a worker, batch of {N_STEPS * n_envs}"
        print_row(name, *cells, f"{ceiling:,.0f}")


def print_rates(workload: Workload, rows: Sequence[Row], measured: Measured) -> None:
    columns = ["", "torch threads of the learner", "timesteps/s", "rounds", "frames/s"]
    columns += ["share of the ceiling"]
    if workload.peers:
        columns += ["against RecurrentPPO, one epoch", f"against A2C, T = {N_STEPS}"]
    print_header(*columns)
    for row in rows:
        rates = measured.rates[row.name]
        rate = statistics.median(rates)
        cells = [row.name, str(measured.threads[row.name]), f"{rate:,.0f}"]
        cells += [f"{min(rates):,.0f} to {max(rates):,.0f}"]
        cells += [f"{workload.factory.frame_skip * rate:,.0f}"]
        cells += [f"{100 * share_of_ceiling(row, measured):.0f} %" if row.parts else ""]
        if workload.peers:
            for peer in (EQUAL_RECURRENT_PPO, EQUAL_A2C):
                cells += [f"{median_ratio(rates, measured.rates[peer]):.2f}"]
        print_row(*cells)
    print("\nWorkers have one thread each; games of peers and of serial rows are stepped by one.")


def all_targets(workload: Workload, rows: Sequence[Row], measured: Measured) -> Iterator[Target]:
    """The verdicts on all rows that something is expected of."""
    for row in rows:
        if row.parts and row.name == our_name(*row.parts) and row.parts[1] >= 16:
            wanted = 1.0 if row.parts[1] >= 32 else 0.9
            share = share_of_ceiling(row, measured)
            yield Target(f"{row.name}: share of the ceiling", share, wanted, unit="%")
    rates = measured.rates
    for n_envs in workload.n_envs:
        coded, plain = (rates[our_name(head, n_envs)] for head in ("Neurocoder", "plain"))
        name = f"Neurocoder heads, {n_envs} games: share of the whole step"
        yield Target(name, 1 - median_ratio(coded, plain), 0.1, at_least=False, unit="%")
    if workload.peers:
        yield from peer_targets(workload, rates)
    if workload.encoder == "a3c" and cores() == 2:
        for head in HEADS:
            best = max(statistics.median(rates[our_name(head, n)]) for n in workload.n_envs)
            name = f"two cores, {head} heads, best of the above"
            yield Target(name, best, 2000, unit="timesteps/s", required=False)
    if 1 in workload.workers:
        yield from scaling_targets(workload, rates)


def peer_targets(workload: Workload, rates: dict[str, list[float]]) -> Iterator[Target]:
    """At equal work: the same games, encoder, T and number of environments."""
    few = workload.n_envs[0]
    ours = rates[our_name("plain", few)]
    for peer, factor in ((EQUAL_A2C, 3.0), (EQUAL_RECURRENT_PPO, 4.0)):
        name = f"A3C, {few} games, plain heads, against {peer}"
        yield Target(name, median_ratio(ours, rates[peer]), factor, unit="times")


def scaling_targets(workload: Workload, rates: dict[str, list[float]]) -> Iterator[Target]:
    """Linear in cores, where the machine has them; nine tenths of that pass for linear."""
    for n in sorted(set(workload.workers) - {1}):
        if n <= cores():
            factor = median_ratio(rates[scaling_name(n)], rates[scaling_name(1)])
            yield Target(f"{n} workers on {n} cores against 1 on 1", factor, 0.9 * n, unit="times")


def share_of_ceiling(row: Row, measured: Measured) -> float:
    assert row.parts is not None
    ceilings = [costs.ceiling() for costs in measured.costs[row.parts]]
    return median_ratio(measured.rates[row.name], ceilings)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
