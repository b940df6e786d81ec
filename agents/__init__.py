"""Agents: A3C, its workers and its learner."""

if __name__ != "ncrl.agents":  # a second copy of every class would not be the first's
    raise ImportError("this folder is the package ncrl.agents: import ncrl.agents")

from ncrl.agents.a3c import A3C, NonFiniteError
from ncrl.agents.learning.intrinsic import IntrinsicReward
from ncrl.agents.playing.pool import Limits, WorkerError
from ncrl.sb3 import export_policy, load_policy

__all__ = [
    "A3C",
    "IntrinsicReward",
    "Limits",
    "NonFiniteError",
    "WorkerError",
    "export_policy",
    "load_policy",
]
