"""Split CIFAR: tasks of two or five classes, on frozen features."""
