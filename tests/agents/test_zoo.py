"""configs/rl_zoo/a3c.yml, read as rl-zoo3 reads it, and the example of docs/zoo.md."""

import importlib
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import pytest
import torch
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from ncrl.agents import A3C
from ncrl.agents.atari.config import RunConfig, head_options, with_game

gymnasium.register_envs(ale_py)
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "rl_zoo" / "a3c.yml"
ENTRIES: dict[str, dict[str, Any]] = yaml.safe_load(CONFIG.read_text())
PAGE = (ROOT / "docs" / "zoo.md").read_text()
ENVS = {"default": "CartPole-v1", "atari": "ALE/Breakout-v5"}


def model_of(entry: str) -> A3C:
    """What rl_zoo3/exp_manager.py does with an entry, in short."""
    options = dict(ENTRIES[entry])
    assert isinstance(options.pop("n_timesteps"), float)
    wrapper = None
    if "env_wrapper" in options:
        (name,) = options.pop("env_wrapper")
        module, _, attribute = name.rpartition(".")
        wrapper = getattr(importlib.import_module(module), attribute)
    env_id = ENVS.get(entry, entry)
    n_envs = options.pop("n_envs")
    if wrapper is not None:
        n_envs = options["batch_size"] // options["n_steps"]  # 16 emulators are too slow for a test
    env: Any = make_vec_env(env_id, n_envs, wrapper_class=wrapper)
    if options.pop("normalize", False):
        env = VecNormalize(env, **({"gamma": options["gamma"]} if "gamma" in options else {}))
    rate = options["learning_rate"]
    if isinstance(rate, str):
        _, value = rate.split("_")
        options["learning_rate"] = LinearSchedule(float(value), 0.0, 1.0)
    else:
        options["learning_rate"] = ConstantSchedule(rate)
    if "policy_kwargs" in options:
        names = {"dict": dict, "th": torch, "nn": torch.nn, "__builtins__": {}}
        options["policy_kwargs"] = eval(options["policy_kwargs"], names)
    return A3C(env=env, device="cpu", seed=0, **options)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_makes_a_model_that_learns(entry: str) -> None:
    model = model_of(entry)
    if entry == "atari":
        assert type(model.policy).__name__ == "NeurocoderCnnLstmPolicy"
        config = model.policy.action_net.config  # as the page says, that of run_atari.py
        for name, value in head_options(with_game(RunConfig(env="Pong"))).items():
            assert getattr(config, name) == value, name
        return
    model.learn(model.n_envs * model.n_steps, log_interval=None)
    assert model._n_updates > 0 and model._skipped_updates == 0


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_three_lines_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for rl_zoo3, which the tests do not install: it keeps one dict."""
    zoo: Any = types.ModuleType("rl_zoo3")
    zoo.ALGOS = {}
    monkeypatch.setitem(sys.modules, "rl_zoo3", zoo)
    registration, _, _ = blocks()[0].partition("if __name__")
    assert len([line for line in registration.splitlines() if line]) == 3
    exec(registration, {})
    assert zoo.ALGOS == {"a3c": A3C}


def test_the_schedule_of_rl_zoo3_is_read_where_rl_zoo3_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class SimpleLinearSchedule:
        def __init__(self, initial_value: float) -> None:
            self.initial_value = initial_value

        def __call__(self, progress_remaining: float) -> float:
            return progress_remaining * self.initial_value

    SimpleLinearSchedule.__module__ = "rl_zoo3.utils"
    SimpleLinearSchedule.__qualname__ = "SimpleLinearSchedule"
    utils: Any = types.ModuleType("rl_zoo3.utils")
    utils.SimpleLinearSchedule = SimpleLinearSchedule
    monkeypatch.setitem(sys.modules, "rl_zoo3", types.ModuleType("rl_zoo3"))
    monkeypatch.setitem(sys.modules, "rl_zoo3.utils", utils)
    model = A3C(
        "MlpPolicy", "CartPole-v1", SimpleLinearSchedule(1e-3), n_workers=0, n_envs=1, device="cpu"
    )
    model.save(tmp_path / "model")
    assert A3C.load(tmp_path / "model", device="cpu").lr_schedule(0.5) == 5e-4
    monkeypatch.delitem(sys.modules, "rl_zoo3.utils")
    with pytest.raises(ValueError, match=r"'rl_zoo3\.utils\.SimpleLinearSchedule'.*custom_objects"):
        A3C.load(tmp_path / "model", device="cpu")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks()[1], {"__name__": "example"})
    assert set(os.listdir("cartpole_policy")) == {"policy.json", "policy.safetensors"}
