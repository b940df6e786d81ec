"""The timing scripts run from end to end and print their tables; no number is looked at."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def table_rows(output: str, first_cell: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"| {first_cell}")]


@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_throughput_prints_rates(peers: bool) -> None:
    tiny = ("--encoder", "a3c", "--n-envs", "2", "--seconds", "0.05", "--rounds", "1")
    chosen = "--peers" if peers else "--no-peers"
    done = run_script("throughput.py", *tiny, "--workers", "1", "--device", "cpu", chosen)
    assert done.returncode == 0, done.stderr
    # With workers and serial, both heads; then one worker.
    assert len(table_rows(done.stdout, "A3C, 2 workers, 2 games")) >= 2
    assert len(table_rows(done.stdout, "A3C serial")) == 2
    assert len(table_rows(done.stdout, "A3C, 1 workers")) == 1
    assert (len(table_rows(done.stdout, "A2C")) > 0) == peers
    assert (len(table_rows(done.stdout, "RecurrentPPO")) > 0) == peers
    assert "nan" not in done.stdout


def test_soak_prints_samples_and_a_verdict() -> None:
    tiny = ("--minutes", "0.05", "--interval", "0.5", "--n-envs", "2", "--workers", "1")
    done = run_script("soak.py", *tiny, "--device", "cpu")
    # Growth over seconds of warming up says nothing, so either verdict will do.
    assert done.returncode in (0, 1), done.stderr
    assert "Verdict: " in done.stdout, done.stderr
    assert len(table_rows(done.stdout, "0.")) >= 2
    assert len(table_rows(done.stdout, "growth of ")) == 5


def test_tasks_prints_steps_and_targets() -> None:
    done = run_script("tasks.py", "--seconds", "0", "--only", "mlp", "J = 5", "--cpu-time")
    assert done.returncode == 0, done.stderr
    for name in ("CIFAR MLP", "polynomial GRU, J = 5"):
        layers = [row.split(" | ")[2] for row in table_rows(done.stdout, name)]
        assert layers == ["linear", "neurocoder"]
    assert len(table_rows(done.stdout, "step of ")) == 2 and "nan" not in done.stdout
    done = run_script("tasks.py", "--only", "resnet")
    assert done.returncode == 2 and "CIFAR LeNet" in done.stderr


def test_policy_heads_prints_a_row_for_each_training() -> None:
    heads = ("linear", "neurocoder, sharpness 10")
    done = run_script("policy_heads.py", "--timesteps", "400", "--seeds", "0", "--heads", *heads)
    assert done.returncode == 0, done.stderr
    for head in heads:
        (row,) = table_rows(done.stdout, f"{head} | 0")
        assert all(0 <= float(cell) <= 1 for cell in row.strip("| ").split(" | ")[2:])


def test_gpu_prints_its_tables_also_without_one() -> None:
    done = run_script("gpu.py", "--device", "cpu", "--tables", "correctness")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout
    assert len(table_rows(done.stdout, "Neurocoder J")) == 3
    if not torch.cuda.is_available():
        done = run_script("gpu.py")
        assert done.returncode == 2 and "cuda is not available" in done.stderr
