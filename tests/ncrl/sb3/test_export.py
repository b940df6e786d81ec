"""`export_policy` and `load_policy`: exact round trips; files that do not fit are told apart."""

import errno
import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

import ncrl.sb3
from ncrl import NeurocoderConfig, inject
from ncrl.sb3 import (
    LstmPolicy,
    NeurocoderMlpLstmPolicy,
    NeurocoderMlpPolicy,
    export_policy,
    load_policy,
)
from ncrl.sb3.plain import from_plain, to_plain
from tests.ncrl.sb3.environments import Still

SMALL = {"head_kwargs": {"num_slots": 6, "num_heads": 2}}
VECTORS = spaces.Box(-1, 1, (3,), np.float32)
IMAGES = spaces.Box(0, 255, (1, 84, 84), np.uint8)
DICTS = spaces.Dict({"seen": VECTORS, "image": spaces.Box(0, 255, (36, 36, 1), np.uint8)})


class Shifting(BaseFeaturesExtractor):
    """A user's own."""

    def __init__(self, space: spaces.Box, shift: float = 1.0) -> None:
        super().__init__(space, 3)
        self.shift = shift
        self.norm = nn.BatchNorm1d(3)

    def forward(self, obs: Tensor) -> Tensor:
        return self.norm(obs + self.shift)


CASES: dict[str, tuple[Any, Any, spaces.Space, spaces.Space, dict[str, Any]]] = {
    "a2c": (A2C, "MlpPolicy", VECTORS, spaces.Discrete(3, start=2), {"net_arch": [5]}),
    "a2c-gsde": (A2C, "MlpPolicy", VECTORS, spaces.Box(-1, 1, (2,)), {"log_std_init": -1.0}),
    "a2c-separate": (
        A2C, "CnnPolicy", IMAGES, spaces.Discrete(2),
        {"share_features_extractor": False, "features_extractor_kwargs": {"features_dim": 8}},
    ),
    "ppo-separate": (
        PPO, "NeurocoderCnnPolicy", IMAGES, spaces.MultiDiscrete([2, 3]),
        {
            **SMALL, "share_features_extractor": False,
            "features_extractor_kwargs": {"features_dim": 8},
        },
    ),
    "ppo-dict": (PPO, "NeurocoderMultiInputPolicy", DICTS, spaces.MultiBinary(3), SMALL),
    "ppo-moe": (
        PPO, "NeurocoderMlpPolicy", VECTORS, spaces.Discrete(3),
        {"head": "moe", "head_kwargs": {"num_experts": 3, "top_k": 1}, "activation_fn": nn.ReLU},
    ),
    "recurrent": (
        RecurrentPPO, "MlpLstmPolicy", VECTORS, spaces.Box(-1, 1, (2,)),
        {
            "lstm_hidden_size": 6, "n_lstm_layers": 2, "enable_critic_lstm": False,
            "lstm_kwargs": {"bias": False},
        },
    ),
    "recurrent-dict": (RecurrentPPO, "MultiInputLstmPolicy", DICTS, spaces.Discrete(2), {}),
    "lstm": (
        RecurrentPPO, "NeurocoderMlpLstmPolicy", VECTORS, spaces.Discrete(3),
        {**SMALL, "lstm_hidden_size": 6, "net_arch": {"pi": [4], "vf": []}},
    ),
    "cnn-lstm": (
        RecurrentPPO, "NeurocoderCnnLstmPolicy", IMAGES, spaces.Discrete(3),
        {**SMALL, "lstm_hidden_size": 6, "encoder": "nature"},
    ),
}  # fmt: skip


def model_of(case: str) -> Any:
    algorithm, policy, observations, actions, kwargs = CASES[case]
    ncrl.sb3.register()
    torch.manual_seed(4)
    options = {"use_sde": True} if "gsde" in case else {}
    model = algorithm(
        policy, Still(observations, actions), n_steps=8, device="cpu", policy_kwargs=kwargs,
        **options, **({} if algorithm is A2C else {"batch_size": 8}),
    )  # fmt: skip
    with torch.no_grad():  # SB3's small initial heads would hide a wrong weight
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(policy: Any, observations: spaces.Space) -> list[np.ndarray]:
    """Everything a policy says about three observations in a row, the LSTM's state carried on."""
    observations.seed(0)
    state, said = None, []
    for _ in range(3):
        obs = observations.sample()
        torch.manual_seed(0)
        action, state = policy.predict(obs, state, np.zeros(1, bool), deterministic=True)
        tensors, _ = policy.obs_to_tensor(obs)
        with torch.no_grad():
            if isinstance(policy, (LstmPolicy, RecurrentPPO.policy_aliases["MlpLstmPolicy"])):
                zeros = torch.zeros(policy.lstm_hidden_state_shape)
                value = policy.predict_values(tensors, (zeros, zeros), torch.zeros(1))
                distribution = policy.get_distribution(tensors, (zeros, zeros), torch.zeros(1))[0]
            else:
                value = policy.predict_values(tensors)
                distribution = policy.get_distribution(tensors)
        taken = distribution.mode()
        said += [action, value.numpy(), distribution.log_prob(taken).numpy(), *(state or ())]
    return said


@pytest.mark.parametrize("case", CASES)
def test_a_policy_comes_back_exactly(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    assert export_policy(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    random = torch.get_rng_state()
    loaded = load_policy(tmp_path / "new" / "folder", "cpu")
    assert torch.equal(random, torch.get_rng_state())
    assert type(loaded) is type(model.policy)
    assert loaded.observation_space == model.observation_space
    assert loaded.action_space == model.action_space
    expected, got = model.policy.state_dict(), loaded.state_dict()
    assert list(expected) == list(got)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    model.policy.set_training_mode(False)
    observations = model.observation_space
    for one, same in zip(
        outputs(model.policy, observations), outputs(loaded, observations), strict=True
    ):
        assert np.array_equal(one, same)
    again = export_policy(loaded, tmp_path / "again")
    first = json.loads((tmp_path / "new" / "folder" / "policy.json").read_text())
    second = json.loads((again / "policy.json").read_text())
    assert first.pop("algorithm") == type(model).__name__ and second.pop("algorithm") is None
    assert first.pop("timesteps") == 0 and second.pop("timesteps") is None
    assert first == second


def test_noise_that_depends_on_the_state_is_drawn_from_the_weights_that_are_loaded(
    tmp_path: Path,
) -> None:
    model = model_of("a2c-gsde")
    with torch.no_grad():
        model.policy.log_std.fill_(-20.0)
    loaded = load_policy(export_policy(model, tmp_path), "cpu")
    assert loaded.action_dist.exploration_mat.abs().max() < 1e-6


def test_shared_weights_are_written_once(tmp_path: Path) -> None:
    """SB3 lists an extractor that actor and critic share three times."""
    model = model_of("cnn-lstm")
    export_policy(model, tmp_path)
    weights = [*model.policy.parameters(), *model.policy.buffers()]
    size = sum(weight.nbytes for weight in weights)
    assert (tmp_path / "policy.safetensors").stat().st_size < size + 8_000


def test_own_classes_have_to_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPO(
        NeurocoderMlpPolicy, Still(VECTORS, spaces.Discrete(2)), n_steps=8, batch_size=8,
        device="cpu", policy_kwargs={
            **SMALL, "features_extractor_class": Shifting,
            "features_extractor_kwargs": {"shift": 3.0},
        },
    ).learn(8)  # fmt: skip
    export_policy(model, tmp_path)
    with pytest.raises(ValueError, match=r"the class '.*\.Shifting', which is not known.*classes="):
        load_policy(tmp_path, "cpu")
    loaded: Any = load_policy(tmp_path, "cpu", classes=[Shifting])
    assert loaded.features_extractor.shift == 3.0
    assert torch.equal(
        loaded.features_extractor.norm.running_mean,
        model.policy.features_extractor.norm.running_mean,
    )
    assert not loaded.training and not torch.equal(
        loaded.features_extractor.norm.running_mean, torch.zeros(3)
    )
    monkeypatch.setattr(Shifting, "__module__", "moved")
    assert isinstance(load_policy(tmp_path, classes=[Shifting]).features_extractor, Shifting)


def test_a_full_disk_leaves_the_policy_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (PPO("MlpPolicy", "CartPole-v1", seed=seed) for seed in (0, 1))
    ncrl.sb3.export_policy(first, tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space left"):
        disk.setattr(os, "fsync", full)
        ncrl.sb3.export_policy(second, tmp_path)
    loaded = ncrl.sb3.load_policy(tmp_path, "cpu")
    torch.testing.assert_close(loaded.state_dict(), first.policy.state_dict(), rtol=0, atol=0)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="actor-critic policies can be exported, got DQNPolicy"):
        export_policy(DQN("MlpPolicy", "CartPole-v1", device="cpu"), tmp_path)
    policy = model_of("a2c").policy
    policy.features_extractor_kwargs = {"function": lambda: 0}
    with pytest.raises(ValueError, match=r"'features_extractor_kwargs' holds a .*function"):
        export_policy(policy, tmp_path)
    assert not list(tmp_path.iterdir())


def changed(how: str) -> A2C:
    model = A2C(NeurocoderMlpPolicy, "CartPole-v1", device="cpu")
    head = model.policy.action_net
    if how == "injected":
        inject(model.policy, NeurocoderConfig(num_slots=5), "policy_net.0")
    elif how == "grown":
        head.grow(2)
    else:
        head.freeze_slots()
    return model


@pytest.mark.parametrize("how", ["injected", "grown", "frozen"])
def test_a_policy_that_its_arguments_do_not_make_is_refused(how: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changed after it was made"):
        export_policy(changed(how), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm_obs", [True, False])
def test_statistics_that_stay_behind_are_mentioned(
    norm_obs: bool, tmp_path: Path, caplog: Any
) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1"), norm_obs=norm_obs)
    export_policy(A2C("MlpPolicy", env, device="cpu"), tmp_path)
    assert ("VecNormalize are not exported" in caplog.text) == norm_obs


@pytest.mark.parametrize(
    "value",
    [
        np.float32(2.5), np.int64(3), np.array(3.0), np.zeros((2, 3), np.uint8), np.zeros((0, 2)),
        np.arange(6).reshape(2, 3), np.array([0.0, -0.0]), math.inf,
        (1, [2, None]), deque([(1, 2.5)], 5),
        {("a", 1): {"$": "x"}}, {"b": {"a": True}}, np.dtype(np.int8).type, nn.ReLU,
        Path("runs/a b"),
    ],
    ids=repr,
)  # fmt: skip
def test_values_come_back_in_their_types(value: Any) -> None:
    text = json.dumps(to_plain(value, "it"), allow_nan=False)
    back = from_plain(json.loads(text), "it", [np.int8])
    assert type(back) is type(value)
    assert back is value or repr(back) == repr(value)
    if isinstance(value, np.ndarray):
        assert back.dtype == value.dtype and back.flags.writeable


def test_few_bytes_do_not_become_many() -> None:
    bomb = to_plain(np.zeros(1 << 20), "it")
    with pytest.raises(ValueError, match="more than 67108864 elements"):
        from_plain([bomb] * 1_000, "it")


# Files that do not fit.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_policy(model_of("lstm"), tmp_path)


def change(folder: Path, *path: str, to: Any) -> None:
    file = folder / "policy.json"
    description = json.loads(file.read_text())
    entry = description
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = to
    file.write_text(json.dumps(description))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:
        load_policy(folder, "cpu")
    message = str(raised.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_missing_and_truncated_files(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    assert "damaged" in refusal(folder) and name in refusal(folder)
    (folder / name).unlink()
    assert "does not exist" in refusal(folder) and name in refusal(folder)


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    data = bytearray((folder / "policy.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "policy.safetensors").write_bytes(data)
    assert "checksum" in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "x"}', "[" * 100_000, "\x00"])
def test_foreign_descriptions(folder: Path, text: str) -> None:
    (folder / "policy.json").write_text(text)
    assert "damaged" in refusal(folder) or "does not describe" in refusal(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 1, "reads version 2"),
        (["weights"], None, "no weights"),
        (["policy_class"], {"$": "class", "name": "os.system"}, "'os.system', which is not known"),
        (["policy_class"], {"$": "class", "name": "torch.nn.Linear"}, "none of an actor-critic"),
        (["policy_class"], {"$": "class", "name": "torch.nn.init"}, "not known"),
        (["arguments", "head"], "neurocode", "nearest: neurocoder"),
        (["arguments", "colour"], 3, "cannot be built from its arguments .*colour"),
        (["arguments", "net_arch"], ["__import__('os')"], "cannot be built"),
        (["arguments", "lstm_hidden_size"], 7, r"of shape \[4, 7\], got .* \[4, 6\]"),
        # 40 terabytes: refused before a byte of them is asked for.
        (["arguments", "lstm_hidden_size"], 10**6, "must be .* of shape"),
        (["arguments", "head_kwargs"], {"num_slots": 10**12}, "must be .* of shape"),
        (["arguments", "n_lstm_layers"], 2, "'lstm_actor.weight_ih_l1' is missing"),
        (["action_space", "arguments", "n"], 10**9, "must be .* of shape"),
        (["action_space", "arguments", "n"], -1, "have to be positive"),
        (["action_space"], {"$": "object", "class": "torch.nn.ELU", "arguments": {}}, "impossible"),
        (["observation_space", "arguments", "low", "shape"], [10**6, 10**6], "more than"),
        (["observation_space", "arguments", "low", "shape"], [1, 2], "impossible object"),
        (["observation_space", "arguments", "low", "shape"], [-1], "impossible array"),
        (["observation_space", "arguments", "dtype", "dtype"], "O", "the type object"),
        (["observation_space", "class"], "gymnasium.spaces.Graph", "impossible Graph"),
        (["observation_space"], {"$": "space", "kind": "Box"}, "holds .* 'space', which"),
    ],
)  # fmt: skip
def test_descriptions_that_do_not_fit(
    folder: Path, path: list[str], value: Any, message: str
) -> None:
    change(folder, *path, to=value)
    with pytest.raises(ValueError, match=message):
        load_policy(folder, "cpu")
    refusal(folder)


def test_a_file_cannot_lead_elsewhere(folder: Path, tmp_path: Path) -> None:
    change(folder, "weights", "file", to="../../etc/passwd")
    assert isinstance(load_policy(folder, "cpu"), NeurocoderMlpLstmPolicy)
