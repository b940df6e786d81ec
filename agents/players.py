"""Who collects the rollouts of `A3C`: its own process, worker processes, or actors of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from ncrl.agents.buffers import Batch, RolloutSlots, first_rows, shown_at
from ncrl.agents.collector import Collector, Outcome
from ncrl.agents.supervision import Delivery

if TYPE_CHECKING:
    from ncrl.agents.a3c import A3C


class Player(Protocol):
    """Collects rollouts, and learns of new weights."""

    def collect(self, n_steps: int, callback: BaseCallback) -> Batch | None:
        """A batch of `n_steps` timesteps in every environment; None if a callback said stop."""

    def publish(self) -> None:
        """The learner has new weights."""


class Pool(Protocol):
    """Workers, which run inside its context: `supervision.WorkerPool`, `cluster.ActorPool`."""

    worker_restarts: int
    env_restarts: int

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: object) -> None: ...

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
    """Plays in this process, with the learner's own policy."""

    def __init__(self, model: A3C) -> None:
        self.model = model
        self.slots = RolloutSlots(model._rollout_shape(model.n_envs), 1, shared=False)
        collector = model._collector
        assert model.env is not None
        # SB3 replaces `_last_obs` where a training starts anew or gets another environment.
        if collector is None or collector.obs is not model._last_obs:
            collector = Collector(model.env, model.policy, model._last_obs)
        collector.env = model.env  # with `set_env(env, force_reset=False)` another one goes on
        collector.policy = model.policy  # it may have been replaced, by a compiled one for example
        collector.sde_sample_freq = model.sde_sample_freq
        self.collector = model._collector = collector
        collector.stopwatch = model._stopwatch

    def collect(self, n_steps: int, callback: BaseCallback) -> Batch | None:
        model, rollout = self.model, self.slots[0]
        complete = self.collector.collect(
            rollout, n_steps, lambda outcome: model._after_step(callback, outcome)
        )
        model._last_obs = self.collector.obs
        model._last_episode_starts = self.collector.episode_start
        if not complete:
            return None
        model._record_lag([0])
        with model._stopwatch.phase("copy"):
            batch = model._batch_stage.gather([rollout])
        games = list(range(model.n_envs))
        return Batch(first_rows(batch, n_steps), first_rows(rollout, n_steps), games)

    def publish(self) -> None:
        """The policy that plays is the one that learns."""


class WorkersPlayer:
    """Receives what the workers play, and sends them weights."""

    def __init__(self, model: A3C, pool: Pool, weights: Weights) -> None:
        self.model = model
        self.pool = pool
        self.weights = weights

    def collect(self, n_steps: int, callback: BaseCallback) -> Batch | None:
        model = self.model
        stopwatch = model._stopwatch
        with stopwatch.phase("setup" if self.pool.starting else "wait"):
            deliveries = self.pool.take(model.n_workers, lambda: model._stop_requested)
        if deliveries is None:
            return None
        with stopwatch.phase("copy"):
            batch = model._batch_stage.gather([delivery.rollout for delivery in deliveries])
            played = model._batch_stage.host
            actions, rewards, dones = (
                tensor.numpy().copy() for tensor in (played.actions, played.rewards, played.dones)
            )
        with stopwatch.phase("wait"):
            self.pool.release(deliveries)

        width = model.n_envs // model.n_workers
        infos: list[list[dict[str, Any]]] = [
            [{} for _ in range(model.n_envs)] for _ in range(model.n_steps)
        ]
        for place, delivery in enumerate(deliveries):
            for row, i, info in delivery.infos:
                infos[row][place * width + i] = info
        for row in range(n_steps):
            outcome = Outcome(
                row,
                actions[row],
                shown_at(row + 1, played.obs),
                rewards[row],
                dones[row],
                infos[row],
            )
            if not model._after_step(callback, outcome):
                return None

        version = self.weights.version
        model._record_lag([version - delivery.played.version for delivery in deliveries])
        games = [delivery.worker * width + i for delivery in deliveries for i in range(width)]
        return Batch(first_rows(batch, n_steps), first_rows(played, n_steps), games)

    def publish(self) -> None:
        self.weights.publish(self.model.policy, self.weights.version + 1)
