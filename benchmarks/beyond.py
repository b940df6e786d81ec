"""Plain and coded: a convolution, an attention, a CNN on digits, a transformer on the algorithms.

python benchmarks/beyond.py          # a minute or two on one thread

Printed: parameters, processor time of a training step, and what is right on data not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl import NeurocoderConfig, inject
from ncrl.tasks.algorithms.data import NUM_INPUTS, algorithms
from ncrl.tasks.data import load_digits
from ncrl.tasks.recipes import count_parameters

CONFIG = NeurocoderConfig(num_slots=20, num_heads=4, num_least_used=0, sharpness=10)
BARE = NeurocoderConfig(num_slots=20, num_heads=4, num_least_used=0, sharpness=10, residual=False)
CODINGS = {"plain": None, "coded": CONFIG, "coded, no residual": BARE}


def cnn() -> nn.Module:
    """A classifier of images [B, 1, 16, 16]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


class Transformer(nn.Module):
    """Two causal layers, from sequences [B, T, inputs] to logits of bits [B, T, outputs]."""

    def __init__(self, longest: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(NUM_INPUTS, width)
        self.place = nn.Parameter(0.1 * torch.randn(longest, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, NUM_INPUTS - 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs] -> [B, T, outputs]."""
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = self.embed(x) + self.place[: x.shape[1]]
        logits: Tensor = self.head(self.encoder(x, mask=causal))
        return logits


def train(model: nn.Module, losses: Iterator[Tensor]) -> float:
    """Updates by Adam on losses; milliseconds of processor time for each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    begin, count = time.process_time(), 0
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count += 1
    return 1000 * (time.process_time() - begin) / count


def digits(config: NeurocoderConfig | None, updates: int = 300) -> tuple[nn.Module, float, float]:
    """The CNN, its step and per cent of test digits that are right."""
    data = load_digits(16)
    images, tests = (part / 255 - 0.5 for part in (data.train_images, data.test_images))
    model = cnn()
    if config is not None:
        inject(model, config, ["0", "3"])

    def losses() -> Iterator[Tensor]:
        for _ in range(updates):
            some = torch.randint(len(images), (128,))
            yield F.cross_entropy(model(images[some]), data.train_labels[some])

    step = train(model, losses())
    with torch.no_grad():
        right = (model(tests).argmax(1) == data.test_labels).double().mean()
    return model, step, 100 * float(right)


def sequences(
    config: NeurocoderConfig | None, updates: int = 500
) -> tuple[nn.Module, float, float]:
    """The transformer, its step and per cent of the answers' bits that are right."""
    generator = torch.Generator().manual_seed(0)
    longest = len(algorithms(2000, 1, generator).inputs)
    model = Transformer(longest)
    if config is not None:
        inject(model, config, ["*.self_attn.*_proj", "linear1", "linear2"])

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        drawn = algorithms(count, 1, generator)
        asked = (drawn.task >= 0).T  # [B, T]
        return drawn.inputs.transpose(0, 1), drawn.targets.transpose(0, 1), asked

    def losses() -> Iterator[Tensor]:
        for _ in range(updates):
            x, bits, asked = draw(64)
            yield F.binary_cross_entropy_with_logits(model(x)[asked], bits[asked])

    step = train(model, losses())
    x, bits, asked = draw(1000)
    with torch.no_grad():
        right = ((model(x)[asked] > 0) == (bits[asked] > 0.5)).double().mean()
    return model, step, 100 * float(right)


def layers() -> Iterator[tuple[str, nn.Module, float]]:
    """A convolution and an attention, plain and coded, with the step of each alone."""
    images, tokens = torch.randn(32, 64, 14, 14), torch.randn(8, 64, 128)
    builders: dict[str, Callable[[], nn.Module]] = {
        "conv": partial(nn.Conv2d, 64, 64, 3, padding=1),
        "attn": partial(nn.MultiheadAttention, 128, 4, batch_first=True),
    }
    for name, build in builders.items():
        for coding, config in CODINGS.items():
            model = nn.ModuleDict({name: build()})
            if config is not None:
                inject(model, config, "*")

            def step(model: nn.ModuleDict = model) -> Tensor:
                if "conv" in model:
                    return model["conv"](images).square().mean()
                y, _ = model["attn"](tokens, tokens, tokens, need_weights=False)
                return y.square().mean()

            yield f"{name}, {coding}", model, train(model, (step() for _ in range(20)))


Example = Callable[[NeurocoderConfig | None], tuple[nn.Module, float, float]]


def main() -> None:
    torch.set_num_threads(1)
    examples: dict[str, Example] = {"CNN, digits": digits, "transformer, algorithms": sequences}
    print_header("", "parameters", "ms a step")
    for name, model, step in layers():
        print_row(name, f"{count_parameters(model):,}", f"{step:.1f}")
    print_header("", "parameters", "ms a step", "right, %")
    for name, example in examples.items():
        for coding, config in CODINGS.items():
            torch.manual_seed(0)
            model, step, right = example(config)
            count = f"{count_parameters(model):,}"
            print_row(f"{name}, {coding}", count, f"{step:.1f}", f"{right:.1f}")


if __name__ == "__main__":
    main()
