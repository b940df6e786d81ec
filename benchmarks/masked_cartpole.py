"""Learning that needs memory: CartPole-v1 with its velocities hidden, played by real workers.

python benchmarks/masked_cartpole.py --seeds 0 1 2
python benchmarks/masked_cartpole.py --seeds 0 1 2 --policy MlpLstmPolicy
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import print_header, print_row
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule

from ncrl.agents import A3C
from ncrl.envs import masked_cartpole

SOLVED = 475.0  # mean return of 100 games at which CartPole-v1 counts as solved; 500 is the most


class UntilSolved(BaseCallback):
    """Ends the training when the latest 100 training games reach `SOLVED` on average."""

    def _on_step(self) -> bool:
        games = self.model.ep_info_buffer
        assert games is not None
        return len(games) < 100 or float(np.mean([game["r"] for game in games])) < SOLVED


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", default="NeurocoderMlpLstmPolicy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    columns = "policy", "seed", "timesteps", "training games (100)", "100 new games", "seconds"
    print_header(*columns)
    for seed in arguments.seeds:
        model = A3C(
            arguments.policy,
            masked_cartpole(),
            n_workers=2,
            n_envs=16,
            batch_size=80,
            gamma=0.98,
            gae_lambda=0.95,
            ent_coef=0.0,
            reward_scale=0.05,
            learning_rate=LinearSchedule(2e-3, 0.0, 1.0),
            rms_prop_eps=1e-3,
            policy_kwargs={"lstm_hidden_size": 64},
            seed=seed,
            device="cpu",
        )
        started = time.monotonic()
        model.learn(300_000, callback=UntilSolved())
        seconds = time.monotonic() - started
        trained = np.mean([game["r"] for game in model.ep_info_buffer or ()])
        env = masked_cartpole()(8, 1_000_000 + seed)
        scores, _ = evaluate_policy(
            model, env, n_eval_episodes=100, deterministic=True, return_episode_rewards=True
        )
        new = f"{np.mean(scores):.1f} ± {np.std(scores):.1f}"
        cells = f"{model.num_timesteps:,}", f"{trained:.1f}", new, f"{seconds:.0f}"
        print_row(arguments.policy, seed, *cells)


if __name__ == "__main__":
    main()
