"""ResNet-18, and a coded classifier on top of a frozen one. B stands for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.tasks.models.mlp import PLAIN, Coded, SplitMlp

CLASSIFIER_WIDTHS = (500, 500, 500)
"""Widths of the classifier behind the backbone (paper, section 4.4)."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., CVPR 2016, figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, in_channels, s, s] -> [B, channels, s / stride, s / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        residual = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(residual)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., CVPR 2016) with the parameter names of torchvision's, whose published
    ImageNet weights therefore load.

    Args:
        num_outputs: width of the last layer `fc`; 1000 for ImageNet.
        width: channels w of the first stage, doubled by each of the three that follow.
        coded: kind of `fc`.
    """

    IMAGENET_CLASSES = 1000

    STAGE_WIDTHS = 15  # channels of all four stages together, in widths: 1 + 2 + 4 + 8

    def __init__(
        self, num_outputs: int = IMAGENET_CLASSES, *, width: int = 64, coded: Coded = PLAIN
    ) -> None:
        super().__init__()
        self.num_outputs, self.width = num_outputs, width
        w = width
        self.conv1 = nn.Conv2d(3, w, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(BasicBlock(w, w), BasicBlock(w, w))
        self.layer2 = nn.Sequential(BasicBlock(w, 2 * w, 2), BasicBlock(2 * w, 2 * w))
        self.layer3 = nn.Sequential(BasicBlock(2 * w, 4 * w, 2), BasicBlock(4 * w, 4 * w))
        self.layer4 = nn.Sequential(BasicBlock(4 * w, 8 * w, 2), BasicBlock(8 * w, 8 * w))
        self.fc = coded(8 * w, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] of 32 and more -> [B, num_outputs]."""
        outputs: Tensor = self.fc(self._stages(images)[-1].mean(dim=(2, 3)))
        return outputs

    def pooled(self, images: Tensor) -> Tensor:
        """The means of all four stages' maps, side by side: [B, 3, height, width] -> [B, 15 w]."""
        return torch.cat([maps.mean(dim=(2, 3)) for maps in self._stages(images)], dim=1)

    def _stages(self, images: Tensor) -> list[Tensor]:
        """What the stages put out, from [B, w, height / 4, width / 4] to a 32nd."""
        maps = F.relu(self.bn1(self.conv1(images)))  # [B, w, height / 2, width / 2]
        maps = F.max_pool2d(maps, 3, stride=2, padding=1)
        outputs = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = stage(maps)
            outputs.append(maps)
        return outputs


def resnet_mlp(
    num_outputs: int = 2,
    *,
    hidden: Sequence[int] = CLASSIFIER_WIDTHS,
    num_tasks: int = 1,
    hidden_rank: int | None = None,
    context: bool = False,
    coded: Coded = PLAIN,
) -> nn.Module:
    """The parts of split CIFAR's network, to be counted: a ResNet-18, and the `SplitMlp` that reads
    its 1000 outputs (paper, section 4.4). The command trains the second on features of the first.
    """
    backbone = ResNet18()
    options: Any = {"num_tasks": num_tasks, "hidden_rank": hidden_rank, "context": context}
    classify = SplitMlp(backbone.num_outputs, hidden, num_outputs, coded=coded, **options)
    return nn.ModuleDict({"backbone": backbone, "classify": classify})
