"""The network of the Atari experiment, which `run_atari.py` trains: here it is only counted."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from torch import nn

from ncrl.tasks.models.mlp import PLAIN, Coded


def atari_policy(
    num_actions: int = 18,
    *,
    encoder: str = "paper",
    lstm_hidden_size: int = 512,
    image_size: int = 80,
    coded: Coded = PLAIN,
) -> nn.Module:
    """Encoder, LSTM, and one coded output layer each for policy and value (paper, section 4.2)."""
    # Importing Stable-Baselines3 takes seconds that the other networks need not pay.
    from ncrl.sb3 import CnnLstmPolicy

    return CnnLstmPolicy(
        spaces.Box(0, 255, (1, image_size, image_size), np.uint8),
        spaces.Discrete(num_actions),
        lambda _: 0.0,
        encoder=encoder,
        lstm_hidden_size=lstm_hidden_size,
        head=coded.layer,
        head_kwargs=dict(coded.options),
    )
