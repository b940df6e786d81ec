"""What a GPU is worth to the learner: every table of one machine in about three minutes.

PYTHONPATH=. python benchmarks/gpu.py                        # from a checkout
python benchmarks/gpu.py --tables update acting              # some of them
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import N_STEPS, NEUROCODER, cores, machine, medians, print_header, print_row
from layer import MIDDLE, WIDE, Bench
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ncrl.agents import A3C
from ncrl.agents.playing.sizes import choose_sizes
from ncrl.envs import atari
from ncrl.layers import make_layer

ROOT = Path(__file__).resolve().parent.parent
FRAMES_PER_TIMESTEP = 4

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
"""Layers compared with the CPU. Not MoE: its gates start with ties, which every device breaks in
its own way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    parser.add_argument("--play-seconds", type=float, default=60.0, help="of Pong")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("device cuda is not available on this machine; nearest: --device cpu")
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


# Correctness.


def correctness(arguments: argparse.Namespace) -> None:
    """Largest difference from the CPU in outputs and gradients, relative to the largest value."""
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
        moved = make_layer(kind, 64, 18, **options).to(place, dtype)
        moved.load_state_dict(layer.state_dict())
        given = x.to(place, copy=True).requires_grad_()
        y = moved(given)
        sources = [given, *(p for p in moved.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad((y * direction.to(place)).sum(), sources, allow_unused=True)
        results.append([t.detach().cpu() for t in (y, *gradients) if t is not None])
    return max(
        float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9))
        for theirs, mine in zip(*results, strict=True)
    )


# The update.


def update(arguments: argparse.Namespace) -> None:
    """One `train()`: eager, and replayed; what both end in; what the kernels alone take."""
    print_header(
        "heads", "timesteps", "eager, ms", "graph, ms", "kernels, ms", "launches", "difference"
    )
    graphs: dict[tuple[str, int], float] = {}
    for games in (4, 64):
        for head in ("linear", "neurocoder"):
            eager, captured = (learner(head, games, arguments.device, g) for g in (False, True))
            for model in (eager, captured):
                for _ in range(3):
                    model.train()
            gap = largest_gap(eager, captured)
            kernels, launches = kernels_of(eager) if arguments.device == "cuda" else (0.0, 0)
            (milliseconds,) = medians(arguments.seconds, eager.train)
            (replayed,) = medians(arguments.seconds, captured.train)
            graphs[head, games] = replayed
            note = captured.learner.graphed.reason
            print_row(
                head,
                games * N_STEPS,
                f"{milliseconds:.2f}",
                f"{replayed:.2f}" if note is None else f"none: {note}",
                f"{kernels:.2f}",
                launches,
                f"{gap:.1e}",
            )
        share = graphs["neurocoder", games] / graphs["linear", games]
        print_row("Neurocoder beside linear heads", games * N_STEPS, "", f"{share:.2f}", "", "", "")


def learner(head: str, games: int, device: str, captured: bool) -> A3C:
    """A serial model with a batch to learn from."""
    model = A3C(
        "CnnLstmPolicy",
        atari("Pong"),
        n_steps=N_STEPS,
        n_envs=games,
        n_workers=0,
        use_rms_prop=False,
        learning_rate=1e-4,
        policy_kwargs={"head": head, "head_kwargs": NEUROCODER if head == "neurocoder" else {}},
        seed=0,
        device=device,
    )
    if not captured:
        model.learner.graphed.reason = "not wanted"
    return model.learn(N_STEPS * games)


def largest_gap(one: A3C, other: A3C) -> float:
    """Between their weights."""
    pairs = zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def kernels_of(model: A3C) -> tuple[float, int]:
    """Milliseconds of all kernels of an update, and their number."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        model.train()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if "CUDA" in str(event.device_type)]
    return sum(event.self_device_time_total for event in kernels) / 1000, len(kernels)


# Acting.


def acting(arguments: argparse.Namespace) -> None:
    """One step of a whole policy, on the learner's device and on one core."""
    print_header("heads", "games", f"{arguments.device}, ms", "one core, ms")
    for head in ("linear", "neurocoder"):
        policies = [learner(head, 4, device, False).policy for device in (arguments.device, "cpu")]
        for games in (8, 256):
            times: list[float] = []
            for policy in policies:
                policy.set_training_mode(False)
                obs = torch.zeros(games, 1, 84, 84, dtype=torch.uint8, device=policy.device)
                state, starts = policy.initial_state(games), torch.zeros(games, dtype=torch.bool)

                @torch.no_grad()
                def act(policy: Any = policy, given: Any = (obs, state, starts)) -> None:
                    policy.act(*given).actions.cpu()

                times.append(*medians(arguments.seconds / 2, act))
            print_row(head, games, *(f"{value:.2f}" for value in times))


# The layer.


def layer(arguments: argparse.Namespace) -> None:
    """Training steps beside nn.Linear of the same widths."""
    bench = Bench(torch.device(arguments.device), arguments.seconds / 2, compiled=False)
    print_header("layer", "batch", "ours, ms", "nn.Linear, ms", "ratio")
    wide = bench.layer(3072, 512, controller_size=32, residual=False, **WIDE)
    middle = bench.layer(784, 400, controller_size=18, residual=False, **MIDDLE)
    for batch in (320, 4096):
        for name, ours in (("3072 -> 512, J 5", wide), ("784 -> 400", middle)):
            found = bench.beside_linear(name, ours, batch, None, True)
            print_row(
                name, batch, f"{found.ours:.3f}", f"{found.reference:.3f}", f"{found.ratio:.1f}"
            )
    head = bench.layer(512, 18, controller_size=8, residual=True, **NEUROCODER_HEAD)
    lstm = bench.put(nn.LSTM(256, 512))
    steps = (
        bench.training_step(head, bench.input(320, 512)),
        bench.training_step(lstm, bench.input(N_STEPS, 16, 256)),
    )
    mine, theirs = medians(bench.seconds, *steps)
    print_row(
        "actor head beside LSTM-512", 320, f"{mine:.3f}", f"{theirs:.3f}", f"{mine / theirs:.1f}"
    )


NEUROCODER_HEAD = {k: v for k, v in NEUROCODER.items() if k != "controller_size"}


# All cores.


def ceiling(arguments: argparse.Namespace) -> None:
    """Games and acting without any learning, one process per core."""
    print_header("processes", "games each", "timesteps/s, games + acting")
    games = choose_sizes(cores(), arguments.device == "cuda").games
    print_row(cores(), games, f"{played_alone(cores(), games, 5 * arguments.seconds):,.0f}")


def played_alone(processes: int, games: int, seconds: float) -> float:
    """Timesteps per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(processes), context.SimpleQueue()
    players = [
        context.Process(target=play_alone, args=(games, seconds, index, barrier, counts))
        for index in range(processes)
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    if any(player.exitcode for player in players):
        raise RuntimeError("a process that plays alone failed; it said why above")
    return sum(counts.get() for _ in players)


def play_alone(games: int, seconds: float, index: int, barrier: Any, counts: Any) -> None:
    torch.set_num_threads(1)
    model = A3C(
        "NeurocoderCnnLstmPolicy",
        atari("Pong")(games, index),
        policy_kwargs={"head_kwargs": NEUROCODER},
        device="cpu",
        seed=index,
    )
    env, policy = model.env, model.policy
    assert env is not None
    policy.set_training_mode(False)
    obs, state = torch.from_numpy(env.reset()), policy.initial_state(games)
    starts = torch.ones(games, dtype=torch.bool)
    barrier.wait(120)
    timesteps, began = 0, time.monotonic()
    with torch.no_grad():
        while time.monotonic() - began < seconds:
            step = policy.act(obs, state, starts)
            shown, _, dones, _ = env.step(step.actions.numpy())
            obs, state, starts = torch.from_numpy(shown), step.lstm_state, torch.from_numpy(dones)
            timesteps += games
    counts.put(timesteps / (time.monotonic() - began))


def start_up(arguments: argparse.Namespace) -> None:
    """From `learn` to the first timestep that arrives."""
    print_header("workers", "games each", "first timestep after, s")
    sizes = choose_sizes(cores(), arguments.device == "cuda")
    for workers in sorted({min(2, cores()), sizes.workers}):
        model = A3C(
            "NeurocoderCnnLstmPolicy",
            atari("Pong"),
            n_envs=workers * sizes.games,
            n_workers=workers,
            device=arguments.device,
        )
        first = FirstStep()
        model.learn(10**9, callback=first)
        print_row(workers, sizes.games, f"{first.seconds:.1f}")


class FirstStep(BaseCallback):
    """Ends the training at its first timestep."""

    def _on_training_start(self) -> None:
        self.seconds = float("nan")
        self.began = time.monotonic()

    def _on_step(self) -> bool:
        self.seconds = time.monotonic() - self.began
        return False


def pong(arguments: argparse.Namespace) -> None:
    """The plain command, and what its learner and workers did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "run_atari.py"), "--env", "Pong", "--protocol", "classic"),
            *("--frames", "1000000000", "--device", arguments.device, "--logdir", folder),
            "--profile",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        ) as run:
            stop = threading.Timer(arguments.play_seconds, run.send_signal, [signal.SIGINT])
            stop.start()
            assert run.stdout is not None
            lines = [(time.monotonic(), line.rstrip()) for line in run.stdout]
            stop.cancel()
    print("```")
    print("\n".join(line for _, line in lines))
    print("```\n")
    seen = []
    for when, line in lines:
        if found := re.match(r"([\d,]+) / [\d,]+ frames, .*frames/s", line):
            seen.append((when, int(found.group(1).replace(",", ""))))
    moving = [(when, frames) for when, frames in seen if frames > 0]
    if len(moving) < 2:
        print("too short to tell a rate")
        return
    (began, before), (ended, after) = moving[0], moving[-1]
    rate = (after - before) / (ended - began)
    print(f"{rate:,.0f} frames/s, {rate / FRAMES_PER_TIMESTEP:,.0f} timesteps/s without start-up")


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    "correctness": correctness,
    "update": update,
    "acting": acting,
    "layer": layer,
    "ceiling": ceiling,
    "start-up": start_up,
    "pong": pong,
}

if __name__ == "__main__":
    main()
