#!/usr/bin/env python3
"""Train, resume, evaluate and watch A3C with Neurocoder heads on an Atari game.

python run_atari.py --env MontezumaRevenge
python run_atari.py --resume runs/MontezumaRevenge-1
python run_atari.py --evaluate runs/MontezumaRevenge-1 --episodes 10 --video out.mp4

What it does is in `ncrl.agents.atari`.
"""

import gc
import os
import signal
import sys

if __name__ == "__main__":
    # While the imports below take their seconds there is nothing to save and nothing to tell.
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda number, _frame: os._exit(128 + number))

from ncrl.agents.atari.command import main

__all__ = ["main"]

if __name__ == "__main__":
    gc.freeze()  # what is imported stays: to take it apart at the end would take half a second
    sys.exit(main())
