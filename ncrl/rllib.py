"""The policies of this package as RLModules of Ray's RLlib, for IMPALA, APPO and PPO.

It is the same policy under another algorithm: RLlib has losses, optimisers, an idea of episodes and
checkpoints of its own. The same *algorithm* on many machines is `ncrl.agents.A3C(cluster=...)`.

A module contains the SB3 policy, so its weights have the names that `export_policy`, `load_policy`
and A3C know, behind `policy.`. Needs `ncrl[rllib]`.

Shapes: B rows, T timesteps, L LSTM layers, h LSTM width. RLlib is batch-major: [B, T, ...].
"""

from __future__ import annotations

import time
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
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    DiagGaussianDistribution,
)
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.utils import ConstantSchedule
from torch import Tensor, distributed

import ncrl.sb3
from ncrl.baselines import record_gates
from ncrl.networks import MeanImage
from ncrl.sb3 import EnginePolicy, Latent, export_policy, load_policy
from ncrl.sb3.engine import map_obs
from ncrl.sb3.export import load_tensors, unique_tensors
from ncrl.sb3.regularise import regularisation_loss
from ncrl.settings import suggest

OWN_OPTIONS = ("orth_coef", "balance_coef", "reward_clip")
"""Keys of `learner_config_dict` that our learners read."""


class LearnerStoppedError(RuntimeError):
    """The learner has failed, or has not learnt for a long time, while games are played."""


class PolicyModule(TorchRLModule, ValueFunctionAPI):  # type: ignore[misc]
    """An `EnginePolicy` behind RLlib's interface; `module_spec` describes one.

    Raises:
        ValueError: when built, for an unknown policy, and for actions that are neither Discrete nor
            a plain Gaussian over a Box.
    """

    def setup(self) -> None:
        """RLlib's constructor."""
        config = self.model_config
        # RLlib has its own optimiser; SB3's is built with the policy and never used.
        self.policy: EnginePolicy = _policy_class(config["policy"])(
            self.observation_space,
            self.action_space,
            ConstantSchedule(0.0),
            **config.get("policy_kwargs", {}),
        )
        plain = (CategoricalDistribution, DiagGaussianDistribution)
        if type(self.policy.action_dist) not in plain:
            raise ValueError(
                "under RLlib actions are Discrete, or a Box without use_sde and squash_output, got "
                f"{self.action_space} with {type(self.policy.action_dist).__name__}"
            )
        self.gates: dict[str, list[Any]] = {}
        """Of mixtures of experts, in the latest `forward_train`."""
        if folder := config.get("load"):
            load_tensors(self.policy, unique_tensors(load_policy(folder, "cpu")))

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """Zeros [L, h]; nothing for a policy without memory."""
        layers, width = self.policy.state_shape
        if not layers:
            return {}
        return {name: np.zeros((layers, width), np.float32) for name in ("h", "c")}

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        latent, state = self._unroll(self.policy, batch)
        outputs = {Columns.ACTION_DIST_INPUTS: _distribution_inputs(self.policy, latent)}
        return outputs | ({Columns.STATE_OUT: state} if state else {})

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        with record_gates(self.policy) as gates:
            latent, state = self._unroll(self.policy, batch)
            inputs = _distribution_inputs(self.policy, latent)
        self.gates = gates
        outputs = {Columns.ACTION_DIST_INPUTS: inputs, Columns.EMBEDDINGS: latent.critic}
        return outputs | ({Columns.STATE_OUT: state} if state else {})

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
        state = batch[Columns.STATE_IN]
        h, c = (state[name].transpose(0, 1).contiguous() for name in ("h", "c"))  # [L, B, h]
        # A row of RLlib is of one episode, and its state is zero where that begins.
        nowhere = torch.zeros(rows.shape[1], rows.shape[0], dtype=torch.bool)  # [T, B]
        latent, (h, c) = policy.unroll(map_obs(_swapped, obs), (h, c), nowhere)
        return latent.map(_swapped), {"h": _swapped(h), "c": _swapped(c)}

    # SB3's policies hold their encoder under three names: it is sent and saved once. RLlib's own
    # `set_state` ignores names that it does not know, and in a learner also those that are missing.

    def get_state(
        self, *args: Any, inference_only: bool = False, **kwargs: Any
    ) -> dict[str, np.ndarray]:
        """Every tensor once."""
        return {
            name: tensor.detach().cpu().numpy().copy()
            for name, tensor in unique_tensors(self).items()
            if not (inference_only and name.startswith("_old."))  # APPO's, of learners alone
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a state of other names or shapes."""
        load_tensors(self, {name: torch.tensor(array) for name, array in state.items()})


class TargetPolicyModule(PolicyModule, TargetNetworkAPI):  # type: ignore[misc]
    """For APPO, which compares with an older copy of the policy."""

    def make_target_networks(self) -> None:
        """The copy."""
        self._old = make_target_network(self.policy)

    def get_target_network_pairs(self) -> list[tuple[Any, Any]]:
        """What RLlib copies, and where to."""
        return [(self.policy, self._old)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the copy would play."""
        with torch.no_grad():
            latent, _ = self._unroll(self._old, batch)
            return {TARGET_NETWORK_ACTION_DIST_INPUTS: _distribution_inputs(self._old, latent)}


class OwnLosses:
    """Mixin of learners: what A3C adds to the loss, clips and watches.

    `learner_config_dict` may have `orth_coef` (RLlib's losses are means, so a tenth of A3C's or
    less), `balance_coef`, and `reward_clip` (IMPALA and APPO; PPO knows its advantages before).
    """

    module: Any
    metrics: Any

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """RLlib's loss of one module, and ours."""
        module: PolicyModule = self.module[module_id].unwrapped()
        own = config.learner_config_dict
        if clip := own.get("reward_clip"):
            batch[Columns.REWARDS] = batch[Columns.REWARDS].float().clamp(-clip, clip)
        with record_gates(module.policy) as gates:  # of the critic; the actor has been asked before
            loss: Tensor = super().compute_loss_for_module(  # type: ignore[misc]
                module_id=module_id, config=config, batch=batch, fwd_out=fwd_out
            )
        both = {name: [*module.gates.get(name, []), *found] for name, found in gates.items()}
        added = regularisation_loss(
            module.policy, both, own.get("orth_coef", 0.0), own.get("balance_coef", 0.0)
        )
        watch(module.policy, batch)
        if added is None:
            return loss
        self.metrics.log_value((module_id, "regularisation_loss"), added.item(), window=1)
        return loss + added


class FailingAloud(OwnLosses):
    """Mixin of learners that learn in a thread: RLlib would wait for ever for one that has died."""

    _failure: Exception | None = None

    def _update(self, batch: Any, **options: Any) -> Any:
        """Called in the thread, which goes on after an exception so that nobody waits for it."""
        try:
            return super()._update(batch, **options)  # type: ignore[misc]
        except Exception as error:
            self._failure = error
            return {}, {}, {}

    def update(self, *arguments: Any, **options: Any) -> Any:
        """RLlib's, and LearnerStoppedError if the thread has failed."""
        result = super().update(*arguments, **options)  # type: ignore[misc]
        if self._failure is not None:
            raise LearnerStoppedError(f"the learner failed: {self._failure}") from self._failure
        return result


class IMPALALearner(FailingAloud, IMPALATorchLearner):  # type: ignore[misc]
    """IMPALA with the losses of ncrl's layers."""


class APPOLearner(FailingAloud, APPOTorchLearner):  # type: ignore[misc]
    """APPO with the losses of ncrl's layers."""


class PPOLearner(OwnLosses, PPOTorchLearner):  # type: ignore[misc]
    """PPO with the losses of ncrl's layers."""


class LearnerGuard(RLlibCallback):  # type: ignore[misc]
    """A callback that ends a training whose learner stands still: `config.callbacks(LearnerGuard)`.

    Where learners are processes of their own (`num_learners` of 1 and more), RLlib does not stop
    when one of them fails, but goes on playing for ever.

    Raises:
        LearnerStoppedError: from `Algorithm.train`, after `patience` seconds without an update.
    """

    patience = 300.0
    """Seconds; the first update may take as long as actors take to start."""

    def __init__(self) -> None:
        self._trained = 0.0
        self._since: float | None = None

    def on_train_result(self, *, result: dict[str, Any], **_: Any) -> None:
        """Called by RLlib after every iteration."""
        self.look(result, time.monotonic())

    def look(self, result: dict[str, Any], now: float) -> None:
        """Compare the count of what was learnt from with that of the call before."""
        learners = result.get("learners", {}).get("__all_modules__", {})
        trained = float(learners.get("num_module_steps_trained_lifetime", self._trained))
        if self._since is None or trained != self._trained:
            self._trained, self._since = trained, now
        elif now - self._since > self.patience:
            raise LearnerStoppedError(
                f"the learner has not learnt for {now - self._since:.0f} s, since "
                f"{self._trained:.0f} timesteps: look for its exception in the logs of Ray "
                "(/tmp/ray/session_latest/logs)"
            )


def module_spec(
    policy: str | type[EnginePolicy],
    *,
    rollout_fragment_length: int,
    target: bool = False,
    policy_kwargs: dict[str, Any] | None = None,
    load: str | Path | None = None,
) -> RLModuleSpec:
    """What `AlgorithmConfig.rl_module(rl_module_spec=...)` takes.

    Args:
        policy: a name such as `NeurocoderCnnLstmPolicy`, or a class of yours.
        rollout_fragment_length: as for `env_runners`. RLlib appends a step to every fragment, so a
            row of the learner has one more; in shorter rows half of the work would be padding.
        target: for APPO.
        policy_kwargs: as for A3C.
        load: folder of `export_policy` to begin with.

    Raises:
        ValueError: for an unknown policy.
    """
    _policy_class(policy)
    config: dict[str, Any] = {"policy": policy, "policy_kwargs": policy_kwargs or {}}
    config["max_seq_len"] = rollout_fragment_length + 1
    if load is not None:
        config["load"] = str(load)
    kind = TargetPolicyModule if target else PolicyModule
    return RLModuleSpec(module_class=kind, model_config=config)


def export_from(algorithm: Any, folder: str | Path, module_id: str = "default_policy") -> Path:
    """Write the policy that an RLlib algorithm has trained, for `load_policy`: no pickles, and no
    Ray is needed to read it. Returns the folder."""
    module: PolicyModule = algorithm.get_module(module_id)  # of this process; its weights lag
    weights = algorithm.learner_group.get_weights()[module_id]
    own = {
        name.removeprefix("policy."): torch.tensor(array)
        for name, array in weights.items()
        if name.startswith("policy.")
    }
    load_tensors(module.policy, own)
    return export_policy(module.policy, folder)


@torch.no_grad()
def watch(policy: EnginePolicy, batch: dict[str, Any]) -> None:
    """Take the images of a batch, without its padding, into the mean image, where there is one.

    Several learners (`torch.distributed`) take those of all of them, so their means stay equal.
    """
    means = [part for part in policy.modules() if isinstance(part, MeanImage)]
    if not means:
        return
    obs = batch[Columns.OBS]
    if Columns.LOSS_MASK in batch:
        obs = obs[batch[Columns.LOSS_MASK].bool()]
    elif policy.state_shape[0]:
        obs = obs.flatten(0, 1)
    images = preprocess_obs(obs, policy.observation_space, policy.normalize_images)
    assert isinstance(images, Tensor)  # an encoder with a mean image reads no dicts
    total, count = images.sum(0), torch.tensor(float(len(images)), device=images.device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        distributed.all_reduce(count)
    if count > 0:
        for mean in means:
            mean.add(total / count, int(count))


def _policy_class(policy: str | type[EnginePolicy]) -> type[EnginePolicy]:
    if not isinstance(policy, str):
        return policy
    names = [name for name in ncrl.sb3.__all__ if name.endswith("Policy")]
    names = [name for name in names if name not in ("EnginePolicy", "LstmPolicy")]
    if policy not in names:
        raise ValueError(f"unknown policy {policy!r}; {suggest(policy, names)}")
    kind: type[EnginePolicy] = getattr(ncrl.sb3, policy)
    return kind


def _distribution_inputs(policy: EnginePolicy, latent: Latent) -> Tensor:
    """What RLlib's distribution is made from: logits, or means and log standard deviations."""
    means: Tensor = policy.action_net(policy.mlp_extractor.forward_actor(latent.actor))
    if isinstance(policy.action_space, spaces.Box):
        assert isinstance(policy.log_std, Tensor)
        return torch.cat([means, policy.log_std.expand_as(means)], dim=-1)
    return means


def _swapped(x: Tensor) -> Tensor:
    """[B, T, ...] <-> [T, B, ...]."""
    return x.transpose(0, 1)


__all__ = [
    "APPOLearner",
    "IMPALALearner",
    "LearnerGuard",
    "LearnerStoppedError",
    "PPOLearner",
    "PolicyModule",
    "TargetPolicyModule",
    "export_from",
    "module_spec",
]
