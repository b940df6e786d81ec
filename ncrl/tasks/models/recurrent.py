"""The recurrent network of the polynomial experiment. Shapes: T timesteps, B sequences, h units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ncrl.layers import make_layer
from ncrl.seat import require_positive


class GruRegressor(nn.Module):
    """GRU and a coded output layer (paper, section 4.1: input x_t and y_{t-1}, output y_t).

    Args:
        hidden_size: h.
        in_features: numbers per timestep.
        num_outputs: predictions per timestep.
        layer: name in `ncrl.layers.LAYERS`, of the output layer.
        layer_options: its options.

    Shapes: [T, B, in_features] -> [T, B, num_outputs].

    Raises:
        ValueError: for an impossible size or an unknown layer.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        in_features: int = 2,
        num_outputs: int = 1,
        layer: str = "linear",
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_positive("hidden_size", hidden_size)
        require_positive("in_features", in_features)
        require_positive("num_outputs", num_outputs)
        self.gru = nn.GRU(in_features, hidden_size)
        self.output = make_layer(layer, hidden_size, num_outputs, **dict(layer_options or {}))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictions [T, B, num_outputs] and the state [1, B, h] after the last timestep.

        Args:
            inputs: [T, B, in_features].
            state: before timestep 0, [1, B, h]; zero if None.
        """
        hidden, state = self.gru(inputs, state)  # [T, B, h]
        return self.output(hidden), state
