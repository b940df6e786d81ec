"""Runs: what is kept of a training, and what is said about it."""
