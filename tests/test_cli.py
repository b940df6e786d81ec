"""The command `ncrl`: what each word stands for, its errors, and a core that needs torch alone."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ncrl
from ncrl import cli
from ncrl.agents.atari.command import build_parser

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --env Pong --frames 400", "--env Pong --frames 400"),
        ("resume runs/Pong-1 --frames 800", "--resume runs/Pong-1 --frames 800"),
        ("evaluate runs/Pong-1 --episodes 3", "--evaluate runs/Pong-1 --episodes 3"),
        ("watch runs/Pong-1", "--evaluate runs/Pong-1 --episodes 0 --video Pong-1.mp4"),
        ("watch r a.webm --best", "--evaluate r --episodes 0 --video a.webm --best"),
        ("watch r --best a.mp4", "--evaluate r --episodes 0 --video a.mp4 --best"),
        ("watch r --video a.mp4", "--evaluate r --episodes 0 --video r.mp4 --video a.mp4"),
        ("watch r --seed 3 a.gif", "--evaluate r --episodes 0 --video a.gif --seed 3"),
        ("train --help", "--help"),
    ],
)
def test_commands_are_flags_of_run_atari(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("ncrl.agents.atari.command.main", lambda given: seen.append(given) or 7)
    assert cli.main(words.split()) == 7
    assert seen == [expected.split()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "ncrl: unknown command 'trian'; nearest: train"),
        ("task minst", "ncrl task: unknown task 'minst'; nearest: mnist"),
        ("watch", "ncrl watch: the folder of a run comes first: ncrl watch RUN_DIR"),
        ("resume --frames 3", "ncrl resume: the folder of a run comes first: ncrl resume RUN_DIR"),
    ],
)
def test_errors_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == message + "\n"


def test_the_help_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80
    assert all(any(f"  {name} " in line for line in lines) for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.OF_RUNS)
def test_the_help_of_a_command_names_its_flags(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: ncrl {command} RUN_DIR")
    assert max(map(len, said.splitlines())) < 80
    flags = build_parser().format_help()
    assert all(f"  {flag} " in flags for flag in re.findall(r"--\w[\w-]*", cli.OF_RUNS[command]))


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_gymnasium(_arguments: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'gymnasium'", name="gymnasium")

    monkeypatch.setattr("ncrl.agents.atari.command.main", without_gymnasium)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--env", "Pong"])
    wanted = "ncrl train: gymnasium is not installed: pip install 'ncrl[rl]'\n"
    assert capsys.readouterr().err == wanted


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_ctrl_c_while_a_command_is_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["task", "mnist"]) == 130


@pytest.fixture
def run_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str, str]]:
    """`python -m`, in this process: exit code and what was printed."""

    def run(name: str, *words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["-m", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        return end.value.code, *capsys.readouterr()

    return run


def test_task_runs_the_experiment_and_returns_its_exit_code(
    run_module: Callable[..., tuple[Any, str, str]],
) -> None:
    code, out, _ = run_module("ncrl", "task", "parameters", str(ROOT / "configs/tasks/mnist.yaml"))
    assert code == 0 and "recipes reach the paper's count" in out
    code, _, err = run_module("ncrl", "task", "mnist", "--no-such-flag")
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith("ncrl task mnist: unknown argument '--no-such-flag'")
    _, _, err = run_module("ncrl.tasks.mnist", "--no-such-flag")
    assert err.startswith("python -m ncrl.tasks.mnist: unknown argument")


def test_train_reaches_run_atari_from_another_folder(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from ncrl.cli import main; sys.exit(main())"
    )
    done = run("-c", code, "train", "--env", "Pongg", cwd=tmp_path)
    assert done.returncode == 2 and "nearest: Pong" in done.stderr


def test_the_core_needs_torch_alone() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dependencies = \["torch>=2.10"\]$', text, re.MULTILINE)
    modules = "gymnasium ale_py stable_baselines3 sb3_contrib tensorboard cv2 tqdm rich yaml "
    modules += "safetensors sklearn matplotlib numpy"
    code = f"""
import sys, warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
for name in {modules.split()!r}: sys.modules[name] = None
import torch, ncrl, ncrl.layers
layer = ncrl.NeurocoderLinear(8, 4, num_slots=5)
(layer(torch.randn(3, 8)).sum() + ncrl.orthogonal_loss(layer)).backward()
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
assert ncrl.inject(model, ncrl.NeurocoderConfig(num_slots=5), targets=["0"]) == ["0"]
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_version_is_stated_once() -> None:
    assert run("-m", "ncrl", "--version").stdout == f"ncrl {ncrl.__version__}\n"
