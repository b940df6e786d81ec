"""What `ncrl.agents.A3C` asks of a policy: SB3's, but over whole rollouts and with a state.

Policies with an LSTM carry their state from step to step; to all others the same interface passes a
state without layers.

Shapes: T timesteps, B environments, L LSTM layers (0 without memory), h LSTM width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from ncrl.networks import AtariEncoder, LstmState
from ncrl.settings import suggest


class Step(NamedTuple):
    """One decision for each of B environments."""

    actions: Tensor
    """[B, ...] in the shape of the action space."""

    log_prob: Tensor
    """Log-probability of each action, [B]."""

    lstm_state: LstmState
    """State after the step."""


class Latent(NamedTuple):
    """What actor and critic read, [..., width]; the same tensor where they share a trunk."""

    actor: Tensor
    critic: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Latent:
        """The function of both, called once where they are the same."""
        actor = function(self.actor)
        return Latent(actor, actor if self.critic is self.actor else function(self.critic))


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
        return Step(actions.reshape(-1, *self._action_shape), log_prob, lstm_state)

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
        return super().obs_to_tensor(observation)


def map_obs(function: Callable[[Tensor], Tensor], obs: PyTorchObs) -> PyTorchObs:
    """The function of an observation, or of every entry of a Dict observation."""
    if isinstance(obs, dict):
        return {name: function(entry) for name, entry in obs.items()}
    return function(obs)


def check_observation(observation: Any, space: spaces.Space[Any]) -> None:
    """What SB3 does not say about a wrong observation, or says in other words than the user's.

    Raises:
        ValueError: for what `env.reset()` of Gymnasium returns, for an array in place of a dict or
            the other way round, and for dicts with other names than the space has.
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
                f"for {space}"
            )
        return
    if not isinstance(observation, dict):
        raise ValueError(
            f"the observation is a {type(observation).__name__}, but this policy was made for "
            f"dicts with {_names(space.spaces)}"
        )
    for name in observation:
        if name not in space.spaces:
            raise ValueError(f"unknown entry {name!r} of the observation; {suggest(name, space)}")
    if missing := [name for name in space.spaces if name not in observation]:
        raise ValueError(f"the observation lacks {_names(missing)}")


def _names(names: Any) -> str:
    return ", ".join(map(repr, names))
