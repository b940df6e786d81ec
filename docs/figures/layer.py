"""Draw layer.svg: what a Neurocoder layer does with one input. All numbers are of a real layer.

python docs/figures/layer.py
"""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ncrl import NeurocoderLinear

SLOTS, COMPONENTS, WIDTH_IN, WIDTH_OUT = 6, 3, 8, 6
INK, QUIET, ACCENT = "#1f2430", "#69707d", "#b4432e"


def heat(figure: Figure, box: tuple[float, float, float, float], values: torch.Tensor) -> Axes:
    """A matrix as an image in a box (left, bottom, width, height), of a sheet 12 x 5 wide."""
    left, bottom, width, height = box
    ax = figure.add_axes((left / 12, bottom / 5, width / 12, height / 5))
    signed = bool((values < 0).any())
    limit = float(values.abs().max())
    colours: dict[str, Any] = (
        {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "YlOrBr", "vmin": 0.0}
    )
    ax.imshow(values, aspect="auto", interpolation="nearest", vmax=limit, **colours)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "layer", "font.size": 9})
    torch.manual_seed(3)
    layer = NeurocoderLinear(
        WIDTH_IN, WIDTH_OUT, num_slots=SLOTS, num_heads=COMPONENTS, num_least_used=0,
        sharpness=10, residual=False,
    )  # fmt: skip
    with torch.no_grad():
        x = torch.randn(1, WIDTH_IN)
        attention = layer.attend(x)
        sigma = layer.singular_values(x)[0]
        u, v = attention.u[0] @ layer.memory.u, attention.v[0] @ layer.memory.v
        program, y = layer.program(x)[0], layer(x)[0]

    figure = Figure((9.6, 4), facecolor="white")
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set(xlim=(0, 12), ylim=(0, 5))
    sheet.axis("off")

    def say(at: tuple[float, float], text: str, **how: Any) -> None:
        style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.35}
        sheet.text(*at, text, **{**style, **how})

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        sheet.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": QUIET, "lw": 1.3})

    # The input, and what reads it.
    heat(figure, (0.35, 1.7, 0.25, 1.7), x.T)
    say((0.48, 3.6), "input $x$")
    arrow((0.7, 2.55), (1.15, 2.55))
    sheet.add_patch(
        matplotlib.patches.FancyBboxPatch(
            (1.2, 2.1), 1.15, 0.9, boxstyle="round,pad=0.04", fc="#eef1f6", ec=QUIET
        )
    )
    say((1.775, 2.55), "a small\nLSTM asks")

    # Program memory, and attention over it.
    for number, name in enumerate("uvs"):
        weights, stored = getattr(attention, name)[0], getattr(layer.memory, name)
        bottom = 3.45 - 1.3 * number
        arrow((2.45, 2.55), (2.85, bottom + 0.4))
        heat(figure, (2.9, bottom, 1.15, 0.75), weights)
        say((2.95, bottom + 0.87), f"${name}$", ha="left", size=11)
        say((4.28, bottom + 0.38), r"$\times$", size=14)
        heat(figure, (4.5, bottom, 1.0 if number < 2 else 0.18, 0.75), stored.detach())
    say((3.4, 4.72), "attention: rows are\ncomponents, columns slots", size=8)
    say((5.05, 4.72), f"program memory:\n{SLOTS} slots", size=8)
    learnt = "stored vectors $u$, $v$ and\nsingular values $s$: learnt,\nthe same for all inputs"
    say((5.3, 1.2), learnt, size=8, color=QUIET, ha="left")

    # The composed program.
    for n in range(COMPONENTS):
        left = 6.35 + 0.98 * n
        arrow((5.65, 2.85), (6.25, 2.85)) if n == 0 else say((left - 0.12, 2.85), "+", size=13)
        outer = sigma[n] * torch.outer(u[n], v[n])
        heat(figure, (left, 2.35, 0.72, 1.0), outer)
        say((left + 0.36, 3.55), rf"$\sigma_{n + 1} u_{n + 1}^T v_{n + 1}$", size=10)
    say((7.7, 4.62), f"{COMPONENTS} matrices of rank 1, made for this input", size=8.5)
    say((9.3, 2.85), "=", size=14)
    heat(figure, (9.5, 2.35, 0.85, 1.0), program)
    say((9.92, 3.55), "program $W(x)$", color=ACCENT, weight="bold")
    say((9.92, 2.0), "with residual: + gate$(x)$\ntimes a learnt matrix", size=8, color=QUIET)
    arrow((10.45, 2.85), (10.95, 2.85))
    heat(figure, (11.05, 2.1, 0.25, 1.4), y[:, None])
    say((11.2, 3.7), "$y = x\\,W(x) + b$", size=10)
    last = "torch.nn.Linear has one matrix for all inputs. A Neurocoder layer looks up, for every "
    say((6.0, 0.3), f"{last}input, which stored vectors its matrix is made of.", size=10)
    path = Path(__file__).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
