"""Rollouts that led to a score: what is kept, what is drawn, and how it goes on from a file."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ncrl.agents.learning.imitation import MAX_DEPTH, RolloutMemory, returns_to_last_score
from ncrl.agents.learning.losses import imitation_loss
from ncrl.agents.playing.buffers import Rollout

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


def test_returns_to_the_last_score_are_sums_over_the_rest_of_the_game() -> None:
    rewards = [0.0, 0.0, 1.0, 0.0, 0.0, -0.5, 2.0, 0.0, 0.0]
    dones = [False, False, False, False, True, False, False, False, False]
    found = returns_to_last_score(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(dones), 0.9
    )
    assert found.tolist() == pytest.approx(returns_reference(rewards, dones, 0.9))
    assert found.tolist()[3:5] == [0, 0] and found.tolist()[7:] == [0, 0]


def rollout_of(
    name: float,
    rewards: Sequence[float] = (0,) * T,
    ends: Sequence[int] = (),
    *,
    starts: bool = False,
    obs_dtype: torch.dtype = torch.uint8,
) -> Rollout:
    """Of one environment; `name` is in every observation, and the actions count."""
    dones = torch.zeros(T, 1, dtype=torch.bool)
    dones[list(ends)] = True
    return Rollout(
        obs=torch.full((T + 1, 1, 2), name, dtype=obs_dtype),
        episode_start=torch.cat([torch.full((1, 1), starts), dones]),
        actions=torch.arange(T)[:, None],
        log_prob=torch.full((T, 1), -float(name)),
        rewards=torch.tensor(rewards, dtype=torch.float32)[:, None],
        dones=dones,
        truncation_value=torch.zeros(T, 1),
        lstm_h=torch.full((1, 1, 3), float(name)),
        lstm_c=torch.full((1, 1, 3), -float(name)),
    )


def side_by_side(*rollouts: Rollout) -> Rollout:
    return Rollout(*(torch.cat(tensors, 1) for tensors in zip(*rollouts, strict=True)))


def memory_of(**options: Any) -> RolloutMemory:
    defaults: dict[str, Any] = {"gamma": 0.5, "reach": 3, "capacity": 50, "seed": 0}
    return RolloutMemory(**(defaults | options))


def play(memory: RolloutMemory, *rollouts: Rollout, game: int = 0) -> None:
    for rollout in rollouts:
        memory.watch(rollout, [game], rollout.rewards)


def kept_by(memory: RolloutMemory) -> dict[float, Tensor]:
    """Returns [T] by the name of the rollout; drawn until all are seen."""
    drawn = memory.draw(300)
    if drawn is None:
        return {}
    names = drawn.rollout.obs[0, :, 0].tolist()  # type: ignore[index]
    return dict(zip(names, drawn.returns.T, strict=True))


SCORE = (0, 0, 1, 0)


def test_only_what_led_to_a_score_is_kept_and_with_its_returns() -> None:
    memory = memory_of(reach=3)
    play(memory, rollout_of(1, starts=True), rollout_of(2), rollout_of(3), rollout_of(4, SCORE))
    kept = kept_by(memory)
    assert sorted(kept) == [2, 3, 4], "the one before the last three is out of reach"
    assert kept[4].tolist() == [0.25, 0.5, 1, 0]
    assert kept[3].tolist() == [0.25 / 2**k for k in (4, 3, 2, 1)]
    assert kept[2].tolist() == [0.25 / 2**k for k in (8, 7, 6, 5)]
    play(memory, rollout_of(5), rollout_of(6))
    assert len(memory) == 3, "nothing was reached since"


def test_nothing_is_kept_without_a_score_or_for_a_loss() -> None:
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2, (0, -1, 0, 0)))
    assert memory.draw(3) is None and len(memory) == 0


def test_what_an_end_of_a_game_separates_from_the_score_did_not_lead_to_it() -> None:
    memory = memory_of()
    ended = rollout_of(2, ends=[1])
    play(memory, rollout_of(1, starts=True), ended, rollout_of(3, SCORE))
    kept = kept_by(memory)
    assert sorted(kept) == [2, 3]
    assert kept[2].tolist() == [0, 0, 0.25 / 2**2, 0.25 / 2]


def test_an_end_in_the_rollout_of_the_score() -> None:
    """Scores, ends, and goes on: what comes after belongs to another game."""
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2, SCORE, ends=[2]), rollout_of(3))
    assert kept_by(memory)[2].tolist() == [0.25, 0.5, 1, 0]
    assert sorted(kept_by(memory)) == [1, 2]
    # Ends, and then scores.
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2, SCORE, ends=[0]))
    assert sorted(kept_by(memory)) == [2]
    assert kept_by(memory)[2].tolist() == [0, 0.5, 1, 0]


def test_games_that_start_anew_lead_to_nothing() -> None:
    """A worker that died ends no game: its next rollout begins with another."""
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2))
    play(memory, rollout_of(3, starts=True), rollout_of(4, SCORE))
    assert sorted(kept_by(memory)) == [3, 4]
    memory = memory_of()
    play(memory, rollout_of(1, starts=True), rollout_of(2))
    memory.forget_recent()
    play(memory, rollout_of(3), rollout_of(4, SCORE))
    assert sorted(kept_by(memory)) == [3, 4]


def test_columns_are_told_apart_by_their_game_and_one_game_may_come_twice() -> None:
    memory = memory_of()
    first = side_by_side(rollout_of(1, starts=True), rollout_of(2, starts=True))
    memory.watch(first, [7, 5], first.rewards)
    second = side_by_side(rollout_of(3), rollout_of(4, SCORE))  # both of game 5, in this order
    memory.watch(second, [5, 5], second.rewards)
    assert sorted(kept_by(memory)) == [2, 3, 4]


def test_rewards_are_those_of_the_loss() -> None:
    memory = memory_of()
    rollout = rollout_of(1, (0, 0, 500, 0), starts=True)
    memory.watch(rollout, [0], rollout.rewards.clamp(max=1))
    drawn = memory.draw(1)
    assert drawn is not None
    assert drawn.returns[:, 0].tolist() == [0.25, 0.5, 1, 0]
    assert drawn.rollout.rewards.max() == 1


def depths_of(memory: RolloutMemory) -> dict[int, int]:
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
    for name in range(5, 5 + MAX_DEPTH):
        play(memory, rollout_of(name, (1, 1, 1, 1)))
    assert max(depths_of(memory)) == MAX_DEPTH


def test_what_is_kept_is_bounded_by_depth_and_the_oldest_makes_room() -> None:
    memory = memory_of(reach=1, capacity=3)
    for name in range(10):
        play(memory, rollout_of(name, SCORE, starts=True))
    play(memory, rollout_of(10, SCORE))
    assert depths_of(memory) == {1: 3, 2: 1}
    assert sorted(kept_by(memory)) == [7, 8, 9, 10]


def test_depths_are_drawn_equally_often() -> None:
    memory = memory_of(reach=1)
    for name in range(20):
        play(memory, rollout_of(name, SCORE, starts=True))
    play(memory, rollout_of(99, SCORE))
    drawn = memory.draw(400)
    assert drawn is not None
    deep = (drawn.rollout.obs[0, :, 0] == 99).sum()  # type: ignore[index]
    assert 150 < deep < 250, "one of the 21, but one of two depths"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_what_is_drawn_is_what_was_played(dtype: torch.dtype) -> None:
    memory = memory_of(reach=2)
    played = [
        rollout_of(3, starts=True, obs_dtype=dtype), rollout_of(5, SCORE, obs_dtype=dtype)
    ]  # fmt: skip
    play(memory, *played)
    drawn = memory.draw(8)
    assert drawn is not None and drawn.returns.shape == (T, 8)
    for column in range(8):
        name = int(drawn.rollout.obs[0, column, 0])  # type: ignore[index]
        original = played[[3, 5].index(name)]
        for one, other in zip(drawn.rollout.tensors(), original.tensors(), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one[:, column : column + 1], other)


@pytest.mark.parametrize("rewards", [SCORE, (0,) * T])
def test_the_batch_may_be_overwritten(rewards: Sequence[float]) -> None:
    memory = memory_of()
    rollout = rollout_of(1, rewards, starts=True)
    play(memory, rollout)
    for tensor in rollout.tensors():
        tensor.fill_(0)
    if rewards != SCORE:  # it leads to one
        play(memory, rollout_of(1, SCORE))
    drawn = memory.draw(10)
    assert drawn is not None and (drawn.rollout.obs == 1).all()  # type: ignore[union-attr]
    assert drawn.rollout.log_prob.eq(-1).all()


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
    whole.draw(3)
    other = memory_of(seed=9)
    other.load_state_dict(filed(whole.state_dict()))
    assert all(kept.maxlen == 50 for kept in other._kept.values())
    for memory in (whole, other):
        play(memory, *scenes()[cut:])
    assert depths_of(whole) == depths_of(other)
    one, two = whole.draw(20), other.draw(20)
    assert one is not None and two is not None
    pairs = zip([*one.rollout, one.returns], [*two.rollout, two.returns], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


DAMAGES: dict[str, Any] = {
    "nothing": lambda s: s.clear(),
    "no generator": lambda s: s.pop("generator"),
    "generator of another size": lambda s: s.update(generator=s["generator"][:5]),
    "kept a list": lambda s: s.update(kept=[1]),
    "a depth that is none": lambda s: s.update(kept={"deep": []}),
    "no rollout": lambda s: s["kept"][1].append(5),
    "garbage": lambda s: s["kept"][1][0].update(obs=torch.arange(20, dtype=torch.uint8)),
    "cut off": lambda s: s["kept"][1][0].update(obs=s["kept"][1][0]["obs"][:-9]),
    "longer": lambda s: s["kept"][1][0].update(shape=[T + 2, 1, 2]),
    "too long to hold": lambda s: s["kept"][1][0].update(shape=[2**40, 1, 2]),
    "a negative size": lambda s: s["kept"][1][0].update(shape=[-T, 1, 2]),
    "a tensor less": lambda s: s["kept"][1][0]["others"].pop(),
    "damaged recent": lambda s: s["recent"][0][0].update(obs=torch.zeros(3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_in_one_line(damage: str) -> None:
    memory = memory_of()
    play(memory, *scenes())
    state = filed(memory.state_dict())
    DAMAGES[damage](state)
    with pytest.raises(ValueError, match="kept rollouts") as error:
        memory_of().load_state_dict(state)
    assert "\n" not in str(error.value)


# The loss.


def test_imitation_loss_value_and_gradient_by_hand() -> None:
    """R - V = (1, -1, 0 left out, 3); d/dlog p = -(R - V)+ / N, and values are constants."""
    log_probs = torch.tensor([[-0.5], [-1.0], [-2.0], [-0.1]], requires_grad=True)
    values = torch.tensor([[1.0], [2.0], [-7.0], [1.0]], requires_grad=True)
    returns = torch.tensor([[2.0], [1.0], [0.0], [4.0]], requires_grad=True)
    loss = imitation_loss(log_probs, values, returns)
    assert loss.item() == pytest.approx((0.5 * 1 + 0.1 * 3) / 4)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[:, 0].tolist() == pytest.approx([-0.25, 0, 0, -0.75])
    assert values.grad is None


def test_imitation_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match="returns has shape"):
        imitation_loss(torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="log_probs has shape"):
        imitation_loss(torch.zeros(5, 3, 1), torch.zeros(5, 3), torch.zeros(5, 3))
