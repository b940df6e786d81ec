"""The model card says what was measured, and nothing in it can break its form."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from stable_baselines3 import PPO

from ncrl.sb3 import NeurocoderMlpPolicy, export_policy, register, write_model_card
from tests.ncrl.sb3.test_export import model_of

CSV = """time/total_timesteps,rollout/ep_rew_mean,train/loss
100,,0.5
200,10.0,0.4
300,20.5,nan
400,15.0,
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = PPO(NeurocoderMlpPolicy, "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    return export_policy(model.learn(8), tmp_path / "policy")


def card(folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    text = write_model_card(folder, "CartPole-v1", **options).read_text()
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_everything_given_is_on_the_card(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text(CSV)
    front, body = card(
        folder, scores=[10, 20, 30], deterministic=False, protocol="500 timesteps at most",
        command="python train.py --seed 0", progress=tmp_path / "progress.csv", license="mit",
        name="My pole", tags=["mine"],
    )  # fmt: skip
    assert front["library_name"] == "stable-baselines3" and front["license"] == "mit"
    assert {"CartPole-v1", "PPO", "neurocoder", "mine"} <= set(front["tags"])
    result = front["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "CartPole-v1"
    assert result["metrics"][0]["value"] == "20.00 +/- 8.16"  # sqrt(200 / 3)
    for text in (
        "# My pole", "`NeurocoderMlpPolicy` trained by PPO for 8 timesteps", "20.00 +/- 8.16",
        "3 whole games, sampled actions", "500 timesteps at most", "python train.py --seed 0",
        "(curve.png)", "load_policy",
    ):  # fmt: skip
        assert text in body, text
    image = cv2.imread(str(folder / "curve.png"))
    assert image.shape[0] > 300 and image.std() > 1, "something is drawn"


def test_nothing_is_made_up(folder: Path) -> None:
    front, body = card(folder)
    assert "model-index" not in front and "license" not in front
    assert "No score has been measured." in body
    assert "Trained with" not in body and "curve" not in body
    assert not (folder / "curve.png").exists()


def test_a_policy_with_memory_is_used_with_its_state(tmp_path: Path) -> None:
    register()
    _, body = card(export_policy(model_of("lstm"), tmp_path))
    assert "policy.predict(obs, state, episode_start)" in body


def test_the_example_of_the_card_runs(folder: Path, tmp_path: Path) -> None:
    for where in (folder, export_policy(model_of("lstm"), tmp_path / "lstm")):
        _, body = card(where)
        code = body.split("```python\n")[1].split("```")[0].replace("FOLDER", str(where))
        space = {"policy": 4, "lstm": 3}[where.name]
        names: dict[str, Any] = {"obs": np.zeros(space, np.float32)}
        exec(code, names)
        assert names["action"].shape == ()


def test_text_cannot_leave_its_place(folder: Path) -> None:
    front, body = card(
        folder, name="x\n---\n# <b>", protocol="a\n\n## b `c`", command="echo ```\nrm `x`",
        tags=["a: [b", "c\n---"],
    )  # fmt: skip
    assert "a: [b" in front["tags"] and "c\n---" in front["tags"]
    assert "\n## b" not in body and "<b>" not in body.replace("\\<b\\>", "")
    assert "````sh\necho ```\nrm `x`\n````" in body


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_must_be_finite(folder: Path, value: float) -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        card(folder, scores=[1.0, value])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("a,b\n1,2\n", "no column 'time/total_timesteps'; it has a, b"),
        (CSV + "500,much,0\n", "line 6: .*much"),
        ("\x00\xff", "is no table|no column"),
    ],
)
def test_curves_that_cannot_be_read(
    folder: Path, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "progress.csv"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        card(folder, progress=path)


def test_a_curve_without_games_is_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("\n".join(CSV.splitlines()[:2]) + "\n")
    _, body = card(folder, progress=tmp_path / "progress.csv")
    assert "curve.png" not in body


def test_a_folder_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*policy\.json"):
        write_model_card(tmp_path, "CartPole-v1")
    assert not list(tmp_path.iterdir())
