"""`A3C.load`: what `A3C.save` wrote comes back, and nothing that is in a file is ever run."""

import base64
import inspect
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from torch import nn

from ncrl.agents import A3C, Limits
from ncrl.envs import masked_cartpole
from ncrl.sb3 import MlpLstmPolicy

PROGRAMS = {"num_slots": 6, "num_heads": 2}
KWARGS = {"lstm_hidden_size": 8, "head_kwargs": PROGRAMS}


def make_model(policy: Any = "NeurocoderMlpLstmPolicy", env: Any = None, **options: Any) -> A3C:
    options = {"n_workers": 0, "n_envs": 2, "n_steps": 5, "policy_kwargs": KWARGS} | options
    return A3C(policy, env or masked_cartpole(), seed=1, device="cpu", **options)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("a pickle was opened")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
        monkeypatch.setattr("cloudpickle." + name, refuse)


# What was saved comes back.


def fields(model: A3C) -> dict[str, Any]:
    """What SB3 saves of a model, without what a new model has of its own."""
    data = model.__dict__.copy()
    for name in (*model._excluded_save_params(), "policy"):
        data.pop(name, None)
    return data


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):  # SB3's Dict observations are OrderedDicts or dicts
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if hasattr(one, "__dict__") and not isinstance(one, (type, spaces.Space)):
        return same(vars(one), vars(other))
    return bool(one == other)


MODELS: dict[str, Callable[[], A3C]] = {
    "default": make_model,
    "numbers": lambda: make_model(
        "MlpPolicy", policy_kwargs={"net_arch": {"pi": [4], "vf": []}}, learning_rate=1e-3,
        limits=Limits(max_restarts=1), batch_size=5, use_rms_prop=False, normalize_advantage=True,
    ),
    "schedule": lambda: make_model(
        "MlpLstmPolicy", learning_rate=ConstantSchedule(1e-3),
        policy_kwargs={"optimizer_class": torch.optim.Adam, "activation_fn": torch.nn.ReLU},
    ),
    "rows and columns": lambda: make_model(
        "MlpPolicy", policy_kwargs={"net_arch": [4], "optimizer_class": torch.optim.Adafactor},
    ),
    "dict": lambda: make_model(
        "MultiInputPolicy", make_vec_env(SimpleMultiObsEnv, 2), policy_kwargs={}, verbose=0,
    ),
    "gsde": lambda: make_model("MlpPolicy", "Pendulum-v1", policy_kwargs={}, use_sde=True),
    "box": lambda: make_model("MlpPolicy", "Pendulum-v1", policy_kwargs={"log_std_init": -1.0}),
    "moe": lambda: make_model(policy_kwargs={"head": "moe"}),
    "nsm": lambda: make_model(policy_kwargs={"head": "nsm"}),
    "film": lambda: make_model(policy_kwargs={"head": "film"}),
    "hypernet": lambda: make_model(policy_kwargs={"head": "hypernet"}),
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_everything_saved_comes_back_without_a_pickle(
    make: Callable[[], A3C], tmp_path: Path, no_unpickling: None
) -> None:
    model = make().learn(20)
    model.save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", device="cpu")
    before, after = fields(model), fields(loaded)
    # `_setup_model` starts these anew, in SB3's own loader as well.
    fresh = {name for name in before if name.startswith("_skipped")} | {"policy_lag", "_dumped_at"}
    assert before.keys() == after.keys()
    differing = {name for name in before if not same(before[name], after[name])}
    assert differing <= fresh
    state, other = model.policy.state_dict(), loaded.policy.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    steps, same_steps = (m.policy.optimizer.state_dict()["state"] for m in (model, loaded))
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(same_steps[i][name]))
        for i, entry in steps.items()
        for name, value in entry.items()
    )
    loaded.learn  # noqa: B018  it is a whole model


def test_training_without_an_environment_says_where_it_comes_from(tmp_path: Path) -> None:
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no environment to learn in.*load\(path, env=\.\.\.\)"):
        A3C.load(tmp_path / "model", device="cpu").learn(20)


def test_files_can_be_open_ones_and_names_lack_their_suffix(tmp_path: Path) -> None:
    model = make_model()
    buffer = io.BytesIO()
    model.save(buffer)
    model.save(str(tmp_path / "new" / "model"))
    assert (tmp_path / "new" / "model.zip").is_file()
    for source in (buffer, tmp_path / "new" / "model", str(tmp_path / "new" / "model.zip")):
        loaded = A3C.load(source, device="cpu")  # type: ignore[arg-type]
        assert loaded.policy_class is model.policy_class
    with pytest.raises(FileNotFoundError):
        A3C.load(tmp_path / "absent")


def test_sb3s_own_loader_reads_it_too(tmp_path: Path) -> None:
    model = make_model().learn(10)
    model.save(tmp_path / "model")
    data, params, variables = load_from_zip_file(tmp_path / "model", device="cpu")
    assert data is not None and data["policy_class"] is model.policy_class
    assert params.keys() == {"policy", "policy.optimizer"} and not variables
    trusted = A3C.load(tmp_path / "model", device="cpu", trust=True)
    assert same(trusted.lr_schedule, model.lr_schedule)


def test_an_observation_that_was_saved_is_writable(tmp_path: Path) -> None:
    make_model().learn(10).save(tmp_path / "model")
    loaded = A3C.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded._last_obs, np.ndarray) and loaded._last_obs.flags.writeable


# What only code could restore.


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        A3C.load(path, device="cpu", **options)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_lambda_needs_trust_or_a_value(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with pytest.warns(UserWarning, match=r"'learning_rate': \.\.\.\} or trust=True"):
        make_model(learning_rate=lambda left: 1e-3 * left).save(path)
    message = refusal(path)
    assert "'learning_rate'" in message and "trust=True" in message
    assert A3C.load(path, device="cpu", trust=True).lr_schedule(0.5) == 5e-4
    schedule = LinearSchedule(2e-3, 0, 1)
    for options in ({"custom_objects": {"learning_rate": schedule}}, {"learning_rate": schedule}):
        assert A3C.load(path, device="cpu", **options).lr_schedule(0.5) == 1e-3  # type: ignore[arg-type]


class OwnPolicy(MlpLstmPolicy):
    """A user's."""


class OwnExtractor(FlattenExtractor):
    """A user's."""


class OwnActivation(nn.Tanh):
    """A user's, of a kind that a file may not name by itself."""


def test_own_policies_and_extractors_are_known(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    options = {"lstm_hidden_size": 8, "features_extractor_class": OwnExtractor}
    make_model(OwnPolicy, policy_kwargs=options).save(path)
    policy = A3C.load(path, device="cpu").policy
    assert type(policy) is OwnPolicy and type(policy.features_extractor) is OwnExtractor


def test_a_class_of_the_script_that_saved_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.zip"
    with monkeypatch.context() as in_script:
        in_script.setattr(OwnExtractor, "__module__", "__main__")
        options = {"lstm_hidden_size": 8, "features_extractor_class": OwnExtractor}
        make_model("MlpLstmPolicy", policy_kwargs=options).save(path)
    assert "'__main__.OwnExtractor', which is not known here; give it, known=" in refusal(path)
    policy = A3C.load(path, device="cpu", known=[OwnActivation, OwnExtractor]).policy
    assert type(policy.features_extractor) is OwnExtractor


class Warmed(A3C):
    """A user's, with an attribute that the class gives a first value."""

    updates_seen = 0

    def train(self) -> None:
        self.updates_seen += 1
        super().train()


def test_an_own_algorithm_keeps_its_attributes(tmp_path: Path) -> None:
    model = Warmed("MlpPolicy", masked_cartpole(), n_workers=0, n_envs=2, n_steps=5, device="cpu")
    model.learn(20).save(tmp_path / "model")
    assert Warmed.load(tmp_path / "model", device="cpu").updates_seen == 2


def test_any_other_class_has_to_be_given(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    model = make_model("MlpPolicy", policy_kwargs={"activation_fn": OwnActivation})
    with pytest.warns(UserWarning, match=r"load\(\) will need known=\[.*OwnActivation"):
        model.save(path)
    message = refusal(path)
    assert "OwnActivation" in message and "known=[...]" in message and "trust=True" in message
    for options in (
        {"known": [OwnActivation]},
        {"custom_objects": {"policy_kwargs": model.policy_kwargs}},
    ):
        loaded = A3C.load(path, device="cpu", **options)  # type: ignore[arg-type]
        assert loaded.policy_kwargs == model.policy_kwargs


@pytest.mark.parametrize(
    ("algorithm", "named"), [(A2C, "A2C"), (PPO, "PPO"), (DQN, "DQN")], ids=["A2C", "PPO", "DQN"]
)
def test_a_zip_of_another_algorithm_says_whose_it_is(
    algorithm: type[BaseAlgorithm], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.zip"
    algorithm("MlpPolicy", "CartPole-v1", device="cpu").save(path)
    for options in ({}, {"trust": True}):
        assert f"was saved by {named}" in refusal(path, **options)
    with open(path, "rb") as file, pytest.raises(ValueError, match=f"saved by {named}"):
        A3C.load(file, trust=True)  # type: ignore[arg-type]


# Files made to do harm.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    buffer = io.BytesIO()
    # The class makes SB3 pickle the policy's arguments.
    make_model(policy_kwargs={**KWARGS, "activation_fn": torch.nn.Tanh}).learn(10).save(buffer)
    return buffer.getvalue()


def members(zipped: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(zipped: bytes, path: Path, changes: dict[str, bytes | None]) -> Path:
    """The zip with members replaced, added or (None) removed, compressed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members(zipped) | changes).items():
            if content is not None:
                archive.writestr(name, content)
    return path


def pickled(canary: Path) -> dict[str, str]:
    return {
        ":type:": "x",
        ":serialized:": base64.b64encode(pickle.dumps(Malicious(canary))).decode(),
    }


def described(zipped: bytes, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The zip with a change of what ncrl wrote about the model."""
    changes = {"ncrl.json": changed_json(zipped, "ncrl.json", change)}
    return rewritten(zipped, folder / "model.zip", changes)


def changed_json(zipped: bytes, member: str, change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = json.loads(members(zipped)[member])
    change(content)
    return json.dumps(content).encode()


def test_the_canary_sings_where_it_is_trusted(saved: bytes, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = changed_json(saved, "data", lambda d: d.update(policy_class=pickled(canary)))
    path = rewritten(saved, tmp_path / "model.zip", {"data": data})
    with pytest.raises(Exception):  # noqa: B017  whatever becomes of it: the code was run
        A3C.load(path, trust=True)
    assert canary.exists()


def test_no_field_is_unpickled(saved: bytes, tmp_path: Path) -> None:
    """Wherever SB3 has a pickle, and wherever it has none."""
    canary = tmp_path / "canary"
    names = [*json.loads(members(saved)["data"]), "new"]
    described = set(json.loads(members(saved)["ncrl.json"])["fields"]) | {"lr_schedule"}
    assert len(names) > 30 and len(described) > 5
    path = tmp_path / "model.zip"
    for name in names:
        data = changed_json(saved, "data", lambda d, n=name: d.update({n: pickled(canary)}))
        for changes in ({"data": data}, {"data": data, "ncrl.json": None}):
            if name in described and len(changes) == 1:
                continue
            assert "trust=True" in refusal(rewritten(saved, path, changes))
            assert not canary.exists(), name
    # Where there is a description, it is all that counts.
    evil = {name: pickled(canary) for name in described}
    data = changed_json(saved, "data", lambda d: d.update(evil))
    A3C.load(rewritten(saved, path, {"data": data}), device="cpu")
    assert not canary.exists()


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "plain pickle"])
@pytest.mark.parametrize(
    "member",
    ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "tensors.pth", "new.pth"],
)
def test_no_member_is_unpickled(saved: bytes, member: str, raw: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = io.BytesIO()
    if raw:
        pickle.dump({"evil": Malicious(canary)}, evil, protocol=2)
    else:
        torch.save({"evil": Malicious(canary)}, evil)
    path = rewritten(saved, tmp_path / "model.zip", {member: evil.getvalue()})
    message = refusal(path)
    assert "mkdir" in message or "none of a saved A3C" in message
    assert not canary.exists()


@pytest.mark.parametrize("member", ["data", "ncrl.json", "_stable_baselines3_version"])
def test_no_other_member_is_unpickled(saved: bytes, member: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = pickle.dumps(Malicious(canary))
    path = rewritten(saved, tmp_path / "model.zip", {member: evil})
    if member == "_stable_baselines3_version":
        A3C.load(path, device="cpu", print_system_info=True)
    else:
        refusal(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy_class", {"$": "class", "name": "os.system"}),
        ("policy_class", {"$": "object", "class": "os.mkdir", "arguments": {"path": "canary"}}),
        ("policy_class", {"$": "class", "name": "torch.nn.Linear"}),
        ("policy_kwargs", {"features_extractor_class": {"$": "class", "name": "builtins.exec"}}),
        ("policy_kwargs", {"activation_fn": "__import__('os').mkdir('canary')"}),
        ("learning_rate", {"$": "object", "class": "torch.nn.Linear", "arguments": {}}),
        (
            "limits",
            {"$": "object", "class": "ncrl.agents.playing.pool.Limits", "arguments": {"x": 1}},
        ),
        ("limits", {"$": "call", "function": "os.mkdir"}),
        ("observation_space", {"$": "space", "kind": "Graph"}),
        ("_last_obs", {"$": "array", "dtype": "|O", "shape": [1], "base64": ""}),
    ],
)
def test_descriptions_name_nothing_that_acts(
    saved: bytes, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(described(saved, tmp_path, lambda d: d["fields"].update({name: value})))
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("env", "canary_module:Env-v0"),  # Gymnasium would import the module
        ("env_factory", "canary_module:Env-v0"),
        ("learn", 1),
        ("policy_aliases", {}),
        ("n_steps", "5"),
        ("n_envs", 10**12),
        ("gamma", "high"),
        ("policy_class", "NoSuchPolicy"),
        ("policy_class", "MlpPolicy"),
        ("reward_scale", None),
    ],
)
def test_plain_values_that_do_not_fit(
    saved: bytes, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canary_module.py").write_text("import os; os.mkdir('canary')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = changed_json(saved, "data", lambda d: d.update({name: value}))
    refusal(rewritten(saved, tmp_path / "model.zip", {"data": data}))
    assert not (tmp_path / "canary").exists()


def test_a_foreign_version_is_told(saved: bytes, tmp_path: Path) -> None:
    assert "version 2" in refusal(described(saved, tmp_path, lambda d: d.update(version=2)))


@pytest.mark.parametrize("name", ["../outside", "/absolute", "..\\outside", "folder/policy.pth"])
def test_members_with_a_path_are_refused(saved: bytes, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    assert "member" in refusal(rewritten(saved, folder / "model.zip", {name: b"x"}))
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "model.zip"]


# Files that are too large, cut off, or of other shapes.


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def compressed(zipped: bytes) -> bytes:
    """A file of torch's, its tensors compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members(zipped).items():
            archive.writestr(name, content)
    return buffer.getvalue()


BOMB = 60 << 20


@pytest.mark.parametrize(
    ("member", "make"),
    [
        ("data", lambda: b"{" + b" " * BOMB + b"}"),
        ("ncrl.json", lambda: b"[" * 100_000),
        ("policy.pth", lambda: bytes(BOMB)),
        ("policy.pth", lambda: compressed(torch_bytes({"a": torch.zeros(BOMB // 4)}))),
        ("policy.pth", lambda: torch_bytes({"a": torch.zeros(1).expand(BOMB)})),
        ("unknown", lambda: bytes(BOMB)),
    ],
)
def test_bombs_cost_little_memory(
    saved: bytes, member: str, make: Callable[[], bytes], tmp_path: Path
) -> None:
    path = rewritten(saved, tmp_path / "model.zip", {member: make()})
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lstm_hidden_size": 10**6}, "of shape"),
        ({"n_lstm_layers": 10**9}, "more than"),
        ({"net_arch": [8] * 10_000}, "more than"),
    ],
    ids=["size", "n_lstm_layers", "net_arch"],
)
def test_sizes_that_no_file_has_ask_for_no_memory_and_keep_nobody_busy(
    saved: bytes, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A policy of 40 terabytes would end the process."""
    path = described(saved, tmp_path, lambda d: d["fields"]["policy_kwargs"].update(options))
    assert message in refusal(path)


def test_damaged_files_are_told(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    for length in (0, 10, len(saved) // 2, len(saved) - 5):
        path.write_bytes(saved[:length])
        # What is left may end with one of torch's own zips.
        assert any(w in refusal(path) for w in ("damaged, or no zip file", "none of a saved A3C"))
    for name in ("data", "policy.pth", "policy.optimizer.pth"):
        assert repr(name) in refusal(rewritten(saved, path, {name: None}))


def test_weights_and_optimiser_of_other_shapes(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    weights = torch.load(io.BytesIO(members(saved)["policy.pth"]), weights_only=True)
    name, value = next(iter(weights.items()))
    for changed, message in (
        ({**weights, name: torch.zeros(3, 2, 1)}, "[3, 2, 1]"),
        ({**weights, "more": value}, "'more'"),
        ({n: w for n, w in weights.items() if n != name}, "is missing"),
        ([1, 2], "no tensors by name"),
    ):
        rewritten(saved, path, {"policy.pth": torch_bytes(changed)})
        assert message in refusal(path)
    state = torch.load(io.BytesIO(members(saved)["policy.optimizer.pth"]), weights_only=True)
    state["state"][0]["square_avg"] = torch.zeros(7)
    rewritten(saved, path, {"policy.optimizer.pth": torch_bytes(state)})
    assert "optimiser" in refusal(path) and "[7]" in refusal(path)


def test_load_takes_what_sb3s_takes() -> None:
    ours = inspect.signature(A3C.load).parameters
    theirs = inspect.signature(BaseAlgorithm.load).parameters
    assert [name for name in ours if name not in ("trust", "known")] == list(theirs)
    assert ours["trust"].default is False
