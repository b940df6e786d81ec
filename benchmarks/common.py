"""What the benchmarks share: the model they run, the machine they run on, targets and verdicts."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ncrl.agents import A3C
from ncrl.agents.playing.sizes import available_cores
from ncrl.envs import AtariFactory
from ncrl.shell.hardware import cpu_name

NEUROCODER = {"num_slots": 80, "num_heads": 15, "num_least_used": 5, "controller_size": 8}
"""The paper's Atari heads (Table 8)."""

HEADS = {"plain": "linear", "Neurocoder": "neurocoder"}
"""Names of the heads in tables, and in `ncrl.layers.LAYERS`."""

N_STEPS = 20  # T of every A3C here, and of the peers at equal work
WARM_UP = 3  # calls that are not timed


def build_a3c(factory: AtariFactory, head: str, encoder: str, **options: Any) -> A3C:
    """A3C with LSTM-512, one of `HEADS`, and its default settings but for `options`."""
    layer = HEADS[head]
    coded = {"head_kwargs": NEUROCODER} if layer == "neurocoder" else {}
    policy = {"head": layer, "encoder": encoder, **coded}
    options = {"n_steps": N_STEPS, "seed": 0, "policy_kwargs": policy, **options}
    return A3C("CnnLstmPolicy", factory, **options)


def played_alone(
    factory: AtariFactory, head: str, encoder: str, *, games: int, seconds: float
) -> float:
    """Timesteps per second of games and acting without learning: what workers can reach at most.

    A process per core plays `games` games in one thread; `seconds` count when all have started.
    """
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(available_cores()), context.SimpleQueue()
    build = partial(build_a3c, factory, head, encoder, n_envs=games, n_workers=0, device="cpu")
    players = [
        context.Process(target=_play_alone, args=(build, seed, seconds, barrier, rates))
        for seed in range(available_cores())
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    if any(player.exitcode for player in players):
        raise RuntimeError("a process that plays alone failed; it said why above")
    return sum(rates.get() for _ in players)


@torch.no_grad()
def _play_alone(
    build: Callable[..., A3C], seed: int, seconds: float, barrier: Any, rates: Any
) -> None:
    torch.set_num_threads(1)
    model = build(seed=seed)
    env, policy = model.env, model.policy
    assert env is not None
    policy.set_training_mode(False)
    obs: Any = env.reset()
    state = policy.initial_state(env.num_envs)
    starts = torch.ones(env.num_envs, dtype=torch.bool)
    barrier.wait(120)
    timesteps, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        step = policy.act(torch.from_numpy(obs), state, starts)
        obs, _, dones, _ = env.step(step.actions.numpy())
        state, starts = step.lstm_state, torch.from_numpy(dones)
        timesteps += env.num_envs
    rates.put(timesteps / (time.monotonic() - began))


def machine() -> str:
    """What a table of timings has to say about where it was measured."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu_name()}, {available_cores()} cores{gpu}, torch {torch.__version__}"


def print_row(*cells: object) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(*cells: object) -> None:
    """The first row, and the line below it."""
    print_row(*cells)
    print("|---" * len(cells) + "|", flush=True)


def medians(
    seconds: float, *functions: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median milliseconds of each function, called in turn so that noise meets all alike.

    Args:
        seconds: of all calls together; each function is called at least once.
        functions: what they have started on a GPU is waited for.
        clock: seconds.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def timed(function: Callable[[], Any]) -> float:
        synchronize()
        began = clock()
        function()
        synchronize()
        return 1000 * (clock() - began)

    for function in functions:
        for _ in range(WARM_UP):
            function()
    times: list[list[float]] = []
    until = time.monotonic() + seconds
    while not times or time.monotonic() < until:
        times.append([timed(function) for function in functions])
    return [statistics.median(column) for column in zip(*times, strict=True)]


class Target(NamedTuple):
    """What was measured beside what is good enough."""

    name: str
    measured: float
    most: float  # that is good enough
    unit: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is more than good enough; NaN is."""
        return not self.measured <= self.most


def print_targets(targets: Sequence[Target]) -> None:
    """The table of verdicts."""
    print_header("target", "measured", "wanted", "met")
    for target in targets:
        measured, most = (_in_unit(v, target.unit) for v in (target.measured, target.most))
        print_row(target.name, measured, f"<= {most}", "no" if target.failed else "yes")


def _in_unit(value: float, unit: str) -> str:
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
    return f"{number} {unit}".rstrip()
