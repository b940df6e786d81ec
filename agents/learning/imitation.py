"""Rollouts that led to a score, kept and learnt from again (self-imitation, Oh et al. 2018).

Rewards are rare in the games that need this: what was found once is soon forgotten, unless it is
repeated. Shapes: T timesteps, B environments of a batch, K rollouts that are learnt from again.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncrl.agents.playing.buffers import Rollout

MAX_DEPTH = 8
"""Rollouts are told apart by the rewards that their game had had by then, up to this many."""


class Kept(NamedTuple):
    """Rollouts to learn from again."""

    rollout: Rollout
    """Of K environments."""

    returns: Tensor
    """Discounted rewards up to the score that they led to, [T, K]; 0 behind it."""


def returns_to_last_score(rewards: Tensor, dones: Tensor, gamma: float) -> Tensor:
    """Discounted rewards of one game's timesteps [T] to the end of what is given: [T].

    Nothing is estimated for what comes after, so this is what was reached at least.
    """
    returns = torch.zeros_like(rewards)
    following = torch.zeros((), dtype=rewards.dtype)
    for t in range(len(rewards) - 1, -1, -1):
        following = rewards[t] + gamma * following * (~dones[t]).to(rewards.dtype)
        returns[t] = following
    return returns


class RolloutMemory:
    """Remembers the latest rollouts of every game, and keeps those that led to a score.

    Memory is bounded: `reach` rollouts a game, and `capacity` kept ones for each number of rewards,
    whose images are compressed. A game that goes on to its second reward is thus remembered beside
    the many that had one, and is drawn as often.

    Args:
        gamma: discount of the returns.
        reach: rollouts before a score that are kept with it.
        capacity: kept rollouts for each number of rewards; the oldest make room.
        seed: of what is drawn.
    """

    def __init__(self, *, gamma: float, reach: int, capacity: int, seed: int) -> None:
        self.gamma = gamma
        self.reach = reach
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.games_go_on = True
        """Whether games go on where they were after the state is loaded; else what led there is
        not worth saving."""
        self._recent: dict[int, deque[Rollout]] = {}
        self._num_rewards: dict[int, int] = {}
        self._kept: dict[int, deque[dict[str, Any]]] = {}

    def __len__(self) -> int:
        """Rollouts that are kept."""
        return sum(map(len, self._kept.values()))

    def watch(self, batch: Rollout, games: Sequence[int], rewards: Tensor) -> None:
        """Take in a batch of rollouts on the host.

        Args:
            batch: [T, B, ...].
            games: which game each column is; rollouts of one game come in the order of play.
            rewards: as the loss sees them, [T, B].
        """
        for column, game in enumerate(games):
            rollout = batch.map(lambda tensor, i=column: tensor[:, i : i + 1].clone())  # type: ignore[misc]
            rollout = rollout._replace(rewards=rewards[:, column : column + 1].clone())
            recent = self._recent.setdefault(game, deque(maxlen=self.reach))
            if bool(rollout.episode_start[0]):
                recent.clear()
                self._num_rewards[game] = 0
            recent.append(rollout)
            depth = self._count_rewards(game, rollout)
            if bool((rollout.rewards > 0).any()):
                self._keep(depth, list(recent))
            if bool(rollout.dones.any()):
                recent.clear()
                recent.append(rollout)

    def _count_rewards(self, game: int, rollout: Rollout) -> int:
        """Go on counting the rewards of a game; returns the most that one had in the rollout."""
        count = most = self._num_rewards.get(game, 0)
        found, dones = (rollout.rewards[:, 0] > 0).tolist(), rollout.dones[:, 0].tolist()
        for is_reward, is_end in zip(found, dones, strict=True):
            count += is_reward
            most = max(most, count)
            count = 0 if is_end else count
        self._num_rewards[game] = count
        return most

    def _keep(self, num_rewards: int, rollouts: list[Rollout]) -> None:
        depth = min(num_rewards, MAX_DEPTH)
        kept = self._kept.setdefault(depth, deque(maxlen=self.capacity))
        rewards, dones = (
            torch.cat([getattr(r, name)[:, 0] for r in rollouts]) for name in ("rewards", "dones")
        )
        returns = returns_to_last_score(rewards, dones, self.gamma).split(len(rollouts[0].rewards))
        for rollout, its_returns in zip(rollouts, returns, strict=True):
            if bool((its_returns > 0).any()):
                kept.append(_pack(Kept(rollout, its_returns[:, None])))

    def draw(self, count: int) -> Kept | None:
        """`count` rollouts, every number of rewards equally likely; None if nothing is kept."""
        if not self._kept:
            return None
        depths = sorted(self._kept)
        drawn = []
        for _ in range(count):
            kept = self._kept[depths[self._random(len(depths))]]
            drawn.append(_unpack(kept[self._random(len(kept))]))
        rollouts = zip(*(kept.rollout for kept in drawn), strict=True)
        return Kept(
            Rollout(*(torch.cat(tensors, dim=1) for tensors in rollouts)),
            torch.cat([kept.returns for kept in drawn], dim=1),
        )

    def _random(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def forget_recent(self) -> None:
        """The games start anew: what was played before leads nowhere."""
        self._recent.clear()
        self._num_rewards.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "generator": self.generator.get_state(),
            "recent": {
                game: [_pack(Kept(rollout, rollout.rewards)) for rollout in recent]
                for game, recent in self._recent.items()
                if self.games_go_on
            },
            "num_rewards": dict(self._num_rewards) if self.games_go_on else {},
            "kept": {depth: list(kept) for depth, kept in self._kept.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: for anything else.
        """
        try:
            self.generator.set_state(state["generator"])
            self._recent = {
                int(game): deque((_unpack(packed).rollout for packed in recent), self.reach)
                for game, recent in state["recent"].items()
            }
            self._num_rewards = {int(game): int(n) for game, n in state["num_rewards"].items()}
            self._kept = {
                int(depth): deque(kept, self.capacity) for depth, kept in state["kept"].items()
            }
            for kept in self._kept.values():
                for packed in kept:
                    _unpack(packed)
        except (
            *(KeyError, TypeError, ValueError, AttributeError),
            *(RuntimeError, OverflowError, zlib.error),
        ) as error:
            raise ValueError(f"the kept rollouts cannot be read: {error}") from error


def _pack(kept: Kept) -> dict[str, Any]:
    """With compressed observations; images of a game take a twentieth of their size."""
    obs, *others = kept.rollout
    assert isinstance(obs, Tensor)  # an intrinsic reward scores no dicts
    squeezed = zlib.compress(obs.numpy().tobytes(), level=1)
    return {
        "obs": torch.frombuffer(bytearray(squeezed), dtype=torch.uint8),
        "like": torch.empty(0, dtype=obs.dtype),
        "shape": list(obs.shape),
        "others": [tensor.clone() for tensor in others],
        "returns": kept.returns.clone(),
    }


def _unpack(packed: dict[str, Any]) -> Kept:
    dtype = packed["like"].dtype
    size = int(np.prod(packed["shape"])) * dtype.itemsize
    raw = zlib.decompressobj().decompress(packed["obs"].numpy().tobytes(), size)
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes in place of {size}")
    obs = torch.frombuffer(bytearray(raw), dtype=dtype).view(packed["shape"])
    return Kept(Rollout(obs, *packed["others"]), packed["returns"])
