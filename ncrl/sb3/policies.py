"""SB3 policies with heads of choice: without memory for A2C and PPO, with an LSTM for sb3-contrib's
RecurrentPPO; `ncrl.agents.A3C` takes all of them.

Shapes: T timesteps, B environments, L LSTM layers, h LSTM width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from ncrl.networks import AtariEncoder, LstmState, VectorEncoder, unroll_lstm
from ncrl.sb3.engine import EnginePolicy, Latent, as_numbers
from ncrl.sb3.heads import ChosenHeads
from ncrl.sb3.regularise import Evaluation, regularised


class FeedForwardPolicy(EnginePolicy, ChosenHeads):
    """What the policies without memory have in common; one of SB3's has to follow."""

    head = "linear"

    @regularised
    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> Evaluation:
        """Values [B, 1], log-probabilities [B] and entropy [B], as in SB3."""
        return super().evaluate_actions(obs, actions)


class MlpPolicy(FeedForwardPolicy, ActorCriticPolicy):
    """SB3's `MlpPolicy`, with further arguments: those of `ncrl.sb3.heads.ChosenHeads`."""


class CnnPolicy(FeedForwardPolicy, ActorCriticCnnPolicy):
    """SB3's `CnnPolicy`, likewise."""


class MultiInputPolicy(FeedForwardPolicy, MultiInputActorCriticPolicy):
    """SB3's `MultiInputPolicy`, for Dict observations, likewise."""


class NeurocoderMlpPolicy(MlpPolicy):
    """`MlpPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderCnnPolicy(CnnPolicy):
    """`CnnPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderMultiInputPolicy(MultiInputPolicy):
    """`MultiInputPolicy` with Neurocoder heads."""

    head = "neurocoder"


class LstmPolicy(EnginePolicy, ChosenHeads, RecurrentActorCriticPolicy):
    """An LSTM between features and heads.

    Differs from sb3-contrib's policies in three ways. Encoder and LSTM are shared by actor and
    critic unless asked otherwise, and the gradients of both flow into them: sb3-contrib cuts the
    critic's off. The LSTM runs over whole rollouts (`ncrl.networks.unroll_lstm`). The heads sit
    directly on it unless `net_arch` puts layers between.

    Args:
        args, kwargs: those of `ncrl.sb3.heads.ChosenHeads` and `RecurrentActorCriticPolicy`.
        shared_lstm: one LSTM for actor and critic. The default, unless `enable_critic_lstm` is
            given or `share_features_extractor` is False.
        enable_critic_lstm: another LSTM for the critic. With neither it has no memory.
    """

    head = "linear"
    extractor: type[BaseFeaturesExtractor] | None = None
    """In place of SB3's, where `features_extractor_class` is not given."""

    def __init__(
        self,
        *args: Any,
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
                f" got {enable_critic_lstm=} and {share_features_extractor=}"
            )
        if self.extractor is not None:
            kwargs.setdefault("features_extractor_class", self.extractor)
        if len(args) < 4 and kwargs.get("net_arch") is None:
            kwargs["net_arch"] = []
        super().__init__(
            *args,
            shared_lstm=shared_lstm,
            enable_critic_lstm=enable_critic_lstm,
            share_features_extractor=share_features_extractor,
            **kwargs,
        )

    # The engine's interface: time-major, one network pass for actor and critic.

    @property
    def state_shape(self) -> tuple[int, int]:
        """(L, h) of the state; layers of the critic's own LSTM, if it has one, come last."""
        layers, _, width = self.lstm_hidden_state_shape
        return (layers if self.lstm_critic is None else 2 * layers), width

    def unroll(
        self, obs: PyTorchObs, lstm_state: LstmState, episode_start: Tensor
    ) -> tuple[Latent, LstmState]:
        """Encoder and LSTM: obs [T, B, ...] -> latents [T, B, h], next state."""
        run = partial(unroll_lstm, episode_start=episode_start)
        states = RNNStates(lstm_state, lstm_state)
        if self.lstm_critic is not None:
            halves = [part.chunk(2) for part in lstm_state]  # ([L, B, h], [L, B, h]) twice
            states = RNNStates(*zip(*halves, strict=True))
        latent, (pi, vf) = self._remember(self.features(obs, episode_start.shape), states, run)
        if self.lstm_critic is None:
            return latent, pi
        return latent, (torch.cat([pi[0], vf[0]]), torch.cat([pi[1], vf[1]]))

    def _remember(
        self, features: Latent, states: RNNStates, run: Callable[..., tuple[Tensor, LstmState]]
    ) -> tuple[Latent, tuple[LstmState, LstmState]]:
        """What the LSTMs make of features; `run` is one of them over one or more timesteps."""
        actor, pi = run(self.lstm_actor, features.actor, states.pi)
        if self.lstm_critic is not None:
            critic, vf = run(self.lstm_critic, features.critic, states.vf)
            return Latent(actor, critic), (pi, vf)
        critic = actor if self.critic is None else self.critic(features.critic)
        return Latent(actor, critic), (pi, pi)

    # sb3-contrib's interface, batch-major.

    def forward(  # type: ignore[override]
        self,
        obs: PyTorchObs,
        lstm_states: RNNStates | None = None,
        episode_starts: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, RNNStates]:
        """Actions, values, log-probabilities and next states, as in sb3-contrib.

        Raises TypeError without states or starts, as PPO and A2C call it.
        """
        if lstm_states is None or episode_starts is None:
            raise TypeError(
                f"{type(self).__name__} has an LSTM, but was called without its state: PPO and A2C "
                "cannot train it; use sb3_contrib.RecurrentPPO or ncrl.agents.A3C, or a policy "
                "without Lstm in its name"
            )
        return super().forward(obs, lstm_states, episode_starts, deterministic)  # type: ignore[arg-type]

    @regularised
    def evaluate_actions(  # type: ignore[override]
        self, obs: Tensor, actions: Tensor, lstm_states: RNNStates, episode_starts: Tensor
    ) -> Evaluation:
        """Values, log-probabilities and entropy, as in sb3-contrib, with the critic's gradient."""
        if isinstance(self.action_space, spaces.MultiBinary):
            actions = actions.float()  # from int8, which its distribution does not take

        def run(lstm: nn.LSTM, features: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
            return self._process_sequence(features, state, episode_starts, lstm)

        latent, _ = self._remember(self.features(obs, episode_starts.shape), lstm_states, run)
        distribution = self.distribution(latent)
        return self.values(latent), distribution.log_prob(actions), distribution.entropy()

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
        """As in sb3-contrib; ValueError for what does not fit."""
        if state is not None:
            if not (isinstance(state, (tuple, list)) and len(state) == 2):
                is_list = isinstance(state, (tuple, list))
                got = f"{len(state)} parts" if is_list else type(state).__name__
                raise ValueError(
                    "the state must be a pair (h, c) as the call of predict() before returned it, "
                    f"or None, got {got}"
                )
            if not all(np.isfinite(as_numbers("the state", part)).all() for part in state):
                raise ValueError("the state must be finite, got NaN or infinity in it")
        if episode_start is not None:
            starts = as_numbers("episode_start", episode_start).reshape(-1)
            if not np.isin(starts, (0, 1)).all():
                raise ValueError(f"episode_start must be truth values, got {episode_start!r}")
            episode_start = starts
        return super().predict(observation, state, episode_start, deterministic)

    def _predict(  # type: ignore[override]
        self,
        observation: PyTorchObs,
        lstm_states: LstmState,
        episode_starts: Tensor,
        deterministic: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `predict` calls; ValueError for memory of another number of observations."""
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
        return super()._get_constructor_parameters() | lstm_arguments(self)


def lstm_arguments(policy: RecurrentActorCriticPolicy) -> dict[str, Any]:
    """What the constructor was given beside SB3's arguments, which sb3-contrib forgets to save."""
    return {
        "lstm_hidden_size": policy.lstm_output_dim,
        "n_lstm_layers": policy.lstm_actor.num_layers,
        "shared_lstm": policy.shared_lstm,
        "enable_critic_lstm": policy.enable_critic_lstm,
        "lstm_kwargs": policy.lstm_kwargs,
    }


class MlpLstmPolicy(LstmPolicy):
    """Vector observations -> tanh layer -> LSTM -> linear heads; arguments of `LstmPolicy`."""

    extractor = VectorEncoder


class CnnLstmPolicy(LstmPolicy):
    """Images -> encoder -> LSTM -> linear heads.

    Args:
        args, kwargs: arguments of `LstmPolicy`.
        encoder: one of `ncrl.networks.ENCODERS`: `a3c`, `nature` or `paper`.
    """

    extractor = AtariEncoder

    def __init__(
        self, *args: Any, encoder: str | None = None, lstm_hidden_size: int = 512, **kwargs: Any
    ) -> None:
        if encoder is not None:
            options = kwargs.get("features_extractor_kwargs") or {}
            kwargs["features_extractor_kwargs"] = options | {"encoder": encoder}
        super().__init__(*args, lstm_hidden_size=lstm_hidden_size, **kwargs)


class MultiInputLstmPolicy(LstmPolicy):
    """Dict observations -> SB3's `CombinedExtractor` -> LSTM -> linear heads, likewise."""

    extractor = CombinedExtractor


class NeurocoderMlpLstmPolicy(MlpLstmPolicy):
    """`MlpLstmPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderCnnLstmPolicy(CnnLstmPolicy):
    """`CnnLstmPolicy` with Neurocoder heads."""

    head = "neurocoder"


class NeurocoderMultiInputLstmPolicy(MultiInputLstmPolicy):
    """`MultiInputLstmPolicy` with Neurocoder heads."""

    head = "neurocoder"
