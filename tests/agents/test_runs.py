"""Run directories: one owner, curves without repetition, saving that survives a full disk."""

import csv
import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ncrl.agents.runs.best
import ncrl.agents.runs.directory
import ncrl.shell.events
from ncrl.agents import A3C
from ncrl.agents.atari.config import choose_config, stored_config
from ncrl.agents.runs.best import FEWEST_GAMES, GAMES, WAITING, BestModel
from ncrl.agents.runs.checkpoints import CheckpointError, newest_checkpoint
from ncrl.agents.runs.directory import RunDirectory, SaveCheckpoints
from ncrl.envs import masked_cartpole
from ncrl.shell.lock import locked
from tests.agents.conftest import file_size_limit

ROOT = Path(__file__).parents[2]
SECONDS = 60


def make_model(**options: Any) -> A3C:
    defaults: dict[str, Any] = {"n_workers": 0, "n_envs": 4, "n_steps": 5, "seed": 1}
    defaults |= {"policy_kwargs": {"lstm_hidden_size": 8}, "device": "cpu"}
    return A3C("MlpLstmPolicy", masked_cartpole(), **(defaults | options))


# The folder and its lock.


def test_folders_are_numbered(tmp_path: Path) -> None:
    logdir = tmp_path / "not" / "there"
    runs = [RunDirectory.create(logdir, "Pong") for _ in range(3)]
    assert [run.path for run in runs] == [logdir / f"Pong-{n}" for n in (1, 2, 3)]
    assert all(run.checkpoints.is_dir() for run in runs)
    (logdir / "Pong-4").write_text("a file in the way")
    assert RunDirectory.create(logdir, "Pong").path == logdir / "Pong-5"
    assert RunDirectory.create(logdir, "Qbert").path == logdir / "Qbert-1"


def test_what_killed_processes_left_half_written_goes(tmp_path: Path) -> None:
    """Of any file of the run, a best model of many megabytes for example."""
    RunDirectory.create(tmp_path, "Pong").close()
    path = tmp_path / "Pong-1"
    for name in (
        ".best_model.zip.a1b2c3d_",
        ".config.yaml.12345678",
        "checkpoints/.step_1.zip.abcdefgh",
    ):
        (path / name).write_bytes(b"half")
    kept = [path / "best_model.zip", path / "checkpoints" / "step_1.zip"]
    for file in kept:
        file.write_bytes(b"whole")
    with RunDirectory(path):
        files = {file for file in path.rglob("*") if file.is_file()}
        assert files - set(kept) <= {path / ".lock", path / "lock"}


def test_the_file_of_an_earlier_release_says_nothing_of_what_there_was_not(tmp_path: Path) -> None:
    """Those runs had no bonus, and their residual programs a gate."""
    (tmp_path / "config.yaml").write_text("env: MontezumaRevenge\n")
    config = stored_config(tmp_path)
    assert config.intrinsic_reward == "none" and config.residual_gate


def test_a_run_with_a_bonus_and_no_gate_goes_on_so(tmp_path: Path) -> None:
    text = "env: MontezumaRevenge\nintrinsic_reward: snd\nresidual_gate: false\n"
    (tmp_path / "config.yaml").write_text(text)
    resumed, _ = choose_config({}, {"resume": str(tmp_path), "config": None})
    assert resumed.residual_gate is False


@pytest.mark.parametrize("wait", [False, True])
def test_a_folder_that_cannot_be_locked(
    wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network's file system, say; that nobody else has it is no comfort."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ValueError, match=f"cannot lock {tmp_path}: No locks available"),
        locked(tmp_path, wait=wait),
    ):
        pass


HOLDER = """
import sys
from pathlib import Path
from ncrl.agents.runs.directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that works on the run in `tmp_path`."""
    (tmp_path / "config.yaml").write_text("env: Pong\n")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_f23_two_processes_do_not_share_a_run(holder: subprocess.Popen, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in use by another process") as error:
        RunDirectory(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    holder.kill()
    holder.wait(SECONDS)
    run = RunDirectory(tmp_path)
    assert run.path == tmp_path


def test_f23_the_lock_holds_inside_one_process_too(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "Pong")
    run.write_config({"env": "Pong"})
    with pytest.raises(ValueError, match="in use"):
        RunDirectory(run.path)


def test_a_folder_that_cannot_be_used_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("env: Pong")
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(ValueError, match="cannot write") as caught:
        RunDirectory(tmp_path)
    (tmp_path / "checkpoints").unlink()
    with RunDirectory(tmp_path):  # its lock is free
        assert caught.tb is not None, "which keeps the failed one from being collected"


def test_a_removed_run_leaves_nothing_open(tmp_path: Path) -> None:
    def is_open(path: Path) -> bool:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return any(
            os.readlink(link).startswith(str(path)) for link in filter(os.path.islink, links)
        )

    run = RunDirectory.create(tmp_path, "Pong")
    run.make_logger().record("a/b", 1)
    assert is_open(run.path)
    run.remove()
    assert not run.path.exists() and not is_open(run.path)


# Curves.


def record(run: RunDirectory, entries: dict[int, dict[str, float]], since: int = 0) -> None:
    logger = run.make_logger(since)
    for step, values in entries.items():
        for key, value in ({"time/total_timesteps": step} | values).items():
            logger.record(key, value)
        logger.dump(step)
    logger.close()


def rows(run: RunDirectory) -> list[dict[str, str]]:
    with open(run.path / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def scalars(run: RunDirectory, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.path))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize(
    ("before", "since", "after"),
    [
        ([100, 200, 300, 400], 200, [300, 400]),
        ([100, 200], 150, [250]),  # a checkpoint between two points
        ([100, 200], 0, [100]),  # killed before the first one
    ],
)
def test_curves_go_on_without_what_is_played_again(
    before: list[int], since: int, after: list[int], tmp_path: Path
) -> None:
    run = RunDirectory.create(tmp_path, "Pong")
    record(run, {step: {"score": 1.0} for step in before})
    (events,) = run.path.glob("events.out.tfevents.*")  # read in the order of their names
    events.rename(run.path / "events.out.tfevents.0")
    record(run, {step: {"score": 2.0} for step in after}, since=since)
    expected = [(n, 1.0) for n in before if n <= since] + [(n, 2.0) for n in after]
    written = [(int(row["time/total_timesteps"]), float(row["score"])) for row in rows(run)]
    assert written == expected
    assert scalars(run, "score") == expected


def test_curves_go_on_where_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads the files of a run in the order of their names."""
    run = RunDirectory.create(tmp_path, "Pong")
    (run.path / "events.txt").write_text("a user's own notes")
    for since, now in ((0, 2e9), (2, 1e9), (4, 1e9)):
        clock = SimpleNamespace(time=lambda now=now: now)
        monkeypatch.setattr(ncrl.shell.events, "time", clock)
        record(run, {step: {"score": 1.0} for step in (since + 1, since + 2)}, since=since)
    assert [step for step, _ in scalars(run, "score")] == [1, 2, 3, 4, 5, 6]


def test_a_histogram_of_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    """A network that computes none is to end the training with its own message."""
    logger = RunDirectory.create(tmp_path, "Pong").make_logger()
    for step, last in ((1, 0.5), (2, float("nan")), (3, 0.7)):
        logger.record("usage", torch.tensor([0.1, last]), exclude="csv")
        logger.dump(step)
    logger.close()
    events = EventAccumulator(str(tmp_path / "Pong-1"), size_guidance={"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Histograms("usage")] == [1, 3]


def test_a_column_that_comes_later(tmp_path: Path) -> None:
    """Scores appear when the first game has ended, maybe only after resuming."""
    run = RunDirectory.create(tmp_path, "Pong")
    record(run, {100: {"loss": 1.0}, 200: {"loss": 2.0}})
    record(run, {300: {"loss": 3.0, "score": 7.0}}, since=200)
    assert [(row["loss"], row["score"]) for row in rows(run)] == [
        ("1.0", ""),
        ("2.0", ""),
        ("3.0", "7.0"),
    ]


@pytest.mark.parametrize("tail", ["1", "3.0", "3.0,", "3.0,1", "3.0,150", "\x00\x00"])
@pytest.mark.parametrize("columns", ["score,{step},z", "{step},score,z", "z,score,{step}"])
def test_a_row_that_a_kill_cut_off_is_dropped(columns: str, tail: str, tmp_path: Path) -> None:
    """SB3 puts columns in any order."""
    run = RunDirectory.create(tmp_path, "Pong")
    header = columns.format(step="time/total_timesteps")
    whole = [columns.format(step=n).replace("score", "5.0").replace("z", "7.0") for n in (100, 200)]
    (run.path / "progress.csv").write_text("\n".join([header, *whole, tail]))
    record(run, {300: {"score": 3.0, "z": 1.0}}, since=200)
    assert [row["time/total_timesteps"] for row in rows(run)] == ["100", "200", "300"]
    assert [row["score"] for row in rows(run)] == ["5.0", "5.0", "3.0"]


def test_rows_that_are_kept_survive_a_kill(tmp_path: Path) -> None:
    """They are on the disk before the first new row."""
    run = RunDirectory.create(tmp_path, "CartPole")
    record(run, {10: {"score": 1.0}, 20: {"score": 2.0}})
    logger = run.make_logger(20)
    assert [row["score"] for row in rows(run)] == ["1.0", "2.0"]
    logger.close()


def test_f11_rows_survive_a_disk_that_is_full_when_the_run_goes_on(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    record(run, {step: {"score": 1.0} for step in range(1, 101)})
    before = (run.path / "progress.csv").read_text()
    with file_size_limit(len(before) // 2), pytest.raises(OSError):
        run.make_logger(100)
    assert (run.path / "progress.csv").read_text() == before


def test_f11_curves_that_cannot_be_written_are_forgotten_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    logger = run.make_logger()
    with monkeypatch.context() as broken:
        for output in logger.output_formats:
            broken.setattr(output, "write", lambda *_: full_disk(0))
        for step in (10, 20):
            logger.record("time/total_timesteps", step)
            logger.record("score", 1.0)
            logger.dump(step)
    logger.record("time/total_timesteps", 30)
    logger.dump(30)
    logger.close()
    assert rows(run) == [{"time/total_timesteps": "30"}]
    (error,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert "No space" in error and str(run.path) in error


def test_f11_curves_go_on_where_the_disk_has_room_again(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    logger = run.make_logger()

    def dump(step: int) -> None:
        logger.record("time/total_timesteps", step)
        logger.record("score", 1.0)
        logger.record("usage", torch.arange(4.0))
        logger.dump(step)

    dump(10)
    (events,) = run.path.glob("events.out.tfevents.*")
    with file_size_limit(events.stat().st_size + 20):
        dump(20)
    dump(30)
    logger.close()
    steps = [step for step, _ in scalars(run, "score")]
    assert {10, 30} <= set(steps) <= {10, 20, 30}


def test_curves_that_are_no_curves_do_not_stop_a_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "Pong")
    (run.path / "progress.csv").write_text("loss,score\n1,2\n3,4\n")
    record(run, {300: {"score": 3.0}}, since=200)
    assert rows(run)[-1]["score"] == "3.0"


# Saving while a run goes on.


def full_disk(_descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def saver(run: RunDirectory, *, stop: bool = False) -> SaveCheckpoints:
    return SaveCheckpoints(run, 40, keep=2, stop_on_error=stop)


def test_checkpoints_come_between_updates_and_the_newest_are_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    make_model().learn(200, callback=saver(run))
    names = sorted(path.stem for path in run.checkpoints.glob("*.zip"))
    assert names == ["step_000000000120", "step_000000000160"]


def test_a_run_that_goes_on_is_saved_as_often_as_any_other(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    model = make_model().learn(60)
    model.learn(60, callback=saver(run), reset_num_timesteps=False)
    assert [path.stem for path in run.checkpoints.glob("*.zip")] == ["step_000000000100"]


def test_f11_a_full_disk_is_reported_and_play_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    model = make_model()
    callback = saver(run)
    model.learn(80, callback=callback)
    before = newest_checkpoint(run.checkpoints)
    monkeypatch.setattr(os, "fsync", full_disk)
    model.learn(100, callback=callback, reset_num_timesteps=False)
    assert model.num_timesteps == 180
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert errors and all("No space" in e and str(run.path) in e for e in errors)
    assert newest_checkpoint(run.checkpoints) == before
    assert not [path for path in run.path.rglob(".*") if path.name != ".lock"]

    monkeypatch.undo()
    callback.save()
    assert newest_checkpoint(run.checkpoints).timesteps == 180


@pytest.mark.parametrize("stop", [False, True])
def test_f19_weights_that_are_not_finite_are_saved_nowhere(stop: bool, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    model = make_model()
    callback = saver(run, stop=stop)
    model.learn(400)
    callback.init_callback(model)
    with torch.no_grad():
        model.policy.value_net.bias[0] = torch.nan
    if stop:
        with pytest.raises(CheckpointError, match="finite"):
            callback.save()
    else:
        callback.save()
    with pytest.raises(CheckpointError, match="finite"):
        BestModel(run.path).compare(model)
    assert not list(run.path.rglob("*.zip"))


# The best model.


def end_game(best: BestModel, model: A3C, score: float, length: int) -> None:
    """A timestep of all environments, in which the last one's game ends after that many."""
    model.num_timesteps += model.n_envs
    infos: list[dict[str, Any]] = [{} for _ in range(model.n_envs)]
    infos[0]["episode"] = None  # as some environments say it of a game that goes on
    infos[-1]["episode"] = {"r": score, "l": length}
    best.watch(model, infos)


def play(best: BestModel, model: A3C, score: float, games: int = GAMES) -> None:
    """So many games that begin after the model's weights."""
    best.compare(model)
    for _ in range(games):
        end_game(best, model, score, length=1)


def judged(best: BestModel) -> dict[str, Any]:
    return dict(json.loads(best.note.read_text()))


def test_the_first_weights_are_judged_by_games_that_began_after_them(tmp_path: Path) -> None:
    model, best = make_model(), BestModel(tmp_path)
    model.num_timesteps = 30
    best.compare(model)
    for rows in range(1, FEWEST_GAMES + 1):
        end_game(best, model, 400.0, length=rows + 1)
        best.compare(model)
        assert not best.path.exists(), "games that began before"
    for _ in range(FEWEST_GAMES):
        end_game(best, model, 7.0, length=FEWEST_GAMES)
    best.compare(model)
    assert judged(best) == {"score": 7.0, "games": 10, "timesteps": 30}


def test_what_is_written_are_the_weights_of_then(tmp_path: Path) -> None:
    model, best = make_model(), BestModel(tmp_path)
    before = {name: weight.clone() for name, weight in model.policy.state_dict().items()}
    play(best, model, 1.0)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight.add_(1.0)
    best.compare(model)
    kept = A3C.load(best.path, device="cpu")
    assert kept.num_timesteps == 0
    torch.testing.assert_close(kept.policy.state_dict(), before, rtol=0, atol=0)


def test_the_weights_in_the_middle_of_the_games_are_kept(tmp_path: Path) -> None:
    """Scores rise by 1 a game; weights are looked at after every game."""
    model, best = make_model(), BestModel(tmp_path)
    best.note.write_text('{"score": -1}')
    best.compare(model)
    for game in range(100):
        end_game(best, model, float(game), length=1)
        best.compare(model)
        assert len(best._candidates) <= WAITING
    first = 100 - GAMES
    middle = 100 - GAMES // 2
    assert judged(best) == {
        "score": first + (GAMES - 1) / 2,
        "games": GAMES,
        "timesteps": middle * model.n_envs,
    }
    assert A3C.load(best.path, device="cpu").num_timesteps == middle * model.n_envs


def test_the_weights_in_the_middle_of_long_games_are_kept(tmp_path: Path) -> None:
    """They last for 100 timesteps; in turn, each of 50 environments ends one and begins another."""
    model, best = make_model(), BestModel(tmp_path)
    best.note.write_text('{"score": -1}')
    model.n_envs = 50
    best.compare(model)
    for _ in range(1000):
        end_game(best, model, 7.0, length=100)
        model.num_timesteps += model.n_envs  # a timestep in which no game ends
        best.compare(model)
        if judged(best)["score"] > 0:
            break
    assert judged(best)["games"] == 100
    played = model.num_timesteps  # from the first game's begin to the last one's end
    assert judged(best)["timesteps"] == pytest.approx(played / 2, rel=0.1)


def test_only_a_better_mean_of_enough_games_replaces_it(tmp_path: Path) -> None:
    model = make_model()
    games = FEWEST_GAMES
    for score, better in ((1.0, True), (0.5, False), (1.0, False), (-3.0, False), (1.5, True)):
        best = BestModel(tmp_path)  # as in a run that was resumed
        before = best.path.stat().st_ino if best.path.exists() else None
        play(best, model, score, games - 1)
        best.compare(model)
        after = best.path.stat().st_ino if best.path.exists() else None
        assert after == before, "not enough games"
        end_game(best, model, score, length=1)
        best.compare(model)
        assert (best.path.stat().st_ino != before) == better, score
        games = GAMES


def test_the_first_games_after_weights_judge_them_whatever_follows(tmp_path: Path) -> None:
    """More than enough have ended where it is looked for the best less often."""
    model, best = make_model(), BestModel(tmp_path)
    play(best, model, 5.0, games=FEWEST_GAMES)
    for _ in range(GAMES):
        end_game(best, model, 99.0, length=1)
    best.compare(model)
    assert judged(best) == {"score": 5.0, "games": FEWEST_GAMES, "timesteps": 0}


def test_many_environments_play_two_games_each(tmp_path: Path) -> None:
    model, best = make_model(), BestModel(tmp_path)
    best.note.write_text('{"score": -1}')
    model.n_envs = GAMES
    play(best, model, 1.0, games=2 * GAMES - 1)
    best.compare(model)
    assert not best.path.exists()
    end_game(best, model, 1.0, length=1)
    best.compare(model)
    assert judged(best)["games"] == 2 * GAMES


def test_a_training_that_begins_anew_keeps_its_best_model_too(tmp_path: Path) -> None:
    model, best = make_model(), BestModel(tmp_path)
    model.num_timesteps = 1000
    best.compare(model)
    model.num_timesteps = 0
    play(best, model, 2.0)
    best.compare(model)
    assert judged(best) == {"score": 2.0, "games": FEWEST_GAMES, "timesteps": 0}


@pytest.mark.parametrize("note", ['{"score": NaN}', '{"score": "best"}', "[", ""])
def test_a_note_that_says_no_score_holds_no_model_back(note: str, tmp_path: Path) -> None:
    best = BestModel(tmp_path)
    best.note.write_text(note)
    model = make_model()
    play(best, model, -3.0, games=FEWEST_GAMES)
    best.compare(model)
    assert best.path.exists()


def test_weights_are_written_later_where_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, best = make_model(), BestModel(tmp_path)
    write = ncrl.agents.runs.best.write_atomically

    def write_what_is_small(path: Path, data: bytes) -> None:
        write(path, data) if path == best.note else full_disk(0)

    play(best, model, 1.0)
    with monkeypatch.context() as broken:
        broken.setattr(ncrl.agents.runs.best, "write_atomically", write_what_is_small)
        with pytest.raises(OSError, match="space"):
            best.compare(model)
    play(best, model, 3.0)  # which do not count
    assert best.path.exists()
    assert judged(best) == {"score": 1.0, "games": FEWEST_GAMES, "timesteps": 0}


def test_the_best_is_looked_for_ten_times_between_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    callback = SaveCheckpoints(run, 2000, keep=2, stop_on_error=False)
    looks: list[int] = []
    compare = callback.best.compare

    def counted(model: A3C) -> None:
        looks.append(model.num_timesteps)
        compare(model)

    monkeypatch.setattr(callback.best, "compare", counted)
    make_model().learn(1000, callback=callback)
    assert (run.path / "best_model.zip").exists()
    assert not list(run.checkpoints.iterdir())
    assert looks == [0, 200, 400, 600, 800]


def test_no_best_model_and_no_new_settings_without_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path, "CartPole")
    run.write_config({"gamma": 0.5})
    model = make_model()
    model.learn(4)
    callback = SaveCheckpoints(run, 40, keep=2, stop_on_error=False, config={"gamma": 0.9})
    callback.init_callback(model)
    play(callback.best, model, 1.0)
    with monkeypatch.context() as broken:
        broken.setattr(ncrl.agents.runs.directory, "save_checkpoint", lambda *_, **__: full_disk(0))
        assert not callback.save()
    assert not (run.path / "best_model.zip").exists()
    assert (run.path / "config.yaml").read_text() == "gamma: 0.5\n"
    assert callback.save() and (run.path / "best_model.zip").exists()
    assert (run.path / "config.yaml").read_text() == "gamma: 0.9\n"
