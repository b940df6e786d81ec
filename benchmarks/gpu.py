"""What a GPU is worth to the learner: every table of one machine in less than three minutes.

python benchmarks/gpu.py                        # from a checkout: PYTHONPATH=. before it
python benchmarks/gpu.py --tables update acting # some of them
python benchmarks/gpu.py --device cpu           # what there is without a GPU
"""

from __future__ import annotations

import argparse
import copy
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    HEADS,
    N_STEPS,
    build_a3c,
    device_name,
    machine,
    medians,
    played_alone,
    print_header,
    print_row,
)
from layer import print_rows
from torch.profiler import ProfilerActivity, profile

from ncrl.agents import A3C
from ncrl.agents.playing.sizes import available_cores, choose_sizes
from ncrl.envs import atari
from ncrl.layers import make_layer

ROOT = Path(__file__).resolve().parent.parent

UPDATES = (4, 64)
"""Games whose rollouts make one update."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "Neurocoder J 1": ("neurocoder", {"num_slots": 20}),
    "Neurocoder J 3, residual": ("neurocoder", {"num_slots": 20, "num_steps": 3}),
    "Neurocoder J 5": ("neurocoder", {"num_slots": 20, "num_steps": 5, "residual": False}),
    "Neurocoder official": ("neurocoder", {"num_slots": 20, "preset": "official"}),
    "HyperNet": ("hypernet", {}),
    "FiLM": ("film", {}),
    "NSM": ("nsm", {}),
}
"""Layers compared with the CPU. Not MoE, whose gate draws noise in training mode."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=device_name, default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    parser.add_argument("--play-seconds", type=float, default=60.0, help="of the plain command")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.monotonic()
    print(machine(), flush=True)
    for name in arguments.tables:
        print(f"\n## {name}\n", flush=True)
        try:
            TABLES[name](arguments)
        except Exception:  # the other tables are worth printing all the same
            print(traceback.format_exc(), flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")


def correctness(arguments: argparse.Namespace) -> None:
    """Largest difference from the CPU in outputs and gradients, relative to the largest value."""
    if arguments.device == "cpu":
        print("Comparing needs CUDA; this is the CPU beside itself, so that differences are 0.\n")
    print_header("layer", "float64", "float32")
    for name, (kind, options) in KINDS.items():
        worst = [
            max(difference(kind, options, dtype, batch, arguments.device) for batch in (8, 320))
            for dtype in (torch.float64, torch.float32)
        ]
        print_row(name, *(f"{value:.1e}" for value in worst))


def difference(
    kind: str, options: dict[str, Any], dtype: torch.dtype, batch: int, device: str
) -> float:
    torch.manual_seed(1)
    layer = make_layer(kind, 64, 18, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, direction = torch.randn(batch, 64, dtype=dtype), torch.randn(batch, 18, dtype=dtype)
    results = []
    for place in ("cpu", device):
        moved = copy.deepcopy(layer).to(place)
        given = x.to(place, copy=True).requires_grad_()
        y = moved(given)
        sources = [given, *(p for p in moved.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad((y * direction.to(place)).sum(), sources, allow_unused=True)
        results.append([t.detach().cpu() for t in (y, *gradients) if t is not None])
    return max(
        float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
        for theirs, mine in zip(*results, strict=True)
    )


def update(arguments: argparse.Namespace) -> None:
    """One update: eager, and replayed; what both end in; what the kernels alone take."""
    on_gpu = arguments.device == "cuda"
    if not on_gpu:
        print("Graph, kernels and launches need CUDA; these updates are eager, on the CPU.\n")
    columns = ("eager, ms", "graph, ms", "kernels, ms", "launches", "difference")
    print_header("heads", "timesteps", *columns)
    for games in UPDATES:
        times: dict[str, list[float]] = {}
        for head in HEADS:
            eager, captured = (learner(head, games, arguments.device) for _ in range(2))
            eager.learner.graphed.reason = eager.learner.graphed.reason or "not wanted"
            for model in (eager, captured):
                for _ in range(3):
                    model.train()
            pairs = zip(eager.policy.parameters(), captured.policy.parameters(), strict=True)
            gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
            kernels = kernels_of(eager) if on_gpu else ("", "")
            reason = captured.learner.graphed.reason
            measured = [eager.train] if reason else [eager.train, captured.train]
            times[head] = medians(len(measured) * arguments.seconds, *measured)
            cells = [f"{milliseconds:.2f}" for milliseconds in times[head]]
            cells += [f"none: {reason}"] if reason else []
            print_row(head, games * N_STEPS, *cells, *kernels, f"{gap:.1e}")
        plain, coded = times.values()
        shares = [f"{b / a:.2f}" for a, b in zip(plain, coded, strict=False)]
        shares += [""] * (5 - len(shares))
        print_row("Neurocoder beside plain heads", games * N_STEPS, *shares)


def learner(head: str, games: int, device: str) -> A3C:
    """A serial model with a batch that makes one update.

    With its own learning rate, which has fallen to 0, differences of weights would stay hidden.
    """
    batch = N_STEPS * games
    build = partial(build_a3c, atari("Pong"), head, "a3c", device=device, learning_rate=1e-4)
    return build(n_envs=games, n_workers=0, batch_size=batch).learn(batch)


def kernels_of(model: A3C) -> tuple[str, int]:
    """Milliseconds of all kernels of an update, and their number."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        model.train()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if "CUDA" in str(event.device_type)]
    return f"{sum(event.self_device_time_total for event in kernels) / 1000:.2f}", len(kernels)


def acting(arguments: argparse.Namespace) -> None:
    """One step of a whole policy, on the learner's device and on one core."""
    print_header("heads", "games", f"on {arguments.device}, ms", "on one core, ms")
    for head in HEADS:
        build = partial(build_a3c, atari("Pong"), head, "a3c", n_envs=4, n_workers=0)
        policies = [build(device=device).policy for device in (arguments.device, "cpu")]
        for games in (8, 16, 256):
            times = medians(arguments.seconds, *(partial(act, p, games) for p in policies))
            print_row(head, games, *(f"{milliseconds:.2f}" for milliseconds in times))


@torch.no_grad()
def act(policy: Any, games: int) -> None:
    """One step from images on the host to actions there, as workers and serial play need it."""
    policy.set_training_mode(False)
    obs = torch.zeros(games, 1, 84, 84, dtype=torch.uint8).to(policy.device)
    starts = torch.zeros(games, dtype=torch.bool)
    policy.act(obs, policy.initial_state(games), starts).actions.cpu()


def layer(arguments: argparse.Namespace) -> None:
    """Training steps beside those that the layer replaces or sits on."""
    print_rows(arguments.device, (320, 4096), arguments.seconds)


def start_up(arguments: argparse.Namespace) -> None:
    """Seconds from `learn` to the first timestep that arrives."""
    sizes = choose_sizes(available_cores(), arguments.device == "cuda")
    print_header("workers", "games each", "first timestep after, s")
    for workers in sorted({min(2, sizes.workers), sizes.workers}):
        build = partial(build_a3c, atari("Pong"), "Neurocoder", "a3c", device=arguments.device)
        model = build(n_envs=workers * sizes.games, n_workers=workers)
        seconds, began = 0.0, time.monotonic()

        def first_step(*_: object, began: float = began) -> bool:
            nonlocal seconds
            seconds = time.monotonic() - began
            return False

        model.learn(10**9, callback=first_step)
        print_row(workers, sizes.games, f"{seconds:.1f}")


def pong(arguments: argparse.Namespace) -> None:
    """The plain command, stopped after a while, beside games and acting without learning."""
    cores = available_cores()
    games = choose_sizes(cores, arguments.device == "cuda").games
    most = played_alone(atari("Pong"), "Neurocoder", "a3c", games, 4 * arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_atari.py"), "--env", "Pong", "--profile"]
        command += ["--device", arguments.device, "--logdir", folder]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            try:
                output, _ = run.communicate(timeout=arguments.play_seconds)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)
                output, _ = run.communicate()
    print(f"```\n{output}```\n")
    print_header("", "timesteps/s", "frames/s")
    print_row(
        f"games + acting alone, {cores} processes of {games}", f"{most:,.0f}", f"{4 * most:,.0f}"
    )
    # The command counts from its first rollout on, and says 0 until then.
    if rates := re.findall(r"([1-9][\d,]*) frames/s", output):
        frames = float(rates[-1].replace(",", ""))
        print_row("the plain command", f"{frames / 4:,.0f}", f"{frames:,.0f}")
        print_row("share", f"{100 * frames / 4 / most:.0f} %", "")
    else:
        print("\nNo rate of the plain command: it was stopped before its first rollout.")


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "correctness": correctness,
    "update": update,
    "acting": acting,
    "layer": layer,
    "start-up": start_up,
    "pong": pong,
}

if __name__ == "__main__":
    main()
