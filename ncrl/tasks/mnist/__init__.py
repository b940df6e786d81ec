"""MNIST with one coded layer as a linear classifier."""

from ncrl.tasks.mnist.experiment import main

__all__ = ["main"]
