"""The learner's update as a CUDA graph: captured once, then launched whole for every batch.

An update of few timesteps is hundreds of small kernels, and asking for them one by one takes the
host far longer than the device needs for them (`benchmarks/gpu.py --tables update`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncrl.agents.learning.objective import Lesson, Objective
from ncrl.agents.learning.optim import can_scale
from ncrl.agents.learning.update import Measured, Update, update_on_device
from ncrl.baselines import MoELinear
from ncrl.sb3 import EnginePolicy
from ncrl.sb3.engine import map_tensors
from ncrl.shell.tensors import tensors_in

logger = logging.getLogger(__name__)

WARM_UPS = 3
"""Updates before the capture, in which libraries choose their kernels and allocate what they keep.
Their gradients are made not finite, so that the updates change nothing."""

MAX_CAPTURES = 8
"""After so many captures of one model a graph is not worth it: its settings change all the time."""


class _Captured(NamedTuple):
    """A graph and the memory that it reads and writes."""

    key: tuple[Any, ...]
    replay: Callable[[], None]
    lesson: Lesson
    rates: list[Tensor]
    measured: Measured


class GraphedUpdates:
    """Makes the updates of one model, by a CUDA graph where that is possible."""

    reason: str | None
    """Why updates are not captured; None where they are."""

    def __init__(self, device: torch.device) -> None:
        self.reason = None if device.type == "cuda" else f"the learner is on {device}, not on CUDA"
        self._captured: _Captured | None = None
        self._captures = 0

    def update(
        self, policy: EnginePolicy, lesson: Lesson, objective: Objective, max_grad_norm: float
    ) -> Update | None:
        """An update by `update_on_device`; None where it has to be made without a graph.

        The next call overwrites `Update.latent`. The first call with a rollout of another shape, or
        with other settings or memory of the weights, captures the update anew.
        """
        key = _what_is_fixed(policy, lesson, objective, max_grad_norm)
        if self._captured is None or self._captured.key != key:
            self._captured = None  # frees its memory
            self._capture(policy, lesson, objective, max_grad_norm)
        captured = self._captured
        if captured is None:
            return None
        for into, tensor in zip(tensors_in(captured.lesson), tensors_in(lesson), strict=True):
            into.copy_(tensor, non_blocking=True)
        for rate, group in zip(captured.rates, policy.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        captured.replay()
        return captured.measured.on_host()

    def _capture(
        self, policy: EnginePolicy, lesson: Lesson, objective: Objective, max_grad_norm: float
    ) -> None:
        self.reason = _obstacle(policy)
        if self.reason is None and self._captures == MAX_CAPTURES:
            self.reason = f"settings changed {MAX_CAPTURES} times"
        if self.reason is None:
            self._captures += 1
            static = map_tensors(lambda x: x.to(policy.device, copy=True).contiguous(), lesson)
            rates = [torch.tensor(float(g["lr"])) for g in policy.optimizer.param_groups]
            rates = [rate.to(policy.device) for rate in rates]

            def run() -> Measured:
                return update_on_device(policy, static, objective, max_grad_norm)

            static.rollout.rewards.fill_(float("nan"))
            try:
                with torch.cuda.device_of(rates[0]), _for_capture(policy.optimizer, rates):
                    replay, measured = record(run)
            except Exception as error:
                policy.optimizer.zero_grad(set_to_none=True)
                first_line, _, _ = str(error).strip().partition("\n")
                self.reason = f"{type(error).__name__}: {first_line}"
            else:
                # Not the key from before: the first update makes the state of the optimiser.
                key = _what_is_fixed(policy, lesson, objective, max_grad_norm)
                self._captured = _Captured(key, replay, static, rates, measured)
        if self.reason is not None:
            logger.warning("updates are not captured as a CUDA graph: %s", self.reason)


def record(run: Callable[[], Measured]) -> tuple[Callable[[], None], Measured]:
    """Capture `run` as a CUDA graph, after `WARM_UPS` calls of it. Returns what launches the graph,
    and the result of `run`, which every launch overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those of callbacks, may go on with CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        measured = run()
    return graph.replay, measured


def _obstacle(policy: EnginePolicy) -> str | None:
    """What makes it impossible to capture an update of this policy; None if nothing is known."""
    if not can_scale(policy.optimizer):
        return (
            f"{type(policy.optimizer).__name__} cannot leave out a step on the device; "
            "SharedRMSProp and Adam(fused=True) can"
        )
    if any(isinstance(part, MoELinear) for part in policy.modules()):
        return "a mixture of experts was never compared with its captured update"
    if any(hasattr(part, "_orig_mod") for part in policy.modules()):
        return "the policy is compiled"
    return None


def _what_is_fixed(
    policy: EnginePolicy, lesson: Lesson, objective: Objective, max_grad_norm: float
) -> tuple[Any, ...]:
    """What a captured update cannot follow: settings, shapes, and where everything lies."""
    optimizer = policy.optimizer
    weights: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    kept = tensors_in(optimizer.state)
    addresses = [tensor.data_ptr() for tensor in (*weights, *policy.buffers(), *kept)]
    settings = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return (
        objective,
        max_grad_norm,
        [tensor.shape for tensor in tensors_in(lesson)],
        policy.training,
        [p.requires_grad for p in weights],
        addresses,
        settings,
    )


@contextmanager
def _for_capture(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Inside, learning rates are these tensors, which a graph reads anew at every launch."""
    before = [(group["lr"], group.get("capturable")) for group in optimizer.param_groups]
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True  # torch asks for it, and warns while warming up
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True", UserWarning)
            # Of streams that wait for each other more than they must; tests compare the results.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream", UserWarning)
            yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = capturable
