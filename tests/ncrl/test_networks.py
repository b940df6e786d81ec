"""`ncrl.networks`: the LSTM over whole rollouts against a loop, and the encoders' sizes."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.utils import prune

from ncrl.networks import (
    CONTRAST_FLOOR,
    ENCODERS,
    AtariEncoder,
    MeanImage,
    static_unroll,
    unroll_lstm,
)
from tests.reference import lstm_over_time_reference

SIZES = [(1, 1, 1), (1, 5, 2), (2, 3, 1), (7, 1, 1), (9, 4, 1), (6, 3, 3)]  # T, B, L
INPUTS, HIDDEN = 3, 4


def images(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def slow_unroll(
    lstm: nn.LSTM, inputs: Tensor, state: tuple[Tensor, Tensor], episode_start: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Layer after layer, row after row, environment after environment."""
    last_hidden, last_cell = [], []
    for layer in range(lstm.num_layers):
        suffix = f"_l{layer}"
        weights = {
            name.removesuffix(suffix): value
            for name, value in lstm.named_parameters()
            if name.endswith(suffix)
        }
        inputs, hidden, cell = lstm_over_time_reference(
            weights, inputs, episode_start, state[0][layer], state[1][layer]
        )
        last_hidden.append(hidden)
        last_cell.append(cell)
    return inputs, (torch.stack(last_hidden), torch.stack(last_cell))


def random_starts(num_times: int, batch: int, share: float, generator: torch.Generator) -> Tensor:
    return torch.rand(num_times, batch, generator=generator) < share


def unroll_by_steps(*arguments: Any) -> Any:
    with static_unroll():
        return unroll_lstm(*arguments)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("unroll_quickly", [unroll_lstm, unroll_by_steps])
def test_unroll_equals_the_loop_in_values_and_gradients(
    size: tuple[int, int, int], share: float, unroll_quickly: Callable
) -> None:
    num_times, batch, layers = size
    torch.manual_seed(num_times + 10 * batch)
    generator = torch.Generator().manual_seed(7)
    lstm = nn.LSTM(INPUTS, HIDDEN, layers).double()
    starts = random_starts(num_times, batch, share, generator)
    direction = torch.randn(num_times, batch, HIDDEN, dtype=torch.float64)
    results = []
    for unroll in (unroll_quickly, slow_unroll):
        torch.manual_seed(1)
        inputs = torch.randn(num_times, batch, INPUTS, dtype=torch.float64, requires_grad=True)
        state = tuple(
            torch.randn(layers, batch, HIDDEN, dtype=torch.float64, requires_grad=True)
            for _ in range(2)
        )
        outputs, last = unroll(lstm, inputs, state, starts)
        loss = (outputs * direction).sum() + last[0].sin().sum() + last[1].cos().sum()
        gradients = torch.autograd.grad(loss, [inputs, *state, *lstm.parameters()])
        results.append([outputs, *last, *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_times", [1, 6])
@pytest.mark.parametrize("options", [{"proj_size": 2}, {"dropout": 0.5, "num_layers": 2}])
def test_lstms_that_are_more_than_cells_unroll_by_steps(options: dict, num_times: int) -> None:
    lstm = nn.LSTM(INPUTS, HIDDEN, **options).double().eval()
    torch.manual_seed(0)
    inputs = torch.randn(num_times, 3, INPUTS, dtype=torch.float64)
    width = lstm.proj_size or HIDDEN
    state = tuple(torch.randn(lstm.num_layers, 3, n, dtype=torch.float64) for n in (width, HIDDEN))
    starts = random_starts(num_times, 3, 0.3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        unroll_by_steps(lstm, inputs, state, starts), unroll_lstm(lstm, inputs, state, starts)
    )
    lstm.train()
    for unroll in (unroll_by_steps, unroll_lstm):
        outputs = [unroll(lstm, inputs, state, starts)[0] for _ in range(2)]
        assert torch.equal(*outputs) == (not lstm.dropout), "dropout is drawn anew"


def test_the_lstm_is_called_once_per_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward: Callable = nn.LSTM.forward

    def counted(self: nn.LSTM, inputs: Tensor, state: tuple[Tensor, Tensor]) -> object:
        lengths.append(len(inputs))
        return forward(self, inputs, state)

    monkeypatch.setattr(nn.LSTM, "forward", counted)
    starts = torch.zeros(10, 3, dtype=torch.bool)
    starts[0, 1] = starts[4, 0] = starts[4, 2] = starts[7, 1] = True
    zero = (torch.zeros(1, 3, HIDDEN), torch.zeros(1, 3, HIDDEN))
    unroll_lstm(nn.LSTM(INPUTS, HIDDEN), torch.zeros(10, 3, INPUTS), zero, starts)
    assert lengths == [4, 3, 3]


class Doubled(nn.LSTM):
    def forward(self, inputs: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        outputs, state = super().forward(inputs, state)
        return 2 * outputs, state


@pytest.mark.parametrize("kind", ["hooked", "subclass", "pruned"])
def test_a_single_timestep_meets_all_that_is_done_to_an_lstm(kind: str) -> None:
    """Though on the CPU the cells of a plain one are called past the module."""
    torch.manual_seed(0)
    lstm = (Doubled if kind == "subclass" else nn.LSTM)(INPUTS, HIDDEN)
    if kind == "hooked":
        lstm.register_forward_hook(lambda _, __, found: (2 * found[0], found[1]))
    if kind == "pruned":
        prune.l1_unstructured(lstm, "weight_ih_l0", 0.5)
        with torch.no_grad():
            lstm.weight_ih_l0_orig.add_(1)  # as an optimiser's step would
    inputs, zero = torch.randn(1, 3, INPUTS), (torch.zeros(1, 3, HIDDEN),) * 2
    starts = torch.zeros(1, 3, dtype=torch.bool)
    for unroll in (unroll_lstm, unroll_by_steps):
        found, _ = unroll(lstm, inputs, zero, starts)
        torch.testing.assert_close(found, lstm(inputs, zero)[0])


@pytest.mark.parametrize(
    ("encoder", "shape", "width"),
    [
        ("a3c", (4, 84, 84), 256),
        ("nature", (4, 84, 84), 512),
        ("paper", (1, 80, 80), 1024),
        ("paper", (4, 84, 84), 1024),
    ],
)
def test_width_of_the_features(encoder: str, shape: tuple[int, ...], width: int) -> None:
    network = AtariEncoder(images(*shape), encoder)
    assert network.features_dim == width
    assert network(torch.rand(3, *shape)).shape == (3, width)
    assert not any(isinstance(p, nn.UninitializedParameter) for p in network.parameters())


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return (inputs * kernel * kernel + 1) * outputs


@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        ("a3c", conv(4, 16, 8) + conv(16, 32, 4) + (32 * 9 * 9 + 1) * 256),
        ("nature", conv(4, 32, 8) + conv(32, 64, 4) + conv(64, 64, 3) + (64 * 7 * 7 + 1) * 512),
        ("paper", conv(4, 32, 5) + conv(32, 32, 5) + conv(32, 64, 4) + conv(64, 64, 3)),
    ],
)
def test_parameters_of_the_encoders(encoder: str, count: int) -> None:
    network = AtariEncoder(images(4, 84, 84), encoder)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_images_that_are_too_small_are_refused(encoder: str) -> None:
    with pytest.raises(ValueError, match=rf"\(1, 8, 8\).*{encoder}"):
        AtariEncoder(images(1, 8, 8), encoder)


def test_an_unknown_encoder_offers_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'natur'.*nearest: nature"):
        AtariEncoder(images(4, 84, 84), "natur")
    with pytest.raises(ValueError, match="a3c, nature, paper"):
        AtariEncoder(images(4, 84, 84), "zzz")


@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_the_size_of_features_does_not_reach_the_lstm(encoder_name: str) -> None:
    """Images and features are standardised: mean 0 and variance 1, however they grow."""
    torch.manual_seed(0)
    encoder = AtariEncoder(images(1, 84, 84), encoder_name)
    frames = torch.rand(3, 1, 84, 84)
    with torch.no_grad():
        standard = torch.stack([(frame - frame.mean()) / frame.std() for frame in frames])
        raw = encoder.network(standard)
        spread = (raw.var(1, correction=0, keepdim=True) + CONTRAST_FLOOR).sqrt()
        expected = (raw - raw.mean(1, keepdim=True)) / spread
        features = encoder(frames)
        for name, parameter in encoder.named_parameters():
            parameter.mul_(10 if name.endswith("weight") else 0)
        large = encoder(frames)
        for parameter in encoder.parameters():
            parameter.mul_(10)
        larger = encoder(5 * frames + 1)
        empty = encoder(torch.zeros(1, 1, 84, 84))
    torch.testing.assert_close(features, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(larger, large, rtol=0, atol=0.01)
    assert (empty == 0).all()


def test_the_mean_image_is_that_of_all_images_shown() -> None:
    batches = [torch.rand(size, 2, 3, 4) for size in (5, 1, 8)]
    background = MeanImage((2, 3, 4))
    background.add(torch.full((2, 3, 4), torch.nan), 0)  # no image has no mean
    assert torch.equal(background(batches[0]), batches[0])  # nothing to subtract before the first
    for batch in batches:
        background.watch(batch)
    everything = torch.cat(batches)
    assert background.num_images == 14
    torch.testing.assert_close(background.mean, everything.mean(0))
    torch.testing.assert_close(background(everything), everything - everything.mean(0))


@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_what_never_changes_in_a_picture_does_not_reach_the_features(encoder_name: str) -> None:
    encoder = AtariEncoder(images(1, 84, 84), encoder_name)
    other = copy.deepcopy(encoder)
    frames = 0.5 * torch.rand(6, 1, 84, 84)
    scenery = 0.5 * torch.rand(1, 84, 84)
    encoder.background.watch(frames)
    other.background.watch(frames + scenery)
    with torch.no_grad():
        features, with_scenery = encoder(frames), other(frames + scenery)
    torch.testing.assert_close(with_scenery, features, rtol=0, atol=1e-3)


def test_a_dot_before_bright_bricks_is_seen() -> None:
    """Where it is makes up a large part of the features, as on Breakout it has to."""
    torch.manual_seed(0)
    encoder = AtariEncoder(images(1, 84, 84))
    frames = torch.zeros(40, 1, 84, 84)
    frames[:, :, 20:35] = 0.6
    for frame, (row, column) in zip(frames, torch.randint(40, 84, (40, 2)).tolist(), strict=True):
        frame[0, row, column] = 0.4
    with torch.no_grad():
        assert variation(encoder.network(frames)) < 0.05  # the test would show it otherwise
        encoder.background.watch(frames)
        assert variation(encoder(frames)) > 0.3


def variation(features: Tensor) -> float:
    """How much features [B, width] differ from their mean, beside their size."""
    return float((features - features.mean(0)).norm() / features.norm())


def test_encoders_leave_images_and_features_alone_on_request() -> None:
    encoder = AtariEncoder(images(1, 84, 84), standardize=False)
    frames = torch.rand(3, 1, 84, 84)
    assert encoder.background is None
    assert torch.equal(encoder(frames), encoder.network(frames))
