"""Rollouts: where workers write what they saw and did, and the learner reads it.

Shapes: T timesteps, E environments of one worker, B = environments of a whole batch, L LSTM layers
(0 without memory), h LSTM width. Row t holds what the worker saw at t and did at t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor

from ncrl.sb3.engine import EnginePolicy, map_tensors
from ncrl.shell.tensors import tensors_in


class Rollout(NamedTuple):
    """A rollout of T timesteps in E (or, in a batch, B) environments."""

    obs: PyTorchObs  # [T + 1, E, ...] the last row is where the next rollout goes on; or a dict
    episode_start: Tensor  # [T + 1, E] bool: obs[t] begins an episode; timestep t - 1 ended one
    actions: Tensor  # [T, E, ...]
    log_prob: Tensor  # [T, E] of the action, under the weights that chose it
    rewards: Tensor  # [T, E] raw
    truncation_value: Tensor  # [T, E] of the observation at which a time limit cut off, else 0
    lstm_h: Tensor  # [L, E, h] hidden state before row 0
    lstm_c: Tensor  # [L, E, h] cell state before row 0

    def slot(self, index: int) -> Rollout:
        """View of one of the rollouts that `RolloutShape.allocate(n)` laid into one block."""
        return map_tensors(lambda tensor: tensor[index], self)


class RolloutShape(NamedTuple):
    """Everything that fixes the layout of one rollout."""

    n_steps: int
    n_envs: int
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    lstm_layers: int
    lstm_size: int

    @property
    def nbytes(self) -> int:
        """Size of one rollout in bytes; nothing is allocated."""
        with torch.device("meta"):
            return sum(tensor.nbytes for tensor in tensors_in(self.allocate()))

    def allocate(self, *leading: int) -> Rollout:
        """A rollout with `leading` dimensions in front of every tensor, of conspicuous values: NaN,
        and the largest integers, not zeros that look plausible."""
        steps, envs = self.n_steps, self.n_envs
        action_shape, action_dtype = _layout(self.action_space)
        if isinstance(self.action_space, spaces.Box):
            action_dtype = torch.float32  # what a Gaussian draws, before it is made to fit

        def poisoned(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            value = float("nan")
            if not dtype.is_floating_point:
                value = 1 if dtype == torch.bool else torch.iinfo(dtype).max
            return torch.full((*leading, *shape), value, dtype=dtype)

        def poisoned_obs(space: spaces.Space[Any]) -> Any:
            if isinstance(space, spaces.Dict):
                return {name: poisoned_obs(entry) for name, entry in space.items()}
            shape, dtype = _layout(space)
            return poisoned((steps + 1, envs, *shape), dtype)

        return Rollout(
            obs=poisoned_obs(self.observation_space),
            episode_start=poisoned((steps + 1, envs), torch.bool),
            actions=poisoned((steps, envs, *action_shape), action_dtype),
            log_prob=poisoned((steps, envs)),
            rewards=poisoned((steps, envs)),
            truncation_value=poisoned((steps, envs)),
            lstm_h=poisoned((self.lstm_layers, envs, self.lstm_size)),
            lstm_c=poisoned((self.lstm_layers, envs, self.lstm_size)),
        )


def _layout(space: spaces.Space[Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and torch type of one element of a space that is no Dict."""
    if space.shape is None:
        raise ValueError(
            f"spaces of type {type(space).__name__} are not supported; use Box, Discrete, "
            "MultiDiscrete or MultiBinary, or for observations a Dict of these"
        )
    dtype = space.dtype or np.dtype(np.float32)
    return space.shape, torch.from_numpy(np.empty(0, dtype=dtype)).dtype


class RolloutBatch:
    """Staging area in which the learner lays rollouts side by side, then copies them to its device.

    On CUDA it is pinned memory, which is copied while the host goes on. The copies are made on the
    stream that learns, so after everything that reads the batch before, graphs too. On a stream of
    their own they would overlap with next to nothing: every update ends with a wait for the device.
    """

    def __init__(self, shape: RolloutShape, device: torch.device) -> None:
        self.host = self.batch = shape.allocate()  # what was gathered last, and its copy
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.host = map_tensors(Tensor.pin_memory, self.host)
            self.batch = map_tensors(lambda x: torch.empty_like(x, device=device), self.host)
            self._arrived = torch.cuda.Event()

    def gather(self, rollouts: Sequence[Rollout]) -> Rollout:
        """Copy rollouts into one batch on the learner's device, along the axis of environments.

        The next call overwrites it. The slots may be reused at once.
        """
        if self._arrived is not None:
            self._arrived.synchronize()  # the copy of the batch before may still read pinned memory
        for target, *parts in zip(*map(tensors_in, (self.host, *rollouts)), strict=True):
            # Not by torch, whose threads would fight those of the workers for their cores.
            np.concatenate([part.numpy() for part in parts], axis=1, out=target.numpy())
        if self._arrived is not None:
            for target, source in zip(tensors_in(self.batch), tensors_in(self.host), strict=True):
                target.copy_(source, non_blocking=True)
            self._arrived.record(torch.cuda.current_stream(self.batch.rewards.device))
        return self.batch


class Batch(NamedTuple):
    """What the learner takes at once, for one or more updates: `n_envs` columns of T timesteps."""

    rollout: Rollout  # on the learner's device
    host: Rollout  # the same on the host
    games: list[int]
    """Which game each column is of. Those of a rollout follow each other, but the order of workers
    differs from batch to batch, and a batch may hold several rollouts of one worker."""
    lags: list[int]  # how many versions older than the newest the weights behind each rollout are


class RolloutView:
    """SB3's `rollout_buffer` for callbacks: arrays [T, B, ...] of what was played, until the next
    rollout; no `advantages` and `returns`, which A3C computes inside its update."""

    def __init__(self, batch: Batch, policy: EnginePolicy) -> None:
        self._rollout, self._policy, host = batch.rollout, policy, batch.host
        self.buffer_size, self.n_envs = host.rewards.shape
        self.full = True
        self.observations: Any = map_tensors(lambda x: x[:-1].numpy(), host.obs)
        self.actions, self.rewards = host.actions.numpy(), host.rewards.numpy()
        self.episode_starts = host.episode_start[:-1].float().numpy()
        self.log_probs = host.log_prob.numpy()

    @property
    def values(self) -> np.ndarray:
        """V(x_t) under the weights of now, computed when asked for."""
        return values_of(self._policy, self._rollout)[:-1].cpu().numpy()


@torch.no_grad()
def values_of(policy: EnginePolicy, rollout: Rollout) -> Tensor:
    """V(x_t) of every observation of a rollout under the weights of now, [T + 1, B].

    Leaves the policy in evaluation mode.
    """
    policy.set_training_mode(False)
    state = rollout.lstm_h, rollout.lstm_c
    latent, _ = policy.unroll(rollout.obs, state, rollout.episode_start)
    return policy.values(latent).squeeze(-1)


def first_rows(rollout: Rollout, n_steps: int) -> Rollout:
    """The first `n_steps` timesteps of a rollout, with the observation that follows them."""
    names = ("actions", "log_prob", "rewards", "truncation_value")
    return rollout._replace(
        obs=map_tensors(lambda tensor: tensor[: n_steps + 1], rollout.obs),
        episode_start=rollout.episode_start[: n_steps + 1],
        **{name: getattr(rollout, name)[:n_steps] for name in names},
    )


def split_envs(rollout: Rollout, num_parts: int) -> Iterator[Rollout]:
    """A rollout's environments in `num_parts` equal groups; they are axis 1 of every tensor."""
    width = rollout.rewards.shape[1] // num_parts
    for first in range(0, num_parts * width, width):
        yield map_tensors(lambda tensor, at=first: tensor.narrow(1, at, width), rollout)  # type: ignore[misc]
