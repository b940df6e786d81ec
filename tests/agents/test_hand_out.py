"""How the pool shares out its slots, counted with workers that are no processes."""

from collections import deque
from typing import Any

import pytest
import torch
from gymnasium import spaces

from ncrl.agents.playing.buffers import RolloutShape
from ncrl.agents.playing.pool import WorkerPool
from ncrl.agents.playing.sizes import SLOTS_PER_WORKER
from ncrl.agents.playing.supervision import Limits, PoolSpec
from ncrl.agents.playing.worker import Played


class FakeWorker:
    """Takes slots as a pipe would, and plays them one after the other."""

    def __init__(self) -> None:
        self.slots: deque[int] = deque()
        self.waited = 0
        self.played = 0

    def send(self, slot: int) -> None:
        self.slots.append(slot)


def make_pool(n_workers: int) -> tuple[WorkerPool, list[FakeWorker]]:
    shape = RolloutShape(1, 1, spaces.Discrete(2), spaces.Discrete(2), 0, 0)
    nothing: Any = None
    spec = PoolSpec(nothing, nothing, shape, n_workers, 0, Limits())
    pool = WorkerPool(spec, torch.nn.Linear(1, 1))
    workers = [FakeWorker() for _ in range(n_workers)]
    for worker, fake in zip(pool._workers, workers, strict=True):
        worker.connection, worker.ready = fake, True  # type: ignore[assignment]
    pool._look = lambda timeout: pool._hand_out()  # type: ignore[method-assign]
    return pool, workers


@pytest.mark.parametrize("n_workers", [2, 16])
@pytest.mark.parametrize("batch_ticks", [1, 3, 8])
def test_no_worker_waits_more_than_twice_the_mean(n_workers: int, batch_ticks: int) -> None:
    """In a tick every worker plays a slot if it has one; a batch takes the learner some ticks."""
    pool, workers = make_pool(n_workers)
    learner_free_at = 0
    taken: list[Any] = []
    for tick in range(600):
        pool._hand_out()
        for index, fake in enumerate(workers):
            if not fake.slots:
                fake.waited += 1
                continue
            fake.played += 1
            pool._handle(pool._workers[index], Played(fake.slots.popleft(), 0, {}))
        if tick >= learner_free_at and len(pool._played) >= n_workers:
            pool.release(taken)
            taken = pool.take(lambda: False) or []
            learner_free_at = tick + batch_ticks
    waits, plays = [fake.waited for fake in workers], [fake.played for fake in workers]
    assert max(waits) <= 2 * sum(waits) / n_workers + SLOTS_PER_WORKER - 1
    assert min(plays) >= sum(plays) / n_workers / 2
    if batch_ticks > SLOTS_PER_WORKER:
        assert min(waits) > 0, "the learner is what limits"
