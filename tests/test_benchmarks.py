"""The timing scripts run from end to end and print their tables; no number is looked at."""

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import run_atari
from ncrl.agents.playing.sizes import Sizes, available_cores, default_workers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import against_sample_factory as peer  # noqa: E402
import gpu  # noqa: E402
import throughput  # noqa: E402
from curves import COLUMNS, SETTINGS, read_rows  # noqa: E402


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """Scripts start one worker, where they would start one for every core."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Calls the `main` of a script in this process, which must end well; returns what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *arguments])
        importlib.import_module(name).main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a script as a command does, which must refuse its arguments; returns how it does."""

    def run(name: str, *arguments: str) -> str:
        path = ROOT / "benchmarks" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("agent", "games", "frames"),
    [("A2C", "16", "640"), pytest.param("RecurrentPPO", "8", "4096", marks=pytest.mark.slow)],
)
def test_curves_of_sb3_have_the_columns_of_ours(
    agent: str,
    games: str,
    frames: str,
    tmp_path: Path,
    run_here: Callable[..., str],
    refusal: Callable[..., str],
) -> None:
    out = tmp_path / "curve.csv"
    run_here("sb3_learning", agent, str(out), "--frames", "640", "--seed", "3")
    row = read_rows(out)[-1]
    settings = {"env": "Pong", "layer": agent, "games": games, "seed": "3", "frames": frames}
    assert {name: row[name] for name in settings} == settings
    assert float(row["seconds"]) > 0 and set(row) == {*SETTINGS, *COLUMNS}
    assert f"{out} exists" in refusal("sb3_learning", agent, str(out))


def table_rows(output: str, first_cell: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"| {first_cell}")]


@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_throughput_prints_rates(
    peers: bool, run_here: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "HEADS", ("plain",))
    tiny = ("--encoder", "a3c", "--n-envs", "2", "--seconds", "0.05", "--rounds", "1")
    told = run_here("throughput", *tiny, "--device", "cpu", "--peers" if peers else "--no-peers")
    (row,) = table_rows(told, f"A3C, {default_workers(2)} workers, 2 games")
    of_playing, of_ceiling = (int(cell.strip(" %")) for cell in row.split("|")[5:7])
    assert 0 < of_playing <= of_ceiling  # shares of two ceilings
    for part in ("games + acting alone", "learning alone", "A3C serial"):
        assert len(table_rows(told, part)) == 1
    assert (len(table_rows(told, "A2C")) > 0) == peers
    assert (len(table_rows(told, "RecurrentPPO")) > 0) == peers
    assert "nan" not in told


def test_throughput_has_rows_for_both_heads_and_for_chosen_numbers_of_workers() -> None:
    chosen = argparse.Namespace(device="cpu", n_envs=[2], workers=[1, 2])
    rows = [*throughput.our_rows(chosen, "a3c")]
    for part in ("games + acting alone", "learning alone", "A3C, 1 workers, 2 games", "A3C serial"):
        of_part = [row.name for row in rows if row.name.startswith(part)]
        assert [name.rsplit(", ", 1)[-1] for name in of_part] == ["plain heads", "Neurocoder heads"]
    *_, one, two = rows
    assert one.name.startswith("A3C, 1 workers of 8 games") and one.n_cores == 1
    assert two.name.startswith("A3C, 2 workers of 8 games") and two.n_cores == available_cores()


def test_a_row_is_measured_on_as_many_cores_as_it_may_use() -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the fixture sets it back
    cores = available_cores()
    with throughput.on_cores(1):
        assert available_cores() == 1
    with throughput.on_cores(None):
        assert available_cores() == cores


def test_the_ceiling_shares_the_cores_between_play_and_learning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two cores play 100 timesteps in a second, one learns from 50: 100 take a second of both cores
    and two of one, which both share."""
    monkeypatch.setattr(throughput, "available_cores", lambda: 2)
    assert throughput.ceiling("cpu", 100.0, 50.0) == pytest.approx(100 / (1 + 2 / 2))


def test_ratios_are_taken_within_a_round() -> None:
    assert throughput.median_ratio([2.0, 9.0, 40.0], [1.0, 3.0, 10.0]) == 3.0


def test_soak_prints_samples_and_their_medians_early_and_late(run_here: Callable[..., str]) -> None:
    tiny = ("--minutes", "0.02", "--interval", "0", "--n-envs", "2", "--workers", "1")
    told = run_here("soak", *tiny, "--device", "cpu")
    assert len(table_rows(told, "0.")) >= 2
    for part in ("first third", "last third"):
        (row,) = table_rows(told, part)
        assert row.count("|") == 7 and "nan" not in row


def test_tasks_prints_steps_and_targets(
    run_here: Callable[..., str], refusal: Callable[..., str]
) -> None:
    told = run_here("tasks", "--seconds", "0", "--only", "mlp", "J = 5")
    for name in ("CIFAR MLP", "polynomial GRU, J = 5"):
        plain, coded = (row.strip("| ").split(" | ") for row in table_rows(told, name))
        assert (plain[2], coded[2]) == ("linear", "neurocoder")
        assert coded[-1].startswith("<= ") and "nan" not in coded
    assert "CIFAR LeNet" in refusal("tasks", "--only", "resnet")


def test_layer_prints_ratios(run_here: Callable[..., str]) -> None:
    told = run_here("layer", "--seconds", "0", "--batch", "2", "3")
    rows = table_rows(told, "3072 -> 512") + table_rows(told, "784 -> 400, P")
    assert [row.split(" | ")[0][-7:] for row in rows] == ["batch 2", "batch 3"] * 2


def test_exploration_tells_the_rooms_of_a_run(run_here: Callable[..., str], tmp_path: Path) -> None:
    words = "--env MontezumaRevenge --frames 80 --workers 0 --games 2 --lstm-hidden-size 8"
    words += " --layer linear --device cpu --game-frames 400"
    assert run_atari.main([*words.split(), "--logdir", str(tmp_path)]) == 0
    told = run_here("exploration", "rooms", str(tmp_path / "MontezumaRevenge-1"), "--games", "2")
    (row,) = table_rows(told, "0 | 1 | 2 |")
    timesteps, entropy, bonus = (float(cell) for cell in row.strip(" |").split(" | ")[3:])
    assert timesteps == 200 and 2.5 < entropy < 2.9 and bonus > 0


TINY_GPU = ("--device", "cpu", "--seconds", "0", "--play-seconds", "1", "--tables")


def test_gpu_prints_its_tables_also_without_one(
    run_here: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Sizes(workers=1, games=2, reason="quick to build")
    monkeypatch.setattr(gpu, "choose_sizes", lambda *_: few)
    told = run_here("gpu", *TINY_GPU, "correctness", "acting", "pong")
    assert "Traceback" not in told
    assert len(table_rows(told, "Neurocoder J")) == 3
    for row in ("plain | 8", "Neurocoder | 256", "games + acting alone"):
        assert len(table_rows(told, row)) == 1, row
    assert "No rate of the plain command" in told  # in a second it does not start


@pytest.mark.slow
def test_gpu_prints_how_long_a_start_takes(run_here: Callable[..., str]) -> None:
    (row,) = table_rows(run_here("gpu", *TINY_GPU, "start-up"), f"{min(2, available_cores())} | ")
    assert float(row.strip("| ").split(" | ")[-1]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_gpu_says_that_there_is_none(refusal: Callable[..., str]) -> None:
    assert "device cuda is not there" in refusal("gpu")


def test_gpu_says_why_an_update_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[object, ...]] = []
    monkeypatch.setattr(gpu, "print_row", lambda *cells: rows.append(cells))
    monkeypatch.setattr(gpu, "UPDATES", (1,))
    gpu.update(argparse.Namespace(device="cpu", seconds=0.0))
    assert {len(row) for row in rows} == {7}
    for head in ("plain", "Neurocoder"):
        (row,) = (row for row in rows if row[:2] == (head, 20))
        assert row[3] == "none: the learner is on cpu, not on CUDA"


@pytest.mark.parametrize("name", ["growing_memory", "programs"])
def test_what_goes_wrong_is_told_in_one_line(name: str, refusal: Callable[..., str]) -> None:
    told = refusal(name, "--data-dir", "/no/such/folder")
    assert told == f"{name}.py: --data-dir must be a folder: /no/such/folder does not exist\n"


def fake_python(folder: Path, script: str) -> Path:
    """An executable that does the same whatever it is given."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_peer_is_stopped_once_its_reports_gave_a_rate(tmp_path: Path) -> None:
    reports = "for n in 0 400 800 4000; do echo Total num frames: $n. Lag: 1; sleep 0.1; done"
    python = fake_python(tmp_path, f"echo $$ > {tmp_path}/pid; {reports}; sleep 600")
    assert peer.sample_factory(python, 4, 0.15) > 0
    pid = (tmp_path / "pid").read_text().strip()
    assert not Path(f"/proc/{pid}").exists()


def test_a_peer_that_ends_without_a_rate_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        peer.sample_factory(fake_python(tmp_path, "echo No module named sf_examples"), 4, 0.1)
