"""Whether A3C with workers stays as it is: memory, open files, policy lag and speed over minutes.

The first quarter of the samples is left for warming up; the last two rows are the medians of the
first and of the last third of the rest.

python benchmarks/soak.py                            # 20 minutes, Neurocoder heads
python benchmarks/soak.py --minutes 120 --n-envs 32
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterable

import psutil
from common import build_a3c, machine, print_header, print_row
from stable_baselines3.common.callbacks import BaseCallback

from ncrl.agents import A3C
from ncrl.envs import atari

MIB = 2**20
SHM = "/dev/shm"

# Memory is that of all processes, where pages that they share count once in each; shared memory is
# by whomever, as torch's files there have no names.
SEEN = ("RSS, MiB", "open files", "/dev/shm, MiB", "policy lag, versions", "ms per timestep")
Sample = tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between samples")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=None, help="one per core by default")
    parser.add_argument("--device", default="auto", help="of the learner")
    arguments = parser.parse_args()
    sizes = {"n_envs": arguments.n_envs, "n_workers": arguments.workers}
    model = build_a3c(atari("Pong"), "Neurocoder", "a3c", device=arguments.device, **sizes)
    if not model.n_workers:
        parser.error("--workers must be at least 1")
    print(f"Pong, {model.n_workers} workers, {model.n_envs} games, {machine()}")
    print_header("minute", *SEEN)
    watch = Watch(60 * arguments.minutes, arguments.interval)
    model.learn(10**12, callback=watch)
    kept = watch.samples[-(-len(watch.samples) // 4) :]
    third = max(1, len(kept) // 3)
    for name, part in (("first third", kept[:third]), ("last third", kept[-third:])):
        print_sample(name, [statistics.median(column) for column in zip(*part, strict=True)])


def print_sample(name: str, seen: Iterable[float]) -> None:
    print_row(name, *(f"{value:,.2f}" for value in seen))


class Watch(BaseCallback):
    """Takes a sample per interval, between two rollouts, and ends the training."""

    model: A3C

    def __init__(self, seconds: float, interval: float) -> None:
        super().__init__()
        self.seconds, self.interval = seconds, interval
        self.samples: list[Sample] = []
        self.lags: list[float] = []
        self.began = 0.0

    def _on_step(self) -> bool:
        if not self.began:
            self.began = self.since = time.monotonic()
            self.timesteps = self.num_timesteps
        return time.monotonic() - self.began <= self.seconds + self.interval / 2

    def _on_rollout_end(self) -> None:
        self.lags.append(self.model.policy_lag)
        now = time.monotonic()
        if now - self.since < self.interval:
            return
        milliseconds = 1000 * (now - self.since) / (self.num_timesteps - self.timesteps)
        seen = (*processes(), statistics.mean(self.lags), milliseconds)
        self.samples.append(seen)
        print_sample(f"{(now - self.began) / 60:.1f}", seen)
        self.since, self.timesteps, self.lags = now, self.num_timesteps, []


def processes() -> tuple[float, float, float]:
    """Memory and open files of this process and of all that it started, and shared memory."""
    me = psutil.Process()
    rss, files = 0, 0
    for process in (me, *me.children(recursive=True)):
        try:
            rss += process.memory_info().rss
            files += process.num_fds()
        except psutil.NoSuchProcess:  # one that is just ending
            continue
    return rss / MIB, files, shutil.disk_usage(SHM).used / MIB


if __name__ == "__main__":
    main()
