"""Polynomial sequences and what is measured on them, against literal loops."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ncrl.tasks import experiment as experiments
from ncrl.tasks.experiment import mutual_information
from ncrl.tasks.polynomial import experiment as polynomial
from ncrl.tasks.polynomial.data import polynomials
from ncrl.tasks.polynomial.experiment import count_pairs, information, updates_until
from ncrl.tasks.recipes import CONFIGS
from ncrl.tasks.results import Result, read_results
from tests.ncrl.tasks.files import read_recipe
from tests.ncrl.tasks.refusals import assert_refused


def slow_lengths(points: int, chunks: int) -> list[int]:
    """Points of each chunk: point t of T belongs to chunk floor(t n / T)."""
    return [sum(t * chunks // points == c for t in range(points)) for c in range(chunks)]


def slow_polynomials(
    num: int, seed: int, points: int, chunks: int, noise: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Clean and observed y of every sequence, from the same random numbers, point by point."""
    generator = torch.Generator().manual_seed(seed)
    degree = torch.randint(2, 11, (num, chunks, 1), generator=generator)
    uniform = torch.rand(num, chunks, 11, dtype=torch.float64, generator=generator)
    lengths = slow_lengths(points, chunks)
    clean = []
    for n in range(num):
        y = []
        for c, length in enumerate(lengths):
            for i in range(length):
                x = -5 + 10 * i / (length - 1)
                terms = [
                    (2 * float(uniform[n, c, k]) - 1) * x**k for k in range(int(degree[n, c]) + 1)
                ]
                y.append(sum(terms))
        largest = max(abs(value) for value in y)
        clean.append([value / largest for value in y])
    added = torch.randn(points, num, generator=generator) if noise else torch.zeros(points, num)
    observed = [
        [y + noise * float(added[t, n]) for t, y in enumerate(row)] for n, row in enumerate(clean)
    ]
    return clean, observed


@pytest.mark.parametrize(
    ("points", "chunks", "noise"), [(20, 4, 0.0), (12, 2, 0.3), (5, 1, 0.1), (22, 4, 0.0)]
)
def test_sequences_equal_a_literal_loop(points: int, chunks: int, noise: float) -> None:
    made = polynomials(
        6, torch.Generator().manual_seed(3), num_points=points, num_chunks=chunks, noise=noise
    )
    clean, observed = slow_polynomials(6, 3, points, chunks, noise)
    assert made.inputs.shape == (points, 6, 2) and made.targets.shape == (points, 6, 1)
    torch.testing.assert_close(made.clean[..., 0].T, torch.tensor(clean), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made.targets[..., 0].T, torch.tensor(observed), rtol=1e-4, atol=1e-6)
    lengths = slow_lengths(points, chunks)
    places = [(i, length) for length in lengths for i in range(length)]
    for n in range(6):
        assert abs(float(made.clean[:, n].abs().max()) - 1) < 1e-6
        for t in range(points):
            at, before = made.inputs[t, n].tolist()
            place, length = places[t]
            assert abs(5 * at - (-5 + 10 * place / (length - 1))) < 1e-5
            assert before == (float(made.targets[t - 1, n, 0]) if t else 0)


def test_the_scale_undoes_the_division() -> None:
    """Coefficients of at most 1 bound |y|; over many sequences the largest degree shows."""
    made = polynomials(500, torch.Generator().manual_seed(0))
    bound = sum(5.0**k for k in range(11))
    assert float(made.scale.min()) > 0 and float(made.scale.max()) <= bound
    assert float(made.scale.max()) > 0.5 * 5.0**10
    few = polynomials(500, torch.Generator().manual_seed(0), num_chunks=1)
    assert float(few.scale.median()) < float(made.scale.median())  # one degree instead of four


@pytest.mark.parametrize("chunks", [0, -1, 34, 100])
def test_impossible_chunks_are_refused(chunks: int) -> None:
    with pytest.raises(ValueError, match=rf"chunks must lie in 1 \.\. 33.*got {chunks}"):
        polynomials(2, torch.Generator(), num_chunks=chunks)


def slow_information(first: list[int], second: list[int]) -> float:
    joint, one, two = Counter(zip(first, second, strict=True)), Counter(first), Counter(second)
    total, n = 0.0, len(first)
    for (a, b), count in joint.items():
        total += count / n * math.log2((count / n) / ((one[a] / n) * (two[b] / n)))
    return total


def test_mutual_information_equals_a_literal_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(4, (3, 5, 40), generator=generator)
    second = (first + torch.randint(3, first.shape, generator=generator)) % 6
    found = mutual_information(count_pairs(first, second))
    assert found.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = slow_information(first[i, j].tolist(), second[i, j].tolist())
            assert abs(float(found[i, j]) - expected) < 1e-9


def one_hot_attention(slots: Tensor, num_slots: int) -> Tensor:
    """[T, N, R] -> attention [T, N, R, P] of which that slot has most."""
    return 0.1 + torch.nn.functional.one_hot(slots, num_slots).float()


def test_information_of_attention_that_follows_the_chunks() -> None:
    """One component has the same slot all the time, the other another slot in every chunk, a
    different one in every sequence."""
    chunk = torch.arange(40) // 10
    followed = (chunk[:, None] + torch.arange(3)) % 5  # [T, N]
    slots = torch.stack([torch.full_like(followed, 4), followed], dim=2)
    found = information(one_hot_attention(slots, 5), chunk)
    assert found["bits"] == found["chance"] == 0
    found = information(one_hot_attention(slots.flip(2), 5), chunk)
    assert found["bits"] == found["most"] == 2
    assert 0 < found["chance"] < 1


def test_the_sequence_drawn_is_the_one_with_the_highest_flattest_chunk() -> None:
    chunk = torch.arange(6) // 2
    y = torch.tensor(
        [[1.0, 0.4, 0.3], [0, 0, 0], [0.1, -0.5, 1], [0, 0, 0], [1, 1, 0], [0, 0, -0.2]]
    )
    assert polynomial.flattest_highest(y, chunk) == 1


def row_of(curve: list[float]) -> Result:
    return Result(
        task="polynomial",
        name="",
        seed=0,
        layer="linear",
        parameters=1,
        metrics={},
        data="",
        updates=0,
        seconds=0,
        recipe={},
        details={"zero_chunk_mse": 10.0},
        curve=[{"update": 100.0 * (i + 1), "chunk_mse": value} for i, value in enumerate(curve)],
    )


def test_updates_until_the_chunks_are_predicted() -> None:
    assert updates_until(row_of([5.0, 1.0, 2.0, 0.5])) == 200
    assert updates_until(row_of([5.0, 1.1, 2.0, 0.5])) == 400
    assert updates_until(row_of([5.0, 1.1])) is None


def test_noise_is_not_what_predictions_are_held_against() -> None:
    """No network predicts noise, whose square alone may be more than the limit."""
    row = row_of([10.2, 9.5, 9.1])
    curve = [{**point, "clean_chunk_mse": point["chunk_mse"] - 9} for point in row.curve]
    details = {"zero_chunk_mse": 10.0 + 9.0, "zero_clean_chunk_mse": 10.0}
    noisy = dataclasses.replace(row, curve=curve, details=details)
    assert updates_until(noisy) == 200


# The command

SMALL = ("--iterations", "4", "--batch-size", "8", "--threads", "1", "--device", "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Flags of a run of a second or two."""
    monkeypatch.setattr(polynomial, "TEST_SEQUENCES", 4)
    monkeypatch.setattr(experiments, "EVALUATE_EVERY", 2)
    return [*SMALL, "--logdir", str(tmp_path / "runs")]


def test_the_command_writes_rows_table_and_figure(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "polynomial.png"
    assert polynomial.main([*small, "--noise", "0.3", "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    rows = read_results(tmp_path / "runs", "polynomial")
    names = {" ".join(word for word in row.name.split() if "=" not in word) for row in rows}
    variants = ("", " linear", " hypernet", " film", " j1", " no_usage")
    assert names == {f"polynomial{variant}" for variant in variants}
    for row in rows:
        assert "noise=0.3" in row.name and row.data == "polynomials, 4 chunks, noise 0.3"
        assert [point["update"] for point in row.curve] == [2, 4]
        assert {"mse", "chunk_mse", "raw_mse", "clean_chunk_mse"} <= set(row.metrics)
        assert ("information" in row.details) is (row.layer == "neurocoder")
        assert row.details["zero_chunk_mse"] > row.details["zero_clean_chunk_mse"] > 0
        clean = [point["clean_chunk_mse"] for point in row.curve]
        assert row.metrics["best_clean_chunk_mse"] == min(clean)
        assert f"| {row.name} |" in out
    assert "| clean_chunk_mse |" in out
    assert figure.stat().st_size > 10_000
    assert polynomial.main([*small, "--noise", "0.3", "--variant", "j1"]) == 0
    out = capsys.readouterr().out
    assert "finished before" in out and "| bits of chunk (chance) |" in out
    assert polynomial.main([*small, "--noise", "0.3", "--variant", "linear"]) == 0
    out = capsys.readouterr().out
    assert "| polynomial linear " in out and "bits of chunk" not in out, "it has no attention"


def test_chunks_change_the_data_and_the_name(small: list[str], tmp_path: Path) -> None:
    for chunks in ("4", "5"):
        assert polynomial.main([*small, "--variant", "linear", "--chunks", chunks]) == 0
    rows = {row.data: row for row in read_results(tmp_path / "runs")}
    assert set(rows) == {f"polynomials, {c} chunks, noise 0" for c in (4, 5)}
    assert rows["polynomials, 5 chunks, noise 0"].name.endswith("chunks=5")
    assert rows["polynomials, 4 chunks, noise 0"].metrics != (
        rows["polynomials, 5 chunks, noise 0"].metrics
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--chunks", "34"], "chunks must lie in 1 .. 33 for 100 points, got 34"),
        (["--noise", "-1"], "noise must be a number of at least 0, got -1.0"),
        (["--noise", "nan"], "noise must be a number"),
        (["--config", "mnist"], "is a recipe for mnist, not for polynomial"),
        (["--epochs", "3"], "does not say iterations"),
        (["--network-options", "num_outputs=2"], "num_outputs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SMALL[2:] if "--epochs" in flags else SMALL
    assert_refused(polynomial.main, [*small, *flags], said, tmp_path, capsys)


def test_all_recipes_are_checked_before_the_first_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--variant", "linear", "base", "--network-options", "hidden_size=0"]
    figure = tmp_path / "folder.png"
    figure.mkdir()
    for flags, said in (
        (options, "hidden_size must be an integer of at least 1, got 0"),
        (["--variant", "linear", "--figure", str(figure)], f"{figure} is a folder"),
    ):
        assert_refused(polynomial.main, [*SMALL, *flags], said, tmp_path / "runs", capsys)
        assert not (tmp_path / "runs").exists()


def test_the_loss_falls(small: list[str], tmp_path: Path) -> None:
    words = ["--variant", "linear", "base", "--iterations", "60", "--learning-rate", "0.01"]
    assert polynomial.main([*small, *words, "--noise", "0.1"]) == 0
    for row in read_results(tmp_path / "runs"):
        assert row.curve[-1]["loss"] < 0.8 * row.curve[0]["loss"]


def test_batches_follow_from_seed_and_update_alone() -> None:
    """So that a run which was stopped goes on as if it had not been."""
    recipe = read_recipe(CONFIGS / "polynomial.yaml", "j1")
    recipe = dataclasses.replace(recipe, batch_size=4)
    cpu = torch.device("cpu")
    one, same, other = (polynomial.Polynomials(recipe, seed, cpu) for seed in (5, 5, 6))
    for experiment in (same, other):
        experiment.model.load_state_dict(one.model.state_dict())
    same.loss(0)
    assert torch.equal(one.loss(3), same.loss(3))
    assert not torch.equal(one.loss(3), one.loss(4))
    assert not torch.equal(one.loss(3), other.loss(3))
