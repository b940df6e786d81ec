"""Videos of a game beside the attention over program slots with which the agent plays it.

Shapes: R components and P slots of a Neurocoder head, A actions. Pictures are RGB uint8 [H, W, 3].
Components and slots are numbered from 1 on the picture; component 1 has the largest singular value.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from ncrl.agents.curves import coded_heads
from ncrl.sb3 import EnginePolicy, Latent

CODECS = {".mp4": "mp4v", ".webm": "VP90"}
"""Codecs by suffix; OpenCV's wheels hold no H.264 encoder.

FFmpeg prints that it does not support the tag VP90, and writes VP9 all the same.
"""

FPS = 15
"""Timesteps shown per second: a game of 60 frames per second in real time at 4 frames a step."""

HISTORY = 160
"""Timesteps that the strips of slots over time show."""

MIN_SPREAD = 0.001
"""Smallest end of a colour scale, so that uniform weights do not show their rounding errors."""

Colour = tuple[int, int, int]

Heads = Mapping[str, np.ndarray | None]
"""`actor` and `critic`: attention over left vectors (u), [R, P]; None for layers without."""


class Moment(NamedTuple):
    """One timestep of a game: what was seen, and what the agent made of it."""

    frame: np.ndarray  # the screen, RGB uint8 [height, width, 3]
    score: float  # raw rewards of the game so far
    timestep: int
    action: str  # the one taken
    value: float  # the critic's estimate of the return
    probabilities: np.ndarray  # [A]
    action_names: Sequence[str]
    heads: Heads
    bonus: float | None = None  # how new this is to the learner, before any scaling


class Trace(NamedTuple):
    """What the picture remembers of one head's attention; see `remember`."""

    weights: np.ndarray  # [R, P], the latest, as deviations: 0 is uniform, 1 twice that
    spread: float  # largest deviation of all weights so far
    slot_use: np.ndarray  # [T, P], mean of `weights` for up to `HISTORY` timesteps, latest last


class Box(NamedTuple):
    """A rectangle of the picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height


WIDTH, HEIGHT = 1280, 800
GAME = Box(16, 16, 480, 768)
BONUS = Box(16, 742, 480, 42)
READOUTS = Box(520, 10, 744, 50)
ACTIONS = Box(520, 71, 744, 116)
HEADS = (Box(520, 200, 360, 558), Box(904, 200, 360, 558))
LEGEND = Box(520, 760, 744, 32)
ROWS_OF_ACTIONS = 6

BACKGROUND = (18, 20, 26)
PLOT = (30, 33, 41)
GREY = (146, 152, 166)
WHITE = (240, 242, 246)
ACCENT = (255, 196, 70)
BAR = (84, 116, 168)
# from less to more than uniform; lightness rises throughout, as codecs blur colour, not lightness
SCALE = ((8, 16, 62), (48, 68, 122), (112, 104, 140), (226, 140, 88), (255, 238, 130))
PALETTE = np.stack(
    [np.interp(np.linspace(0, 4, 256), range(5), channel) for channel in zip(*SCALE, strict=True)],
    axis=1,
).astype(np.uint8)  # [256, 3]

SMALL, MEDIUM, LARGE = 0.4, 0.48, 0.75
"""OpenCV's font scales."""

NOTES = (
    "Left vectors' weights (u) as multiples of uniform ones; strips: mean over components. "
    "White: most attended slot.",
    "Scales are centred on uniform weights, or on the mean over the strip for the change; "
    "they end at the largest deviation.",
)


@torch.no_grad()
def view_heads(policy: EnginePolicy, latent: Latent) -> Heads:
    """Attention of the policy's actor and critic for one latent, [1, ...]."""
    heads: dict[str, np.ndarray | None] = {"actor": None, "critic": None}
    for name, (head, x) in coded_heads(policy, latent).items():
        heads[name] = head.attend(x).u.squeeze(0).cpu().numpy()
    return heads


def check_path(path: Path) -> None:
    """Raise ValueError for a video's path at once, rather than after hours of play: for a suffix
    that is none of `CODECS`, or a folder that cannot be written to."""
    if path.suffix.lower() not in CODECS:
        raise ValueError(f"a video's name ends in {' or '.join(CODECS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write the video {str(path)!r}: its folder does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write the video {str(path)!r}")


def write_video(path: Path, moments: Iterable[Moment]) -> None:
    """A video file of one picture per timestep of a game, under another name until it is whole.

    An existing file is replaced; whatever `moments` raise, nothing is left behind. ValueError as of
    `check_path`, OSError if the file cannot be written.
    """
    check_path(path)
    target = path.resolve()  # a link stays one
    growing = target.with_name(f".{path.stem}.growing{path.suffix}")
    codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(growing), cv2.CAP_FFMPEG, codec, FPS, (WIDTH, HEIGHT))
    traces: dict[str, Trace] = {}
    bonuses: deque[float] = deque(maxlen=HISTORY)
    try:
        if not writer.isOpened():
            raise OSError(f"OpenCV cannot write the video {str(path)!r}")
        for moment in moments:
            for name, attention in moment.heads.items():
                if attention is not None:
                    traces[name] = remember(traces.get(name), attention)
            if moment.bonus is not None:
                bonuses.append(moment.bonus)
            picture = compose(moment, traces, bonuses)
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        writer.release()
        # The writer says nothing of a full disk; then there is no index, and so no length.
        if cv2.VideoCapture(str(growing)).get(cv2.CAP_PROP_FRAME_COUNT) < 1:
            raise OSError(f"cannot write the video {str(path)!r} whole; is the disk full?")
        os.replace(growing, target)
    finally:
        writer.release()
        growing.unlink(missing_ok=True)


def remember(trace: Trace | None, attention: np.ndarray) -> Trace:
    """The trace after one more timestep, with attention [R, P]; None before the first one.

    It is divided by each component's mean, since gates scale the weights of a component (they sum
    to 1 only without gates) and at sharpness 1 the weights stay close to uniform: the deviations
    are what differs.
    """
    weights = attention / attention.mean(axis=1, keepdims=True).clip(1e-12) - 1
    spread, slot_use = _spread(weights), weights.mean(axis=0, keepdims=True)  # [1, P]
    if trace is not None:
        spread = max(spread, trace.spread)
        slot_use = np.concatenate([trace.slot_use, slot_use])[-HISTORY:]
    return Trace(weights, spread, slot_use)


def _spread(deviations: np.ndarray) -> float:
    return max(MIN_SPREAD, float(np.abs(deviations).max()))


# The picture.


class _Canvas:
    """A picture [height, width, 3], and the ways to draw on it."""

    def __init__(self, width: int, height: int) -> None:
        self.picture = np.full((height, width, 3), BACKGROUND, np.uint8)

    def fill(self, box: Box, colour: Colour = PLOT) -> None:
        self.picture[box.top : box.bottom, box.left : box.right] = colour

    def paste(self, box: Box, image: np.ndarray) -> None:
        """Put an image [height, width, 3] into a box; pixels are repeated or averaged."""
        # one direction after the other: a heat map may be wider than its box and lower than it
        for size in ((box.width, image.shape[0]), (box.width, box.height)):
            shrinks = size[0] < image.shape[1] or size[1] < image.shape[0]
            interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
            image = cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation)
        self.picture[box.top : box.bottom, box.left : box.right] = image

    def text(
        self,
        text: str,
        x: int,
        y: int,
        size: float = SMALL,
        colour: Colour = GREY,
        *,
        align: float = 0.0,
        room: float = math.inf,
    ) -> None:
        """Write a line of ASCII, shrunk to `room` pixels.

        `x` is its left end (align 0), centre (0.5) or right end (1), `y` its middle.
        """
        font = cv2.FONT_HERSHEY_SIMPLEX
        width, height = cv2.getTextSize(text, font, size, 1)[0]
        if width > room:
            size *= room / width
            width, height = cv2.getTextSize(text, font, size, 1)[0]
        start = (round(x - align * width), y + height // 2)
        cv2.putText(self.picture, text, start, font, size, colour, 1, cv2.LINE_AA)


def compose(
    moment: Moment, traces: Mapping[str, Trace], bonuses: Sequence[float] = ()
) -> np.ndarray:
    """The picture of one timestep, RGB uint8 [HEIGHT, WIDTH, 3].

    `traces`, by name of the head, and `bonuses`, of up to `HISTORY` timesteps, have the moment's
    own last; they are empty for heads without attention, and without a bonus.
    """
    canvas = _Canvas(WIDTH, HEIGHT)
    canvas.paste(game_box(moment.frame), moment.frame)
    if bonuses:
        _draw_bonus(canvas, bonuses)
    _draw_readouts(canvas, moment)
    _draw_actions(canvas, moment)
    for box, (name, attention) in zip(HEADS, moment.heads.items(), strict=True):
        canvas.text(name, box.left, box.top + 8, MEDIUM, WHITE)
        if attention is None:
            note = "no Neurocoder layer: no program slots to attend to"
            canvas.text(note, box.left, box.top + 32, room=box.width)
        else:
            _draw_head(canvas, box, traces[name])
    if traces:
        for line, note in enumerate(NOTES):
            canvas.text(note, LEGEND.left, LEGEND.top + 8 + 16 * line, room=LEGEND.width)
    return canvas.picture


def game_box(frame: np.ndarray) -> Box:
    """Where a frame [height, width, 3] is shown: as large as whole multiples allow, centred."""
    height, width = frame.shape[:2]
    scale = min(GAME.width / width, GAME.height / height)
    if scale > 1:
        scale = int(scale)  # equally large pixels
    shown_width, shown_height = round(width * scale), round(height * scale)
    left = GAME.left + (GAME.width - shown_width) // 2
    return Box(left, GAME.top + (GAME.height - shown_height) // 2, shown_width, shown_height)


def _draw_bonus(canvas: _Canvas, bonuses: Sequence[float]) -> None:
    """A bar for every timestep, the latest at the right; the largest one is as high as the plot."""
    canvas.fill(BONUS)
    largest = max(*bonuses, 1e-12)
    width = BONUS.width // HISTORY
    for age, bonus in enumerate(reversed(bonuses)):
        height = round(BONUS.height * max(bonus, 0.0) / largest)
        bar = Box(BONUS.right - (age + 1) * width, BONUS.bottom - height, width - 1, height)
        canvas.fill(bar, BAR if age else ACCENT)
    canvas.text(f"bonus: {bonuses[-1]:.3g}", BONUS.left, BONUS.top - 9)
    canvas.text(f"{largest:.3g}", BONUS.right, BONUS.top - 9, align=1.0)


def _draw_readouts(canvas: _Canvas, moment: Moment) -> None:
    score = moment.score
    readouts = {
        "score": f"{score:.0f}" if score == round(score) else f"{score:.2f}",
        "timestep": str(moment.timestep),
        "action": moment.action,
        "value": f"{moment.value:.3f}",
    }
    width = READOUTS.width // len(readouts)
    for column, (label, value) in enumerate(readouts.items()):
        left = READOUTS.left + column * width
        canvas.text(label, left, READOUTS.top + 8)
        colour = ACCENT if label == "action" else WHITE
        canvas.text(value, left, READOUTS.top + 34, LARGE, colour, room=width - 16)


def _draw_actions(canvas: _Canvas, moment: Moment) -> None:
    """A bar for every action; the likeliest one's is full, since many are small."""
    canvas.text("action probabilities", ACTIONS.left, ACTIONS.top + 8, MEDIUM, WHITE)
    columns = -(-len(moment.action_names) // ROWS_OF_ACTIONS)
    width = (ACTIONS.width + 24) // columns - 24
    likeliest = max(float(moment.probabilities.max()), 1e-12)
    for index, name in enumerate(moment.action_names):
        column, row = divmod(index, ROWS_OF_ACTIONS)
        left, top = ACTIONS.left + column * (width + 24), ACTIONS.top + 20 + 16 * row
        probability, taken = float(moment.probabilities[index]), name == moment.action
        canvas.text(name, left, top + 8, colour=ACCENT if taken else GREY, room=112)
        bar = Box(left + 120, top + 3, width - 120 - 48, 10)
        canvas.fill(bar)
        filled = round(bar.width * probability / likeliest)
        canvas.fill(bar._replace(width=filled), ACCENT if taken else BAR)
        canvas.text(f"{probability:.3f}", left + width, top + 8, align=1.0)


def _draw_head(canvas: _Canvas, box: Box, trace: Trace) -> None:
    num_components, num_slots = trace.weights.shape
    most_used = f"most attended slot: {trace.slot_use[-1].argmax() + 1}"
    canvas.text(most_used, box.right, box.top + 8, colour=WHITE, align=1.0)

    now = Box(box.left + 40, box.top + 44, box.width - 40, 105)
    low = max(-trace.spread, -1.0)  # no weight is negative
    image, ends = _colours(trace.weights, low, trace.spread), _multiples(low, trace.spread)
    _draw_map(canvas, now, "attention now", ends, image, ("component", num_components))
    _draw_columns_axis(canvas, now, "1", "slot", str(num_slots))

    use = trace.slot_use  # [T, P]
    recent = Box(now.left, now.bottom + 44, now.width, 160)
    high = _spread(use)
    low = max(-high, -1.0)
    image, ends = _colours(use, low, high), _multiples(low, high)
    image[np.arange(len(use)), use.argmax(axis=1)] = WHITE
    _draw_map(canvas, recent, "use of slots", ends, _strip(image), ("slot", num_slots))

    change = use - use.mean(axis=0)
    high = _spread(change)
    image, ends = _strip(_colours(change, -high, high)), (f"{-high:.3f}x", f"{high:+.3f}x")
    recent = recent._replace(top=recent.bottom + 26)
    _draw_map(canvas, recent, "change of use", ends, image, ("slot", num_slots))
    _draw_columns_axis(canvas, recent, f"-{HISTORY - 1}", "time (timesteps)", "now")


def _strip(colours: np.ndarray) -> np.ndarray:
    """Colours over time, [T, P, 3] -> [P, HISTORY, 3], the latest at the right end."""
    strip = np.full((colours.shape[1], HISTORY, 3), PLOT, np.uint8)
    strip[:, HISTORY - len(colours) :] = colours.swapaxes(0, 1)
    return strip


def _colours(deviations: np.ndarray, low: float, high: float) -> np.ndarray:
    """[...] -> [..., 3]: the palette from `low` < 0 to `high` > 0, with 0 in its middle."""
    position = 0.5 + 0.5 * np.where(deviations > 0, deviations / high, deviations / -low)
    return PALETTE[np.rint(255 * position.clip(0, 1)).astype(int)]


def _multiples(low: float, high: float) -> tuple[str, str]:
    """Deviations from uniform weights as multiples of these, such as 0.72x."""
    decimals = 3 if high < 0.1 else 2 if high < 10 else 0
    return f"{1 + low:.{decimals}f}x", f"{1 + high:.{decimals}f}x"


def _draw_map(
    canvas: _Canvas,
    plot: Box,
    title: str,
    ends: tuple[str, str],
    image: np.ndarray,
    rows: tuple[str, int],
) -> None:
    """A heat map below its title and colour scale; what its rows are stands upwards at the left."""
    canvas.paste(plot, image)
    canvas.text(title, plot.left, plot.top - 11)
    canvas.text(ends[1], plot.right, plot.top - 11, align=1.0)
    scale = Box(plot.right - 56 - 80, plot.top - 15, 80, 8)
    canvas.paste(scale, PALETTE[np.newaxis])
    canvas.text(ends[0], scale.left - 6, plot.top - 11, align=1.0)
    label, count = rows
    canvas.text("1", plot.left - 5, plot.top + 6, align=1.0)
    if count > 1:
        canvas.text(str(count), plot.left - 5, plot.bottom - 6, align=1.0)
    lying = _Canvas(plot.height, 16)
    lying.text(label, plot.height // 2, 8, align=0.5)
    canvas.paste(Box(plot.left - 40, plot.top, 16, plot.height), np.rot90(lying.picture))


def _draw_columns_axis(canvas: _Canvas, plot: Box, first: str, label: str, last: str) -> None:
    middle = plot.bottom + 10
    canvas.text(first, plot.left, middle)
    canvas.text(label, plot.left + plot.width // 2, middle, align=0.5)
    canvas.text(last, plot.right, middle, align=1.0)
