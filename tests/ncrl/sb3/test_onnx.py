"""Policies in onnxruntime give the numbers that they give in torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from ncrl.agents import A3C
from ncrl.sb3 import NeurocoderMlpPolicy, export_onnx
from tests.ncrl.sb3.environments import Still

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
PAIR = spaces.Dict(a=VECTOR, b=spaces.Discrete(4))
IMAGE = spaces.Box(0, 255, (4, 84, 84), np.uint8)
CASES: dict[str, tuple[str, spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = {
    "dict": ("NeurocoderMultiInputPolicy", PAIR, spaces.MultiDiscrete([2, 3]), {}),
    "entry-called-c": ("MultiInputPolicy", spaces.Dict(c=VECTOR), spaces.Discrete(2), {}),
    "lstm": ("NeurocoderMlpLstmPolicy", VECTOR, spaces.Box(-1, 1, (2,)), {"n_lstm_layers": 2}),
    "two-lstms": ("MlpLstmPolicy", VECTOR, spaces.MultiBinary(2), {"enable_critic_lstm": True}),
    "images": ("NeurocoderCnnLstmPolicy", IMAGE, spaces.Discrete(6), {}),
    "moe": ("MlpLstmPolicy", VECTOR, spaces.Discrete(3), {"head": "moe"}),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_torch(name: str, tmp_path: Path) -> None:
    kind, observation, action, options = CASES[name]
    if "Lstm" in kind:
        options = {"lstm_hidden_size": 8, **options}
    model = A3C(kind, Still(observation, action), policy_kwargs=options, device="cpu", seed=0)
    policy = model.policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    export_onnx(model, tmp_path / "policy.onnx")
    assert policy.training
    policy.eval()
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    for batch in (1, 5):
        parts = observation.spaces if isinstance(observation, spaces.Dict) else {"obs": observation}
        obs = {n: np.stack([s.sample() for _ in range(batch)]) for n, s in parts.items()}
        feed, state = dict(obs), policy.initial_state(batch)
        start = torch.arange(batch) % 2 == 0
        if policy.state_shape[0]:
            state = (torch.randn_like(state[0]), torch.randn_like(state[1]))
            feed |= {"h": state[0].numpy(), "c": state[1].numpy(), "episode_start": start.numpy()}
        names = [output.name for output in session.get_outputs()]
        assert {part.name for part in session.get_inputs()} == feed.keys()
        found = dict(zip(names, session.run(None, feed), strict=True))

        tensors = {n: torch.as_tensor(o) for n, o in obs.items()}
        given = tensors if isinstance(observation, spaces.Dict) else tensors["obs"]
        with torch.no_grad():
            latent, (h, c) = policy.encode(given, state, start)
            distribution = policy.distribution(latent)
            wanted = {"values": policy.values(latent).squeeze(-1)}
        wanted |= {"next_h": h, "next_c": c} if policy.state_shape[0] else {}
        if isinstance(action, spaces.Box):
            normal = distribution.distribution
            wanted |= {"mean": normal.mean, "log_std": normal.stddev.log()}
        else:
            actions = torch.as_tensor(np.stack([action.sample() for _ in range(batch)])).float()
            expected = distribution.log_prob(actions)
            logits = torch.as_tensor(found.pop("logits"))
            same = policy.action_dist.proba_distribution(logits)
            torch.testing.assert_close(same.log_prob(actions), expected, atol=1e-5, rtol=1e-4)
        assert found.keys() == wanted.keys()
        for output, value in wanted.items():
            np.testing.assert_allclose(found[output], value, atol=1e-5, rtol=1e-4)


def test_random_streams_stay_where_they_were(tmp_path: Path) -> None:
    """Those of spaces, too: environments may draw from them."""
    space = spaces.Box(-1, 1, (3,))
    policy = NeurocoderMlpPolicy(space, spaces.Discrete(2), lambda _: 0.0, head="linear")

    def drawn(export: bool) -> tuple[list[float], float]:
        space.seed(0)
        torch.manual_seed(0)
        if export:
            export_onnx(policy, tmp_path / "policy.onnx")
        return space.sample().tolist(), float(torch.rand(()))

    assert drawn(export=True) == drawn(export=False)


def test_of_a_compiled_policy_statistics_that_stay_behind_are_mentioned(
    tmp_path: Path, caplog: Any
) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1"))
    model = A2C(NeurocoderMlpPolicy, env, policy_kwargs={"head": "linear"}, device="cpu")
    model.policy = torch.compile(model.policy)  # type: ignore[assignment]  # which changes nothing
    export_onnx(model, tmp_path / "policy.onnx")
    assert "VecNormalize are not exported" in caplog.text


def test_an_entry_with_the_name_of_the_state_is_refused(tmp_path: Path) -> None:
    model = A3C("MultiInputLstmPolicy", Still(spaces.Dict(a=VECTOR, c=VECTOR)), device="cpu")
    with pytest.raises(ValueError, match=r"entry 'c' of the observation.*give it another name"):
        export_onnx(model, tmp_path / "policy.onnx")


def test_other_policies_are_refused(tmp_path: Path) -> None:
    model = A2C("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match=r"policy of ncrl\.sb3.*ActorCriticPolicy"):
        export_onnx(model, tmp_path / "policy.onnx")
    assert isinstance(model.policy, nn.Module) and not list(tmp_path.iterdir())
