"""Auto-regression of sequences made of polynomials."""

from ncrl.tasks.polynomial.experiment import main

__all__ = ["main"]
