"""`ncrl.envs.atari`: names, protocols, seeds, scores of whole games, what SB3 asks of a VecEnv."""

import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

from ncrl.envs import AtariFactory, AtariVecEnv, atari, game_name

# Random play loses a game of Asterix (three lives, rewards of 50 and more) in about 200 timesteps.
QUICK = "asterix"


def random_actions(env):
    """Gives random actions, the same ones each time it is made."""
    rng = np.random.default_rng(0)
    return lambda: rng.integers(env.action_space.n, size=env.num_envs)


def play(env, n_steps, action_seed=0):
    """Plays random actions, the same for every game; observations [n_steps + 1, n_envs, ...]."""
    rng = np.random.default_rng(action_seed)
    observations = [env.reset()]
    for _ in range(n_steps):
        action = rng.integers(env.action_space.n)
        observations.append(env.step(np.full(env.num_envs, action))[0])
    return np.stack(observations)


@pytest.mark.parametrize(
    ("name", "rom"),
    [
        ("MontezumaRevenge", "montezuma_revenge"),
        ("montezuma_revenge", "montezuma_revenge"),
        ("ALE/MontezumaRevenge-v5", "montezuma_revenge"),
        ("MontezumaRevengeNoFrameskip-v4", "montezuma_revenge"),
        ("PongDeterministic-v0", "pong"),
        ("Pong-v4", "pong"),
        ("pong", "pong"),
        ("video_pinball", "video_pinball"),
        ("TicTacToe3D", "tic_tac_toe_3d"),
    ],
)
def test_every_usual_form_of_a_name_gives_the_rom_name(name, rom):
    assert game_name(name) == rom
    assert atari(name).game == rom


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("MontezumaRevenge2", "MontezumaRevenge"), ("ALE/Pongg-v5", "Pong"), ("xx", "Zaxxon")],
)
def test_unknown_game_names_the_value_and_the_nearest_in_one_line(name, nearest):
    with pytest.raises(ValueError, match=nearest) as error:
        atari(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rom", ["combat", "joust", "MazeCraze", "ALE/Warlords-v5"])
def test_games_for_two_that_would_end_the_process_are_unknown(rom):
    with pytest.raises(ValueError, match="unknown Atari game"):
        game_name(rom)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "machad"}, "'machad'.*'machado'"),
        ({"protocol": "clasic"}, "'clasic'.*'classic'"),
        ({"stack": 0}, "stack .* got 0"),
        ({"frame_skip": 1.5}, "frame_skip .* got 1.5"),
        ({"image_size": "84"}, "image_size .* got '84'"),
        ({"max_frames": True}, "max_frames .* got True"),
    ],
)
def test_unusable_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        atari("Pong", **options)


def test_options_may_be_integers_of_numpy():
    factory = atari("Pong", stack=np.int64(4), image_size=np.int32(64))
    assert factory == atari("Pong", stack=4, image_size=64)
    assert {type(value) for value in (factory.stack, factory.image_size)} == {int}


def test_factory_is_frozen_and_survives_pickling():
    factory = atari("Breakout", protocol="classic", stack=2)
    copy = pickle.loads(pickle.dumps(factory))
    assert copy == factory
    assert isinstance(copy, AtariFactory)
    np.testing.assert_array_equal(play(copy(2, 5), 20), play(factory(2, 5), 20))
    with pytest.raises(FrozenInstanceError):
        factory.stack = 4


@pytest.mark.parametrize(("protocol", "n_actions"), [("machado", 18), ("classic", 4)])
def test_action_set_of_the_protocol(protocol, n_actions):
    factory = atari("Breakout", protocol=protocol)
    env = factory(1, 0)
    assert factory.action_space.n == env.action_space.n == n_actions
    assert len(factory.action_meanings) == n_actions
    assert factory.action_meanings[:2] == ("NOOP", "FIRE")


def test_describe_names_the_protocol():
    machado = atari("Pong").describe()
    assert machado["game"] == "pong"
    assert machado["sticky_actions"] == 0.25
    assert machado["action_set"] == "all 18"
    assert machado["no_ops"] == "none"
    classic = atari("Pong", protocol="classic", stack=4).describe()
    assert classic["sticky_actions"] == 0
    assert classic["stack"] == 4
    assert classic["no_ops"] == "0 to 30"
    assert classic["life_loss"] == "ends the return, not the game"


@pytest.mark.parametrize("stack", [1, 4])
def test_shapes_and_types(stack):
    factory = atari("Pong", stack=stack, image_size=42)
    env = factory(3, 0)
    observations = env.reset()
    assert env.observation_space == factory.observation_space
    for _ in range(2):
        assert observations.shape == (3, stack, 42, 42)
        assert observations.dtype == np.uint8
        observations, rewards, dones, infos = env.step(np.zeros(3, np.int64))
        assert (rewards.shape, rewards.dtype) == ((3,), np.float32)
        assert (dones.shape, dones.dtype) == ((3,), np.bool_)
        assert infos == [{}, {}, {}]
        infos[0]["mine"] = 1  # callers write into infos: rows must not share a dict


def test_same_seed_same_run_other_seed_other_run():
    factory = atari("Breakout")
    first = play(factory(3, 1), 200)
    np.testing.assert_array_equal(first, play(factory(3, 1), 200))
    # game i plays from seed + i
    np.testing.assert_array_equal(first[:, 2:], play(factory(1, 3), 200))
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (first[:, a] != first[:, b]).any()


def test_reset_continues_the_generators_and_seed_rewinds_them():
    env = atari("Breakout")(2, 1)
    first, second = play(env, 100), play(env, 100)
    assert (first != second).any()
    assert env.seed(1) == [1, 2]
    np.testing.assert_array_equal(play(env, 100), first)
    np.testing.assert_array_equal(play(env, 100), second)


def test_any_integer_is_a_seed():
    factory = atari("Breakout")
    expected = play(factory(1, 5), 40)
    for seed in (np.int64(5), np.uint32(5), 5 + 2**31, 5 - 2**31):
        np.testing.assert_array_equal(play(factory(1, seed), 40), expected)


def test_machado_actions_are_sticky():
    runs = play(atari("Pong")(2, 0), 60)
    np.testing.assert_array_equal(runs[0, 0], runs[0, 1])  # no no-ops: all games start equal
    assert (runs[:, 0] != runs[:, 1]).any()


def test_classic_is_deterministic_after_equal_starts():
    env = atari("Pong", protocol="classic")(12, 0)
    runs = play(env, 60)
    starts = [info["episode_frame_number"] for info in env.reset_infos]
    assert len(set(starts)) > 8  # no-ops are drawn from 0 to 30
    rows: dict[int, int] = {}
    for i, start in enumerate(starts):
        np.testing.assert_array_equal(runs[:, i], runs[:, rows.setdefault(start, i)])
    assert len(rows) < 12  # or no two starts were compared


@pytest.mark.parametrize("protocol", ["machado", "classic"])
def test_score_is_the_raw_sum_over_whole_games(protocol):
    env = atari(QUICK, protocol=protocol)(2, 0)
    act = random_actions(env)
    env.reset()
    scores, lengths, lives_lost = np.zeros(2), np.zeros(2, int), np.zeros(2, int)
    games = []
    for _ in range(500):
        _, rewards, dones, infos = env.step(act())
        assert (rewards == rewards.round()).all()
        scores += rewards
        lengths += 1
        for i, info in enumerate(infos):
            assert dones[i] == bool(info)
            if "episode" in info:
                assert info["episode"]["r"] == scores[i]
                assert info["episode"]["l"] == lengths[i]
                assert info["TimeLimit.truncated"] is False
                games.append((scores[i], lives_lost[i]))
                scores[i] = lengths[i] = lives_lost[i] = 0
            elif info:
                assert info == {"life_lost": True}
                lives_lost[i] += 1
    assert len(games) >= 3
    assert max(score for score, _ in games) >= 100  # clipped rewards could not reach it
    # the last of the three lives ends the game
    assert {lost for _, lost in games} == ({2} if protocol == "classic" else {0})


def test_a_reset_in_the_middle_of_a_game_begins_its_score_anew():
    env = atari(QUICK)(1, 0)
    act = random_actions(env)
    env.reset()
    before = sum(env.step(act())[1].item() for _ in range(100))
    assert before > 0
    env.reset()
    score, length, info = 0.0, 0, {}
    while "episode" not in info:
        _, rewards, _, (info,) = env.step(act())
        score, length = score + rewards.item(), length + 1
    assert (info["episode"]["r"], info["episode"]["l"]) == (score, length)


def test_lost_life_goes_on_without_a_reset():
    env = atari(QUICK, protocol="classic", stack=4)(1, 0)
    act = random_actions(env)
    before = env.reset()
    for _ in range(400):
        after, _, _, infos = env.step(act())
        if "life_lost" in infos[0]:
            break
        before = after
    else:
        pytest.fail("no life was lost")
    np.testing.assert_array_equal(after[0, :3], before[0, 1:])  # the stack was not cleared


def test_which_drops_in_lives_end_the_return(monkeypatch):
    """A life lost; the last one lost before the game is over; a game with bonus lives, cut."""
    env = atari(QUICK, protocol="classic")(3, 0)
    env.reset()
    observations, no = np.zeros((3, 1, 84, 84), np.uint8), np.zeros(3, bool)
    cut = np.array([False, False, True])

    def step(lives, truncated):
        info = {"lives": np.array(lives), "final_obs": observations}
        received = (observations, np.zeros(3, np.int32), no, truncated, info)
        monkeypatch.setattr(env._games, "recv", lambda: received)
        return env.step(np.zeros(3, np.int64))

    monkeypatch.setattr(env._games, "send", lambda _: None)
    step([3, 1, 4], no)
    _, _, dones, infos = step([2, 0, 3], cut)  # the third row already counts the next game's
    assert dones.tolist() == [True, False, True]
    assert infos[:2] == [{"life_lost": True}, {}]
    assert infos[2]["TimeLimit.truncated"] is True
    assert "life_lost" not in infos[2]
    _, _, dones, infos = step([2, 0, 2], no)
    assert dones.tolist() == [False, False, True]
    assert infos == [{}, {}, {"life_lost": True}]


def test_a_reset_forgets_the_lives_of_the_game_before(monkeypatch):
    """It had bonus lives, more than the three that a new game begins with."""
    env = atari(QUICK, protocol="classic")(1, 0)
    before, no = env.reset(), np.zeros(1, bool)
    with monkeypatch.context() as patch:
        patch.setattr(env._games, "send", lambda _: None)
        received = (before, np.zeros(1, np.int32), no, no, {"lives": np.array([5])})
        patch.setattr(env._games, "recv", lambda: received)
        env.step(np.zeros(1, np.int64))
    env.reset()
    _, _, dones, infos = env.step(np.zeros(1, np.int64))
    assert not dones.any()
    assert infos == [{}]


def test_truncation_reports_the_last_frame_of_the_old_game():
    env = atari("Pong", stack=4, max_frames=80)(2, 0)
    before = env.reset()
    actions = np.zeros(2, np.int64)
    for timestep in range(1, 41):
        after, _, dones, infos = env.step(actions)
        assert dones.all() == dones.any() == (timestep % 20 == 0)
        for i in range(2):
            if dones[i]:
                terminal = infos[i]["terminal_observation"]
                assert infos[i]["TimeLimit.truncated"] is True
                assert infos[i]["episode"]["l"] == 20
                np.testing.assert_array_equal(terminal[:3], before[i, 1:])
                assert terminal[0].any()
                assert not after[i, :3].any()  # the new game: zeros before its first frame
                assert after[i, 3].any()
        before = after


def test_a_game_that_is_over_at_the_time_limit_was_not_cut(monkeypatch):
    env = atari("Pong")(2, 0)
    env.reset()
    observations, both = np.zeros((2, 1, 84, 84), np.uint8), np.ones(2, bool)
    over, info = np.array([True, False]), {"lives": np.zeros(2), "final_obs": observations}
    monkeypatch.setattr(env._games, "send", lambda _: None)
    received = (observations, np.zeros(2, np.int32), over, both, info)
    monkeypatch.setattr(env._games, "recv", lambda: received)
    _, _, dones, infos = env.step(np.zeros(2, np.int64))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, True]


@pytest.mark.parametrize(
    "actions", [[0, 18], [-1, 0], [0], [[0], [0]], [0.0, 1.0], [np.nan, 0], [True, False]]
)
def test_unusable_actions_raise_before_they_reach_the_emulator(actions, monkeypatch):
    env = atari("Pong")(2, 0)
    env.reset()
    with monkeypatch.context() as patch:  # an action out of range would hang the process there
        patch.setattr(env._games, "send", lambda _: pytest.fail("sent to the emulator"))
        with pytest.raises(ValueError, match="expected"):
            env.step(np.array(actions))
    env.step(np.array([0, 17], np.int32))


def test_number_of_environments_is_checked():
    with pytest.raises(ValueError, match="n_envs"):
        atari("Pong")(0, 0)


def test_reset_drops_a_step_in_flight():
    factory = atari("Breakout")
    env = factory(2, 3)
    env.reset()
    env.step_async(np.ones(2, np.int64))
    env.seed(3)
    np.testing.assert_array_equal(play(env, 30), play(factory(2, 3), 30))


def test_ctrl_c_while_the_emulator_plays_loses_one_step_alone(monkeypatch):
    """As in a notebook, where another call follows. Python raises it when ale-py returns."""
    env = atari("Breakout")(2, 3)
    env.reset()
    receive = env._games.recv

    def interrupted():
        receive()
        raise KeyboardInterrupt

    monkeypatch.setattr(env._games, "recv", interrupted)
    env.step_async(np.ones(2, np.int64))
    with pytest.raises(KeyboardInterrupt):
        env.step_wait()
    monkeypatch.setattr(env._games, "recv", receive)
    env.step(np.ones(2, np.int64))
    env.seed(3)
    np.testing.assert_array_equal(play(env, 30), play(atari("Breakout")(2, 3), 30))


def test_steps_begin_and_end_in_turn():
    env = atari("Pong")(1, 0)
    env.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        env.step_wait()
    env.step_async(np.array([0]))
    with pytest.raises(RuntimeError, match="step_wait"):
        env.step_async(np.array([0]))
    env.step_wait()


def test_attributes_for_sb3():
    env = atari("Pong")(2, 0)
    assert env.env_is_wrapped(Monitor) == env.env_is_wrapped(VecMonitor) == [True, True]
    assert env.env_is_wrapped(VecNormalize, indices=0) == [False]
    assert env.get_attr("render_mode") == [None, None]
    assert env.get_attr("factory", indices=[1]) == [env.factory]
    assert env.get_images() == [None, None]
    assert not env.has_attr("no_such_attribute")
    env.set_attr("note", 3)
    assert env.get_attr("note") == [3, 3]
    with pytest.raises(ValueError, match="indices"):
        env.set_attr("note", 4, indices=0)
    with pytest.raises(AttributeError, match="render"):
        env.env_method("render")
    env.close()
    env.close()


def test_a2c_trains_and_eval_callback_evaluates():
    factory = atari("Pong", max_frames=400)
    model = A2C("CnnPolicy", factory(2, 0), seed=0)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    evaluation = EvalCallback(factory(1, 9), n_eval_episodes=1, eval_freq=5, verbose=0)
    model.learn(20, callback=evaluation)
    assert model.num_timesteps == 20
    after = list(model.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert evaluation.n_calls == 10
    assert -21 <= evaluation.last_mean_reward <= 0  # infinite before the first evaluation


def test_sb3_wrappers_stack_it():
    stacked = VecFrameStack(atari("Pong")(2, 0), 4)
    observations = play(stacked, 10)
    expected = play(atari("Pong", stack=4)(2, 0), 10)
    assert isinstance(stacked.unwrapped, AtariVecEnv)
    np.testing.assert_array_equal(observations, expected)
