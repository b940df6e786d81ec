"""What tests and their subprocesses find: one torch thread, and a Ctrl-C that interrupts."""

import os
import signal

# Their number changes the last bits of sums.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

# A shell without job control starts what runs in its background with SIGINT ignored, and that is
# inherited; a handler is not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
