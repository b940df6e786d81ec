"""`ncrl.envs.player`: one visible game that is the vector environment's game, bit for bit."""

import cv2
import numpy as np
import pytest

from ncrl.envs import AtariPlayer, atari


@pytest.mark.parametrize("game", ["breakout", "seaquest"])
@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "classic", "stack": 4},
        {"protocol": "machado"},
        # a game cut inside a frame skip, and frames that are neither merged nor 84 pixels wide
        {"protocol": "machado", "frame_skip": 3, "stack": 2, "max_frames": 401},
        {"protocol": "classic", "frame_skip": 1, "image_size": 60, "max_frames": 300},
    ],
)
def test_player_equals_the_vector_environment(game, options):
    factory = atari(game, **options)
    env, player = factory(1, 7), AtariPlayer(factory, 7)
    np.testing.assert_array_equal(player.reset(), env.reset())
    rng = np.random.default_rng(0)
    games, lives_before = 0, None
    for _ in range(400):
        action = int(rng.integers(env.action_space.n))
        expected, rewards, _, infos = env.step(np.array([action]))
        observation, reward, game_over, lives = player.step(action)
        assert reward == rewards[0]
        assert game_over == ("episode" in infos[0])
        if game_over:
            terminal = infos[0]["terminal_observation"]
            np.testing.assert_array_equal(observation[0], terminal)
            observation = player.reset()
            lives_before = None
            games += 1
        elif lives_before is not None and options["protocol"] == "classic":
            assert (lives < lives_before) == ("life_lost" in infos[0])
        if not game_over:
            lives_before = lives
        np.testing.assert_array_equal(observation, expected)
    assert games >= 1 or game == "seaquest"


def test_player_draws_the_same_noops_from_every_seed():
    factory = atari("Pong", protocol="classic")
    starts = factory(6, 0).reset()
    for seed in range(6):
        np.testing.assert_array_equal(AtariPlayer(factory, seed).reset()[0], starts[seed])


def test_frame_is_the_screen_of_the_observation():
    player = AtariPlayer(atari("Breakout", frame_skip=1), 0)
    observation = player.reset()
    for _ in range(50):
        frame = player.frame()
        assert (frame.shape, frame.dtype) == ((210, 160, 3), np.uint8)
        grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=3)
        assert np.abs(grey.astype(int) - observation[0, 0]).max() <= 3
        observation = player.step(1)[0]
    assert (frame != player.frame()).any()


def test_observations_and_frames_are_not_overwritten():
    player = AtariPlayer(atari("Breakout", stack=2), 0)
    first, frame = player.reset(), player.frame()
    first_copy, frame_copy = first.copy(), frame.copy()
    for _ in range(20):
        player.step(3)
    np.testing.assert_array_equal(first, first_copy)
    np.testing.assert_array_equal(frame, frame_copy)


def test_the_room_is_known_where_there_are_rooms():
    player = AtariPlayer(atari("MontezumaRevenge"), 0)
    player.reset()
    assert player.room() == 1  # where every game begins
    with pytest.raises(ValueError, match="pong has no rooms"):
        AtariPlayer(atari("Pong"), 0).room()


def test_wrong_use_is_refused():
    player = AtariPlayer(atari("Pong", max_frames=8), 0)
    with pytest.raises(RuntimeError, match="reset"):
        player.step(0)
    player.reset()
    for action in (-1, 18):
        with pytest.raises(ValueError, match="0 to 17"):
            player.step(action)
    assert player.step(0)[2] is False
    assert player.step(0)[2] is True
    with pytest.raises(RuntimeError, match="reset"):
        player.step(0)
