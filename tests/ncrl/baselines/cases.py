"""Configurations of every baseline, each with its literal reading in `reference`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ncrl.baselines import FiLMLinear, HyperNetLinear, MoELinear, NSMLinear
from tests.ncrl.baselines import reference

IN, OUT = 5, 4


class Case(NamedTuple):
    """One configuration of one layer."""

    layer: type[nn.Module]
    options: dict[str, Any]
    reference: Callable[..., Tensor]
    """From parameters by name and x [in] to y [out]; of MoE, without noise."""
    sizes: tuple[int, int] = (IN, OUT)

    def make(self, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        return self.layer(*self.sizes, **{"dtype": dtype, **self.options, **options})


def hypernet(sizes: tuple[int, int] = (IN, OUT), **options: Any) -> Case:
    read = partial(reference.hypernet, scale=options.get("scale", "input"))
    return Case(HyperNetLinear, {"hidden": 6, **options}, read, sizes)


def film(sizes: tuple[int, int] = (IN, OUT), **options: Any) -> Case:
    return Case(FiLMLinear, {"hidden": 6, **options}, reference.film, sizes)


def moe(sizes: tuple[int, int] = (IN, OUT), *, experts: int, top_k: int, **options: Any) -> Case:
    options = {"num_experts": experts, "top_k": top_k, **options}
    return Case(MoELinear, options, partial(reference.moe, top_k=top_k), sizes)


def nsm(sizes: tuple[int, int] = (IN, OUT), **options: Any) -> Case:
    read = partial(
        reference.nsm,
        out=sizes[1],
        key_dim=options.get("key_dim", 5),
        official_cosine=options.get("cosine") == "official",
        bias=options.get("bias", True),
    )
    return Case(NSMLinear, options, read, sizes)


CASES = {
    "hypernet": hypernet(),
    "hypernet-one-layer": hypernet(num_layers=1),
    "hypernet-three-layers": hypernet(num_layers=3, bias=False),
    "hypernet-per-output": hypernet(scale="output"),
    "hypernet-per-output-without-bias": hypernet(scale="output", bias=False, num_layers=1),
    "hypernet-1-to-1": hypernet((1, 1)),
    "film": film(),
    "film-one-layer": film(num_layers=1, bias=False),
    "film-three-layers": film(num_layers=3),
    "film-one-output": film((IN, 1)),
    "moe": moe(experts=6, top_k=2),
    "moe-one-kept": moe(experts=3, top_k=1, bias=False),
    "moe-all-kept": moe(experts=3, top_k=3),
    "moe-one-expert": moe(experts=1, top_k=1),
    "moe-experts-without-inputs": moe((3, 1), experts=40, top_k=2),
    "nsm": nsm(),
    "nsm-without-bias": nsm(num_slots=3, key_dim=2, bias=False),
    "nsm-official": nsm(key_dim=4, cosine="official", variant="official_count"),
    "nsm-one-slot": nsm((1, 3), num_slots=1, key_dim=1),
    "nsm-one-output": nsm((IN, 1), num_slots=2),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cases_of(layer: type[nn.Module]) -> pytest.MarkDecorator:
    chosen = {name: case for name, case in CASES.items() if case.layer is layer}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


def make_layer(case: Case, seed: int = 0, **options: Any) -> nn.Module:
    """In eval mode, with all parameters random: nothing is at its start, or zero."""
    layer = case.make(**options).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return layer


def used(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the output depends on."""
    return {name: p for name, p in layer.named_parameters() if not name.startswith("unused.")}
