"""Several algorithms in a sequence, by a Neural Turing machine."""
