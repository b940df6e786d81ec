"""Learning curves of Stable-Baselines3's agents with rl-zoo's settings, beside those of A3C.

python benchmarks/sb3_learning.py A2C results/atari/sb3/pong_a2c_10.csv --seed 10

The games are SB3's `make_atari_env`, four frames stacked: no sticky actions, minimal actions, up to
30 no-ops, clipped rewards, a lost life ends an episode (not with RecurrentPPO). A3C plays by these
rules with `--protocol classic`. Settings are those that rl-zoo3 has for Atari games
(`hyperparams/a2c.yml`, `ppo.yml` and `ppo_lstm.yml`). PPO's learning rate and clip range fall over
the frames that are asked for, as A3C's learning rate does; A2C's learning rate is constant.
`curves.py` compares and draws the files.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from common import FRAMES_PER_TIMESTEP, STACK, games_of_sb3
from curves import COLUMNS, SETTINGS
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.utils import LinearSchedule, safe_mean
from stable_baselines3.common.vec_env import VecFrameStack

from ncrl.agents.atari.config import camel_case
from ncrl.envs import atari

ROW_SECONDS = 10.0
"""Between two rows of a curve."""


class Agent(NamedTuple):
    """An algorithm as rl-zoo3 plays Atari games with it."""

    algorithm: type[OnPolicyAlgorithm]
    policy: str
    n_envs: int
    settings: dict[str, Any]
    terminal_on_life_loss: bool = True


_PPO: dict[str, Any] = {
    "n_steps": 128,
    "n_epochs": 4,
    "batch_size": 256,
    "learning_rate": LinearSchedule(2.5e-4, 0.0, 1.0),
    "clip_range": LinearSchedule(0.1, 0.0, 1.0),
    "vf_coef": 0.5,
    "ent_coef": 0.01,
}

AGENTS = {
    "A2C": Agent(
        A2C,
        "CnnPolicy",
        16,
        {
            "ent_coef": 0.01,
            "vf_coef": 0.25,
            "policy_kwargs": {
                "optimizer_class": RMSpropTFLike,
                "optimizer_kwargs": {"eps": 1e-5},
            },
        },
    ),
    "PPO": Agent(PPO, "CnnPolicy", 8, _PPO),
    "RecurrentPPO": Agent(RecurrentPPO, "CnnLstmPolicy", 8, _PPO, terminal_on_life_loss=False),
}


class SmallFile(BaseCallback):
    """Writes a row of `curves.COLUMNS` every `ROW_SECONDS`: a run that is stopped has its curve."""

    def __init__(self, file: TextIO, settings: dict[str, object]) -> None:
        super().__init__()
        self.file, self.settings = file, settings
        columns = [*SETTINGS, *COLUMNS]
        self.rows = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        self.rows.writeheader()
        self._began = self._written = time.monotonic()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if time.monotonic() - self._written >= ROW_SECONDS:
            self._on_training_end()

    def _on_training_end(self) -> None:
        self._written = time.monotonic()
        games = self.model.ep_info_buffer
        row = self.settings | {
            "frames": FRAMES_PER_TIMESTEP * self.num_timesteps,
            "seconds": f"{self._written - self._began:.6g}",
            "score": f"{safe_mean([game['r'] for game in games]):.6g}" if games else "",
        }
        self.rows.writerow(row)
        self.file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("agent", choices=AGENTS)
    parser.add_argument("out", type=Path, help="small file of the curve")
    parser.add_argument("--env", default="Pong")
    parser.add_argument("--frames", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists; give another name")
    agent = AGENTS[options.agent]
    game = camel_case(atari(options.env).game)
    games = games_of_sb3(
        game,
        agent.n_envs,
        seed=options.seed,
        wrapper_kwargs={"terminal_on_life_loss": agent.terminal_on_life_loss},
    )
    model = agent.algorithm(
        agent.policy, VecFrameStack(games, STACK), seed=options.seed, **agent.settings
    )
    settings = dict(zip(SETTINGS, (game, options.agent, agent.n_envs, options.seed), strict=True))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("x", newline="") as file:
        writer = SmallFile(file, settings)
        model.learn(options.frames // FRAMES_PER_TIMESTEP, callback=writer)


if __name__ == "__main__":
    main()
