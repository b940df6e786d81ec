"""Policies with an LSTM, for `ncrl.agents.A3C` and for sb3-contrib's RecurrentPPO.

Shapes: T timesteps, B environments, L LSTM layers, h LSTM width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from ncrl.networks import AtariEncoder, LstmState, VectorEncoder, unroll_lstm
from ncrl.sb3.engine import EnginePolicy, Latent, check_starts, check_state
from ncrl.sb3.heads import ChosenHeads
from ncrl.sb3.regularise import Evaluation, regularised


class LstmPolicy(EnginePolicy, ChosenHeads, RecurrentActorCriticPolicy):
    """An LSTM between features and heads.

    Differs from sb3-contrib's policies in three ways. Encoder and LSTM are shared by actor and
    critic unless asked otherwise, and the gradients of both flow into them: sb3-contrib cuts the
    critic's off. The LSTM runs over whole rollouts (`ncrl.networks.unroll_lstm`). The heads sit
    directly on it unless `net_arch` puts layers between.

    Args:
        observation_space: what SB3 supports.
        action_space: Discrete, MultiDiscrete, MultiBinary or Box.
        lr_schedule: learning rate by remaining progress.
        net_arch: layers between LSTM and heads, as in SB3; none by default.
        lstm_hidden_size: h.
        n_lstm_layers: L.
        shared_lstm: one LSTM for actor and critic. The default, unless `enable_critic_lstm` is
            given or `share_features_extractor` is False.
        enable_critic_lstm: another LSTM for the critic. Neither of the two: the critic has no
            memory.
        kwargs: `head`, `head_kwargs`, `orth_coef`, `balance_coef` of `ncrl.sb3.heads.ChosenHeads`,
            and further arguments of `RecurrentActorCriticPolicy`.

    Raises:
        ValueError: for an unknown head or option, or for LSTMs that are shared and are not.
    """

    head = "linear"
    extractor: type[BaseFeaturesExtractor] | None = None
    """In place of SB3's, where `features_extractor_class` is not given."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        *,
        lstm_hidden_size: int = 256,
        n_lstm_layers: int = 1,
        shared_lstm: bool | None = None,
        enable_critic_lstm: bool | None = None,
        share_features_extractor: bool = True,
        **kwargs: Any,
    ) -> None:
        if shared_lstm is None:
            shared_lstm = enable_critic_lstm is None and share_features_extractor
        if enable_critic_lstm is None:
            enable_critic_lstm = not shared_lstm
        if shared_lstm and (enable_critic_lstm or not share_features_extractor):
            raise ValueError(
                "shared_lstm=True needs enable_critic_lstm=False and share_features_extractor=True,"
                f" got enable_critic_lstm={enable_critic_lstm} and "
                f"share_features_extractor={share_features_extractor}"
            )
        if self.extractor is not None:
            kwargs.setdefault("features_extractor_class", self.extractor)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            [] if net_arch is None else net_arch,
            lstm_hidden_size=lstm_hidden_size,
            n_lstm_layers=n_lstm_layers,
            shared_lstm=shared_lstm,
            enable_critic_lstm=enable_critic_lstm,
            share_features_extractor=share_features_extractor,
            **kwargs,
        )

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        extractor = super().make_features_extractor()
        # SB3 counts the features of MultiDiscrete with numpy's integers, which nn.LSTM refuses.
        extractor._features_dim = int(extractor.features_dim)
        return extractor

    # The engine's interface: time-major, one network pass for actor and critic.

    @property
    def state_shape(self) -> tuple[int, int]:
        """(L, h) of the state; the critic's LSTM, if it has one, is kept behind the actor's."""
        layers, _, width = self.lstm_hidden_state_shape
        return (layers if self.lstm_critic is None else 2 * layers), width

    def unroll(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Latent, LstmState]:
        """Encoder and LSTM: obs [T, B, ...] -> latents [T, B, h], next state."""

        def run(
            lstm: nn.LSTM, features: Tensor, state: tuple[Tensor, ...]
        ) -> tuple[Tensor, LstmState]:
            return unroll_lstm(lstm, features, _pair(state), episode_start)

        features = self.features(obs, episode_start.shape)
        if self.lstm_critic is None:
            latent, states = self._remember(features, RNNStates(lstm_state, lstm_state), run)
            return latent, _pair(states.pi)
        halves = [part.chunk(2) for part in lstm_state]  # ([L, B, h], [L, B, h]) twice
        states = RNNStates(*zip(*halves, strict=True))
        latent, states = self._remember(features, states, run)
        return latent, _pair(tuple(map(torch.cat, zip(*states, strict=True))))

    def _remember(
        self,
        features: Latent,
        states: RNNStates,
        run: Callable[[nn.LSTM, Tensor, tuple[Tensor, ...]], tuple[Tensor, LstmState]],
    ) -> tuple[Latent, RNNStates]:
        """What the LSTMs make of features; `run` is one of them over one or more timesteps."""
        actor, pi = run(self.lstm_actor, features.actor, states.pi)
        if self.lstm_critic is not None:
            critic, vf = run(self.lstm_critic, features.critic, states.vf)
            return Latent(actor, critic), RNNStates(pi, vf)
        critic = actor if self.critic is None else self.critic(features.critic)
        return Latent(actor, critic), RNNStates(pi, pi)

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
                "cannot train it; use sb3_contrib.RecurrentPPO or ncrl.agents.A3C, or a policy "
                "without Lstm in its name"
            )
        latent, lstm_states = self._latent(obs, lstm_states, episode_starts)
        distribution = self.distribution(latent)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        actions = actions.reshape((-1, *self.action_space.shape))  # type: ignore[misc]
        return actions, self.values(latent), log_prob, lstm_states

    @regularised
    def evaluate_actions(  # type: ignore[override]
        self, obs: Tensor, actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> Evaluation:
        """Values, log-probabilities and entropy, as in sb3-contrib.

        A gradient through the log-probabilities brings along that of the heads' own losses.
        """
        latent, _ = self._latent(obs, lstm_states, episode_starts)
        distribution = self.distribution(latent)
        self.watch_in_training(obs)
        return self.values(latent), distribution.log_prob(actions), distribution.entropy()

    def predict_values(  # type: ignore[override]
        self, obs: PyTorchObs, lstm_states: LstmState, episode_starts: Tensor
    ) -> Tensor:
        """Values [B, 1], as in sb3-contrib."""
        states = RNNStates(lstm_states, lstm_states)
        return self.values(self._latent(obs, states, episode_starts)[0])

    def _latent(
        self, obs: PyTorchObs, lstm_states: RNNStates, episode_starts: Tensor
    ) -> tuple[Latent, RNNStates]:
        def run(
            lstm: nn.LSTM, features: Tensor, state: tuple[Tensor, ...]
        ) -> tuple[Tensor, LstmState]:
            return self._process_sequence(features, _pair(state), episode_starts, lstm)

        return self._remember(self.features(obs, episode_starts.shape), lstm_states, run)

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

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As in sb3-contrib.

        Raises:
            ValueError: for an observation, a state or episode starts that do not fit.
        """
        if state is not None:
            check_state(state)
        if episode_start is not None:
            episode_start = check_starts(episode_start)
        return super().predict(observation, state, episode_start, deterministic)

    def _predict(  # type: ignore[override]
        self,
        observation: PyTorchObs,
        lstm_states: LstmState,
        episode_starts: Tensor,
        deterministic: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `predict` calls, with a state that belongs to the observations.

        Raises:
            ValueError: for a state or episode starts of another number of observations.
        """
        rows = next(iter(observation.values())) if isinstance(observation, dict) else observation
        layers, _, width = self.lstm_hidden_state_shape
        expected = (layers, len(rows), width)
        if any(part.shape != expected for part in lstm_states):
            shapes = " and ".join(str(tuple(part.shape)) for part in lstm_states)
            raise ValueError(
                f"predict() got a state of shapes {shapes} for {len(rows)} observations, expected "
                f"two of {expected}: hand in the state that the call before returned, or None"
            )
        if episode_starts.shape != (len(rows),):
            raise ValueError(
                f"predict() got episode_start of shape {tuple(episode_starts.shape)} for "
                f"{len(rows)} observations, expected ({len(rows)},): one truth value for each"
            )
        return super()._predict(observation, lstm_states, episode_starts, deterministic)  # type: ignore[arg-type]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        layers, _, width = self.lstm_hidden_state_shape
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": width,
            "n_lstm_layers": layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }


def _pair(state: tuple[Tensor, ...]) -> LstmState:
    h, c = state
    return h, c


class MlpLstmPolicy(LstmPolicy):
    """Vector observations -> tanh layer -> LSTM -> linear heads.

    Args:
        kwargs: arguments of `LstmPolicy`.
    """

    extractor = VectorEncoder


class CnnLstmPolicy(LstmPolicy):
    """Images -> one of `ncrl.networks.ENCODERS` -> LSTM -> linear heads.

    Args:
        encoder: `a3c`, `nature` or `paper`.
        kwargs: further arguments of `LstmPolicy`.
    """

    extractor = AtariEncoder

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


class MultiInputLstmPolicy(LstmPolicy):
    """Dict observations -> SB3's `CombinedExtractor` -> LSTM -> linear heads.

    Args:
        kwargs: arguments of `LstmPolicy`.
    """

    extractor = CombinedExtractor


class NeurocoderMlpLstmPolicy(MlpLstmPolicy):
    """Vector observations -> tanh layer -> LSTM -> Neurocoder heads."""

    head = "neurocoder"


class NeurocoderCnnLstmPolicy(CnnLstmPolicy):
    """Images -> encoder -> LSTM -> Neurocoder heads."""

    head = "neurocoder"


class NeurocoderMultiInputLstmPolicy(MultiInputLstmPolicy):
    """Dict observations -> SB3's `CombinedExtractor` -> LSTM -> Neurocoder heads."""

    head = "neurocoder"
