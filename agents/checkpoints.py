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
import random
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncrl.agents.a3c import A3C
from ncrl.agents.collector import Collector
from ncrl.agents.environments import RecordedEnv
from ncrl.agents.loading import SMALL_BYTES, read_tensors, reason_of
from ncrl.files import write_atomically
from ncrl.optimizer_state import check_optimizer_state

logger = logging.getLogger(__name__)

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_skipped_updates", "games_seed")
"""Attributes of `A3C` that go on where they were."""

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
        CheckpointError: if a weight is not finite; such a model is never saved.
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
    _clear_away(folder, keep)
    return checkpoint


def model_bytes(model: A3C) -> bytes:
    """The model as SB3 saves it.

    Raises:
        CheckpointError: if a weight is not finite.
    """
    for name, tensor in model.policy.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"not saved: {name} is not finite")
    zipped = io.BytesIO()
    model.save(zipped)
    return zipped.getvalue()


def _free_stem(folder: Path, timesteps: int) -> str:
    """A name that nobody has and that sorts last: files of a checkpoint are never replaced.

    A run that is stopped right after it was resumed saves the same number of timesteps again.
    """
    stem = f"step_{timesteps:012d}"
    count = len(list(folder.glob(f"{stem}*.json")))
    return f"{stem}_{count:03d}" if count else stem


def _clear_away(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what killed processes left unfinished."""
    kept = {manifest.stem for manifest in sorted(folder.glob("step_*.json"))[-keep:]}
    for path in [*folder.glob("step_*"), *folder.glob(".step_*")]:
        if path.name.split(".")[0] not in kept:
            path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint whose files are whole; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: if there is none.
    """
    manifests = sorted(folder.glob("step_*.json"), reverse=True)
    for manifest in manifests:
        try:
            return _verified(manifest)
        except CheckpointError as error:
            logger.warning("%s; going back to the checkpoint before", error)
    reason = "none of its checkpoints is whole" if manifests else "it has no checkpoint"
    raise CheckpointError(f"cannot use {folder}: {reason}")


def _verified(manifest: Path) -> Checkpoint:
    try:
        entry = json.loads(manifest.read_text())
        checksums: dict[str, str] = dict(entry["sha256"])
        timesteps = int(entry["timesteps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error})") from error
    stem = manifest.stem
    if not stem.startswith(f"step_{timesteps:012d}"):
        raise CheckpointError(f"{manifest} is damaged (it speaks of {timesteps} timesteps)")
    names = (f"{stem}.zip", f"{stem}.state.pt")
    for name in names:
        path = manifest.with_name(name)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != checksums.get(name):
            raise CheckpointError(f"{path} is damaged (its checksum differs)")
    return Checkpoint(manifest.with_name(names[0]), manifest.with_name(names[1]), timesteps)


def load_weights(model: A3C, path: Path, *, optimizer: bool = True) -> None:
    """Put the weights (and optimiser) of an SB3 zip into a model of the same network.

    Raises:
        CheckpointError: if the file is no such zip, or was made by another network.
    """
    names = ["policy", *(["policy.optimizer"] if optimizer else [])]
    try:
        with zipfile.ZipFile(path) as archive:
            # RMSProp and Adam keep one or two numbers for each weight.
            limit = min(MAX_MEMBER_BYTES, 4 * _size_of(model) + SMALL_BYTES)
            parameters = {name: read_tensors(archive, f"{name}.pth", limit) for name in names}
        model.policy.load_state_dict(parameters["policy"])
        if optimizer:
            check_optimizer_state(model.policy.optimizer, parameters["policy.optimizer"])
            model.policy.optimizer.load_state_dict(parameters["policy.optimizer"])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {path}: {reason_of(error)}") from error
    except Exception as error:  # torch reports a forbidden pickle with several exception types
        raise CheckpointError(f"refused {path}: {reason_of(error)}") from error


def _size_of(model: A3C) -> int:
    return sum(tensor.nbytes for tensor in model.policy.state_dict().values())


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
        state = torch.load(checkpoint.state, map_location="cpu", weights_only=True)
        _restore(model, state)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot load {checkpoint.state}: {reason_of(error)}") from error


# The state beside the weights, as tensors and plain values.


def _state_of(model: A3C) -> dict[str, Any]:
    return {
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "episodes": [_plain(episode) for episode in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "random": _random_state(),
        "games": _games_state(model),
    }


def _plain(episode: dict[str, Any]) -> dict[str, float]:
    """Monitors report numpy numbers, which only a pickle could bring back."""
    return {key: getattr(value, "item", lambda v=value: v)() for key, value in episode.items()}


def _restore(model: A3C, state: dict[str, Any]) -> None:
    for name in COUNTERS:
        setattr(model, name, state["counters"][name])
    window = model._stats_window_size
    model.ep_info_buffer = deque(state["episodes"], maxlen=window)
    model.ep_success_buffer = deque(state["successes"], maxlen=window)
    games = state["games"]
    if games is not None and not model.n_workers and games["n_envs"] == model.n_envs:
        _restore_games(model, games)
    elif model.n_workers:
        assert model.env is not None
        # A placeholder: the workers reset their own games.
        model._last_obs = model.env.reset()  # type: ignore[assignment]
    # Last, so that building and replaying draws from none of the restored streams.
    _restore_random_state(state["random"])


def _games_state(model: A3C) -> dict[str, Any] | None:
    """Where the games of a serial run stand; None if they cannot be brought back there."""
    recorded = _recorded(model)
    if recorded is None or model._collector is None:
        return None
    collector = model._collector
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
    collector = Collector(model.env, model.policy, obs)
    collector.episode_start = games["episode_start"].numpy()
    h, c = games["lstm_state"]
    collector.lstm_state = h.to(model.device), c.to(model.device)
    model._collector = collector
    model._last_obs = obs
    model._last_episode_starts = collector.episode_start


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
