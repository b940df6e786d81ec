"""Videos of a game beside the attention over program slots with which the agent plays it.

Shapes: R components and P slots of a Neurocoder head, A actions. Pictures are RGB uint8 [H, W, 3].
Components and slots are numbered from 1 on the picture; component 1 has the largest singular value.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ncrl.neurocoder import NeurocoderLinear
from ncrl.sb3 import EnginePolicy, Latent

CODECS = {".mp4": "mp4v", ".webm": "VP90"}
"""Codecs by suffix; OpenCV's wheels hold no H.264 encoder.

FFmpeg prints that it does not support the tag VP90, and writes VP9 all the same.
"""

FPS = 15
"""Timesteps shown per second: a game of 60 frames per second in real time at 4 frames a step."""

WRITER_OPTIONS = "qmin;8|g;150"
"""Quantisation that leaves small text legible, and a whole picture every 10 seconds."""

HISTORY = 160
"""Timesteps that the strips of slots over time show."""

MIN_SPREAD = 0.001
"""Smallest end of a colour scale, so that uniform weights do not show their rounding errors."""


class HeadView(NamedTuple):
    """One output layer of the policy at one timestep."""

    name: str
    """What the head computes: `actor` or `critic`."""

    attention: np.ndarray | None
    """Attention weights of the memories u, v, s, [3, R, P]; None for other layers."""


class Moment(NamedTuple):
    """One timestep of a game: what was seen, and what the agent made of it."""

    frame: np.ndarray
    """Screen of the game, RGB uint8 [height, width, 3]."""

    score: float
    """Sum of the raw rewards of the game so far."""

    timestep: int
    """Timesteps since the start of the game."""

    action: str
    """Name of the action taken."""

    value: float
    """The critic's estimate of the return."""

    probabilities: np.ndarray
    """Probability of each action, [A]."""

    action_names: Sequence[str]
    """Names of the A actions."""

    heads: Sequence[HeadView]
    """At most two."""

    bonus: float | None = None
    """How new the learner finds what is seen, before any scaling; None without a bonus."""


class Trace(NamedTuple):
    """What the picture remembers of one head's attention; see `remember`."""

    weights: np.ndarray
    """The latest weights as deviations from uniform ones, [R, P]: 0 is uniform, 1 twice that."""

    spread: float
    """Largest deviation of all weights so far."""

    slot_use: np.ndarray
    """Mean of `weights` over components for up to `HISTORY` timesteps, [T, P], latest last."""


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


@torch.no_grad()
def view_heads(policy: EnginePolicy, latent: Latent) -> list[HeadView]:
    """Attention of the policy's actor and critic for one latent, [1, ...]."""
    extractor = policy.mlp_extractor
    return [
        _view_head("actor", policy.action_net, extractor.forward_actor(latent.actor)),
        _view_head("critic", policy.value_net, extractor.forward_critic(latent.critic)),
    ]


def _view_head(name: str, head: nn.Module, x: Tensor) -> HeadView:
    if not isinstance(head, NeurocoderLinear):
        return HeadView(name, None)
    return HeadView(name, torch.stack(head.attend(x)).squeeze(1).cpu().numpy())


def check_path(path: Path) -> None:
    """Refuse a video's path at once, rather than after hours of play.

    Raises:
        ValueError: if its suffix is none of `CODECS`.
        ValueError: if its folder does not exist or cannot be written to.
    """
    if path.suffix.lower() not in CODECS:
        raise ValueError(f"a video's name ends in {' or '.join(CODECS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write the video {str(path)!r}: its folder does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write the video {str(path)!r}")


class GameVideo:
    """A video file that grows by one picture per timestep, under another name until it is closed.

    Args:
        path: ends in `.mp4` or `.webm`; an existing file is replaced.
        fps: pictures, hence timesteps, per second.

    Raises:
        ValueError: for another suffix.
        OSError: if the file cannot be written.

    Example:
        >>> with GameVideo("game.mp4") as video:
        ...     video.add(moment)
    """

    def __init__(self, path: str | Path, fps: float = FPS) -> None:
        self.path = Path(path)
        check_path(self.path)
        self._target = self.path.resolve()  # a link stays one
        self._growing = self._target.with_name(f".{self.path.stem}.growing{self.path.suffix}")
        codec = cv2.VideoWriter.fourcc(*CODECS[self.path.suffix.lower()])
        with _writer_options():
            self._writer = cv2.VideoWriter(
                str(self._growing), cv2.CAP_FFMPEG, codec, fps, (WIDTH, HEIGHT)
            )
        if not self._writer.isOpened():
            raise OSError(f"OpenCV cannot write the video {str(path)!r}")
        self._traces: dict[str, Trace] = {}
        self._bonuses: deque[float] = deque(maxlen=HISTORY)

    def add(self, moment: Moment) -> None:
        """Append the picture of one timestep.

        Raises:
            ValueError: after `close`.
        """
        if not self._writer.isOpened():
            raise ValueError(f"the video {str(self.path)!r} is closed")
        for name, attention in moment.heads:
            if attention is not None:
                self._traces[name] = remember(self._traces.get(name), attention)
        if moment.bonus is not None:
            self._bonuses.append(moment.bonus)
        picture = compose(moment, self._traces, self._bonuses)
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Finish the file, which is then there under its name."""
        if self._writer.isOpened():
            self._writer.release()
            os.replace(self._growing, self._target)

    def __enter__(self) -> GameVideo:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._writer.release()
            self._growing.unlink(missing_ok=True)


@contextlib.contextmanager
def _writer_options() -> Iterator[None]:
    """OpenCV asks for hundreds of megabits per second, and takes other wishes from here alone."""
    name, before = "OPENCV_FFMPEG_WRITER_OPTIONS", os.environ.get("OPENCV_FFMPEG_WRITER_OPTIONS")
    os.environ[name] = before or WRITER_OPTIONS
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def remember(trace: Trace | None, attention: np.ndarray) -> Trace:
    """The trace after one more timestep, with attention [3, R, P]; None before the first one.

    Only the left vectors' attention (u) is kept. It is divided by each component's mean, since
    gates scale the weights of a component (they sum to 1 only without gates) and at sharpness 1
    the weights stay close to uniform: the deviations are what differs.
    """
    left = attention[0]  # [R, P]
    weights = left / left.mean(axis=1, keepdims=True).clip(1e-12) - 1
    spread, slot_use = _spread(weights), weights.mean(axis=0, keepdims=True)  # [1, P]
    if trace is not None:
        spread = max(spread, trace.spread)
        slot_use = np.concatenate([trace.slot_use, slot_use])[-HISTORY:]
    return Trace(weights, spread, slot_use)


def _spread(deviations: np.ndarray) -> float:
    return max(MIN_SPREAD, float(np.abs(deviations).max()))


def compose(
    moment: Moment, traces: Mapping[str, Trace], bonuses: Sequence[float] = ()
) -> np.ndarray:
    """The picture of one timestep, RGB uint8 [HEIGHT, WIDTH, 3].

    Args:
        moment: the timestep.
        traces: by name of the head, for heads with attention; the moment's own is the latest.
        bonuses: of up to `HISTORY` timesteps, the moment's own last; empty without a bonus.
    """
    picture = np.full((HEIGHT, WIDTH, 3), BACKGROUND, np.uint8)
    _draw_game(picture, moment.frame)
    if bonuses:
        _draw_bonus(picture, bonuses)
    _draw_readouts(picture, moment)
    _draw_actions(picture, moment)
    for box, (name, attention) in zip(HEADS, moment.heads, strict=False):
        if attention is None:
            _draw_plain_head(picture, box, name)
        else:
            _draw_head(picture, box, name, traces[name])
    if any(head.attention is not None for head in moment.heads):
        _draw_legend(picture)
    return picture


def game_box(frame: np.ndarray) -> Box:
    """Where a frame [height, width, 3] is shown: as large as whole multiples allow, centred."""
    height, width = frame.shape[:2]
    scale = min(GAME.width / width, GAME.height / height)
    if scale > 1:
        scale = int(scale)  # equally large pixels
    shown_width, shown_height = round(width * scale), round(height * scale)
    left = GAME.left + (GAME.width - shown_width) // 2
    return Box(left, GAME.top + (GAME.height - shown_height) // 2, shown_width, shown_height)


def _draw_game(picture: np.ndarray, frame: np.ndarray) -> None:
    _paste(picture, game_box(frame), frame)


def _draw_bonus(picture: np.ndarray, bonuses: Sequence[float]) -> None:
    """A bar for every timestep, the latest at the right; the largest one is as high as the plot."""
    _fill(picture, BONUS, PLOT)
    largest = max(*bonuses, 1e-12)
    width = BONUS.width // HISTORY
    for age, bonus in enumerate(reversed(bonuses)):
        height = round(BONUS.height * max(bonus, 0.0) / largest)
        left = BONUS.right - (age + 1) * width
        bar = Box(left, BONUS.bottom - height, width - 1, height)
        _fill(picture, bar, BAR if age else ACCENT)
    _text(picture, f"bonus: {bonuses[-1]:.3g}", (BONUS.left, BONUS.top - 9), SMALL, GREY)
    _text(picture, f"{largest:.3g}", (BONUS.right, BONUS.top - 9), SMALL, GREY, align=1.0)


def _draw_readouts(picture: np.ndarray, moment: Moment) -> None:
    readouts = {
        "score": _number(moment.score),
        "timestep": str(moment.timestep),
        "action": moment.action,
        "value": f"{moment.value:.3f}",
    }
    width = READOUTS.width // len(readouts)
    for column, (label, value) in enumerate(readouts.items()):
        left = READOUTS.left + column * width
        _text(picture, label, (left, READOUTS.top + 8), SMALL, GREY)
        colour = ACCENT if label == "action" else WHITE
        _text(picture, value, (left, READOUTS.top + 34), LARGE, colour, room=width - 16)


def _number(score: float) -> str:
    return f"{score:.0f}" if score == round(score) else f"{score:.2f}"


def _draw_actions(picture: np.ndarray, moment: Moment) -> None:
    _text(picture, "action probabilities", (ACTIONS.left, ACTIONS.top + 8), MEDIUM, WHITE)
    columns = -(-len(moment.action_names) // ROWS_OF_ACTIONS)
    width = (ACTIONS.width + 24) // columns - 24
    for index, name in enumerate(moment.action_names):
        column, row = divmod(index, ROWS_OF_ACTIONS)
        line = Box(ACTIONS.left + column * (width + 24), ACTIONS.top + 20 + 16 * row, width, 16)
        taken = name == moment.action
        _draw_action(picture, line, name, float(moment.probabilities[index]), taken=taken)


def _draw_action(
    picture: np.ndarray, line: Box, name: str, probability: float, *, taken: bool
) -> None:
    middle = line.top + line.height // 2
    colour = ACCENT if taken else GREY
    _text(picture, name, (line.left, middle), SMALL, colour, room=112)
    bar = Box(line.left + 120, line.top + 3, line.width - 120 - 48, line.height - 6)
    _fill(picture, bar, PLOT)
    filled = round(bar.width * min(max(probability, 0.0), 1.0))
    _fill(picture, bar._replace(width=filled), ACCENT if taken else BAR)
    _text(picture, f"{probability:.3f}", (line.right, middle), SMALL, colour, align=1.0)


def _draw_plain_head(picture: np.ndarray, box: Box, name: str) -> None:
    _text(picture, name, (box.left, box.top + 8), MEDIUM, WHITE)
    note = "no Neurocoder layer: no program slots to attend to"
    _text(picture, note, (box.left, box.top + 32), SMALL, GREY, room=box.width)


def _draw_head(picture: np.ndarray, box: Box, name: str, trace: Trace) -> None:
    num_components, num_slots = trace.weights.shape
    most_used = f"most attended slot: {trace.slot_use[-1].argmax() + 1}"
    _text(picture, name, (box.left, box.top + 8), MEDIUM, WHITE)
    _text(picture, most_used, (box.right, box.top + 8), SMALL, WHITE, align=1.0)

    now = Box(box.left + 40, box.top + 44, box.width - 40, 105)
    low = max(-trace.spread, -1.0)  # no weight is negative
    _draw_title(picture, now, "attention now", _multiples(low, trace.spread))
    _paste(picture, now, _colours(trace.weights, low, trace.spread))
    _draw_rows_axis(picture, now, "component", num_components)
    _draw_columns_axis(picture, now, "1", "slot", str(num_slots))

    use = trace.slot_use  # [T, P]
    recent = Box(now.left, now.bottom + 44, now.width, 160)
    high = _spread(use)
    low = max(-high, -1.0)
    colours = _colours(use, low, high)
    colours[np.arange(len(use)), use.argmax(axis=1)] = WHITE
    _draw_title(picture, recent, "use of slots", _multiples(low, high))
    _paste(picture, recent, _strip(colours))
    _draw_rows_axis(picture, recent, "slot", num_slots)

    change = use - use.mean(axis=0)
    high = _spread(change)
    recent = recent._replace(top=recent.bottom + 26)
    _draw_title(picture, recent, "change of use", (f"{-high:.3f}x", f"{high:+.3f}x"))
    _paste(picture, recent, _strip(_colours(change, -high, high)))
    _draw_rows_axis(picture, recent, "slot", num_slots)
    _draw_columns_axis(picture, recent, f"-{HISTORY - 1}", "time (timesteps)", "now")


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


def _draw_title(picture: np.ndarray, plot: Box, title: str, ends: tuple[str, str]) -> None:
    """Title above a plot, and its colour scale between the numbers at its ends."""
    middle = plot.top - 11
    _text(picture, title, (plot.left, middle), SMALL, GREY)
    _text(picture, ends[1], (plot.right, middle), SMALL, GREY, align=1.0)
    bar = Box(plot.right - 56 - 80, middle - 4, 80, 8)
    _paste(picture, bar, PALETTE[np.newaxis])
    _text(picture, ends[0], (bar.left - 6, middle), SMALL, GREY, align=1.0)


def _draw_rows_axis(picture: np.ndarray, plot: Box, label: str, count: int) -> None:
    """Numbers of the first and last row left of a plot, and what the rows are, upwards."""
    _text(picture, "1", (plot.left - 5, plot.top + 6), SMALL, GREY, align=1.0)
    if count > 1:
        _text(picture, str(count), (plot.left - 5, plot.bottom - 6), SMALL, GREY, align=1.0)
    upwards = np.full((plot.height, 16, 3), BACKGROUND, np.uint8)
    lying = np.ascontiguousarray(np.rot90(upwards, -1))  # [16, height, 3]
    _text(lying, label, (plot.height // 2, 8), SMALL, GREY, align=0.5)
    _paste(picture, Box(plot.left - 40, plot.top, 16, plot.height), np.rot90(lying))


def _draw_columns_axis(picture: np.ndarray, plot: Box, first: str, label: str, last: str) -> None:
    middle = plot.bottom + 10
    _text(picture, first, (plot.left, middle), SMALL, GREY)
    _text(picture, label, (plot.left + plot.width // 2, middle), SMALL, GREY, align=0.5)
    _text(picture, last, (plot.right, middle), SMALL, GREY, align=1.0)


def _draw_legend(picture: np.ndarray) -> None:
    notes = (
        "Left vectors' weights (u) as multiples of uniform ones; strips: mean over components. "
        "White: most attended slot.",
        "Scales are centred on uniform weights, or on the mean over the strip for the change; "
        "they end at the largest deviation.",
    )
    for line, note in enumerate(notes):
        at = (LEGEND.left, LEGEND.top + 8 + 16 * line)
        _text(picture, note, at, SMALL, GREY, room=LEGEND.width)


def _text(
    picture: np.ndarray,
    text: str,
    at: tuple[int, int],
    size: float,
    colour: tuple[int, int, int],
    *,
    align: float = 0.0,
    room: int | None = None,
) -> None:
    """Write one line.

    Args:
        picture: changed in place.
        text: ASCII.
        at: x of the left end (align 0), centre (0.5) or right end (1), and y of the middle.
        size: OpenCV's font scale.
        colour: RGB.
        align: see `at`.
        room: width in pixels that the text is shrunk to if it is longer.
    """
    font = cv2.FONT_HERSHEY_SIMPLEX
    width, height = cv2.getTextSize(text, font, size, 1)[0]
    if room is not None and width > room:
        size *= room / width
        width, height = cv2.getTextSize(text, font, size, 1)[0]
    start = (round(at[0] - align * width), at[1] + height // 2)
    cv2.putText(picture, text, start, font, size, colour, 1, cv2.LINE_AA)


def _fill(picture: np.ndarray, box: Box, colour: tuple[int, int, int]) -> None:
    picture[box.top : box.bottom, box.left : box.right] = colour


def _paste(picture: np.ndarray, box: Box, image: np.ndarray) -> None:
    """Put an image [height, width, 3] into a box: pixels are repeated or averaged, not blurred."""
    # one direction after the other: a heat map may be wider than its box and lower than it
    for size in ((box.width, image.shape[0]), (box.width, box.height)):
        shrinks = size[0] < image.shape[1] or size[1] < image.shape[0]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation)
    picture[box.top : box.bottom, box.left : box.right] = image
