"""CIFAR with coded last layers."""

from ncrl.tasks.cifar.experiment import main

__all__ = ["main"]
