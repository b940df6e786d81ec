"""Continual learning: methods, per-sample gradients and metrics, for any model."""
