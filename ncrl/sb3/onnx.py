"""Trained policies as ONNX files, which run without torch (in onnxruntime, for example).

Shapes: B environments (free in the file), L LSTM layers, h LSTM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

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
    space, device = policy.observation_space, policy.device
    parts = space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
    inputs = [*parts]
    is_box = isinstance(policy.action_space, spaces.Box)
    outputs = ["mean", "log_std", "values"] if is_box else ["logits", "values"]
    # Zeros: a sample would move the random stream of a space that may be the environment's.
    obs = {
        name: torch.from_numpy(np.zeros((EXAMPLES, *(part.shape or ())), part.dtype)).to(device)
        for name, part in parts.items()
    }
    state: list[Tensor] = []
    if policy.state_shape[0]:
        if taken := set(STATE) & set(parts):
            raise ValueError(
                f"the entry {min(taken)!r} of the observation has the name of an input of the "
                f"state, one of {', '.join(STATE)}; give it another name"
            )
        starts = torch.zeros(EXAMPLES, dtype=torch.bool, device=device)
        state = [*policy.initial_state(EXAMPLES), starts]
        inputs += STATE
        outputs += ["next_h", "next_c"]
    batch = torch.export.Dim("batch")
    axes_of_state = [{1: batch}, {1: batch}, {0: batch}] if state else []
    step = _Step(policy)
    # A tracer takes a number of environments for constant that could be another size.
    with eval_mode(step), torch.no_grad(), static_unroll():
        torch.onnx.export(
            step,
            (obs, state),
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=({name: {0: batch} for name in parts}, axes_of_state),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


class _Step(nn.Module):
    """A policy as a function from tensors to tensors."""

    def __init__(self, policy: EnginePolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, parts: dict[str, Tensor], state: list[Tensor]) -> Sequence[Tensor]:
        """From observations by name, and the inputs of `STATE`, if there is a state."""
        policy = self.policy
        obs = parts if isinstance(policy.observation_space, spaces.Dict) else parts["obs"]
        if state:
            h, c, start = state
        else:
            rows = next(iter(parts.values()))
            h, c = policy.initial_state(rows.shape[0])
            start = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
        latent, next_state = policy.encode(obs, (h, c), start)
        outputs = [policy.action_net(policy.mlp_extractor.forward_actor(latent.actor))]
        if isinstance(policy.action_space, spaces.Box):
            outputs.append(policy.log_std.expand_as(outputs[0]))
        outputs.append(policy.values(latent).squeeze(-1))
        return [*outputs, *next_state] if state else outputs
