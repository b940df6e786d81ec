"""The best model of a run: the weights in the middle of the games that scored best.

The mean score of the last games was earned by weights from before the first of them to the last.
Where games are long, those of the end have perhaps forgotten how a game begins, and those of the
beginning had yet to learn how it goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3.common.utils import safe_mean

from ncrl.agents.a3c import A3C
from ncrl.agents.curves import ended_games
from ncrl.agents.runs.checkpoints import model_bytes
from ncrl.files import read_bytes, write_atomically

GAMES = 40
"""Games whose mean score judges weights; two of every environment if those are more, since short
games end first."""

FEWEST_GAMES = 10
"""How many are enough while there is no best model. They judge the weights before them, the only
ones that wait by then."""

WAITING = 4
"""Weights that wait at a time; with fewer, those in the middle would be less close to it. Where
games are long, fewer do: the next wait once some games have begun, and ended, after the last."""


class Candidate(NamedTuple):
    """Weights, and the games that began after them."""

    model: bytes  # as SB3 saves it
    timesteps: int
    scores: list[float]


class BestModel:
    """Keeps weights in memory while games are played, and the best of them in `folder`:
    `best_model.zip`, and `best_model.json` with the score that it was kept for.

    Up to five models are in memory, each with its optimiser and its exploration.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.note = folder / "best_model.zip", folder / "best_model.json"
        self._candidates: list[Candidate] = []  # the oldest first

    def watch(self, model: A3C, infos: Sequence[dict[str, Any]]) -> None:
        """Take in the infos of one timestep of every environment.

        When a game began is reckoned from its length, as if all environments were equally fast.
        """
        for game in ended_games(infos):
            began = model.num_timesteps - model.n_envs * int(game.get("l", 0))
            for candidate in self._candidates:
                if began >= candidate.timesteps:
                    candidate.scores.append(float(game["r"]))

    def compare(self, model: A3C) -> None:
        """Judge the weights in the middle of enough games, and keep those of now.

        Raises:
            CheckpointError: if a number of the model is not finite.
            OSError: if the file cannot be written; the next call tries again.
        """
        now, usual = model.num_timesteps, max(GAMES, 2 * model.n_envs)
        # A training that begins anew counts from 0 again.
        self._candidates = [waiting for waiting in self._candidates if waiting.timesteps <= now]
        while self._candidates:
            oldest, best = self._candidates[0], self.best_score()
            enough = usual if math.isfinite(best) else FEWEST_GAMES
            if len(oldest.scores) < enough:
                break
            score = float(safe_mean(oldest.scores[:enough]))
            if math.isfinite(score) and score > best:
                when = (oldest.timesteps + now) / 2
                middle = min(self._candidates, key=lambda waiting: abs(waiting.timesteps - when))
                note = {"score": score, "games": enough, "timesteps": middle.timesteps}
                write_atomically(self.path, middle.model)
                write_atomically(self.note, json.dumps(note).encode())
            del self._candidates[0]
        if not self._candidates or len(self._candidates[-1].scores) >= usual // WAITING:
            self._candidates.append(Candidate(model_bytes(model), now, []))

    def best_score(self) -> float:
        """Score of the best model so far, also from before a resume; -inf if there is none."""
        try:
            score = float(json.loads(read_bytes(self.note))["score"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return -math.inf
        return score if math.isfinite(score) else -math.inf
