"""ResNet-18, and a coded classifier on top of a frozen one. B stands for images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.layers import make_layer
from ncrl.seat import require_positive
from ncrl.tasks.models.mlp import SplitMlp


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., CVPR 2016, figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
            if stride != 1 or in_channels != channels
            else None
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[B, in_channels, s, s] -> [B, channels, s / stride, s / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        residual = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(residual)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., CVPR 2016) with the parameter names of torchvision's.

    Its published ImageNet weights therefore load with `load_state_dict`. torchvision itself is not
    needed.

    Args:
        num_outputs: width of the last layer `fc`; 1000 for ImageNet.
        width: channels w of the first stage, doubled by each of the three that follow.
        layer: name in `ncrl.layers.LAYERS`, of `fc`.
        layer_options: its options.

    Shapes: [B, 3, height, width] -> [B, num_outputs]; made for 224x224, any size of 32 and more.

    Raises:
        ValueError: for an impossible size or an unknown layer.
    """

    IMAGENET_CLASSES = 1000

    STAGE_WIDTHS = 15
    """Channels of all four stages together, in widths: 1 + 2 + 4 + 8."""

    def __init__(
        self,
        num_outputs: int = IMAGENET_CLASSES,
        *,
        width: int = 64,
        layer: str = "linear",
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_positive("num_outputs", num_outputs)
        require_positive("width", width)
        self.num_outputs, self.width = num_outputs, width
        w = width
        self.conv1 = nn.Conv2d(3, w, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(BasicBlock(w, w, 1), BasicBlock(w, w, 1))
        self.layer2 = nn.Sequential(BasicBlock(w, 2 * w, 2), BasicBlock(2 * w, 2 * w, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * w, 4 * w, 2), BasicBlock(4 * w, 4 * w, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * w, 8 * w, 2), BasicBlock(8 * w, 8 * w, 1))
        self.fc = make_layer(layer, 8 * w, num_outputs, **dict(layer_options or {}))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, num_outputs]."""
        outputs: Tensor = self.fc(self._stages(images)[-1].mean(dim=(2, 3)))
        return outputs

    def pooled(self, images: Tensor) -> Tensor:
        """The means of all four stages' maps, side by side: [B, 3, height, width] -> [B, 15 w]."""
        return torch.cat([maps.mean(dim=(2, 3)) for maps in self._stages(images)], dim=1)

    def _stages(self, images: Tensor) -> list[Tensor]:
        """What the stages put out, from [B, w, height / 4, width / 4] to [B, 8 w, height / 32,
        width / 32]."""
        maps = F.relu(self.bn1(self.conv1(images)))  # [B, w, height / 2, width / 2]
        maps = F.max_pool2d(maps, 3, stride=2, padding=1)  # [B, w, height / 4, width / 4]
        outputs = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = stage(maps)
            outputs.append(maps)
        return outputs


class FrozenResNetMlp(nn.Module):
    """A coded classifier that reads the 1000 outputs of a frozen ResNet-18 (paper, section 4.4).

    The backbone is neither trained nor switched to training mode, so that its outputs can be
    computed once for a whole data set and given to `classify`. It starts with random weights: load
    ImageNet's into `backbone`.

    Args:
        num_outputs: classes of a task.
        hidden: widths of the hidden layers.
        num_tasks: heads; 1 if all tasks share one.
        hidden_rank: see `SplitMlp`.
        layer: name in `ncrl.layers.LAYERS`, of all layers behind the backbone.
        layer_options: its options.

    Shapes: [B, 3, height, width] -> [B, num_outputs].

    Raises:
        ValueError: for an impossible size or an unknown layer.
    """

    def __init__(
        self,
        num_outputs: int = 2,
        *,
        hidden: Sequence[int] = (500, 500, 500),
        num_tasks: int = 1,
        hidden_rank: int | None = None,
        layer: str = "linear",
        layer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = ResNet18().requires_grad_(False).eval()
        self.classify = SplitMlp(
            self.backbone.num_outputs,
            hidden,
            num_outputs,
            num_tasks=num_tasks,
            hidden_rank=hidden_rank,
            layer=layer,
            layer_options=layer_options,
        )

    def train(self, mode: bool = True) -> FrozenResNetMlp:
        """Training mode for the classifier alone: a frozen batch norm keeps its statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, 1000], what `classify` reads."""
        outputs: Tensor = self.backbone(images)
        return outputs

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        """[B, 3, height, width] -> logits [B, num_outputs] of the head of one task."""
        logits: Tensor = self.classify(self.features(images), task)
        return logits
