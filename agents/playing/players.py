"""Who collects the rollouts of `A3C`: its own process, worker processes, or actors of a cluster.

A player owns the memory in which the rollouts of a batch are gathered. It tells every row of
timesteps to a callback, and hands out a `Batch` when `n_envs` columns are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from ncrl.agents.playing.buffers import Batch, RolloutBatch, RolloutShape, first_rows
from ncrl.agents.playing.collector import Collector, Outcome, actions_for_env
from ncrl.agents.playing.pool import WorkerPool
from ncrl.agents.playing.supervision import Pool, PoolSpec
from ncrl.agents.playing.worker import check_parent, end_if_importing_main
from ncrl.agents.profiling import OFF
from ncrl.sb3 import EnginePolicy
from ncrl.sb3.engine import map_tensors

OnRow = Callable[[Outcome], bool]
"""Called for every row of `n_envs` timesteps; returning False ends the rollout early."""

Player: TypeAlias = "SerialPlayer | WorkersPlayer"


class SerialPlayer:
    """Plays in this process, with the learner's own policy, environments of one `Collector`."""

    def __init__(self, collector: Collector, shape: RolloutShape) -> None:
        self.collector, self.stopwatch = collector, collector.stopwatch
        self.rollout, self.stage = shape.allocate(), RolloutBatch(shape, collector.policy.device)
        self.games = list(range(shape.n_envs))

    def collect(self, n_steps: int, on_row: OnRow) -> Batch | None:
        """A batch of `n_steps` timesteps in every environment; None if it was ended early."""
        if not self.collector.collect(self.rollout, n_steps, on_row):
            return None
        with self.stopwatch.phase("copy"):
            batch = self.stage.gather([self.rollout])
        host = first_rows(self.rollout, n_steps)
        return Batch(first_rows(batch, n_steps), host, self.games, lags=[0])

    def publish(self, policy: EnginePolicy) -> None:
        """Nothing to do: the policy that plays is the one that learns."""


@contextmanager
def played_by_workers(
    spec: PoolSpec,
    policy: EnginePolicy,
    *,
    cluster: str | None,
    give_up: Callable[[], bool],
) -> Iterator[WorkersPlayer]:
    """Workers that play inside the block: processes, or actors of the cluster at an address.

    Raises:
        RuntimeError: for a program that processes cannot import again, or a daemonic process.
        ValueError: for a policy that they cannot build, or a cluster that cannot be joined.
        WorkerError: if they cannot be kept running.
    """
    if cluster is None:
        end_if_importing_main()
        check_parent()
    spec.policy.check_like(policy)
    with ExitStack() as stack:
        make_pool: Callable[[PoolSpec, nn.Module], Pool[Any]] = WorkerPool
        if cluster is not None:
            from ncrl.agents.playing.cluster import ActorPool, joined  # only here: it imports ray

            stack.enter_context(joined(cluster))
            make_pool = ActorPool
        pool = stack.enter_context(make_pool(spec, policy))
        yield WorkersPlayer(pool, policy, give_up)


@dataclass
class WorkersPlayer:
    """Receives what the workers play, and sends them weights."""

    pool: Pool[Any]  # started
    policy: EnginePolicy  # the one that learns; batches go to its device
    give_up: Callable[[], bool]  # asked while waiting

    def __post_init__(self) -> None:
        spec = self.pool.spec
        self.stopwatch = OFF if spec.profile is None else spec.profile.stopwatch
        self.width = spec.shape.n_envs  # of one worker
        self.shape = spec.shape._replace(n_envs=spec.n_workers * self.width)
        self.stage = RolloutBatch(self.shape, self.policy.device)

    def collect(self, n_steps: int, on_row: OnRow) -> Batch | None:
        """A batch of `n_steps` timesteps in every environment; None if it was ended early."""
        with self.stopwatch.phase("setup" if self.pool.starting else "wait"):
            deliveries = self.pool.take(self.give_up)
        if deliveries is None:
            return None
        with self.stopwatch.phase("copy"):
            batch = self.stage.gather([delivery.rollout for delivery in deliveries])
            played = self.stage.host
            # Callbacks may keep them, and the next batch is gathered into the same memory.
            actions, rewards = played.actions.clone(), played.rewards.clone()
            starts, log_probs = played.episode_start.clone(), played.log_prob.clone()
            for_env = actions_for_env(self.policy, actions)
        with self.stopwatch.phase("wait"):
            self.pool.release(deliveries)
        infos: list[list[dict[str, Any]]] = [
            [{} for _ in range(self.shape.n_envs)] for _ in range(self.shape.n_steps)
        ]
        for place, delivery in enumerate(deliveries):
            for row, i, info in delivery.infos:
                infos[row][place * self.width + i] = info
        for row in range(n_steps):
            outcome = Outcome(
                row=row,
                actions=actions[row].numpy(),
                new_obs=map_tensors(lambda x, t=row + 1: x[t].numpy(), played.obs),  # type: ignore[misc]
                rewards=rewards[row].numpy(),
                dones=starts[row + 1].numpy(),
                infos=infos[row],
                obs_tensor=map_tensors(lambda x, t=row: x[t], played.obs),  # type: ignore[misc]
                log_probs=log_probs[row],
                clipped_actions=for_env[row],
                values=None,
            )
            if not on_row(outcome):
                return None
        return Batch(
            first_rows(batch, n_steps),
            first_rows(played, n_steps),
            games=[d.worker * self.width + i for d in deliveries for i in range(self.width)],
            lags=[self.pool.version - delivery.played.version for delivery in deliveries],
        )

    def publish(self, policy: EnginePolicy) -> None:
        """Send the policy's new weights to the workers."""
        self.pool.publish(policy)
