"""`A3C`: asynchronous advantage actor-critic, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import io
import logging
import math
import pathlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from ncrl.agents import arguments
from ncrl.agents.learning.exploration import Exploration, make_exploration
from ncrl.agents.learning.intrinsic import IntrinsicReward
from ncrl.agents.learning.learner import Learner
from ncrl.agents.learning.objective import Objective
from ncrl.agents.learning.optim import optimizer_options
from ncrl.agents.learning.update import Update
from ncrl.agents.playing.buffers import Batch, RolloutShape, RolloutView
from ncrl.agents.playing.collector import Collector, NonFiniteError, Outcome
from ncrl.agents.playing.env_sources import (
    EnvFactory,
    RecordedEnv,
    RemoteEnvs,
    as_factory,
    build,
    check_object,
    fresh_seed,
    is_factory,
)
from ncrl.agents.playing.players import Player, SerialPlayer, WorkersPlayer
from ncrl.agents.playing.pool import Limits, WorkerPool, check_machine, check_memory
from ncrl.agents.playing.sizes import default_workers, learner_threads
from ncrl.agents.playing.weights import SharedWeights
from ncrl.agents.playing.worker import PolicySpec, check_script
from ncrl.agents.runs import curves
from ncrl.agents.runs.loading import load_model, write_model
from ncrl.agents.runs.profiling import OFF, Profile, Stopwatch, stopwatch_for
from ncrl.sb3 import (
    CnnLstmPolicy,
    CnnPolicy,
    EnginePolicy,
    MlpLstmPolicy,
    MlpPolicy,
    MultiInputLstmPolicy,
    MultiInputPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderCnnPolicy,
    NeurocoderMlpLstmPolicy,
    NeurocoderMlpPolicy,
    NeurocoderMultiInputLstmPolicy,
    NeurocoderMultiInputPolicy,
)
from ncrl.settings import suggest

logger = logging.getLogger(__name__)

MAX_SKIPPED_UPDATES = 10
"""Updates in a row whose gradient is not finite before training stops."""

FORGOTTEN_AFTER = 10
"""Predictions in a row without a state after which a policy with memory warns."""

SelfA3C = TypeVar("SelfA3C", bound="A3C")

DEFAULT_ENVS = 16
"""Environments that are built from an id or a factory, unless `n_envs` says otherwise."""

FEW_ENVS = 4
"""Number of environments in this process from which on they are many."""

FEW_STEPS, MANY_STEPS = 5, 20
"""Defaults of `n_steps`. Few environments make small updates, so that there must be more of them:
tiny tasks end before rollouts of 20 have made a hundred."""

FEW_RATE, MANY_RATE = 1e-2, 7e-4
"""Defaults of the learning rate at the start."""

NOT_SAVED = (
    *("env_factory", "learner", "collector", "profile", "time_spent"),
    *("_batch", "_pool", "_stateless_predictions", "_warned_of_state", "_started"),
    "_counts_are_news",
)
"""Attributes that `_setup_model` makes anew, or that no file should hold."""


class A3C(OnPolicyAlgorithm):
    """Actor-critic, with memory or without, played by worker processes and trained by one learner.

    Mnih et al. 2016 ("Asynchronous methods for deep reinforcement learning") for the algorithm and
    its hyper-parameters; Espeholt et al. 2018 ("IMPALA") for the learner and V-trace. Workers play
    on the CPU with weights that are whole versions of the learner's, at most a few updates old.

    Args:
        policy: a name in `policy_aliases` or a subclass of `ncrl.sb3.EnginePolicy`. Those with
            `Lstm` in their name have a memory, those with `Neurocoder` have Neurocoder heads.
        env: where it plays. A factory `factory(n_envs, seed) -> VecEnv` (such as
            `ncrl.envs.atari("Pong")`) or a Gymnasium id is built inside the worker processes. An
            environment object is played in this process, serially and reproducibly.
        learning_rate: a number, or a schedule of the remaining progress; None takes `FEW_RATE` for
            fewer than `FEW_ENVS` environments in this process and `MANY_RATE` for all others, both
            falling linearly to 0.
        n_steps: T, timesteps per rollout; None takes 5 for fewer than `FEW_ENVS` environments in
            this process, and 20 for all others.
        batch_size: timesteps per update, a multiple of `n_steps` that divides `n_steps * n_envs`;
            whole rollouts of some environments. None takes all environments at once.
        gamma: discount.
        gae_lambda: 1 gives n-step returns.
        ent_coef: weight of the entropy.
        vf_coef: weight of the value loss.
        max_grad_norm: limit on the gradient's norm.
        use_rms_prop: RMSProp as in A3C; False takes Adam, as in A2C. Any other optimiser is named
            in `policy_kwargs`, as in SB3: `optimizer_class`, `optimizer_kwargs`.
        rms_prop_eps: epsilon of RMSProp, inside the square root.
        normalize_advantage: give the advantages of every update mean 0 and standard deviation 1.
        orth_coef: weight of the orthogonality loss of Neurocoder layers (paper: a).
        balance_coef: weight of the balance loss of mixtures of experts (`head="moe"`).
        correction: `vtrace`, or `none` for plain returns whatever the age of the rollouts.
        reward_scale: factor on rewards in the loss, before they are clipped. Actor and critic share
            one LSTM: returns far above 1 saturate it.
        reward_clip: limit on rewards in the loss; "env" asks the environment or factory for its
            attribute `reward_clip` (Atari: 1), None does not clip.
        intrinsic_reward: a bonus for what is new, for games whose rewards are rare: `rnd`, `snd`,
            `count`, or an `ncrl.agents.IntrinsicReward` of your own; None for no bonus. It has a
            value head and a discount of its own, and no end of a game cuts its return.
        int_coef: weight of intrinsic advantages, which have deviation 1; 0 for no bonus.
        ext_coef: weight of the others beside them.
        int_gamma: discount of the intrinsic return.
        imitation_coef: weight of rollouts that led to a reward, which are learnt from again beside
            an intrinsic reward; 0 keeps none.
        intrinsic_kwargs: `warmup_timesteps`, `reach` and `capacity` of
            `ncrl.agents.learning.exploration.Exploration`, and options of the bonus, such as `encoder`,
            `learning_rate` and `update_proportion` of `rnd`.
        info_keywords: entries of `info` that callbacks are shown for every timestep of workers; all
            others arrive where a game ends, and everything where this process plays.
        n_workers: worker processes; 0 plays factories and ids in this process too, None takes one
            per core.
        n_envs: environments that are built from an id or a factory, of all workers together; a
            multiple of `n_workers`. None takes 16.
        limits: time-outs and restarts of the workers.
        stats_window_size: whole games that means of scores are taken over.
        tensorboard_log: folder of TensorBoard runs.
        policy_kwargs: further arguments of the policy, such as `head`, `head_kwargs`, `encoder`.
        verbose: 0 nothing, 1 information, 2 debugging.
        seed: of everything; serial runs with equal seeds give bit-equal weights.
        device: of the learner.
        profile: measure where the time of each process goes: curves `profile/<process>/<phase>`,
            and `time_spent.table()`. On CUDA the learner waits for the device at each phase.
        use_sde: explore by noise that depends on the state (gSDE), for continuous actions.
        sde_sample_freq: timesteps between new noise; -1 draws it once per rollout.

    Raises:
        ValueError: for impossible arguments.
        TypeError: for a policy that is no `EnginePolicy`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "MlpLstmPolicy": MlpLstmPolicy,
        "CnnLstmPolicy": CnnLstmPolicy,
        "MultiInputLstmPolicy": MultiInputLstmPolicy,
        "NeurocoderMlpPolicy": NeurocoderMlpPolicy,
        "NeurocoderCnnPolicy": NeurocoderCnnPolicy,
        "NeurocoderMultiInputPolicy": NeurocoderMultiInputPolicy,
        "NeurocoderMlpLstmPolicy": NeurocoderMlpLstmPolicy,
        "NeurocoderCnnLstmPolicy": NeurocoderCnnLstmPolicy,
        "NeurocoderMultiInputLstmPolicy": NeurocoderMultiInputLstmPolicy,
    }

    def __init__(
        self,
        policy: str | type[EnginePolicy],
        env: GymEnv | str | EnvFactory | None,
        learning_rate: float | Schedule | None = None,
        n_steps: int | None = None,
        batch_size: int | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 40.0,
        rms_prop_eps: float = 0.1,
        use_rms_prop: bool = True,
        normalize_advantage: bool = False,
        orth_coef: float = 0.1,
        balance_coef: float = 0.01,
        correction: str = "vtrace",
        reward_scale: float = 1.0,
        reward_clip: float | str | None = "env",
        intrinsic_reward: str | IntrinsicReward | None = None,
        int_coef: float = 0.5,
        ext_coef: float = 2.0,
        int_gamma: float = 0.99,
        imitation_coef: float = 0.1,
        intrinsic_kwargs: dict[str, Any] | None = None,
        info_keywords: Sequence[str] = (),
        n_workers: int | None = None,
        n_envs: int | None = None,
        limits: Limits | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        profile: bool = False,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        _init_setup_model: bool = True,
    ) -> None:
        self.n_workers = 0
        self.profile = profile
        self.limits = limits or Limits()
        self.batch_size = batch_size
        self.orth_coef, self.balance_coef = orth_coef, balance_coef
        self.use_rms_prop, self.rms_prop_eps = use_rms_prop, rms_prop_eps
        self.normalize_advantage = normalize_advantage
        self.correction = correction
        self.reward_scale = reward_scale
        self.intrinsic_reward = None if intrinsic_reward == "none" else intrinsic_reward
        self.int_coef, self.ext_coef, self.int_gamma = int_coef, ext_coef, int_gamma
        self.imitation_coef = imitation_coef
        self.intrinsic_kwargs = intrinsic_kwargs or {}
        self.info_keywords = list(info_keywords)
        self.best_score = -math.inf
        """Of all whole games."""
        self.first_scored_at = -1
        """Timesteps after which the first game with a score above 0 ended."""
        self.games_seed = fresh_seed() if seed is None else seed
        self.env_factory: EnvFactory | None = None
        self._counts_are_news = n_envs is None  # to a user who has named one environment
        played: GymEnv | None
        if is_factory(env):
            n_envs = DEFAULT_ENVS if n_envs is None else n_envs
            self.n_workers = default_workers(n_envs) if n_workers is None else n_workers
            self.env_factory = as_factory(env)  # type: ignore[arg-type]
            arguments.tell_meaning(env, self.env_factory, verbose)
            played = self._played_by(self.env_factory, n_envs)
        else:
            arguments.check_serial(n_workers or 0, env)
            check_object(env)
            played = env  # type: ignore[assignment]
        source = self.env_factory or env
        self.reward_clip: Any = (
            getattr(source, "reward_clip", None) if reward_clip == "env" else reward_clip
        )
        self.frames_per_timestep = int(getattr(source, "frame_skip", 1))
        is_few = not self.n_workers and getattr(played, "num_envs", 1) < FEW_ENVS
        if n_steps is None:
            n_steps = FEW_STEPS if is_few else MANY_STEPS
        if learning_rate is None:
            learning_rate = LinearSchedule(FEW_RATE if is_few else MANY_RATE, 0.0, 1.0)
        super().__init__(
            policy,
            played,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(
                spaces.Box,
                spaces.Discrete,
                spaces.MultiDiscrete,
                spaces.MultiBinary,
            ),
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Build what is not saved, from the attributes alone: `load` calls this too."""
        self._check_arguments()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.time_spent: Profile | None = None
        """Where the time of all calls of `learn` went, if `profile` is set."""
        if self.profile:
            self.time_spent = Profile(stopwatch_for(self.device))
        self.learner = Learner(
            self._policy_spec(of_learner=True).build(self.lr_schedule).to(self.device),
            n_steps=self.n_steps,
            exploration=self._make_exploration(),
            stopwatch=self._stopwatch,
        )
        # The rollout that is played and the batch that is learned from.
        check_memory(2 * self._rollout_shape(self.n_envs).nbytes)
        self._batch: Batch | None = None
        self.collector: Collector | None = None
        """Where the games stand that this process plays."""
        self._pool: WorkerPool | None = None
        self._stop_requested = False
        self._dumped_at = -1
        self._started = time.monotonic_ns()
        self._stateless_predictions = 0
        self._warned_of_state = False
        self.policy_lag = 0.0
        """Mean age, in updates, of the weights behind the latest batch."""
        self._skipped_updates = 0
        self._skipped_in_a_row = 0

    @property
    def policy(self) -> EnginePolicy:  # type: ignore[override]
        """What learns and plays; another one, such as a compiled one, may be put in its place."""
        return self.learner.policy

    @policy.setter
    def policy(self, policy: EnginePolicy) -> None:
        self.learner.policy = policy

    @property
    def exploration(self) -> Exploration | None:
        """The intrinsic reward and what belongs to it, if there is one."""
        return self.learner.exploration

    def _make_exploration(self) -> Exploration | None:
        """With it and without, everything else starts from the same random numbers."""
        if self.intrinsic_reward is None:
            return None
        with torch.random.fork_rng(devices=[]):
            exploration = make_exploration(
                self.intrinsic_reward,
                self.observation_space,
                n_envs=self.n_envs,
                n_steps=self.n_steps,
                int_gamma=self.int_gamma,
                gamma=self.gamma,
                imitation_coef=self.imitation_coef,
                seed=self.games_seed,
                options=self.intrinsic_kwargs,
            )
        return exploration.to(self.device)

    def _policy_spec(self, *, of_learner: bool = False) -> PolicySpec:
        """What the policy is built from, here and in the workers, who need no intrinsic values."""
        options = {"use_sde": self.use_sde, **self.policy_kwargs}
        if of_learner and self.intrinsic_reward is not None and self.int_coef:
            options["int_value"] = True
        options |= optimizer_options(
            self.policy_kwargs, use_rms_prop=self.use_rms_prop, rms_prop_eps=self.rms_prop_eps
        )
        return PolicySpec(
            self.policy_class,  # type: ignore[arg-type]
            self.observation_space,
            self.action_space,
            options,
            self.sde_sample_freq,
        )

    def _played_by(self, factory: EnvFactory, n_envs: int) -> VecEnv:
        """What SB3 takes for the environment of a model whose environments a factory builds."""
        arguments.check_workers(self.n_workers, n_envs)
        if self.n_workers:
            return RemoteEnvs.like(factory, n_envs)
        return RecordedEnv(build(factory, n_envs, self.games_seed))

    def set_env(self, env: GymEnv | str | EnvFactory, force_reset: bool = True) -> None:
        """As in SB3; also takes an id or a factory, which is played as before, by workers or not.

        An environment object is played in this process from now on, unless it is the model's own.
        """
        if is_factory(env):
            self.env_factory = as_factory(env)  # type: ignore[arg-type]
            env = self._played_by(self.env_factory, self.n_envs)
        elif env is not self.env:
            check_object(env)
            self.env_factory, self.n_workers = None, 0
        super().set_env(env, force_reset)  # type: ignore[arg-type]

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
        cls: type[SelfA3C],
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
    ) -> SelfA3C:
        """As in SB3, but no code of the file is run.

        As in SB3, a model that was made with a seed seeds Python, numpy and torch with it again.

        Args:
            path: of the zip, or the zip as an open file.
            env: may also be an id or a factory, as in the constructor.
            device: where the model shall be.
            custom_objects: values by field, in place of those of the file.
            print_system_info: of the computer that saved, and of this one.
            force_reset: whether the environment is reset before training goes on.
            trust: read like SB3, which runs whatever code the file carries.
            known: classes of yours that the file may name, such as a features extractor, besides
                those of ncrl, SB3 and torch. Features extractors and policies that your program has
                already imported are known.
            kwargs: attributes to set in place of the saved ones.

        Raises:
            ValueError: in one line, for a file that is damaged or no saved A3C, and without `trust`
                for one with a field that only code could restore, such as a lambda.
        """
        return load_model(
            cls,
            super().load,
            path,
            env,
            {
                "device": device,
                "print_system_info": print_system_info,
                "force_reset": force_reset,
                **kwargs,
            },
            custom_objects,
            trust=trust,
            known=known,
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
        super().save(zipped, exclude, include)
        write_model(self, zipped.getvalue(), path)

    def _check_arguments(self) -> None:
        self.n_steps = arguments.whole_number("n_steps", self.n_steps)
        arguments.check_numbers(
            self._objective(), self.n_steps, self.max_grad_norm, self.learning_rate
        )
        if self.batch_size is not None:
            self.batch_size = arguments.whole_number("batch_size", self.batch_size)
            arguments.check_batch(self.batch_size, self.n_steps, self.n_envs)
        arguments.check_policy(self.policy_class, self.policy_kwargs, self.use_sde)

    # Learning.

    def learn(
        self: SelfA3C,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 100,
        tb_log_name: str = "A3C",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfA3C:
        """Train until `total_timesteps`, exact to one row of `n_envs` timesteps.

        Callbacks are called once per row, `n_envs` timesteps, also where workers play: in this
        process, as their rollouts arrive.

        Raises:
            WorkerError: if the workers cannot be kept running.
            NonFiniteError: if the gradient stays not finite.
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._dumped_at = -1  # of this training; an earlier one may have ended at any timestep
        self._started = time.monotonic_ns()
        stopwatch = self._stopwatch
        with (
            self._no_stop_remains(),
            learner_threads(self.n_workers),
            stopwatch.phase("setup"),
            self._player() as player,
            stopwatch.phase("other"),
        ):
            with stopwatch.phase("callbacks"):
                callback.on_training_start(locals(), globals())
            iteration = 0
            while self.num_timesteps < total_timesteps and not self._stop_requested:
                rows = math.ceil((total_timesteps - self.num_timesteps) / self.n_envs)
                with stopwatch.phase("callbacks"):
                    callback.on_rollout_start()
                self._batch = self._collect(player, min(rows, self.n_steps), callback)
                if self._batch is None:
                    break
                with stopwatch.phase("callbacks"):
                    rollout_buffer = RolloutView(self._batch.rollout, self.policy)
                    callback.update_locals(locals())
                    callback.on_rollout_end()
                iteration += 1
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self._current_progress_remaining = max(0.0, self._current_progress_remaining)
                self.train()
                with stopwatch.phase("publishing"):
                    player.publish(self.policy)
                if log_interval is not None and iteration % log_interval == 0:
                    with stopwatch.phase("callbacks"):
                        self.dump_logs(iteration)
            with stopwatch.phase("callbacks"):
                callback.on_training_end()
        return self

    @contextmanager
    def _no_stop_remains(self) -> Iterator[None]:
        """A stop is for the training that it was asked for in, whether or not that succeeds."""
        try:
            yield
        finally:
            self._stop_requested = False

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        with (
            self.env.resting()
            if isinstance(self.env, RemoteEnvs) and self.n_workers
            else nullcontext()
        ):
            try:
                return super()._setup_learn(*args, **kwargs)
            except BaseException:
                self._stop_requested = False
                raise

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self.env_factory is None:
            return super()._init_callback(callback, progress_bar)
        with warnings.catch_warnings():
            # What `EvalCallback` compares its environment with is a stand-in of ours.
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
            made = super()._init_callback(callback, progress_bar)
        if self._counts_are_news:
            arguments.warn_of_frequencies(made, self.n_envs)
        return made

    @property
    def envs_per_update(self) -> int:
        """Environments whose rollouts make one update."""
        return self.n_envs if self.batch_size is None else self.batch_size // self.n_steps

    @property
    def _stopwatch(self) -> Stopwatch:
        """The learner's."""
        return OFF if self.time_spent is None else self.time_spent.stopwatch

    def request_stop(self) -> None:
        """Let `learn`, or the next call of it, return after the update it is in.

        Safe to call from a signal handler.
        """
        self._stop_requested = True

    def train(self) -> None:
        """Learn from the rollouts collected last, `batch_size` timesteps at a time."""
        assert self._batch is not None, "train() follows a rollout"
        self._update_learning_rate(self.policy.optimizer)
        num_parts = self.n_envs // self.envs_per_update
        updates = self.learner.learn(
            self._batch, self._objective(), self.max_grad_norm, num_parts=num_parts
        )
        for update in updates:
            self._count(update)
        curves.record_means(self.logger, curves.on_host(self.learner.explored))
        if self.exploration is not None and self.exploration.memory is not None:
            self.logger.record("train/kept_rollouts", len(self.exploration.memory))

    def _count(self, update: Update) -> None:
        """Log an update, and give up after too many that were none."""
        self._n_updates += 1
        self._skipped_in_a_row = 0 if update.stepped else self._skipped_in_a_row + 1
        if not update.stepped:
            self._skipped_updates += 1
            if self._skipped_in_a_row >= MAX_SKIPPED_UPDATES:
                raise NonFiniteError(
                    f"the gradient was not finite for {MAX_SKIPPED_UPDATES} updates in a row; "
                    f"the learning rate is {self.policy.optimizer.param_groups[0]['lr']:g}"
                )
            logger.warning("update %d skipped: its gradient is not finite", self._n_updates)
        with self._stopwatch.phase("callbacks"):
            curves.record_means(self.logger, update.scalars)
            self.logger.record("train/skipped_updates", self._skipped_updates)
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _objective(self) -> Objective:
        """The loss's coefficients, which are attributes of these names."""
        return Objective(**{entry.name: getattr(self, entry.name) for entry in fields(Objective)})

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

    # Playing.

    @contextmanager
    def _player(self) -> Iterator[Player]:
        """Whoever collects rollouts: the workers, or this process."""
        shape = self._rollout_shape(self.n_envs)
        if not self.n_workers:
            self.collector = self._make_collector()
            yield SerialPlayer(self.collector, shape, self.device, self._stopwatch)
            return
        assert self.env_factory is not None, "only factories are played by workers"
        check_script()
        spec = self._policy_spec()
        spec.check_like(self.policy)
        self.check_machine()
        weights = SharedWeights(self.policy)
        weights.publish(self.policy, 0)
        pool = WorkerPool(
            self.env_factory,
            spec,
            self._rollout_shape(self.n_envs // self.n_workers),
            weights,
            n_workers=self.n_workers,
            # Games after an earlier `learn` do not repeat those played before; `num_timesteps` may
            # have been set back to 0.
            seed=self.games_seed + 7_919 * self._n_updates,
            limits=self.limits,
            profile=self.time_spent,
            info_keywords=self.info_keywords,
        )
        with pool:
            self._pool = pool
            try:
                yield WorkersPlayer(
                    pool,
                    weights,
                    self.policy,
                    shape,
                    n_workers=self.n_workers,
                    device=self.device,
                    give_up=lambda: self._stop_requested,
                    stopwatch=self._stopwatch,
                )
            finally:
                self._pool = None

    def _make_collector(self) -> Collector:
        """Goes on where the games stand, unless SB3 has started them anew."""
        before, env = self.collector, self.env
        assert env is not None
        going_on: dict[str, Any] = {}
        # SB3 replaces `_last_obs` where a training starts anew or gets another environment.
        if before is not None and before.obs is self._last_obs:
            going_on = {"episode_start": before.episode_start, "lstm_state": before.lstm_state}
        return Collector(
            env,
            self.policy,
            self._last_obs,
            **going_on,
            sde_sample_freq=self.sde_sample_freq,
            with_values=True,
            stopwatch=self._stopwatch,
        )

    def _collect(self, player: Player, n_steps: int, callback: BaseCallback) -> Batch | None:
        """A batch of `n_steps` timesteps in every environment; None if a callback said stop."""
        batch = player.collect(n_steps, lambda outcome: self._after_row(callback, outcome))
        if self.collector is not None and not self.n_workers:
            self._last_obs = self.collector.obs
            self._last_episode_starts = self.collector.episode_start
        if batch is not None:
            self.policy_lag = curves.record_lag(self.logger, batch.lags)
        return batch

    def check_machine(self) -> None:
        """Refuse to start workers for which shared memory or open files do not suffice.

        Raises:
            ValueError: naming what is needed and what there is.
        """
        if self.n_workers:
            shape = self._rollout_shape(self.n_envs // self.n_workers)
            check_machine(self.n_workers, shape, SharedWeights.bytes_for(self.policy))

    def _rollout_shape(self, n_envs: int) -> RolloutShape:
        return RolloutShape(
            self.n_steps,
            n_envs,
            self.observation_space,
            self.action_space,
            *self.policy.state_shape,
        )

    def _after_row(self, callback: BaseCallback, outcome: Outcome) -> bool:
        """SB3's bookkeeping for one row of `n_envs` timesteps."""
        self.num_timesteps += self.n_envs
        seen = outcome._asdict() | {
            "self": self,
            "env": self.env,
            "n_steps": outcome.row,
            "n_rollout_steps": self.n_steps,
        }
        with self._stopwatch.phase("callbacks"):
            callback.update_locals(seen)
            if not callback.on_step():
                return False
            self._update_info_buffer(outcome.infos, outcome.dones)
            self._note_scores(outcome.infos)
        return True

    def _note_scores(self, infos: list[dict[str, Any]]) -> None:
        """Keep the best score of all games, and when the first of them had any."""
        for info in infos:
            if "episode" in info:
                score = float(info["episode"]["r"])
                self.best_score = max(self.best_score, score)
                if score > 0 and self.first_scored_at < 0:
                    self.first_scored_at = self.num_timesteps

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, *(["exploration"] if self.exploration is not None else [])], variables


__all__: list[str] = ["A3C", "NonFiniteError", "default_workers"]
