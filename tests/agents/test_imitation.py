"""What led to a score: what is kept of it, how it is read, and how it goes on from a file."""

import io
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from ncrl.agents import A3C
from ncrl.agents.learning.imitation import (
    MAX_DEPTH,
    SURPLUS_WINDOWS,
    Demonstration,
    DemonstrationMemory,
    KeptEvaluation,
    cut_demonstration,
)
from ncrl.agents.learning.losses import imitation_loss, imitation_surplus
from ncrl.agents.playing.buffers import Rollout
from ncrl.networks import LstmState
from ncrl.shell.tensors import tensors_in

T = 4


def returns_reference(rewards: list[float], dones: list[bool], gamma: float) -> list[float]:
    """Sum of gamma^(k - t) r_k over k >= t up to the first end, for every t."""
    found = []
    for t in range(len(rewards)):
        total = 0.0
        for k in range(t, len(rewards)):
            total += gamma ** (k - t) * rewards[k]
            if dones[k]:
                break
        found.append(total)
    return found


def rollout_of(
    name: float,
    rewards: Sequence[float] = (0,) * T,
    ends: Sequence[int] = (),
    *,
    starts: bool = False,
    obs_dtype: torch.dtype = torch.uint8,
) -> Rollout:
    """Of one environment; `name` is in every observation, and the actions count."""
    ended = torch.zeros(T, 1, dtype=torch.bool)
    ended[list(ends)] = True
    return Rollout(
        obs=torch.full((T + 1, 1, 2), name, dtype=obs_dtype),
        episode_start=torch.cat([torch.full((1, 1), starts), ended]),
        actions=torch.arange(T)[:, None],
        log_prob=torch.full((T, 1), -float(name)),
        rewards=torch.tensor(rewards, dtype=torch.float32)[:, None],
        truncation_value=torch.zeros(T, 1),
        lstm_h=torch.full((1, 1, 3), float(name)),
        lstm_c=torch.full((1, 1, 3), -float(name)),
    )


def side_by_side(*rollouts: Rollout) -> Rollout:
    return Rollout(*(torch.cat(tensors, 1) for tensors in zip(*rollouts, strict=True)))


def memory_of(**options: Any) -> DemonstrationMemory:
    defaults: dict[str, Any] = {"gamma": 0.5, "reach": 3, "capacity": 50, "seed": 0}
    return DemonstrationMemory(**(defaults | options))


def watch(
    memory: DemonstrationMemory, batch: Rollout, games: Sequence[int], value: float = 0.0
) -> None:
    """A batch whose observations all have one value."""
    memory.watch(batch, games, batch.rewards, torch.full(batch.episode_start.shape, value))


def play(
    memory: DemonstrationMemory, *rollouts: Rollout, game: int = 0, value: float = 0.0
) -> None:
    for rollout in rollouts:
        watch(memory, rollout, [game], value)


def state_of(count: int, value: float = 0.0) -> LstmState:
    return torch.full((1, count, 3), value), torch.full((1, count, 3), -value)


def evaluation_of(
    count: int, value: float = 0.0, surplus: Sequence[float] | None = None
) -> KeptEvaluation:
    surpluses = torch.tensor([0.0] * count if surplus is None else surplus)
    return KeptEvaluation(state_of(count, value), surpluses)


def kept_by(memory: DemonstrationMemory) -> list[Demonstration]:
    """Everything, by depth and age."""
    return [demonstration for kept in memory.demonstrations().values() for demonstration in kept]


def names_of(demonstration: Demonstration) -> list[int]:
    """The rollouts that observations are from, but for the one behind the last action."""
    return sorted({int(name) for name in demonstration.obs[:-1, 0].tolist()})


SCORE = (0, 0, 1, 0)


def test_what_led_to_a_score_is_kept_and_ends_with_it() -> None:
    memory = memory_of(reach=3)
    play(memory, rollout_of(1, starts=True), rollout_of(2), rollout_of(3), rollout_of(4, SCORE))
    (kept,) = kept_by(memory)
    # 3 rollouts are in reach: 11 actions to the score, 12 observations, of which 10 are 2 windows.
    assert kept.obs[:, 0].tolist() == [2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert kept.actions.tolist() == [2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert kept.returns.tolist() == [0.5**k for k in range(8, -1, -1)]
    assert kept.episode_start.tolist() == [True] + [False] * 9
    play(memory, rollout_of(5), rollout_of(6))
    assert len(memory) == 1, "nothing was reached since"


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_whole_and_returns_are_those_of_the_game(seed: int) -> None:
    """Against a literal reading: of the last game's timesteps whose rewards to come are positive
    the last ones, in whole windows; fewer than one window are filled up with what is around."""
    random = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=random))

    rollouts: list[Rollout] = []
    for name in range(1 + draw(4)):
        rewards = [float(draw(8) == 0) - 0.5 * (draw(12) == 0) for _ in range(T)]
        ends = [t for t in range(T) if draw(9) == 0]
        starts = bool(rollouts and rollouts[-1].episode_start[-1])
        rollouts.append(rollout_of(name, rewards, ends, starts=starts))
    rollouts[-1].rewards[draw(T)] = 1
    values = torch.tensor([(draw(8) - 2) / 4 for _ in range(T + 1)])
    kept = cut_demonstration(rollouts, 0.5, values)
    assert kept is not None
    rewards = [r for rollout in rollouts for r in rollout.rewards[:, 0].tolist()]
    dones = [d for rollout in rollouts for d in rollout.episode_start[1:, 0].tolist()]
    returns = returns_reference(rewards, dones, 0.5)
    last = max(t for t in range(len(returns)) if returns[t] > 0)
    returns = [0.0 if any(dones[t:last]) else returns[t] for t in range(len(returns))]
    begin = min(t for t in range(len(returns)) if returns[t] > 0)
    row = last + 1 - len(returns) + T  # of the last rollout, whose values are known
    value = 0.0 if dones[last] or row < 0 else max(0.0, float(values[row]))
    for t in range(begin, last + 1):
        ahead = [0.5 ** (k - t) * rewards[k] for k in range(t, last + 1)]
        returns[t] = sum(ahead) + 0.5 ** (last + 1 - t) * value
    count = max(1, (last - begin + 2) // (T + 1)) * (T + 1) - 1
    assert len(kept.obs) == len(kept.episode_start) == count + 1
    assert len(kept.actions) == len(kept.returns) == count
    first = max(0, min(last + 1 - count, len(returns) - count))
    if last - begin + 1 < T:
        starts = [
            t for t in range(len(returns) - T + 1) if returns[t : t + T] == kept.returns.tolist()
        ]
        assert starts, "one window of the game"
        assert kept.returns.max() == max(returns[begin : last + 1])
    else:
        assert kept.returns.tolist() == returns[first : first + count]
        assert kept.actions.tolist() == [t % T for t in range(first, first + count)]
        assert kept.episode_start.tolist()[1:] == dones[first : first + count]
    assert kept.episode_start[0]


@pytest.mark.parametrize("at", range(2 * T))
def test_a_score_right_after_the_end_of_a_game_lies_in_its_one_window(at: int) -> None:
    rewards = torch.zeros(2 * T)
    rewards[at] = 1
    ends = [[at - 1] if 0 <= at - 1 < T else [], [at - 1 - T] if at > T else []]
    first, second = rewards[:T].tolist(), rewards[T:].tolist()
    kept = cut_demonstration(
        [rollout_of(0, first, ends[0]), rollout_of(1, second, ends[1], starts=at == T)],
        0.5,
        torch.zeros(T + 1),
    )
    assert kept is not None and len(kept.returns) == T
    row = at - kept.returns.tolist().index(1)
    names = [*torch.arange(2).repeat_interleave(T).tolist(), 1]
    assert kept.obs[:, 0].tolist() == names[row : row + T + 1]
    assert kept.actions.tolist() == [t % T for t in range(row, row + T)]
    assert kept.returns.count_nonzero() == 1


@pytest.mark.parametrize(
    "rewards", [(0, 0, 0, 0), (0, -1, 0, 0), (0, 1, -1, -1), (1, 0, 0, -1), (1, -1, 1, -2)]
)
def test_nothing_is_kept_without_a_score_or_where_losses_outweigh_it(
    rewards: Sequence[float],
) -> None:
    memory = memory_of(gamma=1.0)
    play(memory, rollout_of(1, starts=True), rollout_of(2, rewards))
    assert memory.read(T, state_of(3)) is None and len(memory) == 0
    play(memory, rollout_of(3, (0, 0, 5, 0)))
    assert len(memory) == 1


def test_what_an_end_of_a_game_separates_from_the_score_did_not_lead_to_it() -> None:
    memory = memory_of(reach=5)
    ended = rollout_of(2, ends=[1])
    play(memory, rollout_of(1, starts=True), ended, rollout_of(3), rollout_of(4, SCORE))
    (kept,) = kept_by(memory)
    assert names_of(kept) == [2, 3, 4] and len(kept.obs) == 2 * (T + 1)
    assert kept.returns.tolist() == [0.5**k for k in range(8, -1, -1)]


def test_a_score_of_the_game_before_is_not_read_again() -> None:
    memory = memory_of(reach=5)
    play(memory, rollout_of(1, SCORE, starts=True), rollout_of(2, ends=[1]), rollout_of(3, SCORE))
    assert [names_of(kept) for kept in kept_by(memory)] == [[1], [2, 3]]


def test_a_score_and_an_end_in_one_rollout_are_no_part_of_the_next_game() -> None:
    memory = memory_of(reach=5)
    both = rollout_of(1, (0, 1, 0, 0), ends=[2], starts=True)
    play(memory, both, rollout_of(2), rollout_of(3), rollout_of(4, SCORE))
    _, later = kept_by(memory)
    assert names_of(later) == [2, 3, 4] and len(later.obs) == 2 * (T + 1)
    assert later.returns.tolist() == [0.5**k for k in range(8, -1, -1)]


def test_what_a_score_led_to_counts_in_what_it_is_worth() -> None:
    """As a reward right after it would; below 0 it counts nothing, nor where the score ended the
    game."""
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2, SCORE), value=0.5)
    (kept,) = kept_by(memory)
    assert kept.returns.tolist() == [1.25 * 0.5**k for k in range(len(kept.returns) - 1, -1, -1)]
    for value, ends in ((-0.5, []), (0.5, [2])):
        memory = memory_of()
        play(memory, rollout_of(1, starts=True), rollout_of(2, SCORE, ends), value=value)
        assert float(kept_by(memory)[0].returns[-1]) == 1


def test_games_that_start_anew_lead_to_nothing() -> None:
    """A worker that died ends no game: its next rollout begins with another."""
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2))
    play(memory, rollout_of(3, starts=True), rollout_of(4, SCORE))
    assert names_of(kept_by(memory)[0]) == [3, 4]
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2))
    memory.forget_recent()
    play(memory, rollout_of(3), rollout_of(4, SCORE))
    assert names_of(kept_by(memory)[0]) == [3, 4]
    memory.forget_recent()
    play(memory, rollout_of(5, SCORE))
    assert depths_of(memory) == {1: 2}, "rewards are counted anew, too"


def test_columns_are_told_apart_by_their_game_and_one_game_may_come_twice() -> None:
    memory = memory_of()
    first = side_by_side(rollout_of(1, starts=True), rollout_of(2, starts=True))
    watch(memory, first, [7, 5])
    second = side_by_side(rollout_of(3), rollout_of(4, SCORE))  # both of game 5, in this order
    watch(memory, second, [5, 5])
    (kept,) = kept_by(memory)
    assert names_of(kept) == [2, 3, 4]


def test_a_score_of_one_game_keeps_nothing_of_another() -> None:
    memory = memory_of()
    for rollouts in (
        (rollout_of(1, SCORE, starts=True), rollout_of(2, starts=True)),
        (rollout_of(3), rollout_of(4, SCORE)),
    ):
        batch = side_by_side(*rollouts)
        watch(memory, batch, [0, 1])
    assert [names_of(kept) for kept in kept_by(memory)] == [[1], [2, 4]]


def test_rewards_are_those_of_the_loss() -> None:
    memory = memory_of()
    rollout = rollout_of(1, (0, 0, 500, 0), starts=True)
    memory.watch(rollout, [0], rollout.rewards.clamp(max=1), torch.zeros(T + 1, 1))
    read = memory.read(T, state_of(1))
    assert read is not None and read.returns[:, 0].tolist() == [0.25, 0.5, 1, 0]


def depths_of(memory: DemonstrationMemory) -> dict[int, int]:
    return {depth: len(kept) for depth, kept in memory.state_dict()["kept"].items()}


def test_depth_is_the_number_of_rewards_of_one_game() -> None:
    memory = memory_of(reach=1)
    play(memory, rollout_of(1, SCORE, starts=True), rollout_of(2, (1, 0, 1, 0)))
    assert depths_of(memory) == {1: 1, 3: 1}
    # Two games of one reward each are none of two.
    play(memory, rollout_of(3, (0, 1, 0, 1), ends=[0, 2], starts=True))
    assert depths_of(memory) == {1: 2, 3: 1}
    play(memory, rollout_of(4, SCORE))  # the second of the game that goes on
    assert depths_of(memory) == {1: 2, 2: 1, 3: 1}
    # What is kept is of the last game, whatever those before it had.
    play(memory, rollout_of(5, (1, 1, 0, 1), ends=[2], starts=True))
    assert depths_of(memory) == {1: 3, 2: 1, 3: 1}
    play(memory, rollout_of(6, (1, 0, 1, 0)), rollout_of(7, SCORE, ends=[1]))
    assert depths_of(memory) == {1: 4, 2: 1, 3: 2}
    for name in range(5, 5 + MAX_DEPTH):
        play(memory, rollout_of(name, (1, 1, 1, 1)))
    assert max(depths_of(memory)) == MAX_DEPTH
    # A reward counts that comes with the end of its game.
    play(memory, rollout_of(99, (0, 0, 0, 1), ends=[3], starts=True))
    assert depths_of(memory)[1] == 5 and 0 not in depths_of(memory)


def test_a_loss_is_no_reward_that_makes_a_game_deeper() -> None:
    memory = memory_of(reach=1)
    play(memory, rollout_of(1, (-1, 0, 0, -1), starts=True), rollout_of(2, (1, -1, 2, 0)))
    assert depths_of(memory) == {2: 1}


def test_demonstrations_are_listed_by_their_number_of_rewards() -> None:
    memory = memory_of(reach=1)
    play(memory, rollout_of(1, (1, 0, 1, 0), starts=True), rollout_of(2, SCORE, starts=True))
    assert list(memory.demonstrations()) == [1, 2]


def test_what_is_kept_is_bounded_by_depth_and_the_oldest_makes_room() -> None:
    memory = memory_of(reach=1, capacity=3)
    for name in range(10):
        play(memory, rollout_of(name, SCORE, starts=True))
    play(memory, rollout_of(10, SCORE))
    assert depths_of(memory) == {1: 3, 2: 1}
    assert [names_of(kept) for kept in kept_by(memory)] == [[7], [8], [9], [10]]


def shares_of(memory: DemonstrationMemory, count: int = 4000) -> dict[int, float]:
    """By observation, how often the readers of `count` new demonstrations begin with it."""
    memory._readers = []
    read = memory.read(T, state_of(count))
    assert read is not None
    names, counts = read.obs[0, :, 0].unique(return_counts=True)
    return dict(zip(names.tolist(), (counts / count).tolist(), strict=True))


def measure(memory: DemonstrationMemory, surpluses: dict[int, Sequence[float]]) -> None:
    """As if a window of each depth were read for each of its surpluses."""
    some = memory._choose()
    for depth, series in surpluses.items():
        memory._readers = [some._replace(depth=depth)]
        for surplus in series:
            memory.carry(evaluation_of(1, surplus=[surplus]))


def test_demonstrations_are_read_equally_often_before_anything_is_known_of_them() -> None:
    memory = memory_of(reach=1)
    for name in range(20):
        play(memory, rollout_of(name, SCORE, starts=True))
    play(memory, rollout_of(99, SCORE))
    shares = shares_of(memory)
    assert set(shares) == {*range(20), 99}
    assert max(shares.values()) < 0.07, "a 21st"


def test_demonstrations_are_read_in_proportion_to_the_surplus_of_their_depth() -> None:
    """One without surplus is read a tenth as often as one with the largest; one of a depth of which
    few windows were read, as often as that."""
    memory = memory_of(reach=1)
    play(memory, *(rollout_of(name, SCORE, starts=name == 0) for name in range(4)))
    play(memory, *(rollout_of(name, SCORE, starts=name == 4) for name in range(4, 6)))
    many = SURPLUS_WINDOWS
    measure(memory, {1: [0] * many, 2: [0.2] * many, 3: [0.5] * many, 4: [0.1] * (many - 1)})
    shares = shares_of(memory, 8000)
    for name, weight in {0: 0.1, 1: 0.4, 2: 1.0, 3: 1.0, 4: 0.1, 5: 0.4}.items():
        assert shares[name] == pytest.approx(weight / 3, abs=0.02)
    measure(memory, {4: [0.1]})
    assert shares_of(memory, 8000)[3] == pytest.approx(0.2 / 2.2, abs=0.02)


def test_a_surplus_is_the_mean_of_all_windows_and_then_of_the_latest() -> None:
    memory = memory_of(reach=1)
    play(memory, rollout_of(1, SCORE, starts=True))
    series = [0.01 * k for k in range(SURPLUS_WINDOWS)]
    measure(memory, {1: series})
    windows, mean = memory.state_dict()["surplus"][1]
    assert windows == SURPLUS_WINDOWS and mean == pytest.approx(sum(series) / len(series))
    measure(memory, {1: [2.0]})
    windows, after = memory.state_dict()["surplus"][1]
    assert windows == SURPLUS_WINDOWS and after == pytest.approx(mean + (2 - mean) / windows)


@pytest.mark.parametrize("surplus", [0.0, 5e-324, 1e300])
def test_no_surplus_is_too_small_or_too_large_to_be_drawn_by(surplus: float) -> None:
    """Where nothing is left to imitate, a running mean fades until no float holds it."""
    memory = memory_of(reach=1)
    play(memory, rollout_of(1, SCORE, starts=True), rollout_of(2, SCORE))
    state = memory.state_dict()
    memory.load_state_dict(state | {"surplus": {1: (50, surplus), 2: (50, surplus)}})
    assert shares_of(memory)[1] == pytest.approx(0.5, abs=0.03)


def test_a_memory_of_earlier_versions_is_read_anew() -> None:
    """Its readers told no depth, and it knew no surplus."""
    memory, other = memory_of(), memory_of()
    play(memory, *scenes())
    memory.read(T, state_of(3))
    state = filed(memory.state_dict())
    del state["surplus"]
    state["readers"] = [(packed, row) for packed, _, row in state["readers"]]
    other.load_state_dict(state)
    assert depths_of(other) == depths_of(memory)
    read = other.read(T, state_of(3))
    assert read is not None and read.episode_start[0].all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_demonstration_is_read_to_its_end_window_by_window(dtype: torch.dtype) -> None:
    """With the state that is carried on; the next demonstration starts from zero."""
    memory = memory_of(reach=4)
    names = (3, 5, 7, 9)
    play(
        memory, *(rollout_of(n, starts=n == 3, obs_dtype=dtype) for n in names[:3]),
        rollout_of(9, SCORE, obs_dtype=dtype),
    )  # fmt: skip
    (kept,) = kept_by(memory)
    assert kept.obs.dtype == dtype and len(kept.obs) == 3 * (T + 1)
    for turn in range(7):
        read = memory.read(T, state_of(2))
        assert read is not None
        rows = slice(turn % 3 * (T + 1), turn % 3 * (T + 1) + T + 1)
        for column in range(2):
            assert torch.equal(read.obs[:, column], kept.obs[rows])
            assert torch.equal(read.actions[:, column], kept.actions[rows][:T])
            assert torch.equal(read.returns[:, column], kept.returns[rows][:T])
            assert torch.equal(read.episode_start[:, column], kept.episode_start[rows])
            assert bool(read.episode_start[0, column]) == (turn % 3 == 0)
        for found, expected in zip(read[-2:], state_of(2, turn), strict=True):
            assert torch.equal(found, expected)
        memory.carry(evaluation_of(2, turn + 1.0))


@pytest.mark.parametrize("rewards", [(0, 0, 0, 1), (0,) * T])
def test_the_batch_may_be_overwritten(rewards: Sequence[float]) -> None:
    spared, overwritten = memory_of(), memory_of()
    for memory in (spared, overwritten):
        rollout = rollout_of(1, rewards, starts=True)
        play(memory, rollout)
        if memory is overwritten:
            for tensor in tensors_in(rollout):
                tensor.fill_(0)
        play(memory, rollout_of(1, SCORE))  # what was overwritten leads to it
    for one, other in zip(kept_by(spared), kept_by(overwritten), strict=True):
        assert all(map(torch.equal, one, other))


def test_another_number_of_readers_begins_with_other_demonstrations() -> None:
    memory = memory_of()
    play(memory, *(rollout_of(n, starts=n == 1) for n in (1, 2)), rollout_of(3, SCORE))
    for count in (2, 3):
        read = memory.read(T, state_of(count))
        assert read is not None and read.obs.shape[1] == count
        assert read.episode_start[0].all() and not read.lstm_h.any()
        memory.carry(evaluation_of(count, 5.0))


class Blank(gym.Env[np.ndarray, int]):
    """Shows nothing, pays nothing, never ends."""

    observation_space = spaces.Box(0, 1, (2,))
    action_space = spaces.Discrete(T)

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "NeurocoderMlpLstmPolicy", "MlpPolicy"])
def test_windows_begin_with_the_state_that_the_present_weights_make(policy: str) -> None:
    """Whatever the states were when it was played; here the weights stay as they are."""
    model = A3C(
        policy, DummyVecEnv([Blank] * 8), n_steps=T, seed=0, device="cpu", learning_rate=0.0,
        intrinsic_reward="rnd", intrinsic_kwargs={"reach": 4 * T},
    )  # fmt: skip
    assert model.exploration is not None
    memory = model.exploration.memory
    names = [rollout_of(n, starts=n == 0, obs_dtype=torch.float32) for n in range(3)]
    play(memory, *names, rollout_of(3, SCORE, ends=[3], obs_dtype=torch.float32))
    (kept,) = kept_by(memory)
    for turn in range(1, 6):
        model.learn(8 * T)
        rows = slice(0, (turn - 1) % 3 * (T + 1) + T + 1)
        with torch.no_grad():
            _, expected = model.policy.unroll(
                kept.obs[rows, None], model.policy.initial_state(1), kept.episode_start[rows, None]
            )
        assert memory._state is not None
        for found, each in zip(memory._state, expected, strict=True):
            torch.testing.assert_close(found, each.expand_as(found))
            assert found.shape[1] == 2


# Files.


def filed(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def scenes() -> list[Rollout]:
    return [
        *(rollout_of(1, starts=True), rollout_of(2), rollout_of(3, SCORE), rollout_of(4)),
        *(rollout_of(5, SCORE, ends=[3]), rollout_of(6), rollout_of(7, SCORE)),
    ]


@pytest.mark.parametrize("cut", [0, 2, 4, 6])
def test_a_memory_goes_on_where_it_was_saved(cut: int) -> None:
    whole = memory_of()
    play(whole, *scenes()[:cut])
    for turn in range(cut):
        if whole.read(T, state_of(3)) is not None:
            whole.carry(evaluation_of(3, turn, [0.5, 0.25, turn]))
    other = memory_of(seed=9)
    other.load_state_dict(filed(whole.state_dict()))
    assert all(kept.maxlen == 50 for kept in other._kept.values())
    for memory in (whole, other):
        play(memory, *scenes()[cut:])
    assert depths_of(whole) == depths_of(other)
    for count in (3, 3, 20):
        one, two = whole.read(T, state_of(count)), other.read(T, state_of(count))
        assert one is not None and two is not None
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_games_that_do_not_go_on_are_saved_without_what_led_there() -> None:
    memory, other = memory_of(), memory_of()
    memory.games_go_on = False
    play(memory, rollout_of(1, SCORE, starts=True))
    other.load_state_dict(filed(memory.state_dict()))
    play(other, rollout_of(2, SCORE))
    assert [names_of(kept) for kept in kept_by(other)] == [[1], [2]]
    assert depths_of(other) == {1: 2}


def test_a_saved_memory_holds_no_more_than_is_kept() -> None:
    memory = memory_of()
    play(memory, *scenes())
    memory.read(T, state_of(3))
    packed = [each for kept in memory.state_dict()["kept"].values() for each in kept]
    assert packed
    for tensor in (tensor for each in packed for tensor in each["others"]):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "not those of the rollouts"


DAMAGES: dict[str, Any] = {
    "nothing": lambda s: s.clear(),
    "no generator": lambda s: s.pop("generator"),
    "generator of another size": lambda s: s.update(generator=s["generator"][:5]),
    "kept a list": lambda s: s.update(kept=[1]),
    "a depth that is none": lambda s: s.update(kept={"deep": []}),
    "no rollout": lambda s: s["kept"][1].append(5),
    "garbage": lambda s: s["kept"][1][0].update(obs=torch.arange(20, dtype=torch.uint8)),
    "cut off": lambda s: s["kept"][1][0].update(obs=s["kept"][1][0]["obs"][:-9]),
    "longer": lambda s: s["kept"][1][0].update(shape=[99, 2]),
    "too long to hold": lambda s: s["kept"][1][0].update(shape=[2**40, 1, 2]),
    "a negative size": lambda s: s["kept"][1][0].update(shape=[-T, 1, 2]),
    "a tensor less": lambda s: s["kept"][1][0]["others"].pop(),
    "no state": lambda s: s.pop("lstm_state"),
    "a state of one part": lambda s: s.update(lstm_state=[torch.zeros(1, 3, 3)]),
    "a reader of nothing": lambda s: s["readers"].append((5, 1, 0)),
    "a reader without its row": lambda s: s["readers"].append(s["readers"][0][:2]),
    "a surplus below 0": lambda s: s.update(surplus={1: (5, -0.5)}),
    "a surplus without its windows": lambda s: s.update(surplus={1: 0.5}),
    "a negative number of windows": lambda s: s.update(surplus={1: (-1, 0.5)}),
    "a surplus that is no number": lambda s: s.update(surplus={1: (5, float("nan"))}),
    "damaged recent": lambda s: s["recent"][0][0].update(obs=torch.zeros(3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_in_one_line(damage: str) -> None:
    memory = memory_of()
    play(memory, *scenes())
    memory.read(T, state_of(3))
    state = filed(memory.state_dict())
    DAMAGES[damage](state)
    with pytest.raises(ValueError, match="kept demonstrations") as error:
        memory_of().load_state_dict(state)
    assert "\n" not in str(error.value)


class Unread(list):
    def __iter__(self) -> Any:
        raise AssertionError("read")


def test_nothing_else_of_a_file_is_read() -> None:
    """A list that holds one list twice, and so on, takes few bytes and all time to walk through."""
    memory = memory_of()
    play(memory, *scenes())
    state = filed(memory.state_dict()) | {"more": Unread([1])}
    other = memory_of()
    other.load_state_dict(state)
    assert depths_of(other) == depths_of(memory)


# The loss.


def test_imitation_loss_value_and_gradient_by_hand() -> None:
    """R - V = (1, -1, 0 left out, 3); d/dlog p = -(R - V)+ / N; no other gradient."""
    log_probs = torch.tensor([[-0.5], [-1.0], [-2.0], [-0.1]], requires_grad=True)
    values = torch.tensor([[1.0], [2.0], [-7.0], [1.0]], requires_grad=True)
    returns = torch.tensor([[2.0], [1.0], [0.0], [4.0]], requires_grad=True)
    loss = imitation_loss(log_probs, imitation_surplus(values, returns))
    assert loss.item() == pytest.approx((0.5 * 1 + 0.1 * 3) / 4)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[:, 0].tolist() == pytest.approx([-0.25, 0, 0, -0.75])
    assert values.grad is None and returns.grad is None


def test_imitation_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match="returns has shape"):
        imitation_surplus(torch.zeros(5, 3), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="log_probs has shape"):
        imitation_loss(torch.zeros(5, 3, 1), torch.zeros(5, 3))
