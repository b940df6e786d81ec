"""Agents: A3C, its workers and its learner."""

from agents.a3c import A3C, NonFiniteError
from agents.supervision import Limits, WorkerError
from ncrl.sb3 import export_policy, load_policy

__all__ = ["A3C", "Limits", "NonFiniteError", "WorkerError", "export_policy", "load_policy"]
