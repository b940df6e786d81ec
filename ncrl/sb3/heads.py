"""Output layers of SB3 policies, chosen by name, and the weights of their own losses."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from ncrl.checks import suggest
from ncrl.layers import LAYERS, make_layer
from ncrl.neurocoder import NeurocoderLinear
from ncrl.sb3.regularise import check_coefficient


class ChosenHeads(ActorCriticPolicy):
    """Mixin: the last layer of actor and critic comes from `ncrl.layers.LAYERS`.

    The residual program of a Neurocoder layer without gate starts from the weights of the SB3 layer
    that it replaces. Started as torch does a layer, it learns Pong late with some seeds
    (results/atari.md).

    Args:
        head: name of the output layers; the class attribute `head` if None.
        head_kwargs: options of the output layers, such as `num_slots`.
        orth_coef: weight of the orthogonality loss of Neurocoder heads (paper: a) in what A2C, PPO
            and RecurrentPPO minimise; see `ncrl.sb3.regularise`. They clip the gradient's norm at
            0.5, so that a weight of 0.1 slows A2C down. `ncrl.agents.A3C` has an argument of that
            name instead.
        balance_coef: likewise, weight of the balance loss of mixtures of experts.
        int_value: add a head for the value of an intrinsic reward, as `ncrl.agents.A3C` does.
        args, kwargs: arguments of the policy that this is mixed into.

    Raises:
        ValueError: for an unknown head, an option it has not got, or a negative coefficient.
    """

    head = "neurocoder"

    def __init__(
        self,
        *args: Any,
        head: str | None = None,
        head_kwargs: dict[str, Any] | None = None,
        orth_coef: float = 0.01,
        balance_coef: float = 0.01,
        int_value: bool = False,
        **kwargs: Any,
    ) -> None:
        # Before the base class, which builds the network.
        self.head = self.head if head is None else head
        if self.head not in LAYERS:
            raise ValueError(f"unknown head {self.head!r}; {suggest(self.head, LAYERS)}")
        self.head_kwargs = head_kwargs or {}
        self.orth_coef = check_coefficient("orth_coef", orth_coef)
        self.balance_coef = check_coefficient("balance_coef", balance_coef)
        self.int_value = int_value
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.int_value:
            with torch.random.fork_rng(devices=[]):
                self.value_net_int = self._make_head(self.value_net)
        if self.head != "linear" or self.head_kwargs:  # else SB3's, which start orthogonal
            self.action_net = self._make_head(self.action_net)
            self.value_net = self._make_head(self.value_net)  # type: ignore[assignment]
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _make_head(self, linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)  # SB3's output layer for every supported space
        # SB3 sizes some output layers with numpy integers.
        sizes = int(linear.in_features), int(linear.out_features)
        layer = make_layer(self.head, *sizes, **self.head_kwargs)
        if (
            isinstance(layer, NeurocoderLinear)
            and layer.integration is not None
            and not layer.config.residual_gate
        ):
            layer.integration.start_from(linear.weight.T)
        return layer

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ("head", "head_kwargs", "orth_coef", "balance_coef", "int_value")
        ours = {name: getattr(self, name) for name in (*names, "share_features_extractor")}
        return super()._get_constructor_parameters() | ours
