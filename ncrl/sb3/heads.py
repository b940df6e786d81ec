"""Output layers of SB3 policies, chosen by name."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from ncrl.layers import make_layer


class ChosenHeads(ActorCriticPolicy):
    """Mixin: the last layer of actor and critic comes from `ncrl.layers.LAYERS`."""

    head = "neurocoder"
    head_kwargs: dict[str, Any]

    def _choose_head(self, head: str | None, head_kwargs: dict[str, Any] | None) -> None:
        """To be called before `ActorCriticPolicy.__init__`, which builds the network."""
        if head is not None:
            self.head = head
        self.head_kwargs = head_kwargs or {}

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.head == "linear" and not self.head_kwargs:
            return  # SB3's own layers, with its orthogonal initialisation
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
        return make_layer(self.head, *sizes, **self.head_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "head": self.head,
            "head_kwargs": self.head_kwargs,
        }
