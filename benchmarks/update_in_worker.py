"""Whether true A3C updates would pay on the CPU: learning from the graph that acting left behind.

A worker that keeps the graph of its actions need not evaluate its rollout again. But the graph
consists of single timesteps: the gradient of every weight is summed up timestep by timestep, where
the learner makes one large product of a whole batch of rollouts.

python benchmarks/update_in_worker.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from common import HEADS, N_STEPS, build_a3c, machine
from torch import Tensor

from ncrl.envs import atari
from ncrl.networks import LstmState
from ncrl.sb3 import Latent

GAMES = 8
"""Of one worker."""

WORKERS = 2
"""Whose rollouts the learner puts into one batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default="a3c", choices=("a3c", "nature", "paper"))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"encoder {arguments.encoder}, {GAMES} games, T = {N_STEPS}, one thread, {machine()}")
    print("| ms per rollout of a worker | act | learn | both | act with graph, backward | ratio |")
    print("|---|---|---|---|---|---|")
    for head in HEADS:
        rollout = Rollout(head, arguments.encoder)
        functions = (rollout.act, rollout.learn, rollout.act_and_learn)
        act, learn, one_graph = median_ms(functions, arguments.rounds)
        learn /= WORKERS
        print(
            f"| {head} heads | {act:.1f} | {learn:.1f} | {act + learn:.1f} | {one_graph:.1f} | "
            f"{one_graph / (act + learn):.2f} |"
        )


class Rollout:
    """The two ways, on images of noise."""

    def __init__(self, head: str, encoder: str) -> None:
        model = build_a3c(atari("Pong"), head, encoder, n_envs=GAMES, n_workers=0, device="cpu")
        self.policy = model.policy
        self.policy.set_training_mode(False)
        generator = torch.Generator().manual_seed(0)
        shape = (N_STEPS + 1, GAMES, 1, 84, 84)
        self.obs = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.starts = torch.zeros(N_STEPS + 1, GAMES, dtype=torch.bool)
        self.actions = torch.zeros(N_STEPS, GAMES, dtype=torch.int64)

    @torch.no_grad()
    def act(self) -> None:
        """As workers do."""
        state = self.state(GAMES)
        for obs, starts in zip(self.obs[:-1], self.starts[:-1], strict=True):
            state = self.policy.act(obs, state, starts).lstm_state

    def learn(self) -> None:
        """As the learner does, from the rollouts of all workers at once."""
        wide = partial(torch.cat, dim=1)
        evaluation = self.policy.evaluate_rollout(
            wide([self.obs] * WORKERS),
            wide([self.actions] * WORKERS),
            self.state(WORKERS * GAMES),
            wide([self.starts] * WORKERS),
        )
        self.descend(evaluation.log_prob, evaluation.entropy, evaluation.values)

    def act_and_learn(self) -> None:
        """Keep the graph; the critic, which acting does not need, sees the rollout at once."""
        state, latents, log_probs, entropies = self.state(GAMES), [], [], []
        for obs, starts in zip(self.obs, self.starts, strict=True):
            latent, state = self.policy.encode(obs, state, starts)
            latents.append(latent.critic)
            if len(latents) > N_STEPS:
                break  # the last observation is for the value alone
            distribution = self.policy.distribution(latent)
            log_probs.append(distribution.log_prob(distribution.get_actions()))
            entropy = distribution.entropy()
            assert entropy is not None
            entropies.append(entropy)
        all_latents = torch.stack(latents)
        values = self.policy.values(Latent(all_latents, all_latents))
        self.descend(torch.stack(log_probs), torch.stack(entropies), values)

    def state(self, n_envs: int) -> LstmState:
        return self.policy.initial_state(n_envs)

    def descend(self, log_prob: Tensor, entropy: Tensor, values: Tensor) -> None:
        """A gradient of all parameters; what exactly is descended does not change the time."""
        loss = log_prob.sum() + entropy.sum() + values.square().sum()
        self.policy.optimizer.zero_grad()
        loss.backward()


def median_ms(functions: tuple[Callable[[], None], ...], rounds: int) -> list[float]:
    """In turn, since the speed of a machine drifts; the first round warms up."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seen in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            seen.append(1000 * (time.perf_counter() - began))
    return [statistics.median(seen[1:]) for seen in times]


if __name__ == "__main__":
    main()
