"""One table of defaults: what Python trains and what the command line trains is the same agent."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ncrl.agents import A3C
from ncrl.agents.atari.config import RunConfig, with_game, with_sizes
from ncrl.agents.atari.train import make_model
from ncrl.agents.defaults import FEW, IMAGES, MANY, defaults_for
from ncrl.envs import atari
from ncrl.neurocoder import NeurocoderConfig, NeurocoderLinear


def test_the_readmes_agent_is_the_commands() -> None:
    config = with_sizes(with_game(RunConfig(env="Pong", workers=0, games=8, device="cpu")))
    command = make_model(config)
    python = A3C(
        "NeurocoderCnnLstmPolicy", atari("Pong"), n_workers=0, n_envs=8, seed=0, device="cpu"
    )
    assert asdict(python._objective()) == asdict(command._objective())
    for name in ("n_steps", "envs_per_update", "max_grad_norm", "sde_sample_freq"):
        assert getattr(python, name) == getattr(command, name), name
    for remaining in (1.0, 0.4, 0.0):
        assert python.lr_schedule(remaining) == command.lr_schedule(remaining)
    one, other = python.policy.optimizer, command.policy.optimizer
    assert type(one) is type(other) is torch.optim.Adam and one.defaults == other.defaults
    for name, weight in python.policy.state_dict().items():
        assert torch.equal(weight, command.policy.state_dict()[name]), name
    for mine, theirs in zip(python.policy.modules(), command.policy.modules(), strict=True):
        if isinstance(mine, NeurocoderLinear):
            assert isinstance(theirs, NeurocoderLinear) and mine.config == theirs.config
            assert mine.config.sharpness == 10 and not mine.config.residual_gate


@pytest.mark.parametrize(
    ("settings", "gate"),
    [
        ({}, False),
        ({"env": "MontezumaRevenge"}, True),
        ({"intrinsic_reward": "count"}, True),
        ({"env": "MontezumaRevenge", "residual_gate": False}, False),
        ({"residual_gate": True}, True),
    ],
)
def test_heads_have_the_gate_where_there_is_a_bonus(settings: dict, gate: bool) -> None:
    assert with_game(RunConfig(**{"env": "Pong", **settings})).residual_gate is gate


@pytest.mark.parametrize(("bonus", "gate"), [("count", True), ("none", False), (None, False)])
def test_heads_in_python_are_those_of_the_command(bonus: str | None, gate: bool) -> None:
    model = A3C(
        "NeurocoderCnnPolicy", atari("Pong"), n_workers=0, n_envs=4, device="cpu",
        intrinsic_reward=bonus,
    )  # fmt: skip
    config = model.policy.action_net.config
    assert (config.sharpness, config.num_slots, config.residual_gate) == (10, 80, gate)


def test_the_table_has_a_row_for_everybody() -> None:
    assert defaults_for(3, 0, True) is defaults_for(1, 0, False) is FEW
    assert defaults_for(4, 0, True) is defaults_for(2, 1, True) is IMAGES
    assert defaults_for(4, 0, False) is MANY


@pytest.mark.parametrize(
    ("head_kwargs", "sharpness", "gate"),
    [
        (None, 10.0, False),
        ({"num_slots": 9}, 10.0, False),
        ({"sharpness": 2.0, "residual_gate": True}, 2.0, True),
        ({"preset": "official"}, 10.0, True),
        ({"config": NeurocoderConfig(num_slots=9)}, 1.0, True),
        ({"config": NeurocoderConfig(preset="official"), "sharpness": 3.0}, 3.0, True),
    ],
)
def test_options_that_are_given_are_taken_and_those_that_are_not_are_saved(
    head_kwargs: dict | None, sharpness: float, gate: bool, tmp_path: Path
) -> None:
    model = A3C(
        "NeurocoderCnnPolicy", atari("Pong"), n_workers=0, n_envs=4, device="cpu",
        policy_kwargs=None if head_kwargs is None else {"head_kwargs": head_kwargs},
    )  # fmt: skip
    model.save(tmp_path / "model")
    for one in (model, A3C.load(tmp_path / "model", device="cpu")):
        head = one.policy.action_net
        assert isinstance(head, NeurocoderLinear)
        assert (head.config.sharpness, head.config.residual_gate) == (sharpness, gate)
