"""CIFAR with coded last layers."""
