"""Who collects the rollouts of `A3C`: its own process, worker processes, or actors of a cluster.

A player owns the memory that rollouts are played into and gathered in. It tells every row of
timesteps to a callback, and hands out a `Batch` when a rollout of every environment is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ncrl.agents.playing.buffers import Batch, RolloutBatch, RolloutShape, first_rows, shown_at
from ncrl.agents.playing.collector import Collector, Outcome, actions_for_env
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.pool import Delivery, Limits, WorkerPool
from ncrl.agents.playing.weights import SharedWeights
from ncrl.agents.playing.worker import PolicySpec, check_script, end_if_importing_main
from ncrl.agents.runs.profiling import OFF, Profile, Stopwatch
from ncrl.sb3 import EnginePolicy
from ncrl.sb3.engine import map_obs

OnRow = Callable[[Outcome], bool]
"""Called for every row of `n_envs` timesteps; returning False ends the rollout early."""


class Player(Protocol):
    """Collects rollouts, and learns of new weights."""

    def collect(self, n_steps: int, on_row: OnRow) -> Batch | None:
        """A batch of `n_steps` timesteps in every environment; None if it was ended early."""

    def publish(self, policy: EnginePolicy) -> None:
        """The policy has new weights."""


class Pool(Protocol):
    """Workers, which run inside its context: `pool.WorkerPool`, `cluster.ActorPool`."""

    worker_restarts: int
    env_restarts: int

    @property
    def starting(self) -> bool:
        """No rollout has been taken yet."""

    def take(self, count: int, give_up: Callable[[], bool]) -> list[Delivery] | None:
        """Wait for `count` rollouts; None if `give_up()` became true meanwhile."""

    def release(self, deliveries: list[Delivery]) -> None:
        """The learner has copied these rollouts."""


class Weights(Protocol):
    """What the workers of a pool play with: `weights.SharedWeights`, `cluster.ObjectWeights`."""

    @property
    def version(self) -> int:
        """The newest."""

    def publish(self, module: nn.Module, version: int) -> None:
        """Make the module's present weights version `version`, which must be the next one."""


class SerialPlayer:
    """Plays in this process, with the learner's own policy.

    Args:
        collector: plays the environments.
        shape: of a rollout of all of them.
        device: of the batches.
        stopwatch: of this process, if its time is measured.
    """

    def __init__(
        self,
        collector: Collector,
        shape: RolloutShape,
        device: torch.device,
        stopwatch: Stopwatch = OFF,
    ) -> None:
        self.collector, self.stopwatch = collector, stopwatch
        self.rollout, self.stage = shape.allocate(), RolloutBatch(shape, device)
        self.games = list(range(shape.n_envs))

    def collect(self, n_steps: int, on_row: OnRow) -> Batch | None:
        if not self.collector.collect(self.rollout, n_steps, on_row):
            return None
        with self.stopwatch.phase("copy"):
            batch = self.stage.gather([self.rollout])
        host = first_rows(self.rollout, n_steps)
        return Batch(first_rows(batch, n_steps), host, self.games, lags=[0])

    def publish(self, policy: EnginePolicy) -> None:
        """The policy that plays is the one that learns."""


@contextmanager
def played_by_workers(
    factory: EnvFactory,
    spec: PolicySpec,
    policy: EnginePolicy,
    shape: RolloutShape,
    *,
    n_workers: int,
    cluster: str | None,
    seed: int,
    limits: Limits,
    profile: Profile | None,
    info_keywords: Sequence[str],
    device: torch.device,
    give_up: Callable[[], bool],
) -> Iterator[WorkersPlayer]:
    """Workers that play inside the block: processes, or actors of the cluster at an address.

    `WorkersPlayer` and `WorkerPool` say what is what.

    Raises:
        RuntimeError: for a program that worker processes cannot import again.
        ValueError: for a policy that they cannot build, or a cluster that cannot be joined.
        WorkerError: if they cannot be kept running.
    """
    options: dict[str, Any] = {
        "shape": shape._replace(n_envs=shape.n_envs // n_workers),
        "n_workers": n_workers,
        "seed": seed,
        "limits": limits,
        "profile": profile,
        "info_keywords": info_keywords,
    }
    with ExitStack() as stack:
        weights: Weights
        if cluster is None:
            end_if_importing_main()
            check_script()
            spec.check_like(policy)
            weights = SharedWeights(policy)
            weights.publish(policy, 0)
            pool: Any = WorkerPool(factory, spec, weights=weights, **options)
        else:
            from ncrl.agents.playing import cluster as actors  # only here: it imports ray

            spec.check_like(policy)
            stack.enter_context(actors.joined(cluster))
            weights = actors.ObjectWeights()
            weights.publish(policy, 0)
            pool = actors.ActorPool(factory, spec, weights=weights, **options)
        yield WorkersPlayer(
            stack.enter_context(pool),
            weights,
            policy,
            shape,
            n_workers=n_workers,
            device=device,
            give_up=give_up,
            stopwatch=OFF if profile is None else profile.stopwatch,
        )


class WorkersPlayer:
    """Receives what the workers play, and sends them weights.

    Args:
        pool: of the workers, started.
        weights: that they play with.
        policy: what those are weights of.
        shape: of a rollout of all environments.
        n_workers: they share out the environments equally.
        device: of the batches.
        give_up: asked while waiting; whether to wait no longer.
        stopwatch: of this process, if its time is measured.
    """

    def __init__(
        self,
        pool: Pool,
        weights: Weights,
        policy: EnginePolicy,
        shape: RolloutShape,
        *,
        n_workers: int,
        device: torch.device,
        give_up: Callable[[], bool],
        stopwatch: Stopwatch = OFF,
    ) -> None:
        self.pool, self.weights, self.policy, self.shape = pool, weights, policy, shape
        self.n_workers, self.give_up, self.stopwatch = n_workers, give_up, stopwatch
        self.stage = RolloutBatch(shape, device)

    def collect(self, n_steps: int, on_row: OnRow) -> Batch | None:
        with self.stopwatch.phase("setup" if self.pool.starting else "wait"):
            deliveries = self.pool.take(self.n_workers, self.give_up)
        if deliveries is None:
            return None
        with self.stopwatch.phase("copy"):
            batch = self.stage.gather([delivery.rollout for delivery in deliveries])
            played = self.stage.host
            actions, rewards, dones = (
                tensor.numpy().copy() for tensor in (played.actions, played.rewards, played.dones)
            )
            for_env = actions_for_env(self.policy, played.actions)
        with self.stopwatch.phase("wait"):
            self.pool.release(deliveries)
        width = self.shape.n_envs // self.n_workers
        infos: list[list[dict[str, Any]]] = [
            [{} for _ in range(self.shape.n_envs)] for _ in range(self.shape.n_steps)
        ]
        for place, delivery in enumerate(deliveries):
            for row, i, info in delivery.infos:
                infos[row][place * width + i] = info
        for row in range(n_steps):
            outcome = Outcome(
                row=row,
                actions=actions[row],
                new_obs=shown_at(row + 1, played.obs),
                rewards=rewards[row],
                dones=dones[row],
                infos=infos[row],
                obs_tensor=map_obs(lambda x, row=row: x[row], played.obs),  # type: ignore[misc]
                log_probs=played.log_prob[row],
                clipped_actions=for_env[row],
                values=None,
            )
            if not on_row(outcome):
                return None
        return Batch(
            first_rows(batch, n_steps),
            first_rows(played, n_steps),
            games=[delivery.worker * width + i for delivery in deliveries for i in range(width)],
            lags=[self.weights.version - delivery.played.version for delivery in deliveries],
        )

    def publish(self, policy: EnginePolicy) -> None:
        self.weights.publish(policy, self.weights.version + 1)
