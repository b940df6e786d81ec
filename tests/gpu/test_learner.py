"""The learner on CUDA: layers as on the CPU, graphs as eager updates, memory, going on."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from ncrl.agents import A3C
from ncrl.agents.learning.objective import Lesson
from ncrl.agents.playing.buffers import RolloutBatch, RolloutShape
from ncrl.layers import make_layer
from ncrl.shell.tensors import tensors_in
from tests.agents.test_buffers import make_shape, numbered

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("neurocoder", {"num_slots": 20, "num_steps": 1, "residual": True}),
    ("neurocoder", {"num_slots": 20, "num_steps": 3, "residual": True}),
    ("neurocoder", {"num_slots": 20, "num_steps": 5, "residual": False}),
    ("neurocoder", {"num_slots": 20, "preset": "official"}),
    ("hypernet", {}),
    ("film", {}),
    ("nsm", {}),
]
HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "neurocoder": {"num_slots": 20, "num_heads": 5},
}


class Images(gym.Env):
    """Frames that count, in episodes of 3 to 30 timesteps."""

    observation_space = spaces.Box(0, 255, (84, 84, 1), np.uint8)
    action_space = spaces.Discrete(4)

    def __init__(self, length: int) -> None:
        self.length, self.tick = length, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.tick = 0
        return self.frame(), {}

    def step(self, action: int) -> tuple:
        self.tick += 1
        over = self.tick == self.length
        return self.frame(), float(self.tick % 3 == action % 3), over, False, {}

    def frame(self) -> np.ndarray:
        frame = np.zeros((84, 84, 1), np.uint8)
        frame[self.tick : self.tick + 9, 10:30] = 200
        return frame


def make_model(head: str = "neurocoder", *, captured: bool = True, **options: Any) -> A3C:
    env = DummyVecEnv([lambda i=i: Images((3, 7, 19, 30)[i]) for i in range(4)])  # type: ignore[misc]
    arguments: dict[str, Any] = {"use_rms_prop": False, "seed": 0, "device": "cuda"} | options
    policy_kwargs = {"head": head, "head_kwargs": HEADS[head], "lstm_hidden_size": 64}
    if not arguments["use_rms_prop"]:
        # With its own of 1e-8 Adam makes whole steps out of rounding errors, which reach 1e-3 where
        # a bias sums over thousands of pixels.
        policy_kwargs["optimizer_kwargs"] = {"eps": 0.1}
    model = A3C("CnnLstmPolicy", env, policy_kwargs=policy_kwargs, **arguments)
    if not captured:
        be_eager(model)
    return model


def be_eager(model: A3C) -> None:
    model.learner.graphed.reason = "not wanted"


def is_captured(model: A3C) -> bool:
    return model.learner.graphed.reason is None and model.learner.graphed._captured is not None


def assert_close(one: A3C, other: A3C, rtol: float = 1e-3, atol: float = 5e-4) -> None:
    for mine, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def test_a_model_with_a_bonus_is_loaded(tmp_path: Path) -> None:
    """SB3 puts all tensors of a file on the GPU, where demonstrations and their draws are none."""
    model = make_model(intrinsic_reward="rnd").learn(240)
    model.save(tmp_path / "model.zip")
    loaded = A3C.load(tmp_path / "model.zip", device="cuda")
    assert loaded.exploration is not None
    assert loaded.exploration.memory.generator.device.type == "cpu"
    loaded.set_env(make_model().env)
    loaded.learn(240)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("batch", [8, 320])
def test_layers_give_what_they_give_on_the_cpu(
    kind: str, options: dict[str, Any], batch: int
) -> None:
    torch.manual_seed(0)
    layer = make_layer(kind, 64, 18, **options).double()
    results = []
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(layer).to(device)
        torch.manual_seed(1)
        x = torch.randn(batch, 64, dtype=torch.float64).to(device).requires_grad_()
        y = moved(x)
        sources = [x, *(p for p in moved.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(y.sin().sum(), sources, allow_unused=True)
        results.append([t.detach().cpu() for t in (y, *gradients) if t is not None])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_rms_prop", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("batch_size", [None, 40])
def test_a_captured_update_is_the_eager_one(
    head: str, use_rms_prop: bool, batch_size: int | None
) -> None:
    options = {"use_rms_prop": use_rms_prop, "batch_size": batch_size}
    eager = make_model(head, captured=False, **options).learn(80)
    captured = make_model(head, **options).learn(80)
    assert is_captured(captured)
    batch = make_model(head, captured=False).learn(160)._batch
    assert batch is not None and batch.rollout.episode_start.any()
    for model in (eager, captured):
        model._batch = batch
        model._current_progress_remaining = 0.7
        for _ in range(5):
            model.train()
    assert captured.learner.graphed._captures == 1
    assert_close(eager, captured)


@pytest.mark.parametrize("use_rms_prop", [True, False])
def test_a_captured_update_that_is_not_finite_changes_nothing(use_rms_prop: bool) -> None:
    model = make_model(use_rms_prop=use_rms_prop).learn(160)
    assert is_captured(model) and model._batch is not None
    good = model._batch
    broken = good.rollout._replace(rewards=good.rollout.rewards * float("nan"))
    before = copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))
    model.learner.update(Lesson(broken), model._objective(), model.max_grad_norm)
    after = (model.policy.state_dict(), model.policy.optimizer.state_dict())
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1]["state"], before[1]["state"], rtol=0, atol=0)
    model._current_progress_remaining = 1.0
    model._batch = good
    model.train()
    assert is_captured(model)
    for name, weight in model.policy.named_parameters():
        changed = not torch.equal(weight, before[0][name])
        assert changed or weight.grad is None or not weight.grad.any(), name


def test_the_learning_rate_reaches_a_captured_optimiser() -> None:
    model = make_model().learn(160)
    model._current_progress_remaining = 1.0
    model.learning_rate = 0.0
    model._setup_lr_schedule()
    before = [p.clone() for p in model.policy.parameters()]
    model.train()
    for now, then in zip(model.policy.parameters(), before, strict=True):
        assert torch.equal(now, then)
    assert model.learner.graphed._captures == 1


def test_a_saved_model_goes_on(tmp_path: Path) -> None:
    """Loaded again, memory of weights and optimiser is another, and is captured anew."""
    model = make_model().learn(240)
    model.save(tmp_path / "model.zip")
    loaded = A3C.load(tmp_path / "model.zip", device="cuda")
    loaded.set_logger(model.logger)  # which `learn` would do
    assert_close(loaded, model, 0, 0)
    for one in (model, loaded):
        one._batch, one._current_progress_remaining = model._batch, 0.5
        one.train()
    assert is_captured(loaded)
    assert_close(loaded, model)
    loaded.policy.optimizer.load_state_dict(copy.deepcopy(model.policy.optimizer.state_dict()))
    for one in (model, loaded):
        one.train()
    assert_close(loaded, model)


@pytest.mark.parametrize("captured", [True, False])
def test_memory_stays_flat_over_1000_updates(captured: bool) -> None:
    model = make_model(captured=captured).learn(160)
    for _ in range(10):
        model.train()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        model.train()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert is_captured(model) == captured


def test_batches_arrive_whole_while_the_device_is_busy() -> None:
    """The host goes on at once; what is asked for after that reads what was gathered.

    Nothing here waits for the device until the end, so that later batches are gathered while the
    copies of earlier ones are still to come.
    """
    shape: RolloutShape = make_shape(n_steps=50, n_envs=64)
    batch = RolloutBatch(shape, torch.device("cuda"))
    busy = torch.randn(4000, 4000, device="cuda")
    rollouts, read = [numbered(shape, first) for first in range(6)], []
    for rollout in rollouts:
        moved = batch.gather([rollout])
        read.append([tensor.clone() for tensor in tensors_in(moved)])
        for _ in range(20):
            busy = busy @ busy / 4000
    for rollout, tensors in zip(rollouts, read, strict=True):
        for mine, expected in zip(tensors, tensors_in(rollout), strict=True):
            torch.testing.assert_close(mine.cpu(), expected, rtol=0, atol=0)
