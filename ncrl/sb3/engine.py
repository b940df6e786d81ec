"""What `ncrl.agents.A3C` asks of a policy: SB3's, but over whole rollouts and with a state.

Policies with an LSTM carry their state from step to step; to all others the same interface passes a
state without layers.

Shapes: T timesteps, B environments, L LSTM layers (0 without memory), h LSTM width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

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

from ncrl.checks import suggest
from ncrl.networks import AtariEncoder, LstmState, MeanImage, VectorEncoder

Tree = TypeVar("Tree")

SUPPORTED = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Spaces of actions, of observations, and of entries of Dict observations."""

SMALLEST_IMAGE = 36
"""Height and width below which NatureCNN's convolutions leave nothing of an image."""

READS: dict[type[BaseFeaturesExtractor], tuple[str, str]] = {
    NatureCNN: ("Cnn", "images (uint8, 0 to 255, three axes)"),
    AtariEncoder: ("Cnn", "images (channels, height, width)"),
    CombinedExtractor: ("MultiInput", "Dict observations"),
    FlattenExtractor: ("Mlp", "vectors"),
    VectorEncoder: ("Mlp", "vectors"),
}
"""The part of a policy's name that features extractors belong to, and what they can read."""


class Latent(NamedTuple):
    """What actor and critic read, [..., width]; the same tensor where they share a trunk."""

    actor: Tensor
    critic: Tensor


class Step(NamedTuple):
    """One decision for each of B environments."""

    actions: Tensor  # [B, ...] in the shape of the action space
    log_prob: Tensor  # of each action, [B]
    lstm_state: LstmState  # after the step
    latent: Latent  # [B, ...]


class RolloutEvaluation(NamedTuple):
    """What the current weights say about a rollout of T actions and T + 1 observations."""

    values: Tensor  # V(x_t), [T + 1, B]; the last row is the bootstrap value
    int_values: Tensor | None  # of the intrinsic reward, if the policy has a head for it
    log_prob: Tensor  # of the actions taken, [T, B]
    entropy: Tensor  # of the policy, [T, B]
    latent: Latent  # [T + 1, B, ...]
    lstm_state: LstmState  # after row T, [L, B, h] twice

    def narrow(self, first: int, length: int) -> RolloutEvaluation:
        """The evaluation of `length` of the environments, from number `first` on."""
        return map_tensors(lambda x: x[:, first : first + length], self)


class EnginePolicy(ActorCriticPolicy):
    """An SB3 policy that A3C can play and train. As a mixin it is named before SB3's policy.

    It has no memory itself. A policy with memory gives the shape of its state in `state_shape`, and
    carries the state in `unroll`. States are pairs of [L, B, h]; Dict observations are dicts of
    tensors of the shapes that are given for `obs`.
    """

    value_net_int: nn.Module
    """Head for the value of the intrinsic reward, if there is one."""

    @property
    def state_shape(self) -> tuple[int, int]:
        """(L, h) of the state."""
        return 0, 0

    def initial_state(self, num_envs: int) -> LstmState:
        """Zero state for `num_envs` environments."""
        layers, width = self.state_shape
        zeros = torch.zeros(layers, num_envs, width, device=self.device)
        return zeros, zeros.clone()

    def unroll(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Latent, LstmState]:
        """Everything below the heads and `net_arch`, over time.

        From obs [T, B, ...], the state before row 0 and episode_start [T, B] bool to latents
        [T, B, ...] and the state after row T - 1.
        """
        return self.features(obs, episode_start.shape), lstm_state

    def features(self, obs: PyTorchObs, leading: torch.Size) -> Latent:
        """What the features extractors make of observations [*leading, ...]."""
        features = self.extract_features(map_tensors(lambda x: x.flatten(0, len(leading) - 1), obs))
        actor, critic = features if isinstance(features, tuple) else (features, features)
        return map_tensors(lambda x: x.view(*leading, -1), Latent(actor, critic))

    def watch(self, obs: PyTorchObs, *, padded: bool = False) -> None:
        """Show observations [B, ...] that were trained on to the encoders that keep a mean of them.

        A3C calls this once for every batch of rollouts; see also `ncrl.sb3.regularise`. With
        `padded`, images of zeros are left out: RecurrentPPO fills short sequences up with them.
        """
        means = [part for part in self.modules() if isinstance(part, MeanImage)]
        if means:
            images = preprocess_obs(obs, self.observation_space, self.normalize_images)
            assert isinstance(images, Tensor)  # an AtariEncoder reads no dicts
            images = images[images.flatten(1).any(1)] if padded else images
            for mean in means:
                mean.watch(images)

    def encode(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Latent, LstmState]:
        """`unroll` for one observation each: obs [B, ...] -> latents [B, ...], next state."""
        obs = map_tensors(lambda x: x.unsqueeze(0), obs)
        latent, lstm_state = self.unroll(obs, lstm_state, episode_start[None])
        return map_tensors(lambda x: x[0], latent), lstm_state

    def distribution(self, latent: Latent) -> Distribution:
        """The distribution of actions for latents [B, ...]."""
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(latent.actor))

    def values(self, latent: Latent) -> Tensor:
        """Values [..., 1] for latents [..., width]."""
        values: Tensor = self.value_net(self.mlp_extractor.forward_critic(latent.critic))
        return values

    def act(self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor) -> Step:
        """Sample one action per environment: obs [B, ...], the state before, starts [B] bool."""
        latent, lstm_state = self.encode(obs, lstm_state, episode_start)
        distribution = self.distribution(latent)
        actions = distribution.get_actions()
        log_prob = distribution.log_prob(actions)
        actions = actions.reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        return Step(actions, log_prob, lstm_state, latent)

    def evaluate_rollout(
        self, obs: PyTorchObs, actions: Tensor, lstm_state: LstmState, episode_start: Tensor
    ) -> RolloutEvaluation:
        """Evaluate actions [T, B, ...] under the current weights: obs [T + 1, B, ...], the state
        before row 0, episode_start [T + 1, B] bool."""
        latent, state = self.unroll(obs, lstm_state, episode_start)
        leading = actions.shape[:2]
        distribution = self.distribution(map_tensors(lambda x: x[:-1].flatten(0, 1), latent))
        actions = actions.flatten(0, 1)  # [T * B, ...]
        if isinstance(self.action_space, (spaces.Box, spaces.MultiBinary)):
            actions = actions.flatten(1).float()  # SB3's distributions are over vectors
        log_prob = distribution.log_prob(actions)
        entropy = distribution.entropy()
        if entropy is None:  # squashed Gaussians have none; SB3 estimates it like this
            entropy = -log_prob
        critic = self.mlp_extractor.forward_critic(latent.critic)
        has_int = hasattr(self, "value_net_int")
        return RolloutEvaluation(
            values=self.value_net(critic).squeeze(-1),
            int_values=self.value_net_int(critic).squeeze(-1) if has_int else None,
            log_prob=log_prob.view(leading),
            entropy=entropy.view(leading),
            latent=latent,
            lstm_state=state,
        )

    def obs_to_tensor(
        self, observation: np.ndarray | dict[str, np.ndarray]
    ) -> tuple[PyTorchObs, bool]:
        """As in SB3; ValueError for an observation that is not what the observation space says."""
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
        """As in SB3; ValueError for observations that the extractor cannot read."""
        check_extractor(self)
        extractor = super().make_features_extractor()
        shape = self.observation_space.shape
        if any(isinstance(m, MeanImage) and m.mean.shape != shape for m in extractor.modules()):
            raise ValueError(
                f"{type(extractor).__name__} shows an AtariEncoder parts of observations, and the "
                "mean image is that of whole ones: make it with standardize=False"
            )
        # SB3 counts the features of MultiDiscrete with numpy's integers, which nn.LSTM refuses.
        extractor._features_dim = int(extractor.features_dim)
        return extractor


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The function of a tensor, or of every tensor in dicts, tuples and named tuples.

    It is called once for a tensor that is there twice; None stays None.
    """
    results: dict[int, Any] = {}

    def of(part: Any) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in results:
                results[id(part)] = function(part)
            return results[id(part)]
        if isinstance(part, dict):
            return {name: of(entry) for name, entry in part.items()}
        if isinstance(part, tuple):
            entries = map(of, part)
            return part._make(entries) if hasattr(part, "_make") else tuple(entries)
        assert part is None, f"expected tensors, got {type(part).__name__}"
        return None

    mapped: Tree = of(tree)
    return mapped


def check_observation(observation: Any, space: spaces.Space[Any]) -> None:
    """Raise ValueError, in the user's words, unless it is an observation or a batch of them."""
    if isinstance(observation, tuple):
        raise ValueError(
            "the observation is a tuple: Gymnasium's env.reset() returns (observation, info), and "
            "only the first of them is for predict()"
        )
    if isinstance(observation, dict) != isinstance(space, spaces.Dict):
        kind = type(observation).__name__
        raise ValueError(
            f"the observation is a {kind}, but this policy was made for {_line(space)}"
        )
    if not isinstance(space, spaces.Dict):
        _check_values("the observation", observation, space)
        return
    for name in observation:
        if name not in space.spaces:
            hint = suggest(str(name), space)
            raise ValueError(f"unknown entry {name!r} of the observation; {hint}")
    for name, part in space.spaces.items():
        if name not in observation:
            raise ValueError(f"the observation lacks {name!r}")
        _check_values(f"the entry {name!r} of the observation", observation[name], part)


def _check_values(what: str, value: Any, space: spaces.Space[Any]) -> None:
    array, line = as_numbers(what, value), _line(space)
    if array.dtype.kind == "f" and is_image_space(space):  # which SB3 would divide by 255
        raise ValueError(f"{what} has dtype {array.dtype}, expected {space.dtype} of {line}")
    if isinstance(space, spaces.Box) and array.ndim - len(space.shape) not in (0, 1):
        raise ValueError(f"{what} has shape {array.shape}, expected {space.shape} or a batch of it")
    if array.size == 0:
        raise ValueError(f"{what} is empty, with shape {array.shape}; expected one of {line}")
    if isinstance(space, spaces.Discrete):
        is_inside = (array >= 0) & (array < space.n)
    elif isinstance(space, spaces.MultiDiscrete) and array.shape[-1:] == space.nvec.shape:
        is_inside = (array >= 0) & (array < space.nvec)
    else:
        is_inside = np.isfinite(array)
    if not is_inside.all():
        index = tuple(np.argwhere(~is_inside)[0].tolist())
        raise ValueError(f"{what} is {array[index]} at index {index}, expected one of {line}")


def as_numbers(what: str, value: Any) -> np.ndarray:
    """The value as an array of numbers, or ValueError."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{what} is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} has dtype {array.dtype}, expected numbers")
    return array


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Raise ValueError, saying what to do, for the spaces that SB3 fails at, or plays wrongly."""
    found: list[tuple[str, Any]] = [("actions", action_space)]
    if isinstance(observation_space, spaces.Dict) and len(observation_space):
        found += [("observations", part) for part in observation_space.values()]
    else:
        found.append(("observations", observation_space))
    for role, space in found:
        if advice := _fault_of_space(space, role == "actions"):
            raise ValueError(f"spaces such as {_line(space)} are not supported as {role}: {advice}")


def _fault_of_space(space: Any, is_action: bool) -> str | None:
    """What to do instead of giving this space, if it is not supported."""
    if not isinstance(space, SUPPORTED):
        more = "" if is_action else ", or a Dict of at least one of them"
        return f"use Box, Discrete, MultiDiscrete or MultiBinary{more}"
    if np.any(getattr(space, "start", 0)):
        return "count from 0 and add the start in a wrapper, such as TransformAction"
    if isinstance(space, spaces.Box):
        if 0 in (space.shape or (0,)):
            return "a Box needs at least one number, in shape (1,)"
        if is_action and space.dtype.kind != "f":
            return "a Box of integers is a MultiDiscrete"
        if is_action and not space.is_bounded():
            return "the bounds must be finite, such as -1 and 1"
    elif (isinstance(space, spaces.MultiDiscrete) or is_action) and len(space.shape or ()) > 1:
        return "flatten it to one dimension"
    return None


def check_extractor(policy: ActorCriticPolicy) -> None:
    """Raise ValueError, naming the policy to use, for what its extractor cannot read."""
    kind, space = policy.features_extractor_class, policy.observation_space
    if kind not in READS:
        return
    family, needed = READS[kind]
    if kind is AtariEncoder:
        is_image = isinstance(space, spaces.Box) and len(space.shape) == 3
    else:
        normalized = policy.features_extractor_kwargs.get("normalized_image", False)
        is_image = is_image_space(space, check_channels=False, normalized_image=normalized)
    is_dict = isinstance(space, spaces.Dict)
    # Images can be read as vectors too.
    if not {"Cnn": is_image, "MultiInput": is_dict, "Mlp": not is_dict}[family]:
        name = type(policy).__name__
        other = "MultiInput" if is_dict else "Cnn" if is_image else "Mlp"
        other = re.sub("MultiInput|Cnn|Mlp", other, name)
        way_out = f"use {other}"
        if other == name:  # it was given another extractor, or has a name of its own
            name += f" with features_extractor_class={kind.__name__}"
            way_out = "give another features_extractor_class"
        raise ValueError(f"{name} needs {needed}, got {_line(space)}; {way_out}")
    if kind in (NatureCNN, CombinedExtractor):
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
