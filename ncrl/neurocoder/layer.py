"""`NeurocoderLinear`: a linear layer whose weight matrix is composed for every input.

Le & Venkatesh, "Neurocoder: General-Purpose Computation Using Stored Neural Programs", ICML 2022.
Shapes: P slots, R = J * H components; `...` stands for any leading dimensions, B for their product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncrl.neurocoder.composition import CompositionNetwork
from ncrl.neurocoder.config import NeurocoderConfig, require_positive
from ncrl.neurocoder.integration import (
    IntegrationNetwork,
    active_program,
    apply_active_program,
    singular_values,
)
from ncrl.neurocoder.memory import ProgramMemory


class Attention(NamedTuple):
    """Attention weights over slots for every component of the program, each [..., R, P]."""

    u: Tensor
    v: Tensor
    s: Tensor


class NeurocoderLinear(nn.Module):
    """Drop-in for `nn.Linear`: y = x W + bias with a working program W composed for each x.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        config: sizes and switches of the layer; `NeurocoderConfig()` if None.
        bias: whether a bias is added.
        device: where the parameters are created.
        dtype: type of the parameters.
        options: any field of `NeurocoderConfig`, in place of the one in `config`:
            `num_slots`, `key_dim`, `num_heads`, `num_steps`, `num_least_used`, `controller_size`,
            `sharpness`, `residual`.

    Raises:
        ValueError: for an impossible size, naming the values.

    Example:
        >>> layer = NeurocoderLinear(512, 18, num_slots=80, num_heads=15, num_least_used=5)
        >>> layer(torch.zeros(20, 16, 512)).shape
        torch.Size([20, 16, 18])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: NeurocoderConfig | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        require_positive("in_features", in_features)
        require_positive("out_features", out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.config = replace(config or NeurocoderConfig(), **options)
        self.memory = ProgramMemory(in_features, out_features, self.config)
        self.composition = CompositionNetwork(in_features, self.config)
        self.integration = (
            IntegrationNetwork(in_features, out_features) if self.config.residual else None
        )
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise every parameter afresh from torch's global random stream."""
        self.memory.reset_parameters()
        self.composition.reset_parameters()
        if self.integration is not None:
            self.integration.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out].

        Raises:
            ValueError: if the last dimension of x is not `in_features`.
        """
        flat = self._flatten(x)  # [B, in]
        (weight_u, weight_v, _), sigma = self._compose(flat)
        y = apply_active_program(flat, weight_u, weight_v, sigma, self.memory.u, self.memory.v)
        if self.integration is not None:
            y = y + self.integration(flat, sigma)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def attend(self, x: Tensor) -> Attention:
        """Attention weights behind `forward(x)`, for x of shape [..., in]."""
        weights, _ = self._compose(self._flatten(x))  # [3, P, R, B]
        per_input = weights.permute(0, 3, 2, 1)  # [3, B, R, P]
        return Attention(*per_input.reshape(3, *x.shape[:-1], *per_input.shape[2:]))

    def singular_values(self, x: Tensor) -> Tensor:
        """Singular values sigma_n of the active program for x [..., in]: [..., R], decreasing."""
        _, sigma = self._compose(self._flatten(x))  # [R, B]
        return sigma.T.reshape(*x.shape[:-1], self.config.num_components)

    def program(self, x: Tensor) -> Tensor:
        """The working program W for x [..., in]: [..., in, out]. Costly; for inspection."""
        flat = self._flatten(x)
        (weight_u, weight_v, _), sigma = self._compose(flat)
        program = active_program(weight_u, weight_v, sigma, self.memory.u, self.memory.v)
        if self.integration is not None:
            scale = self.integration.scale(flat, sigma)  # [B, 1]
            program = program + scale.unsqueeze(2) * self.integration.residual
        return program.view(*x.shape[:-1], self.in_features, self.out_features)

    def _compose(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights [3, P, R, B] and singular values [R, B] for inputs [B, in].

        Always in the parameters' own precision: under autocast, half-precision attention would be
        off by percents and its usage by more.
        """
        with torch.autocast(flat.device.type, enabled=False):
            weights = self.composition(flat.to(self.memory.u.dtype), self.memory.keys())
            return weights, singular_values(weights[2], self.memory.s)

    def _flatten(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input whose last dimension is in_features={self.in_features}, "
                f"got shape {list(x.shape)}"
            )
        return x.reshape(-1, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.config}"


def orthogonal_loss(model: nn.Module) -> Tensor:
    """Sum of L_o over every Neurocoder layer in `model`, a scalar; 0 where there is none.

    The caller adds it: `loss = task_loss + orth_coef * orthogonal_loss(model)` (paper, section 2.3,
    where the coefficient is a).
    """
    losses = [m.memory.orthogonality() for m in model.modules() if isinstance(m, NeurocoderLinear)]
    return torch.stack(losses).sum() if losses else torch.zeros(())
