"""`NSMLinear`: a linear layer whose weight matrix is a mixture of stored ones.

Le, Tran & Venkatesh, "Neural Stored-program Memory", ICLR 2020. Shapes: p slots, K key width, B
inputs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.seat import NORM_FLOOR, LinearSeat, without_autocast

GAIN, BIAS_STD = 1.4, 0.01
"""Of the Xavier initialisation, and of the query and strength biases at the start; the authors'."""

OFFICIAL_FEATURES = 15
"""Singular features of the unused networks in the authors' continual-learning runs."""


class NSMLinear(LinearSeat):
    """Drop-in for `nn.Linear`: y = x W + b with W and b read from a memory by the input.

    A slot holds a key, a whole weight matrix and its bias. The input makes a query and a strength
    beta: W = sum_i softmax_i(beta cos(query, key_i)) W_i. W itself is never built: each input is
    multiplied with all p matrices, in one batched product, and the results are mixed. Further
    arguments are those of `nn.Linear`.

    Args:
        num_slots: p; each has as many parameters as the linear layer that is replaced.
        key_dim: K.
        variant: `lean`, or `official_count`: with the networks that the authors' layer holds but
            never uses in this form, for comparing sizes. Their split MNIST network (1024-256-256-2,
            no biases) then has 2,295,920 parameters.
        cosine: `true`, or `official`: divided by K, as the authors' code does.

    Shapes: [..., in] -> [..., out], any leading dimensions.

    Raises:
        ValueError: for an impossible size or choice, naming it.
    """

    CHOICES: ClassVar = {"variant": ("lean", "official_count"), "cosine": ("true", "official")}
    num_slots: int
    key_dim: int
    cosine: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_slots: int = 5,
        key_dim: int = 5,
        variant: str = "lean",
        cosine: str = "true",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {"num_slots": num_slots, "key_dim": key_dim, "variant": variant, "cosine": cosine}
        super().__init__(in_features, out_features, dtype=dtype, **options)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias = bool(bias)
        width = key_dim + (in_features + self.bias) * out_features
        # A row holds a key [K], a weight matrix [in, out] and a bias [out].
        self.memory = nn.Parameter(torch.empty(num_slots, width, **place))
        self.query = nn.Linear(in_features, key_dim, **place)
        self.strength = nn.Linear(in_features, 1, **place)
        if variant == "official_count":
            sizes = self._unused_sizes()
            self.unused = nn.ModuleDict(
                {name: nn.Linear(*size, **place) for name, size in sizes.items()}
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors initialise it: Xavier-uniform with gain 1.4, small biases."""
        nn.init.xavier_uniform_(self.memory, gain=GAIN)
        for layer in (self.query, self.strength):
            nn.init.xavier_uniform_(layer.weight, gain=GAIN)
            nn.init.normal_(layer.bias, std=BIAS_STD)

    def attend(self, x: Tensor) -> Tensor:
        """Weights of the slots behind `forward(x)`: [..., in] -> [..., p], summing to 1."""
        keys, _, _ = self._parts()
        return self._attend(self._flatten(x), keys).reshape(*x.shape[:-1], self.num_slots)

    def program(self, x: Tensor) -> Tensor:
        """The weight matrix W for x [..., in]: [..., in, out]. Costly; for inspection."""
        _, programs, _ = self._parts()
        return torch.einsum("...p,pio->...io", self.attend(x), programs)

    def _attend(self, x: Tensor, keys: Tensor) -> Tensor:
        """[B, in] -> [B, p], always in the parameters' own precision."""
        with without_autocast(x):
            x = x.to(self.memory.dtype)
            keys = F.normalize(keys.tanh(), dim=1, eps=NORM_FLOOR)
            query = F.normalize(self.query(x).tanh(), dim=1, eps=NORM_FLOOR)  # [B, K]
            cosine = query @ keys.T  # [B, p]
            if self.cosine == "official":
                cosine = cosine / self.key_dim
            return (F.softplus(self.strength(x)) * cosine).softmax(1)

    def _transform(self, x: Tensor) -> Tensor:
        keys, programs, biases = self._parts()
        attention = self._attend(x, keys)  # [B, p]
        outputs = torch.matmul(x, programs)  # [p, B, out]
        if self.bias:
            outputs = outputs + biases.unsqueeze(1).to(outputs.dtype)
        mixed = (attention.T.unsqueeze(2) * outputs).sum(0)  # [B, out]
        return mixed.to(outputs.dtype)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stored keys [p, K], weight matrices [p, in, out] and biases [p, out], or [p, 0].

        Split at once: the gradient of every slice by itself would be as large as the memory.
        """
        shape = self.num_slots, self.in_features, self.out_features
        sizes = [self.key_dim, self.in_features * self.out_features, self.bias * self.out_features]
        keys, programs, biases = torch.split(self.memory, sizes, dim=1)
        return keys, programs.view(shape), biases

    def _unused_sizes(self) -> dict[str, tuple[int, int]]:
        """Widths of the Linear layers that only `official_count` has: they belong to other ways of
        addressing the memory, which the authors' layer can be switched to."""
        features = OFFICIAL_FEATURES
        rank = min(self.in_features + self.bias, self.out_features)
        return {
            "slots": (self.in_features, self.num_slots),
            "feature_slots": (self.in_features, self.num_slots * features),
            "remaining_slots": (self.in_features, self.num_slots),
            "feature_queries": (self.in_features, self.key_dim * (features + 1)),
            "code_length": (self.in_features, self.out_features),
            "singular_keys": (rank * features // 2 * 3, self.key_dim),
            "vector_keys": (2 * self.out_features + 1, self.key_dim),
        }
