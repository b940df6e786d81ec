"""Encoders of Atari frames, and an LSTM over whole rollouts.

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

from ncrl.settings import suggest

LstmState = tuple[Tensor, Tensor]
"""Hidden and cell state of an LSTM, each [L, B, h]."""


def a3c_encoder(channels: int, features: int = 256) -> list[nn.Module]:
    """The trunk of A3C (Mnih et al. 2016): 16@8x8/4, 32@4x4/2, 256 units."""
    return [
        nn.Conv2d(channels, 16, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(features),
        nn.ReLU(),
    ]


def nature_encoder(channels: int, features: int = 512) -> list[nn.Module]:
    """The trunk of DQN (Mnih et al. 2015): 32@8x8/4, 64@4x4/2, 64@3x3/1, 512 units."""
    return [
        nn.Conv2d(channels, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(features),
        nn.ReLU(),
    ]


def paper_encoder(channels: int) -> list[nn.Module]:
    """The trunk whose parameter count is the Neurocoder paper's (Table 9): 1024 features.

    80x80 and 84x84 frames both end in 64 maps of 4x4.
    """
    layers: list[nn.Module] = []
    for width, kernel, padding in ((32, 5, 2), (32, 5, 1), (64, 4, 1), (64, 3, 1)):
        layers += [nn.Conv2d(channels, width, kernel, padding=padding), nn.MaxPool2d(2), nn.ReLU()]
        channels = width
    return [*layers, nn.Flatten()]


CONTRAST_FLOOR = 1e-4
"""Added to the variance of an image or of its features, so that empty ones stay empty."""

ENCODERS = {"a3c": a3c_encoder, "nature": nature_encoder, "paper": paper_encoder}
"""Convolutional trunks by name; each takes the number of input channels, and those that end in a
linear layer its width."""


class MeanImage(nn.Module):
    """Subtracts the mean of all images that it has been shown, pixel by pixel.

    Args:
        shape: of an image, (channels, height, width).
    """

    mean: Tensor
    """[channels, height, width], zero before the first image."""

    num_images: Tensor
    """Images behind the mean, a scalar."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("num_images", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def watch(self, images: Tensor) -> None:
        """Take images [B, channels, height, width] into the mean."""
        self.add(images.mean(0), len(images))

    @torch.no_grad()
    def add(self, mean: Tensor, count: int) -> None:
        """Take `count` images into the mean, of which theirs is `mean`."""
        self.num_images += count
        self.mean.lerp_(mean, count / self.num_images.to(self.mean.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> the same shape."""
        return images - self.mean


class AtariEncoder(BaseFeaturesExtractor):
    """An SB3 features extractor over one of `ENCODERS`.

    Args:
        observation_space: images, channel first.
        encoder: `a3c`, `nature` or `paper`.
        standardize: subtract the mean of all images so far (`watch`), then divide what is left of
            each image by its standard deviation, and do the same to its features; no gradient
            learns any of this. Most of a frame never changes, and would make up nearly all of every
            feature: on Breakout, where the ball is two pixels, features then vary by 1 % of their
            size from frame to frame and the critic learns nothing in a million frames. Features
            that are left as they are grow within thousands of updates until they saturate the LSTM
            for good.
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
        if not (isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 3):
            raise ValueError(
                f"a Cnn policy needs images (channels, height, width), got {observation_space}; "
                f"use {_policy_for(observation_space)}"
            )
        options = {} if features_dim is None else {"features": features_dim}
        if options and encoder == "paper":
            raise ValueError(f"the encoder 'paper' has no layer for features_dim={features_dim}")
        network = nn.Sequential(*ENCODERS[encoder](observation_space.shape[0], **options))
        image = torch.zeros(1, *observation_space.shape)
        try:
            with torch.no_grad():
                features = int(network(image).shape[1])
        except RuntimeError as error:
            raise ValueError(
                f"images of shape {observation_space.shape} (channels, height, width) are too "
                f"small for the encoder {encoder!r}, which is made for 84x84"
            ) from error
        super().__init__(observation_space, features)
        self.network = network
        self.background = MeanImage(observation_space.shape) if standardize else None

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] of numbers in [0, 1] -> [B, features]."""
        if self.background is None:
            features: Tensor = self.network(images)
            return features
        moving = self.background(images)
        moving = F.layer_norm(moving, moving.shape[1:], eps=CONTRAST_FLOOR)
        features = self.network(moving)
        return F.layer_norm(features, features.shape[1:], eps=CONTRAST_FLOOR)

    def watch(self, images: Tensor) -> None:
        """Take images as `forward` gets them into the mean of all, where it is subtracted.

        Whoever trains calls this with what it has trained on: `EnginePolicy.watch`. Acting never
        does.
        """
        if self.background is not None:
            self.background.watch(images)


class VectorEncoder(BaseFeaturesExtractor):
    """One tanh layer over vector observations, so that the LSTM reads features of its own size.

    Args:
        observation_space: any that SB3 can flatten, but no Dict.
        features_dim: width of the layer.

    Raises:
        ValueError: for Dict observations.
    """

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int = 64) -> None:
        if isinstance(observation_space, spaces.Dict):
            raise ValueError(
                f"an Mlp policy needs vectors, got {observation_space}; "
                f"use {_policy_for(observation_space)}"
            )
        super().__init__(observation_space, features_dim)
        inputs = get_flattened_obs_dim(observation_space)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, features_dim), nn.Tanh())

    def forward(self, obs: Tensor) -> Tensor:
        """[B, ...] -> [B, features_dim]."""
        features: Tensor = self.network(obs)
        return features


def _policy_for(observation_space: spaces.Space[Any]) -> str:
    """The kind of policy for observations that are no images."""
    if isinstance(observation_space, spaces.Dict):
        return "a MultiInput policy, such as MultiInputLstmPolicy"
    return "an Mlp policy, such as MlpLstmPolicy"


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

    One call per stretch between rows in which some episode starts; one per timestep inside
    `static_unroll`.

    Args:
        lstm: time-major.
        inputs: [T, B, features].
        state: before row 0.
        episode_start: [T, B] bool; row t is the first observation of an episode. Best on the host,
            which has to know the rows before it can go on; the inputs may be elsewhere. Inside
            `static_unroll`, best where the inputs are.

    Returns:
        Outputs [T, B, h] and the state after row T - 1.
    """
    if _is_static.get():
        return _unroll_steps(lstm, inputs, state, episode_start)
    starts = episode_start.any(dim=1).nonzero().flatten().tolist()  # rows with a start
    bounds = sorted({0, *starts, inputs.shape[0]})
    outputs = []
    for first, last in pairwise(bounds):
        keep = (~episode_start[first]).unsqueeze(1).to(inputs.device, non_blocking=True)  # [B, 1]
        state = (state[0] * keep, state[1] * keep)
        # On the CPU `nn.LSTM` rearranges its weights at every call, which for one timestep takes
        # several times as long as the step itself.
        if last - first == 1 and inputs.device.type == "cpu" and _has_plain_cells(lstm):
            output, state = run_one_step(lstm, inputs[first:last], state)
        else:
            output, state = lstm(inputs[first:last], state)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), state


def _unroll_steps(
    lstm: nn.LSTM, inputs: Tensor, state: LstmState, episode_start: Tensor
) -> tuple[Tensor, LstmState]:
    """`unroll_lstm`, one step at a time."""
    keep = (~episode_start).unsqueeze(2).to(inputs.device)  # [T, B, 1]
    outputs = []
    if not _has_plain_cells(lstm):
        for row, kept in zip(inputs.unbind(), keep.unbind(), strict=True):
            output, state = lstm(row[None], (state[0] * kept, state[1] * kept))
            outputs.append(output)
        return torch.cat(outputs), state
    hidden, cells = state[0].unbind(), state[1].unbind()
    for row, kept in zip(inputs.unbind(), keep.unbind(), strict=True):
        hidden, cells = _step(lstm, row, [h * kept for h in hidden], [c * kept for c in cells])
        outputs.append(hidden[-1])
    return torch.stack(outputs), (torch.stack(hidden), torch.stack(cells))


def run_one_step(lstm: nn.LSTM, inputs: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
    """What `lstm`, a stack of plain cells, answers to one timestep, [1, B, features]."""
    hidden, cells = _step(lstm, inputs[0], state[0].unbind(), state[1].unbind())
    return hidden[-1].unsqueeze(0), (torch.stack(hidden), torch.stack(cells))


def _step(
    lstm: nn.LSTM, inputs: Tensor, hidden: Sequence[Tensor], cells: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One timestep [B, features] through all layers; the states are one tensor for each."""
    states = []
    for h, c, weights in zip(hidden, cells, lstm.all_weights, strict=True):
        states.append(torch.lstm_cell(inputs, (h, c), *weights))
        inputs = states[-1][0]
    hidden, cells = zip(*states, strict=True)
    return hidden, cells


def _has_plain_cells(lstm: nn.LSTM) -> bool:
    """Whether `lstm` is a stack of cells with nothing between or behind them."""
    return not (lstm.bidirectional or lstm.proj_size or (lstm.dropout and lstm.training))
