"""`NeurocoderLinear`: a linear layer whose weight matrix is composed for every input.

Le & Venkatesh, "Neurocoder: General-Purpose Computation Using Stored Neural Programs", ICML 2022.
Shapes: P slots, R = J * H components; `...` stands for any leading dimensions, B for their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ncrl.checks import whole_number
from ncrl.neurocoder.composition import Composition, CompositionNetwork, ProjectionNetwork
from ncrl.neurocoder.config import NeurocoderConfig, configured
from ncrl.neurocoder.integration import (
    Attention,
    Composed,
    IntegrationNetwork,
    active_program,
    mix_slots,
)
from ncrl.neurocoder.memory import ProgramMemory
from ncrl.seat import LinearSeat, flatten, total, without_autocast

Layer = TypeVar("Layer", bound="NeurocoderLinear")


class NeurocoderLinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = x W + bias with a working program W composed for each x.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        config: sizes and switches of the layer; `NeurocoderConfig()` if None.
        bias: whether a bias is added.
        device: where the parameters are created.
        dtype: type of the parameters.
        context_features: width of the context from which programs are composed, where that is
            another tensor than the input: `layer(x, context)`. None: from the input.
        options: any field of `NeurocoderConfig`, in place of the one in `config`; each field's own
            documentation says what it is for.

    Raises:
        ValueError: for an impossible size, naming the values.

    Example:
        >>> layer = NeurocoderLinear(512, 18, num_slots=80, num_heads=15, num_least_used=5)
        >>> layer(torch.zeros(20, 16, 512)).shape
        torch.Size([20, 16, 18])
    """

    PRESET: ClassVar[str] = "paper"
    """The only `config.preset` whose equations this class has."""

    memory: ProgramMemory
    composition: Composition
    integration: IntegrationNetwork | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: NeurocoderConfig | None = None,
        *,
        bias: bool = True,
        context_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype)
        if context_features is not None:
            whole_number("context_features", context_features)
        self.context_features = context_features
        self.config = configured(config, self.PRESET, options)
        if self.config.preset != self.PRESET:
            raise ValueError(
                f"{type(self).__name__} is the layer of preset={self.PRESET!r}, got preset="
                f"{self.config.preset!r}; ncrl.layers.make_layer('neurocoder', ...) makes linear "
                "layers of either, and convolutions have the paper's alone"
            )
        self.adds_bias = bias
        self._build()
        self._reset_bias()
        if self.config.frozen_controller:
            for network in self._controller():
                network.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_freeze_as_stored)  # type: ignore[no-untyped-call]
        if device is not None or dtype is not None:  # fake tensors could not be exchanged
            self.to(device=device, dtype=dtype)

    def _build(self) -> None:
        """Create memory, composition, integration and bias."""
        sizes = self.in_features, self.out_features
        source_features = self.context_features or self.in_features
        self.memory = ProgramMemory(*sizes, self.config)
        projects = self.config.controller == "projection"
        composition = ProjectionNetwork if projects else CompositionNetwork
        self.composition = composition(source_features, self.config)
        self.integration = None
        if self.config.residual:
            gate_features = source_features if self.config.residual_gate else None
            self.integration = IntegrationNetwork(*sizes, self.config, gate_features)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if self.adds_bias else None

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
                approximation of rank `residual_rank`. What scales it still does (see
                `NeurocoderConfig.residual_gate`), and the active program is added to it.
            options: any field of `NeurocoderConfig`, in place of the one in `config`.

        Raises:
            ValueError: for `keep_weight` without a residual program, and as the constructor does.
        """
        layer = cls(
            int(linear.in_features),
            int(linear.out_features),
            configured(config, cls.PRESET, options),
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer._take_over(linear, keep_weight)
        return layer

    @torch.no_grad()
    def _take_over(self, plain: nn.Linear | nn.Conv2d, keep_weight: bool) -> None:
        """Start from the bias, and if wanted from the weight, of a layer of the same sizes."""
        if self.bias is not None and plain.bias is not None:
            self.bias.copy_(plain.bias)
        if keep_weight:
            if self.integration is None or not self.config.residual:
                raise ValueError("keep_weight=True needs a residual program, got residual=False")
            self.integration.start_from(plain.weight.flatten(1).T)

    def reset_parameters(self) -> None:
        """Initialise every parameter afresh from torch's global random stream."""
        self.memory.reset_parameters()
        self.composition.reset_parameters()
        if self.integration is not None:
            self.integration.reset_parameters()
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _controller(self) -> Iterator[nn.Module]:
        """What decides about attention: composition network, key networks and residual gate."""
        yield self.composition
        yield from (part for part in self.memory.children() if isinstance(part, nn.Linear))
        if self.integration is not None and self.integration.gate is not None:
            yield self.integration.gate

    def freeze_slots(self, optimizer: Optimizer | None = None) -> None:
        """Freeze the values and keys of all present slots: no training changes them any more.

        Their rows move from the parameters `memory.u`, ... to the buffers `memory.frozen_u`, ...,
        which no optimiser can change, and their keys to `memory.frozen_keys`. Attention runs over
        them as before, and outputs do not change. A layer with as many slots loads the state_dict.
        Composition network, residual program and bias are still trained: see
        `config.frozen_controller`.

        Args:
            optimizer: that trains the layer; it goes on with the parameters as they are then. What
                else knows the old ones has to be built anew: an optimiser that is not given here,
                and `DistributedDataParallel`, which would exchange no gradients of new ones. So has
                `LBFGS` after its first step, as it keeps one vector for all parameters. `Adafactor`
                takes no parameter without numbers: `grow` before its next step.

        Raises:
            ValueError: for the preset `official`.
        """
        self._growing_memory().freeze(self.config.num_slots, optimizer)

    def grow(self, num_slots: int, optimizer: Optimizer | None = None) -> None:
        """Add slots, initialised as those of a new layer.

        New rows of M_U and M_V start at right angles to all old ones, as long as there is room:
        `orthogonal_loss` keeps them so. Outputs change, as new slots take part in attention.

        Args:
            num_slots: to add; `config.num_slots` counts all.
            optimizer: as for `freeze_slots`. What it keeps for old rows stays, and is zero for new.

        Raises:
            ValueError: for the preset `official`.

        Example:
            >>> layer = NeurocoderLinear(8, 4, num_slots=10)
            >>> optimizer = torch.optim.Adam(layer.parameters())
            >>> layer.freeze_slots(optimizer)
            >>> layer.grow(5, optimizer)
            >>> layer.memory.stored("u").shape
            torch.Size([15, 8])
        """
        whole_number("num_slots", num_slots)
        self._growing_memory().grow(num_slots, optimizer)
        self.composition.grow(num_slots, optimizer)
        self.config = replace(self.config, num_slots=self.config.num_slots + num_slots)
        self.memory.config = self.composition.config = self.config

    def _growing_memory(self) -> ProgramMemory:
        """The memory, where its slots can be frozen and grow; else ValueError."""
        return self.memory

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out].

        Args:
            x: [..., in].
            context: [..., context_features], given exactly if the layer has `context_features`: one
                for each input, in the same leading dimensions.

        Raises:
            ValueError: for other shapes, or a context too many or missing.
        """
        if (context is None) != (self.context_features is None):
            raise ValueError(
                f"this layer has context_features={self.context_features}, got "
                f"{'no' if context is None else 'a'} context"
            )
        flat = self._flatten(x)
        if context is not None:
            self._check_leading(context, x.shape[:-1])
        composed = self._compose(flat) if context is None else self._compose(context, flat)
        # Only these products, which are as wide as those of nn.Linear, are subject to autocast.
        y = mix_slots(composed) @ self.memory.stored("v")
        y = self._add_residual(y, composed, lambda rho: rho(flat))
        if self.bias is not None and self.adds_bias:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _check_leading(self, context: Tensor, leading: torch.Size) -> None:
        """Raise ValueError unless the context has the leading dimensions of the inputs: as many in
        another order would give every input the program of another one."""
        if context.shape[:-1] != leading:
            raise ValueError(
                f"{leading.numel()} inputs need as many contexts, got "
                f"{context.shape[:-1].numel()}: every input has its own, so that contexts have "
                f"shape {[*leading, self.context_features]}, got {list(context.shape)}"
            )

    def attend(self, x: Tensor) -> Attention:
        """Attention weights behind `forward(x)`, for x of shape [..., in].

        In a layer with a context this takes the context in place of x; so do `singular_values`,
        `residual_scale`, `program` and `active_program`.
        """
        attention = self._compose(x).attention
        return Attention(*(w.reshape(*x.shape[:-1], *w.shape[1:]) for w in attention))

    def singular_values(self, x: Tensor) -> Tensor:
        """Singular values sigma_n of the active program for x [..., in]: [..., R], decreasing;
        in the authors' layer without LSTM increasing."""
        return self._compose(x).sigma.reshape(*x.shape[:-1], self.config.num_components)

    def residual_scale(self, x: Tensor) -> Tensor:
        """Factor of the residual program for x [..., in]: [...]; 0 where there is none."""
        scale = self._compose(x).residual_scale
        return x.new_zeros(x.shape[:-1]) if scale is None else scale.reshape(x.shape[:-1])

    def program(self, x: Tensor) -> Tensor:
        """The working program W for x [..., in]: [..., in, out]. Costly; for inspection."""
        composed = self._compose(x)
        program = active_program(composed, self.memory.stored("u"), self.memory.stored("v"))
        program = self._add_residual(program, composed, lambda rho: rho.matrix())
        return program.view(*x.shape[:-1], self.in_features, self.out_features)

    def active_program(self, x: Tensor) -> Tensor:
        """`program(x)` without the residual: what the memory alone contributes."""
        u, v = self.memory.stored("u"), self.memory.stored("v")
        program = active_program(self._compose(x), u, v)
        return program.view(*x.shape[:-1], self.in_features, self.out_features)

    def _add_residual(
        self, active: Tensor, composed: Composed, unscaled: Callable[[IntegrationNetwork], Tensor]
    ) -> Tensor:
        """The sum of active and residual program (Eq. 7), or of their outputs, [B, ...].

        `unscaled` makes Rho, or its outputs, before they are scaled. Without a residual program it
        is not called, and `active` is returned.
        """
        if self.integration is None or composed.residual_scale is None:
            return active
        scale = composed.residual_scale.view(-1, *[1] * (active.dim() - 1))
        return active + (scale * unscaled(self.integration)).to(active.dtype)

    def _compose(self, source: Tensor, x: Tensor | None = None) -> Composed:
        """Programs composed from `source` [..., in], or [..., context_features] with a context.

        Always in the parameters' own precision: under autocast, half-precision attention would be
        coarse, and its usage more so.

        Args:
            source: the inputs themselves, or their contexts.
            x: with contexts the inputs, [B, in]; None leaves `Composed.projection` out.
        """
        gate = None if self.integration is None else self.integration.gate
        dtype, rows = self.memory.u.dtype, None
        if self.context_features is None:
            source, rows = self._flatten(source), self.memory.stored("u")
        else:
            source = flatten(source, context_features=self.context_features)
        with without_autocast(source):
            composed: Composed = self.composition(source.to(dtype), self.memory, gate, rows)
            if x is not None:
                composed = composed._replace(projection=x.to(dtype) @ self.memory.stored("u").T)
        return composed

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.config}"


def _freeze_as_stored(
    layer: NeurocoderLinear, state: Mapping[str, Tensor], prefix: str, *others: Any
) -> None:
    """Freeze as many slots, in as many groups, as a state_dict that is to be loaded has frozen.

    Parameters stay the same objects, for an optimiser that was built before. A state of another
    number of slots is refused, also with `strict=False` where as many are trained.
    """
    groups = state.get(f"{prefix}memory.frozen_groups")
    if groups is None:
        return
    memory = layer._growing_memory()
    before = [(name, memory.get_parameter(name)) for name in memory.parts]
    count = int(groups.sum())
    total = count + len(state.get(f"{prefix}memory.s", ()))
    if total != layer.config.num_slots:
        errors: list[str] = others[-1]
        errors.append(
            f"size mismatch for {prefix}memory: {total} slots, {count} of them frozen, where the "
            f"layer has {layer.config.num_slots}"
        )
        return
    if count < total - len(memory.s):
        return  # fewer than are frozen here, which loading refuses
    memory.freeze(count)
    memory.set_groups(groups.tolist())
    for name, parameter in before:
        cut = memory.get_parameter(name)
        if cut is not parameter:
            parameter.data, parameter.grad = cut.data, None
            setattr(memory, name, parameter)


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
    return total(losses)
