"""Several algorithms in a sequence, by a Neural Turing machine."""

from ncrl.tasks.algorithms.experiment import main

__all__ = ["main"]
