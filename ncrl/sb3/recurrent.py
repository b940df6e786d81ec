"""Policies with an LSTM, for `agents.A3C` and for sb3-contrib's RecurrentPPO.

Shapes: T timesteps, B environments, L LSTM layers, h LSTM width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from ncrl.networks import AtariEncoder, LstmState, VectorEncoder, unroll_lstm
from ncrl.sb3.heads import ChosenHeads
from ncrl.sb3.regularise import Evaluation, regularised


class Step(NamedTuple):
    """One decision for each of B environments."""

    actions: Tensor
    """[B, ...] in the shape of the action space."""

    log_prob: Tensor
    """Log-probability of each action, [B]."""

    lstm_state: LstmState
    """State after the step."""


class RolloutEvaluation(NamedTuple):
    """What the current weights say about a rollout of T actions and T + 1 observations."""

    values: Tensor
    """V(x_t), [T + 1, B]; the last row is the bootstrap value."""

    log_prob: Tensor
    """Log-probability of the actions taken, [T, B]."""

    entropy: Tensor
    """Entropy of the policy, [T, B]."""

    latent: Tensor
    """LSTM output, which the heads read, [T + 1, B, h]."""


class LstmPolicy(ChosenHeads, RecurrentActorCriticPolicy):
    """Encoder and LSTM shared by actor and critic; the gradients of both flow into them.

    Differs from sb3-contrib's policies in that the critic's gradient is not cut off the shared
    LSTM, in the LSTM running over whole rollouts (`ncrl.networks.unroll_lstm`), and in the heads,
    which sit directly on the LSTM unless `net_arch` puts layers between.

    Args:
        observation_space: any but Dict.
        action_space: Discrete, MultiDiscrete, MultiBinary or Box.
        lr_schedule: learning rate by remaining progress.
        net_arch: layers between LSTM and heads, as in SB3; none by default.
        lstm_hidden_size: h.
        n_lstm_layers: L.
        kwargs: `head`, `head_kwargs`, `orth_coef`, `balance_coef` of `ncrl.sb3.heads.ChosenHeads`,
            and further arguments of `RecurrentActorCriticPolicy`.

    Raises:
        ValueError: for an unknown head or option, or for `use_sde`, which reads the inside of a
            linear output layer.
    """

    head = "linear"

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        use_sde: bool = False,
        **kwargs: Any,
    ) -> None:
        if use_sde:
            raise ValueError("use_sde=True is not supported by ncrl's policies; use use_sde=False")
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [] if net_arch is None else net_arch,
            lstm_hidden_size=lstm_hidden_size,
            n_lstm_layers=n_lstm_layers,
            shared_lstm=True,
            enable_critic_lstm=False,
            **kwargs,
        )

    # The engine's interface: time-major, one network pass for actor and critic.

    def initial_state(self, num_envs: int) -> LstmState:
        """Zero LSTM state for `num_envs` environments, [L, B, h] twice."""
        layers, _, width = self.lstm_hidden_state_shape
        zeros = torch.zeros(layers, num_envs, width, device=self.device)
        return zeros, zeros.clone()

    def act(self, obs: Tensor, lstm_state: LstmState, episode_start: Tensor) -> Step:
        """Sample one action per environment.

        Args:
            obs: [B, ...].
            lstm_state: before the step, [L, B, h] twice.
            episode_start: [B] bool.
        """
        latent, lstm_state = self.encode(obs, lstm_state, episode_start)
        distribution = self.distribution(latent)
        actions = distribution.get_actions()
        return Step(actions, distribution.log_prob(actions), lstm_state)

    def evaluate_rollout(
        self, obs: Tensor, actions: Tensor, lstm_state: LstmState, episode_start: Tensor
    ) -> RolloutEvaluation:
        """Evaluate T actions under the current weights.

        Args:
            obs: [T + 1, B, ...].
            actions: [T, B, ...].
            lstm_state: before row 0, [L, B, h] twice.
            episode_start: [T + 1, B] bool.
        """
        latent, _ = self._unroll(obs, lstm_state, episode_start)
        num_steps, num_envs = actions.shape[:2]
        distribution = self.distribution(latent[:-1].flatten(0, 1))
        entropy = distribution.entropy()
        assert entropy is not None  # only squashed Gaussians, which need gSDE, have none
        return RolloutEvaluation(
            values=self.values(latent).squeeze(-1),
            log_prob=distribution.log_prob(actions.flatten(0, 1)).view(num_steps, num_envs),
            entropy=entropy.view(num_steps, num_envs),
            latent=latent,
        )

    def encode(
        self, obs: Tensor, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Tensor, LstmState]:
        """Encoder and LSTM for one observation each: obs [B, ...] -> latent [B, h], next state."""
        latent, lstm_state = self._unroll(obs.unsqueeze(0), lstm_state, episode_start[None])
        return latent[0], lstm_state

    def distribution(self, latent: Tensor) -> Distribution:
        """The policy behind LSTM outputs [B, h]."""
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(latent))

    def values(self, latent: Tensor) -> Tensor:
        """Values [..., 1] behind LSTM outputs [..., h]."""
        values: Tensor = self.value_net(self.mlp_extractor.forward_critic(latent))
        return values

    def _unroll(
        self, obs: Tensor, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Tensor, LstmState]:
        """Encoder and LSTM: obs [T, B, ...] -> latent [T, B, h]."""
        features = self._features(obs.flatten(0, 1))  # [T * B, features]
        features = features.view(*obs.shape[:2], -1)
        return unroll_lstm(self.lstm_actor, features, lstm_state, episode_start)

    def _features(self, obs: PyTorchObs) -> Tensor:
        features: Tensor = super(ActorCriticPolicy, self).extract_features(
            obs, self.features_extractor
        )
        return features

    # sb3-contrib's interface, batch-major, with the critic's gradient kept.

    def forward(  # type: ignore[override]
        self,
        obs: PyTorchObs,
        lstm_states: RNNStates | None = None,
        episode_starts: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, RNNStates]:
        """Actions, values, log-probabilities and next states, as in sb3-contrib.

        Raises:
            TypeError: without states or starts, as PPO and A2C call it.
        """
        if lstm_states is None or episode_starts is None:
            raise TypeError(
                f"{type(self).__name__} has an LSTM, but was called without its state: PPO and A2C "
                "cannot train it; use sb3_contrib.RecurrentPPO or agents.A3C, or a policy without "
                "Lstm in its name"
            )
        latent, state = self._latent(obs, _pair(lstm_states.pi), episode_starts)
        distribution = self.distribution(latent)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        actions = actions.reshape((-1, *self.action_space.shape))  # type: ignore[misc]
        return actions, self.values(latent), log_prob, RNNStates(state, state)

    @regularised
    def evaluate_actions(  # type: ignore[override]
        self, obs: Tensor, actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> Evaluation:
        """Values, log-probabilities and entropy, as in sb3-contrib.

        A gradient through the log-probabilities brings along that of the heads' own losses.
        """
        latent, _ = self._latent(obs, _pair(lstm_states.pi), episode_starts)
        distribution = self.distribution(latent)
        return self.values(latent), distribution.log_prob(actions), distribution.entropy()

    def predict_values(  # type: ignore[override]
        self, obs: PyTorchObs, lstm_states: LstmState, episode_starts: Tensor
    ) -> Tensor:
        """Values [B, 1], as in sb3-contrib."""
        return self.values(self._latent(obs, lstm_states, episode_starts)[0])

    def _latent(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_starts: Tensor
    ) -> tuple[Tensor, LstmState]:
        return self._process_sequence(
            self._features(obs), lstm_state, episode_starts, self.lstm_actor
        )

    @staticmethod
    def _process_sequence(  # type: ignore[override]
        features: Tensor, lstm_states: LstmState, episode_starts: Tensor, lstm: nn.LSTM
    ) -> tuple[Tensor, LstmState]:
        """[B * T, features], sequence by sequence -> [B * T, h]."""
        num_sequences = lstm_states[0].shape[1]
        inputs = features.view(num_sequences, -1, lstm.input_size).transpose(0, 1)
        starts = episode_starts.reshape(num_sequences, -1).transpose(0, 1).bool()
        outputs, state = unroll_lstm(lstm, inputs, lstm_states, starts)
        return outputs.transpose(0, 1).flatten(0, 1), state

    def _get_constructor_parameters(self) -> dict[str, Any]:
        layers, _, width = self.lstm_hidden_state_shape
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": width,
            "n_lstm_layers": layers,
        }


def _pair(state: tuple[Tensor, ...]) -> LstmState:
    h, c = state
    return h, c


class MlpLstmPolicy(LstmPolicy):
    """Vector observations -> tanh layer -> LSTM -> linear heads.

    Args:
        kwargs: arguments of `LstmPolicy`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("features_extractor_class", VectorEncoder)
        super().__init__(*args, **kwargs)


class CnnLstmPolicy(LstmPolicy):
    """Images -> one of `ncrl.networks.ENCODERS` -> LSTM -> linear heads.

    Args:
        encoder: `a3c`, `nature` or `paper`.
        kwargs: further arguments of `LstmPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        encoder: str | None = None,
        lstm_hidden_size: int = 512,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("features_extractor_class", AtariEncoder)
        if encoder is not None:
            options = kwargs.get("features_extractor_kwargs") or {}
            kwargs["features_extractor_kwargs"] = options | {"encoder": encoder}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch,
            lstm_hidden_size=lstm_hidden_size,
            **kwargs,
        )


class NeurocoderMlpLstmPolicy(MlpLstmPolicy):
    """Vector observations -> tanh layer -> LSTM -> Neurocoder heads."""

    head = "neurocoder"


class NeurocoderCnnLstmPolicy(CnnLstmPolicy):
    """Images -> encoder -> LSTM -> Neurocoder heads."""

    head = "neurocoder"
