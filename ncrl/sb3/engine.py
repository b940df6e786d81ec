"""What `ncrl.agents.A3C` asks of a policy: SB3's, but over whole rollouts and with a state.

Policies with an LSTM carry their state from step to step; to all others the same interface passes a
state without layers.

Shapes: T timesteps, B environments, L LSTM layers (0 without memory), h LSTM width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from ncrl.networks import AtariEncoder, LstmState
from ncrl.settings import suggest

SUPPORTED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Spaces of actions, of observations, and of entries of Dict observations."""

SMALLEST_IMAGE = 36
"""Height and width below which nothing is left of an image behind NatureCNN's convolutions."""


class Latent(NamedTuple):
    """What actor and critic read, [..., width]; the same tensor where they share a trunk."""

    actor: Tensor
    critic: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Latent:
        """The function of both, called once where they are the same."""
        actor = function(self.actor)
        return Latent(actor, actor if self.critic is self.actor else function(self.critic))


class Step(NamedTuple):
    """One decision for each of B environments."""

    actions: Tensor
    """[B, ...] in the shape of the action space."""

    log_prob: Tensor
    """Log-probability of each action, [B]."""

    lstm_state: LstmState
    """State after the step."""

    latent: Latent
    """What actor and critic read, [B, ...]."""


class RolloutEvaluation(NamedTuple):
    """What the current weights say about a rollout of T actions and T + 1 observations."""

    values: Tensor
    """V(x_t), [T + 1, B]; the last row is the bootstrap value."""

    int_values: Tensor | None
    """The same of the intrinsic reward, if the policy has a head for it."""

    log_prob: Tensor
    """Log-probability of the actions taken, [T, B]."""

    entropy: Tensor
    """Entropy of the policy, [T, B]."""

    latent: Latent
    """What actor and critic read, [T + 1, B, ...]."""

    def narrow(self, first: int, length: int) -> RolloutEvaluation:
        """That of some of the environments."""

        def part(x: Tensor) -> Tensor:
            return x.narrow(1, first, length)

        int_values = None if self.int_values is None else part(self.int_values)
        return RolloutEvaluation(
            *(part(self.values), int_values, part(self.log_prob), part(self.entropy)),
            self.latent.map(part),
        )


class EnginePolicy(ActorCriticPolicy):
    """An SB3 policy that A3C can play and train: to be named before the policy it is mixed into.

    As it stands it has no memory. A policy with memory says what its state looks like in
    `state_shape`, and carries it in `unroll`.

    Dict observations are dicts of tensors of the shapes that are given for `obs`.
    """

    value_net_int: nn.Module
    """Head for the value of the intrinsic reward, where there is one. It serves the learner alone:
    workers have none."""

    @property
    def state_shape(self) -> tuple[int, int]:
        """(L, h) of the state."""
        return 0, 0

    def initial_state(self, num_envs: int) -> LstmState:
        """Zero state for `num_envs` environments, [L, B, h] twice."""
        layers, width = self.state_shape
        zeros = torch.zeros(layers, num_envs, width, device=self.device)
        return zeros, zeros.clone()

    def unroll(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Latent, LstmState]:
        """Everything below the heads and `net_arch`, over time.

        Args:
            obs: [T, B, ...].
            lstm_state: before row 0, [L, B, h] twice.
            episode_start: [T, B] bool.

        Returns:
            Latents [T, B, ...] and the state after row T - 1.
        """
        return self.features(obs, episode_start.shape), lstm_state

    def features(self, obs: PyTorchObs, leading: torch.Size) -> Latent:
        """What the features extractors make of observations [*leading, ...]."""
        features = self.extract_features(map_obs(lambda x: x.flatten(0, len(leading) - 1), obs))
        if isinstance(features, tuple):
            actor, critic = features
        else:
            actor = critic = features
        return Latent(actor, critic).map(lambda x: x.view(*leading, -1))

    def watch(self, obs: PyTorchObs) -> None:
        """Show observations [B, ...] that were trained on to the encoders that keep a mean of them.

        A3C calls this once for every batch of rollouts.
        """
        encoders = [part for part in self.modules() if isinstance(part, AtariEncoder)]
        if encoders:
            images = preprocess_obs(obs, self.observation_space, self.normalize_images)
            assert isinstance(images, Tensor)  # an AtariEncoder reads no dicts
            for encoder in encoders:
                encoder.watch(images)

    def watch_in_training(self, obs: PyTorchObs) -> None:
        """`watch`, if a gradient is wanted in training mode.

        A2C, PPO and RecurrentPPO do not know `watch`, but what they train on goes through
        `evaluate_actions`, which calls this when it has done its work.
        """
        if self.training and torch.is_grad_enabled():
            self.watch(obs)

    def encode(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Latent, LstmState]:
        """`unroll` for one observation each: obs [B, ...] -> latents [B, ...], next state."""
        obs = map_obs(lambda x: x.unsqueeze(0), obs)
        latent, lstm_state = self.unroll(obs, lstm_state, episode_start[None])
        return latent.map(lambda x: x[0]), lstm_state

    def distribution(self, latent: Latent) -> Distribution:
        """The policy behind latents [B, ...]."""
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(latent.actor))

    def values(self, latent: Latent) -> Tensor:
        """Values [..., 1] behind latents [..., width]."""
        values: Tensor = self.value_net(self.mlp_extractor.forward_critic(latent.critic))
        return values

    def act(self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor) -> Step:
        """Sample one action per environment.

        Args:
            obs: [B, ...].
            lstm_state: before the step, [L, B, h] twice.
            episode_start: [B] bool.
        """
        latent, lstm_state = self.encode(obs, lstm_state, episode_start)
        distribution = self.distribution(latent)
        actions = distribution.get_actions()
        log_prob = distribution.log_prob(actions)
        return Step(actions.reshape(-1, *self._action_shape), log_prob, lstm_state, latent)

    def evaluate_rollout(
        self, obs: PyTorchObs, actions: Tensor, lstm_state: LstmState, episode_start: Tensor
    ) -> RolloutEvaluation:
        """Evaluate T actions under the current weights.

        Args:
            obs: [T + 1, B, ...].
            actions: [T, B, ...].
            lstm_state: before row 0, [L, B, h] twice.
            episode_start: [T + 1, B] bool.
        """
        latent, _ = self.unroll(obs, lstm_state, episode_start)
        num_steps, num_envs = actions.shape[:2]
        distribution = self.distribution(latent.map(lambda x: x[:-1].flatten(0, 1)))
        actions = actions.flatten(0, 1)  # [T * B, ...]
        if isinstance(self.action_space, (spaces.Box, spaces.MultiBinary)):
            actions = actions.flatten(1).float()  # SB3's distributions are over vectors
        log_prob = distribution.log_prob(actions)
        entropy = distribution.entropy()
        if entropy is None:  # squashed Gaussians have none; SB3 estimates it like this
            entropy = -log_prob
        critic = self.mlp_extractor.forward_critic(latent.critic)
        return RolloutEvaluation(
            values=self.value_net(critic).squeeze(-1),
            int_values=self.value_net_int(critic).squeeze(-1)
            if hasattr(self, "value_net_int")
            else None,
            log_prob=log_prob.view(num_steps, num_envs),
            entropy=entropy.view(num_steps, num_envs),
            latent=latent,
        )

    @property
    def _action_shape(self) -> tuple[int, ...]:
        shape = self.action_space.shape
        assert shape is not None  # SB3 supports no other action spaces
        return shape

    def obs_to_tensor(
        self, observation: np.ndarray | dict[str, np.ndarray]
    ) -> tuple[PyTorchObs, bool]:
        """As in SB3.

        Raises:
            ValueError: for an observation that is not what the observation space says.
        """
        check_observation(observation, self.observation_space)
        if isinstance(observation, dict):
            observation = {name: np.asarray(entry) for name, entry in observation.items()}
        else:
            observation = np.asarray(observation)
        obs, is_batch = super().obs_to_tensor(observation)
        if isinstance(obs, dict) and len({len(entry) for entry in obs.values()}) > 1:
            rows = ", ".join(f"{name!r}: {len(entry)}" for name, entry in obs.items())
            raise ValueError(
                f"the entries of the observation have different numbers of rows: {rows}"
            )
        return obs, is_batch

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """As in SB3.

        Raises:
            ValueError: for observations that SB3's extractor of this kind of policy cannot read.
        """
        check_extractor(self)
        return super().make_features_extractor()


def map_obs(function: Callable[[Tensor], Tensor], obs: PyTorchObs) -> PyTorchObs:
    """The function of an observation, or of every entry of a Dict observation."""
    if isinstance(obs, dict):
        return {name: function(entry) for name, entry in obs.items()}
    return function(obs)


def check_observation(observation: Any, space: spaces.Space[Any]) -> None:
    """What SB3 does not say about a wrong observation, or says in other words than the user's.

    Raises:
        ValueError: for what `env.reset()` of Gymnasium returns, for an array in place of a dict or
            the other way round, for dicts with other names than the space has, and for values that
            are no numbers, not finite, or none of the space's.
    """
    if isinstance(observation, tuple):
        raise ValueError(
            "the observation is a tuple: Gymnasium's env.reset() returns (observation, info), and "
            "only the first of them is for predict()"
        )
    if not isinstance(space, spaces.Dict):
        if isinstance(observation, dict):
            raise ValueError(
                f"the observation is a dict with {_names(observation)}, but this policy was made "
                f"for {_line(space)}"
            )
        _check_values("the observation", observation, space)
        return
    if not isinstance(observation, dict):
        raise ValueError(
            f"the observation is a {type(observation).__name__}, but this policy was made for "
            f"dicts with {_names(space.spaces)}"
        )
    for name in observation:
        if name not in space.spaces:
            hint = suggest(str(name), space)
            raise ValueError(f"unknown entry {name!r} of the observation; {hint}")
    if missing := [name for name in space.spaces if name not in observation]:
        raise ValueError(f"the observation lacks {_names(missing)}")
    for name, part in space.spaces.items():
        _check_values(f"the entry {name!r} of the observation", observation[name], part)


def _check_values(what: str, value: Any, space: spaces.Space[Any]) -> None:
    array = _as_numbers(what, value)
    if array.dtype.kind == "f" and isinstance(space, spaces.Box) and space.dtype.kind in "iu":
        raise ValueError(
            f"{what} has dtype {array.dtype}, expected {space.dtype} of {_line(space)}"
        )
    if isinstance(space, spaces.Box) and array.ndim - len(space.shape) not in (0, 1):
        raise ValueError(f"{what} has shape {array.shape}, expected {space.shape} or a batch of it")
    if array.size == 0:
        raise ValueError(
            f"{what} is empty, with shape {array.shape}; expected one of {_line(space)}"
        )
    if isinstance(space, spaces.Discrete):
        is_inside = (array >= 0) & (array < space.n)
    elif isinstance(space, spaces.MultiDiscrete) and array.shape[-1:] == space.nvec.shape:
        is_inside = (array >= 0) & (array < space.nvec)
    else:
        is_inside = np.isfinite(array)
    if not is_inside.all():
        index = tuple(np.argwhere(~is_inside)[0].tolist())
        raise ValueError(
            f"{what} is {array[index]} at index {index}, expected one of {_line(space)}"
        )


def check_state(state: Any) -> None:
    """What can be said of an LSTM's state before the number of observations is known.

    Raises:
        ValueError: unless it is a pair of arrays of finite numbers.
    """
    if not (isinstance(state, (tuple, list)) and len(state) == 2):
        got = f"{len(state)} parts" if isinstance(state, (tuple, list)) else type(state).__name__
        raise ValueError(
            f"the state must be a pair (h, c) as the call of predict() before returned it, or "
            f"None, got {got}"
        )
    for part in state:
        if not np.isfinite(_as_numbers("the state", part)).all():
            raise ValueError("the state must be finite, got NaN or infinity in it")


def check_starts(episode_start: Any) -> np.ndarray:
    """Episode starts [B], given as anything that numpy makes B truth values of.

    Raises:
        ValueError: for other values than true and false, 1 and 0.
    """
    starts = _as_numbers("episode_start", episode_start).reshape(-1)
    if not np.isin(starts, (0, 1)).all():
        raise ValueError(f"episode_start must be truth values, got {episode_start!r}")
    return starts


def _as_numbers(what: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{what} is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} has dtype {array.dtype}, expected numbers")
    return array


# Spaces.


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Refuse the spaces that SB3 fails at, or plays wrongly.

    Raises:
        ValueError: in one line that names the space and says what to make of it.
    """
    if isinstance(observation_space, spaces.Dict):
        parts = list(observation_space.spaces.values())
        if not parts:
            _refuse(observation_space, "observations", "a Dict needs at least one entry")
    else:
        parts = [observation_space]
    for part in parts:
        if not isinstance(part, SUPPORTED):
            _refuse(
                part,
                "observations",
                "use Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them",
            )
        _check_layout(part, "observations")
    if not isinstance(action_space, SUPPORTED):
        _refuse(action_space, "actions", "use Box, Discrete, MultiDiscrete or MultiBinary")
    _check_layout(action_space, "actions")
    if isinstance(action_space, spaces.Box):
        if action_space.dtype.kind != "f":
            _refuse(action_space, "actions", "a Box of integers is a MultiDiscrete")
        if not action_space.is_bounded():
            _refuse(action_space, "actions", "the bounds must be finite, such as -1 and 1")
    elif isinstance(action_space, spaces.MultiBinary) and len(action_space.shape) != 1:
        _refuse(action_space, "actions", "flatten it to one dimension")


def _check_layout(space: spaces.Space[Any], role: str) -> None:
    if isinstance(space, spaces.Box) and (not space.shape or 0 in space.shape):
        _refuse(space, role, "a Box needs at least one number, in shape (1,)")
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        _refuse(space, role, "flatten it to one dimension")
    if np.any(getattr(space, "start", 0)):
        _refuse(space, role, "count from 0 and add the start in a wrapper, such as TransformAction")


def _refuse(space: spaces.Space[Any], role: str, advice: str) -> NoReturn:
    raise ValueError(f"spaces such as {_line(space)} are not supported as {role}: {advice}")


def check_extractor(policy: ActorCriticPolicy) -> None:
    """Refuse observations that SB3's own features extractors cannot read.

    Raises:
        ValueError: in one line that names the policy to use.
    """
    kind, space = policy.features_extractor_class, policy.observation_space
    options = policy.features_extractor_kwargs
    is_dict = isinstance(space, spaces.Dict)
    is_image = is_image_space(
        space, check_channels=False, normalized_image=options.get("normalized_image", False)
    )
    if kind is NatureCNN and not is_image:
        needs = "images (uint8, 0 to 255, three axes)"
    elif kind is CombinedExtractor and not is_dict:
        needs = "Dict observations"
    elif kind is FlattenExtractor and is_dict:
        needs = "arrays"
    else:
        _check_image_sizes(kind, space)
        return
    name = type(policy).__name__
    fitting = "MultiInput" if is_dict else "Cnn" if is_image else "Mlp"
    other = re.sub("MultiInput|Cnn|Mlp", fitting, name)
    raise ValueError(f"{name} needs {needs}, got {_line(space)}; use {other}")


def _check_image_sizes(kind: type[BaseFeaturesExtractor], space: spaces.Space[Any]) -> None:
    if kind not in (NatureCNN, CombinedExtractor):
        return
    for part in getattr(space, "spaces", {"": space}).values():
        if is_image_space(part) and min(part.shape[-2:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"images of shape {part.shape} (channels, height, width) are too small for "
                f"NatureCNN, which needs {SMALLEST_IMAGE}x{SMALLEST_IMAGE}; give another "
                "features_extractor_class"
            )


def _line(space: spaces.Space[Any]) -> str:
    """A space in one line: numpy breaks arrays."""
    return " ".join(str(space).split())


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))
