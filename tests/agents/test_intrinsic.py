"""Sources of intrinsic reward against literal readings of their definitions."""

import copy
import io
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ncrl.agents.learning.intrinsic import (
    CLIP,
    RND,
    SND,
    SOURCES,
    IntrinsicReward,
    ObservationView,
    PseudoCount,
    RunningMoments,
    make_source,
    vicreg_loss,
)
from tests.agents.conftest import normal

VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def image(channels: int, size: int = 84) -> spaces.Box:
    return spaces.Box(0, 255, (channels, size, size), np.uint8)


def pictures(count: int, channels: int = 4, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 84, 84), generator=generator).to(torch.uint8)


def reloaded(source: IntrinsicReward, fresh: IntrinsicReward) -> IntrinsicReward:
    """`fresh` in the state of `source`, by way of a file of plain values."""
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


# Statistics.


def test_running_moments_are_those_of_everything_seen() -> None:
    """Batches of different sizes, far from 0, of which one number never varies: within the rounding
    of single precision."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(50, [1e-2, 1, 20], (n, 3)).astype(np.float32) for n in (1, 7, 200, 30)]
    for batch in batches:
        batch[:, 1] = 4.0
    moments = RunningMoments((3,))
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    seen = np.concatenate(batches).astype(np.float64)
    assert moments.count == len(seen)
    np.testing.assert_allclose(moments.mean, seen.mean(0), rtol=1e-7)
    np.testing.assert_allclose(moments.squares / len(seen), seen.var(0), rtol=1e-5, atol=1e-12)


def test_standardised_numbers_are_clipped_and_any_change_of_a_constant_counts() -> None:
    moments = RunningMoments((2,))
    moments.update(torch.tensor([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0]]))  # 2 +- sqrt(8/3), 7 +- 0
    values = torch.tensor([[4.0, 7.0], [99.0, 7.5], [-99.0, 6.5]])
    found = moments.standardise(values)
    expected = torch.tensor([[2 / math.sqrt(8 / 3), 0.0], [CLIP, CLIP], [-CLIP, -CLIP]])
    torch.testing.assert_close(found, expected)


# What is seen of an observation.


@pytest.mark.parametrize("frames", [1, 2, 4, 6])
def test_the_newest_frame_of_a_stack_is_seen(frames: int) -> None:
    obs = pictures(2, frames)
    view = ObservationView(image(frames))
    assert view.shape == (1, 84, 84)
    assert torch.equal(view(obs), obs[:, -1:].float())


def test_three_channels_are_colours() -> None:
    obs = pictures(2, 3)
    view = ObservationView(image(3))
    assert view.shape == (3, 84, 84)
    assert torch.equal(view(obs), obs.float())


@pytest.mark.parametrize(
    ("space", "obs", "expected"),
    [
        (VECTOR, torch.tensor([[1.0, -2, 3]]), [[1, -2, 3]]),
        (spaces.Box(0, 1, (2, 2), np.float32), torch.ones(1, 2, 2), [[1, 1, 1, 1]]),
        (spaces.Discrete(3), torch.tensor([2, 0]), [[0, 0, 1], [1, 0, 0]]),
        (spaces.MultiDiscrete([2, 3]), torch.tensor([[1, 2]]), [[0, 1, 0, 0, 1]]),
        (spaces.MultiBinary(2), torch.tensor([[1, 0]], dtype=torch.int8), [[1, 0]]),
    ],
    ids=["vector", "matrix", "Discrete", "MultiDiscrete", "MultiBinary"],
)
def test_everything_else_is_a_flat_vector(
    space: spaces.Space, obs: Tensor, expected: list[list[float]]
) -> None:
    view = ObservationView(space)
    found = view(obs)
    assert found.tolist() == expected and found.is_floating_point()
    assert view.shape == found.shape[1:]


# Random network distillation.


def trained_on(source: RND, obs: Tensor, steps: int) -> None:
    for _ in range(steps):
        source.learn(obs, obs)


def test_a_repeated_picture_is_no_longer_new_and_an_unseen_one_is() -> None:
    torch.manual_seed(0)
    known, unseen = pictures(1, 1), pictures(1, 1, seed=1)
    source = RND(image(1), learning_rate=1e-3)
    source.watch(torch.cat([pictures(16, 1, seed=2), known]))
    before, other_before = source.score(torch.cat([known, unseen])).tolist()
    trained_on(source, known, 150)  # of a picture alone that is plenty
    after, other_after = source.score(torch.cat([known, unseen])).tolist()
    assert after < 0.1 * before
    assert other_after > 0.2 * other_before


def test_the_score_is_the_mean_squared_error_of_networks_read_literally() -> None:
    """A fixed network of two layers, and one like it with two more that learns its output."""
    torch.manual_seed(0)
    source = RND(VECTOR)
    source.watch(3 * normal(20, 3, seed=1) + 1)
    state = {name: value for name, value in source.state_dict().items() if "state" not in name}
    obs = normal(5, 3)

    def layer(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return torch.stack([(row * x).sum() + b for row, b in zip(weight, bias, strict=True)])

    def network(name: str, x: Tensor) -> Tensor:
        first = layer(f"{name}.0", x)
        return layer(f"{name}.2", torch.where(first > 0, first, 0.01 * first))

    expected = []
    for row in obs:
        x = source.moments.standardise(row)
        learnt = network("predictor", x)
        for index in (4, 6):
            learnt = layer(f"predictor.{index}", learnt.maximum(torch.zeros(())))
        features = network("target", x)
        expected.append(sum((learnt - features).square().tolist()) / len(features))
    assert len([name for name in state if name.endswith("weight")]) == 6
    assert source.score(obs).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("encoder", "maps", "features"), [("a3c", [16, 32], 256), ("nature", [32, 64, 64], 512)]
)
def test_networks_of_pictures_start_orthogonal_in_the_sizes_of_their_encoder(
    encoder: str, maps: list[int], features: int
) -> None:
    source = RND(image(4), encoder=encoder)
    for network in (source.target, source.predictor):
        layers = [part for part in network if isinstance(part, (nn.Conv2d, nn.Linear))]
        widths = [*maps, *[features] * (1 if network is source.target else 3)]
        assert [len(layer.weight) for layer in layers] == widths
        for layer in layers:
            rows = layer.weight.flatten(1)
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), rtol=0, atol=1e-4)
            assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize("name", SOURCES)
def test_scoring_changes_nothing_and_has_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    source = make_source(name, VECTOR)
    obs = normal(20, 3)
    source.watch(obs)
    source.learn(obs[:-1], obs[1:])
    before = copy.deepcopy(source.state_dict())
    random = torch.get_rng_state()
    first = source.score(obs)
    assert torch.equal(first, source.score(obs))
    assert torch.equal(random, torch.get_rng_state())
    assert first.shape == (20,) and not first.requires_grad and bool((first > 0).all())
    after = source.state_dict()
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[key]), key
    # each observation is scored as if it were alone
    torch.testing.assert_close(source.score(obs[3:4]), first[3:4])


def test_sources_by_their_names() -> None:
    kinds = {name: type(make_source(name, VECTOR)) for name in SOURCES}
    assert kinds == {"rnd": RND, "snd": SND, "count": PseudoCount}


@pytest.mark.parametrize("kind", [RND, SND])
def test_only_snd_trains_its_target(kind: type[RND]) -> None:
    torch.manual_seed(0)
    source = kind(VECTOR, learning_rate=1e-2)
    obs = normal(20, 3)
    source.watch(obs)
    target, predictor = (
        [weight.clone() for weight in part.parameters()]
        for part in (source.target, source.predictor)
    )
    trained = {id(weight) for group in source.optimizer.param_groups for weight in group["params"]}
    assert trained.isdisjoint(map(id, source.target.parameters())) == (kind is RND)
    losses = source.learn(obs[:-1], obs[1:])
    assert set(losses) == {"predictor_loss", *(["target_loss"] if kind is SND else [])}
    moved = [not w.equal(v) for w, v in zip(source.target.parameters(), target, strict=True)]
    assert all(moved) if kind is SND else not any(moved)
    for weight, before in zip(source.predictor.parameters(), predictor, strict=True):
        assert not weight.equal(before)


def test_the_predictor_of_snd_does_not_pull_at_its_target() -> None:
    """What the target learns is VICReg's alone: its gradient is that of `vicreg_loss`."""
    torch.manual_seed(0)
    source = SND(VECTOR)
    obs, following = normal(9, 3), normal(9, 3, seed=1)
    source.watch(obs)
    inputs = [source.moments.standardise(source.view(x)) for x in (obs, following)]
    loss = vicreg_loss(*map(source.target, inputs))
    expected = torch.autograd.grad(loss, list(source.target.parameters()))
    source.learn(obs, following)
    for weight, gradient in zip(source.target.parameters(), expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradient)


def test_update_proportion_takes_every_nth_transition_and_begins_at_the_next() -> None:
    """Three in a row of batches of 8 take all of them once; which is seen by what is read."""
    torch.manual_seed(0)
    source = RND(VECTOR, update_proportion=1 / 3)
    rows = []
    view = source.view

    def watched(obs: Tensor) -> Tensor:
        rows.append(obs[:, 0].tolist())
        return view(obs)

    source.view = watched  # type: ignore[assignment]
    obs = torch.arange(24.0).view(8, 3) / 3
    for _ in range(4):
        source.learn(obs, obs.round())
    assert rows == [[0, 3, 6], [1, 4, 7], [2, 5], [0, 3, 6]]


def test_a_batch_smaller_than_the_stride_is_learnt_from_once() -> None:
    torch.manual_seed(0)
    source = RND(VECTOR, update_proportion=0.01)
    for _ in range(8):
        assert torch.isfinite(source.learn(normal(5, 3), normal(5, 3))["predictor_loss"])


@pytest.mark.parametrize(
    ("proportion", "stride"), [(1, 1), (0.6, 2), (0.4, 2), (0.3, 3), (0.1, 10)]
)
def test_the_stride_is_the_nearest_to_the_proportion(proportion: float, stride: int) -> None:
    assert RND(VECTOR, update_proportion=proportion).stride == stride


def vicreg_reference(a: list[list[float]], b: list[list[float]]) -> float:
    """Bardes et al. 2022, equations 1 to 6, number by number."""
    n, d = len(a), len(a[0])
    total = sum((a[i][j] - b[i][j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    for z in (a, b):
        means = [sum(row[j] for row in z) / n for j in range(d)]

        def covariance(j: int, k: int, z: Any = z, means: Any = means) -> float:
            return sum((row[j] - means[j]) * (row[k] - means[k]) for row in z) / (n - 1)

        total += sum(max(0.0, 1 - math.sqrt(covariance(j, j) + 1e-4)) for j in range(d)) / d
        total += sum(covariance(j, k) ** 2 for j in range(d) for k in range(d) if j != k) / d / 25
    return total


def test_vicreg_loss_is_the_sum_of_its_definition() -> None:
    a, b = 0.7 * normal(6, 4).double(), 1.5 * normal(6, 4, seed=1).double()
    expected = vicreg_reference(a.tolist(), b.tolist())
    assert vicreg_loss(a, b).item() == pytest.approx(expected, rel=1e-9)


def test_vicreg_loss_has_the_gradient_of_its_value() -> None:
    pair = [scale * normal(6, 4, seed=seed).double() for scale, seed in ((0.7, 0), (1.5, 1))]
    assert torch.autograd.gradcheck(vicreg_loss, [each.requires_grad_() for each in pair])


def test_vicreg_loss_of_a_single_pair_is_finite() -> None:
    a, b = normal(1, 4).requires_grad_(), normal(1, 4, seed=1)
    loss = vicreg_loss(a, b)
    loss.backward()
    # Nothing varies: each of both deviations is that of the floor.
    expected = (a - b).square().mean().item() + 2 * (1 - math.sqrt(1e-4))
    assert loss.item() == pytest.approx(expected)
    assert a.grad is not None and a.grad.isfinite().all()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("space", [VECTOR, image(1)], ids=["vector", "image"])
def test_learning_goes_on_exactly_where_it_was_saved(name: str, space: spaces.Box) -> None:
    """Weights, Adam's state, statistics, counts, and whose turn it is."""
    options = {} if name == "count" else {"update_proportion": 0.5}

    def batch(seed: int) -> Tensor:
        return pictures(6, 1, seed=seed) if space.dtype == np.uint8 else normal(6, 3, seed=seed)

    def learn(source: IntrinsicReward, seeds: range) -> None:
        for seed in seeds:
            source.learn(batch(seed), batch(seed + 1))
            source.watch(batch(seed + 1))

    torch.manual_seed(0)
    source = make_source(name, space, **options)
    learn(source, range(3))
    other = reloaded(source, make_source(name, space, **options))
    for each in (source, other):
        learn(each, range(3, 6))
    assert torch.equal(source.score(batch(9)), other.score(batch(9)))
    for key, value in source.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other.state_dict()[key]), key


def test_the_learning_rate_is_that_of_this_run_and_not_of_the_file() -> None:
    other = reloaded(RND(VECTOR, learning_rate=1e-3), RND(VECTOR, learning_rate=1e-2))
    assert isinstance(other, RND) and other.optimizer.param_groups[0]["lr"] == 1e-2


STATES: dict[str, Any] = {
    "another shape": lambda adam: adam["state"][0].update(exp_avg=torch.zeros(2)),
    "no averages": lambda adam: adam["state"][0].pop("exp_avg_sq"),
    "more steps than batches": lambda adam: adam["state"][0].update(step=torch.tensor(3.0)),
    "one group more": lambda adam: adam["param_groups"].append(adam["param_groups"][0]),
}


@pytest.mark.parametrize("damage", STATES)
def test_the_state_of_another_optimiser_is_refused(damage: str) -> None:
    torch.manual_seed(0)
    source = RND(VECTOR)
    for _ in range(2):
        source.learn(normal(5, 3), normal(5, 3))
    state = copy.deepcopy(source.state_dict())
    STATES[damage](state["_extra_state"]["optimizer"])
    with pytest.raises(ValueError, match="optimiser"):
        RND(VECTOR).load_state_dict(state)


# Counting.


def fraction_reference(seen: list[list[int]], new: list[int]) -> Fraction:
    """rho / (rho' - rho) where rho and rho' are products of n(x) / n before and after, exactly.

    It is N / (1 - rho') for the pseudo-count N of Bellemare et al. 2016.
    """
    before = after = Fraction(1)
    for number, level in enumerate(new):
        count = sum(row[number] == level for row in seen)
        before *= Fraction(count, len(seen))
        after *= Fraction(count + 1, len(seen) + 1)
    return before / (after - before)


def test_pseudo_counts_are_exact_fractions() -> None:
    space = spaces.MultiBinary(3)
    seen = [[0, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]]
    source = PseudoCount(space)
    for rows in (seen[:3], seen[3:]):
        obs = torch.tensor(rows, dtype=torch.int8)
        assert source.learn(torch.zeros_like(obs), obs) == {}
    asked = [[0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]]
    found = source.pseudo_counts(torch.tensor(asked, dtype=torch.int8))
    expected = [fraction_reference(seen, new) for new in asked]
    np.testing.assert_allclose(found, [float(e) for e in expected], rtol=1e-12)
    bonuses = source.score(torch.tensor(asked, dtype=torch.int8))
    np.testing.assert_allclose(bonuses, [(float(e) + 0.01) ** -0.5 for e in expected], rtol=1e-6)


def test_what_was_never_seen_has_the_largest_bonus_even_before_anything_was_counted() -> None:
    source = PseudoCount(VECTOR)
    assert source.score(normal(4, 3)).tolist() == pytest.approx([10.0] * 4)
    obs = torch.zeros(5, 3)
    source.learn(obs, obs)
    never, often = source.score(torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0]])).tolist()
    assert never == pytest.approx(10.0) and often < 1e-3


@pytest.mark.parametrize("count", [1, 3, 10, 49, 1000])
def test_a_bonus_is_a_number_where_nothing_ever_changed(count: int) -> None:
    """Before and after, the density of what alone was seen is 1: the pseudo-count is unlimited."""
    source = PseudoCount(image(1, 42))
    obs = torch.zeros(count, 1, 42, 42)
    source.learn(obs, obs)
    (bonus,) = source.score(obs[:1]).tolist()
    assert 0 < bonus < 1e-2


def test_colours_are_counted_by_their_mean() -> None:
    obs = torch.zeros(1, 3, 42, 42)
    obs[0, :, 0, 0] = torch.tensor([0, 60, 240])
    assert PseudoCount(image(3)).levels(obs)[:2, 0].tolist() == [50, 0]


def test_levels_of_pictures_are_equally_wide() -> None:
    """Half a level is one step of grey: the mean of 4 pixels decides on which side it lies."""
    obs = torch.zeros(1, 1, 84, 84, dtype=torch.uint8)
    obs[0, 0, :2, :4] = torch.tensor([[200, 200, 200, 200], [199, 200, 200, 200]])
    obs[0, 0, :2, 4:6] = 255
    assert PseudoCount(image(1)).levels(obs)[:3, 0].tolist() == [99, 100, 127]


def test_levels_of_pictures_and_of_vectors() -> None:
    source = PseudoCount(image(4))
    obs = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    obs[1, 3, :2, :2] = torch.tensor([[255, 255], [0, 2]])  # shrunk to one pixel of 128
    obs[1, 0] = 200  # an older frame
    levels = source.levels(obs)
    assert levels.shape == (42 * 42, 2)
    assert levels[:, 0].tolist() == [0] * 42 * 42
    assert levels[:, 1].tolist() == [64, *[0] * (42 * 42 - 1)]
    vectors = PseudoCount(VECTOR).levels(torch.tensor([[-1e9, 0.0, 1e9], [-1.0, 1.0, 3.0]]))
    assert vectors.T.tolist() == [[0, 64, 127], [32, 96, 112]]


# What makes no sense is refused in one line.

DICT = spaces.Dict({"eye": VECTOR, "ear": VECTOR})

REFUSED: dict[str, tuple[Any, ...]] = {
    "unknown name": ("rdn", VECTOR, {}, "'rdn'", "nearest: rnd"),
    "unknown option": ("rnd", VECTOR, {"learning_rat": 1}, "'rnd'", "learning_rat"),
    "option of another": ("count", VECTOR, {"encoder": "a3c"}, "'count'", "encoder"),
    "proportion of 0": ("rnd", VECTOR, {"update_proportion": 0}, "update_proportion", "0"),
    "proportion above 1": ("snd", VECTOR, {"update_proportion": 1.5}, "update_proportion", "1.5"),
    "learning rate of 0": ("rnd", VECTOR, {"learning_rate": 0.0}, "learning_rate", "0"),
    "learning rate inf": ("snd", VECTOR, {"learning_rate": math.inf}, "learning_rate", "inf"),
    "learning rate NaN": ("rnd", VECTOR, {"learning_rate": math.nan}, "learning_rate", "nan"),
    "learning rate a word": ("rnd", VECTOR, {"learning_rate": "fast"}, "'rnd'", "str"),
    "unknown encoder": ("rnd", image(1), {"encoder": "natur"}, "natur", "nearest: nature"),
    "small images": ("rnd", image(1, 16), {}, "16x16", "84x84"),
    "small images for nature": ("snd", image(1, 30), {"encoder": "nature"}, "30x30", "'nature'"),
    "Dict, rnd": ("rnd", DICT, {}, "Dict", "eye", "intrinsic_reward=None"),
    "Dict, count": ("count", DICT, {}, "Dict", "ear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(case: str) -> None:
    name, space, options, *words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        make_source(name, space, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
