"""The best model of a run: weights that are judged by games which began after them.

The mean score of the last games says how weights played that are gone by the time it peaks. Where
games are long, it peaks after the policy has forgotten how a game begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import safe_mean

from ncrl.agents.a3c import A3C
from ncrl.agents.runs.checkpoints import model_bytes
from ncrl.files import read_bytes, write_atomically

GAMES = 100
"""Whose mean score judges the weights that they began after."""

FEWEST_GAMES = 10
"""As many where there is no best model yet."""


class BestModel:
    """Keeps weights in memory until they are judged, and the best of them in `folder`:
    `best_model.zip`, and `best_model.json` with the score that it was kept for."""

    def __init__(self, folder: Path) -> None:
        self.path, self.note = folder / "best_model.zip", folder / "best_model.json"
        self._judged: bytes | None = None
        self._timesteps = 0
        self._scores: list[float] = []
        self._under_way: set[int] = set()
        """Environments whose game began before the weights."""

    def watch(self, infos: Sequence[dict[str, Any]]) -> None:
        """Take in the infos of one timestep of every environment."""
        for i, info in enumerate(infos):
            if "episode" in info:
                if i not in self._under_way:
                    self._scores.append(float(info["episode"]["r"]))
                self._under_way.discard(i)

    def compare(self, model: A3C) -> None:
        """Write the weights that were judged if they are the best, and judge those of now next.

        Nothing happens while too few games have ended.

        Raises:
            CheckpointError: if a number of the model is not finite.
            OSError: if the file cannot be written; the next call tries again.
        """
        if self._judged is not None:
            best = self.best_score()
            if len(self._scores) < (GAMES if math.isfinite(best) else FEWEST_GAMES):
                return
            score = float(safe_mean(self._scores))
            if score > best:
                note = {"score": score, "games": len(self._scores), "timesteps": self._timesteps}
                write_atomically(self.path, self._judged)
                write_atomically(self.note, json.dumps(note).encode())
        self._judged, self._timesteps = model_bytes(model), model.num_timesteps
        self._scores = []
        self._under_way = set(range(model.n_envs)) if model.num_timesteps else set()

    def best_score(self) -> float:
        """Of the best model so far, also before the run was resumed; -inf if there is none."""
        try:
            score = float(json.loads(read_bytes(self.note))["score"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return -math.inf
        return score if math.isfinite(score) else -math.inf
