"""The shared flags: which recipes they name, where runs are kept, and how a command ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncrl.settings import parse
from ncrl.tasks.algorithms import experiment as algorithms
from ncrl.tasks.command import (
    NamedRecipe,
    Session,
    check_figure,
    choose_device,
    locked,
    named_recipes,
    run_command,
    task_parser,
)
from ncrl.tasks.experiment import Experiment, random_stream
from ncrl.tasks.polynomial import experiment as polynomial
from ncrl.tasks.recipes import CONFIGS, Recipe
from ncrl.yaml_files import find_config
from tests.ncrl.tasks.files import read_recipe

ROOT = Path(__file__).resolve().parents[3]


class Constant(Experiment):
    """Learn one number."""

    data = "generated"

    def __init__(self, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.model = nn.Linear(1, 1).to(device)
        self.seed, self.num_updates, self.evaluate_every = seed, recipe.iterations or 3, 2
        self.rate = recipe.learning_rate

    def loss(self, update: int) -> Tensor:
        x = torch.randn(4, 1, generator=random_stream(self.seed, "train", update))
        loss: Tensor = (self.model(x) - 1).square().mean()
        return loss

    def evaluate(self) -> dict[str, float]:
        return {"mse": float((self.model(torch.ones(1, 1)) - 1).square())}


def given(*words: str) -> dict[str, Any]:
    return parse(task_parser("mnist", "A task."), words)


def named(*words: str, config: str = "cifar_mlp.yaml") -> dict[str, Recipe]:
    return {one.name: one.recipe for one in named_recipes(given(*words), config)}


def test_without_flags_it_is_the_recipe_at_the_top() -> None:
    assert named() == {"cifar_mlp": read_recipe(CONFIGS / "cifar_mlp.yaml")}


def test_a_command_needs_no_description() -> None:
    """`python -OO` takes them away."""
    assert "--layer" in task_parser("mnist", None).format_help()


def test_variants_and_layers_are_looked_up() -> None:
    path = CONFIGS / "cifar_mlp.yaml"
    assert named("--variant", "base", "moe") == {
        "cifar_mlp": read_recipe(path),
        "cifar_mlp moe": read_recipe(path, "moe"),
    }
    assert named("--layer", "neurocoder", "nsm", "neurocoder") == {
        "cifar_mlp": read_recipe(path),
        "cifar_mlp nsm": read_recipe(path, "nsm"),
    }
    found = named("--variant", "base", "cifar100", "--layer", "linear", "neurocoder")
    assert found == {
        "cifar_mlp linear": read_recipe(path, "linear"),
        "cifar_mlp": read_recipe(path),
        "cifar_mlp linear_cifar100": read_recipe(path, "linear_cifar100"),
        "cifar_mlp cifar100": read_recipe(path, "cifar100"),
    }


def test_a_layer_without_a_variant_has_default_options() -> None:
    ((name, recipe),) = named("--layer", "film").items()
    assert name == "cifar_mlp film" and recipe.layer == "film" and recipe.layer_options == {}
    assert recipe.network_options == read_recipe(CONFIGS / "cifar_mlp.yaml").network_options
    assert recipe.paper_parameters is None


def test_flags_change_the_recipe_and_its_name() -> None:
    words = ["--learning-rate", "0.5", "--iterations", "7", "--max-grad-norm", "2"]
    words += ["--layer-options", "sharpness=5", "residual=false", "--network-options", "hidden=[9]"]
    ((name, recipe),) = named(*words).items()
    base = read_recipe(CONFIGS / "cifar_mlp.yaml")
    assert recipe.learning_rate == 0.5 and recipe.max_grad_norm == 2.0
    assert (recipe.iterations, recipe.epochs) == (7, None)
    assert recipe.layer_options == {**base.layer_options, "sharpness": 5, "residual": False}
    assert recipe.network_options == {**base.network_options, "hidden": [9]}
    for part in ("learning_rate=0.5", "iterations=7", "sharpness=5", "hidden=[9]"):
        assert part in name
    changed = NamedRecipe("x", base).changed(num_steps=3)
    assert changed.name == "x num_steps=3" and changed.recipe.layer_options["num_steps"] == 3


def test_options_change_the_recipes_whose_layer_or_network_has_them() -> None:
    words = ["--layer", "linear", "neurocoder", "nsm", "--layer-options", "num_slots=7"]
    found = named(*words, "gate=head")
    assert list(found) == [
        "cifar_mlp linear",
        "cifar_mlp num_slots=7 gate=head",
        "cifar_mlp nsm num_slots=7",
    ]
    assert found["cifar_mlp linear"] == read_recipe(CONFIGS / "cifar_mlp.yaml", "linear")
    with pytest.raises(
        ValueError, match="unknown option 'num_slot' in layer_options; nearest: num_slots"
    ):
        named("--layer", "linear", "nsm", "--layer-options", "num_slot=7")


def test_configs_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert (
        find_config("mnist", CONFIGS)
        == find_config("mnist.yaml", CONFIGS)
        == CONFIGS / "mnist.yaml"
    )
    own = tmp_path / "own.yaml"
    own.write_text("task: mnist\nnetwork: gru\n")
    assert list(named("--config", str(own))) == ["own"]
    assert find_config(str(tmp_path), CONFIGS) == tmp_path, "whoever reads it says what it is"


REFUSED: list[tuple[Sequence[str], str]] = [
    (["--layer", "lineer"], r"unknown layer 'lineer'; nearest: linear"),
    (["--variant", "mapsj1"], r"unknown variant 'mapsj1' of .*mnist.yaml; nearest: maps_j1"),
    (["--config", "cifar_mpl"], r"no config 'cifar_mpl'; nearest: cifar_mlp"),
    (["--layer-options", "sharpnes=5"], r"unknown option 'sharpnes'.*nearest: sharpness"),
    (["--layer-options", "sharpness"], r"--layer-options takes NAME=VALUE, got 'sharpness'"),
    (["--layer-options", "sharpness=[1"], r"--layer-options 'sharpness=\[1'"),
    (["--layer-options", "num_slots=0"], r"num_slots must be an integer of at least 1"),
    (["--optimizer", "adm"], r"optimizer must be one of .*nearest: adam"),
    (["--epochs", "0"], r"epochs must lie in 1"),
    (["--epochs", "1", "--iterations", "1"], r"exclude each other"),
    (["--learning-rate", "nan"], r"learning_rate must .*nan"),
    (["--learning-rate", "fast"], r"invalid float value: 'fast'"),
    (["--seeds", "-1"], r"seeds must lie in 0"),
    (["--seeds", "x"], r"invalid int value: 'x'"),
    (["--sedes", "1"], r"unknown argument '--sedes'; nearest: --seeds"),
    (["--device", "gpu"], r"device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    (["--device", "cuda:99"], r"device cuda:99 is not there"),
    (["--threads", "0"], r"threads must lie in 1 .. 1024, got 0"),
    (["--threads", "2147483648"], r"threads must lie in 1 .. 1024"),
    (["--seeds", "2147483648"], r"seeds must lie in 0"),
    (["--batch-size", "2147483648"], r"batch_size must lie in 1 .. 65536"),
    (["--epochs", "9" * 400], r"epochs must lie in 1 .. 100000, got a number of about 400 digits"),
    (["--num-steps", "2147483648"], r"num_steps must be at most 100,000, got 2147483648"),
    (["--network-options", "num_features=10000000"], r"num_features must be at most 100,000"),
    (["--network-options", "num_features=[[1]]"], r"num_features must be "),
    (
        ["--network-options", "num_features=99999", "--layer-options", "key_dim=99999"],
        r"may have 1,0",
    ),
    (["--figure", "x.gif"], r"--figure must end in one of .png, .svg, .pdf"),
    (["--figure", "/no/such/x.png"], r"its folder does not exist"),
    (["--data-dir", "/no/such"], r"--data-dir must be a folder: /no/such does not exist"),
    (["--logdir", "/dev/null/x"], r"cannot write to /dev/null/x"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_bad_input_is_one_line_and_exit_code_2(
    words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ncrl.tasks.mnist.experiment import main

    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def session(tmp_path: Path, *words: str) -> Session:
    return Session("toy", given("--logdir", str(tmp_path), "--device", "cpu", *words))


TOY = NamedRecipe("toy", Recipe())


def test_a_finished_run_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session(tmp_path, "--seeds", "0", "1", "0").run([TOY], Constant)
    assert [row.seed for row in first] == [0, 1]
    monkeypatch.setattr(Constant, "loss", None)
    assert session(tmp_path, "--seeds", "1", "0").run([TOY], Constant) == first[::-1]
    assert capsys.readouterr().out.count("finished before") == 2


def test_finished_shows_what_is_there_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session(tmp_path, "--seeds", "0", "2").run([TOY], Constant)
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Constant, "loss", None)
    work = session(tmp_path, "--finished", "--seeds", "0", "1", "2")
    named = TOY._replace(labels={"variant": "toy", "changes": ""})
    rows = work.run([NamedRecipe("toy", Recipe(learning_rate=0.5)), named], Constant)
    assert rows == [dataclasses.replace(row, labels=named.labels) for row in first]
    assert sorted(tmp_path.rglob("*")) == files


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    changed = NamedRecipe("toy", Recipe(learning_rate=0.5))
    rows = session(tmp_path).run([TOY, changed], Constant)
    assert rows[0].metrics != rows[1].metrics
    folders = {path.parent for path in tmp_path.rglob("result.json")}
    assert len(folders) == 2
    for folder in folders:
        assert json.loads((folder / "recipe.json").read_text())["data"] == "generated"
        assert list(folder.glob("events.out.tfevents.*")) and (folder / "model.pt").is_file()


def test_a_recipe_with_many_changes_has_a_folder_of_its_own(tmp_path: Path) -> None:
    name = " ".join(f"setting_{number}={number}" for number in range(30))
    recipes = [NamedRecipe(f"{name} {rate}", Recipe(learning_rate=rate)) for rate in (0.1, 0.2)]
    assert len(session(tmp_path).run(recipes, Constant)) == 2
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_the_trained_network_can_be_had_again_unless_it_is_damaged(tmp_path: Path) -> None:
    work = session(tmp_path)
    (row,) = work.run([TOY], Constant)
    experiment = work.experiment(TOY, 0, Constant)
    assert not experiment.model.training
    with torch.no_grad():
        assert experiment.evaluate()["mse"] == row.metrics["mse"]
    with pytest.raises(ValueError, match=r"cannot read .*model.pt"):
        work.experiment(TOY, 1, Constant)
    (path,) = tmp_path.rglob("model.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read .*model.pt: it is damaged"):
        work.experiment(TOY, 0, Constant)


def test_the_row_of_another_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    work = session(tmp_path)
    work.run([TOY], Constant)
    (path,) = tmp_path.rglob("result.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match=r"result.json is the row of another run"):
        work.run([TOY], Constant)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"result.json: it is no regular file"):
        work.run([TOY], Constant)


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    work = session(tmp_path)
    (row,) = work.run([TOY], Constant)
    (path,) = tmp_path.rglob("result.json")
    path.unlink()
    for name in (".checkpoint.pt.abcd_123", ".model.pt.x1234567"):
        (path.parent / name).write_bytes(b"half")
    (path.parent / ".checkpoint.pt.mine").write_bytes(b"somebody's own")
    (again,) = work.run([TOY], Constant)
    assert again.metrics == row.metrics
    left = {file.name for file in path.parent.glob(".*")}
    assert left == {".lock", ".checkpoint.pt.mine"}


def test_lack_of_memory_on_the_cpu_says_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    def work(_session: Session) -> None:
        torch.empty(1 << 60)

    assert run_command("toy", task_parser("toy", "Toy."), [], work) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory: lower batch_size" in error


def test_a_run_that_somebody_else_is_at_is_waited_for_last(tmp_path: Path) -> None:
    work = session(tmp_path, "--seeds", "0", "1")
    order = []

    def make(recipe: Recipe, seed: int, device: torch.device) -> Experiment:
        order.append(seed)
        if len(order) == 3:  # seed 0 was passed over, seed 1 is done
            assert work.made(TOY, 1, Constant)[0].result is not None
            elsewhere.close()
        return Constant(recipe, seed, device)

    # A lock belongs to an open file, so this process can stand for another one.
    with contextlib.ExitStack() as elsewhere:
        assert elsewhere.enter_context(locked(work.made(TOY, 0, Constant)[0].folder))
        rows = work.run([TOY], make)
    assert order == [0, 1, 0] and [row.seed for row in rows] == [0, 1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_a_checkpoint(
    tmp_path: Path, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopping(Constant):
        def after_update(self, update: int) -> None:
            if update == 1:
                os.kill(os.getpid(), number)

    def work(session: Session) -> None:
        session.run([TOY], Stopping)

    parser = task_parser("mnist", "A task.")
    assert run_command("toy", parser, ["--logdir", str(tmp_path)], work) == code
    assert "the same command goes on from here" in capsys.readouterr().err
    assert list(tmp_path.rglob("checkpoint.pt"))
    assert len(session(tmp_path).run([TOY], Constant)) == 1


def test_a_failure_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Constant):
        def loss(self, update: int) -> Tensor:
            return super().loss(update) * float("nan")

    def work(session: Session) -> None:
        session.run([TOY], Broken)

    parser = task_parser("mnist", "A task.")
    assert run_command("toy", parser, ["--logdir", str(tmp_path)], work) == 1
    error = capsys.readouterr().err
    assert "the loss of update 0 is nan" in error and "Traceback" not in error


@pytest.mark.parametrize("flag", ["--data-dir x", "--download"])
@pytest.mark.parametrize("main", [polynomial.main, algorithms.main])
def test_tasks_that_make_their_data_have_no_flags_for_it(
    main: Any, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flag.split())
    assert f"unknown argument '{flag.split()[0]}'" in capsys.readouterr().err


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="finds 2 GPUs"):
        choose_device("cuda:2")


def test_figures_are_checked_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_figure(tmp_path / "x.svg")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot be written to"):
        patch.setattr(os, "access", lambda *_: False)  # a disk that is mounted for reading only
        check_figure(tmp_path / "x.svg")


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    from ncrl.tasks.cifar.experiment import main

    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--layer", "--config", "--seeds", "--data-dir", "--figure", "--orth-coef"):
        assert flag in text
    assert "python -m ncrl.tasks.cifar" in text


def test_configs_belong_to_the_package_and_are_those_of_the_repository() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, folder, some in (
        ("ncrl.tasks", "tasks", "mnist.yaml"),
        ("ncrl.agents.atari", "atari", "pong.yaml"),
    ):
        assert f'"{package}" = ["configs/*.yaml"]' in project
        ours, theirs = (
            {path.name: path.read_text("utf-8") for path in where.glob("*.yaml")}
            for where in (ROOT / package.replace(".", "/") / "configs", ROOT / "configs" / folder)
        )
        assert ours == theirs and some in ours


KEEPING = """
import resource, torch
from ncrl.tasks.command import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(1 << 20) for _ in range(8)]  # 4 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def test_the_task_that_the_page_writes_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "tasks.md"
    (example,) = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, str(page), "exec"), names)
    assert names["main"](["--logdir", str(tmp_path), "--device", "cpu"]) == 0
    assert "mse" in capsys.readouterr().out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """What is allocated again comes from the process itself, not page by page from the kernel."""
    done = subprocess.run(
        [sys.executable, "-c", KEEPING], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 1000, "20 times 8,192 pages without"
