"""Networks of the paper's experiments, by the name that recipes use."""

from collections.abc import Callable, Mapping

from torch import nn

from ncrl.tasks.models.atari import atari_policy
from ncrl.tasks.models.convolutional import DenseNet, LeNet
from ncrl.tasks.models.mlp import Mlp, ProjectedLinear, SplitMlp
from ncrl.tasks.models.recurrent import GruRegressor, Ntm
from ncrl.tasks.models.resnet import FrozenResNetMlp, ResNet18

# Constructors; beside options of its own each takes `coded`, the kind of its coded layers.
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
