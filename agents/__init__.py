"""Agents: A3C, its workers and its learner."""

if __name__ != "ncrl.agents":
    # Found in a clone under its folder's name. It is the same package, not a second copy of it.
    import importlib
    import sys

    importlib.import_module("ncrl.agents")
    for name, module in list(sys.modules.items()):
        if name == "ncrl.agents" or name.startswith("ncrl.agents."):
            sys.modules[name.removeprefix("ncrl.")] = module

from ncrl.agents.a3c import A3C, NonFiniteError
from ncrl.agents.learning.intrinsic import IntrinsicReward
from ncrl.agents.playing.supervision import Limits, WorkerError
from ncrl.agents.runs import checkpoints
from ncrl.sb3 import export_policy, load_policy

__all__ = [
    "A3C",
    "IntrinsicReward",
    "Limits",
    "NonFiniteError",
    "WorkerError",
    "checkpoints",
    "export_policy",
    "load_policy",
]
