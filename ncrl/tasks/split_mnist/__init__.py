"""Split MNIST: five tasks of two digits, learnt one after the other."""
