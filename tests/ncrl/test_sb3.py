"""`ncrl.sb3`: one set of policies, two interfaces that must agree, inside sb3-contrib too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from torch import Tensor

from ncrl import NeurocoderLinear
from ncrl.sb3 import (
    CnnLstmPolicy,
    LstmPolicy,
    MlpLstmPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderMlpLstmPolicy,
)
from tests.ncrl.sb3.environments import Still

VECTORS = spaces.Box(-1, 1, (3,), np.float32)
IMAGES = spaces.Box(0, 255, (1, 84, 84), np.uint8)
SMALL_HEADS = {"num_slots": 6, "num_heads": 2, "num_steps": 2, "num_least_used": 2}
POLICIES = [MlpLstmPolicy, CnnLstmPolicy, NeurocoderMlpLstmPolicy, NeurocoderCnnLstmPolicy]
ACTION_SPACES = [
    spaces.Discrete(4),
    spaces.Box(-2, 2, (2,), np.float32),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiBinary(3),
]


def observations_of(policy: type[LstmPolicy]) -> spaces.Box:
    return IMAGES if issubclass(policy, CnnLstmPolicy) else VECTORS


def make_policy(
    policy: type[LstmPolicy], action_space: spaces.Space | None = None, **options: Any
) -> LstmPolicy:
    torch.manual_seed(0)
    if "Neurocoder" in policy.__name__:
        options.setdefault("head_kwargs", SMALL_HEADS)
    options.setdefault("lstm_hidden_size", 8)
    made = policy(
        observations_of(policy), action_space or spaces.Discrete(4), lambda _: 1e-3, **options
    )
    with torch.no_grad():  # SB3's small initial heads would hide a wrong input
        for parameter in (*made.action_net.parameters(), *made.value_net.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def random_observations(space: spaces.Box, *leading: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    if space.dtype == np.uint8:
        array = rng.integers(0, 256, (*leading, *space.shape), np.uint8)
    else:
        array = rng.uniform(-1, 1, (*leading, *space.shape)).astype(np.float32)
    return torch.from_numpy(array)


def random_state(policy: LstmPolicy, batch: int) -> tuple[Tensor, Tensor]:
    layers, _, width = policy.lstm_hidden_state_shape
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(layers, batch, width, generator=generator),
        torch.randn(layers, batch, width, generator=generator),
    )


STARTS = torch.tensor(
    [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool
)  # [T + 1, B]


class Played:
    """What stepping row by row gave; the state is zeroed by hand where an episode starts."""

    def __init__(self, policy: LstmPolicy) -> None:
        num_rows, batch = STARTS.shape
        self.obs = random_observations(policy.observation_space, num_rows, batch)
        self.first_state = state = random_state(policy, batch)
        actions, log_probs, values = [], [], []
        never = torch.zeros(batch, dtype=torch.bool)
        with torch.no_grad():
            for t in range(num_rows):
                keep = (~STARTS[t]).float()[None, :, None]
                state = (state[0] * keep, state[1] * keep)
                values.append(policy.predict_values(self.obs[t], state, never).squeeze(-1))
                step = policy.act(self.obs[t], state, never)
                actions.append(step.actions)
                log_probs.append(step.log_prob)
                state = step.lstm_state
        self.last_state = state
        self.actions = torch.stack(actions)  # [T + 1, B, ...]
        self.log_prob = torch.stack(log_probs)  # [T + 1, B]
        self.values = torch.stack(values)  # [T + 1, B]


@pytest.mark.parametrize("policy_class", POLICIES)
@pytest.mark.parametrize("options", [{}, {"n_lstm_layers": 2, "net_arch": [5]}])
def test_a_rollout_evaluates_to_what_stepping_gave(policy_class: type, options: dict) -> None:
    policy = make_policy(policy_class, **options)
    played = Played(policy)
    with torch.no_grad():
        evaluation = policy.evaluate_rollout(
            played.obs, played.actions[:-1], played.first_state, STARTS
        )
    torch.testing.assert_close(evaluation.log_prob, played.log_prob[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(evaluation.values, played.values, rtol=1e-4, atol=1e-5)
    assert evaluation.latent.actor.shape == (*STARTS.shape, 8)
    assert evaluation.latent.critic is evaluation.latent.actor
    assert played.values.std() > 1e-3, "the comparison would hide a wrong state"


@pytest.mark.parametrize("policy_class", [MlpLstmPolicy, NeurocoderMlpLstmPolicy])
@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=lambda s: type(s).__name__)
def test_every_action_space(policy_class: type, action_space: spaces.Space) -> None:
    policy = make_policy(policy_class, action_space)
    played = Played(policy)
    assert played.actions.shape == (*STARTS.shape, *action_space.shape)
    with torch.no_grad():
        evaluation = policy.evaluate_rollout(
            played.obs, played.actions[:-1], played.first_state, STARTS
        )
    torch.testing.assert_close(evaluation.log_prob, played.log_prob[:-1], rtol=1e-4, atol=1e-5)
    assert (evaluation.entropy > 0).all() and evaluation.entropy.shape == (5, 3)
    for deterministic in (False, True):
        action, _ = policy.predict(played.obs[0].numpy(), deterministic=deterministic)
        assert all(action_space.contains(a.astype(action_space.dtype)) for a in action)


def test_log_probability_and_entropy_of_a_discrete_policy_by_hand() -> None:
    policy = make_policy(MlpLstmPolicy)
    played = Played(policy)
    evaluation = policy.evaluate_rollout(
        played.obs, played.actions[:-1], played.first_state, STARTS
    )
    logits = policy.action_net(evaluation.latent.actor[:-1])
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    chosen = log_p.gather(-1, played.actions[:-1].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(evaluation.log_prob, chosen)
    torch.testing.assert_close(evaluation.entropy, -(log_p.exp() * log_p).sum(-1))
    values = policy.value_net(evaluation.latent.critic).squeeze(-1)
    torch.testing.assert_close(evaluation.values, values)


@pytest.mark.parametrize("policy_class", POLICIES)
def test_the_critics_gradient_reaches_encoder_and_lstm(policy_class: type) -> None:
    policy = make_policy(policy_class)
    played = Played(policy)
    evaluation = policy.evaluate_rollout(
        played.obs, played.actions[:-1], played.first_state, STARTS
    )
    starts = STARTS[0].float()
    contrib = policy.evaluate_actions(
        played.obs[0], played.actions[0], RNNStates(*[played.first_state] * 2), starts
    )
    for values in (evaluation.values, contrib[0]):
        policy.zero_grad()
        values.sum().backward()
        trained = {name for name, p in policy.named_parameters() if p.grad is not None}
        assert all(p.grad.abs().sum() > 0 for p in policy.lstm_actor.parameters())
        for name, parameter in policy.features_extractor.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert not any(name.startswith("action_net") for name in trained)
        assert any(name.startswith("value_net") for name in trained)


@pytest.mark.parametrize("policy_class", POLICIES)
def test_sb3_contribs_interface_agrees_with_the_time_major_one(policy_class: type) -> None:
    policy = make_policy(policy_class, n_lstm_layers=2)
    played = Played(policy)
    num_rows, batch = STARTS.shape
    state = RNNStates(played.first_state, played.first_state)
    # contrib lays sequences one after the other: [B * T, ...].
    obs = played.obs.transpose(0, 1).flatten(0, 1)
    actions = played.actions.transpose(0, 1).flatten(0, 1)
    starts = STARTS.T.flatten().float()
    with torch.no_grad():
        values, log_prob, entropy = policy.evaluate_actions(obs, actions, state, starts)
        predicted = policy.predict_values(obs, played.first_state, starts)
    assert values.shape == predicted.shape == (batch * num_rows, 1)
    assert entropy.shape == (batch * num_rows,)
    for actual, expected in ((values, played.values), (predicted, played.values)):
        actual = actual.view(batch, num_rows).T
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    log_prob = log_prob.view(batch, num_rows).T
    torch.testing.assert_close(log_prob, played.log_prob, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for t in range(num_rows):
            actions, values, log_prob, state = policy(
                played.obs[t], state, STARTS[t].float(), deterministic=True
            )
            again = policy.evaluate_actions(
                played.obs[t], actions, RNNStates(*[played.first_state] * 2), torch.ones(batch)
            )
            torch.testing.assert_close(values[:, 0], played.values[t], rtol=1e-4, atol=1e-5)
            assert again[1].shape == log_prob.shape == (batch,)
    for part in (*state.pi, *state.vf):
        assert part.shape == (2, batch, 8)
    for actual, expected in zip(state.pi, played.last_state, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_predicted_actions_depend_on_the_carried_state() -> None:
    policy = make_policy(MlpLstmPolicy, spaces.Box(-9, 9, (1,), np.float32))
    obs = random_observations(VECTORS, 2).numpy()
    state = tuple(3 * part.numpy() for part in random_state(policy, 2))
    carried, _ = policy.predict(obs, state, np.array([False, True]), deterministic=True)
    fresh, _ = policy.predict(obs, deterministic=True)
    assert abs(carried[0, 0] - fresh[0, 0]) > 1e-3
    np.testing.assert_allclose(carried[1], fresh[1], rtol=1e-5)


@pytest.mark.parametrize(
    "actions", [spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2, 2))]
)
def test_every_action_space_trains_inside_recurrent_ppo(actions: spaces.Space) -> None:
    """Binary actions come back from its buffer as int8."""
    model = RecurrentPPO(
        NeurocoderMlpLstmPolicy,
        Still(observations_of(NeurocoderMlpLstmPolicy), actions),
        n_steps=8,
        batch_size=8,
        n_epochs=1,
        policy_kwargs={"lstm_hidden_size": 8, "head_kwargs": SMALL_HEADS},
    )
    before = model.policy.action_net.memory.u.detach().clone()
    model.learn(8)
    assert not torch.equal(model.policy.action_net.memory.u, before)


@pytest.mark.parametrize("policy_class", POLICIES)
def test_trains_saves_and_loads_inside_recurrent_ppo(policy_class: type, tmp_path: Path) -> None:
    space = observations_of(policy_class)
    space.seed(0)
    env = TimeLimit(Still(space), 5)
    kwargs: dict[str, Any] = {"lstm_hidden_size": 8}
    if "Neurocoder" in policy_class.__name__:
        kwargs["head_kwargs"] = SMALL_HEADS
    model = RecurrentPPO(
        policy_class, env, n_steps=8, batch_size=8, n_epochs=1, policy_kwargs=kwargs, seed=0
    )
    before = {name: p.clone() for name, p in model.policy.named_parameters()}
    model.learn(16)
    unchanged = [n for n, p in model.policy.named_parameters() if torch.equal(p, before[n])]
    if not issubclass(policy_class, CnnLstmPolicy):  # dead units of an encoder may not move
        assert unchanged == []
    assert len(unchanged) < len(before) / 2
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", env=env)
    obs = random_observations(space, 2).numpy()
    for actual, expected in zip(
        loaded.predict(obs, deterministic=True)[1],
        model.predict(obs, deterministic=True)[1],
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)
    for name, value in loaded.policy.state_dict().items():
        assert torch.equal(value, model.policy.state_dict()[name]), name
    loaded.learn(8)


SEVEN_SLOTS = SMALL_HEADS | {"num_slots": 7}


@pytest.mark.parametrize(
    ("policy_class", "options"),
    [
        (MlpLstmPolicy, {}),
        (CnnLstmPolicy, {}),
        (NeurocoderMlpLstmPolicy, {"head_kwargs": SEVEN_SLOTS}),
        (NeurocoderCnnLstmPolicy, {"head_kwargs": SEVEN_SLOTS}),
        (CnnLstmPolicy, {"encoder": "paper", "head": "neurocoder", "head_kwargs": SEVEN_SLOTS}),
    ],
)
def test_a_saved_policy_is_built_as_it_was(
    policy_class: type, options: dict, tmp_path: Path
) -> None:
    policy = make_policy(policy_class, lstm_hidden_size=9, n_lstm_layers=2, net_arch=[5], **options)
    policy.save(tmp_path / "policy")
    loaded = policy_class.load(tmp_path / "policy")
    assert loaded.lstm_hidden_state_shape == (2, 1, 9)
    assert loaded.head == policy.head and loaded.head_kwargs == policy.head_kwargs
    if "head_kwargs" in options:
        assert loaded.action_net.config == policy.action_net.config
        assert loaded.action_net.config.num_slots == 7
    assert str(loaded) == str(policy)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_heads() -> None:
    linear = make_policy(MlpLstmPolicy)
    assert isinstance(linear.action_net, torch.nn.Linear)
    coded = make_policy(MlpLstmPolicy, head="neurocoder", head_kwargs={"num_slots": 5})
    for head, width in ((coded.action_net, 4), (coded.value_net, 1)):
        assert isinstance(head, NeurocoderLinear)
        assert (head.in_features, head.out_features) == (8, width)
        assert head.config.num_slots == 5
    optimised = {id(p) for group in coded.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in coded.parameters()}, "heads must be in the optimiser"
    plain = make_policy(NeurocoderMlpLstmPolicy, head="linear", head_kwargs=None)
    assert isinstance(plain.action_net, torch.nn.Linear)
    no_bias = make_policy(MlpLstmPolicy, head_kwargs={"bias": False})
    assert no_bias.action_net.bias is None and no_bias.value_net.bias is None


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'neurocodr'.*nearest: neurocoder"):
        make_policy(MlpLstmPolicy, head="neurocodr")
    with pytest.raises(ValueError, match="num_slotz"):
        make_policy(NeurocoderMlpLstmPolicy, head_kwargs={"num_slotz": 5})
    with pytest.raises(ValueError, match="num_slots"):
        make_policy(NeurocoderMlpLstmPolicy, head_kwargs={"num_slots": 0})
    with pytest.raises(ValueError, match=r"'papper'.*nearest: paper"):
        make_policy(CnnLstmPolicy, encoder="papper")


def test_one_options_dictionary_serves_several_policies() -> None:
    options = {"features_extractor_kwargs": {}, "head_kwargs": dict(SMALL_HEADS)}
    make_policy(NeurocoderCnnLstmPolicy, encoder="nature", **options)
    assert options == {"features_extractor_kwargs": {}, "head_kwargs": SMALL_HEADS}


def test_initial_state_is_zero_and_not_shared() -> None:
    policy = make_policy(MlpLstmPolicy, n_lstm_layers=2)
    h, c = policy.initial_state(3)
    assert h.shape == c.shape == (2, 3, 8)
    h.add_(1)
    assert (c == 0).all() and (policy.initial_state(3)[0] == 0).all()
