"""What a Neurocoder layer costs beside the layers it sits on or replaces, in one process. On a CPU
its time is counted, so that other programs may run beside.

python benchmarks/layer.py                 # the rows with a target, one thread, about a minute
python benchmarks/layer.py --all           # options of the layer and the other layers as well
python benchmarks/layer.py --device cuda --batch 320 4096
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from common import NEUROCODER, device_name, machine, medians, print_header, print_row
from torch import Tensor, nn
from torch.profiler import profile

from ncrl.layers import LAYERS, make_layer, neurocoder

COMMON = {"key_dim": 5, "num_least_used": 5, "residual": False}
WIDE = COMMON | {"num_slots": 30, "num_steps": 5, "num_heads": 3, "controller_size": 32}
MIDDLE: dict[str, Any] = COMMON | {"num_slots": 50, "num_heads": 10, "controller_size": 18}
"""The paper's layers of the CIFAR MLP and of split MNIST (Table 8)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "residual": {"residual": True},
    "5 steps of 2 heads": {"num_steps": 5, "num_heads": 2},
    "official": {"preset": "official"},
}
"""Changes of `MIDDLE`."""

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=device_name, default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[128], help="of the rows beside nn.Linear"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--all", action="store_true", help="options and baselines as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{machine()}, one thread, {arguments.device}, median of {arguments.seconds:g} s a row, "
        "ours and reference in turn"
    )
    print_rows(arguments.device, arguments.batch, arguments.seconds, everything=arguments.all)


def print_rows(
    device: str, batches: Sequence[int], seconds: float, *, everything: bool = False
) -> None:
    """The table; `everything` has options of the layer and the other layers as well."""

    clock = time.process_time if device == "cpu" else time.perf_counter

    def compare(name: str, ours: Step, reference: Step, target: float | None = None) -> None:
        mine, theirs = medians(seconds, ours, reference, clock=clock)
        print_ratio(name, mine, theirs, target)

    def beside_linear(name: str, layer: Any, batch: int, target: float | None = None) -> None:
        width, out = layer.in_features, layer.out_features
        x = torch.randn(batch, width, requires_grad=True)
        ours, reference = training_step(layer, x), training_step(nn.Linear(width, out), x)
        compare(f"{width} -> {out}, {name}, batch {batch}", ours, reference, target)

    print_header("", "ours", "reference", "ratio", "target", "met")
    with torch.device(device):
        wide = make_layer("neurocoder", 3072, 512, **WIDE)
        middle = make_layer("neurocoder", 784, 400, **MIDDLE)
        for batch in batches:
            beside_linear("P 30 J 5 H 3", wide, batch, 1.0)
            beside_linear("P 50 J 1 H 10", middle, batch, 1.5)
        head = make_layer("neurocoder", 512, 18, residual=False, **NEUROCODER)
        step = training_step(head, torch.randn(320, 512, requires_grad=True))
        lstm = training_step(nn.LSTM(256, 512), torch.randn(20, 16, 256, requires_grad=True))
        compare("actor 512 -> 18, batch 320, beside LSTM-512 (T 20, B 16)", step, lstm, 0.25)
        if device == "cpu":
            ours, materialised = peak_memory(batches[0])
            name = "784 -> 400, peak memory, beside W built"
            print_ratio(name, ours, materialised, 1 / 50, "MiB")
        if not everything:
            return
        for name, changes in VARIANTS.items():
            beside_linear(name, neurocoder(784, 400, **(MIDDLE | changes)), batches[0])
        for name in LAYERS:
            if name not in ("linear", "neurocoder"):
                beside_linear(name, make_layer(name, 784, 400), batches[0])


def print_ratio(
    name: str, ours: float, reference: float, target: float | None, unit: str = "ms"
) -> None:
    """A row; `target` is the largest ratio that is good enough."""
    ratio = ours / reference
    verdict = ("", "") if target is None else (f"{target:g}", "yes" if ratio <= target else "no")
    print_row(name, f"{ours:.3g} {unit}", f"{reference:.3g} {unit}", f"{ratio:.3f}", *verdict)


def training_step(module: nn.Module, x: Tensor) -> Step:
    """Forward and backward of `module` from a given gradient of its output."""

    def step() -> None:
        x.grad = None
        module.zero_grad()
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))

    return step


def peak_memory(batch: int) -> Iterator[float]:
    """MiB at the peak of a training step, ours and with the program materialised."""
    layer = neurocoder(784, 400, **MIDDLE)
    x = torch.randn(batch, 784, requires_grad=True)

    def materialised(x: Tensor) -> Tensor:
        return torch.einsum("bi,bio->bo", x, layer.program(x))

    def step(function: Callable[[Tensor], Tensor]) -> None:
        function(x).sum().backward()

    return (peak_bytes(partial(step, function)) / 2**20 for function in (layer, materialised))


def peak_bytes(function: Step) -> int:
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
