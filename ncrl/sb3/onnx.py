"""Trained policies as ONNX files, which run without torch (in onnxruntime, for example).

Shapes: B environments (free in the file), L LSTM layers, h LSTM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn

from ncrl.networks import static_unroll
from ncrl.sb3.engine import EnginePolicy
from ncrl.sb3.export import policy_to_export
from ncrl.seat import eval_mode

EXAMPLES = 97
"""Environments that the tracer is shown."""

STATE = ("h", "c", "episode_start")


def export_onnx(model: BaseAlgorithm | EnginePolicy, path: str | PathLike[str]) -> None:
    """Write one step of a policy to an ONNX file. Needs the packages of the extra `onnx`.

    Inputs of the file: `obs` [B, ...] in the observation space's own type (Dict observations: one
    input for each entry, by its name), and for a policy with an LSTM `h` and `c` [L, B, h], the
    state before the step, zero at first, and `episode_start` [B] bool, where the state is set to
    zero. Outputs: `logits` [B, numbers] for Discrete, MultiDiscrete (one part after another) and
    MultiBinary actions; `mean` and `log_std` [B, numbers] for Box, before clipping; `values` [B];
    and `next_h`, `next_c`.

    Raises:
        ValueError: for a policy that is not one of `ncrl.sb3`, for state-dependent exploration, and
            where an entry of the observation has the name of an input of the state.
        ImportError: without `onnx` and `onnxscript`.
    """
    policy = policy_to_export(model)
    if not isinstance(policy, EnginePolicy):
        raise ValueError(
            f"expected a policy of ncrl.sb3, or a model with one, got {type(policy).__name__}"
        )
    if policy.use_sde:
        raise ValueError("a policy with use_sde=True has no ONNX form: its noise has a state")
    step = _Step(policy)
    # A tracer takes a number of environments for constant that could be another size.
    with eval_mode(step), torch.no_grad(), static_unroll():
        torch.onnx.export(
            step,
            step.example(EXAMPLES),
            str(path),
            input_names=step.inputs,
            output_names=step.outputs,
            dynamic_shapes=(step.free_axes(),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


class _Step(nn.Module):
    """A policy as a function from tensors to tensors."""

    def __init__(self, policy: EnginePolicy) -> None:
        super().__init__()
        self.policy = policy
        space = policy.observation_space
        self.parts = space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
        self.is_recurrent = policy.state_shape[0] > 0
        if self.is_recurrent and (taken := set(STATE) & set(self.parts)):
            raise ValueError(
                f"the entry {min(taken)!r} of the observation has the name of an input of the "
                f"state, one of {', '.join(STATE)}; give it another name"
            )
        self.inputs = [*self.parts, *(STATE if self.is_recurrent else ())]
        is_box = isinstance(policy.action_space, spaces.Box)
        self.outputs = ["mean", "log_std", "values"] if is_box else ["logits", "values"]
        if self.is_recurrent:
            self.outputs += ["next_h", "next_c"]

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        policy = self.policy
        tensors = dict(zip(self.inputs, inputs, strict=True))
        obs: Any = {name: tensors[name] for name in self.parts}
        if not isinstance(policy.observation_space, spaces.Dict):
            obs = tensors["obs"]
        if self.is_recurrent:
            state, start = (tensors["h"], tensors["c"]), tensors["episode_start"]
        else:
            batch, device = inputs[0].shape[0], inputs[0].device
            state = policy.initial_state(batch)
            start = torch.zeros(batch, dtype=torch.bool, device=device)
        latent, next_state = policy.encode(obs, state, start)
        outputs = [policy.action_net(policy.mlp_extractor.forward_actor(latent.actor))]
        if "log_std" in self.outputs:
            outputs.append(policy.log_std.expand_as(outputs[0]))
        outputs.append(policy.values(latent).squeeze(-1))
        return [*outputs, *next_state] if self.is_recurrent else outputs

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs for `batch` environments, zeros: a sample would move the random stream of a space
        that may be the environment's."""
        found = [
            torch.from_numpy(np.zeros((batch, *(part.shape or ())), part.dtype))
            for part in self.parts.values()
        ]
        if self.is_recurrent:
            found += [*self.policy.initial_state(batch), torch.zeros(batch, dtype=torch.bool)]
        return tuple(tensor.to(self.policy.device) for tensor in found)

    def free_axes(self) -> tuple[dict[int, Any], ...]:
        """The axis of the environments in each input."""
        batch = torch.export.Dim("batch")
        axes = [0] * len(self.parts) + ([1, 1, 0] if self.is_recurrent else [])
        return tuple({axis: batch} for axis in axes)
