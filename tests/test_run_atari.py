"""`run_atari.py` from its command line: exit codes, what it writes, and how it is stopped.

The first half calls `main` in this process; the second half runs real processes.
"""

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ncrl.agents.atari.command
import ncrl.agents.atari.config as config_module
import ncrl.agents.atari.train
import ncrl.agents.playing.pool
import ncrl.agents.runs.directory
import run_atari
from ncrl.agents import A3C, NonFiniteError, WorkerError
from ncrl.agents.atari.config import RunConfig, with_game, with_sizes
from ncrl.agents.atari.evaluate import UNPLAYED
from ncrl.agents.atari.summary import summary
from ncrl.agents.atari.train import make_model
from ncrl.agents.learning.intrinsic import RND, PseudoCount
from ncrl.agents.learning.optim import SharedRMSProp
from ncrl.agents.profiling import PHASES
from ncrl.agents.runs.checkpoints import newest_checkpoint, save_checkpoint
from ncrl.agents.runs.directory import RunDirectory
from ncrl.layers import LAYERS, make_layer
from ncrl.settings import configure, parse
from ncrl.shell.signals import stop_signals
from run_atari import main
from tests.agents.conftest import (  # noqa: F401 - fixtures for all tests of this file
    nothing_left_behind,
    wait_until,
    watchdog,
)

SCRIPT = Path(run_atari.__file__)
SECONDS = 80
"""For a process, whatever hangs in it."""

SMALL = [
    *("--device", "cpu", "--lstm-hidden-size", "16"),
    *("--num-slots", "8", "--num-heads", "2", "--num-least-used", "1"),
]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


# What makes no sense is refused in one line, before anything is made.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two folders that may be runs, and files that may be configurations."""
    monkeypatch.chdir(tmp_path)
    for run in ("empty_run", "linear_run"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / ".lock").touch()
    (tmp_path / "empty_run" / "config.yaml").write_text("env: Pong\n")
    (tmp_path / "linear_run" / "config.yaml").write_text("env: Pong\nlayer: linear\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("")
    for name, content in {
        "typo": "env: Pong\nlearning_rat: 0.1\n",
        "text": "env: Pong\nn_steps: many\n",
        "bool": "env: Pong\nworkers: true\n",
        "int": "env: Pong\nanneal: 1\n",
        "null": "env: Pong\nn_steps: null\n",
        "nan": "env: Pong\ngamma: .nan\n",
        "number": "env: Pong\n3: 4\n",
        "broken": "env: [Pong\n",
        "nothing": "",
        "bomb": "env: &a [x, x]\nprotocol: &b [*a, *a]\n",
        "deep": "env: " + "[" * 2000 + "]" * 2000,
        "digits": "gamma: " + "9" * 400,
        "large": "#" * 200_000,
    }.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    return tmp_path


PONG = "--env Pong "
REFUSED = {
    # F12: where nothing can be written
    PONG + "--logdir file/runs": ["file/runs"],
    PONG + "--logdir /proc/runs": ["/proc/runs"],
    PONG + f"--logdir {'x' * 300}": ["x" * 300],
    # F20, F21: what this machine does not have
    PONG + "--device gpu": ["device", "gpu", "nearest: cpu"],
    PONG + "--device cuda": ["cuda", "use cpu"],
    "": ["--env"],
    "--env Pongg": ["Pongg", "Pong"],
    "--env CartPole-v1": ["CartPole-v1", "nearest"],
    "--env combat": ["combat", "nearest"],  # for two players only: its ROM ends the process
    # F22: impossible values
    PONG + "--n-steps 0": ["n_steps", "0", "1 .. 100000"],
    PONG + "--workers -1": ["workers", "-1", "0 .. 1024"],
    PONG + "--games 0": ["games", "0", "1 .."],
    PONG + "--games 8 --envs-per-worker 2": ["games (8)", "envs_per_worker (2)"],
    PONG + f"--frames {'9' * 400}": ["frames", "400 digits", "1 .. 1e+12"],
    PONG + f"--frames {'9' * 5000}": ["--frames", "99 ... 99"],
    PONG + f"--{'x' * 5000}": ["nearest"],
    PONG + "--gamma 1.5": ["gamma", "1.5", "0 .. 1"],
    PONG + "--learning-rate nan": ["learning_rate", "nan"],
    PONG + "--frames 0": ["frames", "0"],
    PONG + "--frames 1e6": ["--frames", "1e6"],
    PONG + "--frames": ["--frames"],
    PONG + "--seed -1": ["seed", "-1"],
    PONG + "--max-grad-norm -1": ["max_grad_norm", "-1"],
    PONG + "--sharpness 0": ["sharpness", "0"],
    PONG + "--batch-size 0": ["batch_size", "0", "1 .."],
    PONG + "--batch-size 7": ["batch_size", "7"],
    PONG + "--workers 0 --envs-per-worker 2 --batch-size 80": ["batch_size", "80", "nearest: 40"],
    PONG + "--num-slots 5 --num-least-used 5": ["num_slots=5", "num_least_used=5"],
    PONG + "--layer neurocodr": ["layer", "neurocodr", "nearest: neurocoder"],
    PONG + "--layer transformer": ["linear, neurocoder, hypernet, film, moe, nsm"],
    PONG + "--protocol classical": ["protocol", "classical", "nearest: classic"],
    # Words that are no flags
    PONG + "--n-step 5": ["--n-step", "nearest: --n-steps"],
    PONG + "--learningrate=0.1": ["--learningrate", "nearest: --learning"],
    PONG + "--frame 100": ["--frame", "nearest: --frames"],
    # Words that follow no flag that takes one
    "Pong": ["'Pong' stands alone", "follows its flag"],
    PONG + "--anneal false": ["'false' stands alone", "--no-NAME"],
    # YAML
    "--config typo.yaml": ["learning_rat", "typo.yaml", "nearest: learning_rate"],
    "--config text.yaml": ["n_steps", "'many'", "int", "text.yaml"],
    "--config bool.yaml": ["workers", "True", "int", "bool.yaml"],
    "--config int.yaml": ["anneal", "1", "bool", "int.yaml"],
    "--config null.yaml": ["n_steps", "None", "int", "null.yaml"],
    "--config nan.yaml": ["gamma", "nan"],
    "--config number.yaml": ["3", "number.yaml"],
    "--config broken.yaml": ["broken.yaml"],
    "--config nothing.yaml": ["nothing.yaml"],
    "--config binary.yaml": ["binary.yaml"],
    "--config absent.yaml": ["absent.yaml"],
    "--config pnog": ["'pnog'", "nearest: pong"],
    f"--config {'a' * 5000}": ["there is no config"],
    "--config plain": ["plain"],
    "--config bomb.yaml": ["bomb.yaml", "by an alias"],
    "--config deep.yaml": ["deep.yaml", "nested"],
    "--config digits.yaml": ["gamma", "400 digits"],
    "--config pipe.yaml": ["pipe.yaml", "no regular file"],
    "--config large.yaml": ["large.yaml", "bytes"],
    # Flags that do not go together
    PONG + "--best": ["--best", "--evaluate"],
    "--evaluate empty_run --best": ["best_model.zip", "--best"],
    PONG + "--video out.mp4": ["--video", "--evaluate"],
    PONG + "--episodes 3": ["--episodes", "--evaluate"],
    PONG + "--deterministic": ["--deterministic", "--evaluate"],
    "--resume empty_run --config typo.yaml": ["--resume", "--config"],
    "--evaluate empty_run --resume empty_run": ["--evaluate", "--resume"],
    "--evaluate empty_run --config typo.yaml": ["--evaluate", "--config"],
    "--evaluate empty_run --profile": ["--evaluate", "--profile"],
    "--evaluate empty_run --frames 100": ["--frames"],
    "--evaluate empty_run --episodes 0": ["episodes", "0"],
    "--evaluate empty_run --episodes x": ["--episodes", "x"],
    # F13, F17: runs that are none, or cannot go on that way
    "--resume absent": ["absent", "config.yaml"],
    f"--resume {'a' * 5000}": ["is no run directory"],
    "--resume file": ["file"],
    "--resume plain": ["plain", "config.yaml"],
    "--resume empty_run": ["empty_run", "no checkpoint"],
    "--resume empty_run --env pong": ["no checkpoint"],  # another name of the same game
    "--resume empty_run --env Breakout": ["env", "Pong", "Breakout"],
    "--resume empty_run --layer linear": ["layer", "neurocoder", "linear"],
    "--resume linear_run --layer neurocoder --num-slots 9 --lstm-hidden-size 8": [
        *("layer", "'linear' -> 'neurocoder'", "num_slots 80 -> 9", "lstm_hidden_size 512 -> 8"),
    ],
    "--resume empty_run --optimizer rmsprop": ["optimizer 'adam' -> 'rmsprop'"],
    "--resume empty_run --seed 4": ["seed 0 -> 4"],
    "--resume empty_run --sharpness 3": ["sharpness", "-> 3.0"],
    "--resume empty_run --logdir elsewhere": ["logdir 'runs' -> 'elsewhere'"],
    "--resume empty_run --protocol classic": ["protocol", "machado", "classic"],
    "--resume empty_run --gamma 2": ["gamma", "2", "0 .. 1"],
    "--evaluate absent": ["absent"],
    "--evaluate empty_run": ["empty_run", "no checkpoint"],
    "--evaluate empty_run --device cuda": ["cuda", "use cpu"],
    "--evaluate empty_run --video out.avi": ["out.avi", ".mp4", ".webm"],
    "--evaluate empty_run --video absent/out.mp4": ["absent/out.mp4", "folder"],
    "--evaluate empty_run --video file/out.mp4": ["file/out.mp4"],
}


def exit_code(arguments: list[str]) -> Any:
    """What `main` returns, or leaves with."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:  # it would end all tests
        pytest.fail("interrupted with a traceback")


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(
    arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def too_late(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("refused too late")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ncrl.agents.atari.train, "make_model", too_late)
    monkeypatch.setattr(ncrl.agents.playing.pool.WorkerPool, "__enter__", too_late)
    before = tree(folder)
    assert exit_code(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.endswith("\n"), output.err
    assert len(output.err) < 1000
    assert not CONTROL.search(output.err) and "None:" not in output.err
    for word in REFUSED[arguments]:
        assert word in output.err, (word, output.err)
    assert tree(folder) == before


def test_f23_a_run_in_use_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    run = RunDirectory(folder / "empty_run")
    assert exit_code(["--resume", "empty_run"]) == 2 and run.path
    assert re.fullmatch(r".*empty_run is in use by another process\n", capsys.readouterr().err)


def test_help_names_every_setting_and_its_default(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(["--help"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    text = " ".join(output.split())
    for entry in fields(RunConfig):
        assert f"--{entry.name.replace('_', '-')}" in text
        assert entry.default in (None, "") or f"(default: {entry.default})" in text, entry.name
        choices = entry.metadata["choices"]
        assert not choices or f"--{entry.name.replace('_', '-')} {'|'.join(choices)}" in text


def test_flags_may_be_written_as_settings_are_in_files() -> None:
    words = ["--learning_rate=1e-3", "--no-residual_gate", "--n_steps", "5", "--env", "ms_pacman"]
    flags = parse(ncrl.agents.atari.command.build_parser(), words)
    found = {"learning_rate": 1e-3, "residual_gate": False, "n_steps": 5, "env": "ms_pacman"}
    assert flags == found


# One run, and what can be done with it.


class Run(NamedTuple):
    path: Path
    output: str

    @property
    def rows(self) -> list[dict[str, str]]:
        with open(self.path / "progress.csv", newline="") as file:
            return list(csv.DictReader(file))

    @property
    def events(self) -> EventAccumulator:
        events = EventAccumulator(str(self.path))
        events.Reload()
        return events

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.path / "config.yaml").read_text())


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}


def run_process(*arguments: str, cwd: Path) -> str:
    """Standard output of a process that must end well and say nothing on stderr."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def run_here(*arguments: str) -> str:
    """Standard output of `main` in this process, which must end well."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(arguments) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def serial_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """2,000 timesteps of a game that lasts about 100, in one process."""
    folder = tmp_path_factory.mktemp("serial")
    (folder / "small.yaml").write_text("learning_rate: 1e-3\nlog_every: 5\nseed: 7\nn_steps: 10\n")
    arguments = ["--env", "ALE/Klax-v5", "--workers", "0", "--envs-per-worker", "4"]
    arguments += ["--frames", "8_000", "--checkpoint-every", "2400", "--config", "small.yaml"]
    output = run_process(*arguments, *SMALL, "--seed", "3", cwd=folder)
    return Run(folder / "runs" / "Klax-1", output)


@pytest.fixture
def run(serial_run: Run, tmp_path: Path) -> Run:
    """A copy to work on, in another folder."""
    path = tmp_path / "moved" / "Klax-1"
    shutil.copytree(serial_run.path, path)
    return Run(path, serial_run.output)


def test_files_of_a_run(serial_run: Run) -> None:
    names = {path.name for path in serial_run.path.iterdir()}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names == {
        *(".lock", "config.yaml", "progress.csv", "checkpoints", events),
        *("best_model.zip", "best_model.json"),
    }
    steps = [4 * int(path.stem[5:]) for path in sorted((serial_run.path).rglob("step_*.zip"))]
    assert steps == [4800, 7200, 8000], "frames of the newest 3"
    assert len(list((serial_run.path / "checkpoints").iterdir())) == 3
    model = A3C.load(serial_run.path / "best_model.zip", device="cpu")
    obs = config_module.make_factory(RunConfig(env="Klax"))(2, 0).reset()
    assert model.predict(obs)[0].shape == (2,)


def test_a_game_is_cut_short_where_the_flag_says() -> None:
    env = config_module.make_factory(RunConfig(env="Klax", game_frames=80))(1, 0)
    env.reset()
    ends = []
    for timestep in range(1, 41):
        env.step_async(np.zeros(1, dtype=np.int64))
        _, _, dones, infos = env.step_wait()
        if dones[0]:
            assert infos[0]["TimeLimit.truncated"]
            ends.append(timestep)
    assert ends == [20, 40]


def test_the_configuration_of_a_run(serial_run: Run) -> None:
    config = serial_run.config
    assert list(config) == [entry.name for entry in fields(RunConfig)]
    expected = {"env": "Klax", "frames": 8000, "workers": 0, "games": 4}
    expected |= {"seed": 3, "learning_rate": 1e-3, "n_steps": 10, "num_slots": 8, "gamma": 0.99}
    assert expected.items() <= config.items(), "flags win over YAML, YAML over defaults"


def test_the_summary_of_a_run(serial_run: Run) -> None:
    output = serial_run.output
    model = A3C.load(newest_checkpoint(serial_run.path / "checkpoints").path, device="cpu")
    parameters = sum(p.numel() for p in model.policy.parameters())
    for pattern in (
        r"^game +Klax, 8,000 frames$",
        r"^protocol +machado: sticky actions 0\.25, all 18 actions",
        r"^playing +serial, 4 games in this process, 10 timesteps per rollout$",
        r"^learner +cpu, seed 3$",
        rf"^network +{parameters:,} parameters: encoder a3c, LSTM 16, neurocoder heads",
        r"^run +runs/Klax-1$",
        r"^curves +\S*python\S* -m tensorboard.main --logdir runs$",
        r"^8,000 / 8,000 frames, [\d,]+ frames/s, score -?[\d.]+ \(\d+ games\), policy lag 0\.0",
        r"^8,000 frames played; go on with: \S*python\S* \S*run_atari\.py "
        r"--resume runs/Klax-1 --frames 16000$",
    ):
        assert re.search(pattern, output, re.MULTILINE), (pattern, output)
    assert "expect" not in output
    assert not CONTROL.search(output) and output.isascii()
    start = output[: output.index("\ncurves")].splitlines()
    assert max(map(len, start)) < 80 and len(start) > 6


@pytest.mark.parametrize(("flags", "said"), [("", True), ("--batch-size 40", False)])
def test_sizes_are_said_to_be_chosen_where_nobody_asked_for_one(
    flags: str, said: bool, tmp_path: Path
) -> None:
    config = chosen(f"--env Klax {flags} {' '.join(SMALL)}")
    with RunDirectory(tmp_path / "Klax-1") as folder:
        lines = summary(make_model(config), config, folder)
    assert any(line.startswith("chosen") for line in lines) == said


@pytest.mark.parametrize(
    ("env", "envs", "batch_size", "games"),
    [
        ("Klax", 8, None, 4),
        ("Klax", 8, 40, 2),
        ("Venture", 12, None, 6),
    ],
)
def test_updates_are_small_unless_asked_for_or_with_a_bonus(
    env: str, envs: int, batch_size: int | None, games: int
) -> None:
    flags = f"--env {env} --workers 0 --envs-per-worker {envs} {' '.join(SMALL)}"
    flags += f" --batch-size {batch_size}" if batch_size else ""
    assert make_model(chosen(flags)).envs_per_update == games


LAYER_SIZES = {
    "linear": 3_255_795,
    "neurocoder": 3_450_463 + 19 - 2 * 513,  # and biases, without gates of the residual programs
    "hypernet": 3_650_419,  # Table 9: 3.6M
    "film": 3_255_795 + 2 * 513 * 64 + 65 * 2 * (18 + 1),
    "moe": 3_255_795 + 9 * 513 * 19 + 2 * 2 * 512 * 10,
    "nsm": 3_255_795 + 4 * 513 * 19 + 2 * (5 * 5 + 513 * 6),
}
"""Parameters with the encoder `paper` and 18 actions, by layer."""


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_can_be_chosen(layer: str) -> None:
    config = RunConfig(
        env="Klax", layer=layer, encoder="paper", workers=0, envs_per_worker=1, device="cpu"
    )
    model = make_model(with_sizes(with_game(config)), batch_size=None)
    kind = type(make_layer(layer, 8, 2))
    assert type(model.policy.action_net) is type(model.policy.value_net) is kind
    assert sum(p.numel() for p in model.policy.parameters()) == LAYER_SIZES[layer]


TAGS = {
    *("rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/frames"),
    *("train/policy_loss", "train/value_loss", "train/entropy_loss", "train/explained_variance"),
    *("train/learning_rate", "train/policy_lag", "train/grad_norm", "train/orthogonality_loss"),
    *("neurocoder/attention_entropy", "neurocoder/max_attention", "neurocoder/effective_rank"),
    "neurocoder/orthogonality",
}
POINTS = {*range(200, 2001, 200)}
"""Timesteps of the points on the curves: 5 updates of 10 x 4 timesteps."""

HISTOGRAMS = {"neurocoder/slot_usage/actor", "neurocoder/slot_usage/critic"}


def test_tensorboard_tags(serial_run: Run) -> None:
    events = serial_run.events
    tags = events.Tags()
    assert set(tags["scalars"]) >= TAGS, TAGS - set(tags["scalars"])
    assert set(tags["histograms"]) >= HISTOGRAMS, tags["histograms"]
    for tag in TAGS:
        values = [event.value for event in events.Scalars(tag)]
        assert all(abs(value) < float("inf") for value in values), (tag, values)
    assert min(tags["scalars"]) == "game/score", "the first section"
    # That of the critic's one output could only be 1.
    assert {t for t in tags["scalars"] if t.startswith("neurocoder/effective_rank")} == {
        "neurocoder/effective_rank",
        "neurocoder/effective_rank/actor",
    }
    scores, same = (events.Scalars(tag) for tag in ("game/score", "rollout/ep_rew_mean"))
    assert [(e.step, e.value) for e in scores] == [(e.step, e.value) for e in same]
    (settings,) = events.Tensors("settings/text_summary")
    (text,) = settings.tensor_proto.string_val
    assert yaml.safe_load(text.decode().strip("`\n")) == serial_run.config
    assert events.Histograms("neurocoder/slot_usage/actor")[-1].histogram_value.num == 8
    frames = events.Scalars("time/frames")
    assert {event.step for event in frames} == POINTS
    assert all(event.value == 4 * event.step for event in frames)
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.1 * rates[0] <= 1e-4


def test_every_point_of_the_curves_is_there_once_in_the_table_too(serial_run: Run) -> None:
    """The end of the run falls on a point that is due anyway."""
    rows = serial_run.rows
    assert {key for key in rows[0] if "/" in key} >= TAGS - {"rollout/ep_rew_mean"} - {
        "rollout/ep_len_mean"
    }
    assert float(rows[-1]["rollout/ep_rew_mean"]) >= 0
    steps = [event.step for event in serial_run.events.Scalars("time/frames")]
    assert steps == sorted(POINTS)
    assert [int(row["time/total_timesteps"]) for row in rows] == steps


# Exploration.


def chosen(arguments: str) -> RunConfig:
    flags = parse(ncrl.agents.atari.command.build_parser(), arguments.split())
    modes = {name: flags.pop(name, None) for name in ncrl.agents.atari.command.MODES}
    return config_module.choose_config(flags, modes)[0]


ORDINARY = {
    "frames": RunConfig.frames,
    "game_frames": RunConfig.game_frames,
    "gamma": RunConfig.gamma,
    "ent_coef": RunConfig.ent_coef,
    "entropy_floor": RunConfig.entropy_floor,
    "max_grad_norm": RunConfig.max_grad_norm,
}
"""What an intrinsic reward changes, as it is without."""


def settings(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ORDINARY}


@pytest.mark.parametrize(
    ("arguments", "bonus"),
    [
        ("--env Pong", "none"),
        ("--env MontezumaRevenge", "snd"),
        ("--env ALE/Venture-v5", "snd"),
        ("--env MontezumaRevenge --intrinsic-reward none", "none"),
        ("--env MontezumaRevenge --intrinsic-reward count", "count"),
        ("--env Pong --intrinsic-reward snd", "snd"),
        ("--env Pong --intrinsic-reward auto", "none"),
    ],
)
def test_the_bonus_is_chosen_by_the_game_and_brings_its_defaults(
    arguments: str, bonus: str
) -> None:
    config = chosen(f"{arguments} --workers 2")
    assert config.intrinsic_reward == bonus
    assert set(config_module.EXPLORING) == set(ORDINARY)
    assert settings(config) == (ORDINARY if bonus == "none" else config_module.EXPLORING)
    assert config.games == (16 if bonus == "none" else 64)


@pytest.mark.parametrize(
    ("workers", "games"),
    [(0, 64), (1, 64), (2, 64), (5, 60), (7, 56), (12, 48), (15, 60), (31, 124)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bonus_is_played_by_about_64_games_or_4_a_worker(
    workers: int, games: int, device: str
) -> None:
    config = RunConfig(env="Venture", workers=workers, device=device, intrinsic_reward="snd")
    assert config_module.with_sizes(config).games == games


def test_a_bonus_anneals_over_20_million_frames_and_an_older_run_stays(tmp_path: Path) -> None:
    new = chosen("--env MontezumaRevenge --workers 2")
    assert (new.anneal, new.frames, new.game_frames) == (True, 20_000_000, 18_000)
    text = "env: MontezumaRevenge\nintrinsic_reward: snd\nanneal: false\nframes: 200000000\n"
    (tmp_path / "config.yaml").write_text(text)
    old = chosen(f"--resume {tmp_path} --workers 2")
    assert (old.anneal, old.frames, old.game_frames) == (False, 200_000_000, 108_000)


def test_what_was_asked_for_comes_before_the_defaults_of_a_bonus(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("env: MontezumaRevenge\ngamma: 0.9\nframes: 8000\n")
    config = chosen(
        f"--config {tmp_path / 'run.yaml'} --frames 4000 --workers 0 --envs-per-worker 2"
    )
    expected = config_module.EXPLORING | {"gamma": 0.9, "frames": 4000}
    assert config.intrinsic_reward == "snd" and settings(config) == expected
    assert config.games == 2
    (tmp_path / "run.yaml").write_text("env: MontezumaRevenge\nintrinsic_reward: none\n")
    assert settings(chosen(f"--config {tmp_path / 'run.yaml'}")) == ORDINARY


def test_settings_of_ours_are_found_by_name() -> None:
    pong = chosen("--config pong --frames 4000")
    assert (pong.env, pong.protocol, pong.frames) == ("Pong", "classic", 4000)
    assert chosen("--config a3c --env Seaquest").optimizer == "rmsprop"


@pytest.mark.parametrize(
    ("flag", "file", "games"),
    [("--envs-per-worker 4", "games: 16", 8), ("--games 32", "envs_per_worker: 8", 32)],
)
def test_a_flag_for_the_number_of_games_replaces_either_setting_of_a_file(
    flag: str, file: str, games: int, tmp_path: Path
) -> None:
    """Such as the configuration of another run, in which it is always said."""
    (tmp_path / "config.yaml").write_text(f"env: Pong\nworkers: 2\n{file}\n")
    assert chosen(f"--config {tmp_path / 'config.yaml'} {flag}").games == games
    assert chosen(f"--resume {tmp_path} {flag}").games == games


def test_flags_of_the_bonus_reach_the_model() -> None:
    flags = "--env Pong --workers 0 --envs-per-worker 2 --int-coef 0.25 --ext-coef 1 "
    flags += "--int-gamma 0.9 --imitation-coef 0 --bonus-warmup 40 "
    rnd = "--intrinsic-reward rnd --bonus-encoder nature --bonus-learning-rate 0.01 "
    model = make_model(chosen(flags + rnd + "--update-proportion 0.5 " + " ".join(SMALL)))
    assert (model.int_coef, model.ext_coef, model.int_gamma) == (0.25, 1, 0.9)
    assert model.imitation_coef == 0 and model.exploration is not None
    assert model.exploration.warmup_timesteps == 40
    source = model.exploration.source
    assert isinstance(source, RND) and source.stride == 2
    assert source.target[-1].out_features == 512
    assert source.optimizer.param_groups[0]["lr"] == 0.01
    count = make_model(chosen(flags + "--intrinsic-reward count " + " ".join(SMALL)))
    assert count.exploration is not None
    assert isinstance(count.exploration.source, PseudoCount)


def test_flags_of_learning_and_of_workers_reach_the_model() -> None:
    flags = "--env Klax --workers 0 --envs-per-worker 2 --optimizer rmsprop --learning-rate 0.002 "
    flags += "--no-anneal --heartbeat-timeout 7 --max-restarts 3 --stack 2 "
    model = make_model(chosen(flags + " ".join(SMALL)))
    assert type(model.policy.optimizer) is SharedRMSProp
    assert model.lr_schedule(1.0) == model.lr_schedule(0.1) == 0.002
    assert (model.limits.heartbeat_timeout, model.limits.max_restarts) == (7, 3)
    assert model.policy.lstm_actor.hidden_size == 16
    assert model.observation_space.shape == (2, 84, 84)
    flags = "--env Klax --workers 2 --envs-per-worker 3 "
    model = make_model(chosen(flags + " ".join(SMALL)))
    assert (model.n_workers, model.n_envs) == (2, 6)


def test_an_evaluation_has_one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two wait for each other beside a training, and gain nothing with a few images."""
    seen = []

    def evaluate(*_: object) -> int:
        seen.append(torch.get_num_threads())
        return 0

    monkeypatch.setattr(ncrl.agents.atari.command, "evaluate", evaluate)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_here("--evaluate", str(tmp_path))
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_with_a_bonus_is_resumed_and_evaluated_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A game whose rewards are rare, and so also the note for games without hope."""
    arguments = ["--env", "montezuma_revenge", "--frames", "640", "--workers", "0", *SMALL]
    arguments += ["--bonus-warmup", "40", "--envs-per-worker", "2"]
    output = run_here(*arguments, "--logdir", str(tmp_path))
    assert "most runs then took the key" in " ".join(output.split())
    assert re.search(
        r"^bonus +snd, weight 0\.5 beside 10 .* after 40 timesteps$", output, re.MULTILINE
    )
    run = Run(tmp_path / "MontezumaRevenge-1", output)
    assert run.config["intrinsic_reward"] == "snd" and run.config["gamma"] == 0.999

    run_here("--resume", str(run.path), "--frames", "960")
    assert run.config["intrinsic_reward"] == "snd" and run.config["gamma"] == 0.999
    assert run.config["max_grad_norm"] == config_module.EXPLORING["max_grad_norm"]
    last = run.rows[-1]
    for name in ("int_reward", "int_value_loss", "predictor_loss", "kept_demonstrations"):
        assert last[f"train/{name}"] != "", name
    with zipfile.ZipFile(newest_checkpoint(run.path / "checkpoints").path) as archive:
        state = torch.load(io.BytesIO(archive.read("exploration.pth")), weights_only=True)
    assert state["_extra_state"]["num_timesteps"] == 240, "it went on where it was"

    for flags, words in {
        "--intrinsic-reward none": ["intrinsic_reward", "'snd' -> 'none'"],
        "--bonus-encoder nature": ["bonus_encoder", "'a3c' -> 'nature'"],
        "--int-coef 0": ["int_coef", "0.5 -> 0.0"],
    }.items():
        arguments = ["--resume", str(run.path), "--frames", "1280", *flags.split()]
        assert exit_code(arguments) == 2
        refused = capsys.readouterr().err
        assert refused.count("\n") == 1
        assert all(word in refused for word in words), refused


def test_a_run_from_before_there_was_a_bonus_goes_on_without(tmp_path: Path) -> None:
    """And rooms are told where there are some."""
    arguments = ["--env", "montezuma_revenge", "--frames", "160", "--workers", "0", *SMALL]
    arguments += ["--envs-per-worker", "2", "--intrinsic-reward", "none"]
    run = Run(tmp_path / "MontezumaRevenge-1", run_here(*arguments, "--logdir", str(tmp_path)))
    assert "bonus      " not in run.output
    config = {key: value for key, value in run.config.items() if key != "intrinsic_reward"}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    told = run_here("--evaluate", str(run.path), "--episodes", "1")
    assert re.search(r"^game 1 of 1: score \d+, [\d,]+ timesteps, rooms 1", told, re.MULTILINE)
    assert re.search(r"^rooms entered: \d+ \(1", told, re.MULTILINE)
    run_here("--resume", str(run.path), "--frames", "320")
    assert run.config["intrinsic_reward"] == "none"
    assert settings(RunConfig(**run.config)) == ORDINARY | {"frames": 320}


# Going on.


def test_resume_goes_on_to_the_new_total(run: Run) -> None:
    before = run.rows
    output = run_here("--resume", str(run.path), "--frames", "8960", "--gae-lambda", "0.9")
    assert "game       Klax, 8,960 frames, 8,000 played" in output
    (logdir,) = re.findall(r"^curves .* --logdir (.*)$", output, re.MULTILINE)
    assert Path(logdir) in (run.path, run.path.parent), "of the folder that it was moved to"
    assert "8,960 frames played" in output
    assert newest_checkpoint(run.path / "checkpoints").timesteps == 2240
    after = run.rows
    assert after[: len(before)] == before
    assert [int(row["time/total_timesteps"]) for row in after[len(before) :]] == [2200, 2240]
    assert int(after[-1]["train/n_updates"]) == int(before[-1]["train/n_updates"]) * 56 / 50
    steps = [event.step for event in run.events.Scalars("train/learning_rate")]
    assert steps == sorted(steps) and set(steps) == POINTS | {2200, 2240}
    expected = {"frames": 8960, "seed": 3, "gae_lambda": 0.9}
    assert expected.items() <= run.config.items()


@pytest.fixture
def interrupted_as_training_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = A3C._setup_learn

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return setup(*arguments, **options)

    monkeypatch.setattr(A3C, "_setup_learn", interrupted)


@pytest.mark.usefixtures("interrupted_as_training_begins")
def test_a_resumed_run_that_is_stopped_before_it_plays_adds_no_point(run: Run) -> None:
    before = run.rows
    assert main(["--resume", str(run.path), "--frames", "9000"]) == 130
    assert run.rows == before


def test_f13_resume_passes_over_damage_and_replaces_what_came_after(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a kill: the curves were ahead of the checkpoint."""
    victim = newest_checkpoint(run.path / "checkpoints").path
    victim.write_bytes(victim.read_bytes()[:-1])
    before = run.rows
    output = run_here("--resume", str(run.path))
    assert "8,000 frames, 7,200 played" in output
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert str(victim) in warning
    assert newest_checkpoint(run.path / "checkpoints").path == victim, "it is whole again"
    again = run.rows
    assert [row["time/frames"] for row in again] == [row["time/frames"] for row in before]
    clocks = {"time/fps", "time/time_elapsed", "time/iterations"}
    for key in before[-1].keys() - clocks:
        assert again[-1][key] == before[-1][key], (key, "a serial run plays the same again")
    steps = [event.step for event in run.events.Scalars("train/learning_rate")]
    assert steps == sorted(steps) and set(steps) == POINTS


def test_f17_resume_with_another_number_of_games(run: Run) -> None:
    output = run_here("--resume", str(run.path), "--frames", "8640", "--envs-per-worker", "8")
    assert "serial, 8 games" in output
    assert newest_checkpoint(run.path / "checkpoints").timesteps == 2160
    assert int(run.rows[-1]["train/n_updates"]) > 50
    assert run.config["games"] == 8


def test_a_resume_that_plays_nothing_changes_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that is there holds the games, by which a serial run goes on bit for bit."""

    def no_workers(*_arguments: Any, **_options: Any) -> Any:
        raise WorkerError("they cannot start")

    files = [*(run.path / "checkpoints").iterdir(), run.path / "config.yaml"]
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr("ncrl.agents.a3c.played_by_workers", no_workers)
    changed = ["--workers", "2", "--learning-rate", "0.5", "--frames", "8640"]
    assert main(["--resume", str(run.path), *changed]) == 1
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("workers", range(7))
def test_f17_the_games_of_a_run_are_kept_by_any_number_of_workers(
    workers: int, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("env: Pong\ngames: 16\nworkers: 2\n")
    modes: dict[str, Any] = {"resume": str(tmp_path), "config": None}
    config, run = config_module.choose_config({"workers": workers}, modes)
    assert run is not None
    run.close()
    assert config.games == 16
    nearest = min(abs(n - workers) for n in (1, 2, 4, 8, 16))
    assert config.workers is not None and abs(config.workers - workers) <= nearest
    assert workers == 0 or 16 % config.workers == 0


def test_f17_a_resume_that_fails_leaves_the_configuration(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run.path / "config.yaml").read_bytes()
    monkeypatch.setattr(A3C, "train", raising(NonFiniteError("the gradient")))
    flags = ["--frames", "9000", "--learning-rate", "2.0"]
    assert main(["--resume", str(run.path), *flags]) == 1
    assert (run.path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("value", [2**31, 10**12 + 1, 10**400, -1])
def test_no_setting_is_without_bounds(value: int) -> None:
    """Of those that make something larger or longer; a seed is none."""
    for entry in fields(RunConfig):
        if "int" in str(entry.type) and (value > 10**12 or entry.metadata["high"] < 2**31):
            with pytest.raises(ValueError, match=entry.name) as error:
                configure({entry.name: value}, RunConfig(env="Pong"), "the flags")
            assert len(str(error.value)) < 300


def test_f20_memory_that_runs_out_while_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lack = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    monkeypatch.setattr(ncrl.agents.atari.train, "A3C", raising(lack))
    assert exit_code(short(tmp_path)) == 2
    assert re.fullmatch(r".*out of memory; lower games.*n_steps.*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [], "and no empty run is left"


def test_f20_rollouts_larger_than_the_memory_are_refused_before_a_game_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ncrl.agents.atari.train, "A3C", raising(AssertionError("too late")))
    large = ["--envs-per-worker", "1024", "--n-steps", "100000"]
    assert exit_code(short(tmp_path, *large)) == 2
    assert re.fullmatch(r".*need [\d,]+ MB of memory.*n_steps\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_f11_a_disk_that_is_full_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    full = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr(ncrl.agents.runs.directory, "write_atomically", full)
    assert exit_code(short(tmp_path)) == 2
    assert re.fullmatch(r".*Klax-1: No space left on device\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_resumed(run: Run, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for flags, asked in (([], "8,000"), (["--frames", "80"], "80")):
        assert exit_code(["--resume", str(run.path), *flags]) == 2
        told = capsys.readouterr().err
        assert re.fullmatch(rf".* 8,000 frames, of {asked}; .*--frames.*\n", told)
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def test_f13_without_a_whole_checkpoint_nothing_starts(
    run: Run, capsys: pytest.CaptureFixture
) -> None:
    for path in run.path.rglob("step_*.zip"):
        path.write_bytes(b"")
    for flags in (["--resume"], ["--evaluate"]):
        assert exit_code([*flags, str(run.path)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith("none of its checkpoints is whole")


def test_evaluate_prints_raw_scores(run: Run) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    outputs = [run_here("--evaluate", str(run.path), "--episodes", "3") for _ in range(2)]
    number = r"(-?[\d.]+)"
    found = re.search(
        rf"^Klax after 2,000 timesteps \(8,000 frames\): raw score of 3 whole games: "
        rf"mean {number}, std {number}, min {number}, max {number}; mean length (\d+) timesteps$",
        outputs[0],
        re.MULTILINE,
    )
    assert found, outputs[0]
    mean, std, low, high, length = map(float, found.groups())
    assert length > 50
    assert outputs[0] == outputs[1], "one seed, the same games"
    games = re.findall(r"^game (\d) of 3: score (-?\d+), ", outputs[0], re.MULTILINE)
    assert [int(game) for game, _ in games] == [1, 2, 3]
    scores = [float(score) for _, score in games]
    assert (low, high) == (min(scores), max(scores))
    assert (mean, std) == pytest.approx((np.mean(scores), np.std(scores)), abs=0.01)
    assert outputs[0].startswith("playing 3 whole games with ")
    best = run_here("--evaluate", str(run.path), "--episodes", "1", "--best")
    assert "with its best model: raw score of 1" in best and "best_model.zip" in best
    assert "protocol machado" in outputs[0] and "sampled actions" in outputs[0]
    assert before == {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}


def test_evaluation_is_of_the_runs_weights_in_games_that_training_has_not_played(
    tmp_path: Path,
) -> None:
    """For these weights the likeliest of two actions is one and the same, whatever is seen."""
    flags = "--env Klax --protocol classic --workers 0 --envs-per-worker 1 --seed 3 "
    config = chosen(flags + " ".join(SMALL))
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.policy.action_net.parameters():
            parameter.zero_()
        model.policy.action_net.bias[:2] = torch.tensor([1000.5, 1000.0])
    with RunDirectory.create(tmp_path, "Klax") as made:
        made.write_config(asdict(config))
        save_checkpoint(model, made.checkpoints)
    told = run_here("--evaluate", str(made.path), "--episodes", "2", "--deterministic")
    found = re.findall(r"^game \d of 2: score (\S+), (\d+) timesteps$", told, re.MULTILINE)

    def by_hand(seed: int) -> list[tuple[str, str]]:
        env = config_module.make_factory(config)(2, seed)
        env.reset()
        ended: dict[int, tuple[str, str]] = {}
        while len(ended) < 2:
            env.step_async(np.zeros(2, np.int64))
            for i, info in enumerate(env.step_wait()[3]):
                if "episode" in info:
                    score, length = info["episode"]["r"], info["episode"]["l"]
                    ended.setdefault(i, (f"{score:g}", str(length)))
        return list(ended.values())

    assert found == by_hand(3 + UNPLAYED) != by_hand(3)


@pytest.mark.parametrize("episodes", ["0", "1"])
def test_evaluate_films_a_game(episodes: str, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    arguments = ["--evaluate", str(run.path), "--episodes", episodes, "--video", str(path)]
    output = run_here(*arguments, "--deterministic", "--seed", "5")
    assert re.search(rf"^video of one game \(score \d+\): {path}$", output, re.MULTILINE)
    assert output.count("game 1 of 1") == int(episodes)
    assert "likeliest actions" in output and "seed 5" in output
    video = cv2.VideoCapture(str(path))
    frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    readable, image = video.read()
    video.release()
    assert readable and image.std() > 0 and frames > 20
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.mp4"]


def test_a_film_that_cannot_be_written_is_said_in_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out.mp4").symlink_to(tmp_path / "absent" / "out.mp4")
    film = ["--episodes", "1", "--video", str(tmp_path / "out.mp4")]
    assert main(["--evaluate", str(run.path), *film]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"\S+: OpenCV cannot write the video .*out.mp4'", last)


# What goes wrong while it runs.


def short(folder: Path, *more: str) -> list[str]:
    """A run of one game and 10 updates of 5 timesteps."""
    arguments = ["--env", "Klax", "--frames", "200", "--workers", "0", "--envs-per-worker", "1"]
    return [*arguments, "--n-steps", "5", *SMALL, "--logdir", str(folder), *more]


def raising(error: BaseException) -> Callable:
    def function(*_arguments: Any, **_options: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NonFiniteError("the gradient was not finite"), ["gradient"]),
        # F20
        (torch.OutOfMemoryError("CUDA out of memory"), ["out of memory", "envs", "n_steps"]),
        (MemoryError(), ["memory", "envs", "n_steps"]),
        # No argument is to blame for these.
        (ValueError("Expected parameter logits"), ["Expected parameter logits"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_while_running_is_1_and_leaves_the_checkpoint(
    error: Exception,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    train, calls = A3C.train, iter(range(100))
    monkeypatch.setattr(
        A3C, "train", lambda model: train(model) if next(calls) < 5 else raising(error)()
    )
    assert exit_code(short(tmp_path, "--checkpoint-every", "40")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in last, last
    assert newest_checkpoint(tmp_path / "Klax-1" / "checkpoints").timesteps == 20


def test_a_run_whose_workers_cannot_go_on_keeps_what_it_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    collect, calls = A3C._collect, iter(range(100))

    def collect_five(*arguments: Any) -> Any:
        error = WorkerError("worker 0 (pid 12) died")
        return (collect if next(calls) < 5 else raising(error))(*arguments)

    monkeypatch.setattr(A3C, "_collect", collect_five)
    assert main(short(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert "--resume" in out.splitlines()[-1] and "--frames" not in out.splitlines()[-1]
    assert "worker 0 (pid 12) died" in err.splitlines()[-1]
    assert newest_checkpoint(tmp_path / "Klax-1" / "checkpoints").timesteps == 25


@pytest.mark.parametrize("stop", [False, True])
def test_f11_a_full_disk(
    stop: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        ncrl.agents.runs.directory,
        "save_checkpoint",
        raising(OSError(28, "No space left on device")),
    )
    flag = "--stop-on-save-error" if stop else "--no-stop-on-save-error"
    code = exit_code(short(tmp_path, "--checkpoint-every", "40", flag))
    output = capsys.readouterr()
    if stop:
        assert code == 1
        assert output.err.count("\n") == 1 and "No space left on device" in output.err
        assert "None" not in output.err
    else:
        assert code == 1 and "200 / 200 frames" in output.out
        assert "No space left on device" in caplog.text
        assert "the last checkpoint could not be written" in output.err.splitlines()[-1]


def test_the_line_to_go_on_with_does_so_after_a_stop_before_the_first_timestep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was played the settings of the run are those that it had."""
    run_here(*short(tmp_path))
    arguments = ["--resume", str(tmp_path / "Klax-1"), "--frames", "400"]
    with monkeypatch.context() as stopped:
        stopped.setattr(ncrl.agents.atari.train, "_play_on", lambda *_: None)
        told = run_here(*arguments).splitlines()[-1]
    assert told.endswith(" ".join(["run_atari.py", *arguments])), told
    assert "400 / 400 frames" in run_here(*arguments)


def test_f11_a_disk_without_room_for_the_best_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr(ncrl.agents.runs.directory.BestModel, "compare", full)
    assert "go on with" in run_here(*short(tmp_path))
    assert "No space left on device" in caplog.text
    assert newest_checkpoint(tmp_path / "Klax-1" / "checkpoints").timesteps == 50


def rows_of_profile(output: str) -> dict[str, list[str]]:
    """The table that `--profile` prints, by phase."""
    lines = [line.split() for line in output.splitlines()]
    rows = {line[0]: line[1:] for line in lines if line and line[0] in (*PHASES, "total")}
    assert rows == {} or list(rows) == [*PHASES, "total"]
    return rows


@pytest.mark.parametrize("workers", ["0", "1"])
def test_profile_shows_where_the_time_goes(workers: str, tmp_path: Path) -> None:
    arguments = short(tmp_path, "--log-every", "5", "--workers", workers)
    rows = rows_of_profile(run_here(*arguments, "--profile"))
    shares = {name: cells[1::2][: 1 + int(workers)] for name, cells in rows.items()}
    assert shares.pop("total") == ["100.0"] * (1 + int(workers))
    for column in zip(*shares.values(), strict=True):
        whole = sum(float(share.replace("-", "0")) for share in column)
        assert whole == pytest.approx(100, abs=0.05 * len(column)), "each is rounded"
    assert (rows["environment"][0] == "-") == (workers == "1"), "in the process that plays"
    made = Run(tmp_path / "Klax-1", "")
    processes = ["learner", "workers"] if workers == "1" else ["learner"]
    curves = {f"profile/{process}/{name}" for process in processes for name in PHASES}
    assert {tag for tag in made.events.Tags()["scalars"] if tag.startswith("profile/")} == curves
    assert "profile" not in made.config, "it is about one start of the program"


def test_profile_of_a_resumed_run_and_none_without_the_flag(tmp_path: Path) -> None:
    assert rows_of_profile(run_here(*short(tmp_path))) == {}
    resume = ["--resume", str(tmp_path / "Klax-1"), "--log-every", "5"]
    assert rows_of_profile(run_here(*resume, "--frames", "400", "--profile")) != {}
    assert rows_of_profile(run_here(*resume, "--frames", "600")) == {}
    rows = Run(tmp_path / "Klax-1", "").rows
    assert [int(row["time/total_timesteps"]) for row in rows] == [50, 75, 100, 125, 150]
    measured = [bool(row["profile/learner/forward"]) for row in rows]
    assert measured == [False, True, True, False, False]


@pytest.mark.parametrize("end", ["interrupted", "failed"])
def test_profile_is_shown_however_the_run_ends(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    train = A3C.train

    def once(model: A3C) -> None:
        train(model)
        if end == "failed":
            raise NonFiniteError("the gradient")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(A3C, "train", once)
    assert main(short(tmp_path, "--profile")) == (130 if end == "interrupted" else 1)
    rows = rows_of_profile(capsys.readouterr().out)
    assert rows["total"][1] == "100.0" and rows["backward"][0] != "-"


def test_f11_a_disk_that_fills_up_while_curves_are_written(tmp_path: Path) -> None:
    """No file may grow beyond 4 kB: checkpoints, curves and events all fail."""
    code = "import resource, sys, run_atari; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY)); "
    code += "sys.exit(run_atari.main(sys.argv[1:]))"
    done = subprocess.run(
        # Files that Python closes itself complain from 3.13 on, and before in this mode.
        [sys.executable, "-X", "dev", "-c", code, *short(tmp_path, "--log-every", "1")],
        cwd=SCRIPT.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1, done.stderr
    assert "200 / 200 frames" in done.stdout
    assert "could not save" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_f8_an_interrupt_before_training_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is built, or the games of a resumed run are played again."""
    monkeypatch.setattr(ncrl.agents.atari.train, "make_model", raising(KeyboardInterrupt()))
    assert exit_code(short(tmp_path)) == 130


@pytest.mark.usefixtures("interrupted_as_training_begins")
def test_f8_an_interrupt_as_training_begins_is_not_lost(tmp_path: Path) -> None:
    assert main(short(tmp_path)) == 130
    assert not (tmp_path / "Klax-1").exists(), "nothing was played, nothing is kept"


@contextlib.contextmanager
def hang_up_handled_by(handler: Any) -> Iterator[None]:
    """Also in processes that are started inside; these tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_says_so_twice() -> None:
    """The shell to its jobs, and then the kernel to whoever is in front."""
    with hang_up_handled_by(signal.SIG_DFL), stop_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code == 129


def test_nohup_is_respected() -> None:
    with hang_up_handled_by(signal.SIG_IGN), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code == 0


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_f8_f9_a_signal_during_the_imports(name: str, code: int) -> None:
    program = f"""
import os, runpy, signal, sys
class Impatient:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Impatient())
sys.argv = ["run_atari.py", "--env", "Pong"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_f8_a_second_interrupt_during_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*_arguments: Any, **_options: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(ncrl.agents.runs.directory, "save_checkpoint", impatient)
    assert exit_code(short(tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# A run with a worker.


@pytest.fixture(scope="module")
def worker_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    logdir = tmp_path_factory.mktemp("worker") / "logs"
    arguments = ["--env", "Pong", "--workers", "1", "--envs-per-worker", "4", "--n-steps", "10"]
    arguments += ["--frames", "1616", "--log-every", "3", *SMALL, "--logdir", str(logdir)]
    return Run(logdir / "Pong-1", run_here(*arguments))


def test_a_run_with_a_worker(worker_run: Run) -> None:
    path, output = worker_run
    assert "playing    1 worker of 4 games, 10 timesteps per rollout\n" in output
    assert f" -m tensorboard.main --logdir {path.parent}\n" in output
    assert "1,616 / 1,616 frames" in output and f"--resume {path} --frames 3232\n" in output
    assert not CONTROL.search(output)
    assert newest_checkpoint(path / "checkpoints").timesteps == 404
    tags = worker_run.events.Tags()
    unfinished = {"rollout/ep_rew_mean", "rollout/ep_len_mean"}
    assert set(tags["scalars"]) >= TAGS - unfinished, TAGS - set(tags["scalars"])
    assert set(tags["histograms"]) >= HISTOGRAMS
    lags = [event.value for event in worker_run.events.Scalars("train/policy_lag")]
    assert max(lags) > 0, "workers play ahead of the learner"
    assert float(worker_run.rows[0]["time/worker_restarts"]) == 0


def test_f17_resume_without_the_workers(worker_run: Run, tmp_path: Path) -> None:
    path = tmp_path / "Pong-1"
    shutil.copytree(worker_run.path, path)
    output = run_here("--resume", str(path), "--workers", "0", "--frames", "1776")
    assert "1,616 played" in output and "serial, 4 games" in output
    assert newest_checkpoint(path / "checkpoints").timesteps == 444
    run = Run(path, output)
    assert int(run.rows[-1]["train/n_updates"]) > 11
    steps = [int(row["time/total_timesteps"]) for row in run.rows]
    assert steps == sorted(set(steps)) and steps[-1] == 444


# Real processes.


class Process:
    """A run in a process group of its own, as a terminal starts it."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.popen = subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.children: list[psutil.Process] = []

    def wait_for(self, condition: Callable[[], bool]) -> None:
        ready = wait_until(lambda: condition() or self.popen.poll() is not None, SECONDS)
        assert ready and self.popen.poll() is None, self.popen.communicate()
        self.children = psutil.Process(self.popen.pid).children(recursive=True)

    def press_ctrl_c(self) -> None:
        self.signal_from_terminal(signal.SIGINT)

    def signal_from_terminal(self, number: signal.Signals) -> None:
        """The terminal sends it to the whole group."""
        os.killpg(self.popen.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code and stderr; nobody may be left."""
        _, errors = self.popen.communicate(timeout=SECONDS)
        assert wait_until(lambda: not any(map(is_alive, self.children)), 5.0)
        return self.popen.returncode, errors


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start_process(*arguments: str) -> Process:
        processes.append(Process(*arguments, cwd=tmp_path))
        return processes[-1]

    yield start_process
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.communicate()


ENDLESS = ["--env", "Pong", "--frames", "100_000_000", *SMALL, "--logdir", ".", "--log-every", "1"]


def has_curves(path: Path) -> bool:
    return path.is_file() and path.read_text().count("\n") >= 3


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [("2", signal.SIGINT, 130), ("0", signal.SIGTERM, 143), ("1", signal.SIGHUP, 129)],
    ids=["F8 SIGINT, workers", "F9 SIGTERM, serial", "closed terminal, a worker"],
)
def test_a_signal_ends_the_run_with_a_checkpoint(
    workers: str,
    number: signal.Signals,
    code: int,
    start: Callable[..., Process],
    tmp_path: Path,
) -> None:
    with hang_up_handled_by(signal.SIG_DFL):
        process = start(*ENDLESS, "--workers", workers, "--envs-per-worker", "2")
    path = tmp_path / "Pong-1"
    process.wait_for(lambda: has_curves(path / "progress.csv"))
    assert list((path / "checkpoints").iterdir()) == []
    assert len(process.children) >= int(workers)
    if number == signal.SIGTERM:
        process.popen.send_signal(number)
    else:
        process.signal_from_terminal(number)
    assert process.end() == (code, "")
    checkpoint = newest_checkpoint(path / "checkpoints")
    rows = Run(path, "").rows
    assert checkpoint.timesteps == int(rows[-1]["time/total_timesteps"]) > 0
    assert len(list((path / "checkpoints").iterdir())) == 1


def test_f8_sigint_twice_leaves_at_once(run: Run, start: Callable[..., Process]) -> None:
    """The update it is in takes much longer than the test."""
    before = {p: p.read_bytes() for p in (run.path / "checkpoints").iterdir()}
    long = ["--frames", "100_000_000", "--envs-per-worker", "1"]
    long += ["--n-steps", "20_000", "--batch-size", "20_000"]
    process = start("--resume", str(run.path), *long)
    assert process.popen.stdout is not None
    for line in process.popen.stdout:
        if line.startswith("curves"):
            break
    time.sleep(1.5)  # into the update
    process.press_ctrl_c()
    assert not wait_until(lambda: process.popen.poll() is not None, 0.5)
    process.press_ctrl_c()
    assert process.end() == (130, "")
    assert {p: p.read_bytes() for p in (run.path / "checkpoints").iterdir()} == before


def test_f24_head_takes_one_line_and_goes(tmp_path: Path) -> None:
    """`python run_atari.py ... | head -1`"""
    process = Process(*short(tmp_path, "--log-every", "1"), cwd=tmp_path)
    out = process.popen.stdout
    assert out is not None and out.readline().startswith("game")
    out.close()
    errors = process.popen.stderr
    assert errors is not None and errors.read() == ""
    errors.close()
    assert process.popen.wait(SECONDS) == 0
    assert newest_checkpoint(tmp_path / "Klax-1" / "checkpoints").timesteps == 50


def test_f24_no_stdout_at_all(tmp_path: Path) -> None:
    """`python run_atari.py ... >&-`, as some job systems start programs."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command(*short(tmp_path))],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert newest_checkpoint(tmp_path / "Klax-1" / "checkpoints").timesteps == 50
