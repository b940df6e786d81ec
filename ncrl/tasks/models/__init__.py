"""Networks of the paper's experiments, by name; each takes `layer` and `layer_options`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ncrl.tasks.models.atari import atari_policy
from ncrl.tasks.models.convolutional import DenseNet, LeNet
from ncrl.tasks.models.mlp import Mlp, ProjectedLinear, SplitMlp
from ncrl.tasks.models.ntm import Ntm
from ncrl.tasks.models.recurrent import GruRegressor
from ncrl.tasks.models.resnet import FrozenResNetMlp, ResNet18

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "projected_linear": ProjectedLinear,
    "mlp": Mlp,
    "lenet": LeNet,
    "densenet": DenseNet,
    "gru": GruRegressor,
    "ntm": Ntm,
    "split_mlp": SplitMlp,
    "resnet18": ResNet18,
    "resnet_mlp": FrozenResNetMlp,
    "atari": atari_policy,
}
"""Constructors by the name that recipes use."""

__all__ = [
    "NETWORKS",
    "DenseNet",
    "FrozenResNetMlp",
    "GruRegressor",
    "LeNet",
    "Mlp",
    "Ntm",
    "ProjectedLinear",
    "ResNet18",
    "SplitMlp",
    "atari_policy",
]
