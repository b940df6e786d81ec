"""Intrinsic rewards: how new an observation is, as a number.

Each source scores a batch of observations and learns from it; the learner alone does both, once for
every batch of rollouts. Shapes: N observations, D features, P numbers in one observation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import (
    get_flattened_obs_dim,
    is_image_space,
    preprocess_obs,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.agents.defaults import BONUS_LEARNING_RATE
from ncrl.checks import require_range, suggest
from ncrl.networks import trunk
from ncrl.optimizer_state import check_optimizer_state

CLIP = 5.0
"""Limit on standardised observations (Burda et al. 2018)."""

VARIANCE_FLOOR, COVARIANCE_WEIGHT = 1e-4, 1 / 25
"""What `vicreg_loss` adds to variances before their roots, and its weight of covariances."""

ENCODERS = ("a3c", "nature")
"""Those of `ncrl.networks.ENCODERS` that RND and SND can have: they end in a linear layer."""


class IntrinsicReward(nn.Module, ABC):
    """A source of intrinsic reward. Its state is its `state_dict`, so that it can be saved.

    A source of your own implements `score` and `learn`; hand an object of it to
    `A3C(..., intrinsic_reward=...)`.
    """

    learns_beside: ClassVar[bool] = False
    """Whether `learn` and `watch` may run in a thread beside the policy's updates: they draw no
    random numbers, and share nothing with it but the observations that they read."""

    @abstractmethod
    def score(self, obs: Tensor) -> Tensor:
        """The bonus of observations [N, ...] as the environment shows them: [N], without gradient.

        Changes nothing.
        """

    @abstractmethod
    def learn(self, obs: Tensor, next_obs: Tensor) -> Mapping[str, Tensor | float]:
        """Learn from N transitions; returns scalars for the log.

        Args:
            obs: [N, ...].
            next_obs: what followed each of them, [N, ...]; these are what was scored.
        """

    def watch(self, obs: Tensor) -> None:
        """Take observations [N, ...] into the statistics that inputs are standardised by."""


class ObservationView:
    """What a source sees of an observation: the newest frame of images, else a flat vector.

    ValueError for Dict observations.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        refuse_dicts(space)
        self.space = space
        self.is_image = is_image_space(space)
        if not self.is_image:
            self.shape: tuple[int, ...] = (int(get_flattened_obs_dim(space)),)
            return
        channels, height, width = space.shape or ()
        # Frames of one channel are stacked, the newest last; three channels are colours.
        self.channels = 3 if channels == 3 else 1
        self.shape = (self.channels, height, width)

    def __call__(self, obs: Tensor) -> Tensor:
        """Observations [N, ...] -> [N, *shape] as floating-point numbers."""
        if self.is_image:
            return obs[:, -self.channels :].float()
        vectors = preprocess_obs(obs, self.space, normalize_images=False)
        assert isinstance(vectors, Tensor)  # of a space that is no Dict
        return vectors.flatten(1)


def refuse_dicts(space: spaces.Space[Any]) -> None:
    """Raise ValueError for Dict observations."""
    if isinstance(space, spaces.Dict):
        raise ValueError(
            "an intrinsic reward scores images or vectors, got Dict observations with "
            f"{', '.join(space.spaces)}; use intrinsic_reward=None"
        )


class RunningMoments(nn.Module):
    """Mean and variance of everything seen, number by number (Chan et al. 1979)."""

    mean: Tensor  # [...], float64
    squares: Tensor  # sum of squared distances from the mean, [...], float64
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in values [N, ...]."""
        # Within a batch single precision will do, and is faster.
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        total = self.count + len(values)
        share = len(values) / total.double()
        distance = mean.double() - self.mean
        self.mean += distance * share
        self.squares += squares.double() + distance.square() * (self.count * share)
        self.count.copy_(total)

    def standardise(self, values: Tensor) -> Tensor:
        """(values - mean) / deviation, within +-`CLIP`. A number that never varied has a deviation
        close to 0, so that its first change counts as much as `CLIP` allows."""
        deviation = (self.squares / self.count.clamp(min=1)).sqrt().float() + 1e-8
        return (values - self.mean.float()).div_(deviation).clamp_(-CLIP, CLIP)


class RND(IntrinsicReward):
    """Random network distillation (Burda et al. 2018).

    A predictor learns the output of a fixed random network, the target. The reward is the error of
    the predictor, which is small for observations like those that it has often learnt from.

    Args:
        space: of the observations: images or vectors.
        encoder: `a3c` (16 and 32 maps, 256 features) or `nature` (32, 64 and 64 maps, 512
            features); for images only.
        learning_rate: of Adam.
        update_proportion: share of the transitions that the predictor learns from, rounded to 1,
            1/2, 1/3 and so on.

    Raises:
        ValueError: for Dict observations, images that are too small, or impossible numbers.
    """

    learns_beside = True
    trains_target: ClassVar[bool] = False
    """Whether the target network learns too, or stays random."""

    def __init__(
        self,
        space: spaces.Space[Any],
        *,
        encoder: str = "a3c",
        learning_rate: float = BONUS_LEARNING_RATE,
        update_proportion: float = 1.0,
    ) -> None:
        super().__init__()
        require_range("update_proportion", update_proportion, 1e-3, 1)
        if not (learning_rate > 0 and math.isfinite(learning_rate)):
            raise ValueError(f"the bonus's learning_rate must be above 0, got {learning_rate}")
        self.view = ObservationView(space)
        self.moments = RunningMoments(self.view.shape)
        self.target = _network(self.view, encoder)
        width = self.target[-1].out_features
        assert isinstance(width, int)
        self.predictor = nn.Sequential(
            *_network(self.view, encoder),
            *(nn.ReLU(), nn.Linear(width, width).apply(_orthogonal)),
            *(nn.ReLU(), nn.Linear(width, width).apply(_orthogonal)),
        )
        self.target.requires_grad_(self.trains_target)
        self.stride = max(1, round(1 / update_proportion))
        """Every `stride`-th transition is learnt from; the next batch begins one later."""
        self.num_batches = 0
        self.optimizer = torch.optim.Adam(
            [weight for weight in self.parameters() if weight.requires_grad], learning_rate
        )

    def watch(self, obs: Tensor) -> None:
        self.moments.update(self.view(obs))

    @torch.no_grad()
    def score(self, obs: Tensor) -> Tensor:
        """Mean squared error of the predictor for each observation."""
        inputs = self.moments.standardise(self.view(obs))
        return (self.predictor(inputs) - self.target(inputs)).square().mean(1)

    def learn(self, obs: Tensor, next_obs: Tensor) -> dict[str, Tensor]:
        """One step of Adam on every `stride`-th transition."""
        first = self.num_batches % self.stride if self.stride < len(obs) else 0
        self.num_batches += 1
        chosen = slice(first, None, self.stride)
        inputs = self.moments.standardise(self.view(next_obs[chosen]))
        features = self.target(inputs)
        losses = {"predictor_loss": F.mse_loss(self.predictor(inputs), features.detach())}
        if self.trains_target:
            before = self.moments.standardise(self.view(obs[chosen]))
            losses["target_loss"] = vicreg_loss(self.target(before), features)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def get_extra_state(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.num_batches = int(state["num_batches"])
        check_optimizer_state(self.optimizer, state["optimizer"], most_steps=self.num_batches)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the learning rate is a setting of this run, not of the file


class SND(RND):
    """Self-supervised network distillation (Pechac, Chovanec and Farkas 2023; SND-VIC).

    RND whose target learns too: to give alike features to successive observations, and different
    features to different ones (`vicreg_loss`). What then is new to the predictor is what matters in
    the game. Arguments and errors are those of `RND`.
    """

    trains_target = True


def vicreg_loss(features: Tensor, others: Tensor) -> Tensor:
    """Variance, invariance and covariance of pairs of features [N, D] (Bardes et al. 2022), with
    the weights of SND-VIC: variance 1, invariance 1, covariance `COVARIANCE_WEIGHT`."""
    total = F.mse_loss(features, others)
    for each in (features, others):
        centred = each - each.mean(0)
        deviation = (centred.square().sum(0) / max(1, len(each) - 1) + VARIANCE_FLOOR).sqrt()
        covariance = centred.T @ centred / max(1, len(each) - 1)
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        total = total + F.relu(1 - deviation).mean()
        total = total + COVARIANCE_WEIGHT * off_diagonal / each.shape[1]
    return total


class PseudoCount(IntrinsicReward):
    """1 / sqrt(N + 0.01) for the pseudo-count N of an observation (Bellemare et al. 2016).

    The density is a product of one histogram per number. Images are shrunk to 42x42 pixels, as in
    Itsukara's A3C; a vector's numbers are squashed into -1 .. 1. Both have `LEVELS` levels.
    ValueError for Dict observations.
    """

    LEVELS = 128
    SIDE = 42
    FLOOR = 0.01

    counts: Tensor  # how often each number had each level, [P, LEVELS]

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        self.view = ObservationView(space)
        numbers = self.SIDE**2 if self.view.is_image else self.view.shape[0]
        self.register_buffer("counts", torch.zeros(numbers, self.LEVELS, dtype=torch.int64))

    def levels(self, obs: Tensor) -> Tensor:
        """Level of every number of observations [N, ...]: [P, N]."""
        values = self.view(obs)
        if self.view.is_image:
            small = F.adaptive_avg_pool2d(values.mean(1, keepdim=True), self.SIDE)
            scaled = small.flatten(1) / 256
        else:
            scaled = (values / (1 + values.abs()) + 1) / 2
        return (scaled * self.LEVELS).long().clamp(0, self.LEVELS - 1).T

    @torch.no_grad()
    def score(self, obs: Tensor) -> Tensor:
        """The bonus of each observation, as if it alone were seen next."""
        return 1 / (self.pseudo_counts(obs) + self.FLOOR).sqrt().float()

    def pseudo_counts(self, obs: Tensor) -> Tensor:
        """N = rho (1 - rho') / (rho' - rho) for the densities before and after, [N].

        With rho' far below 1 this is 1 / (rho' / rho - 1); an observation with a level that was
        never seen has N = 0.
        """
        seen = self.counts.gather(1, self.levels(obs)).double()  # [P, N]
        total = self.counts[0].sum().clamp(min=1).double()
        log_ratio = (1 / seen).log1p().sum(0) - len(self.counts) * (1 / total).log1p()
        return 1 / log_ratio.clamp(min=1e-12).expm1()

    @torch.no_grad()
    def learn(self, obs: Tensor, next_obs: Tensor) -> dict[str, Tensor]:
        """Count every observation."""
        levels = self.levels(next_obs)
        self.counts.scatter_add_(1, levels, torch.ones_like(levels))
        return {}


SOURCES: dict[str, Callable[..., IntrinsicReward]] = {"rnd": RND, "snd": SND, "count": PseudoCount}
"""Intrinsic rewards by name."""


def make_source(name: str, space: spaces.Space[Any], **options: Any) -> IntrinsicReward:
    """A source by its name.

    Raises:
        ValueError: for an unknown name, for observations that it cannot score, or for an option it
            has not got.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown intrinsic reward {name!r}; {suggest(name, SOURCES)}")
    try:
        return SOURCES[name](space, **options)
    except TypeError as error:
        raise ValueError(f"intrinsic reward {name!r}: {error}") from error


def _network(view: ObservationView, encoder: str) -> nn.Sequential:
    """The target of RND and SND, and the beginning of their predictor; its last layer is linear."""
    if not view.is_image:
        network = nn.Sequential(nn.Linear(view.shape[0], 64), nn.LeakyReLU(), nn.Linear(64, 64))
        return network.apply(_orthogonal)
    if encoder not in ENCODERS:
        raise ValueError(f"unknown encoder {encoder!r} of the bonus; {suggest(encoder, ENCODERS)}")
    network = nn.Sequential(*trunk(encoder, view.shape[0], activation=nn.LeakyReLU)[:-1])
    try:
        with torch.no_grad():
            network(torch.zeros(1, *view.shape))  # gives the lazy linear layer its size
    except RuntimeError as error:
        raise ValueError(
            f"images of {view.shape[1]}x{view.shape[2]} are too small for the bonus's encoder "
            f"{encoder!r}, which is made for 84x84; use intrinsic_reward='count'"
        ) from error
    return network.apply(_orthogonal)


def _orthogonal(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
