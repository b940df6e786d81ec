"""`ncrl.envs.small`: exact seeds, rewards that mean what they say, how much is hidden."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecMonitor, is_vecenv_wrapped

from ncrl.envs import GymFactory, key_and_door, light, masked_cartpole, remember
from ncrl.envs.small import KeyAndDoor

FACTORIES = [masked_cartpole(), remember(delay=3, n_cues=3), light(max_steps=10)]


def play(env, n_steps):
    """Random actions: observations [n_steps + 1, n_envs, ...] and rewards [n_steps, n_envs]."""
    rng = np.random.default_rng(0)
    observations, rewards = [env.reset()], []
    for _ in range(n_steps):
        observation, reward, *_ = env.step(rng.integers(env.action_space.n, size=env.num_envs))
        observations.append(observation)
        rewards.append(reward)
    return np.stack(observations), np.stack(rewards)


def play_with(env, policy, n_episodes):
    """Infos of the first `n_episodes` finished episodes of one environment under a policy."""
    observation, finished = env.reset(), []
    while len(finished) < n_episodes:
        observation, _, dones, infos = env.step(np.array([policy(observation[0])]))
        finished += [infos[0]] if dones[0] else []
    return finished


@pytest.mark.parametrize("factory", FACTORIES)
def test_seeds_are_exact_and_factories_pickle(factory):
    copy = pickle.loads(pickle.dumps(factory))
    observations, rewards = play(factory(3, 1), 60)
    again, rewards_again = play(copy(3, 1), 60)
    np.testing.assert_array_equal(observations, again)
    np.testing.assert_array_equal(rewards, rewards_again)
    assert (observations != play(factory(3, 11), 60)[0]).any()
    assert (observations[:, 0] != observations[:, 1]).any()


@pytest.mark.parametrize("factory", FACTORIES)
def test_spaces_hold_what_is_observed_and_episodes_are_monitored(factory):
    env = factory(2, 0)
    assert env.observation_space == factory.observation_space
    assert env.action_space == factory.action_space
    assert is_vecenv_wrapped(env, VecMonitor)
    for observation in play(env, 30)[0][:, 0]:
        assert env.observation_space.contains(observation)
    with pytest.raises(ValueError, match="n_envs"):
        factory(0, 0)


def test_an_id_is_no_function_that_builds_an_environment():
    with pytest.raises(ValueError, match=r"'CartPole-v1'.*functools\.partial"):
        GymFactory("CartPole-v1")


def test_masked_cartpole_shows_position_and_angle_only():
    env, full = masked_cartpole()(1, 5), gym.make("CartPole-v1")
    observation, expected = env.reset(), full.reset(seed=5)[0]
    for action in [0, 1, 1, 0, 1]:
        assert observation.shape == (1, 2)
        assert env.observation_space.high.tolist() == full.observation_space.high[[0, 2]].tolist()
        np.testing.assert_array_equal(observation[0], expected[[0, 2]])
        observation, expected = env.step(np.array([action]))[0], full.step(action)[0]


def test_masked_cartpole_is_truncated_at_max_steps():
    (info,) = play_with(masked_cartpole(max_steps=5)(1, 0), lambda _: 0, 1)
    assert info["TimeLimit.truncated"] is True
    assert (info["episode"]["r"], info["episode"]["l"]) == (5, 5)
    (info,) = play_with(masked_cartpole()(1, 0), lambda _: 0, 1)
    assert info["TimeLimit.truncated"] is False
    assert 5 < info["episode"]["l"] < 20


@pytest.mark.parametrize("delay", [1, 4])
def test_remember_rewards_the_cue_alone(delay):
    class Memory:
        """Answers with the cue last seen, plus an offset."""

        def __init__(self, offset):
            self.offset, self.cue = offset, 0

        def __call__(self, observation):
            if observation[:3].any():
                self.cue = int(observation[:3].argmax())
            return (self.cue + self.offset) % 3 if observation[3] else 0

    for offset, score in [(0, 1), (1, 0), (2, 0)]:
        infos = play_with(remember(delay=delay, n_cues=3)(1, 0), Memory(offset), 10)
        assert [info["episode"]["r"] for info in infos] == [score] * 10
        assert {info["episode"]["l"] for info in infos} == {delay + 1}


def test_remember_shows_the_cue_once_and_asks_once():
    observations = play(remember(delay=3, n_cues=2)(1, 0), 7)[0][:, 0]  # two episodes of 4
    np.testing.assert_array_equal(observations[:, :2].sum(1), [1, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(observations[:, 2], [0, 0, 0, 1, 0, 0, 0, 1])


def walk(env, actions):
    """Observations [n + 1, ...], rewards and infos of one environment; 0 is left, 1 is right."""
    observations, rewards, infos = [env.reset()[0]], [], []
    for action in actions:
        observation, reward, _, info = env.step(np.array([action]))
        observations.append(observation[0])
        rewards.append(reward[0])
        infos.append(info[0])
    return np.stack(observations), rewards, infos


def test_the_key_then_the_door_is_rewarded_and_ends_the_episode():
    """Length 5: two steps to the key, four to the last cell, and one through the door."""
    env = key_and_door(length=5, max_steps=9)(1, 0)
    observations, rewards, infos = walk(env, [0, 0, 1, 1, 1, 1, 1])
    assert rewards == [0] * 6 + [1]
    assert (infos[-1]["episode"]["r"], infos[-1]["episode"]["l"]) == (1, 7)
    assert infos[-1]["TimeLimit.truncated"] is False
    assert observations[:-1, :5].argmax(1).tolist() == [2, 1, 0, 1, 2, 3, 4]
    assert observations[:, 5].tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(observations[-1], observations[0])  # the next begins
    assert env.observation_space.contains(observations[-1])


def test_the_door_is_closed_without_the_key_and_time_runs_out():
    env = key_and_door(length=5, max_steps=9)(1, 0)
    observations, rewards, infos = walk(env, [1] * 9)
    assert rewards == [0] * 9
    assert observations[:-1, :5].argmax(1).tolist() == [2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert infos[-1]["TimeLimit.truncated"] is True
    rewards = walk(env, [0] * 8)[1]  # nor is the key itself rewarded
    assert rewards == [0] * 8


def test_key_and_door_pickles_and_plays_many():
    factory = key_and_door(length=4)
    env = pickle.loads(pickle.dumps(factory))(3, 7)
    assert is_vecenv_wrapped(env, VecMonitor)
    assert env.observation_space == factory.observation_space
    observations, rewards = play(env, 400)
    assert set(observations.sum(2).flat) == {1, 2} and set(rewards.flat) == {0, 1}


def test_chance_hardly_ever_opens_the_door():
    """The exact probability that a random walk takes the key and the door in time."""
    length, max_steps = 21, 64  # the defaults
    assert key_and_door().make.args == (KeyAndDoor, max_steps, length)
    where, opened = {(length // 2, False): 1.0}, 0.0
    for _ in range(max_steps):
        following: dict[tuple[int, bool], float] = {}
        for (cell, key), p in where.items():
            for step in (-1, 1):
                if key and cell + step == length:
                    opened += p / 2
                    continue
                new = min(max(cell + step, 0), length - 1)
                place = new, key or new == 0
                following[place] = following.get(place, 0) + p / 2
        where = following
    assert 0.5e-4 < opened < 2e-4


def test_light_rewards_naming_the_lit_stripe():
    def name(offset):
        return lambda image: (int(image[0, 0].argmax()) // (84 // 3) + offset) % 3

    factory = light(n_actions=3, max_steps=20)
    (right,) = play_with(factory(1, 0), name(0), 1)
    (wrong,) = play_with(factory(1, 0), name(1), 1)
    assert (right["episode"]["r"], wrong["episode"]["r"]) == (20, 0)
    assert right["TimeLimit.truncated"] is True
    assert right["terminal_observation"].shape == (1, 84, 84)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (masked_cartpole, {"max_steps": 0}),
        (remember, {"delay": 0}),
        (remember, {"n_cues": 1.5}),
        (light, {"n_actions": 85}),
        (light, {"max_steps": -1}),
        (key_and_door, {"length": 0}),
        (key_and_door, {"max_steps": 2.5}),
    ],
)
def test_unusable_options_are_refused(make, options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        make(**options)


def test_options_may_be_integers_of_numpy():
    for factory in (masked_cartpole(max_steps=np.int64(3)), light(n_actions=np.int64(2))):
        assert len(play(factory(2, 0), 5)[0]) == 6
