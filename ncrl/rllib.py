"""The policies of this package as RLModules of Ray's RLlib, for IMPALA, APPO and PPO.

The same policy under another algorithm: losses, optimisers, episodes and checkpoints are RLlib's.
A module contains the SB3 policy; its weights have their usual names behind `policy.`. Shapes: B
rows, T timesteps, L LSTM layers, h LSTM width; RLlib is batch-major: [B, T, ...].
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.appo.torch.appo_torch_learner import APPOTorchLearner
from ray.rllib.algorithms.impala.torch.impala_torch_learner import IMPALATorchLearner
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.utils import ConstantSchedule
from torch import Tensor, distributed

from ncrl.baselines import record_gates
from ncrl.checks import suggest
from ncrl.networks import MeanImage
from ncrl.sb3 import EnginePolicy, Latent, export_policy, load_policy
from ncrl.sb3.engine import map_tensors
from ncrl.sb3.export import put_tensors, unique_tensors
from ncrl.sb3.registry import POLICIES
from ncrl.sb3.regularise import regularisation_loss

_swapped = partial(torch.transpose, dim0=0, dim1=1)  # [B, T, ...] <-> [T, B, ...]


class LearnerStoppedError(RuntimeError):
    """The learner has failed, or has not learnt for a long time, while games are played."""


class PolicyModule(TorchRLModule, ValueFunctionAPI):  # type: ignore[misc]
    """An `EnginePolicy` behind RLlib's interface; `module_spec` describes one. It raises ValueError
    when built for actions that are neither Discrete nor a plain Gaussian over a Box."""

    def setup(self) -> None:
        config = self.model_config
        own_spaces = (self.observation_space, self.action_space)
        # RLlib has its own optimiser; SB3's is built with the policy and never used.
        kind, schedule = _policy_class(config["policy"]), ConstantSchedule(0.0)
        self.policy: EnginePolicy = kind(*own_spaces, schedule, **config["policy_kwargs"])
        if type(self.policy.action_dist) not in (CategoricalDistribution, DiagGaussianDistribution):
            raise ValueError(
                f"{self.action_space} with {type(self.policy.action_dist).__name__}: under RLlib "
                "actions are Discrete, or a Box without use_sde and squash_output"
            )
        if config["load"] is not None:
            put_tensors(self.policy, unique_tensors(load_policy(config["load"], "cpu")))

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """Zeros [L, h]; nothing for a policy without memory."""
        shape = self.policy.state_shape
        return {name: np.zeros(shape, np.float32) for name in ("hc" if shape[0] else "")}

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return self._play(batch)[0]

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        with record_gates(self.policy) as self.gates:  # of mixtures of experts, for the loss
            outputs, latent = self._play(batch)
        return outputs | {Columns.EMBEDDINGS: latent.critic}

    def _play(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Latent]:
        latent, state = self._unroll(self.policy, batch)
        outputs = {Columns.ACTION_DIST_INPUTS: _distribution_inputs(self.policy, latent)}
        return outputs | ({Columns.STATE_OUT: state} if state else {}), latent

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Values [B, T] (or [B] of a policy without memory)."""
        if embeddings is None:
            embeddings = self._unroll(self.policy, batch)[0].critic
        return self.policy.values(Latent(embeddings, embeddings)).squeeze(-1)

    @staticmethod
    def _unroll(policy: EnginePolicy, batch: dict[str, Any]) -> tuple[Latent, dict[str, Tensor]]:
        """Latents [B, T, ...] (or [B, ...] of a policy without memory) and the next state."""
        obs = batch[Columns.OBS]
        rows = next(iter(obs.values())) if isinstance(obs, dict) else obs
        if not policy.state_shape[0]:
            return policy.features(obs, rows.shape[:1]), {}
        h, c = (_swapped(batch[Columns.STATE_IN][name]).contiguous() for name in "hc")  # [L, B, h]
        # A row of RLlib is of one episode, and its state is zero where that begins.
        nowhere = rows.new_zeros(rows.shape[1::-1], dtype=torch.bool)  # [T, B]
        latent, (h, c) = policy.unroll(map_tensors(_swapped, obs), (h, c), nowhere)
        return map_tensors(_swapped, latent), {"h": _swapped(h), "c": _swapped(c)}

    # SB3's policies hold their encoder under three names: it is sent and saved once. RLlib's own
    # `set_state` ignores names that it does not know, and in a learner also those that are missing.

    def get_state(self, *_: Any, inference_only: bool = False, **__: Any) -> dict[str, np.ndarray]:
        """Every tensor once."""
        return {
            name: tensor.detach().cpu().numpy().copy()
            for name, tensor in unique_tensors(self).items()
            if not (inference_only and name.startswith("_old."))  # APPO's, of learners alone
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a state of other names or shapes."""
        put_tensors(self, {name: torch.tensor(array) for name, array in state.items()})


class TargetPolicyModule(PolicyModule, TargetNetworkAPI):  # type: ignore[misc]
    """For APPO, which compares with an older copy of the policy."""

    def make_target_networks(self) -> None:
        self._old = make_target_network(self.policy)

    def get_target_network_pairs(self) -> list[tuple[Any, Any]]:
        return [(self.policy, self._old)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            latent, _ = self._unroll(self._old, batch)
            return {TARGET_NETWORK_ACTION_DIST_INPUTS: _distribution_inputs(self._old, latent)}


class _OwnLosses(TorchLearner):  # type: ignore[misc]
    """Mixin of learners: what A3C adds to the loss, clips and watches.

    `learner_config_dict` may have `orth_coef` (RLlib's losses are means, so a tenth of A3C's or
    less), `balance_coef`, and `reward_clip` (IMPALA and APPO; PPO knows its advantages before).
    """

    def _make_module(self) -> Any:
        """RLlib's; ValueError where actions would be others than the policy means."""
        made = super()._make_module()
        own = [module for module in made.values() if isinstance(module, PolicyModule)]
        for space in (module.action_space for module in own if self.config.normalize_actions):
            if isinstance(space, spaces.Box) and ((space.low != -1) | (space.high != 1)).any():
                raise ValueError(
                    f"RLlib stretches actions to the bounds of {space}, where A3C and load_policy "
                    "clip them; give .environment(normalize_actions=False, clip_actions=True)"
                )
        return made

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """RLlib's loss of one module, and ours."""
        module: PolicyModule = self.module[module_id].unwrapped()
        own = config.learner_config_dict
        if clip := own.get("reward_clip"):
            batch[Columns.REWARDS] = batch[Columns.REWARDS].float().clamp(-clip, clip)
        with record_gates(module.policy) as gates:  # of the critic; the actor has been asked before
            loss: Tensor = super().compute_loss_for_module(
                module_id=module_id, config=config, batch=batch, fwd_out=fwd_out
            )
        both = {name: [*module.gates.get(name, []), *found] for name, found in gates.items()}
        coefs = (own.get("orth_coef", 0.0), own.get("balance_coef", 0.0))
        added = regularisation_loss(module.policy, both, *coefs)
        watch(module.policy, batch)
        if added is None:
            return loss
        self.metrics.log_value((module_id, "regularisation_loss"), added.item(), window=1)
        return loss + added


class _FailingAloud(_OwnLosses):
    """Mixin of learners that learn in a thread: RLlib would wait for ever for one that has died."""

    _failure: Exception | None = None

    def _update(self, batch: Any, **options: Any) -> Any:
        """Called in the thread, which goes on after an exception so that nobody waits for it."""
        try:
            return super()._update(batch, **options)
        except Exception as error:
            self._failure = error
            return {}, {}, {}

    def update(self, *arguments: Any, **options: Any) -> Any:
        """RLlib's, and LearnerStoppedError if the thread has failed."""
        result = super().update(*arguments, **options)
        if self._failure is not None:
            raise LearnerStoppedError(f"the learner failed: {self._failure}") from self._failure
        return result


class IMPALALearner(_FailingAloud, IMPALATorchLearner):  # type: ignore[misc]
    """IMPALA's, with ours."""


class APPOLearner(_FailingAloud, APPOTorchLearner):  # type: ignore[misc]
    """APPO's, with ours."""


class PPOLearner(_OwnLosses, PPOTorchLearner):  # type: ignore[misc]
    """PPO's, with ours."""


class LearnerGuard(RLlibCallback):  # type: ignore[misc]
    """Raises LearnerStoppedError from `Algorithm.train` after `patience` seconds without an update:
    `config.callbacks(LearnerGuard)`. Where learners are processes of their own (`num_learners` of 1
    and more), RLlib does not stop when one of them fails, but goes on playing for ever."""

    patience = 300.0
    """Seconds; the first update may take as long as actors take to start."""
    _steps, _since = -1.0, 0.0
    """Timesteps that were learnt from, and the monotonic time at which that was new."""

    def on_train_result(self, *, result: dict[str, Any], **_: Any) -> None:
        """Called by RLlib after every iteration."""
        now = time.monotonic()
        learners = result.get("learners", {}).get("__all_modules__", {})
        steps = learners.get("num_module_steps_trained_lifetime", max(0.0, self._steps))
        if steps != self._steps:
            self._steps, self._since = steps, now
        elif now - self._since > self.patience:
            raise LearnerStoppedError(
                f"the learner has not learnt for {now - self._since:.0f} s, since {steps:.0f} "
                "timesteps: its exception is in the logs of Ray (/tmp/ray/session_latest/logs)"
            )


def module_spec(
    policy: str | type[EnginePolicy],
    *,
    rollout_fragment_length: int,
    target: bool = False,
    policy_kwargs: dict[str, Any] | None = None,
    load: str | Path | None = None,
) -> RLModuleSpec:
    """What `AlgorithmConfig.rl_module(rl_module_spec=...)` takes; ValueError for unknown policies.

    Args:
        policy: a name such as `NeurocoderCnnLstmPolicy`, or a class of yours.
        rollout_fragment_length: as for `env_runners`. RLlib appends a step to every fragment, so a
            row of the learner has one more; in shorter rows half of the work would be padding.
        target: for APPO.
        policy_kwargs: as for A3C.
        load: folder of `export_policy` to begin with.
    """
    _policy_class(policy)
    for name in {"orth_coef", "balance_coef"} & set(policy_kwargs or {}):
        raise ValueError(f"{name} belongs into learner_config_dict, not into policy_kwargs")
    return RLModuleSpec(
        module_class=TargetPolicyModule if target else PolicyModule,
        model_config={
            "policy": policy,
            "policy_kwargs": policy_kwargs or {},
            "load": None if load is None else str(load),
            "max_seq_len": rollout_fragment_length + 1,
        },
    )


def export_from(algorithm: Any, folder: str | Path, module_id: str = "default_policy") -> Path:
    """Write the policy that an RLlib algorithm has trained, for `load_policy`: no pickles, and no
    Ray is needed to read it. Returns the folder."""
    module: PolicyModule = algorithm.get_module(module_id)  # of this process; its weights lag
    weights = algorithm.learner_group.get_weights()[module_id]
    module.set_state({n: array for n, array in weights.items() if not n.startswith("_old.")})
    return export_policy(module.policy, folder)


@torch.no_grad()
def watch(policy: EnginePolicy, batch: dict[str, Any]) -> None:
    """Take the images of a batch, without its padding, into the mean image, where there is one.

    Several learners (`torch.distributed`) take those of all of them, so their means stay equal.
    """
    means = [part for part in policy.modules() if isinstance(part, MeanImage)]
    if not means:
        return
    obs = batch[Columns.OBS][batch[Columns.LOSS_MASK].bool()]
    images = preprocess_obs(obs, policy.observation_space, policy.normalize_images)
    assert isinstance(images, Tensor)  # an encoder with a mean image reads no dicts
    total, count = images.sum(0), torch.tensor(len(images), device=images.device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        distributed.all_reduce(count)
    for mean in means:
        mean.add(total / count, int(count))


def _policy_class(policy: str | type[EnginePolicy]) -> type[EnginePolicy]:
    if isinstance(policy, str) and policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; {suggest(policy, POLICIES)}")
    return POLICIES[policy] if isinstance(policy, str) else policy


def _distribution_inputs(policy: EnginePolicy, latent: Latent) -> Tensor:
    """What RLlib's distribution is made from: logits, or means and log standard deviations."""
    means: Tensor = policy.action_net(policy.mlp_extractor.forward_actor(latent.actor))
    if isinstance(policy.action_space, spaces.Box):
        assert isinstance(policy.log_std, Tensor)
        return torch.cat([means, policy.log_std.expand_as(means)], dim=-1)
    return means
