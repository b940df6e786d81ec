"""`grow`: where keys start, what pulls them, what stays, and that it remembers."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl import NeurocoderLinear
from ncrl.neurocoder.composition import ProjectionNetwork
from ncrl.tasks.continual.methods import Grow, make_method
from ncrl.tasks.models.mlp import Coded, SplitMlp
from tests.ncrl.tasks.continual.test_split import assert_goes_on_exactly, make, recipe, run
from tests.reference import cosine

LAYER: dict[str, Any] = dict(
    num_slots=4, num_heads=2, key_dim=3, num_least_used=0, controller="projection", sharpness=20.0
) | dict(residual=False, bias=False)


def network(**changes: Any) -> SplitMlp:
    torch.manual_seed(0)
    return SplitMlp(6, [5], 2, context=True, coded=Coded("neurocoder", LAYER | changes))


def growing(scenario: str = "domain") -> Any:
    plain = recipe(scenario)
    options = {**plain.network_options, "context": True}
    return replace(
        plain, network_options=options, layer="neurocoder", layer_options=LAYER, method="grow"
    )


def literal_query(layer: NeurocoderLinear, x: Tensor) -> Tensor:
    """[H, K] for one input."""
    network = layer.composition
    assert isinstance(network, ProjectionNetwork)
    return (network.projection @ (x - network.center)).view(layer.config.num_heads, -1)


def test_keys_start_at_queries_of_the_task_and_the_rest_stays_bit_for_bit() -> None:
    model = network()
    method = make_method("grow", model, 1.0)
    optimizer = torch.optim.Adam(model.parameters())
    first, second = torch.randn(9, 6), torch.randn(7, 6) + 2
    method.begin_task(first, None)
    (layer, *_) = [m for m in model.modules() if isinstance(m, NeurocoderLinear)]
    assert isinstance(layer.composition, ProjectionNetwork)
    assert torch.allclose(layer.composition.center, first.mean(0))
    keys = layer.memory.keys().clone()
    method.begin_task(second, optimizer)
    assert torch.allclose(layer.composition.center, first.mean(0))  # nothing of later tasks
    after = layer.memory.keys()
    assert torch.equal(after[:, :4], keys) and after.shape == (2, 8, 3)
    for inputs, slots in ((first, range(4)), (second, range(4, 8))):
        possible = torch.stack([literal_query(layer, x) for x in inputs])  # [N, H, K]
        possible = possible / possible.square().sum(2, keepdim=True).sqrt()
        for head in range(2):
            for slot in slots:
                gaps = (possible[:, head] - after[head, slot]).abs().amax(1)
                assert gaps.min() < 1e-5


def test_the_pull_is_read_literally() -> None:
    model = network()
    method = make_method("grow", model, 0.7)
    method.begin_task(torch.randn(9, 6), None)
    method.begin_task(torch.randn(9, 6), None)
    x = torch.randn(3, 6)
    expected = torch.tensor(2.0)
    for layer in (m for m in model.modules() if isinstance(m, NeurocoderLinear)):
        nearest = []
        for head in range(2):
            for b in range(3):
                query = literal_query(layer, x[b])[head]
                new = layer.memory.keys()[head, 4:]  # old keys pull nothing
                nearest.append(max(cosine(query, key).item() for key in new))
        expected = expected + 0.7 * (1 - sum(nearest) / len(nearest))
    assert method.loss(torch.tensor(2.0), x).item() == pytest.approx(float(expected), rel=1e-5)


def test_two_tasks_in_different_places_are_both_known_at_the_end() -> None:
    """The second task has the first one's labels the other way round: plain training forgets."""
    torch.manual_seed(0)
    places = torch.eye(6)[:2] * 4
    inputs = [place + 0.5 * torch.randn(200, 6) for place in places]
    labels = [(inputs[0][:, 5] > 0).long(), (inputs[1][:, 5] < 0).long()]
    right = {}
    models = {"adam": SplitMlp(6, [20], 2), "grow": network(key_dim=16, num_slots=6)}
    for name, model in models.items():
        method = make_method(name, model, 1.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for x, y in zip(inputs, labels, strict=True):
            method.begin_task(x, optimizer)
            for _ in range(150):
                optimizer.zero_grad()
                method.loss(F.cross_entropy(model(x), y), x).backward()
                optimizer.step()
        right[name] = float((model(inputs[0]).argmax(1) == labels[0]).float().mean())
        if isinstance(method, Grow):
            for shares, own in zip(map(method.shares, inputs), (0, 1), strict=True):
                assert all(layer[own] > 0.7 for layer in shares), shares
    assert right["grow"] > 0.8 and right["adam"] < 0.6, right


def test_an_output_layer_of_one_task_has_the_slots_of_that_task_alone(tmp_path: Path) -> None:
    experiment = make(growing("task"))
    heads: list[Any] = list(experiment.model.heads)
    ended: list[dict[str, Tensor]] = []
    after = experiment.after_update

    def noting(update: int) -> None:
        after(update)
        if update + 1 in experiment.ends:
            ended.append(deepcopy(heads[len(ended)].state_dict()))

    experiment.after_update = noting  # type: ignore[method-assign]
    row = run(experiment, tmp_path)
    assert [head.config.num_slots for head in heads] == [4, 4, 4]
    assert [layer.config.num_slots for layer in experiment.model.hidden] == [12]  # type: ignore[attr-defined]
    for head, then in zip(heads, ended, strict=True):
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, then[name]), name
    assert row.parameters == 12 * (6 + 5 + 7) + 3 * 4 * (5 + 2 + 7)
    assert torch.tensor(row.details["slots"]).shape == (3, 1, 3)


@pytest.mark.parametrize("scenario", ["domain", "task"])
@pytest.mark.parametrize("update", [5, 10, 13, 17], ids=["first", "border", "second", "third"])
def test_a_run_that_was_killed_goes_on_exactly(update: int, scenario: str, tmp_path: Path) -> None:
    changed = growing(scenario)
    row = assert_goes_on_exactly(lambda: make(changed), changed, tmp_path, update)
    if scenario == "domain":
        assert row.parameters == 12 * (6 + 5 + 7 + 5 + 2 + 7)
        assert torch.tensor(row.details["slots"]).shape == (3, 2, 3)


def test_models_with_more_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs slots in place of 0\.weight"):
        make_method("grow", nn.Sequential(nn.Linear(3, 2)), 1.0)
