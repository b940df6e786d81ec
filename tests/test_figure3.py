"""`benchmarks/atari_figure3.py`: what it starts, skips and goes on with, its table and figure."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from benchmarks import atari_figure3
from benchmarks.atari_figure3 import (
    Cell,
    Curve,
    Found,
    Job,
    StopSignals,
    find_run,
    main,
    make_table,
    mean_curve,
    prepare,
    read_curve,
    run_jobs,
)
from ncrl.agents.atari.config import RunConfig, canonical, with_bonus, with_sizes
from ncrl.agents.runs.checkpoints import COUNTERS, STATE
from ncrl.agents.runs.directory import RunDirectory
from ncrl.shell.tensors import with_checksum
from tests.agents.conftest import (  # noqa: F401 - fixtures for all tests of this file
    nothing_left_behind,
    wait_until,
    watchdog,
)

SCRIPT = Path(atari_figure3.__file__)
HEADER = "time/frames,rollout/ep_rew_mean,time/total_timesteps\n"


def make_run(
    logdir: Path,
    cell: Cell,
    *,
    checkpoints: tuple[int, ...] = (),
    rows: str = "",
    number: int = 1,
    **settings: Any,
) -> Path:
    """A run directory as run_atari.py leaves it; `checkpoints` in frames."""
    run = cell.folder(logdir) / f"{cell.game}-{number}"
    (run / "checkpoints").mkdir(parents=True)
    config = RunConfig(env=cell.game, layer=cell.layer, seed=cell.seed, **settings)
    (run / "config.yaml").write_text(
        yaml.safe_dump(asdict(with_sizes(with_bonus(canonical(config)))))
    )
    (run / "progress.csv").write_text(HEADER + rows)
    for frames in checkpoints:
        stem = f"step_{frames // 4:012d}"
        buffer, state = io.BytesIO(), io.BytesIO()
        counters = dict.fromkeys(COUNTERS, 0) | {"num_timesteps": frames // 4}
        torch.save({"counters": counters}, state)
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(STATE, state.getvalue())
        (run / "checkpoints" / f"{stem}.zip").write_bytes(with_checksum(buffer.getvalue()))
    return run


CELL = Cell("Seaquest", "linear", 0)


# States of cells, and the commands that follow from them.


def test_a_cell_without_a_whole_checkpoint_is_new(tmp_path: Path) -> None:
    folder = CELL.folder(tmp_path)
    assert find_run(folder, "Seaquest", 800) == Found("new", 0, None)
    run = make_run(tmp_path, CELL)
    assert find_run(folder, "Seaquest", 800) == Found("new", 0, None)
    (run / "config.yaml").unlink()
    assert find_run(folder, "Seaquest", 800).state == "new"


def test_interrupted_and_finished_cells(tmp_path: Path) -> None:
    folder = CELL.folder(tmp_path)
    run = make_run(tmp_path, CELL, checkpoints=(400, 800))
    assert find_run(folder, "Seaquest", 800) == Found("finished", 800, run)
    assert find_run(folder, "Seaquest", 801) == Found("interrupted", 800, run)
    (run / "checkpoints" / f"step_{200:012d}.zip").write_text("damaged")
    assert find_run(folder, "Seaquest", 800) == Found("interrupted", 400, run)


def test_the_run_that_got_furthest_counts(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint leaves a folder behind."""
    make_run(tmp_path, CELL, number=1)
    made = make_run(tmp_path, CELL, number=2, checkpoints=(800,))
    make_run(tmp_path, CELL, number=10)
    assert find_run(CELL.folder(tmp_path), "Seaquest", 1000) == Found("interrupted", 800, made)


def test_commands_of_new_interrupted_and_finished_cells(tmp_path: Path) -> None:
    made = make_run(tmp_path, Cell("Pong", "linear", 1), checkpoints=(400,), gamma=0.9)
    make_run(tmp_path, Cell("Pong", "linear", 2), checkpoints=(800,), gamma=0.9)
    (tmp_path / "more.yaml").write_text("gamma: 0.9\nenv: Breakout\n")
    flags = {"games": ["pong", "Pong"], "layers": ["linear"], "seeds": [0, 1, 2], "frames": 800}
    rest = ["--config", str(tmp_path / "more.yaml"), "--workers", "0", "--no-stop-on-save-error"]
    cells, jobs = prepare(flags, rest, tmp_path)
    assert cells == [Cell("Pong", "linear", seed) for seed in (0, 1, 2)]
    first, second = ([*job.command[2:]] for job in jobs)
    shared = {"--frames=800", "--workers=0", "--no-stop-on-save-error"}
    assert set(first) == shared | {
        *("--env=Pong", "--layer=linear", "--seed=0", f"--config={tmp_path / 'more.yaml'}"),
        f"--logdir={tmp_path / 'Pong-linear-seed0'}",
    }
    assert set(second) == shared | {f"--resume={made}"}


# What makes no sense is refused in one line, before anything is started or written.


REFUSED = {
    "--games Seaqest": ["Seaqest", "nearest: Seaquest"],
    "--layers hypernetwork": ["hypernetwork", "linear, neurocoder", "nearest: hypernet"],
    "--seeds x": ["--seeds", "'x'", "int"],
    "--seeds -1": ["seed", "-1"],
    "--seeds": ["--seeds"],
    "--frames 0": ["frames", "0", "1 .. 1e+12"],
    "--frames 4e6": ["--frames", "4e6", "int"],
    "--parallel 0": ["parallel", "at least 1", "got 0", "nearest: 1"],
    "--game Pong": ["--game", "nearest: --games"],
    "--logdir file/runs": ["file/runs"],
    "--logdir file": ["file"],
    "-- --learning-rat 1": ["--learning-rat", "nearest: --learning-rate"],
    "-- --gamma 2": ["gamma", "2", "0 .. 1"],
    "-- --seed 3": ["--seed", "nearest: --seeds"],
    "-- --resume runs/Pong-1": ["--resume", "automatic"],
    "-- --video out.mp4": ["--video"],
    "-- --config absent.yaml": ["absent.yaml"],
    "-- --device cuda": ["cuda", "use cpu"],
    "--logdir there --games Seaquest --layers linear -- --gamma 0.8": [
        *("gamma is 0.8", "0.99", "nearest: 0.99", "Seaquest-1"),
    ],
    "--logdir empty --figure-only": ["empty", "GAME-LAYER-seedN", "nothing"],
    "--logdir there --figure-only --seeds 5": ["there", "Seaquest linear seed 0"],
    "--logdir there --figure-only --layers linea": ["linea", "nearest: linear"],
    "--logdir there --figure-only --games Seaqest": ["Seaqest", "nearest: Seaquest"],
    "--logdir there --figure-only -- --workers 2": ["--figure-only", "--workers"],
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input_is_refused_in_one_line(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def too_late(*_arguments: Any) -> Any:
        raise AssertionError("refused too late")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atari_figure3, "start", too_late)
    monkeypatch.setattr(atari_figure3, "report", too_late)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("")
    make_run(tmp_path / "there", CELL, checkpoints=(400,))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    output = capsys.readouterr()
    assert error.value.code == 2 and output.out == ""
    assert re.fullmatch(r"atari_figure3\.py: .*\n", output.err), output.err
    for word in REFUSED[arguments]:
        assert word in output.err, (word, output.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path, CELL)
    flags = ["--logdir", str(tmp_path), "--games", "Seaquest", "--layers", "linear"]
    with RunDirectory.open(run), pytest.raises(SystemExit) as error:
        main(flags)
    assert error.value.code == 2
    assert "Seaquest-1 is in use by another process" in capsys.readouterr().err


# Playing, with small commands in the place of run_atari.py.


def make_job(logdir: Path, seed: int, code: str) -> Job:
    cell = Cell("Seaquest", "linear", seed)
    config = RunConfig(env="Seaquest", frames=800)
    command = [sys.executable, "-S", "-c", code]
    return Job(cell, cell.folder(logdir), config, command, Found("new", 0, None))


def test_a_failed_cell_is_reported_and_the_next_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_run(tmp_path, Cell("Seaquest", "linear", 1), checkpoints=(800,))
    jobs = [
        make_job(tmp_path, 0, "print('first'); raise SystemExit('no more memory')"),
        make_job(tmp_path, 1, ""),
        make_job(tmp_path, 2, ""),  # ends well, and has written nothing
    ]
    with StopSignals() as signals:
        failed = run_jobs(jobs, 1, signals)
    assert failed == [
        "Seaquest linear seed 0 failed (exit 1, 0 frames saved): no more memory",
        "Seaquest linear seed 2 failed (exit 0, 0 frames saved): no output",
    ]
    assert "Seaquest linear seed 1: finished, 800 frames" in capsys.readouterr().out
    assert (jobs[0].folder / "output.txt").read_text() == "first\nno more memory\n"


def test_the_exit_code_of_a_failure_is_1_and_the_rest_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    make_run(tmp_path, CELL, checkpoints=(800,), rows="400,1,100\n800,3,200\n")
    monkeypatch.setattr(atari_figure3, "run_jobs", lambda *_: ["Seaquest linear seed 1 failed"])
    flags = "--games Seaquest --layers linear --seeds 0 1 --frames 800 --logdir"
    assert main([*flags.split(), str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.err == "atari_figure3.py: Seaquest linear seed 1 failed\n"
    assert "| Seaquest | linear | 0 | 800 | 3.00 (one seed) | 3.00 | 3.00 |" in output.out
    assert (tmp_path / "figure3.png").is_file()


OBEDIENT = """
import signal, sys
def stop(number, _frame):
    print("signal", number, flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_those_that_run_once_and_no_other_starts(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jobs = [make_job(tmp_path, seed, OBEDIENT) for seed in range(3)]
    outputs = [job.folder / "output.txt" for job in jobs]

    def interrupt() -> None:
        wait_until(lambda: all(p.is_file() and p.read_text() == "ready\n" for p in outputs[:2]))
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    with StopSignals() as signals:
        thread.start()
        failed = run_jobs(jobs, 2, signals)
    thread.join()
    assert failed == [] and signals.exit_code == 128 + number
    assert [p.read_text() for p in outputs[:2]] == [f"ready\nsignal {int(number)}\n"] * 2
    assert not jobs[2].folder.exists()
    assert capsys.readouterr().out.count("stopped at 0 frames") == 2
    assert signal.getsignal(number) == before


# Table and figure.


BLUE, ORANGE = (0xB4, 0x77, 0x1F), (0x0E, 0x7F, 0xFF)
"""Matplotlib's C0 (`linear`) and C1 (`neurocoder`), as BGR. Axes alone have neither."""


def count(image: np.ndarray | None, color: tuple[int, int, int]) -> int:
    """Pixels of exactly that colour."""
    assert image is not None
    return int((image == color).all(axis=-1).sum())


def test_a_curve_leaves_out_what_is_no_score(tmp_path: Path) -> None:
    rows = "400,,100\n800,1.5,200\n1200,nan,300\n1600,2.5,400\n1600,2.5,400\n20"
    make_run(tmp_path, CELL, rows=rows)
    curve = read_curve(tmp_path, CELL)
    assert curve is not None
    assert curve.frames.tolist() == [800, 1600] and curve.scores.tolist() == [1.5, 2.5]
    assert read_curve(tmp_path, Cell("Seaquest", "linear", 1)) is None


def test_the_mean_curve_covers_what_all_seeds_have() -> None:
    one = Curve(np.array([100.0, 300.0]), np.array([0.0, 4.0]))
    two = Curve(np.array([200.0, 400.0]), np.array([4.0, 4.0]))
    frames, mean, spread = mean_curve([one, two])
    assert (frames[0], frames[-1]) == (200, 300)
    assert mean[0] == pytest.approx((2 + 4) / 2) and mean[-1] == pytest.approx(4)
    assert spread[0] == pytest.approx(2**0.5), "deviations of 1 and 1, divided by 2 - 1"
    assert mean_curve([one])[2].tolist() == [0] * len(frames)
    late = Curve(np.array([301.0]), np.array([0.0]))
    assert [part.tolist() for part in mean_curve([one, late])] == [[], [], []]


def test_the_numbers_of_the_table(tmp_path: Path) -> None:
    cells = [Cell("Seaquest", "linear", seed) for seed in range(4)]
    cells += [Cell("MontezumaRevenge", "neurocoder", 7), Cell("MontezumaRevenge", "hypernet", 7)]
    ends = {0: (800, 100.0), 1: (800, 200.0), 2: (400, 600.0)}
    curves = {
        cells[seed]: Curve(np.array([200, frames]), np.array([9.0, score]))
        for seed, (frames, score) in ends.items()
    }
    curves[cells[4]] = Curve(np.array([4_000_000]), np.array([0.0]))
    make_run(tmp_path, cells[0], protocol="classic")
    lines = make_table(cells, curves, tmp_path).splitlines()
    # Mean 300; deviations -200, -100, 300; 140,000 / 2; root 264.575
    assert (
        "| Seaquest | linear | 0 1 2 | 400 to 800 | 300.00 +- 264.58 | 100.00 | 600.00 |" in lines
    )
    row = "| MontezumaRevenge | neurocoder | 7 | 4,000,000 | 0.00 (one seed) | 0.00 | 0.00 |"
    assert row in lines
    assert "| MontezumaRevenge | hypernet | none | 0 | no game finished |  |  |" in lines
    assert "Sampled actions; protocol classic, encoder a3c, stack 1." in lines
    assert "(ddof 1)" in lines[0]
    assert "| Seaquest | 1760 | 954 | 2030 +- 370 | 1860 | 1782 |" in lines
    assert lines[-1].startswith("MontezumaRevenge: about 0 is the expected result")
    assert any(line.startswith("* Seaquest: about 2,500 points for A3C") for line in lines)
    assert all(line.isascii() for line in lines)


def test_figure_only_draws_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in (0, 1):
        rows = f"400,{seed},100\n800,{seed + 9},200\n"
        make_run(tmp_path, Cell("Seaquest", "neurocoder", seed), checkpoints=(800,), rows=rows)
    make_run(tmp_path, Cell("MsPacman", "linear", 0), rows="400,60,100\n800,90,200\n")
    make_run(tmp_path, Cell("Frostbite", "linear", 0))
    (tmp_path / "Seaquest-transformer-seed0").mkdir()
    assert main(["--figure-only", "--logdir", str(tmp_path)]) == 0
    table = (tmp_path / "figure3.md").read_text()
    assert table in capsys.readouterr().out
    assert "| Seaquest | neurocoder | 0 1 | 800 | 9.50 +- 0.71 | 9.00 | 10.00 |" in table
    assert "| Frostbite | linear | none | 0 | no game finished |  |  |" in table
    image = cv2.imread(str(tmp_path / "figure3.png"))
    assert image is not None and min(image.shape[:2]) > 300
    half_height, half_width = image.shape[0] // 2, image.shape[1] // 2
    seaquest, pacman = image[:half_height, :half_width], image[:half_height, half_width:]
    assert count(seaquest, ORANGE) > 200 and count(seaquest, BLUE) == 0
    assert count(pacman, BLUE) > 200 and count(pacman, ORANGE) == 0
    band = np.array(ORANGE) * 0.2 + 255 * 0.8
    near = (np.abs(seaquest - band) <= 2).all(axis=-1)
    assert near.sum() > 1000, "the band of the spread"
    frostbite = image[half_height:, :half_width]
    assert frostbite.std() > 0 and count(frostbite, BLUE) == 0


# The real thing.


def test_a_run_is_interrupted_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
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
        curve = cell.folder(tmp_path) / "Klax-1" / "progress.csv"
        ready = wait_until(
            lambda: (
                process.poll() is not None
                or (curve.is_file() and curve.read_text().count("\n") > 3)
            ),
            60,
        )
        assert ready and process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, errors = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()
    found = find_run(cell.folder(tmp_path), "Klax", 100_000_000)
    assert (process.returncode, errors) == (130, ""), output
    assert found.state == "interrupted" and found.frames > 0
    assert f"Klax linear seed 0: stopped at {found.frames:,} frames" in output

    total = found.frames + 2400
    assert main(arguments(total)) == 0
    output = capfd.readouterr().out
    assert f"Klax linear seed 0: goes on from {found.frames:,} frames" in output
    assert "annealed over 100,000,000 frames so far" in output
    assert find_run(cell.folder(tmp_path), "Klax", total) == Found("finished", total, found.run)
    after = read_curve(tmp_path, cell)
    assert after is not None and after.frames[-1] == total
    assert re.search(rf"^\| Klax \| linear \| 0 \| {total:,} \| \d", output, re.MULTILINE)
    assert sorted(path.name for path in cell.folder(tmp_path).iterdir()) == ["Klax-1", "output.txt"]
    assert count(cv2.imread(str(tmp_path / "figure3.png")), BLUE) > 100

    before = os.stat(cell.folder(tmp_path) / "output.txt").st_mtime_ns
    assert main(arguments(total)) == 0, "nothing is left to play"
    assert "started" not in capfd.readouterr().out
    assert os.stat(cell.folder(tmp_path) / "output.txt").st_mtime_ns == before
