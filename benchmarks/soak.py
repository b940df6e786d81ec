"""Whether A3C with workers stays as it is: memory, open files, policy lag and speed over minutes.

The first quarter of the samples is left for warming up. Of the rest, the median of the last third
is compared with that of the first; growth beyond the tolerance is a failure, and so is a slow
start.

python benchmarks/soak.py                            # 20 minutes; exit status 1 if something grows
python benchmarks/soak.py --minutes 120 --encoder nature --n-envs 32
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import psutil
from common import HEADS, Target, build_a3c, machine, print_header, print_row, print_targets
from stable_baselines3.common.callbacks import BaseCallback

from ncrl.agents import A3C
from ncrl.envs import atari

MIB = 2**20
SHM = "/dev/shm"
START_UP_SECONDS = 10.0
"""From the start of this process to the first timesteps that the workers deliver."""

# What is looked at, and how much it may grow: absolutely, or relatively if that is more.
TOLERANCES = {
    "RSS, MiB": (0.0, 0.03),  # of all processes; pages that they share count once in each
    "open files": (2.0, 0.0),
    "/dev/shm, MiB": (8.0, 0.0),  # by whomever: torch's files there have no names
    "policy lag, versions": (0.25, 0.0),
    "ms per timestep": (0.0, 0.1),
}
Sample = dict[str, float]  # by the names of `TOLERANCES`


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between samples")
    parser.add_argument("--game", default="Pong")
    parser.add_argument("--head", default="Neurocoder", choices=HEADS)
    parser.add_argument("--encoder", default="a3c", choices=("a3c", "nature", "paper"))
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=None, help="one per core by default")
    parser.add_argument("--device", default="auto", help="of the learner")
    arguments = parser.parse_args()
    sizes = {"n_envs": arguments.n_envs, "n_workers": arguments.workers}
    game, head, encoder = atari(arguments.game), arguments.head, arguments.encoder
    model = build_a3c(game, head, encoder, device=arguments.device, **sizes)
    if not model.n_workers:
        parser.error("--workers must be at least 1")
    print(
        f"{arguments.game}, encoder {arguments.encoder}, {arguments.head} heads, "
        f"{model.n_workers} workers, {model.n_envs} games, {machine()}"
    )
    print_header("minute", *TOLERANCES)
    watch = Watch(60 * arguments.minutes, arguments.interval)
    model.learn(10**12, callback=watch)

    targets = [Target("start-up", watch.start_up, START_UP_SECONDS, unit="s")]
    targets += growth(watch.samples)
    print()
    print_targets(targets)
    failures = [target.name for target in targets if target.failed]
    print(f"\nVerdict: {'failed: ' + ', '.join(failures) if failures else 'steady'}")
    sys.exit(1 if failures else 0)


def growth(samples: Sequence[Sample]) -> Iterator[Target]:
    """Of medians, between the thirds of the samples behind the first quarter."""
    kept = samples[math.ceil(len(samples) / 4) :]
    third = max(1, len(kept) // 3)
    for name, (absolute, relative) in TOLERANCES.items():
        before, after = math.nan, math.nan
        if len(kept) > 1:
            before = statistics.median(sample[name] for sample in kept[:third])
            after = statistics.median(sample[name] for sample in kept[-third:])
        allowed = max(absolute, relative * before)
        yield Target(f"growth of {name}", after - before, allowed)


class Watch(BaseCallback):
    """Takes a sample per interval, between two rollouts, and ends the training."""

    model: A3C

    def __init__(self, seconds: float, interval: float) -> None:
        super().__init__()
        self.seconds, self.interval = seconds, interval
        self.start_up = math.nan
        self.samples: list[Sample] = []

    def _on_step(self) -> bool:
        if math.isnan(self.start_up):
            self.start_up = time.time() - psutil.Process().create_time()
            self.began = self.since = time.monotonic()
            self.timesteps = self.num_timesteps
            self.lags: list[float] = []
        return time.monotonic() - self.began <= self.seconds + self.interval / 2

    def _on_rollout_end(self) -> None:
        self.lags.append(self.model.policy_lag)
        now = time.monotonic()
        if now - self.since < self.interval:
            return
        milliseconds = 1000 * (now - self.since) / (self.num_timesteps - self.timesteps)
        seen = (*processes(), statistics.mean(self.lags), milliseconds)
        self.samples.append(dict(zip(TOLERANCES, seen, strict=True)))
        print_row(f"{(now - self.began) / 60:.1f}", *(f"{value:,.2f}" for value in seen))
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
