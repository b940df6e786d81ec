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
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import psutil
from common import HEADS, Target, build_a3c, machine, print_header, print_row, print_targets
from stable_baselines3.common.callbacks import BaseCallback

from ncrl.agents import A3C
from ncrl.envs import atari

MIB = 2**20
SHM = "/dev/shm"

START_UP_SECONDS = 10.0
"""From the start of this process to the first timesteps that the workers deliver."""


class Sample(NamedTuple):
    """What was seen at the end of one interval."""

    minute: float
    processes: int
    rss: float
    """MiB of all processes together; pages that they share count once in each of them."""
    files: float
    """Open file descriptors of all processes."""
    shm: float
    """MiB used in /dev/shm, by whomever: torch unlinks its files at once, so they have no names."""
    lag: float
    """Mean policy lag of the interval's rollouts, in updates."""
    rate: float
    """Timesteps per second over the interval."""


TOLERANCES: dict[str, tuple[Callable[[Sample], float], float, float, str]] = {
    "resident memory": (lambda sample: sample.rss, 0.0, 0.03, "MiB"),
    "open files": (lambda sample: sample.files, 2.0, 0.0, ""),
    "/dev/shm": (lambda sample: sample.shm, 8.0, 0.0, "MiB"),
    "policy lag": (lambda sample: sample.lag, 0.25, 0.0, "updates"),
    "time per timestep": (lambda sample: 1000 / sample.rate, 0.0, 0.1, "ms"),
}
"""What must not grow: a quantity, how much it may, absolutely or relatively, and its unit."""


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
    model = build_a3c(
        atari(arguments.game),
        arguments.head,
        arguments.encoder,
        n_envs=arguments.n_envs,
        n_workers=arguments.workers,
        device=arguments.device,
    )
    if not model.n_workers:
        parser.error("--workers must be at least 1")
    print(
        f"{arguments.game}, encoder {arguments.encoder}, {arguments.head} heads, "
        f"{model.n_workers} workers, {model.n_envs} games, {machine()}"
    )
    columns = ("processes", "RSS, MiB", "open files", "/dev/shm, MiB", "lag", "timesteps/s")
    print_header("minute", *columns)
    watch = Watch(60 * arguments.minutes, arguments.interval)
    model.learn(10**12, callback=watch)

    targets = [Target("start-up", watch.start_up, START_UP_SECONDS, at_least=False, unit="s")]
    targets += growth(watch.samples)
    print()
    print_targets(targets)
    failures = [target.name for target in targets if target.failed]
    print(f"\nVerdict: {'failed: ' + ', '.join(failures) if failures else 'steady'}")
    if failures:
        sys.exit(1)


def growth(samples: Sequence[Sample]) -> Iterator[Target]:
    """Of medians, between the thirds of the samples behind the first quarter."""
    kept = samples[math.ceil(len(samples) / 4) :]
    third = max(1, len(kept) // 3)
    for name, (quantity, absolute, relative, unit) in TOLERANCES.items():
        values = [quantity(sample) for sample in kept]
        change, allowed = math.nan, 0.0
        if len(values) > 1:
            before, after = statistics.median(values[:third]), statistics.median(values[-third:])
            change, allowed = after - before, max(absolute, relative * before)
        yield Target(f"growth of {name}", change, allowed, at_least=False, unit=unit)


class Watch(BaseCallback):
    """Takes a sample per interval, between two rollouts, and ends the training."""

    model: A3C

    def __init__(self, seconds: float, interval: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.interval = interval
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
        rate = (self.num_timesteps - self.timesteps) / (now - self.since)
        sample = take_sample((now - self.began) / 60, statistics.mean(self.lags), rate)
        self.samples.append(sample)
        minute, processes, rss, files, shm, lag, _ = sample
        cells = (f"{rss:,.0f}", f"{files:.0f}", f"{shm:.1f}", f"{lag:.2f}", f"{rate:,.0f}")
        print_row(f"{minute:.1f}", processes, *cells)
        self.since, self.timesteps, self.lags = now, self.num_timesteps, []


def take_sample(minute: float, lag: float, rate: float) -> Sample:
    """The state of this process and of all that it started; one that is just ending has none."""
    me = psutil.Process()
    rss, files, processes = 0.0, 0, 0
    for process in (me, *me.children(recursive=True)):
        try:
            rss += process.memory_info().rss / MIB
            files += process.num_fds()
            processes += 1
        except psutil.NoSuchProcess:
            continue
    return Sample(minute, processes, rss, files, shutil.disk_usage(SHM).used / MIB, lag, rate)


if __name__ == "__main__":
    main()
