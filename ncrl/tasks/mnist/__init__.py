"""MNIST with one coded layer as a linear classifier."""
