"""Playing: one vector environment, one policy, one rollout at a time.

The same code runs in a worker process and, without workers, in the learner's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ncrl.agents.playing.buffers import Rollout
from ncrl.agents.profiling import OFF, Stopwatch
from ncrl.networks import LstmState
from ncrl.sb3.engine import EnginePolicy, map_tensors


class NonFiniteError(RuntimeError):
    """Training stopped because the network computes no finite numbers any more."""


class Outcome(NamedTuple):
    """One row of actions, and what the environments answered."""

    row: int
    actions: np.ndarray
    new_obs: Any  # what they show now: [B, ...], or a dict of that; valid until the next rollout
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]
    obs_tensor: PyTorchObs  # what they showed before, [B, ...]; likewise valid until then
    log_probs: Tensor  # of the actions, [B]
    clipped_actions: np.ndarray  # the actions as the environments took them
    values: Tensor | None  # V(obs_tensor), [B, 1], where this process plays


class Collector:
    """Holds where a vector environment stands between rollouts, and plays on from there."""

    def __init__(
        self,
        env: VecEnv,
        policy: EnginePolicy,
        obs: Any,  # what the environments show now
        *,
        episode_start: np.ndarray | None = None,  # [B] bool; by default all episodes begin
        lstm_state: LstmState | None = None,  # by default zero
        sde_sample_freq: int = -1,  # timesteps between new noise of gSDE; -1: once per rollout
        with_values: bool = False,  # whether outcomes tell them; playing does not need them
        stopwatch: Stopwatch = OFF,
    ) -> None:
        self.env, self.policy, self.obs = env, policy, obs
        self.episode_start = (
            np.ones(env.num_envs, dtype=bool) if episode_start is None else episode_start
        )
        self.lstm_state = policy.initial_state(env.num_envs) if lstm_state is None else lstm_state
        self.sde_sample_freq, self.with_values = sde_sample_freq, with_values
        self.stopwatch = stopwatch

    def collect(
        self, rollout: Rollout, n_steps: int, after_step: Callable[[Outcome], bool]
    ) -> bool:
        """Play `n_steps` timesteps into the first rows of `rollout`, which is on the host.

        Returns whether the rollout is complete: `after_step` may end it by returning False.
        ValueError if a reward or observation is not finite; NonFiniteError for probabilities.
        """
        self.policy.set_training_mode(False)
        rollout.lstm_h.copy_(self.lstm_state[0])
        rollout.lstm_c.copy_(self.lstm_state[1])
        _check_finite("observation", self.obs, 0)
        for t in range(n_steps):
            if self.policy.use_sde and (
                t == 0 or (self.sde_sample_freq > 0 and t % self.sde_sample_freq == 0)
            ):
                self.policy.reset_noise(self.env.num_envs)
            with self.stopwatch.phase("copy"):
                self._show(rollout, t)
            if not after_step(self._step(rollout, t)):
                return False
        self._show(rollout, n_steps)
        return True

    def _show(self, rollout: Rollout, t: int) -> None:
        """Copy what the environments show into row t."""
        rollout.episode_start[t] = torch.from_numpy(self.episode_start)
        if isinstance(rollout.obs, dict):
            for name, tensor in rollout.obs.items():
                tensor[t] = torch.from_numpy(self.obs[name])
        else:
            rollout.obs[t] = torch.from_numpy(self.obs)

    @torch.no_grad()
    def _step(self, rollout: Rollout, t: int) -> Outcome:
        """Choose, play and record the actions of row t."""
        device = self.policy.device
        with self.stopwatch.phase("forward"):
            obs = map_tensors(lambda tensor: tensor[t].to(device), rollout.obs)
            try:
                step = self.policy.act(obs, self.lstm_state, rollout.episode_start[t])
            except ValueError as error:
                if "satisfy the constraint" not in str(error):  # as distributions say of parameters
                    raise
                raise NonFiniteError(
                    "the policy computes no finite probabilities any more; a lower learning rate "
                    "or max_grad_norm may help"
                ) from error
            values = self.policy.values(step.latent) if self.with_values else None
        with self.stopwatch.phase("copy"):
            rollout.actions[t] = step.actions
            rollout.log_prob[t] = step.log_prob
        with self.stopwatch.phase("environment"):
            for_env = actions_for_env(self.policy, step.actions)
            new_obs, rewards, dones, infos = self.env.step(for_env)
        self.lstm_state = step.lstm_state
        rewards = np.asarray(rewards, dtype=np.float32)
        _check_finite("reward", rewards, t)
        _check_finite("observation", new_obs, t)
        with self.stopwatch.phase("copy"):
            rollout.rewards[t] = torch.from_numpy(rewards)
            rollout.truncation_value[t] = 0.0
        for i in np.flatnonzero(dones).tolist():
            terminal = infos[i].get("terminal_observation")
            if infos[i].get("TimeLimit.truncated") and terminal is not None:
                _check_finite("observation", terminal, t, env=i)
                with self.stopwatch.phase("forward"):
                    rollout.truncation_value[t, i] = self._value_after(terminal, i)
        self.obs, self.episode_start = new_obs, dones
        # Callbacks may keep them, and the next rollout is played into the same memory.
        actions, log_prob = rollout.actions[t].numpy().copy(), rollout.log_prob[t].clone()
        return Outcome(t, actions, new_obs, rewards, dones, infos, obs, log_prob, for_env, values)

    def _value_after(self, terminal_observation: Any, i: int) -> Tensor:
        """Value of the observation at which environment i was cut off (SB3 issue 633)."""
        typed = _in_type_of(self.policy.observation_space, terminal_observation)
        obs, _ = self.policy.obs_to_tensor(typed)  # [1, ...]
        h, c = self.lstm_state
        state = h[:, i : i + 1].contiguous(), c[:, i : i + 1].contiguous()
        latent, _ = self.policy.encode(obs, state, torch.zeros(1, dtype=torch.bool))
        return self.policy.values(latent).squeeze()


def _in_type_of(space: spaces.Space[Any], obs: Any) -> Any:
    """An observation in the types of its space: SB3's vector environments see to that, but not for
    the last observation of an episode."""
    if isinstance(space, spaces.Dict):
        return {name: np.asarray(obs[name], part.dtype) for name, part in space.items()}
    return np.asarray(obs, space.dtype)


def actions_for_env(policy: EnginePolicy, actions: Tensor) -> np.ndarray:
    """Actions as the environment takes them, in the type of its space: Gaussian samples are clipped
    to the bounds, and those squashed into -1 .. 1 are scaled to them."""
    array: np.ndarray = actions.cpu().numpy()
    space = policy.action_space
    if isinstance(space, spaces.Box):
        squashed, low, high = policy.squash_output, space.low, space.high
        array = policy.unscale_action(array) if squashed else array.clip(low, high)
    return array.astype(space.dtype, copy=False)  # policies draw MultiBinary as floats


def _check_finite(name: str, values: Any, t: int, *, env: int | None = None) -> None:
    """Raise ValueError for the first environment, or for `env` alone, with a NaN or infinity."""
    if isinstance(values, dict):
        for key, entry in values.items():
            _check_finite(f"{name} {key!r}", entry, t, env=env)
        return
    values = np.asarray(values)
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return  # images are integers and cannot be anything but finite
    rows = values.reshape(len(values) if env is None else 1, -1)
    i, column = np.argwhere(~np.isfinite(rows))[0]
    raise ValueError(
        f"environment {i if env is None else env} returned {name} {rows[i, column]} at step {t} of "
        "a rollout"
    )
