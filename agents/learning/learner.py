"""The learner: it owns what learns, and makes updates of the batches that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ncrl.agents.learning.exploration import Exploration
from ncrl.agents.learning.graph import GraphedUpdates
from ncrl.agents.learning.objective import (
    Bonus,
    Lesson,
    Objective,
    actor_critic_loss,
    rewards_in_loss,
)
from ncrl.agents.learning.update import Update, apply_gradient
from ncrl.agents.playing.buffers import Batch, Rollout, split_envs, values_of
from ncrl.agents.profiling import Stopwatch
from ncrl.sb3 import EnginePolicy, Latent
from ncrl.sb3.engine import map_tensors

IMITATED_SHARE = 0.25
"""Demonstrations that an update reads beside each of its environments; at least one in all. It is
what they cost in time; how much they count is a setting, `imitation_coef`."""


class Learner:
    """Updates the policy, by the optimiser `policy.optimizer`, and the exploration."""

    def __init__(
        self,
        policy: EnginePolicy,
        *,
        n_steps: int,  # T of whole rollouts; the last batch of a training may be shorter
        exploration: Exploration | None,
        stopwatch: Stopwatch,
    ) -> None:
        self.policy = policy
        self.n_steps = n_steps
        self.exploration = exploration
        self.stopwatch = stopwatch
        self.graphed = GraphedUpdates(policy.device)
        self.latent: Latent | None = None
        """What actor and critic read in the latest update, [T + 1, B, ...]."""
        self.explored: dict[str, Tensor] = {}
        """Scalars of exploration in the latest batch, by the curve's name."""

    def learn(
        self, batch: Batch, objective: Objective, max_grad_norm: float, *, num_parts: int
    ) -> Iterator[Update]:
        """Learn from a batch in `num_parts` updates; each is yielded as soon as it is made."""
        rollout = batch.rollout
        if self.graphed.reason is not None:
            # The LSTM has to know where episodes begin, and would wait for the device to say so.
            rollout = rollout._replace(episode_start=batch.host.episode_start)
        rewards = self._score(batch, objective)
        self.policy.set_training_mode(True)
        with self._exploring(batch.rollout):
            for i, part in enumerate(split_envs(rollout, num_parts)):
                lesson = self._lesson(part, rewards, i, imitates=objective.imitation_coef > 0)
                yield self.update(lesson, objective, max_grad_norm)
        # Last, since the actions were chosen under the mean as it was. The last row of observations
        # is left out: it is the first of the next batch.
        self.policy.watch(map_tensors(lambda x: x[:-1].flatten(0, 1), batch.rollout.obs))

    @contextmanager
    def _exploring(self, rollout: Rollout) -> Iterator[None]:
        """The policy's updates are made inside. The intrinsic reward learns at the same time, on
        another core, if it can, and otherwise after them."""
        exploration = self.exploration
        if exploration is None:
            yield
            return
        cores = torch.get_num_threads()  # a new thread would begin with another number
        with ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(cores)) as threads:
            learning: Future[dict[str, Tensor]] | None = None
            if exploration.source.learns_beside and self.policy.device.type == "cpu":
                learning = threads.submit(exploration.learn, rollout)
            yield
            with self.stopwatch.phase("exploration"):
                self.explored |= learning.result() if learning else exploration.learn(rollout)

    def update(self, lesson: Lesson, objective: Objective, max_grad_norm: float) -> Update:
        """One step of the optimiser: by a CUDA graph if there is one, except for the rollout that
        the end of the training cut short."""
        update = None
        if self.graphed.reason is None and len(lesson.rollout.rewards) == self.n_steps:
            with self.stopwatch.phase("graph"):
                update = self.graphed.update(self.policy, lesson, objective, max_grad_norm)
        if update is None:
            with self.stopwatch.phase("evaluation"):
                loss = actor_critic_loss(self.policy, lesson, objective)
            update = apply_gradient(self.policy, loss, max_grad_norm, stopwatch=self.stopwatch)
        self.latent = update.latent
        if self.exploration is not None and update.stepped:
            if lesson.bonus is not None:
                self.exploration.observe_advantages(update.scalars["int_advantage_std"])
            if update.kept is not None:
                self.exploration.memory.carry(update.kept)
        return update

    def _score(self, batch: Batch, objective: Objective) -> Tensor | None:
        """Intrinsic rewards of a batch, [T, B], if there are any; keeps what led to a score."""
        if self.exploration is None:
            return None
        with self.stopwatch.phase("exploration"):
            if objective.imitation_coef and len(batch.host.rewards) == self.n_steps:
                clipped = rewards_in_loss(batch.host.rewards, objective)
                values = self._values_of_scorers(batch, clipped)
                self.exploration.memory.watch(batch.host, batch.games, clipped, values)
            else:  # without imitation, or for the last batch of a training, which can be shorter
                self.exploration.memory.forget_recent()
            rewards, self.explored = self.exploration.intrinsic_rewards(batch.rollout)
        return rewards if objective.int_coef else None

    def _values_of_scorers(self, batch: Batch, rewards: Tensor) -> Tensor:
        """V(x_t) of the columns in which a game scored, [T + 1, B] on the host; 0 in all others."""
        values = torch.zeros(batch.host.episode_start.shape)
        scored = (rewards > 0).any(0)
        if scored.any():
            columns = map_tensors(lambda x: x[:, scored.to(x.device)], batch.rollout)
            # The LSTM has to know where episodes begin, and would wait for the device to say so.
            columns = columns._replace(episode_start=batch.host.episode_start[:, scored])
            values[:, scored] = values_of(self.policy, columns).cpu()
        return values

    def _lesson(
        self, part: Rollout, rewards: Tensor | None, index: int, *, imitates: bool
    ) -> Lesson:
        """What update number `index` of a batch learns from: its part of the rollout, and what
        exploration adds to it."""
        if self.exploration is None:
            return Lesson(part)
        steps, width = part.rewards.shape
        kept = None
        if imitates and steps == self.n_steps:  # demonstrations are cut for rollouts of this length
            with self.stopwatch.phase("exploration"):
                state = self.policy.initial_state(max(1, round(IMITATED_SHARE * width)))
                kept = self.exploration.memory.read(steps, state)
        if rewards is None:
            return Lesson(part, kept=kept)
        deviation = torch.full_like(rewards[0, 0], self.exploration.advantage_deviation)
        return Lesson(part, Bonus(rewards.narrow(1, index * width, width), deviation), kept)
