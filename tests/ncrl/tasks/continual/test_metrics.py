"""Numbers made of accuracy matrices and of composed weights."""

import pytest
import torch
from torch import nn

from ncrl.layers import make_layer
from ncrl.tasks.continual import metrics
from ncrl.tasks.models.mlp import Coded, SplitMlp
from tests.ncrl.tasks.continual.test_gradients import NEUROCODER

A = torch.tensor([[90.0, 40.0, 50.0], [95.0, 80.0, 45.0], [60.0, 85.0, 70.0]])


def test_numbers_of_an_accuracy_matrix() -> None:
    assert metrics.final_accuracy(A) == pytest.approx((60 + 85 + 70) / 3)
    assert metrics.learning_accuracy(A) == pytest.approx((90 + 80 + 70) / 3)
    # Task 0 was best, 95, after task 1; task 1 ends above its best so far, 80.
    assert metrics.forgetting(A) == pytest.approx(((95 - 60) + (80 - 85)) / 2)
    assert metrics.backward_transfer(A) == pytest.approx(((60 - 90) + (85 - 80)) / 2)


def test_one_task_cannot_be_forgotten() -> None:
    assert metrics.forgetting(A[:1, :1]) == metrics.backward_transfer(A[:1, :1]) == 0


def test_weights_of_low_rank_are_seen_as_such() -> None:
    torch.manual_seed(0)
    model = SplitMlp(20, [15, 10], 2, hidden_rank=1)
    found = metrics.describe_weights(model, torch.randn(3, 20))
    assert list(found) == ["hidden.0", "hidden.1", "heads.0"]
    assert found["hidden.0"].rank == pytest.approx(1, abs=1e-4)
    assert found["hidden.0"].attention is None
    eye = SplitMlp(6, [6], 2)
    with torch.no_grad():
        eye.hidden[0].weight.copy_(torch.eye(6))
    assert metrics.describe_weights(eye, torch.randn(3, 6))["hidden.0"].rank == pytest.approx(6)


@pytest.mark.parametrize("layer", ["neurocoder", "nsm"])
def test_composed_weights_are_those_that_are_applied(layer: str) -> None:
    torch.manual_seed(0)
    options = NEUROCODER if layer == "neurocoder" else {"num_slots": 3, "bias": False}
    model = SplitMlp(6, [5], 2, num_tasks=2, coded=Coded(layer, options))
    x = torch.randn(4, 6)
    found = metrics.describe_weights(model, x, 1)
    assert list(found) == ["hidden.0", "heads.1"]
    hidden = model.hidden[0]
    matrices = hidden.program(x)
    s = torch.linalg.svdvals(matrices)
    ranks = s.square().sum(1).square() / s.pow(4).sum(1)
    assert found["hidden.0"].rank == pytest.approx(ranks.mean().item(), rel=1e-4)
    attention = hidden.attend(x)
    largest = attention.max() if layer == "nsm" else torch.stack(attention).max()
    assert found["hidden.0"].attention == pytest.approx(largest.item())
    # Nothing is left behind.
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["hypernet", "film", "moe"])
def test_layers_without_a_stored_matrix_have_no_rank(kind: str) -> None:
    """Nor do the networks inside them count for theirs."""
    found = metrics.describe_weights(nn.Sequential(make_layer(kind, 6, 4)), torch.randn(3, 6))
    assert found == {"0": metrics.Weights(None, None)}


def test_networks_inside_a_layer_are_not_layers_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 2)))
    found = metrics.describe_weights(model, torch.randn(2, 6))
    assert list(found) == ["0", "1.1"]
