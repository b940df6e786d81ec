"""The study of programs measures what it says, and its levers do what their names say."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import programs as study

from ncrl import NeurocoderLinear
from ncrl.tasks.data import Images
from ncrl.tasks.recipes import count_parameters
from ncrl.tasks.results import read_result
from ncrl.tasks.training import Run
from tests.ncrl.tasks.continual.test_split import assert_goes_on_exactly


def head(**levers: Any) -> study.Head:
    torch.manual_seed(0)
    return study.Head(study.Setting("neurocoder", study.CHOSEN, **levers), 12, 6)


def test_balance_is_zero_for_equal_slots_and_greatest_for_one() -> None:
    assert study.balance_loss(torch.full((3, 5, 2, 8), 1 / 8)) == pytest.approx(0, abs=1e-9)
    one = torch.zeros(3, 5, 2, 8)
    one[..., 3] = 1
    assert study.balance_loss(one) == pytest.approx(7)  # P - 1
    each = F.one_hot(torch.arange(8)).float().expand(3, 2, 8, 8).transpose(1, 2)
    assert study.balance_loss(each) == pytest.approx(0, abs=1e-9)  # sharp, and balanced


def test_what_is_measured_is_what_a_slow_reading_finds() -> None:
    torch.manual_seed(1)
    x, labels = torch.randn(40, 12), torch.arange(40) % 6
    given = head()
    layer = given.layer
    assert isinstance(layer, NeurocoderLinear) and layer.bias is not None
    with torch.no_grad():
        layer.bias.normal_()
        found = study.measure(given, x, labels)
        matrices = [layer.program(row) for row in x]
    mean = sum(matrices) / len(x)
    ranks, energy, off, right_mean, right_first = [], 0.0, 0.0, 0, 0
    for row, label, matrix in zip(x, labels, matrices, strict=True):
        u, s, vh = torch.linalg.svd(matrix)
        ranks.append(float(s.square().sum() ** 2 / s.pow(4).sum()))
        energy += float(matrix.square().sum())
        off += float((matrix - mean).square().sum())
        right_mean += int((row @ mean + layer.bias).argmax()) == label
        first = s[0] * torch.outer(u[:, 0], vh[0])
        right_first += int((row @ first + layer.bias).argmax()) == label
    assert found["rank"] == pytest.approx(sum(ranks) / len(x), rel=1e-4)
    assert found["varies"] == pytest.approx(off / energy, rel=1e-4)
    assert found["one_program"] == pytest.approx(100 * right_mean / len(x))
    assert found["rank_1"] == pytest.approx(100 * right_first / len(x))


def test_a_component_whose_top_slot_is_the_class_has_all_bits() -> None:
    given = head()
    layer = given.layer
    assert isinstance(layer, NeurocoderLinear)
    x = torch.randn(200, 12)
    with torch.no_grad():
        tops = layer.attend(x).u[:, 4].argmax(1)
        slots, labels = tops.unique(return_inverse=True)
        found = study.measure(given, x, labels)
    shares = torch.bincount(labels) / len(labels)
    assert len(slots) > 1
    assert found["best_bits"] == pytest.approx(float(-(shares * shares.log2()).sum()), rel=1e-4)
    assert 0 <= found["bits"] < found["best_bits"]


def test_levers_change_the_gradient_in_training_alone_and_never_the_output() -> None:
    x = torch.randn(30, 12)
    plain, levered = head(), head(balance=0.5, orthogonal_keys=0.5)
    assert torch.equal(plain(x), levered(x))
    wanted = {}
    for name, given in (("plain", plain), ("levered", levered)):
        total = given(x).square().mean()
        extra = given.loss(x)
        if extra is not None:  # the slow reading: the levers' loss beside the task's
            own = torch.autograd.grad(extra, list(given.parameters()), allow_unused=True)
        total.backward()
        wanted[name] = [p.grad for p in given.parameters()]
    for first, extra, both in zip(wanted["plain"], own, wanted["levered"], strict=True):
        assert first is not None and both is not None
        torch.testing.assert_close(both, first if extra is None else first + extra)
    assert any(extra is not None and extra.abs().max() > 1e-4 for extra in own)
    levered.eval()
    levered.zero_grad()
    levered(x).square().mean().backward()
    for first, now in zip(wanted["plain"], levered.parameters(), strict=True):
        torch.testing.assert_close(now.grad, first)


def test_a_rising_sharpness_is_reached_by_equal_factors() -> None:
    given = head(final_sharpness=40.0)
    assert isinstance(given.layer, NeurocoderLinear)
    for done, sharpness in ((0.0, 10.0), (0.5, 20.0), (1.0, 40.0)):
        given.sharpen(done)
        assert given.layer.composition.config.sharpness == pytest.approx(sharpness)
    x = torch.randn(50, 12)
    with torch.no_grad():
        late = given.layer.attend(x).u.amax(2).mean()
        given.sharpen(0.0)
        assert late > given.layer.attend(x).u.amax(2).mean()


def test_standardised_programs_do_not_depend_on_the_scale_of_an_input() -> None:
    x = torch.randn(5, 12)
    given = head(standardise=True)
    torch.testing.assert_close(3 * given(x), given(3 * x), atol=1e-4, rtol=1e-3)
    plain = head()
    assert not torch.allclose(3 * plain(x), plain(3 * x), atol=1e-2)


def test_the_mlp_has_as_many_numbers() -> None:
    for sizes in ((784, 10), (64, 18)):
        coded, mlp = (
            count_parameters(study.Head(study.SETTINGS[name], *sizes)) for name in ("chosen", "mlp")
        )
        assert abs(coded - mlp) <= (sum(sizes) + 1) / 2


def test_a_run_that_was_killed_goes_on_with_the_sharpness_of_then(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(40, 1, 28, 28), torch.arange(40) % 10
    data = Images("x", "x", images, labels, images, labels, 10)
    setting = study.SETTINGS["chosen, rising"]
    recipe = replace(study.recipe_of(setting, 0.01), batch_size=10, epochs=2)

    def digits() -> study.Digits:
        torch.manual_seed(0)
        return study.Digits(setting, recipe, data, 0)

    assert_goes_on_exactly(digits, recipe, tmp_path, 5)


def test_a_row_of_actions_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TIMESTEPS", 640)
    setting = study.SETTINGS["chosen, rising"]
    recipe = study.recipe_of(setting, 0.01)
    run = Run("programs", "actions: chosen", recipe, 0, torch.device("cpu"), tmp_path)
    study.learn_actions(run, setting)
    row = read_result(tmp_path / "result.json")
    assert len(row.curve) == 8 and row.recipe["learning_rate"] == 0.01
    assert row.metrics["accuracy"] == pytest.approx(sum(p["accuracy"] for p in row.curve) / 8)
    assert 0 <= row.metrics["bits"] <= row.metrics["best_bits"] <= math.log2(18) + 1e-6
