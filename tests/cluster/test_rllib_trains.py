"""The example of docs/rllib.md, as it stands there, with real processes of Ray."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ncrl.networks import MeanImage
from ncrl.sb3 import load_policy

pytest.importorskip("ray.rllib", exc_type=ImportError)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("algorithm", "game"), [("APPO", "Pong"), ("PPO", "CartPole-v1")])
def test_the_example_trains(algorithm: str, game: str, tmp_path: Path) -> None:
    """With our loss in it, and the mean image of what it has seen; its weights come out, and in."""
    page = (ROOT / "docs" / "rllib.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "train_rllib.py").write_text(program, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "train_rllib.py", algorithm, game, "500"],
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"\d{3,} timesteps .* orthogonality 0\.\d*[1-9]\d*", last), done.stdout
    policy = load_policy(tmp_path / f"{algorithm}-{game}", "cpu")
    means = [part for part in policy.modules() if isinstance(part, MeanImage)]
    assert bool(means) == (game == "Pong")
    for mean in means:
        assert mean.num_images >= 160 and 0 < mean.mean.max() <= 1
