"""CPU time per timestep of worker processes, Ray actors and RLlib's IMPALA, in turn. Run by hand:

PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/cluster.py [ROUNDS SECONDS]
PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/cluster.py receiving

The same work everywhere: Pong, `NeurocoderCnnLstmPolicy`, 2 workers of 8 games, 20 timesteps in a
rollout, 160 in an update on the CPU. What counts is the time of all processes between two reports
that lie SECONDS apart, once the training is under way. `receiving` is what one rollout costs the
learner's process: waiting, fetching, copying, asking for the next.
"""

import contextlib
import logging
import subprocess
import sys
import time
from typing import Any

import psutil
from stable_baselines3.common.callbacks import BaseCallback

from ncrl.agents import A3C
from ncrl.envs import atari

POLICY = "NeurocoderCnnLstmPolicy"
UNDER_WAY = 4_000
"""Timesteps before the clock starts."""

BLOCK = 1_220_000
"""Bytes of a rollout of 8 games."""

RECEIVED = 500
"""Rollouts that are timed, after as many that are not."""


def say(played: int, learnt: int) -> None:
    print("timesteps", played, learnt, flush=True)


class Report(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls % 20 == 0:
            say(self.num_timesteps, self.num_timesteps)
        return True


def a3c(**options: Any) -> None:
    model = A3C(
        POLICY, atari("Pong"), n_workers=2, n_envs=16, n_steps=20, batch_size=160, seed=0,
        device="cpu", **options,
    )  # fmt: skip
    model.learn(10**9, callback=Report())


def join_ray() -> None:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)


def actors() -> None:
    join_ray()
    a3c(cluster="auto")


def impala() -> None:
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.tune.registry import register_env

    from ncrl.envs.rllib import atari_vector_env
    from ncrl.rllib import IMPALALearner, module_spec

    join_ray()
    register_env("atari", atari_vector_env)
    config = (
        IMPALAConfig()
        .environment("atari", env_config={"name": "Pong"})
        .env_runners(
            num_env_runners=2,
            num_envs_per_env_runner=8,
            rollout_fragment_length=20,
            gym_env_vectorize_mode="vector_entry_point",
        )
        .learners(
            num_learners=0,
            learner_class=IMPALALearner,
            learner_config_dict={"orth_coef": 0.01, "reward_clip": 1.0},
        )
        .training(train_batch_size_per_learner=160)
        .reporting(min_time_s_per_iteration=1)
        .rl_module(rl_module_spec=module_spec(POLICY, rollout_fragment_length=20))
    )
    algorithm = config.build_algo()
    while True:
        result = algorithm.train()
        learners = result.get("learners", {}).get("__all_modules__", {})
        played = result["env_runners"].get("num_env_steps_sampled_lifetime", 0)
        say(int(played), int(learners.get("num_module_steps_trained_lifetime", 0)))


def receiving() -> None:
    """Two actors send the block of a rollout again and again, with more or fewer calls pending."""
    import numpy as np
    import ray

    join_ray()

    class Sender:
        def send(self, size: int) -> Any:
            return np.zeros(size, np.uint8)

    senders = [ray.remote(num_cpus=0)(Sender).remote() for _ in range(2)]
    for pending, size in ((2, BLOCK), (100, BLOCK), (1000, BLOCK), (2, 2 * BLOCK)):
        calls = [senders[i % 2].send.remote(size) for i in range(pending)]
        place, began = np.empty(size, np.uint8), 0.0
        for i in range(2 * RECEIVED):
            if i == RECEIVED:
                began = time.process_time()
            (done,), calls = ray.wait(calls, num_returns=1)
            place[:] = ray.get(done)
            calls.append(senders[i % 2].send.remote(size))
        milliseconds = 1000 * (time.process_time() - began) / RECEIVED
        print(f"{pending} pending calls, {size / 1e6:.2f} MB: {milliseconds:.2f} ms a rollout")
        ray.wait(calls, num_returns=len(calls))


ENGINES = {"processes": a3c, "actors": actors, "impala": impala}


def cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:2])
    return total


def measure(engine: str, seconds: int) -> None:
    """Print what the engine takes, then end all its processes."""
    child = subprocess.Popen([sys.executable, __file__, engine], stdout=subprocess.PIPE, text=True)
    process = psutil.Process(child.pid)
    first = None
    assert child.stdout is not None
    for line in child.stdout:
        if not line.startswith("timesteps"):
            continue
        played, learnt = map(int, line.split()[1:])
        now = (played, learnt, time.monotonic(), cpu_seconds(process))
        if played > UNDER_WAY:
            first = first or now
        if first and now[2] - first[2] > seconds:
            timesteps, trained, wall, cpu = (b - a for a, b in zip(first, now, strict=True))
            print(
                f"{engine}: {1000 * cpu / timesteps:.2f} ms of CPU per timestep, "
                f"{timesteps / wall:.0f} timesteps/s at {cpu / wall:.2f} cores, "
                f"{trained / timesteps:.0%} learnt from",
                flush=True,
            )
            break
    for one in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    child.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["receiving"]:
        receiving()
    elif sys.argv[1:] and sys.argv[1] in ENGINES:
        ENGINES[sys.argv[1]]()
    else:
        rounds, seconds = [int(x) for x in sys.argv[1:]] or (3, 40)
        for _ in range(rounds):
            for engine in ENGINES:
                measure(engine, seconds)
