"""What a GPU is worth to the learner: every table of one machine in about two minutes.

python benchmarks/gpu.py                        # from a checkout: PYTHONPATH=. before it
python benchmarks/gpu.py --tables update        # one of them

The layer alone: benchmarks/layer.py --device cuda. Games and workers: benchmarks/throughput.py.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from common import N_STEPS, NEUROCODER, machine, medians, print_header, print_row
from torch.profiler import ProfilerActivity, profile

from ncrl.agents import A3C
from ncrl.envs import atari
from ncrl.layers import make_layer

ROOT = Path(__file__).resolve().parent.parent

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
    print(machine(), flush=True)
    for name in arguments.tables:
        print(f"\n## {name}\n", flush=True)
        try:
            TABLES[name](arguments)
        except Exception:  # the other tables are worth printing all the same
            print(traceback.format_exc(), flush=True)


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


def update(arguments: argparse.Namespace) -> None:
    """One `train()`: eager, and replayed; what both end in; what the kernels alone take."""
    columns = ("eager, ms", "graph, ms", "kernels, ms", "launches", "difference")
    print_header("heads", "timesteps", *columns)
    for games in (4, 64):
        graphs = {}
        for head in ("linear", "neurocoder"):
            eager, captured = (learner(head, games, arguments.device, g) for g in (False, True))
            for model in (eager, captured):
                for _ in range(3):
                    model.train()
            pairs = zip(eager.policy.parameters(), captured.policy.parameters(), strict=True)
            gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
            kernels, launches = kernels_of(eager) if arguments.device == "cuda" else (0.0, 0)
            (milliseconds,) = medians(arguments.seconds, eager.train)
            (graphs[head],) = medians(arguments.seconds, captured.train)
            reason = captured.learner.graphed.reason
            graph = f"none: {reason}" if reason else f"{graphs[head]:.2f}"
            times = (f"{milliseconds:.2f}", graph, f"{kernels:.2f}", launches, f"{gap:.1e}")
            print_row(head, games * N_STEPS, *times)
        share = f"{graphs['neurocoder'] / graphs['linear']:.2f}"
        print_row("Neurocoder beside linear heads", games * N_STEPS, "", share, "", "", "")


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


def kernels_of(model: A3C) -> tuple[float, int]:
    """Milliseconds of all kernels of an update, and their number."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        model.train()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if "CUDA" in str(event.device_type)]
    return sum(event.self_device_time_total for event in kernels) / 1000, len(kernels)


def pong(arguments: argparse.Namespace) -> None:
    """What the plain command says of itself when it is stopped after a while."""
    print("```", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_atari.py"), "--env", "Pong", "--profile"]
        command += ["--protocol", "classic", "--device", arguments.device, "--logdir", folder]
        with subprocess.Popen(command, stderr=subprocess.STDOUT) as run:
            try:
                run.wait(arguments.play_seconds)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGINT)
    print("```")


TABLES = {"correctness": correctness, "update": update, "pong": pong}

if __name__ == "__main__":
    main()
