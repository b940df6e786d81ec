"""`ncrl.agents.playing.collector`: which row holds what, and what must not get into a rollout."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from ncrl.agents.playing.buffers import Rollout, RolloutShape
from ncrl.agents.playing.collector import Collector, NonFiniteError, Outcome
from ncrl.sb3 import (
    CnnLstmPolicy,
    LstmPolicy,
    MlpLstmPolicy,
    MultiInputLstmPolicy,
    NeurocoderCnnLstmPolicy,
    NeurocoderMlpLstmPolicy,
)
from tests.agents.environments import Scripted

POLICIES = [MlpLstmPolicy, CnnLstmPolicy, NeurocoderMlpLstmPolicy, NeurocoderCnnLstmPolicy]
LENGTH, ENVS, WIDTH = 12, 3, 8
DONES = np.zeros((LENGTH, ENVS), dtype=int)
DONES[1, 0] = DONES[4, 2] = DONES[7, 1] = 1  # terminated
DONES[2, 1] = DONES[4, 0] = DONES[9, 2] = 2  # cut off by a time limit


def make_env(image: bool = False, action_space: spaces.Space | None = None) -> Scripted:
    rng = np.random.default_rng(3)
    if image:
        shape = (LENGTH + 1, ENVS, 1, 84, 84)
        observations, terminal = (rng.integers(0, 256, shape).astype(np.uint8) for _ in range(2))
    else:
        shape = (LENGTH + 1, ENVS, 4)
        observations, terminal = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    rewards = rng.normal(size=(LENGTH, ENVS)).astype(np.float32) * 100
    return Scripted(observations, rewards, DONES, terminal, action_space)


def make_policy(policy: type[LstmPolicy], env: Scripted, **options: Any) -> LstmPolicy:
    torch.manual_seed(0)
    made = policy(
        env.observation_space, env.action_space, lambda _: 0.0, lstm_hidden_size=WIDTH, **options
    )
    with torch.no_grad():  # SB3's small initial heads would hide a wrong input
        for parameter in (*made.action_net.parameters(), *made.value_net.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def allocate(env: Scripted, policy: LstmPolicy, n_steps: int) -> Rollout:
    layers = policy.lstm_hidden_state_shape[0]
    return RolloutShape(
        n_steps, ENVS, env.observation_space, env.action_space, layers, WIDTH
    ).allocate()


def collect(
    env: Scripted, policy: LstmPolicy, lengths: list[int]
) -> tuple[list[Rollout], list[Outcome], Collector]:
    """Rollouts of the given numbers of timesteps, one after the other."""
    collector = Collector(env, policy, env.reset())
    outcomes: list[Outcome] = []
    rollouts = []
    for n_steps in lengths:
        rollout = allocate(env, policy, n_steps)
        assert collector.collect(rollout, n_steps, lambda o: outcomes.append(o) or True)
        rollouts.append(rollout)
    return rollouts, outcomes, collector


def test_row_t_is_what_was_seen_at_t_and_done_at_t() -> None:
    env = make_env()
    rollouts, outcomes, _ = collect(env, make_policy(MlpLstmPolicy, env), [5, 1, 6])
    start = np.concatenate([np.ones((1, ENVS)), DONES > 0])
    t = 0
    for rollout in rollouts:
        end = t + len(rollout.rewards)
        np.testing.assert_array_equal(rollout.obs, env.observations[t : end + 1])
        np.testing.assert_array_equal(rollout.actions, np.stack(env.actions[t:end]))
        np.testing.assert_array_equal(rollout.rewards, env.rewards[t:end])
        np.testing.assert_array_equal(rollout.episode_start, start[t : end + 1] > 0)
        t = end
    assert [outcome.row for outcome in outcomes] == [*range(5), 0, *range(6)]
    for t, outcome in enumerate(outcomes):
        np.testing.assert_array_equal(outcome.rewards, env.rewards[t])
        np.testing.assert_array_equal(outcome.dones, DONES[t] > 0)
        assert [bool(info) for info in outcome.infos] == (DONES[t] > 0).tolist()


@pytest.mark.parametrize("policy_class", POLICIES)
def test_log_probabilities_and_states_are_those_of_the_learner(policy_class: type) -> None:
    """With equal weights the learner's evaluation of a rollout gives what was recorded."""
    env = make_env(image=issubclass(policy_class, CnnLstmPolicy))
    policy = make_policy(policy_class, env, n_lstm_layers=2)
    rollouts, _, collector = collect(env, policy, [5, 7])
    state = policy.initial_state(ENVS)
    for rollout in rollouts:
        stored = (rollout.lstm_h, rollout.lstm_c)
        for actual, expected in zip(stored, state, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            evaluation = policy.evaluate_rollout(
                rollout.obs, rollout.actions, stored, rollout.episode_start
            )
            _, state = policy.unroll(rollout.obs[:-1], stored, rollout.episode_start[:-1])
        torch.testing.assert_close(rollout.log_prob, evaluation.log_prob, rtol=1e-4, atol=1e-5)
    assert rollouts[1].lstm_h.abs().sum() > 0
    for actual, expected in zip(collector.lstm_state, state, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("returned", [np.asarray, np.float64, np.ndarray.tolist, torch.as_tensor])
@pytest.mark.parametrize("policy_class", [MlpLstmPolicy, NeurocoderCnnLstmPolicy])
def test_a_time_limit_is_valued_by_what_was_cut_off(policy_class: type, returned: Any) -> None:
    """In whatever type the environment returns it: SB3 turns all other observations into that of
    the space."""
    env = make_env(image=issubclass(policy_class, CnnLstmPolicy))
    assert env.terminal_observations is not None
    terminals = env.terminal_observations
    policy = make_policy(policy_class, env)
    env.terminal_observations = np.empty(terminals.shape[:2], dtype=object)
    for where in np.ndindex(*terminals.shape[:2]):
        env.terminal_observations[where] = returned(terminals[where])
    (rollout,), *_ = collect(env, policy, [LENGTH])
    state = policy.initial_state(ENVS)
    expected = torch.zeros(LENGTH, ENVS)
    never = torch.zeros(ENVS, dtype=torch.bool)
    with torch.no_grad():
        for t in range(LENGTH):
            start = rollout.episode_start[t]
            _, state = policy.unroll(rollout.obs[t : t + 1], state, start[None])
            terminal = torch.from_numpy(terminals[t])
            values = policy.predict_values(terminal, state, never).squeeze(-1)
            expected[t] = torch.where(torch.from_numpy(DONES[t] == 2), values, 0.0)
    assert (expected != 0).sum() == 3
    torch.testing.assert_close(rollout.truncation_value, expected, rtol=1e-4, atol=1e-5)


def test_actions_are_clipped_for_the_environment_only() -> None:
    space = spaces.Box(-0.1, 0.1, (2,), np.float32)
    env = make_env(action_space=space)
    policy = make_policy(MlpLstmPolicy, env)
    (rollout,), *_ = collect(env, policy, [LENGTH])
    played = np.stack(env.actions)
    assert (rollout.actions.abs() > 0.1).any()
    np.testing.assert_array_equal(played, rollout.actions.numpy().clip(-0.1, np.float32(0.1)))
    with torch.no_grad():
        evaluation = policy.evaluate_rollout(
            rollout.obs, rollout.actions, (rollout.lstm_h, rollout.lstm_c), rollout.episode_start
        )
    torch.testing.assert_close(rollout.log_prob, evaluation.log_prob, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "space",
    [spaces.MultiBinary(3), *(spaces.Box(-1, 1, (2,), f"float{bits}") for bits in (16, 64))],  # type: ignore[arg-type]
)
def test_actions_have_the_type_of_their_space(space: spaces.Space) -> None:
    """Policies draw them all as floating-point numbers of single precision."""
    env = make_env(action_space=space)
    collect(env, make_policy(MlpLstmPolicy, env), [4])
    assert {actions.dtype for actions in env.actions} == {space.dtype}


def test_an_error_of_the_policy_itself_is_not_taken_for_divergence() -> None:
    env = make_env()
    policy = make_policy(MlpLstmPolicy, env)

    def refuse(*_: Any) -> Any:
        raise ValueError("my extractor expects 3 channels")

    policy.features_extractor.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="my extractor") as raised:
        collect(env, policy, [4])
    assert not isinstance(raised.value, NonFiniteError)


def test_returning_false_ends_the_rollout_early() -> None:
    env = make_env()
    policy = make_policy(MlpLstmPolicy, env)
    collector = Collector(env, policy, env.reset())
    rollout = allocate(env, policy, 6)
    assert not collector.collect(rollout, 6, lambda outcome: outcome.row < 2)
    assert len(env.actions) == 3
    np.testing.assert_array_equal(collector.obs, env.observations[3])
    assert not rollout.rewards[:3].isnan().any() and rollout.rewards[3:].isnan().all()


BAD: dict[str, tuple[Any, str]] = {
    "reward": (
        lambda env, value: env.rewards.__setitem__((2, 1), value),
        r"1 .*reward {} at step 2",
    ),
    "observation": (  # what timestep 2 leads to
        lambda env, value: env.observations.__setitem__((3, 1, 2), value),
        r"1 .*observation {} at step 2",
    ),
    "first observation": (  # it would stay in the LSTM for a whole episode
        lambda env, value: env.observations.__setitem__((0, 2, 1), value),
        r"2 .*observation {} at step 0",
    ),
    "behind a time limit": (  # its value goes into the return
        lambda env, value: env.terminal_observations.__setitem__((2, 1, 0), value),
        r"1 .*observation {} at step 2",
    ),
    "reward in float64": (  # rollouts hold float32
        lambda env, value: setattr(env, "rewards", np.full((LENGTH, ENVS), 1e39)),
        r"0 .*reward inf at step 0",
    ),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_f18_what_is_not_finite_is_refused_by_name(spoil: Any, message: str, value: float) -> None:
    env = make_env()
    spoil(env, value)
    with pytest.raises(ValueError, match="environment " + message.format(value)):
        collect(env, make_policy(MlpLstmPolicy, env), [5])


DICT = spaces.Dict(
    {
        "speed": spaces.Box(-1, 1, (2,), np.float32),
        "image": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    }
)


def make_dict_collector(obs: dict[str, np.ndarray]) -> Collector:
    """Before the first timestep of two environments, which are never asked."""
    policy = MultiInputLstmPolicy(DICT, spaces.Discrete(2), lambda _: 0.0, lstm_hidden_size=WIDTH)
    nothing: Any = SimpleNamespace(num_envs=2)
    return Collector(nothing, policy, obs)


def test_f18_the_entry_of_an_observation_that_is_not_finite_is_named() -> None:
    DICT.seed(0)
    one, other = DICT.sample(), DICT.sample()
    other["speed"][1] = np.nan
    collector = make_dict_collector({name: np.stack([one[name], other[name]]) for name in DICT})
    rollout = RolloutShape(3, 2, DICT, spaces.Discrete(2), 1, WIDTH).allocate()
    with pytest.raises(ValueError, match=r"environment 1 returned observation 'speed' nan at step"):
        collector.collect(rollout, 3, lambda outcome: True)


def test_entries_that_were_cut_off_may_have_any_type() -> None:
    """As those of other observations may, which SB3 turns into that of the space."""
    DICT.seed(1)
    terminal = DICT.sample()
    collector = make_dict_collector({})
    with torch.no_grad():
        expected = collector._value_after(terminal, 1)
        for loose in (np.float64, np.ndarray.tolist):
            strange = {name: loose(entry) for name, entry in terminal.items()}
            assert torch.equal(collector._value_after(strange, 1), expected)
