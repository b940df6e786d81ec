"""Networks of the paper's experiments, by the name that recipes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from gymnasium import spaces
from torch import nn

from ncrl.tasks.models.convolutional import DenseNet, LeNet
from ncrl.tasks.models.mlp import PLAIN, Coded, Mlp, ProjectedLinear, SplitMlp
from ncrl.tasks.models.recurrent import GruRegressor, Ntm
from ncrl.tasks.models.resnet import ResNet18, resnet_mlp


def atari_policy(
    num_actions: int = 18,
    *,
    encoder: str = "paper",
    lstm_hidden_size: int = 512,
    coded: Coded = PLAIN,
) -> nn.Module:
    """Encoder, LSTM, and one coded output layer each for policy and value (paper, section 4.2)."""
    # Importing Stable-Baselines3 takes seconds that the other networks need not pay.
    from ncrl.sb3 import CnnLstmPolicy

    return CnnLstmPolicy(
        spaces.Box(0, 255, (1, 80, 80), np.uint8),
        spaces.Discrete(num_actions),
        lambda _: 0.0,
        encoder=encoder,
        lstm_hidden_size=lstm_hidden_size,
        head=coded.layer,
        head_kwargs=dict(coded.options),
    )


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
    "resnet_mlp": resnet_mlp,
    "atari": atari_policy,
}
