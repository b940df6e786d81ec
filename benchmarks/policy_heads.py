"""How fast policies with different output layers learn which of 18 actions belongs to which of 18
observations: the number of Atari's actions, on a task that takes seconds.

The mean reward over each eighth of the training is the share of right answers; guessing gives .06.

python benchmarks/policy_heads.py --seeds 0 1
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import NEUROCODER, print_header, print_row
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import IdentityEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from ncrl.agents import A3C
from ncrl.agents.learning.objective import Objective
from ncrl.sb3 import MlpPolicy

NUM_ACTIONS, NUM_ENVS, PARTS = 18, 16, 8

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "hypernet": ("hypernet", {}),
    "film": ("film", {}),
    **{
        f"neurocoder, sharpness {beta:g}{'' if residual else ', no residual'}": (
            "neurocoder",
            NEUROCODER | {"sharpness": beta, "residual": residual},
        )
        for residual in (True, False)
        for beta in (1.0, 5.0, 10.0)
    },
    "neurocoder, learned sharpness": ("neurocoder", NEUROCODER | {"learned_sharpness": True}),
}


class Rewards(BaseCallback):
    """The mean reward of every timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def _on_step(self) -> bool:
        self.means.append(float(self.locals["rewards"].mean()))
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--timesteps", type=int, default=64_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = [f"{i + 1}/{PARTS}" for i in range(PARTS)]
    print_header("head", "seed", *columns)
    for name in arguments.heads:
        for seed in arguments.seeds:
            parts = train(*HEADS[name], seed, arguments.timesteps)
            print_row(name, seed, *(f"{part:.2f}" for part in parts))


def make_model(
    policy: str | type[MlpPolicy],
    seed: int,
    *,
    learning_rate: float = 1e-3,
    orth_coef: float = Objective.orth_coef,
    **options: Any,
) -> A3C:
    """A3C with Adam on that task; `options` are further ones of the policy."""
    env = DummyVecEnv([lambda: IdentityEnv(NUM_ACTIONS, ep_length=10)] * NUM_ENVS)
    return A3C(
        policy,
        env,
        n_steps=5,
        learning_rate=learning_rate,
        gamma=0.4,
        orth_coef=orth_coef,
        seed=seed,
        device="cpu",
        policy_kwargs={"net_arch": [64], "optimizer_class": torch.optim.Adam, **options},
    )


def train(head: str, options: dict[str, Any], seed: int, timesteps: int) -> list[float]:
    """Mean reward in every part of one training."""
    model = make_model("MlpPolicy", seed, head=head, head_kwargs=options)
    rewards = Rewards()
    model.learn(timesteps, callback=rewards)
    size = len(rewards.means) // PARTS
    return [statistics.fmean(rewards.means[i * size : (i + 1) * size]) for i in range(PARTS)]


if __name__ == "__main__":
    main()
