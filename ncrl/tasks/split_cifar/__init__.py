"""Split CIFAR: tasks of two or five classes, on frozen features."""

from ncrl.tasks.split_cifar.experiment import main

__all__ = ["main"]
