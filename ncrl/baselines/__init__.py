"""The paper's baselines, each in the seat of a linear layer (Le & Venkatesh 2022, section 3)."""

from ncrl.baselines.modulated import FiLMLinear, HyperNetLinear
from ncrl.baselines.moe import MoELinear, balance_loss, record_gates
from ncrl.baselines.nsm import NSMLinear

__all__ = [
    "FiLMLinear",
    "HyperNetLinear",
    "MoELinear",
    "NSMLinear",
    "balance_loss",
    "record_gates",
]
