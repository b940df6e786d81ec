"""How many workers, games and games per update a machine, or a cluster of them, is worth."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

FEW_CORES = 3
"""Up to so many, every core gets a worker, and the learner computes between them."""

SMALL_UPDATE = 4
"""Games whose rollouts make one update on the CPU."""


class Sizes(NamedTuple):
    """What fits a machine."""

    workers: int
    games: int
    """Of each worker."""
    batch: int
    """Games whose rollouts make one update; they divide those of all workers."""

    reason: str
    """In a few words, for the user."""


def choose_sizes(cores: int, has_gpu: bool) -> Sizes:
    """Workers, games per worker and games per update for a machine.

    Measured with a GPU on 16 cores: 15 workers of 16 games play as fast as 15 of 32, and 4 times as
    fast as 16 workers of one game. Small updates learn more from the same games than large ones
    (results/atari.md), but 4 games an update leave a GPU idle.

    Args:
        cores: that this process may use, at least 1.
        has_gpu: whether the learner computes on one.
    """
    if has_gpu:
        learner, games = 1, 16
        why = "the learner is on the GPU"
    elif cores <= FEW_CORES:
        learner, games = 0, max(8, 16 // cores)
        why = "the learner computes between them"
    else:
        learner, games = cores // 4, 8
        why = "the learner computes on the CPU"
    workers = max(1, cores - learner)
    left = cores - workers
    reason = (
        f"{cores} core{'s' * (cores > 1)}"
        + (f", {left} left for the learner" if left > 0 else "")
        + f": {why}"
    )
    return Sizes(workers, games, games_per_update(workers * games, has_gpu), reason)


def games_per_update(games: int, has_gpu: bool) -> int:
    """4, on a GPU a quarter of all games but at most 24, or what next below divides them."""
    wanted = min(24, max(SMALL_UPDATE, games // 4)) if has_gpu else SMALL_UPDATE
    return max(n for n in range(1, wanted + 1) if games % n == 0)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_cluster(cluster: str) -> None:
    """Raise ValueError for what is no address of a cluster, and where Ray is not installed."""
    if cluster != "auto" and not re.fullmatch(r"[^/\s]+:\d+", cluster):
        raise ValueError(
            f"cluster must be 'auto', 'host:port' or None, got {cluster!r}; for example "
            "'10.0.0.1:6379'"
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"cluster={cluster!r} needs Ray: pip install 'ncrl[ray]'")


def worker_cores(cluster: str | None = None) -> int:
    """Cores for workers: all of this machine, or those of a cluster but one for the learner.

    Raises:
        ValueError: for a cluster that cannot be joined.
    """
    if cluster is None:
        return available_cores()
    check_cluster(cluster)
    from ncrl.agents.playing.cluster import cluster_cores  # only here: it imports ray

    return max(1, cluster_cores(cluster) - 1)


def default_workers(n_envs: int, cluster: str | None = None) -> int:
    """One worker per core for them, or the next smaller number that divides `n_envs`.

    Raises:
        ValueError: for a cluster that cannot be joined.
    """
    most = max(1, min(worker_cores(cluster), n_envs))
    return max(n for n in range(1, most + 1) if n_envs % n == 0)


@contextmanager
def learner_threads(n_workers: int) -> Iterator[None]:
    """Leave the workers their cores while the learner works beside them, whatever its device."""
    if not n_workers:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, available_cores() - n_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
