"""Encoders of Atari frames and of vectors, and an LSTM over whole rollouts.

Shapes: T timesteps, B environments, L LSTM layers, h LSTM width. Rollouts are time-major.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.checks import suggest
from ncrl.seat import has_hooks

LstmState = tuple[Tensor, Tensor]
"""Hidden and cell state of an LSTM, each [L, B, h]."""


ENCODERS: dict[str, tuple[Sequence[Sequence[Any]], int]] = {
    # A3C (Mnih et al. 2016), DQN (Mnih et al. 2015)
    "a3c": ([(16, 8, 4), (32, 4, 2)], 256),
    "nature": ([(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512),
    # Has the parameter count of the Neurocoder paper (Table 9): 64 maps of 4x4 from 80x80 or 84x84.
    "paper": ([(32, 5, 1, 2), (32, 5, 1, 1), (64, 4, 1, 1), (64, 3, 1, 1)], 0),
}
"""Convolutions (maps, kernel, stride) and the width of the linear layer after them, by name. With
width 0 there is no such layer, and convolutions (maps, kernel, stride, padding) are followed by
pooling."""


def trunk(
    encoder: str, channels: int, width: int | None = None, activation: type[nn.Module] = nn.ReLU
) -> list[nn.Module]:
    """The layers of one of `ENCODERS`, its linear layer of another width if one is given."""
    sizes, usual_width = ENCODERS[encoder]
    layers: list[nn.Module] = []
    for maps, *size in sizes:
        layers.append(nn.Conv2d(channels, maps, *size))
        if not usual_width:
            layers.append(nn.MaxPool2d(2))
        layers.append(activation())
        channels = maps
    layers.append(nn.Flatten())
    if usual_width:
        layers += [nn.LazyLinear(width or usual_width), activation()]
    return layers


CONTRAST_FLOOR = 1e-4
"""Added to the variance of an image or of its features, so that empty ones stay empty."""


class MeanImage(nn.Module):
    """Subtracts the mean of all images [channels, height, width] shown so far, pixel by pixel."""

    mean: Tensor
    num_images: Tensor
    """Images behind the mean, a scalar."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("num_images", torch.zeros((), dtype=torch.int64))

    def watch(self, images: Tensor) -> None:
        """Take images [B, channels, height, width] into the mean."""
        self.add(images.mean(0), len(images))

    @torch.no_grad()
    def add(self, mean: Tensor, count: int) -> None:
        """Take `count` images into the mean, of which theirs is `mean`."""
        if not count:
            return
        self.num_images += count
        self.mean.lerp_(mean, count / self.num_images.to(self.mean.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return images - self.mean


class AtariEncoder(BaseFeaturesExtractor):
    """An SB3 features extractor over one of `ENCODERS`.

    Args:
        observation_space: images, channel first.
        encoder: `a3c`, `nature` or `paper`.
        standardize: subtract the mean of all images so far (`watch`), then divide what is left of
            each image by its standard deviation, and do the same to its features. Most of a frame
            never changes: on Breakout, where the ball is two pixels, raw features hardly vary, and
            the critic learns nothing from them (docs/lab_notes.md). They also grow until they
            saturate the LSTM for good.
        features_dim: width of the last layer of `a3c` (256) or `nature` (512).

    Raises:
        ValueError: for an unknown encoder, for observations that are no images or too small for it,
            or for a width that it has no layer for.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        encoder: str = "a3c",
        standardize: bool = True,
        features_dim: int | None = None,
    ) -> None:
        if encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {encoder!r}; {suggest(encoder, ENCODERS)}")
        shape = observation_space.shape or ()
        if len(shape) != 3:
            raise ValueError(f"expected images (channels, height, width), got {observation_space}")
        if features_dim is not None and encoder == "paper":
            raise ValueError(f"the encoder 'paper' has no layer for features_dim={features_dim}")
        network = nn.Sequential(*trunk(encoder, shape[0], features_dim))
        try:
            with torch.no_grad():
                features = int(network(torch.zeros(1, *shape)).shape[1])
        except RuntimeError as error:
            raise ValueError(
                f"images of shape {shape} (channels, height, width) are too small for the encoder "
                f"{encoder!r}, which is made for 84x84"
            ) from error
        super().__init__(observation_space, features)
        self.network = network
        self.background = MeanImage(shape) if standardize else None

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] of numbers in [0, 1] -> [B, features]."""
        if self.background is None:
            features: Tensor = self.network(images)
            return features
        moving = self.background(images)
        moving = F.layer_norm(moving, moving.shape[1:], eps=CONTRAST_FLOOR)
        features = self.network(moving)
        return F.layer_norm(features, features.shape[1:], eps=CONTRAST_FLOOR)


class VectorEncoder(BaseFeaturesExtractor):
    """One tanh layer of `features_dim` over vector observations, for an LSTM to read."""

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int = 64) -> None:
        super().__init__(observation_space, features_dim)
        inputs = get_flattened_obs_dim(observation_space)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, features_dim), nn.Tanh())

    def forward(self, obs: Tensor) -> Tensor:
        """[B, ...] -> [B, features_dim]."""
        features: Tensor = self.network(obs)
        return features


_is_static: ContextVar[bool] = ContextVar("_is_static", default=False)


@contextmanager
def static_unroll() -> Iterator[None]:
    """`unroll_lstm` inside takes steps one by one, whatever the rows in which episodes start.

    What it does then does not depend on data, so that it can be traced, or captured as a CUDA
    graph. Without a graph, one call per stretch is faster.
    """
    token = _is_static.set(True)
    try:
        yield
    finally:
        _is_static.reset(token)


def unroll_lstm(
    lstm: nn.LSTM, inputs: Tensor, state: LstmState, episode_start: Tensor
) -> tuple[Tensor, LstmState]:
    """Run an LSTM over time, from a zero state wherever an episode starts.

    One call per stretch between rows in which some episode starts.

    Args:
        lstm: time-major.
        inputs: [T, B, features].
        state: before row 0.
        episode_start: [T, B] bool; row t is the first observation of an episode. Best on the host,
            which has to know the rows; inside `static_unroll`, best where the inputs are.

    Returns:
        Outputs [T, B, h] and the state after row T - 1.
    """
    is_static = _is_static.get()
    # Plain is a stack of cells with nothing between or after them, and without hooks.
    is_more = lstm.bidirectional or lstm.proj_size or (lstm.dropout and lstm.training)
    is_plain = type(lstm) is nn.LSTM and not (is_more or has_hooks(lstm))
    if is_static and is_plain:
        return _unroll_cells(lstm, inputs, state, episode_start)
    steps = len(inputs)
    starts = range(steps) if is_static else episode_start.any(dim=1).nonzero().flatten().tolist()
    outputs = []
    for first, last in pairwise(sorted({0, *starts, steps})):
        stretch, start = inputs[first:last], episode_start[first:last]
        # On the CPU `nn.LSTM` rearranges its weights at every call, which for one timestep can
        # take longer than the step itself.
        if last - first == 1 and inputs.device.type == "cpu" and is_plain:
            output, state = _unroll_cells(lstm, stretch, state, start)
        else:
            keep = (~start[0]).unsqueeze(1).to(inputs.device, non_blocking=True)  # [B, 1]
            output, state = lstm(stretch, (state[0] * keep, state[1] * keep))
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), state


def _unroll_cells(
    lstm: nn.LSTM, inputs: Tensor, state: LstmState, episode_start: Tensor
) -> tuple[Tensor, LstmState]:
    """`unroll_lstm` of a stack of plain cells, one step at a time."""
    keep = (~episode_start).unsqueeze(2).to(inputs.device, non_blocking=True)  # [T, B, 1]
    hidden, cells = state[0].unbind(), state[1].unbind()
    outputs = []
    for row, kept in zip(inputs.unbind(), keep.unbind(), strict=True):
        states = []
        for h, c, weights in zip(hidden, cells, lstm.all_weights, strict=True):
            states.append(torch.lstm_cell(row, (h * kept, c * kept), *weights))
            row = states[-1][0]
        hidden, cells = zip(*states, strict=True)
        outputs.append(row)
    return torch.stack(outputs), (torch.stack(hidden), torch.stack(cells))
