"""One torch thread, here and in subprocesses: their number changes the last bits of sums."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
