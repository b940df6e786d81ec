"""Split MNIST: five tasks of two digits, one after the other."""
