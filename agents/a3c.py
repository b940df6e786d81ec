"""`A3C`: asynchronous advantage actor-critic, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ncrl import NeurocoderLinear
from ncrl.agents.buffers import (
    Batch,
    Rollout,
    RolloutBatch,
    RolloutShape,
    split_envs,
)
from ncrl.agents.collector import Collector, Outcome
from ncrl.agents.environments import (
    EnvFactory,
    RecordedEnv,
    RemoteEnvs,
    as_factory,
    build,
    check_object,
    is_factory,
)
from ncrl.agents.exploration import Exploration, make_exploration
from ncrl.agents.graph import GraphedUpdates
from ncrl.agents.intrinsic import IntrinsicReward
from ncrl.agents.learner import (
    CORRECTIONS,
    Lesson,
    Novelty,
    Objective,
    Update,
    actor_critic_loss,
    apply_gradient,
    rewards_in_loss,
)
from ncrl.agents.loading import plain_faults, without_code, write_model
from ncrl.agents.optim import SharedRMSProp
from ncrl.agents.players import Player, Pool, SerialPlayer, Weights, WorkersPlayer
from ncrl.agents.profiling import OFF, Profile, Stopwatch, stopwatch_for
from ncrl.agents.sizes import available_cores
from ncrl.agents.supervision import Limits, WorkerPool, check_shared_memory, slots_for
from ncrl.agents.weights import SharedWeights, layout
from ncrl.agents.worker import PolicySpec, is_importing_main
from ncrl.diagnostics import describe
from ncrl.sb3 import (
    CnnLstmPolicy,
    CnnPolicy,
    EnginePolicy,
    Latent,
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
from ncrl.sb3.engine import map_obs
from ncrl.settings import suggest

logger = logging.getLogger(__name__)

MAX_SKIPPED_UPDATES = 10
"""Updates in a row whose gradient is not finite before training stops."""

DIAGNOSTIC_SAMPLES = 256
"""Latents of the latest batch on which the heads are described."""

IMITATED_SHARE = 0.25
"""Rollouts that are learnt from again, for each new one of an update; at least one."""

FORGOTTEN_AFTER = 10
"""Predictions in a row without a state after which a policy with memory warns."""

SelfA3C = TypeVar("SelfA3C", bound="A3C")

Workers = tuple[AbstractContextManager[None], Weights, Pool]
"""What to be part of while they play, and what they play with."""


class NonFiniteError(RuntimeError):
    """Training stopped because the gradient was not finite for many updates in a row."""


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
        learning_rate: a number, or a schedule of the remaining progress; 7e-4 falling linearly
            to 0 by default.
        n_steps: T, timesteps per rollout.
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
            `ncrl.agents.exploration.Exploration`, and options of the bonus, such as `encoder`,
            `learning_rate` and `update_proportion` of `rnd`.
        info_keywords: entries of `info` that callbacks are shown for every timestep of workers; all
            others arrive where a game ends, and everything where this process plays.
        n_workers: worker processes; 0 plays factories and ids in this process too, None takes one
            per core.
        cluster: where the workers run: None for processes of this machine; `auto` for actors of the
            Ray cluster that it belongs to, `host:port` for the one with that head (docs/cluster.md,
            needs `ncrl[ray]`). One core of a cluster is left to the learner. It is not saved.
        n_envs: environments of all workers together; a multiple of `n_workers`.
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

    policy: EnginePolicy  # type: ignore[assignment]
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
        learning_rate: float | Schedule = LinearSchedule(7e-4, 0.0, 1.0),  # noqa: B008
        n_steps: int = 20,
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
        n_envs: int = 16,
        cluster: str | None = None,
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
        self._is_loaded = False
        self.profile = profile
        self.cluster = cluster
        self.limits = limits or Limits()
        self.batch_size = batch_size
        self.orth_coef = orth_coef
        self.balance_coef = balance_coef
        self.rms_prop_eps = rms_prop_eps
        self.use_rms_prop = use_rms_prop
        self.normalize_advantage = normalize_advantage
        self.correction = correction
        self.reward_scale = reward_scale
        self.intrinsic_reward = None if intrinsic_reward == "none" else intrinsic_reward
        self.int_coef = int_coef
        self.ext_coef = ext_coef
        self.int_gamma = int_gamma
        self.imitation_coef = imitation_coef
        self.intrinsic_kwargs = intrinsic_kwargs or {}
        self.info_keywords = list(info_keywords)
        self.games_seed = _fresh_seed() if seed is None else seed
        self.env_factory: EnvFactory | None = None
        played: GymEnv | None
        if is_factory(env):
            self.n_workers = default_workers(n_envs, cluster) if n_workers is None else n_workers
            self.env_factory = as_factory(env)  # type: ignore[arg-type]
            played = self._played_by(self.env_factory, n_envs)
        elif n_workers:
            raise ValueError(_needs_factory(n_workers, env))
        else:
            check_object(env)
            played = env  # type: ignore[assignment]
        source = self.env_factory or env
        self.reward_clip = (
            getattr(source, "reward_clip", None) if reward_clip == "env" else (reward_clip)
        )
        self.frames_per_timestep = int(getattr(source, "frame_skip", 1))
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
        self._is_loaded = False
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        policy = self._policy_spec(of_learner=True).build(self.lr_schedule)
        self.policy = policy.to(self.device)
        self.exploration = self._make_exploration()
        self._batch_stage = RolloutBatch(self._rollout_shape(self.n_envs), self.device)
        self._graphed = GraphedUpdates(self.device)
        self._batch_stage.starts_on_host = self._graphed.reason is not None
        self._batch: Batch | None = None
        self._collector: Collector | None = None
        self._pool: Pool | None = None
        self._latent: Latent | None = None
        self._stop_requested = False
        self._dumped_at = -1
        self._stateless_predictions = 0
        self._warned_of_state = False
        self.best_score = -math.inf
        """Of all whole games."""
        self.first_scored_at = -1
        """Timesteps after which the first game with a score above 0 ended."""
        self.policy_lag = 0.0
        """Mean age, in updates, of the weights behind the latest batch."""
        self._skipped_updates = 0
        self._skipped_in_a_row = 0
        self.time_spent: Profile | None = None
        """Where the time of all calls of `learn` went, if `profile` is set."""
        if self.profile:
            self.time_spent = Profile(stopwatch_for(self.device))

    def _make_exploration(self) -> Exploration | None:
        """The intrinsic reward and what belongs to it, if there is one.

        With it and without, everything else starts from the same random numbers.
        """
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
        options = dict(self.policy_kwargs)
        if of_learner and self.intrinsic_reward is not None and self.int_coef:
            options["int_value"] = True
        kind = options.get("optimizer_class")
        chosen = options.get("optimizer_kwargs")
        if self.use_rms_prop and kind is None:
            options["optimizer_class"] = SharedRMSProp
            options["optimizer_kwargs"] = {"alpha": 0.99, "eps": self.rms_prop_eps} | (chosen or {})
        elif kind in (None, torch.optim.Adam) and not {"foreach", "differentiable"} & set(
            chosen or ()
        ):
            # SB3's epsilon for Adam. Fused, a step is one operation, and can be left out by the
            # device itself.
            options["optimizer_kwargs"] = {"fused": True} | (
                {"eps": 1e-5} if chosen is None else chosen
            )
        return PolicySpec(
            self.policy_class,  # type: ignore[arg-type]
            self.observation_space,
            self.action_space,
            {"use_sde": self.use_sde} | options,
            self.sde_sample_freq,
        )

    def _played_by(self, factory: EnvFactory, n_envs: int) -> VecEnv:
        """What SB3 takes for the environment of a model whose environments a factory builds."""
        _check_workers(self.n_workers, n_envs)
        if self.n_workers:
            return RemoteEnvs.like(factory, n_envs)
        return RecordedEnv(build(factory, n_envs, self.games_seed))

    def set_env(self, env: GymEnv | str | EnvFactory, force_reset: bool = True) -> None:
        """As in SB3; also takes an id or a factory, which is played as before, by workers or not.

        An environment object is played in this process from now on.
        """
        if is_factory(env):
            self.env_factory = as_factory(env)  # type: ignore[arg-type]
            env = self._played_by(self.env_factory, self.n_envs)
        else:
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
        **kwargs: Any,
    ) -> SelfA3C:
        """As in SB3, but no code of the file is run.

        Args:
            path: of the zip, or the zip as an open file.
            env: may also be an id or a factory, as in the constructor.
            device: where the model shall be.
            custom_objects: values by field, in place of those of the file.
            print_system_info: of the computer that saved, and of this one.
            force_reset: whether the environment is reset before training goes on.
            trust: read like SB3, which runs whatever code the file carries.
            kwargs: attributes to set in place of the saved ones.

        Raises:
            ValueError: in one line, for a file that is damaged or no saved A3C, and without `trust`
                for one with a field that only code could restore, such as a lambda.
        """
        from_factory = is_factory(env)
        if env is not None and not from_factory:
            check_object(env)
            if kwargs.setdefault("n_workers", 0):
                raise ValueError(_needs_factory(kwargs["n_workers"], env))
        one_per_core = from_factory and kwargs.get("n_workers", 0) is None
        if one_per_core:
            kwargs["n_workers"] = 0
        if "batch_size" not in kwargs:  # the saved one was made for the saved number of n_envs
            kwargs["_is_loaded"] = True
        source: Any = path
        if not trust:
            source, custom_objects = without_code(cls, path, custom_objects, kwargs)
        with nullcontext() if trust else plain_faults(path):
            model = super().load(
                source,
                None if from_factory else env,  # type: ignore[arg-type]
                device,
                custom_objects,
                print_system_info,
                force_reset,
                **kwargs,
            )
        if from_factory:
            assert env is not None
            if one_per_core:
                model.n_workers = default_workers(model.n_envs)
            model.set_env(env, force_reset)
        return model

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As in SB3, whose own loader reads it too; `load` then needs no code of the file."""
        zipped = io.BytesIO()
        super().save(zipped, exclude, include)
        write_model(self, zipped.getvalue(), path)

    def _check_arguments(self) -> None:
        self._check_batch()
        self._check_cluster()
        clip = self.reward_clip
        if clip is not None and not (isinstance(clip, (int, float)) and 0 < clip < math.inf):
            raise ValueError(f"reward_clip must be a positive number, None or 'env', got {clip!r}")
        for name, low, high in (
            ("n_steps", 1, math.inf),
            ("gamma", 0, 1),
            ("gae_lambda", 0, 1),
            ("ent_coef", 0, math.inf),
            ("vf_coef", 0, math.inf),
            ("orth_coef", 0, math.inf),
            ("balance_coef", 0, math.inf),
            ("reward_scale", 0, math.inf),
            ("int_coef", 0, math.inf),
            ("ext_coef", 0, math.inf),
            ("int_gamma", 0, 1),
            ("imitation_coef", 0, math.inf),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must lie in {low} .. {high}, got {value}")
        if not (isinstance(self.max_grad_norm, (int, float)) and self.max_grad_norm >= 0):
            raise ValueError(
                f"max_grad_norm must be at least 0, got {self.max_grad_norm}; inf sets no limit"
            )
        if isinstance(self.learning_rate, (int, float)) and not (
            math.isfinite(self.learning_rate) and self.learning_rate >= 0
        ):
            raise ValueError(f"learning_rate must be at least 0, got {self.learning_rate}")
        if self.correction not in CORRECTIONS:
            hint = suggest(self.correction, CORRECTIONS)
            raise ValueError(f"unknown correction {self.correction!r}; {hint}")
        for name in {"orth_coef", "balance_coef"} & set(self.policy_kwargs):
            raise ValueError(
                f"{name} is an argument of A3C itself, not of its policy: give "
                f"A3C(..., {name}={self.policy_kwargs[name]!r}) and leave it out of policy_kwargs"
            )
        if not (
            isinstance(self.policy_class, type) and issubclass(self.policy_class, EnginePolicy)
        ):
            raise TypeError(_wrong_policy(self.policy_class))

    def _check_cluster(self) -> None:
        if self.cluster is None:
            return
        check_cluster(self.cluster)
        if not self.n_workers:
            raise ValueError(
                f"cluster={self.cluster!r} needs workers: n_workers of at least 1, and an env that "
                "they can build, a Gymnasium id or a factory"
            )

    def _check_batch(self) -> None:
        self.n_steps = _whole_number("n_steps", self.n_steps)
        if self.batch_size is None or self.n_steps < 1:
            return
        self.batch_size = _whole_number("batch_size", self.batch_size)
        whole = self.n_steps * self.n_envs
        if self.batch_size >= 1 and self.batch_size % self.n_steps == whole % self.batch_size == 0:
            return
        wrong = (
            f"batch_size must be a multiple of n_steps that divides n_steps * n_envs, got "
            f"batch_size={self.batch_size} with n_steps={self.n_steps} and n_envs={self.n_envs}"
        )
        if not self._is_loaded:
            raise ValueError(f"{wrong}; batch_size=None takes all environments at once")
        warnings.warn(f"{wrong}; all environments are taken at once", stacklevel=2)
        self.batch_size = None

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
        stopwatch = self._stopwatch
        with (
            _learner_threads(self.n_workers if self.cluster is None else 0),
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
                self._batch = player.collect(min(rows, self.n_steps), callback)
                if self._batch is None:
                    break
                with stopwatch.phase("callbacks"):
                    callback.update_locals(locals())
                    callback.on_rollout_end()
                iteration += 1
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                self._current_progress_remaining = max(0.0, self._current_progress_remaining)
                self.train()
                with stopwatch.phase("publishing"):
                    player.publish()
                if log_interval is not None and iteration % log_interval == 0:
                    with stopwatch.phase("callbacks"):
                        self.dump_logs(iteration)
            with stopwatch.phase("callbacks"):
                callback.on_training_end()
        self._stop_requested = False
        return self

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if self.env_factory is None:
            return super()._init_callback(callback, progress_bar)
        with warnings.catch_warnings():
            # What `EvalCallback` compares its environment with is a stand-in of ours.
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
            return super()._init_callback(callback, progress_bar)

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
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        batch = self._batch
        with self._stopwatch.phase("exploration"):
            rewards = self._score(batch)
        for i, part in enumerate(split_envs(batch.rollout, self.n_envs // self.envs_per_update)):
            self._update(self._lesson(part, rewards, i))
        with self._stopwatch.phase("exploration"):
            self._learn_novelty(batch)
        # Not before: the actions were chosen under the mean as it was. The last row comes again.
        self.policy.watch(map_obs(lambda x: x[:-1].flatten(0, 1), batch.rollout.obs))

    def _score(self, batch: Batch) -> Tensor | None:
        """Intrinsic rewards of a batch, [T, B], if there are any; what led to a score is kept."""
        if self.exploration is None:
            return None
        clipped = rewards_in_loss(batch.host.rewards, self._objective())
        self.exploration.remember(batch.host, batch.games, clipped)
        rewards, scalars = self.exploration.intrinsic_rewards(batch.rollout)
        self._record_means(scalars)
        return rewards if self.int_coef else None

    def _lesson(self, rollout: Rollout, rewards: Tensor | None, part: int) -> Lesson:
        """One of the parts of a batch, with what exploration adds to it."""
        if self.exploration is None:
            return Lesson(rollout)
        width = self.envs_per_update
        kept = self.exploration.draw(max(1, round(IMITATED_SHARE * width)))
        if len(rollout.rewards) < self.n_steps:
            kept = None  # the end of the training cut the new ones short
        if rewards is None:
            return Lesson(rollout, kept=kept)
        deviation = torch.full_like(rewards[0, 0], self.exploration.advantage_deviation)
        return Lesson(rollout, Novelty(rewards.narrow(1, part * width, width), deviation), kept)

    def _learn_novelty(self, batch: Batch) -> None:
        """After the policy has learnt from a batch, so does the intrinsic reward."""
        if self.exploration is None:
            return
        self._record_means(self.exploration.learn(batch.rollout))
        if self.exploration.memory is not None:
            self.logger.record("train/kept_rollouts", len(self.exploration.memory))

    def _update(self, lesson: Lesson) -> None:
        """One step of the optimiser."""
        stopwatch = self._stopwatch
        update, latent = self._graphed_update(lesson) or self._eager_update(lesson)
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
        if lesson.novelty is not None and self.exploration is not None and update.stepped:
            self.exploration.observe_advantages(update.scalars["int_advantage_std"])
        self._latent = latent
        with stopwatch.phase("callbacks"):
            self._record_update(update.scalars)

    def _eager_update(self, lesson: Lesson) -> tuple[Update, Latent]:
        stopwatch = self._stopwatch
        with stopwatch.phase("evaluation"):
            rollout, novelty, kept = lesson
            loss = actor_critic_loss(self.policy, rollout, self._objective(), novelty, kept)
        update = apply_gradient(
            self.policy, self.policy.optimizer, loss, self.max_grad_norm, stopwatch=stopwatch
        )
        return update, loss.evaluation.latent.map(Tensor.detach)

    def _graphed_update(self, lesson: Lesson) -> tuple[Update, Latent] | None:
        """None for rollouts that the end of the training cut short, and where there is no graph."""
        if len(lesson.rollout.rewards) < self.n_steps or self._graphed.reason is not None:
            return None
        with self._stopwatch.phase("graph"):
            measured = self._graphed.update(
                self.policy, lesson, self._objective(), self.max_grad_norm
            )
            self._batch_stage.starts_on_host = self._graphed.reason is not None
            return None if measured is None else (measured.on_host(), measured.latent)

    def _objective(self) -> Objective:
        return Objective(
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            ent_coef=self.ent_coef,
            vf_coef=self.vf_coef,
            orth_coef=self.orth_coef,
            balance_coef=self.balance_coef,
            reward_scale=self.reward_scale,
            reward_clip=self.reward_clip,  # type: ignore[arg-type]
            correction=self.correction,
            normalize_advantage=self.normalize_advantage,
            int_gamma=self.int_gamma,
            int_coef=self.int_coef,
            ext_coef=self.ext_coef,
            imitation_coef=self.imitation_coef,
        )

    # Logging.

    def _record_means(self, scalars: dict[str, Tensor]) -> None:
        """Means over the batches since the last dump."""
        if scalars:
            values = torch.stack([value.float() for value in scalars.values()]).tolist()
            for name, value in zip(scalars, values, strict=True):
                self.logger.record_mean(f"train/{name}", value)

    def _record_update(self, scalars: dict[str, float]) -> None:
        """Means over the updates since the last dump."""
        for name, value in scalars.items():
            if math.isfinite(value):  # else the mean would tell nothing of the other updates
                self.logger.record_mean(f"train/{name}", value)
        self.logger.record("train/skipped_updates", self._skipped_updates)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _record_lag(self, lags: list[int]) -> None:
        """How many updates older than the learner's the weights behind the rollouts were."""
        self.policy_lag = sum(lags) / len(lags)
        self.logger.record_mean("train/policy_lag", self.policy_lag)
        self.logger.record("train/policy_lag_max", max(lags))

    def dump_logs(self, iteration: int = 0) -> None:
        """Write SB3's log keys, and those that only this toolkit has, once per timestep."""
        if self._dumped_at == self.num_timesteps:
            return
        self._dumped_at = self.num_timesteps
        self.logger.record("time/frames", self.num_timesteps * self.frames_per_timestep)
        if self.ep_info_buffer:
            rewarded = [episode["r"] > 0 for episode in self.ep_info_buffer]
            self.logger.record("rollout/rewarded_share", sum(rewarded) / len(rewarded))
            self.logger.record("rollout/best_score", self.best_score)
        if self.first_scored_at >= 0:
            frames = self.first_scored_at * self.frames_per_timestep
            self.logger.record("rollout/first_reward_frames", frames)
        if self._pool is not None:
            self.logger.record("time/worker_restarts", self._pool.worker_restarts)
            self.logger.record("time/env_restarts", self._pool.env_restarts)
        if (log_std := getattr(self.policy, "log_std", None)) is not None:
            self.logger.record("train/std", log_std.exp().mean().item())
        if self.time_spent is not None:
            for key, share in self.time_spent.shares().items():
                self.logger.record(f"profile/{key}", share)
        self._record_heads()
        super().dump_logs(iteration)

    def _record_heads(self) -> None:
        heads = {"actor": self.policy.action_net, "critic": self.policy.value_net}
        coded = {name: m for name, m in heads.items() if isinstance(m, NeurocoderLinear)}
        if not coded or self._latent is None:
            return
        latent = self._latent.map(lambda x: x.flatten(0, 1)[:DIAGNOSTIC_SAMPLES])
        with torch.no_grad():
            inputs = {
                "actor": self.policy.mlp_extractor.forward_actor(latent.actor),
                "critic": self.policy.mlp_extractor.forward_critic(latent.critic),
            }
        reports = {name: describe(layer, inputs[name]) for name, layer in coded.items()}
        for key in ("attention_entropy", "max_attention", "effective_rank", "orthogonality"):
            values = {name: getattr(report, key) for name, report in reports.items()}
            self.logger.record(f"neurocoder/{key}", sum(values.values()) / len(values))
            for name, value in values.items():
                self.logger.record(f"neurocoder/{key}/{name}", value)
        for name, report in reports.items():
            self.logger.record(
                f"neurocoder/slot_usage/{name}",
                report.slot_usage.cpu(),
                exclude=("stdout", "log", "json", "csv"),
            )

    # Playing.

    @contextmanager
    def _player(self) -> Iterator[Player]:
        """Whoever collects rollouts: the workers, or this process."""
        if not self.n_workers:
            yield SerialPlayer(self)
            return
        assert self.env_factory is not None, "only factories are played by workers"
        if is_importing_main():
            raise RuntimeError(
                "a worker process imports your file again, which must not start another training: "
                'put what starts it under `if __name__ == "__main__":`, or use n_workers=0'
            )
        self._check_workers_can_build()
        joined, weights, pool = self._processes() if self.cluster is None else self._actors()
        with joined:
            weights.publish(self.policy, 0)
            with pool:
                self._pool = pool
                try:
                    yield WorkersPlayer(self, pool, weights)
                finally:
                    self._pool = None

    def _processes(self) -> Workers:
        """Workers that are processes of this machine."""
        weights = SharedWeights(self.policy)
        options = self._pool_options()
        shape: RolloutShape = options["shape"]
        slots = slots_for(self.n_workers) * sum(t.nbytes for t in shape.allocate().tensors())
        check_shared_memory(slots + weights.nbytes)
        return nullcontext(), weights, WorkerPool(weights=weights, **options)

    def _actors(self) -> Workers:
        """Workers that are actors of a cluster."""
        from ncrl.agents import cluster  # only here: it imports ray

        assert self.cluster is not None
        weights = cluster.ObjectWeights()
        pool = cluster.ActorPool(weights=weights, **self._pool_options())
        return cluster.joined(self.cluster), weights, pool

    def _pool_options(self) -> dict[str, Any]:
        return {
            "factory": self.env_factory,
            "policy": self._policy_spec(),
            "shape": self._rollout_shape(self.n_envs // self.n_workers),
            "n_workers": self.n_workers,
            # Games after an earlier `learn` do not repeat those played before; `num_timesteps` may
            # have been set back to 0.
            "seed": self.games_seed + 7_919 * self._n_updates,
            "limits": self.limits,
            "profile": self.time_spent,
            "info_keywords": self.info_keywords,
        }

    def _check_workers_can_build(self) -> None:
        """Raise ValueError if the policy is not the one that workers build for themselves."""
        with torch.random.fork_rng(devices=[]):
            theirs = self._policy_spec().build()
        if layout(theirs) != layout(self.policy):
            raise ValueError(
                "the policy was changed after it was made, and workers cannot do the same: use "
                "n_workers=0, or a policy class whose constructor makes the change"
            )

    def _rollout_shape(self, n_envs: int) -> RolloutShape:
        return RolloutShape(
            self.n_steps,
            n_envs,
            self.observation_space,
            self.action_space,
            *self.policy.state_shape,
        )

    def _after_step(self, callback: BaseCallback, outcome: Outcome) -> bool:
        """SB3's bookkeeping for one row of `n_envs` timesteps."""
        self.num_timesteps += self.n_envs
        seen = outcome._asdict() | {"self": self, "env": self.env, "n_steps": outcome.row}
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
        return [
            *super()._excluded_save_params(),
            "env_factory",
            "_batch",
            "_batch_stage",
            "_graphed",
            "_collector",
            "_pool",
            "_latent",
            "profile",
            "cluster",
            "time_spent",
            "_stateless_predictions",
            "_warned_of_state",
            "_is_loaded",
            "exploration",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, *(["exploration"] if self.exploration is not None else [])], variables


@contextmanager
def _learner_threads(n_workers: int) -> Iterator[None]:
    """Leave the workers their cores while the learner works beside them, whatever its device."""
    if not n_workers:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, available_cores() - n_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_workers(n_envs: int, cluster: str | None = None) -> int:
    """One worker per core, or the next smaller number that divides `n_envs`.

    Of a cluster, one core is left to the learner.

    Raises:
        ValueError: for a cluster that cannot be joined.
    """
    cores = available_cores()
    if cluster is not None:
        check_cluster(cluster)
        from ncrl.agents.cluster import cluster_cores  # only here: it imports ray

        cores = cluster_cores(cluster) - 1
    most = max(1, min(cores, n_envs))
    return max(n for n in range(1, most + 1) if n_envs % n == 0)


def check_cluster(cluster: str) -> None:
    """Raise ValueError for what is no address of a cluster, and where Ray is not installed."""
    if cluster != "auto" and not re.fullmatch(r"[^/\s]+:\d+", cluster):
        raise ValueError(
            f"cluster must be 'auto', 'host:port' or None, got {cluster!r}; for example "
            "'10.0.0.1:6379'"
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"cluster={cluster!r} needs Ray: pip install 'ncrl[ray]'")


def _check_workers(n_workers: int, n_envs: int) -> None:
    if n_envs < 1 or n_workers < 0:
        raise ValueError(
            f"n_envs must be at least 1 and n_workers at least 0, "
            f"got n_envs={n_envs} with n_workers={n_workers}"
        )
    if n_workers and n_envs % n_workers:
        near = max(1, round(n_envs / n_workers)) * n_workers
        raise ValueError(
            f"n_envs must be a multiple of n_workers, got n_envs={n_envs} with "
            f"n_workers={n_workers}; nearest: n_envs={near}"
        )


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _needs_factory(n_workers: int, env: object) -> str:
    return (
        f"n_workers={n_workers} needs an env that workers can build: a Gymnasium id or a "
        f"factory, got {type(env).__name__}; with an environment object use n_workers=0"
    )


def _wrong_policy(policy: Any) -> str:
    """What to do with a policy that A3C does not take."""
    if not (isinstance(policy, type) and issubclass(policy, BasePolicy)):
        return f"policy must be a name or a policy class, got {policy!r}"
    kind = next((kind for kind in ("Cnn", "MultiInput") if kind in policy.__name__), "Mlp")
    memory = "Lstm" if issubclass(policy, RecurrentActorCriticPolicy) else ""
    name = f"{kind}{memory}Policy"
    return (
        f"A3C needs a policy derived from ncrl.sb3.EnginePolicy, which {policy.__name__} is not; "
        f"use policy={name!r}, or derive yours from ncrl.sb3.{name}"
    )


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1)[0] >> 1)


__all__: list[str] = ["A3C", "NonFiniteError", "default_workers"]
