"""`benchmarks/atari_figure3.py`: what it starts, skips and goes on with, its table and figure."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from benchmarks import atari_figure3
from benchmarks.atari_figure3 import (
    Cell,
    Curve,
    frames_of,
    main,
    make_table,
    mean_curve,
    play,
    read_curve,
)
from ncrl.agents.atari.config import RunConfig
from tests.agents.conftest import (  # noqa: F401 - fixtures for all tests of this file
    nothing_left_behind,
    wait_until,
    watchdog,
)

SCRIPT = Path(atari_figure3.__file__)
HEADER = "time/frames,rollout/ep_rew_mean,time/total_timesteps\n"


def make_run(
    logdir: Path, cell: Cell, *, played: int = 0, rows: str = "", number: int = 1, **settings: Any
) -> Path:
    """A run directory as run_atari.py leaves it, after `played` frames."""
    run = cell.run(logdir).with_name(f"{cell.game}-{number}")
    run.mkdir(parents=True)
    config = RunConfig(env=cell.game, layer=cell.layer, seed=cell.seed, games=16, **settings)
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (run / "progress.csv").write_text(HEADER + rows)
    (run / "played").write_text(str(played))
    return run


CELL = Cell("Seaquest", "linear", 0)


# What is played, and by which commands.


def test_the_newest_run_counts(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint leaves a folder behind."""
    assert frames_of(CELL.run(tmp_path)) == 0
    for number in (2, 10):
        made = make_run(tmp_path, CELL, number=number)
        assert CELL.run(tmp_path) == made and frames_of(made) == 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands, in place of which another one runs: it succeeds, but for seed 5. What a run has
    played is in a file."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str]) -> Any:
        commands.append(command[2:])
        return popen(["false" if "5" in command else "true"])

    def frames(run: Path) -> int:
        return int((run / "played").read_text()) if run.is_dir() else 0

    monkeypatch.setattr(atari_figure3.subprocess, "Popen", start)
    monkeypatch.setattr(atari_figure3, "frames_of", frames)
    return commands


def test_commands_of_new_interrupted_and_finished_cells(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture
) -> None:
    made = make_run(tmp_path, Cell("Pong", "linear", 1), played=400, gamma=0.9)
    make_run(tmp_path, Cell("Pong", "linear", 2), played=800, gamma=0.9)
    (tmp_path / "more.yaml").write_text("gamma: 0.9\nenv: Breakout\n")
    flags = f"--games pong Pong --layers linear --seeds 0 1 2 5 --frames 800 --logdir {tmp_path}"
    rest = f"--config {tmp_path / 'more.yaml'} --workers 0 --no-stop-on-save-error"
    assert main([*flags.split(), "--", *rest.split()]) == 1
    kept = "--workers 0 --no-stop-on-save-error"
    folder = tmp_path / "Pong-linear-seed"
    assert [" ".join(command) for command in started] == [
        f"--frames 800 {rest} --env Pong --layer linear --seed 0 --logdir {folder}0",
        f"--frames 800 {kept} --resume {made}",
        f"--frames 800 {rest} --env Pong --layer linear --seed 5 --logdir {folder}5",
    ]
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "seed=5" in errors and "exit code 1" in errors
    assert (tmp_path / "figure3.png").is_file()


REFUSED = {
    "--games Seaqest": ["Seaqest", "nearest: Seaquest"],
    "--layers hypernetwork": ["hypernetwork", "linear, neurocoder", "nearest: hypernet"],
    "--seeds x": ["--seeds", "'x'", "int"],
    "--seeds -1": ["seed", "-1"],
    "--frames 0": ["frames", "0", "1 .. 1e+12"],
    "--game Pong": ["--game", "nearest: --games"],
    "--logdir file/runs": ["file/runs"],
    "-- --learning-rat 1": ["--learning-rat", "nearest: --learning-rate"],
    "-- --gamma 2": ["gamma", "2", "0 .. 1"],
    "-- --seed 3": ["--seed", "other than env, layer, seed"],
    "-- --resume runs/Pong-1": ["--resume", "settings of runs"],
    "-- --video out.mp4": ["--video"],
    "-- --config absent.yaml": ["absent.yaml"],
    "-- --device cuda": ["cuda", "use cpu"],
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line(
    arguments: str,
    tmp_path: Path,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    output = capsys.readouterr()
    assert error.value.code == 2 and output.out == "" and not started
    assert re.fullmatch(r"atari_figure3\.py: .*\n", output.err), output.err
    for word in REFUSED[arguments]:
        assert word in output.err, (word, output.err)
    assert sorted(tmp_path.rglob("*")) == before


# Table and figure.


BLUE, ORANGE = (0xB4, 0x77, 0x1F), (0x0E, 0x7F, 0xFF)
"""Matplotlib's C0 (`linear`) and C1 (`neurocoder`), as BGR. Axes alone have neither."""


def count(image: np.ndarray | None, color: tuple[int, int, int]) -> int:
    """Pixels of exactly that colour."""
    assert image is not None
    return int((image == color).all(axis=-1).sum())


def test_a_curve_leaves_out_what_is_no_score(tmp_path: Path) -> None:
    rows = "400,,100\n800,1.5,200\n1200,nan,300\n1600,2.5,400\n1600,2.5,400\n20"
    run = make_run(tmp_path, CELL, rows=rows)
    assert read_curve(run) == Curve((800, 1600), (1.5, 2.5))
    assert read_curve(tmp_path) is None


def test_the_mean_curve_covers_what_all_seeds_have() -> None:
    one, two = Curve([100, 300], [0, 4]), Curve([200, 400], [4, 4])
    frames, mean, spread = mean_curve([one, two])
    assert (frames[0], frames[-1]) == (200, 300)
    assert mean[0] == pytest.approx((2 + 4) / 2) and mean[-1] == pytest.approx(4)
    assert spread[0] == pytest.approx(2**0.5), "deviations of 1 and 1, divided by 2 - 1"
    assert mean_curve([one])[2].tolist() == [0] * len(frames)
    late = Curve([301], [0])
    assert [part.tolist() for part in mean_curve([one, late])] == [[], [], []]


def test_the_numbers_of_the_table() -> None:
    ends = {0: (800, 100.0), 1: (800, 200.0), 2: (400, 600.0)}
    seeds = {seed: Curve([200, frames], [9.0, score]) for seed, (frames, score) in ends.items()}
    montezuma = {7: Curve([4_000_000], [0.0])}
    curves = {("Seaquest", "linear"): seeds, ("MontezumaRevenge", "neurocoder"): montezuma}
    lines = make_table({**curves, ("MontezumaRevenge", "hypernet"): {}}, []).splitlines()
    # Mean 300; deviations -200, -100, 300; 140,000 / 2; root 264.575
    assert (
        "| Seaquest | linear | 0 1 2 | 400 to 800 | 300.00 +- 264.58 | 100.00 | 600.00 |" in lines
    )
    row = "| MontezumaRevenge | neurocoder | 7 | 4,000,000 | 0.00 (one seed) | 0.00 | 0.00 |"
    assert row in lines
    assert "| MontezumaRevenge | hypernet | none | 0 | no game finished |  |  |" in lines


def test_table_and_figure_of_what_is_there(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture
) -> None:
    for seed in (0, 1):
        rows = f"400,{seed},100\n800,{seed + 9},200\n"
        make_run(tmp_path, Cell("Seaquest", "neurocoder", seed), played=800, rows=rows)
    pacman = Cell("MsPacman", "linear", 0)
    make_run(tmp_path, pacman, rows="400,60,100\n800,90,200\n", protocol="classic")
    make_run(tmp_path, Cell("Frostbite", "linear", 0))
    flags = (
        "--games MsPacman Frostbite Seaquest --layers linear neurocoder --seeds 0 1 --frames 800"
    )
    assert main([*flags.split(), "--logdir", str(tmp_path)]) == 0
    assert len(started) == 10, "two of the twelve are there"
    table = (tmp_path / "figure3.md").read_text()
    assert table in capsys.readouterr().out
    assert "| Seaquest | neurocoder | 0 1 | 800 | 9.50 +- 0.71 | 9.00 | 10.00 |" in table
    assert "| Frostbite | linear | none | 0 | no game finished |  |  |" in table
    assert "protocol classic, encoder a3c, stack 1; protocol machado, encoder a3c" in table
    image = cv2.imread(str(tmp_path / "figure3.png"))
    assert image is not None and min(image.shape[:2]) > 300
    half_height, half_width = image.shape[0] // 2, image.shape[1] // 2
    pacman_panel, frostbite = image[:half_height, :half_width], image[:half_height, half_width:]
    seaquest = image[half_height:, :half_width]
    assert count(seaquest, ORANGE) > 200 and count(seaquest, BLUE) == 0
    assert count(pacman_panel, BLUE) > 200 and count(pacman_panel, ORANGE) == 0
    band = np.array(ORANGE) * 0.2 + 255 * 0.8
    near = (np.abs(seaquest - band) <= 2).all(axis=-1)
    assert near.sum() > 1000, "the band of the spread"
    assert frostbite.std() > 0 and count(frostbite, BLUE) == 0


# The real thing.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_is_interrupted_and_resumed(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    small = ["--device", "cpu", "--workers", "0", "--envs-per-worker", "4", "--n-steps", "10"]
    small += ["--lstm-hidden-size", "16", "--log-every", "1"]
    cell = Cell("Klax", "linear", 0)

    def arguments(frames: int) -> list[str]:
        own = ["--games", "klax", "--layers", "linear", "--logdir", str(tmp_path)]
        return [*own, "--frames", str(frames), "--", *small]

    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(100_000_000)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        curve = cell.run(tmp_path) / "progress.csv"
        ready = wait_until(
            lambda: (
                process.poll() is not None
                or (curve.is_file() and curve.read_text().count("\n") > 3)
            ),
            60,
        )
        assert ready and process.poll() is None, process.communicate()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()
    frames = frames_of(cell.run(tmp_path))
    assert process.returncode == 128 + number, output
    assert errors.count("\n") == 1 and f"ended with exit code {128 + number}" in errors
    assert frames > 0 and "stopped; the same command goes on" in output
    if number == signal.SIGTERM:
        return

    total = frames + 2400
    assert main(arguments(total)) == 0
    output = capfd.readouterr().out
    assert f"from {frames:,} to {total:,} frames" in output
    assert frames_of(cell.run(tmp_path)) == total
    after = read_curve(cell.run(tmp_path))
    assert after is not None and after.frames[-1] == total
    assert re.search(rf"^\| Klax \| linear \| 0 \| {total:,} \| \d", output, re.MULTILINE)
    assert [path.name for path in cell.run(tmp_path).parent.iterdir()] == ["Klax-1"]
    assert count(cv2.imread(str(tmp_path / "figure3.png")), BLUE) > 100

    assert main(arguments(total)) == 0, "nothing is left to play"
    assert "to {total:,} frames" not in capfd.readouterr().out
    assert play(cell, total, tmp_path, []) == 0
