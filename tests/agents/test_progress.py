"""What a run shows: a bar in a terminal, plain lines anywhere else, nothing to a closed stream."""

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.callbacks import BaseCallback

import ncrl.agents.runs.progress
from ncrl.agents import A3C
from ncrl.agents.runs.progress import Progress, Screen
from tests.agents.environments import TickingFactory

ROOT = Path(__file__).parents[2]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train(screen: Screen, total_frames: int = 40, *before: BaseCallback) -> A3C:
    """Games of 5 timesteps with rewards 1 to 5, 6 to 10, ... in each of 2 environments."""
    model = A3C(
        "MlpLstmPolicy",
        TickingFactory(length=5),
        n_workers=0,
        n_envs=2,
        n_steps=5,
        seed=1,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 8},
    )
    return model.learn(40, callback=[*before, Progress(total_frames, screen)])


def lines_of_training(total_frames: int = 40, *before: BaseCallback) -> list[str]:
    """What is shown where there is no terminal."""
    stream = io.StringIO()
    train(Screen(stream), total_frames, *before)
    text = stream.getvalue()
    assert not CONTROL.search(text) and text.isascii()
    return text.splitlines()


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncrl.agents.runs.progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(ncrl.agents.runs.progress, "BAR_SECONDS", 0.0)


@pytest.mark.usefixtures("every_step")
def test_plain_lines_when_not_in_a_terminal() -> None:
    lines = lines_of_training()
    assert len(lines) == 21, "one for each row of 2 timesteps and one at the end"
    for number, line in enumerate(lines[:20], start=1):
        assert re.match(rf"{2 * number} / 40 frames, [\d,]+ frames/s, ", line), line
        assert re.search(r"policy lag 0\.0", line), line
    assert "no game finished yet" in lines[0]
    # The games of both environments have scores 15, 40, 65 and 90.
    assert "score 52.50 (8 games)" in lines[-1]
    assert lines[-1].startswith("40 / 40 frames")


def test_lines_are_rare() -> None:
    assert len(lines_of_training()) <= 1 + 40 / ncrl.agents.runs.progress.LINE_SECONDS


@pytest.mark.usefixtures("every_step")
def test_frames_do_not_exceed_the_total() -> None:
    assert lines_of_training(39)[-1].startswith("39 / 39 frames")


@pytest.mark.usefixtures("every_step")
def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    train(Screen(stream))
    text = stream.getvalue()
    assert "\r" in text and "100%" in text and "score 52.50 (8 games)" in text
    assert re.search(r", starting *\r", text), "told before anything is played"
    assert text.endswith("\n"), "what is printed next starts on its own line"


@pytest.mark.usefixtures("every_step")
def test_the_bar_stays_on_one_line_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        train(Screen(stream))
        os.set_blocking(ours, False)
        parts = []  # a terminal hands out so much at a time
        with contextlib.suppress(BlockingIOError):
            while True:
                parts.append(os.read(ours, 1 << 20))
        text = b"".join(parts).decode()
    os.close(ours)
    assert text.count("\n") == 1 and "\u2588" in text
    pictures = [part for part in re.split(r"[\r\n]+", text) if part]
    assert len(pictures) > 5 and max(map(len, pictures)) <= 80
    assert "score 52.50" in pictures[-1]


class Clock(BaseCallback):
    """Ahead of each row of the first rollout 100 seconds pass, of all others 2."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def _on_step(self) -> bool:
        self.now += 100 if self.n_calls <= 5 else 2
        return True


@pytest.mark.usefixtures("every_step")
def test_speed_and_time_left_are_those_of_all_rollouts_but_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2 frames a row: one frame a second, and as many seconds left as frames."""
    clock = Clock()
    monkeypatch.setattr(ncrl.agents.runs.progress, "time", clock)
    lines = lines_of_training(40, clock)
    assert all(" 0 frames/s, " in line and line.endswith("starting") for line in lines[:5])
    assert all(line.endswith(" left") for line in lines[5:])
    for row, line in enumerate(lines[5:20], start=6):
        assert " 1 frames/s, " in line and line.endswith(f", 00:{40 - 2 * row:02} left"), line


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("term", ["dumb", None])
def test_f24_a_terminal_that_cannot_redraw(
    term: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    stream = Terminal()
    train(Screen(stream))
    assert stream.getvalue().count("\n") == 21 and not CONTROL.search(stream.getvalue())


def broken_pipe() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_stream() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "the reader has gone": broken_pipe,
    "closed": closed_stream,
    "absent, as sys.stdout of a process without one": lambda: None,
}


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_f24_training_goes_on_without_a_reader(make: Callable[[], Any]) -> None:
    stream = make()
    screen = Screen(stream)
    screen.line("first")
    assert train(screen).num_timesteps == 40
    screen.line("last")
    assert not screen.open
    with contextlib.suppress(OSError, AttributeError):
        stream.close()


def test_f24_a_bar_whose_terminal_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(ncrl.agents.runs.progress, "BAR_SECONDS", 0.0)

    class HungUp(Terminal):
        def write(self, text: str) -> int:
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().write(text)

    screen = Screen(HungUp())
    assert train(screen).num_timesteps == 40
    assert not screen.open


def test_nothing_is_written_after_the_first_failure() -> None:
    class Broken(io.StringIO):
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            raise BrokenPipeError

    stream = Broken()
    screen = Screen(stream)
    for _ in range(3):
        screen.line("text")
    assert stream.calls == 1


def test_f24_the_interpreter_ends_silently_without_a_reader() -> None:
    """It flushes stdout once more when it ends."""
    code = "import sys; from ncrl.agents.runs.progress import Screen; s = Screen(sys.stdout); "
    code += "sys.stdin.readline(); [s.line('x' * 100) for _ in range(5)]"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0 and errors == b""
