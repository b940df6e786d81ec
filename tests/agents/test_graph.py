"""Captured updates, with a recorder for the CPU that runs again what a graph would launch again."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ncrl.agents.learning.graph
from ncrl.agents import A3C
from ncrl.agents.learning.graph import MAX_CAPTURES, WARM_UPS, GraphedUpdates
from ncrl.agents.learning.objective import Lesson
from ncrl.agents.learning.update import Measured, update_on_device
from ncrl.sb3.engine import map_tensors
from ncrl.shell.tensors import tensors_in
from tests.agents.test_learner import both_optimisers, trained


def record_on_cpu(run: Callable[[], Measured]) -> tuple[Callable[[], None], Measured]:
    """Like a graph: what it returns is made once, and every replay writes into that."""
    for _ in range(WARM_UPS):
        run()
    measured = run()

    def replay() -> None:
        for into, again in zip(tensors_in(measured), tensors_in(run()), strict=True):
            into.copy_(again)

    return replay, measured


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each capture; all models made by `graphed` have captured updates."""
    made: list[int] = []
    rates: list[torch.Tensor] = []

    def record(run: Callable[[], Measured]) -> Any:
        made.append(1)
        return record_on_cpu(run)

    def update_at_captured_rates(policy: Any, *others: Any) -> Measured:
        """A graph knows no learning rates but the tensors that it was captured with."""
        optimizer = policy.optimizer
        now = [group["lr"] for group in optimizer.param_groups]
        if isinstance(now[0], torch.Tensor):
            rates[:] = now
        try:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            return update_on_device(policy, *others)
        finally:
            for group, rate in zip(optimizer.param_groups, now, strict=True):
                group["lr"] = rate

    monkeypatch.setattr(ncrl.agents.learning.graph, "record", record)
    monkeypatch.setattr(ncrl.agents.learning.graph, "update_on_device", update_at_captured_rates)
    return made


def with_rate(*arguments: Any) -> A3C:
    """A trained model whose learning rate is not 0 again."""
    model = trained(*arguments)
    model._current_progress_remaining = 0.5
    return model


def graphed(*arguments: Any) -> A3C:
    model = with_rate(*arguments)
    assert model.learner.graphed.reason == "the learner is on cpu, not on CUDA"
    model.learner.graphed.reason = None
    return model


def update(model: A3C) -> None:
    """From the batch that it played last."""
    assert model._batch is not None
    model.learner.update(Lesson(model._batch.rollout), model._objective(), model.max_grad_norm)


def assert_close(one: A3C, other: A3C) -> None:
    for mine, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@both_optimisers
@pytest.mark.parametrize("head", ["linear", "neurocoder"])
def test_a_training_by_replays_is_the_training(
    head: str, use_rms_prop: bool, captures: list[int]
) -> None:
    """With a schedule of the learning rate, and parts of the batch, and a short last rollout."""
    eager, replayed = trained(head, use_rms_prop), graphed(head, use_rms_prop)
    for model in (eager, replayed):
        model.set_random_seed(1)
        model.batch_size = 40
        model.learn(3 * 80 + 4 * 7, log_interval=None)
    assert captures == [1]
    assert replayed._n_updates == eager._n_updates
    assert replayed.learner.latent is not None and eager.learner.latent is not None
    torch.testing.assert_close(replayed.learner.latent, eager.learner.latent, rtol=1e-3, atol=1e-4)
    assert replayed.policy.optimizer.param_groups[0]["lr"] == pytest.approx(
        eager.policy.optimizer.param_groups[0]["lr"]
    )
    assert_close(eager, replayed)


@both_optimisers
def test_capturing_changes_nothing_and_leaves_the_optimiser_as_it_was(
    use_rms_prop: bool, captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = graphed("linear", use_rms_prop)
    before = copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))
    record = ncrl.agents.learning.graph.record

    def nothing(run: Callable[[], Measured]) -> Any:
        return (lambda: None), record(run)[1]

    monkeypatch.setattr(ncrl.agents.learning.graph, "record", nothing)
    update(model)
    after = (model.policy.state_dict(), model.policy.optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert captures == [1]


def test_a_replayed_update_that_is_not_finite_is_skipped(captures: list[int]) -> None:
    model = graphed("linear")
    assert model._batch is not None
    model.train()
    before = copy.deepcopy(model.policy.state_dict())
    rollout = model._batch.rollout
    model._batch = model._batch._replace(
        rollout=rollout._replace(rewards=rollout.rewards * float("inf"))
    )
    model.train()
    assert model._skipped_updates == 1
    torch.testing.assert_close(model.policy.state_dict(), before, rtol=0, atol=0)


def test_other_settings_and_other_memory_are_captured_anew(captures: list[int]) -> None:
    model = graphed("linear")
    model.train()
    model.train()
    assert len(captures) == 1
    model.ent_coef = 0.5
    model.train()
    assert len(captures) == 2
    model.policy.optimizer.load_state_dict(copy.deepcopy(model.policy.optimizer.state_dict()))
    twin = with_rate("linear")
    twin.ent_coef, twin._batch = 0.5, model._batch
    twin.set_parameters(copy.deepcopy(model.get_parameters()))
    model.train()
    twin.train()
    assert len(captures) == 3
    assert_close(model, twin)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_there_are_graphs_on_cuda_alone(device: str) -> None:
    assert GraphedUpdates(torch.device("cuda")).reason is None
    reason = GraphedUpdates(torch.device(device)).reason
    assert reason == f"the learner is on {device}, not on CUDA"


def halve_the_batch(model: A3C) -> None:
    assert model._batch is not None
    model._batch = model._batch._replace(
        rollout=map_tensors(lambda tensor: tensor[:, :2], model._batch.rollout)
    )


CHANGES: dict[str, Callable[[A3C], Any]] = {
    "limit of the gradient": lambda model: setattr(model, "max_grad_norm", 1e-3),
    "mode": lambda model: model.policy.set_training_mode(False),
    "frozen weights": lambda model: model.policy.value_net.requires_grad_(False),
    "a setting of the optimiser": lambda m: m.policy.optimizer.param_groups[0].update(alpha=0.5),
    "memory of a buffer": lambda model: model.policy.register_buffer("one", torch.ones(1)),
    "size of the batch": halve_the_batch,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_captured_update_cannot_follow_is_captured_anew(
    change: str, captures: list[int]
) -> None:
    eager, replayed = trained("linear"), graphed("linear")
    for model in (eager, replayed):
        for changed in (False, True):
            if changed:
                CHANGES[change](model)
            for _ in range(2):
                update(model)
            assert captures == [1] * (model is replayed) * (1 + changed)
    assert_close(eager, replayed)


@both_optimisers
def test_the_first_update_of_all_is_captured_once(use_rms_prop: bool, captures: list[int]) -> None:
    """It makes the state of the optimiser, and every group of weights has a rate of its own."""
    eager, replayed = trained("linear", use_rms_prop), graphed("linear", use_rms_prop)
    for model in (eager, replayed):
        policy = model.policy
        first, *others = policy.parameters()
        options = {k: v for k, v in policy.optimizer.param_groups[0].items() if k != "params"}
        groups = [{"params": [first], "lr": 1e-2}, {"params": others}]
        policy.optimizer = type(policy.optimizer)(groups, **options)
        for _ in range(3):
            update(model)
    assert captures == [1]
    assert_close(eager, replayed)


@both_optimisers
@pytest.mark.parametrize("message", ["not permitted\nwhile capturing", ""])
def test_a_capture_that_fails_leaves_the_optimiser_as_it_was(
    use_rms_prop: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any) -> Any:
        run()
        raise RuntimeError(message)

    monkeypatch.setattr(ncrl.agents.learning.graph, "record", fail)
    eager, failed = trained("linear", use_rms_prop), graphed("linear", use_rms_prop)
    for model in (eager, failed):
        update(model)
    assert failed.learner.graphed.reason == f"RuntimeError: {message.partition(chr(10))[0]}"
    one, other = eager.policy.optimizer, failed.policy.optimizer
    assert one.param_groups[0].keys() == other.param_groups[0].keys()
    for name, value in one.param_groups[0].items():
        if name != "params":
            assert value == other.param_groups[0][name] and type(value) is type(
                other.param_groups[0][name]
            )
    assert_close(eager, failed)


def test_settings_that_always_change_end_in_eager_updates(
    captures: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = graphed("linear")
    for step in range(MAX_CAPTURES + 3):
        model.ent_coef = 0.01 * step
        model.train()
    assert len(captures) == MAX_CAPTURES
    assert model._n_updates == 2 + MAX_CAPTURES + 3
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        f"updates are not captured as a CUDA graph: settings changed {MAX_CAPTURES} times"
    ]


@pytest.mark.parametrize("trouble", ["moe", "optimiser", "compiled", "capture"])
def test_what_cannot_be_captured_is_made_eagerly_and_said_once(
    trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(run: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(ncrl.agents.learning.graph, "record", fail)
    model = graphed("moe" if trouble == "moe" else "linear")
    expected = "RuntimeError: operation not permitted"
    if trouble == "moe":
        expected = "mixture"
    elif trouble == "optimiser":
        model.policy.optimizer = torch.optim.Adam(model.policy.parameters())
        expected = "Adam cannot leave out a step"
    elif trouble == "compiled":
        model.policy.value_net._orig_mod = None  # type: ignore[assignment]
        expected = "compiled"
    before = [p.clone() for p in model.policy.parameters()]
    model.train()
    model.train()
    (message,) = [r.message for r in caplog.records]
    assert expected in message and "\n" not in message
    assert any(
        not torch.equal(now, then)
        for now, then in zip(model.policy.parameters(), before, strict=True)
    )
