"""How many operations an update asks for: on a GPU each is a launch, which costs more than most of
them take there.

Counted on the CPU with torch's profiler: operations that compute, that is no views and no
allocations, and of those that consist of others only the innermost. Torch's `_foreach_` and
`_fused_` operations count once, as they are one launch on a GPU.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.profiler import ProfilerActivity, profile

from ncrl.agents import A3C

VIEWS = (
    *("view", "reshape", "t", "transpose", "permute", "expand", "as_strided", "select", "slice"),
    *("narrow", "unsqueeze", "squeeze", "unbind", "split", "chunk", "detach", "alias", "flatten"),
    *("view_as", "expand_as", "movedim", "split_with_sizes", "numpy_T", "_reshape_alias"),
    *("_unsafe_view", "lift_fresh", "contiguous", "to", "resolve_conj", "resolve_neg"),
)
ALLOCATIONS = ("empty", "empty_strided", "empty_like", "resize_", "as_strided_")
NO_WORK = {*VIEWS, *ALLOCATIONS, "result_type", "cudnn_is_acceptable"}
PAPER_HEADS = {"num_slots": 80, "num_heads": 15, "num_least_used": 5}


class Images(gym.Env):
    """Frames as of Atari; episodes outlast a rollout."""

    observation_space = spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.tick = 0
        return np.zeros((84, 84, 1), np.uint8), {}

    def step(self, action: int) -> tuple:
        self.tick += 1
        frame = np.full((84, 84, 1), self.tick % 256, np.uint8)
        return frame, float(self.tick % 3 == 0), self.tick == 90, False, {}


def counts(event: Any) -> bool:
    name = event.name.removeprefix("aten::")
    return event.name.startswith("aten::") and name not in NO_WORK


def is_one_launch(event: Any) -> bool:
    return event.name.startswith(("aten::_foreach_", "aten::_fused_"))


def operations(event: Any) -> int:
    """That compute, in this one and those that it consists of."""
    if is_one_launch(event):
        return 1
    return sum(map(operations, event.cpu_children)) or int(counts(event))


def operations_of_an_update(head: str) -> int:
    options = {"head": head, "head_kwargs": PAPER_HEADS if head == "neurocoder" else {}}
    model = A3C(
        "CnnLstmPolicy",
        DummyVecEnv([Images] * 4),
        use_rms_prop=False,
        policy_kwargs=options,
        seed=0,
    ).learn(80)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model.train()
    return sum(operations(event) for event in found.events() if event.cpu_parent is None)


@pytest.mark.parametrize(("head", "most"), [("linear", 220), ("neurocoder", 500)])
def test_operations_of_an_update_of_80_timesteps(head: str, most: int) -> None:
    assert most / 3 < operations_of_an_update(head) <= most


def test_what_is_counted() -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    for weight in weights:
        weight.grad = torch.ones(3)
    adam = torch.optim.Adam(weights, fused=True)
    adam.step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        torch.ones(4, 4)[1:].T.reshape(3, 4) + 1  # ones, sum
        adam.step()  # of the counts of steps, of the weights
    assert sum(operations(e) for e in found.events() if e.cpu_parent is None) in (4, 5)
