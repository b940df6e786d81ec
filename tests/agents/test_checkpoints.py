"""Checkpoints: exact, whole or absent, and harmless whatever is in the file."""

import base64
import contextlib
import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper, unwrap_vec_wrapper

import ncrl.agents.runs.checkpoints
from ncrl.agents import A3C
from ncrl.agents.playing.env_sources import RecordedEnv
from ncrl.agents.runs.checkpoints import (
    COUNTERS,
    STATE,
    Checkpoint,
    CheckpointError,
    load_weights,
    newest_checkpoint,
    resume,
    save_checkpoint,
)
from ncrl.envs import atari, masked_cartpole
from ncrl.shell.hardware import random_state, set_random_state
from ncrl.shell.tensors import with_checksum
from tests.agents.conftest import file_size_limit, warnings_of
from tests.agents.environments import TickingFactory
from tests.agents.test_loading import Malicious, torch_bytes

ROOT = Path(__file__).parents[2]
PROGRAMS = {"num_slots": 6, "num_heads": 2, "num_least_used": 1, "controller_size": 4}
COUNTED = ("num_timesteps", "_n_updates", "_episode_num", "_skipped_updates", "games_seed")
SECONDS = 80
"""For another process, whatever hangs in it."""


def make_model(env: Any = None, policy: str = "NeurocoderMlpLstmPolicy", **options: Any) -> A3C:
    defaults: dict[str, Any] = {"n_workers": 0, "n_envs": 2, "n_steps": 5, "seed": 1}
    defaults |= {"policy_kwargs": {"lstm_hidden_size": 8, "head_kwargs": PROGRAMS}}
    return A3C(policy, env or masked_cartpole(), device="cpu", **(defaults | options))


def make_atari(protocol: str) -> A3C:
    return make_model(atari("Klax", protocol=protocol), "NeurocoderCnnLstmPolicy", n_envs=2)


def make_cartpole() -> A3C:
    return make_model()


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested containers as one dict; tensors and arrays as (dtype, shape, bytes)."""
    if isinstance(value, dict):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(key), entry) for key, entry in enumerate(value)]
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value)
        return {name: (str(array.dtype), array.shape, array.tobytes())}
    else:
        return {name: value}
    merged: dict[str, Any] = {name: len(items)}
    for key, entry in items:
        merged |= flat(entry, f"{name}/{key}")
    return merged


def everything(model: A3C) -> dict[str, Any]:
    """All that decides how a serial training goes on, bit by bit."""
    collector = model.collector
    assert collector is not None
    return flat(
        {
            "weights": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "lstm_state": collector.lstm_state,
            "counters": {name: getattr(model, name) for name in COUNTED},
            "obs": model._last_obs,
            "episode_start": collector.episode_start,
            "last_episode_starts": model._last_episode_starts,
            # `t` is the time on the clock
            "episodes": [(game["r"], game["l"]) for game in model.ep_info_buffer or ()],
            "successes": list(model.ep_success_buffer or ()),
            "windows": [getattr(model, f"ep_{of}_buffer").maxlen for of in ("info", "success")],
        }
    )


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


class SaveAt(BaseCallback):
    """Saves once between two updates."""

    def __init__(self, timesteps: int, folder: Path) -> None:
        super().__init__()
        self.timesteps, self.folder = timesteps, folder
        self.saved: dict[str, Any] = {}

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, A3C)
        if self.num_timesteps == self.timesteps:
            save_checkpoint(self.model, self.folder)
            self.saved = everything(self.model)

    def _on_step(self) -> bool:
        return True


def save_steps(folder: Path, steps: list[int], **options: Any) -> A3C:
    """Checkpoints of one model that has learned a little, named after these timesteps."""
    model = make_model()
    model.learn(20)
    for step in steps:
        model.num_timesteps = step
        save_checkpoint(model, folder, **options)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """The only one in the folder, of a model that has learned a little."""
    save_steps(tmp_path, [20])
    return newest_checkpoint(tmp_path)


# Exactness.


def assert_goes_on(expected: dict[str, Any], model: A3C, folder: Path, timesteps: int) -> None:
    """A new model resumes the newest checkpoint, trains on, and is then what was expected."""
    resume(model, newest_checkpoint(folder))
    model.learn(timesteps, reset_num_timesteps=False)
    assert difference(expected, everything(model)) == []


def continue_elsewhere(folder: str, total: int, out: str) -> None:
    """What another process does: resume, train to the total, tell everything."""
    model = make_atari("machado")
    checkpoint = newest_checkpoint(Path(folder))
    resume(model, checkpoint)
    model.learn(total - model.num_timesteps, reset_num_timesteps=False)
    Path(out).write_bytes(pickle.dumps(everything(model)))


def test_what_is_saved_is_what_is_resumed(tmp_path: Path) -> None:
    model = make_model()
    model.learn(100)
    # None of this is as in a new model.
    model._skipped_updates, model._episode_num = 3, 7
    model.ep_success_buffer.extend([True, False])
    random.random(), np.random.random()
    checkpoint = save_checkpoint(model, tmp_path)
    before = everything(model)
    assert newest_checkpoint(tmp_path) == checkpoint
    assert checkpoint.timesteps == 100 and model.ep_info_buffer

    model.learn(30)  # also moves torch's global random state
    other = make_model()
    resume(other, checkpoint)
    assert difference(before, everything(other)) == []


def test_noise_that_depends_on_the_state_is_drawn_from_the_weights_that_are_loaded(
    tmp_path: Path,
) -> None:
    model, other = (
        make_model(make_vec_env("Pendulum-v1", 2), n_envs=None, use_sde=True) for _ in range(2)
    )
    with torch.no_grad():
        model.policy.log_std.fill_(-20.0)
    model.save(tmp_path / "model.zip")
    load_weights(other, tmp_path / "model.zip")
    assert other.policy.action_dist.exploration_mat.abs().max() < 1e-6


@pytest.mark.parametrize("noted", [(np.float64(1), 2), np.arange(3)], ids=["tuple", "array"])
def test_what_a_monitor_notes_besides_scores_is_no_part_of_a_checkpoint(
    noted: Any, tmp_path: Path
) -> None:
    """`Monitor(info_keywords=...)` keeps objects that only a pickle could bring back."""
    model = make_model().learn(100)
    assert model.ep_info_buffer
    model.ep_info_buffer[-1]["position"] = noted
    save_checkpoint(model, tmp_path)
    other = make_model()
    resume(other, newest_checkpoint(tmp_path))
    assert difference(everything(model), everything(other)) == []


def test_a_number_of_environments_may_be_numpys(tmp_path: Path) -> None:
    """Counters follow from it, and a checkpoint holds plain numbers alone."""
    assert type(make_model(n_workers=1, n_envs=np.int64(2)).n_envs) is int
    env = make_vec_env("CartPole-v1", 2)
    env.num_envs = np.int64(2)  # as an environment of one's own may count
    model = make_model(env, n_envs=None).learn(20)
    save_checkpoint(model, tmp_path)
    assert newest_checkpoint(tmp_path).timesteps == 20


@pytest.mark.parametrize(
    ("make", "n", "total"),
    [(make_cartpole, 50, 150), (lambda: make_atari("classic"), 400, 500)],
    ids=["masked_cartpole", "Atari classic"],
)
def test_f16_n_and_m_updates_are_n_plus_m(
    make: Callable[[], A3C], n: int, total: int, tmp_path: Path
) -> None:
    """The learning rate falls over the whole, games have ended before the checkpoint."""
    whole = make()
    whole.learn(total, callback=SaveAt(n, tmp_path))
    expected = everything(whole)

    again = make()
    resume(again, newest_checkpoint(tmp_path))
    assert again.num_timesteps == n
    games = len(again.ep_info_buffer or ())
    again.learn(total - n, reset_num_timesteps=False)
    assert difference(expected, everything(again)) == []
    assert games, "whole games are among what is resumed"


def test_f16_saving_changes_nothing(tmp_path: Path) -> None:
    plain = make_model()
    plain.learn(60)
    expected = everything(plain)
    saved = make_model()
    saved.learn(60, callback=SaveAt(30, tmp_path))
    assert difference(expected, everything(saved)) == []


def test_f16_a_new_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Atari with sticky actions, whose random draws are inside the emulator."""
    whole = make_atari("machado")
    whole.learn(300, callback=SaveAt(210, tmp_path))
    code = "import sys; from tests.agents.test_checkpoints import continue_elsewhere as go; "
    code += "go(sys.argv[1], 300, sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=SECONDS)
    # Written by this test's own child.
    elsewhere = pickle.loads((tmp_path / "out").read_bytes())
    assert difference(everything(whole), elsewhere) == []


def test_f16_a_run_is_resumed_twice(tmp_path: Path) -> None:
    """The replayed games are recorded again: a resumed run can be saved and resumed."""
    whole = make_model()
    whole.learn(90, callback=[SaveAt(30, tmp_path)])
    second = make_model()
    resume(second, newest_checkpoint(tmp_path))
    second.learn(60, callback=SaveAt(60, tmp_path), reset_num_timesteps=False)
    assert_goes_on(everything(second), make_model(), tmp_path, 30)


def test_random_numbers_go_on_on_the_gpu_that_drew_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be others; without one, what was drawn on a GPU is left out."""
    second, kept = torch.device("cuda:1"), torch.tensor([7], dtype=torch.uint8)
    restored: dict[Any, Any] = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", {second: kept}.__getitem__)
    monkeypatch.setattr(
        torch.cuda,
        "set_rng_state",
        lambda state, device="cuda": restored.update({torch.device(device): state}),
    )
    state = random_state(second)
    set_random_state(state, torch.device("cpu"))
    assert restored == {}
    set_random_state(state, second)
    assert restored == {second: kept}


class Noise(VecEnvWrapper):
    """Adds numbers of the program's own random streams to the rewards."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        drawn = random.random() + np.random.random() + torch.rand(()).item()
        return obs, rewards + drawn, dones, infos


def test_f16_playing_again_draws_nothing_from_the_streams_that_go_on(tmp_path: Path) -> None:
    def factory(n_envs: int, seed: int) -> Noise:
        return Noise(masked_cartpole()(n_envs, seed))

    whole = make_model(factory)
    whole.learn(90, callback=SaveAt(60, tmp_path))
    assert_goes_on(everything(whole), make_model(factory), tmp_path, 30)


@pytest.mark.parametrize("later", [None, 7])
def test_f16_a_model_without_a_seed_goes_on_with_the_games_that_were_saved(
    later: int | None, tmp_path: Path
) -> None:
    whole = make_model(seed=None)
    whole.set_random_seed(later)
    whole.learn(90, callback=SaveAt(60, tmp_path))
    assert_goes_on(everything(whole), make_model(seed=None), tmp_path, 30)


@pytest.mark.parametrize("n_envs", [2, 4])
def test_f17_counters_survive_another_number_of_environments(n_envs: int, tmp_path: Path) -> None:
    model = save_steps(tmp_path, [40])
    other = make_model(n_workers=2, n_envs=n_envs)
    resume(other, newest_checkpoint(tmp_path))
    for name in COUNTERS:
        assert getattr(other, name) == getattr(model, name), name
    serial = make_model(n_envs=n_envs + 1)
    resume(serial, newest_checkpoint(tmp_path))
    serial.learn(n_envs + 1, reset_num_timesteps=False)
    assert serial.num_timesteps == 40 + n_envs + 1


def test_games_start_anew_under_another_limit_on_their_length(tmp_path: Path) -> None:
    """They would not replay to where they were saved, if one of them was cut off."""
    short, long = (atari("Klax", max_frames=frames) for frames in (80, 400))
    model = make_model(short, "NeurocoderCnnLstmPolicy").learn(100)
    assert model.ep_info_buffer, "games were cut off"
    checkpoint = save_checkpoint(model, tmp_path)
    other = make_model(long, "NeurocoderCnnLstmPolicy")
    resume(other, checkpoint)
    assert other.learn(20, reset_num_timesteps=False).num_timesteps == 120


def test_games_that_start_anew_do_not_repeat_those_of_the_beginning(tmp_path: Path) -> None:
    """After a resume with another number of games; and that goes on bit for bit, too."""
    first = make_model(n_envs=2)
    assert first.env is not None
    begin = first.env.reset()
    model = make_model(n_envs=4, batch_size=10)
    model.learn(40)
    (tmp_path / "one").mkdir()
    save_checkpoint(model, tmp_path / "one")
    other = make_model(n_envs=2)
    resume(other, newest_checkpoint(tmp_path / "one"))
    other.learn(20, callback=SaveAt(50, tmp_path), reset_num_timesteps=False)
    recorded = unwrap_vec_wrapper(other.env, RecordedEnv)
    assert recorded is not None
    [(seed, _)] = recorded.history()
    assert seed == model.games_seed + 7_919 * model._n_updates and model._n_updates
    assert_goes_on(everything(other), make_model(n_envs=2), tmp_path, 10)
    assert not np.array_equal(begin, masked_cartpole()(2, seed).reset())


def test_f16_a_model_that_was_seeded_between_two_trainings(tmp_path: Path) -> None:
    whole = make_model()
    whole.learn(20)
    whole.set_random_seed(99)
    whole.learn(20)
    whole.set_random_seed(98)
    whole.learn(60, callback=SaveAt(30, tmp_path))
    assert_goes_on(everything(whole), make_model(), tmp_path, 30)


def test_games_that_do_not_replay_are_reported(tmp_path: Path) -> None:
    """The environment became another one since the checkpoint was written."""
    plain: dict[str, Any] = {"policy": "MlpLstmPolicy"}
    plain["policy_kwargs"] = {"lstm_hidden_size": 8}
    model = make_model(TickingFactory(length=5), **plain)
    model.learn(20)
    checkpoint = save_checkpoint(model, tmp_path)
    with pytest.raises(CheckpointError, match="replay"):
        resume(make_model(TickingFactory(length=3), **plain), checkpoint)


def test_games_of_a_factory_do_not_fit_an_environment_object(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError):
        resume(make_model(masked_cartpole()(2, 1)), checkpoint)


# Damage.


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "bit flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last bit flipped": lambda path: flip(path, path.stat().st_size - 1),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_f13_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, [20, 30])
    victim = tmp_path / f"step_{30:012d}.zip"
    damage(victim)
    assert newest_checkpoint(tmp_path).timesteps == 20
    (warning,) = warnings_of(caplog)
    assert str(victim) in warning and "\n" not in warning
    resume(make_model(), newest_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "state", [None, [], {}, {"counters": 3}, {"counters": dict.fromkeys(COUNTERS, "30")}], ids=str
)
def test_f13_any_state_that_is_none(state: Any, tmp_path: Path) -> None:
    save_steps(tmp_path, [20, 30])
    rewrite(newest_checkpoint(tmp_path), {STATE: torch_bytes(state)})
    assert newest_checkpoint(tmp_path).timesteps == 20


def test_a_checkpoint_without_a_sum_is_that_of_an_earlier_release(tmp_path: Path) -> None:
    model = save_steps(tmp_path, [20])
    model.save(tmp_path / f"step_{20:012d}.zip")
    with pytest.raises(CheckpointError, match="an earlier release of ncrl wrote it"):
        newest_checkpoint(tmp_path)


def test_f13_with_none_left_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        newest_checkpoint(tmp_path)
    save_steps(tmp_path, [20, 30])
    for path in tmp_path.glob("*.zip"):
        truncate(path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as error:
        newest_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


# What a file may do to us.


def tensors_of(checkpoint: Checkpoint, member: str = "policy.pth") -> dict[str, Any]:
    with zipfile.ZipFile(checkpoint.path) as archive, archive.open(member) as file:
        return torch.load(file, weights_only=True)


def rewrite(
    checkpoint: Checkpoint, members: dict[str, bytes | None], kind: int = zipfile.ZIP_STORED
) -> None:
    """Replace, add or (None) remove members, with a true checksum as whoever made it would."""
    with zipfile.ZipFile(checkpoint.path) as archive:
        content: dict[str, bytes | None] = {n: archive.read(n) for n in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in (content | members).items():
            if data is not None:
                archive.writestr(name, data)
    checkpoint.path.write_bytes(with_checksum(buffer.getvalue()))


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "plain pickle"])
@pytest.mark.parametrize("where", ["policy.pth", "policy.optimizer.pth", STATE])
def test_f14_a_malicious_pickle_is_refused(
    where: str, raw: bool, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    canary = tmp_path / "canary"
    evil = {"evil": Malicious(canary)}
    data = pickle.dumps(evil, protocol=2) if raw else torch_bytes(evil)
    rewrite(checkpoint, {where: data})
    with pytest.raises(CheckpointError) as error:
        resume(make_model(), newest_checkpoint(tmp_path))
    assert not canary.exists()
    message = str(error.value)
    assert str(checkpoint.path) in message
    assert "mkdir" in message, "what was refused"
    assert "trust" in message, "how a user who trusts the file opts in"
    assert not re.search(r"[\x00-\x1f]", message), "one line without control codes"
    if where == "policy.pth":
        with pytest.raises(CheckpointError, match="mkdir"):
            load_weights(make_model(), checkpoint.path, optimizer=False)
        assert not canary.exists()


def test_f14_the_pickles_of_sb3_are_not_read(tmp_path: Path) -> None:
    """SB3's `data` holds base64 pickles; resuming needs none of them."""
    model = save_steps(tmp_path, [20])
    expected = flat(model.policy.state_dict())
    checkpoint = newest_checkpoint(tmp_path)
    canary = tmp_path / "canary"
    code = base64.b64encode(pickle.dumps(Malicious(canary))).decode()
    rewrite(
        checkpoint,
        {
            "data": json.dumps({"policy_class": {":serialized:": code}}).encode(),
            "pytorch_variables.pth": torch_bytes(Malicious(canary)),
        },
    )
    other = make_model()
    resume(other, newest_checkpoint(tmp_path))
    assert flat(other.policy.state_dict()) == expected
    assert not canary.exists()


def test_f15_another_networks_weights_are_refused_by_name(checkpoint: Checkpoint) -> None:
    wide = make_model(policy_kwargs={"lstm_hidden_size": 16, "head_kwargs": PROGRAMS})
    for optimizer in (True, False):
        with pytest.raises(CheckpointError, match="lstm") as error:
            load_weights(wide, checkpoint.path, optimizer=optimizer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["unknown key", "missing key", "not a dict", "no tensor"])
def test_f15_weights_of_another_form_are_refused(
    change: str, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    weights: Any = dict(tensors_of(checkpoint))
    name = "action_net.bias"
    if change == "unknown key":
        weights[name := "surprise"] = torch.zeros(1)
    elif change == "missing key":
        del weights[name]
    elif change == "not a dict":
        weights, name = [1, 2], "dict"
    else:
        weights[name] = "text"
    rewrite(checkpoint, {"policy.pth": torch_bytes(weights)})
    with pytest.raises(CheckpointError, match=name) as error:
        resume(make_model(), newest_checkpoint(tmp_path))
    assert str(checkpoint.path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth"])
def test_f15_a_zip_without_a_member_is_refused(
    member: str, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    rewrite(checkpoint, {member: None})
    with pytest.raises(CheckpointError, match=re.escape(member)):
        resume(make_model(), newest_checkpoint(tmp_path))


def change_state(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], None]) -> None:
    state = tensors_of(checkpoint, STATE)
    change(state)
    rewrite(checkpoint, {STATE: torch_bytes(state)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, -1) for name in COUNTERS),
        *((COUNTERS[0], value) for value in (True, 20.0, "20", None, 2**70, [20])),
    ],
)
def test_f15_counters_that_count_nothing(
    name: str, value: Any, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    change_state(checkpoint, lambda state: state["counters"].update({name: value}))
    with pytest.raises(CheckpointError, match=name):
        newest_checkpoint(tmp_path)


def nested_bomb(state: dict[str, Any]) -> None:
    for _ in range(60):  # few bytes, 2 ** 60 tensors
        state["more"] = [state.get("more"), state.get("more")]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda state: state.update(more=torch.zeros(1).expand(10**12)), True),
        (nested_bomb, False),
    ],
)
def test_f15_a_small_state_costs_little(change: Any, refused: bool, checkpoint: Checkpoint) -> None:
    change_state(checkpoint, change)
    with pytest.raises(CheckpointError) if refused else contextlib.nullcontext():
        resume(make_model(), checkpoint)


def test_f15_a_compressed_state_is_not_unpacked(tmp_path: Path, checkpoint: Checkpoint) -> None:
    state = tensors_of(checkpoint, STATE) | {"more": torch.zeros(20_000_000)}
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_bytes(state))) as archive,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    rewrite(checkpoint, {STATE: buffer.getvalue()})
    assert checkpoint.path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="it unpacks to"):
        newest_checkpoint(tmp_path)


OPTIMISERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda o: o["state"][1].update(exp_avg=torch.zeros(3)),
    "larger": lambda o: o["state"][1].update(exp_avg=torch.zeros(1_000, 1_000)),
    "no groups": lambda o: o.update(param_groups=[]),
    "rate": lambda o: o["param_groups"][0].update(lr=float("nan")),
    "negative rate": lambda o: o["param_groups"][0].update(lr=-0.1),
}


@pytest.mark.parametrize("change", OPTIMISERS.values(), ids=OPTIMISERS)
def test_f13_an_optimiser_that_does_not_fit(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """A fused Adam would write past the end of its memory. All that is checked of a state is in
    `test_optimizer_state`, and in `tasks/test_training` with the messages."""
    options = {"use_rms_prop": False}
    model = make_model(**options)
    model.learn(20)
    checkpoint = save_checkpoint(model, tmp_path)
    load_weights(make_model(**options), checkpoint.path)
    optimizer = tensors_of(checkpoint, "policy.optimizer.pth")
    change(optimizer)
    rewrite(checkpoint, {"policy.optimizer.pth": torch_bytes(optimizer)})
    other = make_model(**options)
    with pytest.raises(CheckpointError, match=re.escape(str(checkpoint.path))):
        load_weights(other, checkpoint.path)
    assert not other.policy.optimizer.state_dict()["state"]


@pytest.mark.parametrize("key", ["counters", "random", "games"])
def test_f15_a_state_without_an_entry_is_refused(
    key: str, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    change_state(checkpoint, lambda state: state.pop(key))
    with pytest.raises(CheckpointError, match=key) as error:
        resume(make_model(), newest_checkpoint(tmp_path))
    assert str(checkpoint.path) in str(error.value)


def test_f15_nothing_is_written_outside(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    save_steps(folder, [20])
    rewrite(newest_checkpoint(folder), {"../../outside": b"x", f"{tmp_path}/absolute": b"x"})
    resume(make_model(), newest_checkpoint(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_f15_a_bomb_costs_little_memory(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Its own size bounds what a checkpoint may unpack to."""
    rewrite(checkpoint, {"policy.pth": bytes(100 << 20)}, zipfile.ZIP_DEFLATED)
    assert checkpoint.path.stat().st_size < 1 << 20
    model = make_model()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="unpacks to"):
            newest_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="would take"):
            load_weights(model, checkpoint.path)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_checkpoint_larger_than_any_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, [20])
    monkeypatch.setattr(ncrl.agents.runs.checkpoints, "MAX_BYTES", 1 << 10)
    with pytest.raises(CheckpointError, match="more than 1,024 bytes"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"no zip at all"])
def test_a_file_that_is_no_sb3_zip_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_weights(make_model(), path)


# Writing.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_f19_a_weight_that_is_not_finite_is_never_saved(value: float, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.policy.value_net.bias[0] = value
    with pytest.raises(CheckpointError, match=r"value_net\.bias"):
        save_checkpoint(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_f19_an_optimiser_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    model = make_model().learn(20)
    next(iter(model.policy.optimizer.state.values()))["square_avg"].fill_(float("inf"))
    with pytest.raises(CheckpointError, match="optimiser"):
        save_checkpoint(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_f19_a_scale_of_the_bonus_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """A source of one's own may have returned infinity once."""
    model = make_model(intrinsic_reward="count").learn(20)
    assert model.exploration is not None
    model.exploration.scale.mean.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="intrinsic reward"):
        save_checkpoint(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_f11_a_full_disk_leaves_the_checkpoint_before(size: int, tmp_path: Path) -> None:
    model = save_steps(tmp_path, [20])
    before = content(tmp_path)
    assert max(map(len, before.values())) > 4096
    model.num_timesteps = 30
    with file_size_limit(size), pytest.raises(OSError) as error:
        save_checkpoint(model, tmp_path, keep=1)
    assert error.value.errno == errno.EFBIG
    assert before.items() <= content(tmp_path).items()
    assert not [name for name in content(tmp_path) if not name.startswith("step_")]
    assert newest_checkpoint(tmp_path).timesteps == 20


@pytest.mark.parametrize("step", [20, 30], ids=["same timesteps", "later"])
@pytest.mark.parametrize("call", range(2))
def test_f11_wherever_the_disk_fails_a_whole_checkpoint_remains(
    call: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped right after it was resumed saves the same timesteps again."""
    model = save_steps(tmp_path, [20])
    calls = iter(range(100))
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    model.learn(10)  # so that the files differ, as they always do in time and random states
    model.num_timesteps = step
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, tmp_path, keep=1)
    monkeypatch.undo()
    assert not [name for name in content(tmp_path) if not name.startswith("step_")]
    resume(make_model(), newest_checkpoint(tmp_path))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_files_have_the_mode_that_the_user_asked_for(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_steps(tmp_path, [20])
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1 and set(modes.values()) == {mode}, modes


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save_steps(tmp_path, [10, 20, 30, 40], keep=keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    kept = [10, 20, 30, 40][-keep:]
    assert names == ["notes.txt", *(f"step_{step:012d}.zip" for step in kept)]


def test_copies_that_a_user_keeps_are_neither_taken_nor_removed(tmp_path: Path) -> None:
    """A copy of an old checkpoint would else be what a run goes on from."""
    model = save_steps(tmp_path, [20])
    copies = [tmp_path / name for name in ("step_good.zip", f"step_{20:012d} (copy).zip")]
    for copy in copies:
        shutil.copy(newest_checkpoint(tmp_path).path, copy)
    for step in (30, 40):
        model.num_timesteps = step
        save_checkpoint(model, tmp_path, keep=1)
        assert newest_checkpoint(tmp_path).timesteps == step
    assert {*tmp_path.iterdir()} == {*copies, tmp_path / f"step_{40:012d}.zip"}


def test_damaged_checkpoints_are_not_the_ones_that_are_kept(tmp_path: Path) -> None:
    """A run that went back behind one saves at fewer timesteps."""
    model = save_steps(tmp_path, [20, 30])
    truncate(tmp_path / f"step_{30:012d}.zip")
    for step in (24, 28):
        model.num_timesteps = step
        save_checkpoint(model, tmp_path, keep=1)
        assert newest_checkpoint(tmp_path).timesteps == step


def test_remains_of_a_killed_save_are_cleared_away(tmp_path: Path) -> None:
    """Otherwise a run that is killed again and again fills the disk."""
    model = save_steps(tmp_path, [20])
    (tmp_path / f".step_{30:012d}.zip.abc123").write_bytes(b"half a file")
    for step in (40, 50):
        model.num_timesteps = step
        save_checkpoint(model, tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step_{50:012d}.zip"]


KILLER = """
    import os, random, signal, sys, time
    from pathlib import Path
    from ncrl.agents.runs.checkpoints import load_weights, newest_checkpoint, save_checkpoint
    from tests.agents.test_checkpoints import make_model

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(0)
    model, reader = make_model(), make_model()
    model.learn(20)
    save_checkpoint(model, folder)
    whole = newest_checkpoint(folder)
    saved = set()
    for _ in range(kills):
        saves, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            model.num_timesteps = whole.timesteps
            while True:
                model.num_timesteps += 1
                save_checkpoint(model, folder, keep=2)
                os.write(done, b".")
        try:
            os.read(saves, 1)  # a first save, however slow the machine; the next is interrupted
            time.sleep(chance.random() * 0.1)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(saves)
            os.close(done)
        newest = newest_checkpoint(folder)
        assert newest.timesteps >= whole.timesteps, (newest, whole)
        load_weights(reader, newest.path)
        whole = newest
        saved.add(newest.timesteps)
    print(len(saved), "different checkpoints")
"""


@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_f10_a_kill_while_saving_leaves_a_whole_checkpoint(kills: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 2, "saving went on between the kills"
    resume(make_model(), newest_checkpoint(tmp_path))
