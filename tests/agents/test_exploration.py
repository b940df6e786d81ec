"""Exploration in the learner: scale of the bonus, the loss, what is saved, and that it works."""

import io
import math
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.logger import KVWriter, Logger
from torch import Tensor

from ncrl.agents import A3C, IntrinsicReward, NonFiniteError
from ncrl.agents.learning.exploration import (
    Exploration,
    RunningScale,
    discounted_sums,
    make_exploration,
)
from ncrl.agents.learning.imitation import Kept, KeptEvaluation
from ncrl.agents.learning.intrinsic import RND
from ncrl.agents.learning.losses import imitation_loss, imitation_surplus
from ncrl.agents.learning.objective import Bonus, Lesson, actor_critic_loss
from ncrl.agents.learning.update import Measured, apply_gradient, update_on_device
from ncrl.agents.playing.buffers import Batch, Rollout
from ncrl.agents.playing.players import WorkersPlayer
from ncrl.agents.playing.supervision import Delivery, Limits, PoolSpec
from ncrl.agents.playing.worker import Played
from ncrl.agents.runs.checkpoints import (
    CheckpointError,
    newest_checkpoint,
    resume,
    save_checkpoint,
)
from ncrl.envs import key_and_door
from ncrl.sb3 import Latent
from ncrl.sb3.engine import map_tensors
from ncrl.shell.tensors import tensors_in
from tests.agents.conftest import assert_bit_equal, normal
from tests.agents.environments import TickingFactory
from tests.agents.test_checkpoints import SaveAt, difference, everything, flat
from tests.reference import vtrace_reference

SHORT = key_and_door(length=3, max_steps=12)
"""Chance opens the door in about every third episode."""

EAGER = {"warmup_timesteps": 0}


def make_model(env: Any = None, policy: str = "MlpLstmPolicy", **options: Any) -> A3C:
    defaults: dict[str, Any] = {
        "n_workers": 0, "n_envs": 4, "n_steps": 5, "seed": 1, "intrinsic_reward": "rnd",
        "intrinsic_kwargs": EAGER,
    }  # fmt: skip
    if "Lstm" in policy:
        defaults["policy_kwargs"] = {"lstm_hidden_size": 8}
    return A3C(policy, env or SHORT, device="cpu", **(defaults | options))


def exploration_of(model: A3C) -> Exploration:
    assert model.exploration is not None
    return model.exploration


# The scale.


def test_discounted_sums_are_sums_over_the_past() -> None:
    rewards = normal(6, 2).double()
    found = discounted_sums(rewards, 0.7)
    for t in range(6):
        for b in range(2):
            expected = sum(0.7 ** (t - k) * rewards[k, b].item() for k in range(t + 1))
            assert found[t, b].item() == pytest.approx(expected)


@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_returns_of_normalised_bonuses_have_deviation_1(gamma: float) -> None:
    """Of a stream whose bonuses persist and lie far from 0; when they shrink, so do these."""
    scale = RunningScale(gamma)
    noise = normal(500, 20, 16).cumsum(1) * 0.2 + 3
    found = []
    for bonus in noise * torch.where(torch.arange(500) > 400, 0.1, 1)[:, None, None]:
        scale.update(bonus)
        found.append(discounted_sums(scale.normalise(bonus), gamma).square().mean().sqrt())
    # Later the mean of the bonus lags a little.
    assert found[0].item() == pytest.approx(1, rel=1e-3)
    assert torch.stack(found[300:400]).mean().item() == pytest.approx(1, abs=0.15)
    assert torch.stack(found[450:]).mean().item() == pytest.approx(0.1, abs=0.03)


def test_the_deviation_is_of_all_that_was_seen() -> None:
    scale = RunningScale(0.9)
    batches = [normal(5, 4, seed=seed) * (1 + seed) for seed in range(4)]
    mean, squares = 0.0, []
    for i, batch in enumerate(batches):
        share = 1.0 if i == 0 else 20 / 1000
        mean += share * (batch.mean().item() - mean)
        sums = discounted_sums(batch.double() - mean, 0.9)
        squares.append(sums.square().mean().item())
        scale.update(batch)
    deviation = math.sqrt(np.mean(squares))
    assert scale.deviation.item() == pytest.approx(deviation, rel=1e-5)
    torch.testing.assert_close(scale.normalise(batches[0]), (batches[0] - mean) / deviation)


def test_a_burst_of_bonuses_is_divided_by_its_own_deviation() -> None:
    """After long play a tenth of the games get bonuses twenty times as large for long."""
    scale = RunningScale(0.9)
    noise = normal(700, 20, 20)
    noise[500:600, :, :2] *= 20
    found = []
    for bonus in noise:
        scale.update(bonus)
        found.append(discounted_sums(scale.normalise(bonus), 0.9).square().mean().sqrt().item())
    assert np.mean(found[400:500]) == pytest.approx(1, abs=0.1)
    assert np.mean(found[560:600]) == pytest.approx(1, abs=0.2), "6 without"
    all_play = math.sqrt(scale.square.item())
    assert scale.deviation.item() == pytest.approx(all_play, rel=1e-3), "it is over"


@pytest.mark.parametrize("constant", [0.0, 0.3, 1e-3, 100.0])
def test_a_constant_bonus_is_none(constant: float) -> None:
    scale = RunningScale(0.99)
    bonus = torch.full((20, 16), constant)
    for _ in range(10):
        scale.update(bonus)
        assert scale.normalise(bonus).abs().max() < 1e-2


def explored(
    source: str | IntrinsicReward = "rnd", *, seed: int = 0, **options: Any
) -> Exploration:
    arguments = {"n_steps": 5, "int_gamma": 0.99, "gamma": 0.9, "seed": seed}
    return make_exploration(source, SHORT.observation_space, n_envs=4, options=options, **arguments)


def random_batch(seed: int, steps: int = 5) -> Rollout:
    zeros, no = torch.zeros(steps, 4), torch.zeros(steps, 4, dtype=torch.bool)
    return Rollout(
        obs=normal(steps + 1, 4, 4, seed=seed), episode_start=torch.cat([no, no[:1]]),
        actions=zeros.long(), log_prob=zeros, rewards=zeros, truncation_value=zeros,
        lstm_h=torch.zeros(0, 4, 0), lstm_c=torch.zeros(0, 4, 0),
    )  # fmt: skip


def test_while_it_warms_up_statistics_move_and_nothing_else() -> None:
    """Half of it the inputs' alone, then the bonus's too; 20 timesteps a batch. Then a timestep is
    rewarded for what it led to."""
    torch.manual_seed(0)
    exploration = explored(warmup_timesteps=80)
    source = exploration.source
    assert isinstance(source, RND)
    predictor = [weight.clone() for weight in source.predictor.parameters()]
    for i in range(4):
        rewards, scalars = exploration.intrinsic_rewards(random_batch(i))
        assert rewards is None and scalars == {}
        assert exploration.learn(random_batch(i)) == {}
        assert source.moments.count == 20 * (i + 1)
        assert bool(exploration.scale.weight > 0) == (i >= 2)
    assert all(map(torch.equal, predictor, source.predictor.parameters()))
    rewards, scalars = exploration.intrinsic_rewards(random_batch(5))
    assert rewards is not None and torch.isfinite(rewards).all()
    bonus = torch.stack([source.score(obs) for obs in random_batch(5).obs[1:]])  # type: ignore[index]
    expected = {
        "int_reward_raw": bonus.mean(), "int_reward": rewards.mean(),
        "int_reward_max": rewards.max(), "int_return_std": exploration.scale.deviation,
    }  # fmt: skip
    torch.testing.assert_close(scalars, expected)
    torch.testing.assert_close(rewards, exploration.scale.normalise(bonus))
    assert "predictor_loss" in exploration.learn(random_batch(5))
    assert not all(map(torch.equal, predictor, source.predictor.parameters()))


def test_a_count_learns_from_the_first_timestep_on() -> None:
    exploration = explored("count", warmup_timesteps=80)
    for i in range(1, 4):
        exploration.intrinsic_rewards(random_batch(i))
        exploration.learn(random_batch(i))
        assert exploration.source.counts[0].sum() == 20 * i  # type: ignore[index,union-attr]


class Watched(IntrinsicReward):
    """Writes down what it is told, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, Any]] = []

    def score(self, obs: Tensor) -> Tensor:
        return torch.zeros(len(obs))

    def learn(self, obs: Tensor, next_obs: Tensor) -> dict[str, Tensor]:
        self.told.append(("learn", (obs, next_obs)))
        return {}

    def watch(self, obs: Tensor) -> None:
        self.told.append(("watch", obs))


def test_a_source_learns_from_inputs_standardised_as_they_were_scored() -> None:
    """So it is shown what was scored only after it has learnt from all parts of the batch."""
    source = Watched()
    exploration = explored(source)
    batch = random_batch(0, 640)  # two steps of the source
    exploration.learn(batch)
    assert [name for name, _ in source.told] == ["learn", "learn", "watch", "watch"]
    seen = torch.cat([obs for name, obs in source.told if name == "watch"])
    assert torch.equal(seen, batch.obs[1:].flatten(0, 1))  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_a_source_may_score_in_any_type(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "score", lambda _, obs: torch.ones(len(obs), dtype=dtype))
    exploration = explored(Watched(), warmup_timesteps=0)
    for i in range(2):
        rewards, _ = exploration.intrinsic_rewards(random_batch(i))
        assert rewards is not None and rewards.dtype == torch.float32


def test_demonstrations_are_as_long_and_as_many_as_asked() -> None:
    """12 timesteps take three rollouts of 5, and 100 timesteps are nine demonstrations of 12."""
    memory = explored(reach=12, capacity=100).memory
    assert (memory.reach, memory.capacity) == (3, 9)
    assert memory.gamma == 0.9, "the discount of the game's own rewards"
    assert explored().scale.gamma == 0.99, "that of the bonus"
    draws = set()
    for seed in (0, 0, 1):
        generator = explored(seed=seed).memory.generator
        draws.add(float(torch.rand((), generator=generator)))
    assert len(draws) == 2


def test_the_latest_deviation_is_of_ten_thousand_timesteps() -> None:
    scale = RunningScale(0.9)
    scale.update(normal(20, 50))
    before = scale.latest.item()
    bonus = normal(20, 50, seed=1) * 3
    scale.update(bonus)
    square = discounted_sums(scale.centred(bonus), 0.9).square().mean().item()
    assert scale.latest.item() == pytest.approx(before + 0.1 * (square - before), rel=1e-4)


def test_a_batch_longer_than_what_is_averaged_over_takes_its_place() -> None:
    scale = RunningScale(0.9)
    for seed in range(2):
        bonus = normal(40, 300, seed=seed) * (1 + seed) + 5 * seed
        scale.update(bonus)
        assert scale.mean.item() == pytest.approx(bonus.mean().item(), abs=1e-6)
        square = discounted_sums(bonus - bonus.mean(), 0.9).square().mean().item()
        assert scale.latest.item() == pytest.approx(square, rel=1e-4)


def test_advantages_are_divided_by_the_deviation_of_all_updates() -> None:
    exploration = explored()
    assert exploration.advantage_deviation == 0
    for deviation, squares in ((3.0, 9), (5.0, 9 + 25), (0.5, 9 + 25 + 0.25)):
        exploration.observe_advantages(deviation)
        expected = math.sqrt(squares / exploration.num_updates)
        assert exploration.advantage_deviation == pytest.approx(expected)
    assert exploration.num_updates == 3


@pytest.mark.parametrize(("n_envs", "stride"), [(32, 1), (33, 2), (240, 2)])
def test_the_predictor_learns_from_half_of_the_timesteps_of_many_games(
    n_envs: int, stride: int
) -> None:
    arguments = {"n_steps": 5, "int_gamma": 0.99, "gamma": 0.9, "seed": 0}
    for options, expected in (({}, stride), ({"update_proportion": 1.0}, 1)):
        exploration = make_exploration(
            "rnd", SHORT.observation_space, n_envs=n_envs, options=options, **arguments
        )
        assert isinstance(exploration.source, RND)
        assert exploration.source.stride == expected


@pytest.mark.parametrize(("rows", "steps"), [(5, 1), (639, 1), (640, 2), (1000, 3)])
def test_the_source_steps_once_in_1280_timesteps_of_large_batches(rows: int, steps: int) -> None:
    exploration = explored()
    exploration.num_timesteps = exploration.warmup_timesteps + 1
    learnt = []
    exploration.source.learn = lambda *parts: learnt.append(parts) or {}  # type: ignore[method-assign]
    batch = random_batch(0, rows)
    exploration.learn(batch)
    assert len(learnt) == steps
    for found, whole in zip(zip(*learnt), (batch.obs[:-1], batch.obs[1:])):  # noqa: B905
        assert torch.equal(torch.cat(found), whole.flatten(0, 1))


# The loss.


class Scene:
    """A batch played by other weights, in which games end, and a model to learn from it."""

    def __init__(self, head: str = "linear", policy: str = "MlpLstmPolicy") -> None:
        memory = {"lstm_hidden_size": 8} if "Lstm" in policy else {}
        self.model = make_model(
            policy=policy, policy_kwargs={"head": head, **memory}, n_steps=8,
            int_coef=0.7, ext_coef=1.5, imitation_coef=0.3, int_gamma=0.8, gamma=0.95,
            gae_lambda=0.9,
        ).learn(32 * 4)  # fmt: skip
        assert self.model._batch is not None
        batch = self.model._batch.rollout
        ends = torch.rand(8, 4, generator=torch.Generator().manual_seed(3)) < 0.3
        self.batch = batch._replace(
            episode_start=torch.cat([batch.episode_start[:1], ends]),
            log_prob=batch.log_prob + 0.3 * normal(8, 4),
            rewards=normal(8, 4, seed=1),
            truncation_value=torch.where(ends, normal(8, 4, seed=4), 0.0),
        )
        self.objective = replace(self.model._objective(), reward_scale=2.0, reward_clip=0.9)
        self.bonus = Bonus(normal(8, 4, seed=2), torch.tensor(0.0))

    def kept(self) -> Kept:
        """Windows of three demonstrations."""
        again = map_tensors(lambda tensor: tensor[:, [2, 0, 2]].clone(), self.batch)
        return Kept(
            normal(9, 3, 4, seed=7), again.episode_start, again.actions,
            normal(8, 3, seed=8).abs(), again.lstm_h, again.lstm_c,
        )  # fmt: skip

    def loss(self, batch: Rollout | None = None, **options: Any) -> Any:
        arguments = {"bonus": self.bonus, "kept": None} | options
        lesson = Lesson(batch or self.batch, **arguments)
        return actor_critic_loss(self.model.policy, lesson, self.objective)

    def reference(self, discounts: Tensor, rewards: Tensor, values: Tensor) -> Any:
        log_rhos = self.loss().evaluation.log_prob.detach() - self.batch.log_prob
        arrays = (log_rhos, discounts, rewards, values[:-1].detach(), values[-1].detach())
        return vtrace_reference(*(array.double() for array in arrays), gae_lambda=0.9)

    def references(self, evaluation: Any) -> tuple[Any, Any]:
        """Returns and advantages of the game's rewards, and of the bonus."""
        rewards = (2 * self.batch.rewards).clamp(-0.9, 0.9) + 0.95 * self.batch.truncation_value
        discounts = 0.95 * (~self.batch.episode_start[1:]).double()
        return (
            self.reference(discounts, rewards, evaluation.values),
            self.reference(torch.full((8, 4), 0.8), self.bonus.rewards, evaluation.int_values),
        )


@pytest.mark.parametrize("known", [0.0, 0.25, 25.0])
def test_the_loss_adds_weighted_advantages_and_a_second_value(known: float) -> None:
    scene = Scene()
    scene.bonus = scene.bonus._replace(advantage_deviation=torch.tensor(known))
    loss = scene.loss()
    evaluation = loss.evaluation
    (returns, advantages), (int_returns, int_advantages) = scene.references(evaluation)
    deviation = int_advantages.std(correction=0).item()
    centred = int_advantages - int_advantages.mean()
    total = 1.5 * advantages + 0.7 * centred / max(known, deviation)
    policy = -(evaluation.log_prob.double() * total).mean().item()
    value = (evaluation.values[:-1] - returns).square().mean().item()
    int_value = (evaluation.int_values[:-1] - int_returns).square().mean().item()
    assert loss.scalars["policy_loss"].item() == pytest.approx(policy, rel=1e-4)
    assert loss.scalars["value_loss"].item() == pytest.approx(value, rel=1e-4)
    assert loss.scalars["int_value_loss"].item() == pytest.approx(int_value, rel=1e-4)
    assert loss.scalars["int_advantage_std"].item() == pytest.approx(deviation, rel=1e-4)
    for name, target, values in (
        ("explained_variance", returns, evaluation.values[:-1].double()),
        ("int_explained_variance", int_returns, evaluation.int_values[:-1].double()),
    ):
        explained = 1 - (target - values).var(correction=0) / target.var(correction=0)
        assert loss.scalars[name].item() == pytest.approx(explained.item(), rel=1e-3, abs=1e-4)
    int_value_mean = evaluation.int_values[:-1].mean().item()
    assert loss.scalars["int_value"].item() == pytest.approx(int_value_mean, rel=1e-4)
    entropy = evaluation.entropy.mean().item()
    expected = 32 * (policy + 0.5 * (value + int_value) - scene.objective.ent_coef * entropy)
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)


def test_values_learn_from_the_value_losses_alone() -> None:
    """No gradient reaches the critic through advantages, those of the bonus included."""
    scene = Scene()
    scene.objective = replace(scene.objective, vf_coef=0.0)
    policy = scene.model.policy
    policy.optimizer.zero_grad()
    scene.loss().total.backward()
    heads = {"value": policy.value_net, "bonus": policy.value_net_int, "actor": policy.action_net}
    reached = {
        name: any(p.grad is not None and p.grad.any() for p in head.parameters())
        for name, head in heads.items()
    }
    assert reached == {"value": False, "bonus": False, "actor": True}


def test_the_games_advantages_are_standardised_before_the_bonus_is_added() -> None:
    scene = Scene()
    plain = scene.loss()
    scene.objective = replace(scene.objective, normalize_advantage=True)
    loss = scene.loss()
    (_, advantages), (_, bonus) = scene.references(loss.evaluation)
    total = 1.5 * (advantages - advantages.mean()) / advantages.std()
    total += 0.7 * (bonus - bonus.mean()) / bonus.std(correction=0)
    policy = -(loss.evaluation.log_prob.double() * total).mean().item()
    assert loss.scalars["policy_loss"].item() == pytest.approx(policy, rel=1e-4, abs=1e-6)
    logged = [found.scalars["ext_advantage_std"].item() for found in (plain, loss)]
    assert logged == pytest.approx([advantages.std(correction=0).item()] * 2, rel=1e-4)


def test_a_floor_adds_the_squared_distance_below_it() -> None:
    scene = Scene()
    before = scene.loss().total.item()
    entropy = scene.loss().evaluation.entropy.mean().item()
    high = entropy + 0.5
    for floor, below in ((high, high * math.log(high / entropy)), (entropy - 0.01, 0.0)):
        scene.objective = replace(scene.objective, entropy_floor=floor)
        total = scene.loss().total.item()
        assert total - before == pytest.approx(32 * 0.1 * below**2, abs=1e-4)


def test_without_correction_nothing_depends_on_what_the_other_weights_thought() -> None:
    scene = Scene()
    younger = scene.batch._replace(log_prob=scene.batch.log_prob - 0.5)
    first, other = (scene.loss(b).scalars["value_loss"].item() for b in (scene.batch, younger))
    assert first != pytest.approx(other, rel=1e-3)
    scene.objective = replace(scene.objective, correction="none")
    assert torch.equal(scene.loss(younger).total, scene.loss().total)


def test_the_intrinsic_return_crosses_the_end_of_a_game_and_the_other_does_not() -> None:
    scene = Scene(policy="MlpPolicy")  # an LSTM would forget where a game ends
    starts = scene.batch.episode_start
    cut, uncut = (
        scene.loss(scene.batch._replace(episode_start=torch.full_like(starts, ends)))
        for ends in (True, False)
    )
    for name in ("int_value_loss", "int_advantage_std"):
        assert torch.equal(cut.scalars[name], uncut.scalars[name])
    for name in ("value_loss", "policy_loss"):
        expected = pytest.approx(uncut.scalars[name].item(), rel=1e-3)
        assert cut.scalars[name].item() != expected


def test_no_gradient_reaches_the_source_of_the_bonus() -> None:
    scene = Scene()
    rewards = scene.bonus.rewards.clone().requires_grad_()
    deviation = torch.tensor(0.5, requires_grad=True)
    scene.loss(bonus=Bonus(rewards, deviation)).total.backward()
    assert rewards.grad is None and deviation.grad is None
    source = exploration_of(scene.model).source
    assert isinstance(source, RND)
    assert not source.score(scene.batch.obs[0]).requires_grad  # type: ignore[index]
    assert all(p.grad is not None for p in scene.model.policy.value_net_int.parameters())


@pytest.mark.parametrize("head", ["linear", "neurocoder"])
def test_kept_demonstrations_change_none_of_the_terms_of_the_batch(head: str) -> None:
    scene = Scene(head)
    kept = scene.kept()
    alone, beside = scene.loss(), scene.loss(kept=kept)
    for name, value in alone.scalars.items():
        torch.testing.assert_close(beside.scalars[name], value)
    torch.testing.assert_close(alone.evaluation.values, beside.evaluation.values)
    assert beside.evaluation.latent.actor.shape == alone.evaluation.latent.actor.shape

    evaluation = scene.model.policy.evaluate_rollout(
        kept.obs, kept.actions, (kept.lstm_h, kept.lstm_c), kept.episode_start
    )
    surplus = imitation_surplus(evaluation.values[:-1], kept.returns)
    assert beside.kept is not None
    torch.testing.assert_close(beside.kept, KeptEvaluation(evaluation.lstm_state, surplus.mean(0)))
    assert not any(tensor.requires_grad for tensor in tensors_in(beside.kept))
    loss = imitation_loss(evaluation.log_prob, surplus)
    assert loss > 0
    added = 0.3 * 24 * loss  # a sum over the 24 kept timesteps
    assert (beside.total - alone.total).item() == pytest.approx(added.item(), rel=1e-3)


@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_an_update_on_the_device_learns_from_the_bonus_and_from_what_was_kept(limit: float) -> None:
    eager, other = Scene(), Scene()
    kept = eager.kept()
    for scene in (eager, other):
        scene.model.policy.optimizer.param_groups[0]["lr"] = 0.01
    loss = eager.loss(kept=kept)
    policy = eager.model.policy
    update = apply_gradient(policy, loss, limit)
    policy = other.model.policy
    lesson = Lesson(other.batch, other.bonus, kept)
    measured = update_on_device(policy, lesson, other.objective, limit)
    assert measured.on_host().scalars == pytest.approx(update.scalars, rel=1e-4, abs=1e-5)
    assert measured.kept is not None
    torch.testing.assert_close(measured.kept, loss.kept)
    for mine, theirs in zip(policy.parameters(), eager.model.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_an_update_that_was_not_made_leaves_exploration_as_it_was() -> None:
    scene = Scene()
    learner, exploration = scene.model.learner, exploration_of(scene.model)
    kept = Kept(*(part[:, :1] for part in scene.kept()))  # one is read at a time

    def known() -> dict[str, Any]:
        memory = exploration.memory.state_dict()
        return flat(
            {
                "advantages": (exploration.advantage_deviation, exploration.num_updates),
                "carried": (memory["lstm_state"], memory["surplus"]),
            }
        )

    before = known()
    for value in (float("nan"), 1.0):
        bonus = scene.bonus._replace(rewards=value * scene.bonus.rewards)
        update = learner.update(Lesson(scene.batch, bonus, kept), scene.objective, 1.0)
        assert update.stepped == math.isfinite(value)
        changed = set(difference(before, known()))
        if update.stepped:
            assert {"/advantages/1", "/carried/0/0", "/carried/0/1", "/carried/1/1/1"} <= changed
        else:
            assert not changed


def test_what_an_update_made_of_demonstrations_outlives_the_next_one() -> None:
    """A captured update writes into the tensors of the one before."""
    nothing = torch.zeros(())
    kept = KeptEvaluation((normal(1, 2, 3), normal(1, 2, 3, seed=1)), torch.ones(2))
    update = Measured({"grad_norm": nothing}, Latent(nothing, nothing), kept).on_host()
    expected = map_tensors(Tensor.clone, kept)
    for tensor in tensors_in(kept):
        tensor.fill_(9)
    torch.testing.assert_close(update.kept, expected, rtol=0, atol=0)


# A3C.


def test_each_part_of_a_batch_is_learnt_from_with_the_bonus_of_its_own_games(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(batch_size=10)
    scored, learnt = [], []
    score, update = exploration_of(model).intrinsic_rewards, model.learner.update

    def watched_score(batch: Rollout) -> Any:
        scored.append(score(batch))
        return scored[-1]

    def watched_update(lesson: Lesson, *others: Any) -> Any:
        assert lesson.bonus is not None
        learnt.append(lesson.bonus.rewards)
        return update(lesson, *others)

    monkeypatch.setattr(exploration_of(model), "intrinsic_rewards", watched_score)
    monkeypatch.setattr(model.learner, "update", watched_update)
    model.learn(20)
    assert [part.shape for part in learnt] == [(5, 2), (5, 2)]
    assert torch.equal(torch.cat(learnt, 1), scored[0][0])


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpPolicy"])
def test_scores_are_kept_with_the_values_of_what_followed_them(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(policy=policy)
    learner, memory = scene.model.learner, exploration_of(scene.model).memory
    seen: list[Tensor] = []
    monkeypatch.setattr(memory, "watch", lambda *arguments: seen.append(arguments[-1]))
    rewards = torch.zeros(8, 4)
    rewards[3, 1], rewards[7, 2], rewards[2, 0] = 1, 0.5, -1
    rollout = scene.batch._replace(rewards=rewards)
    values = scene.loss(rollout).evaluation.values.detach()
    batch = Batch(rollout, rollout, games=[0, 1, 2, 3], lags=[0])
    modes: list[bool] = []
    update = learner.update
    monkeypatch.setattr(
        learner, "update", lambda *lesson: modes.append(learner.policy.training) or update(*lesson)
    )
    assert all(made.stepped for made in learner.learn(batch, scene.objective, 1.0, num_parts=1))
    assert modes == [True], "values are those of play, and what is learnt is not"
    torch.testing.assert_close(seen, [values * torch.tensor([0.0, 1.0, 1.0, 0.0])])


def test_demonstrations_are_worth_what_the_loss_makes_of_their_rewards() -> None:
    model = make_model(reward_scale=3.0, reward_clip=2.0).learn(1000)
    kept = exploration_of(model).memory.demonstrations()
    assert kept and {one.returns.max().item() for all_of in kept.values() for one in all_of} == {2}


def test_none_is_no_bonus_and_without_coefficients_a_bonus_changes_nothing() -> None:
    plain = make_model(intrinsic_reward=None).learn(200)
    assert plain.exploration is None and not hasattr(plain.policy, "value_net_int")
    assert_bit_equal(plain, make_model(intrinsic_reward="none").learn(200))
    for name in ("rnd", "count"):
        without = make_model(intrinsic_reward=name, int_coef=0, imitation_coef=0).learn(200)
        assert not hasattr(without.policy, "value_net_int")
        assert_bit_equal(plain, without)
    other = make_model().learn(200)
    assert not torch.equal(other.policy.value_net.weight, plain.policy.value_net.weight)


@pytest.mark.parametrize(("made", "later"), [(0, 0.5), (0.5, 0)])
def test_a_bonus_cannot_be_switched_on_or_off_later(made: float, later: float) -> None:
    model = make_model(int_coef=made)
    model.int_coef = later
    with pytest.raises(ValueError, match=f"int_coef was set to {later}, .*A3C"):
        model.learn(100)


def test_everything_else_starts_from_the_same_numbers() -> None:
    plain, bonus = make_model(intrinsic_reward=None), make_model()
    assert_bit_equal(plain, bonus)
    names = bonus.policy.state_dict().keys() - plain.policy.state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"value_net_int"}
    states = []
    for name in (None, "rnd"):
        make_model(intrinsic_reward=name)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Visits(IntrinsicReward):
    """A source of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("visits", torch.zeros(4))

    def score(self, obs: Tensor) -> Tensor:
        return 1 / (1 + obs @ self.visits)

    def learn(self, obs: Tensor, next_obs: Tensor) -> dict[str, Tensor | float]:
        self.visits += next_obs.sum(0)
        return {"own_loss": self.visits.mean(), "largest": float(self.visits.max())}


@pytest.mark.parametrize("warmup_timesteps", [0, 60])
@pytest.mark.parametrize("bonus", [math.nan, math.inf])
def test_a_bonus_that_is_not_finite_names_its_source(bonus: float, warmup_timesteps: int) -> None:
    class Broken(Visits):
        def score(self, obs: Tensor) -> Tensor:
            return torch.full((len(obs),), bonus)

    options = {"warmup_timesteps": warmup_timesteps}
    with pytest.raises(NonFiniteError, match="reward Broken gave a bonus that is NaN or infinite"):
        make_model(intrinsic_reward=Broken(), intrinsic_kwargs=options).learn(1000)


def state_of(model: A3C) -> dict[str, Any]:
    return everything(model) | flat(
        {
            "exploration": exploration_of(model).state_dict(),
            "scores": (model.best_score, model.first_scored_at),
        }
    )


@pytest.mark.parametrize("name", ["rnd", "snd"])
def test_learning_beside_the_updates_changes_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    learn = RND.learn

    def watched(source: RND, *observations: Tensor) -> dict[str, Tensor]:
        threads.append(threading.current_thread())
        return learn(source, *observations)

    monkeypatch.setattr(RND, "learn", watched)
    states = []
    for beside in (True, False):
        monkeypatch.setattr(RND, "learns_beside", beside)
        states.append(state_of(make_model(intrinsic_reward=name).learn(100)))
        assert {thread is threading.main_thread() for thread in threads} == {not beside}
        threads.clear()
    assert difference(*states) == []


def test_an_error_beside_the_updates_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(RND, "learn", broken)
    with pytest.raises(RuntimeError, match="no memory left"):
        make_model().learn(100)


@pytest.mark.parametrize("name", ["rnd", "snd", "count", "own"])
def test_n_and_n_updates_are_2_n(name: str, tmp_path: Path) -> None:
    """Weights, predictor, statistics, memory, and what is drawn from it."""

    def make() -> A3C:
        source = Visits() if name == "own" else name
        return make_model(
            policy="NeurocoderMlpLstmPolicy", intrinsic_reward=source, n_steps=2, batch_size=4,
            intrinsic_kwargs={"warmup_timesteps": 60, "reach": 10, "capacity": 40},
        )  # fmt: skip

    whole = make()
    whole.learn(336, callback=SaveAt(168, tmp_path))
    learnt = exploration_of(whole)
    assert len(learnt.memory) > 0 and learnt.advantage_deviation > 0
    expected = state_of(whole)
    again = make()
    resume(again, newest_checkpoint(tmp_path))
    assert again.num_timesteps == 168 and again.best_score == 1
    readers = exploration_of(again).memory._readers
    assert any(0 < r.row < len(r.demonstration.obs) for r in readers), "in the middle of one"
    again.learn(168, reset_num_timesteps=False)
    assert difference(expected, state_of(again)) == []


def test_an_intrinsic_reward_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    model = make_model()
    next(exploration_of(model).source.parameters()).data.fill_(math.nan)
    with pytest.raises(CheckpointError, match="intrinsic reward is not finite"):
        save_checkpoint(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_may_have_longer_rollouts_or_no_memory(tmp_path: Path) -> None:
    """Kept demonstrations are cut for rollouts of one length; everything else is as it was."""
    make_model().learn(200, callback=SaveAt(160, tmp_path))
    for options in ({"n_steps": 8}, {"imitation_coef": 0}, {"n_envs": 2}):
        model = make_model(**options)
        resume(model, newest_checkpoint(tmp_path))
        assert exploration_of(model).num_timesteps == 160
        kept = len(exploration_of(model).memory)
        model.learn(160, reset_num_timesteps=False)
        if not model.imitation_coef:
            assert len(exploration_of(model).memory) == kept, "nothing is added"


@pytest.mark.parametrize("n_workers", [0, 2])
def test_only_games_that_go_on_keep_what_led_there(n_workers: int, tmp_path: Path) -> None:
    make_model().learn(200, callback=SaveAt(160, tmp_path))
    model = make_model(n_workers=n_workers)
    resume(model, newest_checkpoint(tmp_path))
    assert bool(exploration_of(model).memory._recent) == (n_workers == 0)


def test_a_last_batch_that_is_shorter() -> None:
    """No demonstration fits beside it, and what follows does not follow what was before."""
    model = make_model()
    memory = exploration_of(model).memory
    model.learn(400)
    assert len(memory) and memory.state_dict()["recent"]
    model.learn(12, reset_num_timesteps=False)  # 3 rows
    assert not memory.state_dict()["recent"]
    model.learn(40, reset_num_timesteps=False)
    assert memory.state_dict()["recent"]


def test_a_rollout_that_is_broken_off_is_missing_from_what_led_to_a_score() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 42

    model = make_model()
    memory = exploration_of(model).memory
    model.learn(400, callback=Stop())
    assert len(memory) and not memory.state_dict()["recent"]


@pytest.mark.parametrize("name", ["rnd", "count"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = make_model(intrinsic_reward=name).learn(200)
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", env=SHORT, device="cpu")
    one, other = (flat(exploration_of(each).state_dict()) for each in (model, loaded))
    assert difference(one, other) == []
    assert_bit_equal(model, loaded)
    assert (loaded.best_score, loaded.first_scored_at) == (1, model.first_scored_at)
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == 260


def test_a_source_of_ones_own_is_saved_and_given_again(tmp_path: Path) -> None:
    model = make_model(intrinsic_reward=Visits()).learn(100)
    with pytest.warns(UserWarning, match=r"custom_objects=.'intrinsic_reward'"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"custom_objects=.'intrinsic_reward'"):
        A3C.load(tmp_path / "model", device="cpu")
    own = Visits()
    loaded = A3C.load(
        tmp_path / "model", env=SHORT, device="cpu", custom_objects={"intrinsic_reward": own}
    )
    assert exploration_of(loaded).source is own and own.visits.sum() > 0
    assert torch.equal(own.visits, exploration_of(model).source.visits)  # type: ignore[arg-type]
    loaded.learn(40)


MEMBER = "exploration.pth"

DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda state: state.clear(),
    "a number": lambda state: state.update({"advantage_deviation": 3}),
    "another shape": lambda state: state.update({"source.moments.mean": torch.zeros(9)}),
    "no extra state": lambda state: state.pop("_extra_state"),
    "a strange extra state": lambda state: state.update(_extra_state=5),
    "a counter that is none": lambda state: state["_extra_state"].update(num_timesteps="x"),
    "no optimiser": lambda state: state["source._extra_state"].pop("optimizer"),
    "another optimiser": lambda state: state["source._extra_state"].update(optimizer={"state": 1}),
    "damaged memory": lambda state: state["_extra_state"]["memory"].update(kept=[1]),
    "code": lambda state: state.update(code=print),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_member_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    model = make_model().learn(200)
    model.save(tmp_path / "model.zip")
    with (
        zipfile.ZipFile(tmp_path / "model.zip") as whole,
        zipfile.ZipFile(tmp_path / "damaged.zip", "w") as damaged,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            if name == MEMBER:
                state = torch.load(io.BytesIO(content), weights_only=True)
                DAMAGES[damage](state)
                buffer = io.BytesIO()
                torch.save(state, buffer)
                content = buffer.getvalue()
            damaged.writestr(name, content)
    with pytest.raises(ValueError) as error:
        A3C.load(tmp_path / "damaged.zip", device="cpu")
    assert "\n" not in str(error.value)


REFUSED: dict[str, tuple[Any, ...]] = {
    "unknown name": ({"intrinsic_reward": "icm"}, "'icm'", "rnd"),
    "no source": ({"intrinsic_reward": 3}, "IntrinsicReward", "3"),
    "a class": ({"intrinsic_reward": RND}, "IntrinsicReward", "RND"),
    "int_coef": ({"int_coef": -1}, "int_coef", "-1"),
    "ext_coef": ({"ext_coef": math.inf}, "ext_coef", "inf"),
    "int_gamma": ({"int_gamma": 1.5}, "int_gamma", "0 .. 1", "1.5"),
    "imitation_coef": ({"imitation_coef": math.nan}, "imitation_coef", "nan"),
    "warm-up": ({"intrinsic_kwargs": {"warmup_timesteps": -1}}, "warmup_timesteps", "0", "-1"),
    "warm-up a word": ({"intrinsic_kwargs": {"warmup_timesteps": "1"}}, "warmup", "'1'"),
    "reach": ({"intrinsic_kwargs": {"reach": 0}}, "reach", "at least 1", "0"),
    "reach beyond memory": ({"intrinsic_kwargs": {"reach": 2**40}}, "reach", "below 2**40"),
    "capacity": ({"intrinsic_kwargs": {"capacity": 1.5}}, "capacity", "1.5"),
    "option": ({"intrinsic_kwargs": {"warmup": 1}}, "'rnd'", "warmup"),
    "option of an object": (
        {"intrinsic_reward": Visits(), "intrinsic_kwargs": {"learning_rate": 1}},
        *("learning_rate", "Visits"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(case: str) -> None:
    options, *words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        make_model(**options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("source", ["rnd", "count", Visits()], ids=["rnd", "count", "own"])
def test_dict_observations_are_refused_at_the_start(source: Any) -> None:
    env = make_vec_env(SimpleMultiObsEnv, 4)
    with pytest.raises(ValueError, match=r"Dict observations .* intrinsic_reward=None"):
        make_model(env, "MultiInputPolicy", intrinsic_reward=source)


class Curves(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ["rnd", "snd", "count"])
def test_curves(name: str) -> None:
    curves = Curves()
    model = make_model(intrinsic_reward=name)
    model.set_logger(Logger(None, [curves]))
    model.learn(800, log_interval=10)
    last = curves.rows[-1]
    expected = {
        *("train/int_reward_raw", "train/int_reward", "train/int_return_std", "train/int_value"),
        *("train/int_value_loss", "train/int_explained_variance", "train/imitation_loss"),
        *("train/kept_demonstrations", "rollout/rewarded_share", "rollout/best_score"),
        *("rollout/first_reward_frames", *(["train/predictor_loss"] if name != "count" else [])),
    }
    assert expected <= last.keys()
    assert all(math.isfinite(last[key]) for key in expected)
    assert last["rollout/best_score"] == 1 and last["train/kept_demonstrations"] > 0
    scores = [episode["r"] for episode in model.ep_info_buffer or ()]
    assert last["rollout/rewarded_share"] == pytest.approx(np.mean([s > 0 for s in scores]))
    assert last["rollout/first_reward_frames"] == model.first_scored_at
    assert all(row.get("rollout/first_reward_frames", 1e9) >= 4 for row in curves.rows)


@pytest.mark.parametrize("name", [None, "count"])
def test_exploration_is_a_phase_of_its_own_where_there_is_any(name: str | None) -> None:
    model = make_model(intrinsic_reward=name, profile=True).learn(40)
    assert model.time_spent is not None
    model.time_spent.table()
    assert "backward" in model.time_spent.learner
    assert ("exploration" in model.time_spent.learner) == (name is not None)


# Workers.


class FakePool:
    """Hands out rollouts of the workers 1, 0, and 1 again, whose index is in every reward."""

    starting, version = False, 0

    def __init__(self, spec: PoolSpec, slots: Rollout, workers: list[int]) -> None:
        self.spec = spec
        self.deliveries = []
        for slot, worker in enumerate(workers):
            rollout = slots.slot(slot)
            for tensor in tensors_in(rollout):
                tensor.zero_()
            rollout.rewards.add_(torch.tensor([10 * worker, 10 * worker + 1]))
            self.deliveries.append(Delivery(rollout, Played(slot, 0, {}), [], worker))

    def take(self, give_up: Any) -> list[Delivery]:
        return [self.deliveries.pop(0) for _ in range(self.spec.n_workers)]

    def release(self, deliveries: Any) -> None:
        pass


def test_games_follow_their_worker_also_where_one_delivers_twice() -> None:
    model = make_model(TickingFactory(), n_workers=3, n_envs=6)
    shape = model._rollout_shape(2)
    nothing: Any = None
    spec = PoolSpec(nothing, nothing, shape, n_workers=3, seed=0, limits=Limits())
    pool: Any = FakePool(spec, shape.allocate(6), [2, 0, 2, 1, 1, 0])
    player = WorkersPlayer(pool, model.policy, lambda: False)
    for expected in ([4, 5, 0, 1, 4, 5], [2, 3, 2, 3, 0, 1]):
        batch = player.collect(5, lambda _: True)
        assert batch is not None and batch.games == expected
        played = [int(r) // 10 * 2 + int(r) % 10 for r in batch.host.rewards[0].tolist()]
        assert played == expected


def test_games_of_serial_play_are_its_columns() -> None:
    model = make_model().learn(20)
    assert model._batch is not None and model._batch.games == [0, 1, 2, 3]


# That it works.


class StopWhenSolved(BaseCallback):
    """Solved is a mean score above 0.9 in the last 50 games."""

    solved = False

    def _on_step(self) -> bool:
        scores = [episode["r"] for episode in self.model.ep_info_buffer or ()][-50:]
        self.solved = len(scores) == 50 and float(np.mean(scores)) > 0.9
        return not self.solved


def solves(intrinsic_reward: str | None, seed: int, timesteps: int, n_workers: int = 0) -> bool:
    model = A3C(
        "MlpPolicy", key_and_door(), n_workers=n_workers, n_envs=16, n_steps=16, seed=seed,
        learning_rate=2e-3, use_rms_prop=False, gae_lambda=0.95, ent_coef=0.01, device="cpu",
        intrinsic_reward=intrinsic_reward, imitation_coef=1.0,
        intrinsic_kwargs={"warmup_timesteps": 2000, "learning_rate": 1e-3},
    )  # fmt: skip
    callback = StopWhenSolved()
    model.learn(timesteps, callback=callback, log_interval=None)
    return callback.solved


def test_a_key_and_a_door_are_found_with_a_bonus() -> None:
    assert sum(solves("rnd", seed, 100_000) for seed in range(5)) >= 4


def test_a_key_and_a_door_are_not_found_without() -> None:
    assert sum(solves(None, seed, 40_000) for seed in range(5)) == 0


def test_a_key_and_a_door_are_found_through_a_worker() -> None:
    assert any(solves("rnd", seed, 100_000, n_workers=1) for seed in (0, 1))
