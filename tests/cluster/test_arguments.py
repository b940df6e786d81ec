"""`A3C(cluster=...)` before there is a cluster. Only one of these tests needs Ray."""

import importlib.util
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch

import run_atari
from ncrl.agents import A3C
from ncrl.agents.atari.config import RunConfig, choose_config
from ncrl.agents.playing.weights import SharedWeights, fill, flatten
from ncrl.agents.runs.directory import RunDirectory

FREE_PORT = "127.0.0.1:9"
"""Where nobody listens."""


def pretend(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    """Ray is installed, or not."""
    find_spec = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return (object() if installed else None) if name == "ray" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def make_model(**options: Any) -> A3C:
    defaults: dict[str, Any] = {"env": "CartPole-v1", "n_workers": 1, "n_envs": 2, "n_steps": 5}
    defaults |= {"device": "cpu", "policy_kwargs": {"lstm_hidden_size": 8}}
    return A3C("MlpLstmPolicy", **(defaults | options))


@pytest.mark.parametrize("cluster", ["", "10.0.0.1", "ray://10.0.0.1:10001", "aut", "a b:1"])
def test_an_address_that_is_none(cluster: str) -> None:
    with pytest.raises(ValueError, match=r"cluster must be 'auto', 'host:port' or None, got '"):
        make_model(cluster=cluster)


def test_without_ray_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, installed=False)
    with pytest.raises(ValueError, match=r"pip install 'ncrl\[ray\]'"):
        make_model(cluster="auto")


@pytest.mark.parametrize(
    "options",
    [{"n_workers": 0}, {"env": gymnasium.make("CartPole-v1"), "n_envs": None}],
)
def test_a_cluster_needs_workers(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, installed=True)
    with pytest.raises(ValueError, match="needs workers: n_workers of at least 1, and an env"):
        make_model(**({"n_workers": None} | options), cluster=FREE_PORT)


def test_where_workers_run_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, installed=True)
    make_model(cluster=FREE_PORT).save(tmp_path / "model")
    assert A3C.load(tmp_path / "model").cluster is None
    assert A3C.load(tmp_path / "model", cluster="auto").cluster == "auto"


@pytest.mark.parametrize("more", [[], ["--workers", "2"]])
def test_a_cluster_that_is_not_there(
    more: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line, exit code 2, no run folder; and the handlers of signals are who they were."""
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run_atari.main(
            ["--env", "Pong", "--cluster", FREE_PORT, "--logdir", str(tmp_path / "x"), *more]
        )
    assert left.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot join the Ray cluster '{FREE_PORT}'" in error and "ray start --head" in error
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "x").exists()


def test_a_run_of_a_cluster_goes_on_without_it(tmp_path: Path) -> None:
    """`--cluster none` wins over the configuration that was kept."""
    config = RunConfig(env="Pong", intrinsic_reward="none", cluster=FREE_PORT, workers=1, games=2)
    RunDirectory.create(tmp_path, "Pong").write_config(asdict(config))
    modes = {"resume": str(tmp_path / "Pong-1"), "config": None}
    resumed, _ = choose_config({"cluster": "none"}, modes)
    assert resumed.cluster is None and (resumed.workers, resumed.games) == (1, 2)


def test_weights_of_one_module_in_another() -> None:
    """What actors fill theirs with is what processes read from shared memory."""
    one, two, three = (make_model(seed=seed).policy for seed in (1, 2, 3))
    shared = SharedWeights(one)
    shared.publish(one, 0)
    shared.read_into(two)
    fill(three, flatten(one))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
        assert torch.equal(tensor, three.state_dict()[name]), name
