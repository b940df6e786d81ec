"""What a policy is asked: wrong observations, states and spaces are one line, right ones are taken.

P1 to P8 are the kinds of wrong inputs that `predict` has to name.
"""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    NatureCNN,
)
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from ncrl.agents import A3C
from ncrl.networks import AtariEncoder
from ncrl.sb3 import MlpPolicy, MultiInputPolicy, NeurocoderCnnPolicy, NeurocoderMlpPolicy
from tests.ncrl.sb3.environments import Still

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (84, 84, 1), np.uint8)
DICT = spaces.Dict(a=VECTOR, b=spaces.Discrete(2))
TWO = spaces.Discrete(2)


def model_for(space: Any, policy: str, **options: Any) -> A3C:
    small = {"lstm_hidden_size": 8} if "Lstm" in policy else {}
    return A3C(policy, Still(space), policy_kwargs=small | options, seed=0, device="cpu")


MODELS = {
    "vector": (VECTOR, "MlpLstmPolicy", np.zeros(3, np.float32)),
    "image": (IMAGE, "CnnLstmPolicy", np.zeros((84, 84, 1), np.uint8)),
    "dict": (DICT, "MultiInputPolicy", {"a": np.zeros(3, np.float32), "b": np.array(1)}),
    "discrete": (spaces.Discrete(3), "MlpPolicy", np.array(2)),
    "several": (spaces.MultiDiscrete([2, 3]), "MlpPolicy", np.array([1, 2])),
}
NAN = np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)
WRONG = {
    "P1 shape": ("vector", np.zeros(4), r"\(4,\).*\(3,\)"),
    "P1 rank": ("vector", np.zeros((2, 1, 3)), r"\(2, 1, 3\).*\(3,\)"),
    "P1 image": ("image", np.zeros((84, 80, 1), np.uint8), r"\(.*80.*\).*\(.*84.*\)"),
    "P1 no image": ("image", [1, 2, 3], r"\(3,\)"),
    "P1 ragged": ("vector", [[1, 2], [3]], "no array"),
    "P2 text": ("vector", np.array(["a", "b", "c"]), "dtype <U1"),
    "P2 objects": ("vector", np.array([None] * 3), "dtype object"),
    "P2 nothing": ("vector", None, "dtype object"),
    "P2 floats": ("image", np.zeros((84, 84, 1)), "dtype float64, expected uint8"),
    "P2 reset": ("vector", (np.zeros(3), {}), "is a tuple"),
    "P2 dict": ("vector", {"a": np.zeros(3)}, "is a dict, but.*Box"),
    "P2 no dict": ("dict", np.zeros(3), "is a ndarray, but.*Dict"),
    "P3 nan": ("vector", NAN, r"nan at index \(1, 1\)"),
    "P3 entry": ("dict", {"a": np.full(3, np.inf), "b": 1}, r"'a'.*inf at index \(0,\)"),
    "P3 outside": ("discrete", np.array([0, 3]), r"3 at index \(1,\)"),
    "P3 outside several": ("several", np.array([1, 3]), r"3 at index \(1,\)"),
    "P7 empty": ("vector", np.zeros((0, 3)), r"empty, with shape \(0, 3\)"),
    "P7 empty image": ("image", np.zeros((0, 84, 84, 1), np.uint8), "empty"),
    "P7 missing": ("dict", {"a": np.zeros(3)}, "lacks 'b'"),
    "P7 extra": ("dict", {"a": np.zeros(3), "b": 1, "c": 1}, "unknown entry 'c'"),
    "P7 rows": ("dict", {"a": np.zeros((2, 3)), "b": np.zeros(3, int)}, "'a': 2, 'b': 3"),
}


@pytest.mark.parametrize("is_dict", [False, True])
def test_normalised_observations_of_integers(is_dict: bool) -> None:
    """VecNormalize makes floats of them, and leaves the space as it is."""
    numbers = spaces.Box(0, 255, (3,), np.uint8)
    space = spaces.Dict(a=numbers, b=VECTOR) if is_dict else numbers
    env = VecNormalize(DummyVecEnv([lambda: Still(space)] * 2))
    policy = MultiInputPolicy if is_dict else MlpPolicy
    model = PPO(policy, env, n_steps=4, batch_size=4, device="cpu", seed=0)
    model.learn(8)
    assert model.predict(env.reset())[0].shape == (2,)


@pytest.fixture(scope="module")
def models() -> dict[str, A3C]:
    return {name: model_for(space, policy) for name, (space, policy, _) in MODELS.items()}


@pytest.mark.parametrize(("name", "observation", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_observations(
    models: dict[str, A3C], name: str, observation: Any, message: str
) -> None:
    model, right = models[name], MODELS[name][2]
    before = model.predict(right, deterministic=True)
    with pytest.raises(ValueError, match=message) as raised:
        model.predict(observation)
    assert "\n" not in str(raised.value)
    after = model.predict(right, deterministic=True)
    np.testing.assert_equal(before, after)


H = np.zeros((1, 2, 8))
STATES = {
    "P4 environments": ((H[:, :1], H[:, :1]), r"\(1, 1, 8\).*\(1, 2, 8\)"),
    "P4 layers": ((np.zeros((2, 2, 8)),) * 2, r"\(2, 2, 8\).*\(1, 2, 8\)"),
    "P4 size": ((np.zeros((1, 2, 9)),) * 2, r"\(1, 2, 9\).*\(1, 2, 8\)"),
    "P4 one tensor": (H, "a pair .*got ndarray"),
    "P4 three": ((H, H, H), "a pair .*got 3 parts"),
    "P4 text": (("h", "c"), "dtype <U1"),
    "P4 nan": ((H, H * np.nan), "finite"),
}


@pytest.mark.parametrize(("state", "message"), STATES.values(), ids=STATES.keys())
def test_wrong_states(models: dict[str, A3C], state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models["vector"].predict(np.zeros((2, 3)), state=state)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([True], r"\(1,\) for 2 observations"),
        ([True] * 3, r"\(3,\) for 2 observations"),
        (True, r"\(1,\) for 2 observations"),
        ([0.5, 1], "truth values"),
        ([np.nan, 1], "truth values"),
        (["a", "b"], "dtype <U1"),
    ],
)
def test_p5_wrong_episode_starts(models: dict[str, A3C], starts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models["vector"].predict(np.zeros((2, 3)), state=(H, H), episode_start=starts)


@pytest.mark.parametrize("start", [True, np.True_, 1, 1.0, [True], np.array(True), [[True]]])
def test_p6_every_shape_of_one_start(models: dict[str, A3C], start: Any) -> None:
    model, obs = models["vector"], np.ones(3)
    _, state = model.predict(obs)
    _, again = model.predict(obs, state=state, episode_start=start)
    np.testing.assert_array_equal(state, again)


def test_p8_a_start_in_the_middle_of_a_batch(models: dict[str, A3C]) -> None:
    model, obs = models["vector"], np.eye(3)
    _, state = model.predict(obs)
    _, kept = model.predict(obs, state=state)
    _, zeroed = model.predict(obs)
    _, mixed = model.predict(obs, state=state, episode_start=[False, True, False])
    for got, old, new in zip(mixed, kept, zeroed, strict=True):
        np.testing.assert_allclose(got, np.stack([old[:, 0], new[:, 1], old[:, 2]], 1), atol=1e-6)
        assert not np.allclose(old[:, 1], new[:, 1])


ODD_ACTIONS = [
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3], start=[1, 1]),
    spaces.MultiDiscrete([[2], [2]]),
    spaces.MultiBinary([2, 2]),
    spaces.Box(-np.inf, np.inf, (2,)),
    spaces.Box(0, np.inf, (2,)),
    spaces.Box(0, 3, (2,), np.int64),
    spaces.Box(-1, 1, ()),
    spaces.Box(-1, 1, (0,)),
    spaces.Text(3),
    spaces.Tuple((TWO, TWO)),
    spaces.Dict(a=TWO),
    spaces.Sequence(TWO),
]
ODD_OBSERVATIONS = [
    spaces.Discrete(3, start=5),
    spaces.MultiDiscrete([2, 3], start=[1, 1]),
    spaces.MultiDiscrete([[2, 2], [3, 4]]),
    spaces.Box(-1, 1, ()),
    spaces.Box(-1, 1, (0,)),
    spaces.Text(3),
    spaces.Tuple((TWO, VECTOR)),
    spaces.Dict(),
    spaces.Dict(a=spaces.Dict(b=VECTOR)),
    spaces.Dict(a=spaces.Text(3)),
    spaces.OneOf((TWO, TWO)),
    spaces.Sequence(TWO),
]


@pytest.mark.parametrize("space", ODD_ACTIONS, ids=str)
def test_odd_spaces_of_actions(space: Any) -> None:
    with pytest.raises(ValueError, match="not supported as actions") as raised:
        A3C("MlpPolicy", Still(VECTOR, space), n_steps=4)
    assert " ".join(str(space).split()) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("space", ODD_OBSERVATIONS, ids=str)
def test_odd_spaces_of_observations(space: Any) -> None:
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match="not supported as observations") as raised:
        A3C(policy, Still(space), n_steps=4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "space",
    [spaces.MultiBinary([2, 2]), spaces.Box(-1, 1, (2, 2)), spaces.Box(0, 9, (2,), np.uint16)],
)
def test_unusual_spaces_that_work(space: Any) -> None:
    assert A3C("MlpPolicy", Still(space), n_steps=4, device="cpu").learn(8).num_timesteps == 8


PAIRS = {
    "cnn, vectors": ("CnnPolicy", VECTOR, "CnnPolicy needs images.*use MlpPolicy"),
    "cnn, dict": ("NeurocoderCnnPolicy", DICT, "use NeurocoderMultiInputPolicy"),
    "cnn, floats": ("CnnPolicy", spaces.Box(0, 1, (84, 84, 1)), "needs images"),
    "cnn, number": ("CnnPolicy", spaces.Discrete(4), "needs images.*use MlpPolicy"),
    "cnn, small": ("CnnPolicy", spaces.Box(0, 255, (12, 12, 1), np.uint8), "too small"),
    "multi, vectors": ("MultiInputPolicy", VECTOR, "needs Dict .*use MlpPolicy"),
    "multi, image": ("MultiInputLstmPolicy", IMAGE, "needs Dict .*use CnnLstmPolicy"),
    "multi, small": (
        "MultiInputPolicy",
        spaces.Dict(a=spaces.Box(0, 255, (12, 12, 1), np.uint8)),
        "too small",
    ),
    "mlp, dict": (MlpPolicy, DICT, "use MultiInputPolicy"),
    "lstm, dict": ("MlpLstmPolicy", DICT, "needs vectors.*use MultiInputLstmPolicy"),
    "cnn lstm, vectors": ("CnnLstmPolicy", VECTOR, r"needs images \(channels.*use MlpLstmPolicy"),
}


@pytest.mark.parametrize(("policy", "space", "message"), PAIRS.values(), ids=PAIRS.keys())
def test_wrong_pairs_of_policy_and_space(policy: Any, space: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        A3C(policy, Still(space), device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [NatureCNN, AtariEncoder, CombinedExtractor])
def test_an_extractor_that_does_not_suit_the_observations_is_what_is_wrong(kind: Any) -> None:
    """Not the policy, which is no better than itself."""
    wrong = (
        f"features_extractor_class={kind.__name__} needs .*give another features_extractor_class"
    )
    with pytest.raises(ValueError, match=wrong):
        model_for(VECTOR, "MlpLstmPolicy", features_extractor_class=kind)


class Both(BaseFeaturesExtractor):
    """The encoder of Atari frames for the picture of a Dict observation, beside the rest."""

    def __init__(self, space: spaces.Dict, **options: Any) -> None:
        super().__init__(space, 256 + 3)
        self.encoder = AtariEncoder(space["picture"], **options)

    def forward(self, obs: Any) -> torch.Tensor:
        return torch.cat([self.encoder(obs["picture"]), obs["a"]], 1)


def test_an_encoder_that_is_shown_parts_of_observations_keeps_no_mean_of_them() -> None:
    space = spaces.Dict(picture=spaces.Box(0, 255, (1, 84, 84), np.uint8), a=VECTOR)
    options: dict[str, Any] = {"features_extractor_class": Both}
    with pytest.raises(ValueError, match=r"Both shows an AtariEncoder.*standardize=False"):
        model_for(space, "MultiInputLstmPolicy", **options)
    options["features_extractor_kwargs"] = {"standardize": False}
    assert model_for(space, "MultiInputLstmPolicy", **options).learn(5).num_timesteps == 5


def test_wrong_pairs_in_the_algorithms_of_sb3() -> None:
    for policy, space, other in (
        (NeurocoderCnnPolicy, VECTOR, "use NeurocoderMlpPolicy"),
        (NeurocoderMlpPolicy, DICT, "use NeurocoderMultiInputPolicy"),
    ):
        with pytest.raises(ValueError, match=other):
            PPO(policy, Still(space), device="cpu")
    with pytest.raises(ValueError, match="use MlpPolicy"):
        MultiInputPolicy(VECTOR, TWO, ConstantSchedule(1e-3))


def test_other_wrong_arguments_are_one_line() -> None:
    policy = model_for(VECTOR, "MlpPolicy").policy
    with pytest.raises(TypeError, match="an object of MlpPolicy") as raised:
        A3C(policy, Still(VECTOR))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="squash_output=True needs use_sde=True"):
        model_for(VECTOR, "MlpPolicy", squash_output=True)
