"""`A3C`: asynchronous advantage actor-critic, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule

from ncrl.agents import arguments, curves
from ncrl.agents.algorithm import EngineAlgorithm
from ncrl.agents.defaults import IMAGES, MAX_GRAD_NORM, RMS_PROP_EPS, defaults_for, image_heads
from ncrl.agents.learning.intrinsic import IntrinsicReward
from ncrl.agents.learning.learner import Learner
from ncrl.agents.learning.objective import Objective
from ncrl.agents.learning.update import Update, on_host
from ncrl.agents.playing import env_sources, sizes
from ncrl.agents.playing.buffers import Batch, RolloutView
from ncrl.agents.playing.collector import NonFiniteError
from ncrl.agents.playing.env_sources import EnvFactory
from ncrl.agents.playing.players import Player, SerialPlayer, played_by_workers
from ncrl.agents.playing.supervision import Limits, PoolSpec
from ncrl.agents.profiling import OFF, Profile, stopwatch_for
from ncrl.checks import whole_number
from ncrl.sb3 import EnginePolicy
from ncrl.sb3.engine import SUPPORTED

logger = logging.getLogger(__name__)

MAX_SKIPPED_UPDATES = 10
"""Updates in a row whose gradient is not finite before training stops. One can be the fault of its
rollout; so many are that of the weights, which no skipped update changes."""

SelfA3C = TypeVar("SelfA3C", bound="A3C")


class A3C(EngineAlgorithm):
    """Actor-critic, with memory or without, played by worker processes and trained by one learner.

    Mnih et al. 2016 ("Asynchronous methods for deep reinforcement learning") for the algorithm and
    its hyper-parameters; Espeholt et al. 2018 ("IMPALA") for the learner and V-trace. Workers play
    on the CPU with weights that are whole versions of the learner's, at most a few updates old.
    Arguments that are not explained here are SB3's.

    Args:
        policy: a name in `policy_aliases` or a subclass of `ncrl.sb3.EnginePolicy`. `Lstm` in a
            name means a memory, `Neurocoder` Neurocoder heads.
        env: where it plays. A factory `factory(n_envs, seed) -> VecEnv` (such as
            `ncrl.envs.atari("Pong")`) or a Gymnasium id is built inside the worker processes. An
            environment object is played in this process, serially and reproducibly.
        learning_rate: a number, or a schedule of the remaining progress; None takes the default,
            which falls linearly to 0. The defaults of this and of `n_steps`, `batch_size`,
            `gae_lambda` and `use_rms_prop` are those of `ncrl.agents.defaults`. They differ for
            fewer than 4 environments in this process, for policies that see images (`Cnn`), and
            for all others.
        n_steps: T, timesteps per rollout; by default 5 for few environments, else 20.
        batch_size: timesteps per update, a multiple of `n_steps` that divides `n_steps * n_envs`:
            whole rollouts of some environments. None takes all; with images, those of 4
            environments, on a GPU of up to 8, with an intrinsic reward of up to 32.
        gamma: discount.
        gae_lambda: 1 gives n-step returns; by default 0.95 with images, else 1.
        ent_coef: weight of the entropy.
        vf_coef: weight of the value loss.
        entropy_floor: mean entropy (nats) below which it is drawn up again; 0 for none.
        max_grad_norm: limit on the gradient's norm.
        use_rms_prop: RMSProp as in A3C; False takes Adam, the default with images. Any other
            optimiser is named in `policy_kwargs`: `optimizer_class`, `optimizer_kwargs`.
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
        int_coef: weight of intrinsic advantages, which have deviation 1.
        ext_coef: weight of the game's own advantages beside them.
        int_gamma: discount of the intrinsic return.
        imitation_coef: weight of the imitation loss: beside an intrinsic reward, what led to a
            reward is kept and learnt from again. 0 keeps nothing.
        intrinsic_kwargs: `warmup_timesteps`, `reach` and `capacity`, as for
            `ncrl.agents.learning.exploration.Exploration`, and options of the bonus, such as
            `encoder`, `learning_rate` and `update_proportion` of `rnd`.
        info_keywords: entries of `info` that workers report to callbacks for every timestep; all
            other entries only where a game ends. This process reports everything that it plays.
        n_workers: worker processes; 0 plays factories and ids in this process too, None takes one
            per core, or the next smaller number that divides `n_envs`.
        cluster: where the workers run: None for processes of this machine; `auto` for actors of the
            Ray cluster that it belongs to, `host:port` for the one with that head (docs/cluster.md,
            needs `ncrl[ray]`). It is not saved.
        n_envs: environments that are built from an id or a factory, of all workers together; a
            multiple of `n_workers`. None takes 16.
        limits: time-outs and restarts of the workers.
        policy_kwargs: further arguments of the policy, such as `head`, `head_kwargs`, `encoder`.
            Neurocoder heads on images have the options of `ncrl.agents.defaults`; beside
            `head_kwargs` only sharpness and whether the residual program has a gate.
        seed: of everything; serial runs with equal seeds give bit-equal weights.
        device: of the learner.
        profile: measure where the time of each process goes: curves `profile/<process>/<phase>`,
            and `time_spent.table()`. On CUDA the learner waits for the device at each phase.

    Raises:
        ValueError: for impossible arguments.
        TypeError: for a policy that is no `EnginePolicy`.
    """

    def __init__(
        self,
        policy: str | type[EnginePolicy],
        env: GymEnv | str | EnvFactory | None,
        # Updates.
        learning_rate: float | Schedule | None = None,
        n_steps: int | None = None,
        batch_size: int | None = None,
        # Loss and optimiser.
        gamma: float = Objective.gamma,
        gae_lambda: float | None = None,
        ent_coef: float = Objective.ent_coef,
        vf_coef: float = Objective.vf_coef,
        max_grad_norm: float = MAX_GRAD_NORM,
        rms_prop_eps: float = RMS_PROP_EPS,
        use_rms_prop: bool | None = None,
        normalize_advantage: bool = False,
        orth_coef: float = Objective.orth_coef,
        balance_coef: float = Objective.balance_coef,
        correction: str = Objective.correction,
        reward_scale: float = Objective.reward_scale,
        reward_clip: float | str | None = "env",
        # Exploration.
        intrinsic_reward: str | IntrinsicReward | None = None,
        int_coef: float = Objective.int_coef,
        ext_coef: float = Objective.ext_coef,
        int_gamma: float = Objective.int_gamma,
        imitation_coef: float = Objective.imitation_coef,
        entropy_floor: float = Objective.entropy_floor,
        intrinsic_kwargs: dict[str, Any] | None = None,
        # Who plays.
        info_keywords: Sequence[str] = (),
        n_workers: int | None = None,
        n_envs: int | None = None,
        cluster: str | None = None,
        limits: Limits | None = None,
        # Policy, device and logs.
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
        self.batch_size = batch_size
        self.rms_prop_eps = rms_prop_eps
        self.normalize_advantage = normalize_advantage
        self.orth_coef, self.balance_coef = orth_coef, balance_coef
        self.correction, self.reward_scale = correction, reward_scale
        self.intrinsic_reward = None if intrinsic_reward == "none" else intrinsic_reward
        self.int_coef, self.ext_coef, self.int_gamma = int_coef, ext_coef, int_gamma
        self.imitation_coef, self.entropy_floor = imitation_coef, entropy_floor
        self.intrinsic_kwargs = intrinsic_kwargs or {}
        self.info_keywords = arguments.names("info_keywords", info_keywords)
        self.n_workers, self.cluster, self.limits = 0, cluster, limits or Limits()
        self.profile = profile
        self.best_score, self.first_scored_at = -math.inf, -1
        self.games_seed = env_sources.fresh_seed() if seed is None else seed
        self.env_factory: EnvFactory | None = None
        self._warns_of_frequencies = n_envs is None and _init_setup_model
        played = self._take_env(env, n_workers, n_envs, verbose)
        source = self.env_factory or env
        own_clip = getattr(source, "reward_clip", None)
        self.reward_clip: Any = own_clip if reward_clip == "env" else reward_clip
        self.frames_per_timestep = int(getattr(source, "frame_skip", 1))
        num_envs, sees_images = getattr(played, "num_envs", 1), arguments.sees_images(policy)
        defaults = defaults_for(num_envs, self.n_workers, sees_images)
        if _init_setup_model and defaults is IMAGES:
            heads = image_heads(self.intrinsic_reward is not None)
            policy_kwargs = arguments.with_head_options(policy, policy_kwargs, heads)
        self._small_updates = defaults.small_updates
        self.use_rms_prop = defaults.use_rms_prop if use_rms_prop is None else use_rms_prop
        if learning_rate is None:
            learning_rate = LinearSchedule(defaults.learning_rate, 0.0, 1.0)
        super().__init__(
            policy,
            played,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=defaults.n_steps if n_steps is None else n_steps,
            gamma=gamma,
            gae_lambda=defaults.gae_lambda if gae_lambda is None else gae_lambda,
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
            supported_action_spaces=SUPPORTED,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        """Build what is not saved, from the attributes alone: `load` calls this too."""
        self._check_arguments()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.time_spent = Profile(stopwatch_for(self.device)) if self.profile else None
        self.learner = Learner(
            self._policy_spec().build(self.lr_schedule).to(self.device),
            n_steps=self.n_steps,
            exploration=self._make_exploration(),
            stopwatch=OFF if self.time_spent is None else self.time_spent.stopwatch,
        )
        # For the rollout that is played and the batch that is learnt from.
        sizes.check_memory(2 * self._rollout_shape(self.n_envs).nbytes)
        self._batch: Batch | None = None
        self._start_anew()
        self.policy_lag = 0.0
        """Mean age, in published versions, of the weights behind the latest batch."""
        self._skipped_updates = 0
        self._skipped_in_a_row = 0

    def _check_arguments(self) -> None:
        if self.cluster is not None:
            sizes.check_cluster(self.cluster, self.n_workers)
        arguments.check_limits(self.limits)
        self.n_steps = whole_number("n_steps", self.n_steps)
        arguments.check_numbers(self._objective(), self.max_grad_norm, self.learning_rate)
        if self.batch_size is not None:
            self.batch_size = whole_number("batch_size", self.batch_size)
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
            NonFiniteError: if the gradient stays not finite, or an intrinsic reward is not.
        """
        try:
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            if reset_num_timesteps:
                self.best_score, self.first_scored_at = -math.inf, -1
            self._dumped_at = self.num_timesteps  # before it has played there is nothing to log
            self._started = time.monotonic_ns()
            # Taken before there is a player, whose memory a callback would keep with it.
            seen = dict(locals()) | {"iteration": 0}
            with (
                sizes.learner_threads(self.n_workers if self.cluster is None else 0),
                self.learner.stopwatch.phase("setup"),
                self._player() as player,
                self.learner.stopwatch.phase("other"),
            ):
                with self.learner.stopwatch.phase("callbacks"):
                    callback.on_training_start(seen, globals())
                self._learn_from(player, total_timesteps, callback, log_interval)
                with self.learner.stopwatch.phase("callbacks"):
                    callback.on_training_end()
        finally:  # a stop ends the training that it was asked for in, and no later one
            self._stop_requested = False
        return self

    def _learn_from(
        self, player: Player, total_timesteps: int, callback: BaseCallback, log_interval: int | None
    ) -> None:
        """Collect rollouts and learn from them, in turn, until the total or a stop."""
        iteration, stopwatch = 0, self.learner.stopwatch
        while self.num_timesteps < total_timesteps and not self._stop_requested:
            rows = math.ceil((total_timesteps - self.num_timesteps) / self.n_envs)
            with stopwatch.phase("callbacks"):
                callback.on_rollout_start()
            self._batch = self._collect(player, min(rows, self.n_steps), callback)
            if self._batch is None:
                break
            with stopwatch.phase("callbacks"):
                shown = {"rollout_buffer": RolloutView(self._batch, self.policy)}
                callback.update_locals(shown | {"iteration": iteration})
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

    def train(self) -> None:
        """Learn from the rollouts collected last, `batch_size` timesteps at a time."""
        assert self._batch is not None, "train() follows a rollout"
        self._update_learning_rate(self.policy.optimizer)
        parts = self.n_envs // self.envs_per_update
        learn = self.learner.learn
        for update in learn(self._batch, self._objective(), self.max_grad_norm, num_parts=parts):
            self._count(update)
        curves.record_means(self.logger, on_host(self.learner.explored))
        if self.exploration is not None and self.imitation_coef:
            self.logger.record("train/kept_demonstrations", len(self.exploration.memory))

    def _count(self, update: Update) -> None:
        """Count and log an update; NonFiniteError if too many in a row had to be skipped, or one
        because of the intrinsic reward."""
        self._n_updates += 1
        self._skipped_in_a_row = 0 if update.stepped else self._skipped_in_a_row + 1
        if not update.stepped:
            self._skipped_updates += 1
            if self.exploration is not None:
                self.exploration.check_bonus()
            if self._skipped_in_a_row >= MAX_SKIPPED_UPDATES:
                raise NonFiniteError(
                    f"the gradient was not finite for {MAX_SKIPPED_UPDATES} updates in a row; "
                    f"the learning rate is {self.policy.optimizer.param_groups[0]['lr']:g}"
                )
            logger.warning("update %d skipped: its gradient is not finite", self._n_updates)
        with self.learner.stopwatch.phase("callbacks"):
            curves.record_means(self.logger, update.scalars)
            self.logger.record("train/skipped_updates", self._skipped_updates)
            self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _objective(self) -> Objective:
        """The loss's coefficients, which are attributes of these names."""
        return Objective(**{entry.name: getattr(self, entry.name) for entry in fields(Objective)})

    # Playing.

    @contextmanager
    def _player(self) -> Iterator[Player]:
        """Whoever collects rollouts: the workers, or this process."""
        if not self.n_workers:
            self.collector = self._make_collector()
            yield SerialPlayer(self.collector, self._rollout_shape(self.n_envs))
            return
        assert self.env_factory is not None, "only factories are played by workers"
        self.check_machine()
        spec = PoolSpec(
            self.env_factory,
            self._policy_spec(),
            self._rollout_shape(self.n_envs // self.n_workers),
            self.n_workers,
            seed=self.next_games_seed,
            limits=self.limits,
            profile=self.time_spent,
            info_keywords=self.info_keywords,
        )
        with played_by_workers(
            spec,
            self.policy,
            cluster=self.cluster,
            give_up=lambda: self._stop_requested,
        ) as player:
            self._pool = player.pool
            try:
                yield player
            finally:
                self._pool = None


__all__: list[str] = ["A3C", "NonFiniteError"]
