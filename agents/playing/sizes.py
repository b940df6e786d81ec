"""How many workers, games and games per update fit a machine, or a cluster of machines.

Also checks whether the machine has the memory and the open files for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SLOTS_PER_WORKER = 3
"""One rollout that a worker plays, one that it can go on with while the learner is in the middle of
an update, and one that the learner copies."""

FEW_CORES = 3  # up to so many cores each gets a worker, and the learner computes between them
SMALL_UPDATE = 4  # environments whose rollouts make one update on the CPU
GPU_UPDATE = 8  # the most on a GPU
EXPLORING_UPDATE = 32  # the most with an intrinsic reward
SHM = "/dev/shm"
FILES_PER_WORKER = 4  # open files: its pipe, what tells of its end, and two to spare
FILES_FOR_SHARING = 64  # open files for shared memory, checkpoints, curves, a worker that starts


class Sizes(NamedTuple):
    """What fits a machine."""

    workers: int
    games: int  # of each worker
    reason: str  # in a few words, for the user


def choose_sizes(cores: int, has_gpu: bool) -> Sizes:
    """Workers and games per worker for a machine, whose learner may have a GPU.

    With 16 games a worker plays more frames than with 8, but what is learnt from a frame falls
    faster with the number of all games (results/speed.md, results/atari.md).
    """
    if has_gpu:
        learner, why = 1, "the learner is on the GPU"
    elif cores <= FEW_CORES:
        learner, why = 0, "the learner computes between them"
    else:
        learner, why = cores // 4, "the learner computes on the CPU"
    workers = max(1, cores - learner)
    games = max(8, 16 // workers)
    left = f", {cores - workers} left for the learner" if cores > workers else ""
    reason = f"{cores} core{'s' * (cores > 1)}{left}: {why}"
    return Sizes(workers, games, reason)


def envs_per_update(n_envs: int, *, has_gpu: bool, explores: bool = False) -> int:
    """Environments whose rollouts make one update; their number divides `n_envs`.

    On the CPU 4: they make four times the updates of 16 in 20 % more time (docs/lab_notes.md), and
    larger updates learn less from the same frames (results/atari.md). On a GPU a quarter of all, 4
    to 8: with 8 it keeps up with 15 workers (results/speed.md). With an intrinsic reward half of
    all, 4 to 32: it rewards every timestep, and small updates follow its noise
    (results/montezuma.md).
    """
    if explores:
        wanted = min(EXPLORING_UPDATE, max(SMALL_UPDATE, n_envs // 2))
    else:
        wanted = min(GPU_UPDATE, max(SMALL_UPDATE, n_envs // 4)) if has_gpu else SMALL_UPDATE
    return max(n for n in range(1, wanted + 1) if n_envs % n == 0)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_cluster(cluster: str, n_workers: int | None = None) -> None:
    """Raise ValueError for what is no address of a cluster, where Ray is not installed, and for a
    cluster that nobody plays on."""
    if cluster != "auto" and not re.fullmatch(r"[^/\s]+:\d+", cluster):
        raise ValueError(
            f"cluster must be 'auto', 'host:port' or None, got {cluster!r}; for example "
            "'10.0.0.1:6379'"
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"cluster={cluster!r} needs Ray: pip install 'ncrl[ray]'")
    if n_workers == 0:
        raise ValueError(
            f"cluster={cluster!r} needs workers: n_workers of at least 1, and an env that they can "
            "build, a Gymnasium id or a factory"
        )


def worker_cores(cluster: str | None = None) -> int:
    """Cores for workers: all of this machine, or those of a cluster but one for the learner."""
    if cluster is None:
        return available_cores()
    check_cluster(cluster)
    from ncrl.agents.playing.cluster import cluster_cores  # only here: it imports ray

    return max(1, cluster_cores(cluster) - 1)


def default_workers(n_envs: int, cluster: str | None = None) -> int:
    """One worker per core for them, or the next smaller number that divides `n_envs`."""
    most = max(1, min(worker_cores(cluster), n_envs))
    return max(n for n in range(1, most + 1) if n_envs % n == 0)


@contextlib.contextmanager
def learner_threads(n_workers: int) -> Iterator[None]:
    """Leave the workers their cores while the learner works beside them, whatever its device."""
    before = torch.get_num_threads()
    if n_workers:
        torch.set_num_threads(max(1, min(before, available_cores() - n_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_shared_memory(needed: int) -> None:
    """Raise ValueError where there is less shared memory: exceeding it kills the process later."""
    if os.path.isdir(SHM) and needed > (free := shutil.disk_usage(SHM).free):
        raise ValueError(
            f"the workers need {needed / 1e6:.0f} MB of shared memory but {SHM} has "
            f"{free / 1e6:.0f} MB free; lower n_envs (--games) or n_steps, or give the container a "
            "larger one (docker run --shm-size)"
        )


def check_memory(needed: int) -> None:
    """Raise ValueError where fewer bytes are free: the system would end the process silently."""
    with contextlib.suppress(OSError, StopIteration):  # where Linux does not tell
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        if needed > 1024 * available:
            raise ValueError(
                f"rollouts need {needed / 1e6:,.0f} MB of memory and {available / 1e3:,.0f} MB are "
                "free; lower n_envs (--games) or n_steps"
            )


def check_open_files(n_workers: int) -> None:
    """Raise this process's limit of open files for the workers; ValueError where it cannot be."""
    needed = FILES_PER_WORKER * n_workers + FILES_FOR_SHARING
    with contextlib.suppress(OSError):
        needed += len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{n_workers} workers need a limit of {needed} open files, and it is {hard}; raise it "
            f"(ulimit -n {needed}) or lower n_workers"
        ) from error
