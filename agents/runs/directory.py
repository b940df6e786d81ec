"""A run directory: its lock, its configuration, its curves and its checkpoints.

config.yaml  progress.csv  events.out.tfevents...  best_model.zip  best_model.json  checkpoints/
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat, KVWriter, Logger
from torch import Tensor
from torch.utils.tensorboard import summary

from ncrl.agents.a3c import A3C
from ncrl.agents.runs.best import BestModel
from ncrl.agents.runs.checkpoints import CheckpointError, save_checkpoint
from ncrl.files import remove_unfinished, write_atomically
from ncrl.shell.events import CurveWriter
from ncrl.shell.lock import locked

logger = logging.getLogger(__name__)

STEP_KEY = "time/total_timesteps"

BINS = 30
"""Of histograms in TensorBoard."""


class RunDirectory(contextlib.ExitStack):
    """One run's folder, locked until it is closed; a context manager.

    ValueError if the folder cannot be made or written, or is in use.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.checkpoints = path, path / "checkpoints"
        try:
            if not self.enter_context(locked(path)):
                raise ValueError(f"{path} is in use by another process")
            self.checkpoints.mkdir(exist_ok=True)
            for folder in (path, self.checkpoints):
                remove_unfinished(folder)
        except (OSError, ValueError) as error:
            self.close()
            if isinstance(error, OSError):
                raise cannot_write(path, error) from error
            raise

    @classmethod
    def create(cls, logdir: Path, name: str) -> RunDirectory:
        """A new folder `logdir/name-1`, or the first higher number that nobody has taken."""
        try:
            logdir.mkdir(parents=True, exist_ok=True)
            for number in count(1):
                with contextlib.suppress(FileExistsError):
                    (logdir / f"{name}-{number}").mkdir()
                    break
        except OSError as error:
            raise cannot_write(logdir, error) from error
        return cls(logdir / f"{name}-{number}")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Store the run's configuration."""
        text = yaml.safe_dump(dict(config), sort_keys=False)
        write_atomically(self.path / "config.yaml", text.encode())

    def make_logger(self, timesteps: int = 0) -> Logger:
        """Curves for TensorBoard and `progress.csv`; entries after `timesteps` are withdrawn.

        A run that was killed goes on from its last checkpoint, and plays again what came after.
        """
        csv = _Csv(self.path / "progress.csv", timesteps)
        curves = _Logger(str(self.path), [csv, _TensorBoard(self.path, timesteps)])
        self.callback(curves.close)
        return curves

    def remove(self) -> None:
        """Remove the folder of a run that never began."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()


class SaveCheckpoints(BaseCallback):
    """Saves between updates, every so many timesteps, and keeps the best model (`BestModel`).

    `config` is stored after the first checkpoint: a resumed run whose new settings do not work
    keeps those with which it can go on.
    """

    model: A3C

    def __init__(
        self,
        run: RunDirectory,
        every: int,  # timesteps between checkpoints
        keep: int,  # checkpoints
        *,
        stop_on_error: bool,  # whether a full disk ends the run, or is reported and play goes on
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.run, self.every, self.keep = run, every, keep
        self.stop_on_error, self.config = stop_on_error, config
        self.best = BestModel(run.path)

    def _on_training_start(self) -> None:
        self._saved_at = self._compared_at = self.num_timesteps
        self._guard(self.best.compare)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps - self._saved_at >= self.every:
            self.save()
        elif self.num_timesteps - self._compared_at >= self.every / 10:
            self._compared_at = self.num_timesteps
            self._guard(self.best.compare)

    def _on_step(self) -> bool:
        self.best.watch(self.model, self.locals["infos"])
        return True

    def save(self) -> bool:
        """Write a checkpoint now, between updates; returns whether that worked. Raises the error
        instead if `stop_on_error`."""
        self._saved_at = self._compared_at = self.num_timesteps
        if saved := self._guard(self._save_all):
            self._guard(self.best.compare)
        return saved

    def _save_all(self, model: A3C) -> None:
        save_checkpoint(model, self.run.checkpoints, keep=self.keep)
        if self.config is not None:
            self.run.write_config(self.config)
            self.config = None

    def _guard(self, save: Callable[[A3C], object]) -> bool:
        try:
            save(self.model)
        except (OSError, CheckpointError) as error:
            if self.stop_on_error:
                raise
            logger.error("could not save to %s: %s; going on without", self.run.path, error)
            return False
        return True


def cannot_write(path: Path, error: OSError) -> ValueError:
    """What to raise where a run cannot begin."""
    return ValueError(f"cannot write to {path}: {error.strerror or error}")


class _Logger(Logger):
    """SB3's, which goes on when curves can no longer be written, and says so once."""

    _failed = False

    def dump(self, step: int = 0) -> None:
        try:
            super().dump(step)
        except OSError as error:
            for entries in (self.name_to_value, self.name_to_count, self.name_to_excluded):
                entries.clear()
            if not self._failed:
                self._failed = True
                logger.error("could not write curves to %s: %s; going on", self.dir, error)

    def close(self) -> None:
        for output in self.output_formats:
            with contextlib.suppress(OSError):  # of what has found no room until the end
                output.close()


class _TensorBoard(KVWriter):
    """Numbers, texts and histograms, with the events after `timesteps` withdrawn."""

    def __init__(self, folder: Path, timesteps: int) -> None:
        self._curves = CurveWriter(folder, timesteps + 1)

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        for key, value in key_values.items():
            if "tensorboard" in key_excluded[key]:
                continue
            if isinstance(value, str):
                self._curves.write(summary.text(key, value), step)
            elif not isinstance(value, Tensor):
                self._curves.add(key, float(value), step)
            elif value.isfinite().all():  # bins of anything else have no bounds
                self._curves.write(summary.histogram(key, value.numpy(), BINS), step)

    def close(self) -> None:
        self._curves.close()


class _Csv(CSVOutputFormat):
    """SB3's, which would begin an empty file, with the whole rows up to `timesteps` kept."""

    def __init__(self, path: Path, timesteps: int) -> None:
        text = path.read_text(errors="replace") if path.is_file() else ""
        # Whole before it replaces what there was; `remove_unfinished` knows such a name.
        unfinished = path.with_name(f".{path.name}.resuming")
        super().__init__(str(unfinished))
        header, *rows = text[: text.rfind("\n") + 1].splitlines() or [""]
        if STEP_KEY in (keys := header.split(",")):
            self.keys = keys
            for row in (header, *rows):
                cells = row.split(",")
                step = cells[keys.index(STEP_KEY)] if len(cells) == len(keys) else ""
                if row is header or (step.isdigit() and int(step) <= timesteps):
                    self.file.write(row + "\n")
        self.file.flush()
        unfinished.replace(path)
