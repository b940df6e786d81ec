"""Checkpoints: written whole or not at all, verified when read, and enough to go on exactly.

A checkpoint is the model as SB3 saves it, a zip, with one more member: counters, random states and,
without workers, the games. The zip's comment is the sha256 of all before it. Nothing that is read
here can run code: weights and state are tensors and plain values only.
"""

from __future__ import annotations

import io
import logging
import math
import random
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.vec_env import unwrap_vec_wrapper

from ncrl.agents.a3c import A3C
from ncrl.agents.loading import read_member, unpacked_limit
from ncrl.agents.playing.collector import Collector
from ncrl.agents.playing.env_sources import RecordedEnv
from ncrl.checks import shown
from ncrl.files import read_bytes, write_atomically
from ncrl.optimizer_state import check_optimizer_state
from ncrl.shell.hardware import random_state, set_random_state
from ncrl.shell.tensors import check_sums, reason_of, tensors_in, with_checksum

logger = logging.getLogger(__name__)

STATE = "state.pt"  # the member beside those of SB3

FILES = f"step_{12 * '[0-9]'}.zip"
"""Names of checkpoints. Files with other names, such as copies of checkpoints, are the user's."""

# Attributes of `A3C` that go on where they were.
COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_skipped_updates", "games_seed")
SCORES = ("best_score", "first_scored_at")

MAX_BYTES = 4 << 30  # of a checkpoint, whatever the model's size


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """A checkpoint that has been verified."""

    path: Path  # a zip, which `A3C.load` reads too
    timesteps: int


def save_checkpoint(model: A3C, folder: Path, *, keep: int = 3) -> Checkpoint:
    """Write a checkpoint of `model` between two updates, and remove all but the `keep` newest.

    CheckpointError if a weight or the optimiser is not finite; such a model is never saved. OSError
    if the disk refuses; older checkpoints are untouched.
    """
    state, zipped = io.BytesIO(), io.BytesIO(model_bytes(model))
    torch.save(_state_of(model), state)
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr(STATE, state.getvalue())
    path = folder / f"step_{model.num_timesteps:012d}.zip"
    write_atomically(path, with_checksum(zipped.getvalue()))
    # The run went back behind checkpoints of more timesteps: they are damaged, and do not count.
    older = sorted(other for other in folder.glob(FILES) if other < path)
    for superfluous in [*folder.glob(".step_*"), *older[: max(0, len(older) + 1 - keep)]]:
        superfluous.unlink(missing_ok=True)
    return Checkpoint(path, model.num_timesteps)


def model_bytes(model: A3C) -> bytes:
    """The model as SB3 saves it; CheckpointError if any of its numbers is not finite."""
    parts: dict[str, Any] = dict(model.policy.state_dict())
    parts["a number that the optimiser keeps"] = model.policy.optimizer.state_dict()
    if model.exploration is not None:
        explored = model.exploration.scale, model.exploration.source
        parts["a number of the intrinsic reward"] = [part.state_dict() for part in explored]
    for name, part in parts.items():
        if not all(torch.isfinite(tensor).all() for tensor in tensors_in(part)):
            raise CheckpointError(f"not saved: {name} is not finite")
    zipped = io.BytesIO()
    model.save(zipped)
    return zipped.getvalue()


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning.

    CheckpointError if there is none, with what is wrong with the newest.
    """
    faults: list[str] = []
    for path in sorted(folder.glob(FILES), reverse=True):
        try:
            timesteps = _read_state(path)["counters"]["num_timesteps"]
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            logger.warning("%s; going back to the checkpoint before", fault)
        return Checkpoint(path, timesteps)
    if faults:
        raise CheckpointError(f"cannot use {folder}: {faults[0]}; none of its checkpoints is whole")
    raise CheckpointError(f"cannot use {folder}: it has no checkpoint")


def _read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside the model; its counters are checked."""
    content = read_bytes(path, MAX_BYTES)
    try:
        # What torch and SB3 save is not compressed: it takes no more memory than the file has.
        check_sums(content, len(content))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            state: dict[str, Any] = read_member(archive, STATE, len(content))
        for name in COUNTERS:
            value = state["counters"][name]
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"its {name} must be a positive integer, got {shown(value)}")
    except Exception as error:  # a broken zip or pickle can raise anything
        raise CheckpointError(f"cannot load {path}: {reason_of(error)}") from error
    return state


def load_weights(model: A3C, path: Path, *, optimizer: bool = True) -> None:
    """Put the weights, exploration and optimiser of an SB3 zip into a model of the same network.

    CheckpointError if the file is no such zip, or was made by another network.
    """
    names = [*model._get_torch_save_params()[0]]
    if not optimizer:
        names.remove("policy.optimizer")
    try:
        with zipfile.ZipFile(path) as archive:
            limit = unpacked_limit(path.stat().st_size)
            stored = {name: read_member(archive, f"{name}.pth", limit) for name in names}
        model.policy.load_state_dict(stored["policy"])
        if model.policy.use_sde:  # its noise is drawn from weights
            model.policy.reset_noise()
        if optimizer:
            _load_optimizer(model.policy.optimizer, stored["policy.optimizer"])
        if model.exploration is not None:
            model.exploration.load_state_dict(stored["exploration"])
    except Exception as error:  # torch reports a forbidden pickle with several exception types
        raise CheckpointError(f"cannot load {path}: {reason_of(error)}") from error


def _load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Take over a stored state. Of its settings only the learning rate is taken over."""
    check_optimizer_state(optimizer, stored)
    groups = optimizer.state_dict()["param_groups"]
    for group, theirs in zip(groups, stored["param_groups"], strict=True):
        group["lr"] = float(theirs["lr"])
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"its learning rate must be a positive number, got {theirs['lr']}")
    optimizer.load_state_dict({**stored, "param_groups": groups})


def resume(model: A3C, checkpoint: Checkpoint) -> None:
    """Bring a newly built model to the state in which `save_checkpoint` saw the old one.

    Without workers everything goes on bit for bit, the games included: their actions are played
    again. With workers the games start anew, seeded by the run's seed and the updates made;
    everything else is as it was. CheckpointError for what cannot be read, or does not replay.
    """
    load_weights(model, checkpoint.path)
    state = _read_state(checkpoint.path)
    try:
        _restore(model, state)
    except Exception as error:  # a stranger may have written it
        raise CheckpointError(f"cannot load {checkpoint.path}: {reason_of(error)}") from error


# What is beside the model, as tensors and plain values.


def _state_of(model: A3C) -> dict[str, Any]:
    of_numpy: Any = np.random.get_state(legacy=True)
    algorithm, keys, *others = of_numpy
    return {
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "scores": {name: getattr(model, name) for name in SCORES},
        # Monitors report numpy numbers, and what users ask for, which only a pickle brings back.
        "episodes": [{k: float(game[k]) for k in "rl"} for game in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "random": random_state(model.device),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), *others),
        "python": random.getstate(),
        "games": _games_state(model),
    }


def _restore(model: A3C, state: dict[str, Any]) -> None:
    episodes, successes, games = state["episodes"], state["successes"], state["games"]
    scores = [state["scores"][name] for name in SCORES]
    for value in [game[key] for game in episodes for key in "rl"] + successes + scores:
        if type(value) not in (int, float):
            raise ValueError(f"its scores must be numbers, got {shown(value)}")
    for name in COUNTERS:
        setattr(model, name, state["counters"][name])
    for name in SCORES:
        setattr(model, name, state["scores"][name])
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(successes, maxlen=model._stats_window_size)
    if games is not None and not model.n_workers and _games_fit(model, games):
        _restore_games(model, games)
    else:
        if model.env_factory is not None and not model.n_workers:  # else workers seed theirs
            assert model.env is not None
            model.env.seed(model.next_games_seed)
        if model.exploration is not None:
            model.exploration.memory.forget_recent()
    # Last, so that building and replaying draws from none of the restored streams.
    set_random_state(state["random"], model.device)
    algorithm, keys, *others = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *others))
    random.setstate(state["python"])


def _games_fit(model: A3C, games: dict[str, Any]) -> bool:
    """Whether the games of a checkpoint have the model's number and length; others start anew."""
    limit = getattr(model.env_factory, "max_frames", None)
    return games["n_envs"] == model.n_envs and games.get("max_frames", limit) == limit


def _games_state(model: A3C) -> dict[str, Any] | None:
    """Where the games of a serial run stand; None if they cannot be brought back there."""
    collector = model.collector
    if collector is None or (recorded := unwrap_vec_wrapper(collector.env, RecordedEnv)) is None:
        return None
    history = recorded.history()
    return {
        "n_envs": model.n_envs,
        "max_frames": getattr(model.env_factory, "max_frames", None),
        "history": [torch.from_numpy(actions) for _, actions in history],
        "seeds": [seed for seed, _ in history],
        "obs": _as_tensors(collector.obs),
        "episode_start": torch.from_numpy(np.array(collector.episode_start)),
        "lstm_state": tuple(tensor.cpu() for tensor in collector.lstm_state),
    }


def _restore_games(model: A3C, games: dict[str, Any]) -> None:
    assert model.env is not None
    recorded = unwrap_vec_wrapper(model.env, RecordedEnv)
    if recorded is None:
        raise ValueError("its games are those of a factory, and the model plays an object")
    history = [actions.numpy() for actions in games["history"]]
    obs = recorded.replay(list(zip(games["seeds"], history, strict=True)))
    shown_now = _as_tensors(obs)
    if not all(torch.equal(shown_now[name], entry) for name, entry in games["obs"].items()):
        raise ValueError("the games do not replay to the state in which they were saved")
    h, c = games["lstm_state"]
    model.collector = Collector(
        model.env,
        model.policy,
        obs,
        episode_start=games["episode_start"].numpy(),
        lstm_state=(h.to(model.device), c.to(model.device)),
    )
    model._last_obs = obs
    model._last_episode_starts = model.collector.episode_start


def _as_tensors(obs: Any) -> dict[str, torch.Tensor]:
    """Copies of observations by name; those that are no Dict have the name ""."""
    entries = obs if isinstance(obs, dict) else {"": obs}
    return {name: torch.from_numpy(np.array(entry)) for name, entry in entries.items()}
