"""Split MNIST: five tasks of two digits, one after the other."""

from ncrl.tasks.split_mnist.experiment import main

__all__ = ["main"]
