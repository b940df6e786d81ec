"""`NeurocoderLinear`: a linear layer whose weight matrix is composed for every input.

Le & Venkatesh, "Neurocoder: General-Purpose Computation Using Stored Neural Programs", ICML 2022.
Shapes: P slots, R = J * H components; `...` stands for any leading dimensions, B for their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ncrl.neurocoder import acting
from ncrl.neurocoder.composition import CompositionNetwork, Constants
from ncrl.neurocoder.config import NeurocoderConfig, require_positive
from ncrl.neurocoder.integration import (
    Composed,
    IntegrationNetwork,
    active_program,
    mix_slots,
)
from ncrl.neurocoder.memory import ProgramMemory
from ncrl.neurocoder.node import run_layer
from ncrl.neurocoder.official import (
    OfficialIntegration,
    OfficialMemory,
    OfficialRecurrent,
    OfficialSingleStep,
    official_composition,
)
from ncrl.neurocoder.tracing import is_watched

Layer = TypeVar("Layer", bound="NeurocoderLinear")


class _Part(Protocol):
    """What memory, composition and integration have in common."""

    def reset_parameters(self) -> None: ...

    def controller_parameters(self) -> Iterator[nn.Parameter]: ...


class _Prepared(NamedTuple):
    """What the layer computes from its weights alone."""

    keys: Tensor
    """[3, P, K]."""

    constants: Constants

    rows: Tensor
    """The weights that meet x, put together: M_U, those of the controller, of the residual's gate,
    and in a loop Rho. [..., in]."""


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
        options: any field of `NeurocoderConfig`, in place of the one in `config`; each field's own
            documentation says what it is for.

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
        self.adds_bias = bias
        self.memory: ProgramMemory | OfficialMemory
        self.composition: CompositionNetwork | OfficialSingleStep | OfficialRecurrent
        self.integration: IntegrationNetwork | OfficialIntegration | None
        if self.config.preset == "official":
            self.memory = OfficialMemory(in_features, out_features, self.config)
            self.composition = official_composition(in_features, self.config)
            self.integration = OfficialIntegration(in_features, out_features, self.config)
        else:
            self.memory = ProgramMemory(in_features, out_features, self.config)
            self.composition = CompositionNetwork(in_features, self.config)
            self.integration = (
                IntegrationNetwork(in_features, out_features, self.config)
                if self.config.residual
                else None
            )
        # The authors' layer has a bias even where it does not add it.
        stored = bias or self.config.preset == "official"
        self.bias = nn.Parameter(torch.empty(out_features)) if stored else None
        self._reset_bias()
        self._acting: acting.Weights | None = None
        self._is_constant = False
        """Whether `constant_weights` holds."""
        self._is_small = (
            self.config.preset == "paper"
            and self.config.num_steps == 1
            and sum(weight.numel() for weight in self.parameters()) <= acting.SMALL
        )
        if self.config.frozen_controller:
            for part in self._parts():
                for parameter in part.controller_parameters():
                    parameter.requires_grad_(False)
        self.to(device=device, dtype=dtype)

    @classmethod
    def from_linear(
        cls: type[Layer],
        linear: nn.Linear,
        config: NeurocoderConfig | None = None,
        *,
        keep_weight: bool = False,
        **options: Any,
    ) -> Layer:
        """A layer of the widths, device and type of `linear`, with a bias where that has one.

        The bias is copied: an offset of the output means the same behind any weights. Everything
        else starts afresh, so the outputs are not those of `linear`.

        Args:
            linear: not changed.
            config: sizes and switches of the layer; `NeurocoderConfig()` if None.
            keep_weight: start the residual program from the weight of `linear`, or from its best
                approximation of rank `residual_rank`. The gate and the smallest singular value
                still scale it, and the active program is added to it.
            options: any field of `NeurocoderConfig`, in place of the one in `config`.

        Raises:
            ValueError: for `keep_weight` without a residual program, and as the constructor does.
        """
        config = replace(config or NeurocoderConfig(), **options)
        if keep_weight and not config.residual:
            raise ValueError("keep_weight=True needs a residual program, got residual=False")
        layer = cls(
            int(linear.in_features),
            int(linear.out_features),
            config,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        with torch.no_grad():
            if layer.bias is not None and linear.bias is not None:
                layer.bias.copy_(linear.bias)
            if keep_weight and layer.integration is not None:
                layer.integration.start_from(linear.weight.T)
        return layer

    def reset_parameters(self) -> None:
        """Initialise every parameter afresh from torch's global random stream."""
        for part in self._parts():
            part.reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if isinstance(self.integration, OfficialIntegration):
            assert self.bias is not None
            self.integration.reset_bias(self.bias)
        elif self.bias is not None:
            nn.init.zeros_(self.bias)

    def _parts(self) -> Iterator[_Part]:
        yield self.memory
        yield self.composition
        if self.integration is not None:
            yield self.integration

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out].

        Raises:
            ValueError: if the last dimension of x is not `in_features`.
        """
        flat = self._flatten(x)  # [B, in]
        y = self._act(flat) if self._can_act(flat) else self._compute(flat)
        return y.view(*x.shape[:-1], self.out_features)

    def prepare(self) -> Callable[[Tensor], Tensor]:
        """`forward` for a loop over time: what follows from the weights alone is computed once.

        For training, where that costs as much as the rest when inputs are few. Gradients are those
        of `forward`; hooks of the layer do not run. Call it anew after every change of the weights.

        Returns:
            A function [B, in] -> [B, out]. The layer itself, where nothing is gained: without
            gradient, for `preset="official"`, and while torch compiles or transforms the layer.
        """
        if not torch.is_grad_enabled() or self.config.preset == "official" or is_watched():
            return self
        with without_autocast(self.memory.u):
            prepared = self._prepare(with_residual=True)
        return partial(self._compute, prepared=prepared)

    def attend(self, x: Tensor) -> Attention:
        """Attention weights behind `forward(x)`, for x of shape [..., in]."""
        weights = self._compose(self._flatten(x)).weights  # [3, R, P, B]
        per_input = weights.movedim(3, 1)  # [3, B, R, P]
        return Attention(*per_input.reshape(3, *x.shape[:-1], *per_input.shape[2:]))

    def singular_values(self, x: Tensor) -> Tensor:
        """Singular values sigma_n of the active program for x [..., in]: [..., R], decreasing."""
        sigma = self._compose(self._flatten(x)).sigma  # [R, B]
        return sigma.T.reshape(*x.shape[:-1], self.config.num_components)

    def program(self, x: Tensor) -> Tensor:
        """The working program W for x [..., in]: [..., in, out]. Costly; for inspection."""
        composed = self._compose(self._flatten(x))
        program = active_program(composed, self.memory.u, self.memory.v)
        if self.integration is not None and composed.residual_scale is not None:
            program = program + composed.residual_scale[:, None, None] * self.integration.matrix()
        return program.view(*x.shape[:-1], self.in_features, self.out_features)

    def active_program(self, x: Tensor) -> Tensor:
        """`program(x)` without the residual: what the memory alone contributes."""
        program = active_program(self._compose(self._flatten(x)), self.memory.u, self.memory.v)
        return program.view(*x.shape[:-1], self.in_features, self.out_features)

    def _compose(self, flat: Tensor) -> Composed:
        """The programs for inputs [B, in].

        Always in the parameters' own precision: under autocast, half-precision attention would be
        off by percents and its usage by more.
        """
        memory = self.memory
        with without_autocast(flat):
            flat = flat.to(memory.u.dtype)
            composed: Composed = self.composition(flat, memory.keys(), memory.s, self.integration)
        return composed

    def _compute(self, flat: Tensor, prepared: _Prepared | None = None) -> Tensor:
        """The output [B, out] for x [B, in]."""
        mixture, scale, share = self._mix_slots(flat, prepared)
        y = mixture.T @ self.memory.v
        if self.integration is not None and scale is not None:
            share = self.integration(flat) if share is None else share.T  # x Rho, [B, out]
            y = y + scale.unsqueeze(1) * share
        if self.bias is not None and self.adds_bias:
            y = y + self.bias
        return y

    def _prepare(self, *, with_residual: bool = False) -> _Prepared:
        """Rho joins the other weights where many small products cost more than a copy of it."""
        composition, integration = self.composition, self.integration
        assert isinstance(composition, CompositionNetwork)
        assert not isinstance(integration, OfficialIntegration)
        rows = [self.memory.u, composition.input_weight()]
        if integration is not None:
            rows += [integration.gate.weight, *([integration.matrix().T] * with_residual)]
        return _Prepared(self.memory.keys(), composition.constants(), torch.cat(rows))

    def _mix_slots(
        self, flat: Tensor, prepared: _Prepared | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the programs for inputs [B, in] make of them: the weight of every stored v, [P, B],
        that of the residual, [B], and what is known of the residual's output already, [out, B]."""
        memory, composition, integration = self.memory, self.composition, self.integration
        if not isinstance(composition, CompositionNetwork) or is_watched():
            composed = self._compose(flat)
            return mix_slots(composed, memory.u @ flat.T), composed.residual_scale, None
        assert not isinstance(integration, OfficialIntegration)
        with without_autocast(flat):
            keys, constants, rows = prepared or self._prepare()
            x = flat.to(memory.u.dtype)
            mixture, sigma, read = run_layer(x, rows, constants, keys, memory.s, self.config)
            if integration is None:
                return mixture, None, None
            scale = integration.scale_from(read[:1], sigma)
        return mixture, scale, read[1:] if prepared else None

    def _can_act(self, flat: Tensor) -> bool:
        return not torch.is_grad_enabled() and self._is_small and acting.suits(self.memory.u, flat)

    def _act(self, flat: Tensor) -> Tensor:
        """`_compute` from weights that stay arranged for few inputs while they do not change."""
        if self._acting is None or not (
            self._is_constant or self._acting.source.is_unchanged(self)
        ):
            self._acting = acting.Weights(self)
        return self._acting.forward(flat)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles start without anything kept from call to call.
        return {**self.__dict__, "_acting": None, "_is_constant": False}

    def _flatten(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input whose last dimension is in_features={self.in_features}, "
                f"got shape {list(x.shape)}"
            )
        return x.reshape(-1, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.config}"


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Promise that no weight of `model` changes inside the block.

    A layer that acts (few inputs, no gradient) then need not look whether its weights are still
    those that it has arranged, which is a fifth of its time. Break the promise, and outputs are
    those of the old weights.
    """
    layers = [module for module in model.modules() if isinstance(module, NeurocoderLinear)]
    before = [layer._is_constant for layer in layers]
    for layer in layers:
        if not layer._is_constant:
            layer._acting, layer._is_constant = None, True
    try:
        yield
    finally:
        for layer, was_constant in zip(layers, before, strict=True):
            layer._is_constant = was_constant


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for the device of x, where it is on."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device)
        else nullcontext()
    )


def orthogonal_loss(model: nn.Module, *, squared: bool = False) -> Tensor:
    """Sum of L_o over every Neurocoder layer in `model`, a scalar; 0 where there is none.

    The caller adds it: `loss = task_loss + orth_coef * orthogonal_loss(model)` (paper, section 2.3,
    where the coefficient is a).

    Args:
        model: searched for layers at any depth.
        squared: square the norms. Their gradient then fades near the minimum, where that of the
            plain norms keeps unit length and so never lets the memory settle; on the other hand
            it is larger the more rows are wrong, so orth_coef means something else.
    """
    losses = [
        module.memory.orthogonality(squared)
        for module in model.modules()
        if isinstance(module, NeurocoderLinear)
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())
