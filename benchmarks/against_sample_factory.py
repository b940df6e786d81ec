"""Timesteps per second of Sample Factory's APPO with an LSTM: a row of `throughput.py`.

Sample Factory 2.1.1 needs numpy 1 and gymnasium 0.29, so it lives in an environment of its own:

python3 -m venv sf && sf/bin/pip install 'sample-factory[atari]==2.1.1' torch==2.13.0
python benchmarks/throughput.py --encoder nature --sample-factory sf/bin/python

It learns Pong from single frames with the encoder `nature`, an LSTM of 512, T = 20 and one epoch
per batch, as A3C does there, and plays it as its own users do: with gymnasium's wrappers, four
emulator frames per timestep.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import FRAMES_PER_TIMESTEP, N_STEPS

from ncrl.agents.playing.sizes import available_cores

FRAMES = re.compile(r"Total num frames: (\d+)\.")  # printed every five seconds
LONGEST_START = 180.0  # seconds to its first batch


def sample_factory(python: Path, n_envs: int, seconds: float) -> float:
    """Timesteps per second between two of its reports, of which the first follows a batch.

    Raises:
        RuntimeError: with the end of what it printed, if it ends or never learns.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-m", "sf_examples.atari.train_atari", *options(n_envs, folder)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        printed: list[str] = []
        began, first = time.monotonic(), None
        try:
            for line in process.stdout:
                printed.append(line)
                now = time.monotonic()
                if found := FRAMES.search(line):
                    frames = int(found[1])
                    if first is None and frames:
                        first = now, frames
                    elif first is not None and now >= first[0] + seconds:
                        return (frames - first[1]) / FRAMES_PER_TIMESTEP / (now - first[0])
                if first is None and now > began + LONGEST_START:
                    break
            raise RuntimeError("Sample Factory did not learn:\n" + "".join(printed[-20:]))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def options(n_envs: int, folder: str) -> Sequence[str]:
    """Asynchronous PPO with an LSTM, a worker per core, at the settings of our `build_a3c`."""
    workers = available_cores()
    settings = {
        "algo": "APPO",
        "env": "atari_pong",
        "experiment": "speed",
        "train_dir": folder,
        "device": "cpu",
        "async_rl": True,
        "use_rnn": True,
        "rnn_type": "lstm",
        "rnn_size": 512,
        "env_framestack": 1,
        "num_workers": workers,
        "num_envs_per_worker": n_envs // workers,
        "worker_num_splits": 2,
        "rollout": N_STEPS,
        "recurrence": N_STEPS,
        "batch_size": N_STEPS * n_envs,
        "num_batches_per_epoch": 1,
        "num_epochs": 1,
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in settings.items()]
