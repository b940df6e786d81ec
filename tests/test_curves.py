"""`benchmarks/curves.py`: what it keeps of a run, and what it says of several."""

import csv
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import curves
from curves import (
    Curve,
    by_game,
    draw_scores,
    frames_to,
    on_one_grid,
    print_table,
)

from ncrl.agents.atari.config import RunConfig

ORANGE = (0x0E, 0x7F, 0xFF)
"""Matplotlib's C1, the colour of `neurocoder`, as BGR. Axes alone do not have it."""


def make_run(folder: Path, rows: str, **settings: object) -> Path:
    """A run directory as run_atari.py leaves it."""
    folder.mkdir()
    config = RunConfig(env="Pong", games=16, **settings)  # type: ignore[arg-type]
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    header = "time/frames,rollout/ep_rew_mean,time/time_elapsed,train/policy_lag\n"
    (folder / "progress.csv").write_text(header + rows)
    return folder


def kept(tmp_path: Path, seed: int, rows: str, layer: str = "neurocoder") -> Path:
    out = tmp_path / f"{layer}_{seed}.csv"
    curves.write_small(
        make_run(tmp_path / f"run-{layer}-{seed}", rows, seed=seed, layer=layer), out
    )
    return out


def test_the_small_file_says_whose_curve_it_is(tmp_path: Path) -> None:
    with kept(tmp_path, 7, "400,,1,3\n800,-20.123456789,2,3\n").open(newline="") as file:
        rows = list(csv.DictReader(file))
    settings = {"env": "Pong", "layer": "neurocoder", "games": "16", "seed": "7"}
    assert [{name: row[name] for name in settings} for row in rows] == [settings, settings]
    assert [row["score"] for row in rows] == ["", "-20.1235"]
    assert [row["seconds"] for row in rows] == ["1", "2"]
    assert "train/policy_lag" not in rows[0] and rows[0]["int_value"] == ""


def test_a_run_that_logged_nothing_has_no_rows(tmp_path: Path) -> None:
    assert curves.read_rows(kept(tmp_path, 0, "")) == []


@pytest.mark.parametrize("length", [1, 299, 300, 301, 899, 1000])
def test_a_small_file_is_small_and_ends_where_the_run_does(tmp_path: Path, length: int) -> None:
    path = kept(tmp_path, 0, "".join(f"{400 * i},{i},1,1\n" for i in range(1, length + 1)))
    rows = curves.read_rows(path)
    assert len(rows) <= curves.MOST_ROWS + 1
    assert [rows[0]["frames"], rows[-1]["frames"]] == ["400", f"{400 * length:.6g}"]


def test_scores_of_a_game_and_its_heads_are_put_together(tmp_path: Path) -> None:
    files = [kept(tmp_path, seed, f"400,,1,1\n800,{seed},1,1\n") for seed in (2, 1)]
    files.append(kept(tmp_path, 1, "400,9,1,1\n", layer="linear"))
    files.append(kept(tmp_path, 3, "400,,1,1\n"))  # no game was finished
    assert by_game(files) == {
        ("Pong", "neurocoder"): {2: Curve([800], [2]), 1: Curve([800], [1])},
        ("Pong", "linear"): {1: Curve([400], [9])},
    }


def test_two_curves_of_one_seed_are_not_put_together(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    files = [kept(folder, 2, "400,1,1,1\n") for folder in (tmp_path, tmp_path / "again")]
    with pytest.raises(ValueError, match=r"again.*seed of another file"):
        by_game(files)


def test_scores_over_minutes(tmp_path: Path) -> None:
    """Of a run that was resumed after a minute and a half."""
    files = [kept(tmp_path, 2, "400,5,60,1\n800,6,90,1\n1200,7,30,1\n1600,8,60,1\n")]
    curve = by_game(files, "minutes")["Pong", "neurocoder"][2]
    assert curve == Curve([1.0, 1.5, 2.0, 2.5], [5, 6, 7, 8])


def test_the_numbers_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    ends = {0: (10_000_000, 100.0), 1: (10_000_000, 200.0), 2: (9_800_000, 600.0)}
    seeds = {seed: Curve([200_000, frames], [9.0, score]) for seed, (frames, score) in ends.items()}
    found = {("Pong", "linear"): seeds, ("Pong", "neurocoder"): {7: Curve([4_000_000], [0.0])}}
    print_table(found, 150)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(" | ")[-1] == "million frames to 150, by seed |"
    # Mean 300; deviations -200, -100, 300; 140,000 / 3; root 216.0
    assert lines[2] == (
        "| Pong | linear | 0, 1, 2 | 9.8 to 10.0 | 300.0 ± 216.0 | 100.0, 200.0, 600.0 "
        "| never, 10.00, 9.80 |"
    )
    assert lines[3] == "| Pong | neurocoder | 7 | 4.0 | 0.0 (one seed) | 0.0 | never |"


def test_a_score_is_reached_when_a_curve_first_has_it() -> None:
    swinging = Curve([1e6, 2e6, 3e6, 4e6], [0, 15, 3, 20])
    assert [*frames_to([swinging], 15)] == ["2.00"]
    assert [*frames_to([swinging], 16)] == ["4.00"]


def test_a_mean_covers_what_all_seeds_have() -> None:
    one, two, late = Curve([100, 300], [0, 4]), Curve([200, 400], [4, 4]), Curve([301], [0])
    frames, scores = on_one_grid([one, two])
    assert (frames[0], frames[-1]) == (200, 300)
    np.testing.assert_allclose(scores[:, [0, -1]], [[2, 4], [4, 4]])
    frames, scores = on_one_grid([one, late])
    assert len(frames) == 0 and scores.shape == (2, 0)


def test_a_figure_shows_means_and_spread(tmp_path: Path) -> None:
    seeds = {seed: Curve([0, 1e6], [seed, 10.0 + 5 * seed]) for seed in (0, 1)}
    draw_scores({("Pong", "neurocoder"): seeds}, tmp_path / "figure.png")
    image = cv2.imread(str(tmp_path / "figure.png"))
    assert image is not None
    assert (image == ORANGE).all(axis=-1).sum() > 200, "the line"
    band = np.array(ORANGE) * 0.2 + 255 * 0.8
    assert (np.abs(image - band) <= 2).all(axis=-1).sum() > 1000, "the spread"
