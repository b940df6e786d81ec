"""The network of the Atari experiment, which `run_atari.py` trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from torch import nn


def atari_policy(
    num_actions: int = 18,
    *,
    encoder: str = "paper",
    lstm_hidden_size: int = 512,
    image_size: int = 80,
    layer: str = "linear",
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Encoder, LSTM, and one coded output layer each for policy and value (paper, section 4.2).

    Args:
        num_actions: logits of the policy.
        encoder: name in `ncrl.networks.ENCODERS`.
        lstm_hidden_size: width of the LSTM.
        image_size: height and width of a frame.
        layer: name in `ncrl.layers.LAYERS`, of both output layers.
        layer_options: their options.

    Raises:
        ValueError: for an unknown encoder or layer, or frames that are too small.
    """
    # Importing Stable-Baselines3 takes seconds that the other networks need not pay.
    from ncrl.sb3 import CnnLstmPolicy

    return CnnLstmPolicy(
        spaces.Box(0, 255, (1, image_size, image_size), np.uint8),
        spaces.Discrete(num_actions),
        lambda _: 0.0,
        encoder=encoder,
        lstm_hidden_size=lstm_hidden_size,
        head=layer,
        head_kwargs=dict(layer_options or {}),
    )
