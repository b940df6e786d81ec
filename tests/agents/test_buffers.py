"""`ncrl.agents.playing.buffers`: layout, poison, shared memory, batches that keep columns apart."""

import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from ncrl.agents.playing.buffers import (
    Rollout,
    RolloutBatch,
    RolloutShape,
    first_rows,
    split_envs,
)
from ncrl.sb3.engine import map_tensors
from ncrl.shell.tensors import tensors_in

VECTORS = spaces.Box(-1, 1, (3,), np.float32)
DICT = spaces.Dict(
    {
        "pixels": spaces.Box(0, 255, (1, 4, 4), np.uint8),
        "speed": spaces.Box(-1, 1, (2,), np.float32),
        "gear": spaces.Discrete(5),
    }
)
CPU = torch.device("cpu")

VECTORS_WITH_MEMORY: dict[str, Any] = {}
DICTS_WITHOUT: dict[str, Any] = {"observation_space": DICT, "lstm_layers": 0, "lstm_size": 0}

both = pytest.mark.parametrize(
    "options",
    [VECTORS_WITH_MEMORY, DICTS_WITHOUT],
    ids=["vectors with memory", "dicts without"],
)


def make_shape(n_steps: int = 4, n_envs: int = 2, **options: Any) -> RolloutShape:
    defaults = {"observation_space": VECTORS, "action_space": spaces.Discrete(5)}
    return RolloutShape(
        n_steps, n_envs, **(defaults | {"lstm_layers": 2, "lstm_size": 6} | options)
    )


def numbered(shape: RolloutShape, first: int) -> Rollout:
    """Every element has its own number; bools are its parity."""
    rollout = shape.allocate()
    for tensor in tensors_in(rollout):
        count = torch.arange(first, first + tensor.numel()).reshape(tensor.shape)
        tensor.copy_(count % 2 == 1 if tensor.dtype == torch.bool else count % 100)
    return rollout


@pytest.mark.parametrize(
    ("space", "tail", "dtype"),
    [
        (spaces.Box(0, 255, (1, 8, 8), np.uint8), (1, 8, 8), torch.uint8),
        (spaces.Box(-1, 1, (3,), np.float32), (3,), torch.float32),
        (spaces.Box(-1, 1, (3,), np.float64), (3,), torch.float64),
        (spaces.Discrete(5), (), torch.int64),
        (spaces.MultiDiscrete([3, 2]), (2,), torch.int64),
        (spaces.MultiBinary(3), (3,), torch.int8),
    ],
)
def test_layout_follows_the_spaces(space: Any, tail: tuple[int, ...], dtype: torch.dtype) -> None:
    rollout = make_shape(7, 3, observation_space=space, action_space=space).allocate()
    assert rollout.obs.shape == (8, 3, *tail) and rollout.obs.dtype == dtype
    assert rollout.actions.shape == (7, 3, *tail)
    # A Gaussian draws float32, whatever the space says; all else is stored as the space has it.
    assert rollout.actions.dtype == (torch.float32 if isinstance(space, spaces.Box) else dtype)
    assert rollout.episode_start.shape == (8, 3)
    for name in ("log_prob", "rewards", "truncation_value"):
        assert getattr(rollout, name).shape == (7, 3), name
    assert rollout.lstm_h.shape == rollout.lstm_c.shape == (2, 3, 6)
    assert rollout.episode_start.dtype == torch.bool


def test_what_nobody_wrote_is_conspicuous() -> None:
    for tensor in tensors_in(make_shape(observation_space=DICT).allocate()):
        if tensor.dtype.is_floating_point:
            assert tensor.isnan().all()
        elif tensor.dtype == torch.bool:
            assert tensor.all()
        else:
            assert (tensor == torch.iinfo(tensor.dtype).max).all()


def test_a_space_without_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="Dict"):
        make_shape(observation_space=spaces.Tuple([VECTORS])).allocate()


def test_dict_observations_have_a_tensor_for_every_entry() -> None:
    rollout = make_shape(7, 3, observation_space=DICT).allocate()
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in rollout.obs.items()}
    assert layout == {
        "pixels": ((8, 3, 1, 4, 4), torch.uint8),
        "speed": ((8, 3, 2), torch.float32),
        "gear": ((8, 3), torch.int64),
    }
    part = map_tensors(lambda tensor: tensor[0], rollout)
    assert part.obs["gear"].shape == (3,) and part.rewards.shape == (3,)


@pytest.mark.parametrize("strange", [[torch.ones(2)], np.ones(2), 1.0])
def test_what_is_no_tree_of_tensors_is_not_left_as_it_is(strange: Any) -> None:
    with pytest.raises(AssertionError, match=f"got {type(strange).__name__}"):
        map_tensors(lambda tensor: tensor[:1], (torch.ones(2), {"a": None, "b": strange}))


@both
def test_groups_of_environments(options: dict[str, Any]) -> None:
    rollout = numbered(make_shape(n_envs=6, **options), 3)
    parts = list(split_envs(rollout, 3))
    assert len(parts) == 3
    for place, part in enumerate(parts):
        for actual, whole in zip(tensors_in(part), tensors_in(rollout), strict=True):
            assert torch.equal(actual, columns(whole, place))


@both
def test_slots_are_views_that_do_not_overlap(options: dict[str, Any]) -> None:
    slots = make_shape(**options).allocate(3)
    for index in range(3):
        for tensor in tensors_in(slots.slot(index)):
            tensor.fill_(index)
    for index in range(3):
        for tensor in tensors_in(slots.slot(index)):
            expected = index > 0 if tensor.dtype == torch.bool else index
            assert (tensor == expected).all()
    assert sum(x.nbytes for x in tensors_in(slots)) == 3 * make_shape(**options).nbytes


def write_slots(kinds: list[Rollout], index: int) -> None:
    for slots in kinds:
        for tensor in tensors_in(slots.slot(index)):
            tensor.fill_(1)


def test_shared_slots_are_written_by_another_process() -> None:
    kinds = [make_shape(**options).allocate(2) for options in (VECTORS_WITH_MEMORY, DICTS_WITHOUT)]
    for tensor in tensors_in(kinds):
        tensor.share_memory_()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_slots, args=(kinds, 1), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for slots in kinds:
        for tensor in tensors_in(slots.slot(1)):
            assert (tensor == 1).all()
        assert slots.slot(0).rewards.isnan().all()


def columns(tensor: Tensor, place: int) -> Tensor:
    return tensor[:, 2 * place : 2 * place + 2]


@both
def test_gather_lays_rollouts_side_by_side_and_copies(options: dict[str, Any]) -> None:
    shape = make_shape(n_envs=2, **options)
    batch = RolloutBatch(make_shape(n_envs=6, **options), CPU)
    rollouts = [numbered(shape, first) for first in (0, 7, 31)]
    gathered = batch.gather(rollouts)
    kept = [map_tensors(Tensor.clone, rollout) for rollout in rollouts]
    for rollout in rollouts:  # the slots are played again at once
        for tensor in tensors_in(rollout):
            tensor.zero_()
    for place, rollout in enumerate(kept):
        for actual, expected in zip(tensors_in(gathered), tensors_in(rollout), strict=True):
            assert torch.equal(columns(actual, place), expected)


@pytest.mark.parametrize("n_steps", [1, 3, 4])
def test_first_rows_keeps_the_observation_that_follows(n_steps: int) -> None:
    rollout = numbered(make_shape(), 3)
    short = first_rows(rollout, n_steps)
    for name, tensor in short._asdict().items():
        whole = getattr(rollout, name)
        rows = n_steps + 1 if name in ("obs", "episode_start") else n_steps
        expected = whole if name.startswith("lstm") else whole[:rows]
        assert torch.equal(tensor, expected), name
