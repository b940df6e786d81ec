"""Convolutional networks for 32x32 images: LeNet and DenseNet. B stands for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.tasks.models.mlp import PLAIN, Coded, Mlp

DEEPEST = 1000  # layers of a `DenseNet`


class LeNet(nn.Module):
    """Two convolutions and four dense layers (paper, section 4.2; LeCun et al. 1998).

    20 and 50 maps of 5x5 with padding 2, each followed by ReLU and 2x2 max-pooling, then
    3200-500-500-500-classes: the form whose parameter count is the one in the paper's Table 9.
    """

    def __init__(
        self, num_outputs: int = 10, *, num_coded: int | None = 1, coded: Coded = PLAIN
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 5, padding=2)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=2)
        hidden = [500, 500, 500]
        self.classifier = Mlp(50 * 8 * 8, hidden, num_outputs, num_coded=num_coded, coded=coded)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> logits [B, num_outputs]."""
        maps = F.max_pool2d(F.relu(self.conv1(images)), 2)  # [B, 20, 16, 16]
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)  # [B, 50, 8, 8]
        logits: Tensor = self.classifier(maps)
        return logits


class DenseLayer(nn.Module):
    """BN, ReLU and a 3x3 convolution to `growth` maps, which are added to the channels."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, channels, s, s] -> [B, channels + growth, s, s]."""
        return torch.cat([maps, self.conv(F.relu(self.norm(maps)))], dim=1)


class Transition(nn.Module):
    """BN, ReLU, a 1x1 convolution that keeps the number of channels, and 2x2 mean-pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, channels, s, s] -> [B, channels, s / 2, s / 2]."""
        return F.avg_pool2d(self.conv(F.relu(self.norm(maps))), 2)


class DenseNet(nn.Module):
    """DenseNet without bottlenecks or compression (Huang et al., CVPR 2017; paper, section 4.2).

    Three blocks of (depth - 4) / 3 layers, each of which adds `growth` maps, between an initial
    convolution to 16 maps and the coded output layer, which reads 1168 features as in the paper.
    """

    def __init__(
        self, num_outputs: int = 10, *, depth: int = 100, growth: int = 12, coded: Coded = PLAIN
    ) -> None:
        super().__init__()
        if not 7 <= depth <= DEEPEST or (depth - 4) % 3:
            raise ValueError(f"depth must be 7, 10, 13, ... up to {DEEPEST}, got {depth}")
        channels = 16
        stages: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                stages.append(Transition(channels))
            for _ in range((depth - 4) // 3):
                stages.append(DenseLayer(channels, growth))
                channels += growth
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):  # as in the authors' Torch code
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.output = coded(channels, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> logits [B, num_outputs]."""
        maps = F.relu(self.norm(self.stages(images)))  # [B, channels, 8, 8]
        logits: Tensor = self.output(maps.mean(dim=(2, 3)))
        return logits
