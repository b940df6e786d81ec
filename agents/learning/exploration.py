"""Exploration as a part of the learner: from a bonus to a reward that the loss can use.

The learner scores every batch of rollouts once, so workers know nothing of it. The bonus never ends
with a game: it has a value head and a discount of its own (Burda et al. 2018).

Shapes: T timesteps, B environments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from ncrl.agents.defaults import BONUS_WARMUP
from ncrl.agents.learning.imitation import DemonstrationMemory
from ncrl.agents.learning.intrinsic import RND, SOURCES, IntrinsicReward, make_source, refuse_dicts
from ncrl.agents.learning.losses import SMALLEST_DEVIATION
from ncrl.agents.playing.buffers import Rollout
from ncrl.agents.playing.collector import NonFiniteError

MEAN_TIMESTEPS = 1000
"""The running mean of the bonus is over so many timesteps, or over a batch if that has more. The
bonus falls fast at first: a mean that lags behind would leave a constant for values to carry."""

LATEST_TIMESTEPS = 10_000
"""The latest deviation of the bonus's return is over about so many timesteps."""

TIMESTEPS_PER_STEP = 1280
"""The source makes one step for so many timesteps of play, however large batches are, and one for a
smaller batch: how fast it learns decides how fast the bonus leads on to something else."""

GAMES_OF_WHOLE_BATCH = 32
"""Up to so many games a predictor learns from every timestep; with more, from half of them."""

OPTIONS = ("warmup_timesteps", "reach", "capacity")
"""Options of `Exploration` that users may give; all others go to the source."""


class RunningScale(nn.Module):
    """Centres a stream of bonuses and divides it by the deviation of its discounted return.

    The deviation is that of all play so far, or the latest one if that is larger. With the first,
    the bonus gets small beside the game's rewards when new things get rare; divided by the latest
    alone it would drive the policy for ever, in the end by noise. With the second, a discovery,
    after which bonuses are many times as large in some games, swamps neither values nor policy.

    The return is filtered forwards in time, and never cut where a game ends. It begins at 0, the
    mean of centred bonuses, in every rollout: a column is of another game in every batch.

    Centring changes no advantage, as the stream never ends. It keeps values within a few units, and
    an LSTM that serves larger ones saturates.
    """

    mean: Tensor
    """Running mean of the bonus; float64, since rounding errors of a constant bonus are divided by
    a deviation close to 0."""
    square: Tensor  # mean squared return of all play so far
    latest: Tensor  # running mean of squared returns over about `LATEST_TIMESTEPS`
    weight: Tensor  # number of timesteps so far

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        for name in ("square", "latest", "weight"):
            self.register_buffer(name, torch.zeros(()))

    @property
    def deviation(self) -> Tensor:
        """Deviation of the discounted return, a scalar."""
        return self.square.maximum(self.latest).sqrt()

    @torch.no_grad()
    def update(self, bonus: Tensor) -> None:
        """Take in the bonuses of a batch, [T, B]."""
        first = self.weight == 0
        share = min(1.0, bonus.numel() / MEAN_TIMESTEPS)
        mean = bonus.mean(dtype=torch.float64)
        self.mean.copy_(torch.where(first, mean, self.mean.lerp(mean, share)))
        returns = discounted_sums(self.centred(bonus), self.gamma)
        square = returns.square().mean()
        self.weight += bonus.numel()
        self.square.lerp_(square, bonus.numel() / self.weight)
        self.latest.lerp_(square, min(1.0, bonus.numel() / LATEST_TIMESTEPS))

    def centred(self, bonus: Tensor) -> Tensor:
        """Bonuses without their running mean."""
        return bonus - self.mean

    def normalise(self, bonus: Tensor) -> Tensor:
        """Centred bonuses over the deviation of their return."""
        return self.centred(bonus) / self.deviation.clamp(min=SMALLEST_DEVIATION)


def discounted_sums(rewards: Tensor, gamma: float) -> Tensor:
    """Sum of gamma^(t - k) r_k over k <= t, [T, B]: a filter that runs forwards in time."""
    sums = torch.empty_like(rewards)
    carry = torch.zeros_like(rewards[0])
    for t in range(len(rewards)):
        carry = gamma * carry + rewards[t]
        sums[t] = carry
    return sums


class Exploration(nn.Module):
    """Owns a source of intrinsic reward, its scale, and the demonstrations that led to a score.

    Args:
        source: scores observations.
        int_gamma: discount of the intrinsic return.
        gamma: discount of the game's return, by which kept demonstrations are judged.
        n_steps: T.
        seed: of the choice among kept demonstrations.
        warmup_timesteps: timesteps of play before the bonus begins. The first half gathers
            statistics of the inputs, the second half those of the bonuses. The policy has learnt
            little by then: it plays like chance.
        reach: timesteps before a score that are kept with it.
        capacity: timesteps that are kept for each number of rewards, if every demonstration has
            `reach` of them.

    Raises:
        ValueError: for impossible numbers.
    """

    advantage_deviation: float
    """Deviation of the intrinsic advantages of all updates so far; 0 before the first. Advantages
    are divided by it, unless their own deviation is larger. The bonus persists from timestep to
    timestep and its value explains most of it, so that the advantage left would be smaller than the
    entropy's pull."""

    def __init__(
        self,
        source: IntrinsicReward,
        *,
        int_gamma: float,
        gamma: float,
        n_steps: int,
        seed: int,
        warmup_timesteps: int = BONUS_WARMUP,
        reach: int = 320,
        capacity: int = 10_000,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("warmup_timesteps", warmup_timesteps, 0),
            ("reach", reach, 1),
            ("capacity", capacity, 1),
        ):
            if not (isinstance(value, Integral) and least <= value < 2**40):
                raise ValueError(
                    f"{name} of the bonus must be an integer of at least {least} and below 2**40, "
                    f"got {value!r}"
                )
        self.source = source
        self.scale = RunningScale(int_gamma)
        self.n_steps = n_steps
        self.warmup_timesteps = warmup_timesteps
        self.num_timesteps = 0
        self.advantage_deviation = 0.0
        self.num_updates = 0
        self.memory = DemonstrationMemory(
            gamma=gamma,
            reach=math.ceil(reach / n_steps),
            capacity=math.ceil(capacity / reach),
            seed=seed,
        )

    def intrinsic_rewards(self, batch: Rollout) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Normalised bonuses of a batch on the learner's device, [T, B], and what to log.

        None while the statistics warm up. A timestep is rewarded for what it led to, which after
        the end of a game is the beginning of the next.
        """
        obs = batch.obs
        assert isinstance(obs, Tensor)  # see `ObservationView`
        steps, envs = batch.rewards.shape
        played = self.num_timesteps
        self.num_timesteps += steps * envs
        if played < self.warmup_timesteps // 2:  # statistics of the inputs come first
            return None, {}
        parts = obs[1:].flatten(0, 1).split(TIMESTEPS_PER_STEP)  # so that memory stays small
        bonus = torch.cat([self.source.score(part) for part in parts]).float().view(steps, envs)
        self.scale.update(bonus)
        if played < self.warmup_timesteps:
            return None, {}
        rewards = self.scale.normalise(bonus)
        return rewards, {
            "int_reward_raw": bonus.mean(),
            "int_reward": rewards.mean(),
            "int_reward_max": rewards.max(),
            "int_return_std": self.scale.deviation,
        }

    def learn(self, batch: Rollout) -> dict[str, Tensor]:
        """Let the source learn from a batch; returns what to log."""
        obs = batch.obs
        assert isinstance(obs, Tensor)
        before, following = obs[:-1].flatten(0, 1), obs[1:].flatten(0, 1)
        steps = max(1, len(following) // TIMESTEPS_PER_STEP)
        parts = list(zip(before.chunk(steps), following.chunk(steps), strict=True))
        learnt: Mapping[str, Tensor | float] = {}
        # A predictor waits for statistics of its inputs; other sources learn from the beginning on.
        if self.num_timesteps > self.warmup_timesteps or not isinstance(self.source, RND):
            for part in parts:
                learnt = self.source.learn(*part)
        for _, seen in parts:
            self.source.watch(seen)
        return {name: torch.as_tensor(x, device=obs.device) for name, x in learnt.items()}

    def check_bonus(self) -> None:
        """Raise NonFiniteError if the source ever gave a bonus that is not finite."""
        if not self.scale.mean.isfinite():
            raise NonFiniteError(
                f"the intrinsic reward {type(self.source).__name__} gave a bonus that is NaN or "
                "infinite; its score must return finite numbers"
            )

    def observe_advantages(self, deviation: float) -> None:
        """Take in the deviation of the intrinsic advantages of an update."""
        self.num_updates += 1
        square = self.advantage_deviation**2
        square += (deviation**2 - square) / self.num_updates
        self.advantage_deviation = math.sqrt(square)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "num_timesteps": self.num_timesteps,
            "advantage_deviation": self.advantage_deviation,
            "num_updates": self.num_updates,
            "n_steps": self.n_steps,
            "memory": self.memory.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.num_timesteps = int(state["num_timesteps"])
        self.advantage_deviation = float(state["advantage_deviation"])
        self.num_updates = int(state["num_updates"])
        if state["n_steps"] == self.n_steps:  # demonstrations are cut for rollouts of this length
            self.memory.load_state_dict(state["memory"])


def make_exploration(
    intrinsic_reward: str | IntrinsicReward,
    space: spaces.Space[Any],
    *,
    n_envs: int,
    options: dict[str, Any],
    **arguments: Any,
) -> Exploration:
    """`Exploration` of a source by its name or as an object, for batches of `n_envs` games.

    `options` are the user's: those in `OPTIONS` go to `Exploration`, all others to the source, and
    ValueError is raised for what it does not take. `arguments` are further ones of `Exploration`.
    """
    own = {name: options[name] for name in options if name in OPTIONS}
    others = {name: options[name] for name in options if name not in OPTIONS}
    if isinstance(intrinsic_reward, IntrinsicReward):
        if others:
            raise ValueError(
                f"intrinsic_kwargs {', '.join(others)} cannot be given to an object; give them to "
                f"{type(intrinsic_reward).__name__} itself"
            )
        refuse_dicts(space)
        source = intrinsic_reward
    elif isinstance(intrinsic_reward, str):
        if intrinsic_reward in ("rnd", "snd"):
            others.setdefault("update_proportion", 1.0 if n_envs <= GAMES_OF_WHOLE_BATCH else 0.5)
        # Everything else starts from the same random numbers as without a bonus.
        with torch.random.fork_rng(devices=[]):
            source = make_source(intrinsic_reward, space, **others)
    else:
        raise ValueError(
            f"intrinsic_reward must be {', '.join(map(repr, SOURCES))}, None or an "
            f"IntrinsicReward, got {intrinsic_reward!r}"
        )
    return Exploration(source, **arguments, **own)
