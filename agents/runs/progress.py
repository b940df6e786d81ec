"""Showing how a run is doing: a progress bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean
from tqdm import tqdm

from ncrl.agents.a3c import A3C
from ncrl.shell.screen import LINE_SECONDS, Screen

BAR_SECONDS = 0.5  # between redraws of the bar


class Progress(BaseCallback):
    """Frames played and to play, frames per second, mean raw score and time left.

    Speed and time left are measured from the end of the first rollout: starting takes time once.
    `total_frames` is the number of emulator frames at which the run ends.
    """

    model: A3C

    def __init__(self, total_frames: int, screen: Screen) -> None:
        super().__init__()
        self.total_frames, self.screen = total_frames, screen
        self._bar: tqdm[Any] | None = None

    def _on_training_start(self) -> None:
        self._shown = time.monotonic()
        self._measured_from: tuple[float, int] | None = None
        if self.screen.is_terminal:
            self._bar = tqdm(
                total=self.total_frames,
                initial=self._frames(),
                unit_scale=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
                dynamic_ncols=True,
                mininterval=BAR_SECONDS,
                file=self.screen,  # type: ignore[arg-type]
            )
            self._bar.set_postfix_str("starting")

    def _on_step(self) -> bool:
        now = time.monotonic()
        if now - self._shown >= (BAR_SECONDS if self._bar is not None else LINE_SECONDS):
            self._shown = now
            self._show()
        return True

    def _on_rollout_end(self) -> None:
        if self._measured_from is None:
            self._measured_from = time.monotonic(), self._frames()

    def _on_training_end(self) -> None:
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        frames, speed = self._frames(), 0.0
        if self._measured_from is not None:
            since, first = self._measured_from
            speed = (frames - first) / max(time.monotonic() - since, 1e-9)
        left = "starting"
        if speed > 0:
            left = f"{tqdm.format_interval((self.total_frames - frames) / speed)} left"
        score = "no game finished yet"
        if games := self.model.ep_info_buffer:
            score = f"score {safe_mean([game['r'] for game in games]):.2f} ({len(games)} games)"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{left}, {speed:,.0f}/s, {score}", refresh=False)
            self._bar.update(frames - self._bar.n)
            return
        self.screen.line(
            f"{frames:,} / {self.total_frames:,} frames, {speed:,.0f} frames/s, {score}, "
            f"policy lag {self.model.policy_lag:.1f}, {left}"
        )

    def _frames(self) -> int:
        return min(self.model.num_timesteps * self.model.frames_per_timestep, self.total_frames)
