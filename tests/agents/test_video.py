"""Videos: what is on a picture, and whether the files can be read back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from gymnasium import spaces

from ncrl.agents import A3C
from ncrl.agents.atari import evaluate
from ncrl.agents.atari.evaluate import play, visit_rooms
from ncrl.agents.atari.video import (
    ACCENT,
    ACTIONS,
    BAR,
    BONUS,
    FPS,
    GAME,
    HEADS,
    HEIGHT,
    HISTORY,
    MIN_SPREAD,
    WIDTH,
    Box,
    Moment,
    Trace,
    check_path,
    compose,
    game_box,
    remember,
    view_heads,
    write_video,
)
from ncrl.envs import AtariFactory, AtariPlayer, atari
from ncrl.sb3 import CnnLstmPolicy, Latent, LstmPolicy, NeurocoderCnnLstmPolicy
from ncrl.shell.screen import Screen
from tests.agents.conftest import file_size_limit

SLOTS, COMPONENTS, ACTION_NAMES = 12, 6, ("NOOP", "FIRE", "UP", "DOWNRIGHTFIRE")
SPACE = spaces.Box(0, 255, (1, 84, 84), np.uint8)


def attention(seed: int) -> np.ndarray:
    """Gated weights, so that rows do not sum to 1: [R, P]."""
    return np.random.default_rng(seed).uniform(0.01, 0.06, (COMPONENTS, SLOTS))


def moment(seed: int = 0, *, coded: bool = True, action: str = "FIRE") -> Moment:
    rng = np.random.default_rng(seed)
    return Moment(
        frame=rng.integers(0, 256, (210, 160, 3), np.uint8),
        score=400,
        timestep=seed,
        action=action,
        value=0.25,
        probabilities=np.array([0.1, 0.2, 0.3, 0.4]),
        action_names=ACTION_NAMES,
        heads={name: attention(seed) if coded else None for name in ("actor", "critic")},
    )


def traces(*seeds: int) -> dict[str, Trace]:
    trace = None
    for seed in seeds:
        trace = remember(trace, attention(seed))
    assert trace is not None
    return {"actor": trace, "critic": trace}


def cut(picture: np.ndarray, box: Box) -> np.ndarray:
    return picture[box.top : box.bottom, box.left : box.right]


def policy(kind: type[LstmPolicy], **options: Any) -> LstmPolicy:
    torch.manual_seed(0)
    return kind(SPACE, spaces.Discrete(4), lambda _: 1e-3, lstm_hidden_size=16, **options)


HEAD_KWARGS = {"num_slots": SLOTS, "num_heads": 3, "num_steps": 2, "num_least_used": 2}


# Heads


@pytest.mark.parametrize("net_arch", [None, {"pi": [8], "vf": [10]}])
def test_heads_show_the_attention_behind_the_outputs(net_arch):
    coded = policy(NeurocoderCnnLstmPolicy, head_kwargs=HEAD_KWARGS, net_arch=net_arch)
    x = torch.randn(1, 16)
    seen = view_heads(coded, Latent(x, x))
    for name, head, read in (
        ("actor", coded.action_net, coded.mlp_extractor.forward_actor(x)),
        ("critic", coded.value_net, coded.mlp_extractor.forward_critic(x)),
    ):
        expected = head.attend(read).u[0]
        assert seen[name].shape == (COMPONENTS, SLOTS)
        np.testing.assert_array_equal(seen[name], expected.detach().numpy())
    assert not np.array_equal(seen["actor"], seen["critic"])


def test_plain_heads_have_no_attention():
    heads = view_heads(policy(CnnLstmPolicy), Latent(*torch.randn(2, 1, 16)))
    assert heads == {"actor": None, "critic": None}


# Memory of the picture


def test_a_trace_holds_deviations_from_uniform_weights():
    left = np.array([[0.1, 0.1, 0.2, 0.4], [0.01, 0.05, 0.01, 0.01]])  # means 0.2 and 0.02
    trace = remember(None, left)
    expected = np.array([[-0.5, -0.5, 0, 1], [-0.5, 1.5, -0.5, -0.5]])
    np.testing.assert_allclose(trace.weights, expected, atol=1e-12)
    np.testing.assert_allclose(trace.slot_use, [[-0.5, 0.5, -0.25, 0.25]], atol=1e-12)
    assert trace.spread == pytest.approx(1.5)


def test_uniform_attention_does_not_show_rounding_errors():
    weights = np.full((COMPONENTS, SLOTS), 1 / SLOTS, np.float32)
    weights[0, 0] *= 1 + 1e-6
    assert remember(None, weights).spread == MIN_SPREAD


def test_the_scale_never_shrinks_and_the_history_is_limited():
    trace, spreads = None, []
    for seed in range(HISTORY + 5):
        trace = remember(trace, attention(seed))
        spreads.append(remember(None, attention(seed)).spread)
        assert trace.spread == max(spreads)
    assert trace.slot_use.shape == (HISTORY, SLOTS)
    newest = remember(None, attention(HISTORY + 4))
    oldest = remember(None, attention(5))
    np.testing.assert_array_equal(trace.slot_use[-1:], newest.slot_use)
    np.testing.assert_array_equal(trace.slot_use[:1], oldest.slot_use)


# Picture


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (210, 160, Box(16, 85, 480, 630)),
        (250, 160, Box(16, 25, 480, 750)),
        (84, 84, Box(46, 190, 420, 420)),
        (960, 960, Box(16, 160, 480, 480)),
    ],
)
def test_the_game_is_as_large_as_it_fits(height, width, expected):
    box = game_box(np.zeros((height, width, 3), np.uint8))
    assert box == expected
    assert box.left >= GAME.left and box.right <= GAME.right
    assert box.top >= GAME.top and box.bottom <= GAME.bottom


def test_the_game_is_on_the_picture_pixel_by_pixel():
    shown = moment()
    picture = compose(shown, traces(0))
    assert (picture.shape, picture.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    expected = shown.frame.repeat(3, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(cut(picture, game_box(shown.frame)), expected)


def test_a_head_is_drawn_in_its_own_box_from_its_own_attention():
    before = compose(moment(), traces(0))
    after = compose(moment(), traces(0) | {"critic": traces(0, 1)["critic"]})
    assert (cut(before, HEADS[1]) != cut(after, HEADS[1])).any()
    cut(before, HEADS[1])[:] = cut(after, HEADS[1])
    np.testing.assert_array_equal(before, after)


def test_the_most_attended_slot_is_the_brightest_of_each_component():
    weights = np.full((COMPONENTS, SLOTS), 0.05)
    weights[2, 7] = 0.2
    picture = compose(moment(), {name: remember(None, weights) for name in ("actor", "critic")})
    left, top, width, height = HEADS[0].left + 40, HEADS[0].top + 44, 320, 105
    plot = picture[top : top + height, left : left + width].astype(int).sum(axis=2)
    y, x = np.unravel_index(plot.argmax(), plot.shape)
    assert (y * COMPONENTS // height, x * SLOTS // width) == (2, 7)
    assert (plot == plot.max()).sum() == pytest.approx(plot.size / (COMPONENTS * SLOTS), rel=0.1)


def test_the_action_taken_stands_out():
    one, other = (compose(moment(action=action), traces(0)) for action in ("NOOP", "DOWNRIGHTFIRE"))
    rows = np.flatnonzero((cut(one, ACTIONS) != cut(other, ACTIONS)).any(axis=(1, 2)))
    assert set((rows - 20) // 16) == {0, 3}


@pytest.mark.parametrize("largest", [1.0, 0.06])
@pytest.mark.parametrize("num_actions", [2, 6, 18])
def test_bars_are_as_long_as_the_probabilities_beside_the_largest(num_actions, largest):
    probabilities = np.zeros(num_actions)
    probabilities[-1], probabilities[0] = largest, largest / 2
    names = [f"ACTION{index}" for index in range(num_actions)]
    shown = moment(action=names[0])._replace(action_names=names, probabilities=probabilities)
    picture = compose(shown, traces(0))
    width = (ACTIONS.width + 24) // -(-num_actions // 6) - 24 - 168
    for colour, length in ((BAR, width), (ACCENT, round(width / 2))):
        heights = (cut(picture, ACTIONS)[20:] == colour).all(axis=2).sum(axis=0)
        assert (heights == 10).sum() == length


def test_plain_heads_are_drawn_without_traces():
    picture = compose(moment(coded=False), {})
    coded = compose(moment(), traces(0))
    assert (cut(picture, HEADS[0]) != cut(coded, HEADS[0])).any()
    assert len(np.unique(cut(picture, HEADS[0])[60:].reshape(-1, 3), axis=0)) == 1


def test_the_bonus_is_a_bar_for_every_timestep():
    """Half as high as the plot where it is half of the largest; the latest one stands out."""
    shown = compose(moment(), traces(0), bonuses=[2.0, 0.0, 1.0])
    plain = compose(moment(), traces(0))
    plot = shown[BONUS.top : BONUS.bottom, BONUS.left : BONUS.right]
    changed = (shown != plain).any(axis=2)
    assert not changed[:, BONUS.right + 1 :].any() and not changed[: BONUS.top - 20].any()
    width = BONUS.width // HISTORY
    heights = [
        int((plot[:, BONUS.width - (age + 1) * width] == colour).all(axis=1).sum())
        for age, colour in ((0, ACCENT), (1, BAR), (2, BAR))
    ]
    assert heights == [BONUS.height // 2, 0, BONUS.height]


@pytest.mark.parametrize(("components", "slots"), [(1, 1), (75, 400), (1000, 3)])
def test_any_number_of_slots_and_components_can_be_drawn(components, slots):
    weights = np.random.default_rng(0).uniform(size=(components, slots))
    picture = compose(moment(), {name: remember(None, weights) for name in ("actor", "critic")})
    expected = compose(moment(), traces(0))
    for box in HEADS:  # nothing reaches beyond the heads' boxes
        cut(picture, box)[:] = cut(expected, box)
    np.testing.assert_array_equal(picture, expected)


# Files


def read(path: Path) -> list[np.ndarray]:
    capture, pictures = cv2.VideoCapture(str(path)), []
    while (answer := capture.read())[0]:
        pictures.append(cv2.cvtColor(answer[1], cv2.COLOR_BGR2RGB))
    return pictures


def test_a_video_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "game.mp4"
    path.write_bytes(b"old")

    def until(error: Exception | None) -> Iterator[Moment]:
        yield moment()
        assert path.read_bytes() == b"old"
        if error is not None:
            raise error

    with pytest.raises(KeyError):
        write_video(path, until(KeyError()))
    assert path.read_bytes() == b"old"
    write_video(path, until(None))
    assert len(read(path)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_video_that_does_not_fit_on_the_disk_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"game{suffix}"
    path.write_bytes(b"old")
    noise = np.random.default_rng(0)
    frames = (noise.integers(0, 255, (210, 160, 3), dtype=np.uint8) for _ in range(3))
    with file_size_limit(60_000), pytest.raises(OSError, match="disk full"):
        write_video(path, (moment()._replace(frame=frame) for frame in frames))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".MP4"])
@pytest.mark.parametrize("coded", [True, False])
def test_a_video_can_be_read_back(tmp_path, suffix, coded):
    path = tmp_path / f"game{suffix}"
    shown = moment(coded=coded)._replace(frame=smooth_frame())
    heads = [moment(seed, coded=coded).heads for seed in range(4)]
    write_video(path, (shown._replace(heads=head) for head in heads))
    pictures = read(path)
    assert [picture.shape for picture in pictures] == [(HEIGHT, WIDTH, 3)] * 4
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS) == FPS
    game = cut(pictures[-1], game_box(shown.frame)).astype(int)
    assert np.abs(game - shown.frame.repeat(3, axis=0).repeat(3, axis=1)).mean() < 6
    heads = [cut(picture, HEADS[0]).astype(int) for picture in pictures]
    difference = np.abs(heads[1] - heads[3]).mean()
    assert difference > 4 if coded else difference < 1


def smooth_frame() -> np.ndarray:
    """Red rises to the right, green downwards: a codec hardly changes it."""
    y, x = np.mgrid[0:210, 0:160]
    return np.stack([x, y, np.full_like(x, 90)], axis=2).astype(np.uint8)


def refuse_video(path: Path) -> None:
    write_video(path, [])


@pytest.mark.parametrize("refuse", [check_path, refuse_video])
@pytest.mark.parametrize("name", ["game.avi", "game", "mp4"])
def test_a_wrong_suffix_is_refused(tmp_path, name, refuse: Callable[[Path], object]):
    with pytest.raises(ValueError, match=rf"\.mp4 or \.webm, got .*{name}"):
        refuse(tmp_path / name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("refuse", [check_path, refuse_video])
@pytest.mark.parametrize("name", ["nowhere/game.mp4", "file/game.webm", "folder.mp4"])
def test_a_path_that_cannot_be_written_is_an_error(
    tmp_path, name, refuse: Callable[[Path], object]
):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=name):
        refuse(tmp_path / name)


def test_a_file_that_opencv_cannot_open_is_an_error(tmp_path):
    (tmp_path / "game.mp4").symlink_to(tmp_path / "nowhere" / "game.mp4")
    with pytest.raises(OSError, match=r"OpenCV cannot write .*game\.mp4"):
        refuse_video(tmp_path / "game.mp4")


def test_a_good_path_is_left_alone(tmp_path):
    (tmp_path / "old.webm").write_bytes(b"old")
    for name in ("new.mp4", "old.webm"):
        check_path(tmp_path / name)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_the_lstm_of_a_film_starts_anew_where_training_cut_the_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A life lost with others left does; the last one, where the game goes on, does not."""
    factory = atari("Klax", protocol="classic")
    model = A3C("CnnLstmPolicy", factory, n_workers=0, n_envs=1, seed=0)
    policy, started = model.policy, []
    encode = policy.encode

    def noted(images: Any, state: Any, starts: torch.Tensor) -> Any:
        started.append(starts.tolist())
        return encode(images, state, starts)

    monkeypatch.setattr(policy, "encode", noted)
    player, lives = AtariPlayer(factory, 0), iter([3, 2, 2, 0, 0])
    obs = player.reset()

    def step(_action: int) -> tuple[np.ndarray, int, bool, int]:
        left = next(lives, None)
        return obs, 0, left is None, left or 0

    monkeypatch.setattr(player, "step", step)
    for _ in play(model, player, deterministic=True):
        pass
    assert started == [[True], [False], [True], [False], [False], [False]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_game_is_played_with_its_memory_and_the_actions_that_were_asked_for(
    deterministic: bool,
) -> None:
    factory = atari("Klax", max_frames=40)
    small: Any = {"lstm_hidden_size": 16}
    model = A3C("CnnLstmPolicy", factory, n_workers=0, n_envs=1, seed=0, policy_kwargs=small)
    model.policy.set_training_mode(True)  # as training leaves it
    seen = []
    for decision in play(model, AtariPlayer(factory, 0), deterministic=deterministic):
        assert not model.policy.training
        seen.append(decision)
    starts = torch.zeros(len(seen), 1, dtype=torch.bool)
    starts[0] = True
    images = torch.stack([decision.images for decision in seen])  # [T, 1, ...]
    with torch.no_grad():
        latent, _ = model.policy.unroll(images, model.policy.initial_state(1), starts)
    assert len(seen) == 10
    torch.testing.assert_close(torch.stack([d.latent.actor for d in seen]), latent.actor)
    likeliest = [int(decision.distribution.mode()) for decision in seen]
    assert ([decision.action for decision in seen] == likeliest) == deterministic


def test_each_game_of_rooms_begins_from_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the emulator would draw the same sticky actions in every one."""
    factory = atari("MontezumaRevenge", max_frames=8)
    model = A3C("CnnLstmPolicy", factory, n_workers=0, n_envs=1, seed=0)
    seeds = []

    def noted(factory: AtariFactory, seed: int) -> AtariPlayer:
        seeds.append(seed)
        return AtariPlayer(factory, seed)

    monkeypatch.setattr(evaluate, "AtariPlayer", noted)
    largest = 2**31 - 1
    _, lengths = visit_rooms(model, factory, largest, 3, False, Screen(None))
    assert lengths == [2, 2, 2]
    assert seeds == [largest, 0, 1]
