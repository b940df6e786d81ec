"""What led to a score, kept and learnt from again (self-imitation, Oh et al. 2018).

Rewards are rare in the games that need this: what was found once is soon forgotten, unless it is
repeated. A demonstration is what one game played on the way to a score. It is read from its
beginning to its end, in every update a window of T + 1 observations, and the LSTM's state goes on
from window to window under the present weights. Stored states would be those of weights long gone:
the network would learn to recognise demonstrations by them, which is of no use in play. One action
of T + 1 is not learnt: the one between two windows.

Shapes: T timesteps, B environments of a batch, K demonstrations that are read at a time,
N timesteps of a demonstration.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncrl.agents.playing.buffers import Rollout
from ncrl.networks import LstmState
from ncrl.sb3.engine import map_tensors

MAX_DEPTH = 8
"""Demonstrations are sorted by how many rewards their game had had by then, up to this many."""

SURPLUS_WINDOWS = 50
"""The surplus of a number of rewards is a running mean over about its latest 50 windows. Before so
many are read it counts as the largest one."""

LEAST_WEIGHT = 0.1
"""The least weight of a demonstration when one is drawn, as a part of the largest weight. Play may
forget again what it does by itself."""


class Kept(NamedTuple):
    """One window of each of K demonstrations, to learn from."""

    obs: Tensor  # [T + 1, K, ...]
    episode_start: Tensor  # [T + 1, K] bool
    actions: Tensor  # [T, K, ...]
    returns: Tensor  # [T, K] what came of it, see `cut_demonstration`; 0 or less after the score
    lstm_h: Tensor  # [L, K, h] hidden state before row 0
    lstm_c: Tensor  # [L, K, h] cell state before row 0


class Demonstration(NamedTuple):
    """What one game played on the way to a score, cut so that its last window ends with it."""

    obs: Tensor  # [N + 1, ...]
    episode_start: Tensor  # [N + 1] bool; the LSTM starts from zero in row 0
    actions: Tensor  # [N, ...]
    returns: Tensor  # [N]


class KeptEvaluation(NamedTuple):
    """What the present weights make of the windows of K demonstrations."""

    lstm_state: LstmState  # after the last row, [L, K, h] twice
    surplus: Tensor  # [K] mean over a window of `imitation_surplus`


class Reader(NamedTuple):
    """One of the K demonstrations that are being read."""

    demonstration: Demonstration
    depth: int  # number of rewards that it is kept under
    row: int  # the next to read


def returns_to_end(rewards: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """Discounted sums of one game's rewards [N], each up to the end of its episode or of the N
    timesteps: [N].

    Nothing is added for what may come after them.
    """
    # By numpy: torch is slow with single numbers.
    returns, are_ends = rewards.numpy().copy(), ends.numpy()
    factor = returns.dtype.type(gamma)
    for t in range(len(returns) - 2, -1, -1):
        if not are_ends[t]:
            returns[t] += factor * returns[t + 1]
    return torch.from_numpy(returns)


def cut_demonstration(
    rollouts: Sequence[Rollout], gamma: float, values: Tensor
) -> Demonstration | None:
    """What led to the last score of successive rollouts of one environment; None if losses outweigh
    the score.

    The return of a timestep is the discounted sum of its rewards up to the score, and of the value
    of the observation behind the score. Without it values would lie above returns wherever games go
    on to a second score. The way to the first would then not be imitated, however seldom it is
    still found.

    The demonstration is made of whole windows of T + 1 observations, one at least, and loses its
    first timesteps for that. If there are too few for one window, timesteps before or after them
    fill it up, which teach nothing: their returns are not positive.

    Args:
        rollouts: the oldest first.
        gamma: discount of the returns.
        values: of the observations of the last rollout under the policy of now, [T + 1]. One below
            0 counts as 0, since the score is to be imitated whatever follows. Nothing is added for
            a score in an earlier rollout, or with which the episode ended.
    """
    rewards = torch.cat([rollout.rewards[:, 0] for rollout in rollouts])
    actions = torch.cat([rollout.actions[:, 0] for rollout in rollouts])

    def joined(name: str) -> Tensor:
        """T + 1 rows of every rollout, of which the last one is the first of the next rollout."""
        parts = [getattr(rollout, name)[:, 0] for rollout in rollouts]
        return torch.cat([*(rows[:-1] for rows in parts), parts[-1][-1:]])

    obs, starts = joined("obs"), joined("episode_start")
    returns = returns_to_end(rewards, starts[1:], gamma)
    width = len(rollouts[0].rewards) + 1
    led = (returns > 0).nonzero().flatten()
    if not len(led):
        return None
    ends = starts[1 : 1 + led[-1]].nonzero().flatten()
    returns[: int(ends[-1]) + 1 if len(ends) else 0] = 0  # an earlier game has its own
    # Rows of observations; the last one was seen after the score.
    first, last = int((returns > 0).nonzero()[0]), int(led[-1]) + 1
    row = last - len(rewards) + len(values) - 1  # of the last rollout
    value = float(values[row]) if row >= 0 and not starts[last] else 0.0
    rewards[last - 1] += gamma * value if 0 < value < math.inf else 0.0
    returns[first:last] = returns_to_end(rewards[first:last], starts[first + 1 : last + 1], gamma)
    last = min(len(returns), max(last, first + width - 1))
    first = min(first, last + 1 - width)
    first += (last + 1 - first) % width
    starts = starts[first : last + 1].clone()
    starts[0] = True
    return Demonstration(obs[first : last + 1], starts, actions[first:last], returns[first:last])


class DemonstrationMemory:
    """Remembers the latest rollouts of every game, and keeps what led to a score.

    Memory is bounded: `reach` rollouts for each game, and `capacity` demonstrations for each number
    of rewards; images are compressed. So a game that went on to its second reward is remembered
    beside the many that had one. What is read is drawn from all demonstrations, each weighed by the
    surplus of its number of rewards (Oh et al. weigh single timesteps so). What play reaches by
    itself is read least.

    Args:
        gamma: discount of the returns.
        reach: rollouts before a score that are kept with it.
        capacity: demonstrations for each number of rewards; the oldest make room.
        seed: of the choice among them.
    """

    def __init__(self, *, gamma: float, reach: int, capacity: int, seed: int) -> None:
        self.gamma = gamma
        self.reach = reach
        self.capacity = capacity
        self.generator = torch.Generator().manual_seed(seed)
        self.games_go_on = True
        """Whether games go on where they were after a state is loaded. Otherwise their latest
        rollouts lead nowhere, and are not saved."""
        self._recent: dict[int, deque[Rollout]] = {}
        self._num_rewards: dict[int, int] = {}
        self._kept: dict[int, deque[dict[str, Any]]] = {}
        self._surplus: dict[int, tuple[int, float]] = {}  # windows read, and their running mean
        self._readers: list[Reader] = []
        self._state: LstmState | None = None

    def __len__(self) -> int:
        """Demonstrations that are kept."""
        return sum(map(len, self._kept.values()))

    def watch(self, batch: Rollout, games: Sequence[int], rewards: Tensor, values: Tensor) -> None:
        """Take in a batch of rollouts on the host.

        Args:
            batch: [T, B, ...].
            games: which game each column is; rollouts of one game come in the order of play.
            rewards: as the loss sees them, [T, B].
            values: of the observations under the policy of now, [T + 1, B]; those of games that
                did not score are not read.
        """
        for column, game in enumerate(games):
            rollout = map_tensors(lambda x, i=column: x[:, i : i + 1].clone(), batch)  # type: ignore[misc]
            rollout = rollout._replace(rewards=rewards[:, column : column + 1].clone())
            recent = self._recent.setdefault(game, deque(maxlen=self.reach))
            if bool(rollout.episode_start[0]):
                recent.clear()
                self._num_rewards[game] = 0
            recent.append(rollout)
            depth = min(self._count_rewards(game, rollout), MAX_DEPTH)
            found = None
            if bool((rollout.rewards > 0).any()):
                found = cut_demonstration(list(recent), self.gamma, values[:, column])
            if found is not None:
                self._kept.setdefault(depth, deque(maxlen=self.capacity)).append(_pack(found))
            if bool(rollout.episode_start[1:].any()):
                recent.clear()
                recent.append(rollout)

    def _count_rewards(self, game: int, rollout: Rollout) -> int:
        """Count the rewards of a game on; returns which number its last one in the rollout has."""
        count = last = self._num_rewards.get(game, 0)
        found, ends = (rollout.rewards[:, 0] > 0).tolist(), rollout.episode_start[1:, 0].tolist()
        for is_reward, is_end in zip(found, ends, strict=True):
            if is_reward:
                last = count = count + 1
            count = 0 if is_end else count
        self._num_rewards[game] = count
        return last

    def read(self, n_steps: int, initial_state: LstmState) -> Kept | None:
        """The next window of each of K demonstrations; None if nothing is kept.

        One that is at its end makes room for another. Call `carry` after the update.

        Args:
            n_steps: T of the rollouts.
            initial_state: of K environments; its values do not matter, as demonstrations begin with
                an `episode_start`.
        """
        if not self._kept:
            return None
        count = initial_state[0].shape[1]
        if len(self._readers) != count or self._state is None:
            self._readers, self._state = [self._choose() for _ in range(count)], initial_state
        windows = []
        for i, reader in enumerate(self._readers):
            if reader.row == len(reader.demonstration.obs):
                reader = self._choose()
            demonstration, _, row = reader
            after = row + n_steps + 1
            self._readers[i] = reader._replace(row=after)
            rows, steps = slice(row, after), slice(row, after - 1)
            windows.append(
                (
                    *(demonstration.obs[rows], demonstration.episode_start[rows]),
                    *(demonstration.actions[steps], demonstration.returns[steps]),
                )
            )
        obs, starts, actions, returns = (
            torch.stack(columns, dim=1) for columns in zip(*windows, strict=True)
        )
        return Kept(obs, starts, actions, returns, *self._state)

    def carry(self, evaluation: KeptEvaluation) -> None:
        """Take what the present weights make of the windows that were read last.

        After an update that was not made there is nothing to take: the next windows then begin with
        the state that the last ones began with.
        """
        for reader, surplus in zip(self._readers, evaluation.surplus.tolist(), strict=True):
            windows, mean = self._surplus.get(reader.depth, (0, 0.0))
            windows = min(windows + 1, SURPLUS_WINDOWS)
            self._surplus[reader.depth] = windows, mean + (surplus - mean) / windows
        self._state = evaluation.lstm_state

    def demonstrations(self) -> dict[int, list[Demonstration]]:
        """All that is kept, by number of rewards, the oldest first."""
        return {
            depth: [Demonstration(*_unpack(packed)) for packed in kept]
            for depth, kept in sorted(self._kept.items())
        }

    def _choose(self) -> Reader:
        depths = sorted(self._kept)
        seen = {
            depth: mean
            for depth, (windows, mean) in self._surplus.items()
            if windows == SURPLUS_WINDOWS
        }
        largest = max(seen.values(), default=0.0) or 1.0
        weights = torch.tensor([seen.get(depth, largest) / largest for depth in depths])
        counts = torch.tensor([len(self._kept[depth]) for depth in depths])
        shares = weights.clamp(min=LEAST_WEIGHT) * counts
        depth = depths[int(torch.multinomial(shares, 1, generator=self.generator))]
        kept = self._kept[depth]
        return Reader(Demonstration(*_unpack(kept[self._random(len(kept))])), depth, 0)

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
                game: [_pack(rollout) for rollout in recent]
                for game, recent in self._recent.items()
                if self.games_go_on
            },
            "num_rewards": dict(self._num_rewards) if self.games_go_on else {},
            "kept": {depth: list(kept) for depth, kept in self._kept.items()},
            "surplus": dict(self._surplus),
            "readers": [(_pack(reading), *others) for reading, *others in self._readers],
            "lstm_state": None if self._state is None else [part.cpu() for part in self._state],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: for anything else.
        """
        try:
            self.generator.set_state(state["generator"].cpu())
            self._recent = {
                int(game): deque((Rollout(*_unpack(_on_host(each))) for each in recent), self.reach)
                for game, recent in state["recent"].items()
            }
            self._num_rewards = {int(game): int(n) for game, n in state["num_rewards"].items()}
            self._kept = {
                int(depth): deque(map(_on_host, kept), self.capacity)
                for depth, kept in state["kept"].items()
            }
            for kept in self._kept.values():
                for packed in kept:
                    Demonstration(*_unpack(packed))
            self._surplus = {
                int(depth): (int(windows), float(mean))
                for depth, (windows, mean) in state.get("surplus", {}).items()
            }
            if not all(n >= 0 and 0 <= mean < math.inf for n, mean in self._surplus.values()):
                raise ValueError(f"surpluses {self._surplus}")
            self._readers = [
                Reader(Demonstration(*_unpack(_on_host(packed))), int(depth), int(row))
                for packed, depth, row in (state["readers"] if "surplus" in state else ())
            ]  # files of earlier versions know no surplus: reading begins anew
            self._state = None
            if state["lstm_state"] is not None:
                hidden, cells = state["lstm_state"]
                self._state = hidden.clone(), cells.clone()
        except (
            *(KeyError, TypeError, ValueError, AttributeError),
            *(RuntimeError, OverflowError, zlib.error),
        ) as error:
            raise ValueError(f"the kept demonstrations cannot be read: {error}") from error


def _pack(tensors: Rollout | Demonstration) -> dict[str, Any]:
    """The tensors with compressed observations: most of a game's image is plain."""
    obs, *others = tensors
    assert isinstance(obs, Tensor)  # an intrinsic reward scores no dicts
    squeezed = zlib.compress(obs.contiguous().numpy().tobytes(), level=1)
    return {
        "obs": torch.frombuffer(bytearray(squeezed), dtype=torch.uint8),
        "like": torch.empty(0, dtype=obs.dtype),
        "shape": list(obs.shape),
        "others": [tensor.clone() for tensor in others],
    }


def _on_host(packed: dict[str, Any]) -> dict[str, Any]:
    """Packed tensors on the CPU: SB3 loads those of a file onto the model's device."""
    others = [tensor.cpu() for tensor in packed["others"]]
    return {**packed, "obs": packed["obs"].cpu(), "others": others}


def _unpack(packed: dict[str, Any]) -> list[Tensor]:
    dtype = packed["like"].dtype
    size = int(np.prod(packed["shape"])) * dtype.itemsize
    raw = zlib.decompressobj().decompress(packed["obs"].numpy().tobytes(), size)
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes in place of {size}")
    obs = torch.frombuffer(bytearray(raw), dtype=dtype).view(packed["shape"])
    return [obs, *packed["others"]]
