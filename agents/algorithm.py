"""What Stable-Baselines3 asks of an algorithm besides learning, for `ncrl.agents.A3C`.

Environments that workers or this process build, predicting, saving and loading without code,
callbacks and logs.
"""

from __future__ import annotations

import io
import pathlib
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from ncrl.agents import curves
from ncrl.agents.arguments import (
    check_serial,
    check_workers,
    policy_options,
    tell_meaning,
    warn_of_frequencies,
)
from ncrl.agents.defaults import DEFAULT_ENVS
from ncrl.agents.learning.exploration import Exploration, make_exploration
from ncrl.agents.learning.intrinsic import IntrinsicReward
from ncrl.agents.learning.learner import Learner
from ncrl.agents.loading import load_model, write_model
from ncrl.agents.playing import env_sources, sizes
from ncrl.agents.playing.buffers import Batch, RolloutShape
from ncrl.agents.playing.collector import Collector, Outcome
from ncrl.agents.playing.env_sources import EnvFactory, RecordedEnv, RemoteEnvs
from ncrl.agents.playing.players import Player
from ncrl.agents.playing.supervision import Pool
from ncrl.agents.playing.weights import SharedWeights
from ncrl.agents.playing.worker import PolicySpec
from ncrl.agents.profiling import Profile
from ncrl.checks import suggest, whole_number
from ncrl.sb3 import EnginePolicy
from ncrl.sb3.registry import POLICIES

FORGOTTEN_AFTER = 10
"""Predictions in a row without a state after which a policy with memory warns."""

NOT_SAVED = (
    *("env_factory", "learner", "collector", "profile", "time_spent", "cluster"),
    *("_batch", "_pool", "_stateless_predictions", "_warned_of_state", "_started"),
    "_warns_of_frequencies",
)
"""Attributes that `_setup_model` makes anew, or that no file should hold."""

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="EngineAlgorithm")


class EngineAlgorithm(OnPolicyAlgorithm):
    """An on-policy algorithm whose policy is an `EnginePolicy` and whose environments may be an id
    or a factory; see `A3C`, which sets the attributes."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**POLICIES}

    intrinsic_reward: str | IntrinsicReward | None
    int_coef: float
    int_gamma: float
    intrinsic_kwargs: dict[str, Any]
    batch_size: int | None
    n_workers: int
    cluster: str | None
    games_seed: int
    frames_per_timestep: int
    best_score: float
    """The best score of all whole games; -inf before the first."""
    first_scored_at: int
    """Timesteps played when the first game with a score above 0 ended; -1 before."""
    env_factory: EnvFactory | None
    learner: Learner
    time_spent: Profile | None
    """Where the time of all calls of `learn` went, if it is measured."""
    _warns_of_frequencies: bool
    """Whether to call `warn_of_frequencies`: for users who leave the number of environments to A3C,
    but not where a model is loaded."""
    _small_updates: bool
    _stateless_predictions: int
    _warned_of_state: bool

    @property  # type: ignore[override]
    def policy(self) -> EnginePolicy:
        """What learns and plays; another one, such as a compiled one, may be put in its place."""
        return self.learner.policy

    @policy.setter
    def policy(self, policy: EnginePolicy) -> None:
        self.learner.policy = policy

    @property
    def exploration(self) -> Exploration | None:
        """The intrinsic reward and what belongs to it, if there is one."""
        return self.learner.exploration

    @property
    def envs_per_update(self) -> int:
        """Environments whose rollouts make one update."""
        if self.batch_size is not None:
            return self.batch_size // self.n_steps
        if self._small_updates:
            has_gpu, explores = self.device.type == "cuda", self.exploration is not None
            return sizes.envs_per_update(self.n_envs, has_gpu=has_gpu, explores=explores)
        return self.n_envs

    @property
    def next_games_seed(self) -> int:
        """Seed of games that start now, other than those of games played before. It grows with the
        updates, since `num_timesteps` may have been set back to 0."""
        return self.games_seed + 7_919 * self._n_updates

    # What it is built from.

    def _make_exploration(self) -> Exploration | None:
        if self.intrinsic_reward is None:
            return None
        return make_exploration(
            self.intrinsic_reward,
            self.observation_space,
            n_envs=self.n_envs,
            n_steps=self.n_steps,
            int_gamma=self.int_gamma,
            gamma=self.gamma,
            seed=self.games_seed,
            options=self.intrinsic_kwargs,
        ).to(self.device)

    def _policy_spec(self) -> PolicySpec:
        """What the policy is built from."""
        return PolicySpec(
            self.policy_class,  # type: ignore[arg-type]
            self.observation_space,
            self.action_space,
            policy_options(vars(self)),
            self.sde_sample_freq,
        )

    # Environments.

    def _take_env(
        self,
        env: GymEnv | str | EnvFactory | None,
        n_workers: int | None,
        n_envs: int | None,
        verbose: int,
    ) -> GymEnv | None:
        """Decide who plays `env`, from the constructor's arguments; returns what SB3 has for it."""
        if not env_sources.is_factory(env):
            env_sources.check_object(env)
            check_serial(n_workers or 0, n_envs, env)
            return env  # type: ignore[return-value]
        n_envs = whole_number("n_envs", DEFAULT_ENVS if n_envs is None else n_envs)
        if n_workers is None:
            n_workers = sizes.default_workers(n_envs, self.cluster)
        self.n_workers = n_workers
        self.env_factory = env_sources.as_factory(env)  # type: ignore[arg-type]
        tell_meaning(env, self.env_factory, verbose)
        return self._played_by(self.env_factory, n_envs, self.games_seed)

    def _played_by(self, factory: EnvFactory, n_envs: int, seed: int) -> VecEnv:
        """What SB3 has as environment: one of this process, or a stand-in for those of workers."""
        check_workers(self.n_workers, n_envs)
        if self.n_workers:
            return RemoteEnvs(factory, n_envs)
        return RecordedEnv(env_sources.build(factory, n_envs, seed), seed)

    def set_env(self, env: GymEnv | str | EnvFactory, force_reset: bool = True) -> None:
        """As in SB3; also takes an id or a factory, which is played as before, by workers or not.

        An environment object is played in this process from now on, unless it is the model's own.
        """
        factory, n_workers = self.env_factory, self.n_workers
        if env_sources.is_factory(env):
            factory = env_sources.as_factory(env)  # type: ignore[arg-type]
            env = self._played_by(factory, self.n_envs, self.next_games_seed)
            force_reset = True  # it was never reset
        elif env is not self.env:
            env_sources.check_object(env)
            factory, n_workers = None, 0
        super().set_env(env, force_reset)  # type: ignore[arg-type]
        self.env_factory, self.n_workers = factory, n_workers

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in SB3, and seed the games that workers start from now on."""
        super().set_random_seed(seed)
        if seed is not None:
            self.games_seed = seed

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            hint = suggest(policy_name, self.policy_aliases)
            raise ValueError(f"unknown policy {policy_name!r}; {hint}")
        return self.policy_aliases[policy_name]

    # Predicting, saving and loading.

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions and the next state, as in SB3.

        A policy with memory remembers through the state alone: hand in the one that the call before
        returned, and `episode_start` true where a new episode has begun. Without a state every
        observation is taken for the first of its episode.

        Warns:
            UserWarning: once, when states seem to be forgotten.
        """
        forgotten = state is None and episode_start is None and self.policy.state_shape[0] > 0
        self._stateless_predictions = self._stateless_predictions + 1 if forgotten else 0
        if self._stateless_predictions == FORGOTTEN_AFTER and not self._warned_of_state:
            self._warned_of_state = True
            warnings.warn(
                f"predict() was called {FORGOTTEN_AFTER} times in a row without a state: a policy "
                "with an LSTM then remembers nothing. Carry it over: action, state = "
                "model.predict(obs, state, episode_start)",
                stacklevel=2,
            )
        return super().predict(observation, state, episode_start, deterministic)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | EnvFactory | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trust: bool = False,
        known: Iterable[type] = (),
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """As in SB3, seeds included, but no code of the file is run.

        Arguments that are not explained here are SB3's.

        Args:
            env: may also be an id or a factory, as in the constructor.
            trust: read like SB3, which runs whatever code the file carries.
            known: classes of yours that the file may name, such as a features extractor, besides
                those of ncrl, SB3 and torch. Those that your program has imported are known, but
                for those that were part of the script itself which saved.
            kwargs: attributes to set in place of the saved ones.

        Raises:
            ValueError: in one line, for a file that is damaged or no saved A3C, and without `trust`
                for one with a field that only code could restore, such as a lambda.
        """
        options = {"device": device, "print_system_info": print_system_info}
        options |= {"force_reset": force_reset, **kwargs}
        return load_model(
            cls, super().load, path, env, options, custom_objects, trust=trust, known=known
        )

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As in SB3, whose own loader reads it too; `load` then needs no code of the file.

        Warns:
            UserWarning: for what `load` will need `known`, `custom_objects` or `trust` for.
        """
        zipped = io.BytesIO()
        if self.exploration is not None:
            self.exploration.memory.games_go_on = not self.n_workers
        super().save(zipped, exclude, include)
        write_model(self, zipped.getvalue(), path)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, *(["exploration"] if self.exploration is not None else [])], variables

    # Training, callbacks and logs.

    def _start_anew(self) -> None:
        """Set what no file holds to what it is before the first training."""
        self.collector: Collector | None = None
        """Where the games stand that this process plays."""
        self._pool: Pool[Any] | None = None
        self._stop_requested = False
        self._dumped_at = -1
        self._started = time.monotonic_ns()
        self._stateless_predictions, self._warned_of_state = 0, False

    def _make_collector(self) -> Collector:
        """A collector that goes on where the games stand, unless SB3 has started them anew."""
        before, env = self.collector, self.env
        assert env is not None
        going_on: dict[str, Any] = {}
        # SB3 replaces `_last_episode_starts` where a training starts anew. `_last_obs` would not
        # tell: a reset of `VecFrameStack` returns the same array that it showed last.
        if before is not None and before.episode_start is self._last_episode_starts:
            going_on = {"episode_start": before.episode_start, "lstm_state": before.lstm_state}
        return Collector(
            env,
            self.policy,
            self._last_obs,
            **going_on,
            sde_sample_freq=self.sde_sample_freq,
            with_values=True,
            stopwatch=self.learner.stopwatch,
        )

    def _collect(self, player: Player, n_steps: int, callback: BaseCallback) -> Batch | None:
        """A batch of `n_steps` timesteps in every environment; None if a callback said stop."""
        batch = None
        try:
            batch = player.collect(n_steps, lambda outcome: self._after_row(callback, outcome))
        finally:  # after Ctrl-C in a notebook too, training goes on where the games stand
            if self.collector is not None and not self.n_workers:
                self._last_obs = self.collector.obs
                self._last_episode_starts = self.collector.episode_start
            if batch is None and self.exploration is not None:
                self.exploration.memory.forget_recent()
        if self.policy.use_sde and self.n_workers:  # else `predict` has noise of the first weights
            self.policy.reset_noise()
        if batch is not None:
            self.policy_lag = curves.record_lag(self.logger, batch.lags)
        return batch

    def check_machine(self) -> None:
        """Raise ValueError if shared memory or open files do not suffice for the workers.

        Those of a cluster need neither.
        """
        if self.n_workers and self.cluster is None:
            rollout = self._rollout_shape(self.n_envs // self.n_workers).nbytes
            slots = sizes.SLOTS_PER_WORKER * self.n_workers * rollout
            sizes.check_shared_memory(slots + SharedWeights.bytes_for(self.policy))
            sizes.check_open_files(self.n_workers)

    def _rollout_shape(self, n_envs: int) -> RolloutShape:
        spaces = self.observation_space, self.action_space
        return RolloutShape(self.n_steps, n_envs, *spaces, *self.policy.state_shape)

    def request_stop(self) -> None:
        """Let `learn`, or the next call of it, return after the update it is in.

        Safe to call from a signal handler.
        """
        self._stop_requested = True

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError(
                "there is no environment to learn in: give one to load(path, env=...) or set_env"
            )
        has_head = hasattr(self.policy, "value_net_int")
        if self.exploration is not None and bool(self.int_coef) != has_head:
            raise ValueError(
                f"int_coef was set to {self.int_coef:g}, but the policy was made "
                f"{'with' if has_head else 'without'} a value head for the bonus; "
                "give int_coef to A3C(...)"
            )
        is_remote = isinstance(self.env, RemoteEnvs) and self.n_workers
        with self.env.resting() if is_remote else nullcontext():  # type: ignore[attr-defined]
            return super()._setup_learn(*args, **kwargs)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self.env_factory is None:
            return super()._init_callback(callback, progress_bar)
        with warnings.catch_warnings():
            # What `EvalCallback` compares its environment with is a stand-in of ours.
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
            made = super()._init_callback(callback, progress_bar)
        if self._warns_of_frequencies:
            warn_of_frequencies(made, self.n_envs)
        return made

    def _after_row(self, callback: BaseCallback, outcome: Outcome) -> bool:
        """SB3's bookkeeping for one row of `n_envs` timesteps."""
        self.num_timesteps += int(self.n_envs)  # it may be numpy's; files hold plain numbers
        seen = outcome._asdict() | {"self": self, "env": self.env}
        seen |= {"n_steps": outcome.row, "n_rollout_steps": self.n_steps}
        with self.learner.stopwatch.phase("callbacks"):
            callback.update_locals(seen)
            if not callback.on_step():
                return False
            self._update_info_buffer(outcome.infos, outcome.dones)
            self._note_scores(outcome.infos)
        return True

    def _note_scores(self, infos: list[dict[str, Any]]) -> None:
        """Keep the best score of all games, and when the first of them had any."""
        for game in curves.ended_games(infos):
            score = float(game["r"])
            self.best_score = max(self.best_score, score)
            if score > 0 and self.first_scored_at < 0:
                self.first_scored_at = self.num_timesteps

    def dump_logs(self, iteration: int = 0) -> None:
        """Write SB3's log keys, and those that only this toolkit has, once per timestep."""
        if self._dumped_at == self.num_timesteps:
            return
        self._dumped_at = self.num_timesteps
        frames = self.frames_per_timestep
        self.logger.record("time/frames", self.num_timesteps * frames)
        curves.record_scores(
            self.logger, self.ep_info_buffer or (), self.best_score, self.first_scored_at * frames
        )
        if self.ep_info_buffer:
            # TensorBoard sorts its sections by name: this is the first one.
            score = safe_mean([episode["r"] for episode in self.ep_info_buffer])
            elsewhere = ("stdout", "log", "json", "csv")
            self.logger.record("game/score", score, exclude=elsewhere)
        if self._pool is not None:
            self.logger.record("time/worker_restarts", self._pool.worker_restarts)
            self.logger.record("time/env_restarts", self._pool.env_restarts)
        if (log_std := getattr(self.policy, "log_std", None)) is not None:
            self.logger.record("train/std", log_std.exp().mean().item())
        if self.time_spent is not None:
            for key, share in self.time_spent.shares().items():
                self.logger.record(f"profile/{key}", share)
        curves.record_heads(self.logger, self.policy, self.learner.latent)
        # SB3 asks the clock of the day, which may be set back.
        self.start_time = time.time_ns() - (time.monotonic_ns() - self._started)
        super().dump_logs(iteration)
