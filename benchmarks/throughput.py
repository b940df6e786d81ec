"""Timesteps per second of A3C, and of sb3-contrib's RecurrentPPO on the same network and machine.

python benchmarks/throughput.py                      # Pong, default settings, about 5 minutes
python benchmarks/throughput.py --encoder nature --seconds 30
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback

from agents import A3C
from envs import atari
from ncrl.networks import AtariEncoder

NEUROCODER = {"num_slots": 80, "num_heads": 15, "num_least_used": 5, "controller_size": 8}
"""The paper's Atari heads (Table 8)."""


class Meter(BaseCallback):
    """Timesteps per second after a warm-up, over a fixed time; then it ends the training."""

    def __init__(self, warm_up: float, seconds: float) -> None:
        super().__init__()
        self.warm_up = warm_up
        self.seconds = seconds
        self.rate = float("nan")

    def _on_training_start(self) -> None:
        self.began = time.monotonic()
        self.counting: tuple[float, int] | None = None

    def _on_rollout_start(self) -> None:
        # Whole cycles of playing and learning only, else a cut would favour one of them.
        now = time.monotonic()
        if self.counting is None:
            if now - self.began >= self.warm_up and self.num_timesteps > 0:
                self.counting = now, self.num_timesteps
            return
        since, timesteps = self.counting
        if self.num_timesteps > timesteps:
            self.rate = (self.num_timesteps - timesteps) / (now - since)

    def _on_step(self) -> bool:
        done = self.counting is not None and time.monotonic() - self.counting[0] > self.seconds
        return not (done and self.rate == self.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--encoder", default="a3c", choices=("a3c", "nature", "paper"))
    parser.add_argument("--workers", type=int, default=None, help="one per core by default")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=40.0, help="counted, for each row")
    arguments = parser.parse_args()
    factory = atari(arguments.game)
    n_envs, n_steps = arguments.n_envs, 20

    def a3c(head: str, n_workers: int | None) -> A3C:
        options = NEUROCODER if head == "neurocoder" else {}
        return A3C(
            "CnnLstmPolicy",
            factory,
            n_workers=n_workers,
            n_envs=n_envs,
            n_steps=n_steps,
            device=arguments.device,
            policy_kwargs={"head": head, "head_kwargs": options, "encoder": arguments.encoder},
        )

    def recurrent_ppo(**settings: Any) -> RecurrentPPO:
        return RecurrentPPO(
            "CnnLstmPolicy",
            factory(n_envs, 0),
            device=arguments.device,
            policy_kwargs={
                "features_extractor_class": AtariEncoder,
                "features_extractor_kwargs": {"encoder": arguments.encoder},
                "net_arch": [],
                "lstm_hidden_size": 512,
                "shared_lstm": True,
                "enable_critic_lstm": False,
            },
            **settings,
        )

    rows: list[tuple[str, Callable[[], A3C | RecurrentPPO]]] = [
        ("A3C, plain heads", lambda: a3c("linear", arguments.workers)),
        ("A3C, Neurocoder heads", lambda: a3c("neurocoder", arguments.workers)),
        ("A3C serial, plain heads", lambda: a3c("linear", 0)),
        ("A3C serial, Neurocoder heads", lambda: a3c("neurocoder", 0)),
        (
            "RecurrentPPO, one epoch over T = 20",
            lambda: recurrent_ppo(n_steps=n_steps, batch_size=n_steps * n_envs, n_epochs=1),
        ),
        ("RecurrentPPO, its usual settings", lambda: recurrent_ppo()),
    ]
    print(
        f"{arguments.game}, encoder {arguments.encoder}, LSTM 512, {n_envs} games, "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, counted {arguments.seconds:g} s a row"
    )
    print("| | timesteps/s | frames/s | against RecurrentPPO, one epoch |")
    print("|---|---|---|---|")
    rates = {name: measure(build(), arguments.seconds) for name, build in rows}
    peer = rates["RecurrentPPO, one epoch over T = 20"]
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {4 * rate:,.0f} | {rate / peer:.2f} |")


def measure(model: A3C | RecurrentPPO, seconds: float) -> float:
    """Timesteps per second in whole cycles of playing and learning."""
    meter = Meter(warm_up=5.0, seconds=seconds)
    model.learn(10**9, callback=meter)
    return meter.rate


if __name__ == "__main__":
    main()
