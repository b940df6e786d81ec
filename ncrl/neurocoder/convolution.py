"""`NeurocoderConv2d`: a convolution whose kernel is composed for every image.

A convolution is a linear layer for patches: [patch] = in_channels / groups * height * width of the
kernel. Its program is composed from a description of the whole image and applied to all patches.
Others that mix kernels for each input mix whole ones: CondConv (Yang et al. 2019), dynamic
convolution (Chen et al. 2020), ODConv (Li et al. 2022).

Shapes: B images, C channels, G groups, N output positions; P slots, R components.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.integration import read_memory, sum_components
from ncrl.neurocoder.layer import NeurocoderLinear

Size = int | tuple[int, int]

Conv = TypeVar("Conv", bound="NeurocoderConv2d")

SEAT = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode"),
)
"""What `nn.Conv2d` keeps of its arguments."""


class NeurocoderConv2d(NeurocoderLinear):
    """Drop-in for `nn.Conv2d` with a kernel composed for each image.

    The slots' u are filters and their v weights of the output channels, so a component is a filter
    of rank one: one filter, and how much of it each output channel gets. All images meet the same P
    filters in one convolution; attention mixes what comes out. No image gets a kernel of its own.

    What takes an input of `NeurocoderLinear` (`attend`, `singular_values`, `program`) takes
    `description(x)` here.

    Args:
        in_channels: and all further arguments up to `dtype`: as for `nn.Conv2d`.
        config: sizes and switches; `NeurocoderConfig()` if None.
        options: any field of `NeurocoderConfig`, in place of the one in `config`.

    Raises:
        ValueError: for an impossible size, naming the values.

    Example:
        >>> layer = NeurocoderConv2d(3, 16, 3, padding=1, num_slots=20, sharpness=10)
        >>> layer(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: NeurocoderConfig | None = None,
        **options: Any,
    ) -> None:
        seat = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        # Made to check the arguments, and to turn single numbers into pairs.
        plain = nn.Conv2d(*seat, padding_mode=padding_mode, device="meta")
        super().__init__(
            plain.weight[0].numel(),
            out_channels,
            config,
            bias=bias,
            context_features=in_channels,
            device=device,
            dtype=dtype,
            **options,
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = plain.kernel_size, plain.stride
        self.padding, self.dilation, self.padding_mode = plain.padding, plain.dilation, padding_mode

    @classmethod
    def from_conv2d(
        cls: type[Conv],
        conv: nn.Conv2d,
        config: NeurocoderConfig | None = None,
        *,
        keep_weight: bool = False,
        **options: Any,
    ) -> Conv:
        """A layer in the sizes of `conv`, as `from_linear` makes one in those of a linear layer."""
        seat: dict[str, Any] = {name: getattr(conv, name) for name in SEAT}
        place: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        layer = cls(**seat, bias=conv.bias is not None, **place, config=config, **options)
        layer._take_over(conv, keep_weight)
        return layer

    def description(self, x: Tensor) -> Tensor:
        """What programs are composed from, the means of the channels: [..., C, height, width] ->
        [..., C]."""
        return x.mean((-2, -1))

    def kernel(self, x: Tensor) -> Tensor:
        """The weight that `nn.Conv2d` would need for each of images [B, C, height, width]:
        [B, out_channels, C / G, *kernel_size]. Costly; for inspection."""
        return self._as_kernels(self.program(self.description(x)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, C, height, width] or [C, height, width] -> as `nn.Conv2d`.

        Args:
            x: images.
            context: [B, C] or [C], in place of `description(x)`.

        Raises:
            ValueError: for other shapes.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected images with in_channels={self.in_channels}, got shape {list(x.shape)}"
            )
        if context is not None:
            self._check_leading(context, x.shape[:-3])
        if x.dim() == 3:
            y: Tensor = self(x[None], None if context is None else context[None])
            return y[0]
        composed = self._compose(self.description(x) if context is None else context)
        weight_u, weight_v, _ = composed.attention
        channels = self.in_channels // self.groups
        in_groups = x.reshape(x.shape[0] * self.groups, channels, *x.shape[2:])
        filters = self._as_kernels(self.memory.stored("u").T)  # [P, C / G, *kernel_size]
        maps = self._convolve(in_groups, filters, 1)  # [B * G, P, ...]
        size, maps = maps.shape[2:], maps.flatten(2)
        maps = maps.view(x.shape[0], self.groups, *maps.shape[1:])  # [B, G, P, N]
        read = read_memory(weight_u.unsqueeze(1), maps)  # [B, G, R, N]
        write = read_memory(weight_v, self.memory.stored("v"))  # [B, R, out]
        per_group = self.out_channels // self.groups
        write = write.view(*write.shape[:2], self.groups, per_group)
        write = write.transpose(1, 2)  # [B, G, R, out / G]
        y = sum_components(composed.sigma.unsqueeze(1), write, read)  # [B, G, out / G, N]
        y = y.view(x.shape[0], self.out_channels, *size)
        y = self._add_residual(
            y, composed, lambda rho: self._convolve(x, self._as_kernels(rho.matrix()), self.groups)
        )
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)[:, None, None]
        # Images in channels last stay so, by operations that vmap knows.
        is_last = x.stride(1) == 1 and not x.is_contiguous()
        return y.movedim(1, -1).contiguous().movedim(-1, 1) if is_last else y

    def _as_kernels(self, matrices: Tensor) -> Tensor:
        """[..., patch, channels] -> [..., channels, C / G, *kernel_size]."""
        channels = self.in_channels // self.groups
        rows = matrices.transpose(-1, -2)  # not mT, which the older ONNX exporter does not know
        return rows.reshape(*rows.shape[:-1], channels, *self.kernel_size)

    def _convolve(self, x: Tensor, kernels: Tensor, groups: int) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            if isinstance(padding, str):
                spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
                spans = [0, 0] if padding == "valid" else spans
                sides = [(span // 2, span - span // 2) for span in spans]
            else:
                sides = [(span, span) for span in padding]
            x = F.pad(x, [*sides[1], *sides[0]], mode=self.padding_mode)
            padding = 0
        return F.conv2d(x, kernels, None, self.stride, padding, self.dilation, groups)

    def extra_repr(self) -> str:
        seat = ", ".join(f"{name}={getattr(self, name)!r}" for name in SEAT)
        return f"{seat}, {self.config}"
