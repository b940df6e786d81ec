"""Checkpoints: written whole or not at all, verified when read, and enough to go on exactly.

A checkpoint is three files of one stem: `.zip`, the model as SB3 saves it; `.state.pt`, counters,
random states and, without workers, the games; `.json`, written last, with the sha256 of both.
Nothing that is read here can run code: weights and state are tensors and plain values only.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import random
import re
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncrl.agents.a3c import A3C
from ncrl.agents.playing.collector import Collector
from ncrl.agents.playing.env_sources import RecordedEnv
from ncrl.agents.runs.loading import SMALL_BYTES, load_tensors, read_tensors, reason_of
from ncrl.files import read_bytes, write_atomically
from ncrl.optimizer_state import check_optimizer_state
from ncrl.settings import shown
from ncrl.shell.tensors import tensors_in

logger = logging.getLogger(__name__)

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_skipped_updates", "games_seed")
"""Attributes of `A3C` that go on where they were."""

SCORES = ("best_score", "first_scored_at")
"""Likewise; a checkpoint of an earlier release has none."""

MAX_KEPT_BYTES = 256 << 20
"""What the rollouts that an exploring model keeps may take in its checkpoint, a quarter of it."""

MAX_MEMBER_BYTES = 4 << 30
"""Largest member of a checkpoint that is unpacked into memory, whatever the model's size."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class Checkpoint(NamedTuple):
    """A checkpoint whose files have been verified."""

    path: Path
    """The SB3 zip, which `A3C.load` reads."""
    state: Path
    """What exact resuming needs beside it."""
    timesteps: int


def save_checkpoint(model: A3C, folder: Path, *, keep: int = 3) -> Checkpoint:
    """Write a checkpoint of `model` between two updates, and remove all but the `keep` newest.

    Raises:
        CheckpointError: if a weight or the optimiser is not finite; such a model is never saved.
        OSError: if the disk refuses; older checkpoints are untouched.
    """
    zipped = model_bytes(model)
    buffer = io.BytesIO()
    torch.save(_state_of(model), buffer)
    state = buffer.getvalue()
    stem = _free_stem(folder, model.num_timesteps)
    checkpoint = Checkpoint(
        folder / f"{stem}.zip", folder / f"{stem}.state.pt", model.num_timesteps
    )
    manifest = {
        "timesteps": model.num_timesteps,
        "sha256": {
            checkpoint.path.name: hashlib.sha256(zipped).hexdigest(),
            checkpoint.state.name: hashlib.sha256(state).hexdigest(),
        },
    }
    write_atomically(checkpoint.path, zipped)
    write_atomically(checkpoint.state, state)
    write_atomically(folder / f"{stem}.json", json.dumps(manifest, indent=2).encode())
    _clear_away(folder, keep, stem)
    return checkpoint


def model_bytes(model: A3C) -> bytes:
    """The model as SB3 saves it.

    Raises:
        CheckpointError: if a weight, or a number that the optimiser keeps, is not finite.
    """
    for name, tensor in model.policy.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"not saved: {name} is not finite")
    if not all(torch.isfinite(t).all() for t in tensors_in(model.policy.optimizer.state_dict())):
        raise CheckpointError("not saved: a number that the optimiser keeps is not finite")
    zipped = io.BytesIO()
    model.save(zipped)
    return zipped.getvalue()


def _free_stem(folder: Path, timesteps: int) -> str:
    """A name that sorts last and that nobody has or had: files of a checkpoint are never replaced.

    A run that is stopped right after it was resumed saves the same number of timesteps again.
    """
    taken = [order for path in folder.glob("step_*") if (order := _order(path))[0] == timesteps]
    number = max(taken)[1] + 1 if taken else 0
    stem = f"step_{timesteps:012d}"
    return f"{stem}_{number:03d}" if number else stem


def _order(path: Path) -> tuple[int, int]:
    """Timesteps of a checkpoint, and which of those with as many it is; (-1, 0) for other files."""
    found = re.fullmatch(r"step_(\d{12,18})(?:_(\d{3,9}))?\..*", path.name)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)


def _clear_away(folder: Path, keep: int, newest: str) -> None:
    """Remove what is older than the `keep` checkpoints up to `newest`, the one just written.

    Also what killed processes left unfinished. Checkpoints of more timesteps stay: a run that went
    back behind damaged ones does not count them among the ones that it keeps.
    """
    last = _order(folder / f"{newest}.json")
    orders = sorted(order for path in folder.glob("step_*.json") if (order := _order(path)) <= last)
    kept = set(orders[-keep:])
    for path in [*folder.glob("step_*"), *folder.glob(".step_*")]:
        if path.name.startswith(".") or (_order(path) <= last and _order(path) not in kept):
            path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint whose files are whole; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: if there is none, with what is wrong with the newest.
    """
    faults: list[str] = []
    for manifest in sorted(folder.glob("step_*.json"), key=_order, reverse=True):
        try:
            found = _verified(manifest)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            logger.warning("%s; going back to the checkpoint before", fault)
        return found
    if faults:
        raise CheckpointError(f"cannot use {folder}: {faults[0]}; none of its checkpoints is whole")
    raise CheckpointError(f"cannot use {folder}: it has no checkpoint")


def _verified(manifest: Path) -> Checkpoint:
    try:
        entry = json.loads(read_bytes(manifest))
        checksums = dict(entry["sha256"])
        timesteps = entry["timesteps"]
        if not is_count(timesteps):
            raise ValueError(f"timesteps must be a positive integer, got {shown(timesteps)}")
    except RecursionError as error:
        raise CheckpointError(f"{manifest} is damaged (it is nested too deeply)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is damaged ({reason_of(error)})") from error
    stem = manifest.stem
    if _order(manifest)[0] != timesteps:
        raise CheckpointError(f"{manifest} is damaged (it speaks of {timesteps} timesteps)")
    names = (f"{stem}.zip", f"{stem}.state.pt")
    for name in names:
        path = manifest.with_name(name)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise CheckpointError(f"{path} is damaged ({path.stat().st_size:,} bytes)")
        if _sha256(path) != checksums.get(name):
            raise CheckpointError(f"{path} is damaged (its checksum differs)")
    return Checkpoint(manifest.with_name(names[0]), manifest.with_name(names[1]), timesteps)


def is_count(value: Any) -> bool:
    """Whether a value of a file is a number of things: an integer, and not negative."""
    return type(value) is int and 0 <= value < 2**63


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def load_weights(model: A3C, path: Path, *, optimizer: bool = True) -> None:
    """Put the weights, exploration and optimiser of an SB3 zip into a model of the same network.

    Raises:
        CheckpointError: if the file is no such zip, or was made by another network.
    """
    names = [
        name
        for name in model._get_torch_save_params()[0]
        if optimizer or name != "policy.optimizer"
    ]
    try:
        with zipfile.ZipFile(path) as archive:
            # RMSProp and Adam keep one or two numbers for each weight.
            limit = min(MAX_MEMBER_BYTES, 4 * _size_of(model) + SMALL_BYTES)
            parameters = {name: read_tensors(archive, f"{name}.pth", limit) for name in names}
        model.policy.load_state_dict(parameters["policy"])
        if optimizer:
            stored, own = parameters["policy.optimizer"], model.policy.optimizer
            check_optimizer_state(own, stored)
            own.load_state_dict(_with_own_groups(own, stored))
        if model.exploration is not None:
            model.exploration.load_state_dict(parameters["exploration"])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {path}: {reason_of(error)}") from error
    except Exception as error:  # torch reports a forbidden pickle with several exception types
        raise CheckpointError(f"refused {path}: {reason_of(error)}") from error


def _with_own_groups(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> dict[str, Any]:
    """A stored optimiser, whose settings are those that the run has now, but for the learning rate.

    Raises:
        ValueError: for a learning rate that there cannot be.
    """
    own = optimizer.state_dict()["param_groups"]
    for group, theirs in zip(own, stored["param_groups"], strict=True):
        group["lr"] = float(theirs["lr"])
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"its learning rate must be a positive number, got {theirs['lr']}")
    return {**stored, "param_groups": own}


def _size_of(model: A3C) -> int:
    size = sum(tensor.nbytes for tensor in model.policy.state_dict().values())
    if model.exploration is not None:
        size += sum(tensor.nbytes for tensor in model.exploration.parameters())
        size += MAX_KEPT_BYTES
    return size


def resume(model: A3C, checkpoint: Checkpoint) -> None:
    """Bring a newly built model to the state in which `save_checkpoint` saw the old one.

    Without workers everything goes on bit for bit, the games included: their actions are played
    again. With workers the games start anew, seeded by the run's seed and the timesteps played;
    everything else is as it was.

    Raises:
        CheckpointError: if the state cannot be read, or the games do not replay.
    """
    load_weights(model, checkpoint.path)
    try:
        content = checkpoint.state.read_bytes()
        # What torch saves is not compressed, so it takes no more memory than its file has bytes.
        state = load_tensors(content, checkpoint.state.name, len(content))
        _restore(model, state, checkpoint.timesteps)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot load {checkpoint.state}: {reason_of(error)}") from error


# The state beside the weights, as tensors and plain values.


def _state_of(model: A3C) -> dict[str, Any]:
    return {
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "scores": {name: getattr(model, name) for name in SCORES},
        "episodes": [_plain(episode) for episode in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "random": _random_state(),
        "games": _games_state(model),
    }


def _plain(episode: dict[str, Any]) -> dict[str, float]:
    """Monitors report numpy numbers, which only a pickle could bring back."""
    return {key: getattr(value, "item", lambda v=value: v)() for key, value in episode.items()}


def _restore(model: A3C, state: dict[str, Any], timesteps: int) -> None:
    counters, games = _checked_counters(state["counters"], timesteps), state["games"]
    episodes, successes = _checked_scores(state["episodes"], state["successes"])
    for name, value in counters.items():
        setattr(model, name, value)
    for name, value in state.get("scores", {}).items():
        if name in SCORES and isinstance(value, (int, float)):
            setattr(model, name, value)
    window = model._stats_window_size
    model.ep_info_buffer = deque(episodes, maxlen=window)
    model.ep_success_buffer = deque(successes, maxlen=window)
    if games is not None and not model.n_workers and games["n_envs"] == model.n_envs:
        _restore_games(model, games)
    elif model.n_workers:
        assert model.env is not None
        if model.exploration is not None and model.exploration.memory is not None:
            model.exploration.memory.forget_recent()
        # A placeholder: the workers reset their own games.
        model._last_obs = model.env.reset()  # type: ignore[assignment]
    # Last, so that building and replaying draws from none of the restored streams.
    _restore_random_state(state["random"])


def _checked_counters(counters: dict[str, Any], timesteps: int) -> dict[str, int]:
    for name in COUNTERS:
        if not is_count(counters[name]):
            raise CheckpointError(
                f"its {name} must be a positive integer, got {shown(counters[name])}"
            )
    if counters["num_timesteps"] != timesteps:
        raise CheckpointError(
            f"it is of {counters['num_timesteps']} timesteps, its manifest of {timesteps}"
        )
    return {name: counters[name] for name in COUNTERS}


def _checked_scores(
    episodes: list[dict[str, Any]], successes: list[Any]
) -> tuple[list[dict[str, Any]], list[float]]:
    for value in [entry[key] for entry in episodes for key in "rl"] + successes:
        if type(value) not in (int, float):
            raise CheckpointError(f"its scores must be numbers, got {shown(value)}")
    return episodes, successes


def _games_state(model: A3C) -> dict[str, Any] | None:
    """Where the games of a serial run stand; None if they cannot be brought back there."""
    recorded = _recorded(model)
    if recorded is None or model.collector is None:
        return None
    collector = model.collector
    return {
        "n_envs": model.n_envs,
        "history": [torch.from_numpy(actions) for actions in recorded.history()],
        "obs": _as_tensors(collector.obs),
        "episode_start": torch.from_numpy(np.array(collector.episode_start)),
        "lstm_state": tuple(tensor.cpu() for tensor in collector.lstm_state),
    }


def _restore_games(model: A3C, games: dict[str, Any]) -> None:
    recorded = _recorded(model)
    assert recorded is not None and model.env is not None
    obs = recorded.replay([actions.numpy() for actions in games["history"]])
    if obs is None or not _equal(_as_tensors(obs), games["obs"]):
        raise CheckpointError("the games do not replay to the state in which they were saved")
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


def _as_tensors(obs: Any) -> Any:
    """Copies of observations: a tensor, or for Dict observations a dict of tensors."""
    if isinstance(obs, dict):
        return {name: _as_tensors(entry) for name, entry in obs.items()}
    return torch.from_numpy(np.array(obs))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    return torch.equal(one, other)


def _recorded(model: A3C) -> RecordedEnv | None:
    env: Any = model.env
    while env is not None and not isinstance(env, RecordedEnv):
        env = getattr(env, "venv", None)
    return env


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=True)
    algorithm, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": (version, list(internal), gauss_next),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    cuda: list[Tensor] = state["cuda"]
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
