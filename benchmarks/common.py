"""What the benchmarks share: the model they run, the machine they run on, tables and times."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import ale_py
import gymnasium
import torch
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv

from ncrl.agents import A3C
from ncrl.agents.atari.config import camel_case
from ncrl.agents.playing.sizes import available_cores
from ncrl.envs import AtariFactory, atari
from ncrl.shell.hardware import choose_device, cpu_name

NEUROCODER = {"num_slots": 80, "num_heads": 15, "num_least_used": 5, "controller_size": 8}
"""The paper's Atari heads (Table 8)."""

HEADS = {"plain": "linear", "Neurocoder": "neurocoder"}
"""Names of the heads in tables, and in `ncrl.layers.LAYERS`."""

N_STEPS = 20  # T of every A3C here, and of the peers at equal work
FRAMES_PER_TIMESTEP = 4  # of the peers' games
STACK = 4  # frames that a peer sees at once, where they are stacked
WARM_UP = 3  # calls that are not timed

_barrier: Barrier  # of a process of `played_alone`


def device_name(name: str) -> str:
    """Type of an argument `--device`: the name of a device that is there."""
    try:
        choose_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def build_a3c(factory: AtariFactory, head: str, encoder: str, **options: Any) -> A3C:
    """A3C with LSTM-512, one of `HEADS`, and its default settings but for `options`."""
    layer = HEADS[head]
    coded = {"head_kwargs": NEUROCODER} if layer == "neurocoder" else {}
    policy = {"head": layer, "encoder": encoder, **coded}
    options = {"n_steps": N_STEPS, "seed": 0, "policy_kwargs": policy, **options}
    return A3C("CnnLstmPolicy", factory, **options)


def games_of_sb3(game: str, n_envs: int, **options: Any) -> VecEnv:
    """Games as users of SB3 have them; `options` are those of its `make_atari_env`."""
    gymnasium.register_envs(ale_py)
    return make_atari_env(f"{camel_case(atari(game).game)}NoFrameskip-v4", n_envs, **options)


def played_alone(
    factory: AtariFactory, head: str, encoder: str, games: int, seconds: float
) -> float:
    """Timesteps per second of games and acting without learning: what workers can reach at most.

    A process per core plays `games` games in one thread; `seconds` count when all have started.
    """
    context, cores = multiprocessing.get_context("spawn"), available_cores()
    build = partial(build_a3c, factory, head, encoder, n_envs=games, n_workers=0, device="cpu")
    meet = (context.Barrier(cores),)
    with ProcessPoolExecutor(cores, context, initializer=_all_meet_at, initargs=meet) as pool:
        return sum(pool.map(partial(_play_alone, build, seconds), range(cores)))


def _all_meet_at(barrier: Barrier) -> None:
    """Keep what a process can only be given at its start."""
    global _barrier
    _barrier = barrier


@torch.no_grad()
def _play_alone(build: Callable[..., A3C], seconds: float, seed: int) -> float:
    torch.set_num_threads(1)
    model = build(seed=seed)
    env, policy = model.env, model.policy
    assert env is not None
    policy.set_training_mode(False)
    obs: Any = env.reset()
    state = policy.initial_state(env.num_envs)
    starts = torch.ones(env.num_envs, dtype=torch.bool)
    _barrier.wait(120)
    timesteps, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        step = policy.act(torch.from_numpy(obs), state, starts)
        obs, _, dones, _ = env.step(step.actions.numpy())
        state, starts = step.lstm_state, torch.from_numpy(dones)
        timesteps += env.num_envs
    return timesteps / (time.monotonic() - began)


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
