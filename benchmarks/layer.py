"""What a Neurocoder layer costs beside the layers it sits on or replaces, in one process.

python benchmarks/layer.py                 # the rows with a target, one thread, about a minute
python benchmarks/layer.py --check         # exit status 1 if a target is missed
python benchmarks/layer.py --device cuda --batch 4096
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from common import medians, print_header
from torch import Tensor, nn
from torch.profiler import profile

from ncrl import NeurocoderLinear
from ncrl.layers import LAYERS, make_layer, neurocoder
from ncrl.networks import ENCODERS

WIDE = {"num_slots": 30, "num_steps": 5, "num_heads": 3, "key_dim": 5, "num_least_used": 5}
MIDDLE = {"num_slots": 50, "num_heads": 10, "key_dim": 5, "num_least_used": 5}
ATARI = {"num_slots": 80, "num_heads": 15, "key_dim": 3, "num_least_used": 5}
"""The paper's layers of the CIFAR MLP, split MNIST and Atari (Table 8)."""

WIDTHS = {"a3c": 256, "nature": 512, "paper": 1024}
"""Features of the encoders."""


class Row(NamedTuple):
    """A measurement beside its reference."""

    name: str
    ours: float
    reference: float
    target: float | None
    """Largest ratio of `ours` to `reference` that is good enough."""
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        return self.target is None or self.ratio <= self.target

    def __str__(self) -> str:
        target = "" if self.target is None else f"{self.target:g}"
        verdict = "" if self.target is None else ("yes" if self.met else "no")
        return (
            f"| {self.name} | {self.ours:.3g} {self.unit} | {self.reference:.3g} {self.unit} | "
            f"{self.ratio:.3f} | {target} | {verdict} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="of the rows beside nn.Linear")
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--all", action="store_true", help="options and baselines as well")
    parser.add_argument("--compile", action="store_true", help="our layers through torch.compile")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench = Bench(torch.device(arguments.device), arguments.seconds, arguments.compile)

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(
        f"{device}, {arguments.threads} thread(s), torch {torch.__version__}, batch "
        f"{arguments.batch}, median of {arguments.seconds:g} s a row, ours and reference in turn"
    )
    print_header("", "ours", "reference", "ratio", "target", "met")
    rows = []
    for row in measurements(bench, arguments.batch, arguments.all):
        print(row, flush=True)
        rows.append(row)
    if arguments.check and not all(row.met for row in rows):
        sys.exit(1)


def measurements(bench: Bench, batch: int, everything: bool) -> Iterator[Row]:
    """Every row, in the order of issue and table."""
    for hidden in (True, False):
        where = "" if hidden else ", first layer (no gradient of the input)"
        target = 1.0 if hidden else None
        wide = bench.layer(3072, 512, controller_size=32, residual=False, **WIDE)
        yield bench.beside_linear(f"3072 -> 512, P 30 J 5 H 3{where}", wide, batch, target, hidden)
        target = 1.5 if hidden else None
        middle = bench.layer(784, 400, controller_size=18, residual=False, **MIDDLE)
        yield bench.beside_linear(
            f"784 -> 400, P 50 J 1 H 10{where}", middle, batch, target, hidden
        )

    lstm = bench.put(nn.LSTM(256, 512))
    lstm_step = bench.training_step(lstm, bench.input(20, 16, 256))
    for out_features, name in ((18, "actor"), (1, "critic")):
        for residual in (False, True):
            head = bench.layer(512, out_features, controller_size=8, residual=residual, **ATARI)
            step = bench.training_step(head, bench.input(320, 512))
            label = f"{name} 512 -> {out_features}{', Rho' if residual else ''}, batch 320, "
            target = 0.25 if out_features == 18 and not residual else None
            yield bench.compare(label + "beside LSTM-512 (T 20, B 16)", step, lstm_step, target)

    yield from acting(bench)
    if bench.device.type == "cpu":
        yield peak_memory(bench, batch)
    if everything:
        yield from options(bench, batch)


def acting(bench: Bench) -> Iterator[Row]:
    """Both Atari heads on 8 inputs without gradient: in ms, and beside encoder and LSTM."""
    lstms = {encoder: bench.put(nn.LSTM(width, 512)) for encoder, width in WIDTHS.items()}
    encoders = {name: bench.put(nn.Sequential(*ENCODERS[name](1))) for name in WIDTHS}
    heads = nn.ModuleList(
        bench.layer(512, n, controller_size=8, residual=True, **ATARI) for n in (18, 1)
    )
    images = torch.rand(8, 1, 84, 84, device=bench.device)
    latent = torch.randn(8, 512, device=bench.device)

    @torch.no_grad()
    def act() -> None:
        for head in heads:
            head(latent)

    (milliseconds,) = medians(bench.seconds, act)
    yield Row("acting, both heads, batch 8, beside 1 ms", milliseconds, 1.0, 0.4)
    for name in WIDTHS:

        @torch.no_grad()
        def act_without_heads(name: str = name) -> None:
            lstms[name](encoders[name](images).unsqueeze(0))

        act_without_heads()  # encoders have lazy layers
        label = f"acting, both heads, batch 8, beside encoder {name} and LSTM-512"
        yield bench.compare(label, act, act_without_heads, 0.125)


def peak_memory(bench: Bench, batch: int) -> Row:
    """Peak memory of a training step, ours and with the program materialised."""
    layer = bench.layer(784, 400, controller_size=18, residual=False, **MIDDLE)
    x = bench.input(batch, 784)

    def materialised(x: Tensor) -> Tensor:
        return torch.einsum("bi,bio->bo", x, layer.program(x))

    def step(function: Callable[[Tensor], Tensor]) -> None:
        function(x).sum().backward()

    ours, reference = (peak_bytes(partial(step, f)) / 2**20 for f in (layer, materialised))
    return Row("784 -> 400, peak memory, beside W built", ours, reference, 1 / 50, "MiB")


def options(bench: Bench, batch: int) -> Iterator[Row]:
    """Rows without target: what options cost, and the other layers of the registry."""
    linear = bench.put(nn.Linear(784, 400))
    reference = bench.training_step(linear, bench.input(batch, 784))
    variants: dict[str, dict[str, Any]] = {
        "residual": {"residual": True},
        "residual of rank 8": {"residual": True, "residual_rank": 8},
        "gate per slot": {"gate": "slot"},
        "gate per head": {"gate": "head"},
        "no usage attention": {"num_least_used": 0},
        "5 steps of 2 heads": {"num_steps": 5, "num_heads": 2},
        "linear controller": {"controller": "linear"},
        "official": {"preset": "official"},
    }
    for name, changes in variants.items():
        settings = {**MIDDLE, "controller_size": 18, "residual": False, **changes}
        step = bench.training_step(bench.layer(784, 400, **settings), bench.input(batch, 784))
        yield bench.compare(f"784 -> 400, {name}", step, reference, None)
    for name in LAYERS:
        if name not in ("linear", "neurocoder"):
            layer = bench.put(make_layer(name, 784, 400))
            step = bench.training_step(layer, bench.input(batch, 784))
            yield bench.compare(f"784 -> 400, {name}", step, reference, None)


class Bench:
    """Builds layers on one device and times functions in turn."""

    def __init__(self, device: torch.device, seconds: float, compiled: bool) -> None:
        self.device = device
        self.seconds = seconds
        self.compiled = compiled

    def put(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def layer(self, in_features: int, out_features: int, **options: Any) -> NeurocoderLinear:
        layer = neurocoder(in_features, out_features, device=self.device, **options)
        if self.compiled:
            layer.compile()
        return layer

    def input(self, *shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(*shape, device=self.device, requires_grad=gradient)

    def beside_linear(
        self, name: str, layer: NeurocoderLinear, batch: int, target: float | None, hidden: bool
    ) -> Row:
        """A row beside nn.Linear of the same widths."""
        linear = self.put(nn.Linear(layer.in_features, layer.out_features))
        x = self.input(batch, layer.in_features, gradient=hidden)
        return self.compare(
            name, self.training_step(layer, x), self.training_step(linear, x), target
        )

    def training_step(self, module: nn.Module, x: Tensor) -> Callable[[], None]:
        """Forward and backward of `module` from a given gradient of its output."""

        def step() -> None:
            x.grad = None
            for parameter in module.parameters():
                parameter.grad = None
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            y.backward(torch.ones_like(y))

        return step

    def compare(
        self,
        name: str,
        ours: Callable[[], None],
        reference: Callable[[], None],
        target: float | None,
    ) -> Row:
        mine, theirs = medians(self.seconds, ours, reference)
        return Row(name, mine, theirs, target)


def peak_bytes(function: Callable[[], None]) -> int:
    """The most bytes that tensors allocated inside `function` take at any moment, on the CPU."""
    function()  # gradients of the parameters exist from now on
    with profile(profile_memory=True) as prof:
        function()
    assert prof.profiler is not None
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


if __name__ == "__main__":
    main()
