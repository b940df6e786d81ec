"""Methods against forgetting beside their equations, read literally."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl import orthogonal_loss
from ncrl.tasks.continual.methods import (
    DAMPING,
    L2,
    METHODS,
    Ewc,
    Method,
    OnlineEwc,
    Quadratic,
    SynapticIntelligence,
    make_method,
    own_label_loss,
)
from ncrl.tasks.models.mlp import SplitMlp
from tests.ncrl.tasks.continual.test_gradients import NEUROCODER, loop, split

IN, OUT, COEF = 6, 5, 3.0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, OUT)).double()


def inputs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, IN, dtype=torch.float64, generator=generator)


def move(model: nn.Module, amount: float) -> None:
    """As if a task had been learnt."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn_like(parameter)


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def fisher(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [total / len(x) for total in loop(model, own_label_loss, x).squares.values()]


def penalty(model: nn.Module, terms: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    """coef * sum over terms of Omega (theta - theta*)^2."""
    total = torch.zeros((), dtype=torch.float64)
    for importance, anchor in terms:
        for p, omega, star in zip(model.parameters(), importance, anchor, strict=True):
            total = total + (omega * (p - star) ** 2).sum()
    return COEF * total


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same_gradients(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "grow"])
def test_the_first_task_is_plain_training(name: str) -> None:
    model = network()
    loss = model(inputs(0)).square().mean()
    assert make_method(name, model, COEF).loss(loss) is loss


def two_tasks(method: Method) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Ends of two tasks; Fisher information and weights at each."""
    terms = []
    for task in range(2):
        move(method.model, 0.3)
        x = inputs(task)
        terms.append((fisher(method.model, x), values(method.model)))
        method.end_task(x, own_label_loss)
    move(method.model, 0.3)
    return terms


def test_ewc_has_a_term_for_every_task_but_for_a_constant() -> None:
    model = network()
    method = Ewc(model, COEF)
    terms = two_tasks(method)
    constants = []
    for _ in range(3):
        move(model, 0.3)
        ours, theirs = (model(inputs(3)).square().mean() for _ in range(2))
        assert_same_gradients(model, method.loss(ours), theirs + penalty(model, terms))
        constants.append((method.penalty() - penalty(model, terms)).item())
    assert constants == pytest.approx([constants[0]] * 3, abs=1e-9)


@pytest.mark.parametrize("kind", [OnlineEwc, L2])
def test_there_is_one_anchor_with_summed_information_or_with_all_weights_alike(
    kind: type[Quadratic],
) -> None:
    model = network()
    method = kind(model, COEF)
    (first, _), (second, anchor) = two_tasks(method)
    importance = [a + b for a, b in zip(first, second, strict=True)]
    if kind is L2:
        importance = [torch.ones_like(p) for p in model.parameters()]
    expected = penalty(model, [(importance, anchor)])
    torch.testing.assert_close(method.penalty(), expected)
    assert_same_gradients(model, method.penalty(), expected)


def test_fisher_information_is_measured_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 8), nn.Dropout(0.5), nn.Linear(8, OUT)).double()
    x = inputs(0)
    model.eval()
    expected = fisher(model, x)
    model.train()
    found = OnlineEwc(model, COEF).fisher(x, own_label_loss)
    assert model.training and model[1].training
    torch.testing.assert_close(list(found.values()), expected)


def test_extra_loss_is_in_every_samples_gradient() -> None:
    """The authors' quirk: each sample's gradient is of cross-entropy plus orthogonality loss."""
    torch.manual_seed(0)
    model = split("neurocoder", residual=False, **NEUROCODER).double()
    x = inputs(0)

    def extra() -> Tensor:
        return 0.7 * orthogonal_loss(model)

    sums = loop(model, lambda call, sample: own_label_loss(call, sample) + extra(), x)
    expected = [total / len(x) for total in sums.squares.values()]
    method = OnlineEwc(model, COEF)
    method.extra_loss = extra
    ours = method.fisher(x, own_label_loss)
    torch.testing.assert_close(list(ours.values()), expected, rtol=1e-6, atol=1e-9)


def test_synaptic_intelligence_follows_the_path() -> None:
    """Two tasks with an optimiser with momentum, beside the definition."""
    model = network()
    method = SynapticIntelligence(model, COEF)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    importance = [torch.zeros_like(p) for p in model.parameters()]
    anchor: list[Tensor] | None = None
    for task in range(2):
        start, path = values(model), [torch.zeros_like(p) for p in model.parameters()]
        for step in range(6):
            x = inputs(10 * task + step)
            loss = F.cross_entropy(model(x), torch.arange(len(x)) % OUT)
            of_task = gradients(model, F.cross_entropy(model(x), torch.arange(len(x)) % OUT))
            before = values(model)
            optimizer.zero_grad()
            method.loss(loss).backward()
            optimizer.step()
            method.after_update()
            for total, gradient, old, new in zip(path, of_task, before, values(model), strict=True):
                total -= gradient * (new - old)
        for omega, total, old, new in zip(importance, path, start, values(model), strict=True):
            omega += total.clamp_min(0) / ((new - old) ** 2 + DAMPING)
        anchor = values(model)
        method.end_task(inputs(0), own_label_loss)
    assert anchor is not None
    assert any(bool((omega > 0).any()) for omega in importance)
    torch.testing.assert_close(list(method.importance.values()), importance)
    move(model, 0.1)
    assert_same_gradients(model, method.penalty(), penalty(model, [(importance, anchor)]))


def test_heads_of_other_tasks_have_no_information() -> None:
    torch.manual_seed(0)
    model = SplitMlp(IN, [8], 2, num_tasks=2).double()
    method = OnlineEwc(model, COEF)
    method.end_task(inputs(0), partial(own_label_loss, task=1))
    assert not method.importance["heads.0.weight"].any()
    assert method.importance["heads.1.weight"].any()


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("adam", "adagrad", "grow")]
)
def test_what_a_method_remembers_can_be_restored(name: str) -> None:
    model = network()
    method = make_method(name, model, COEF)
    two_tasks(method)
    again = make_method(name, model, COEF)
    again.restore(deepcopy(method.state()))
    assert isinstance(method, Quadratic) and isinstance(again, Quadratic)
    for each in (method, again):
        each.end_task(inputs(5), own_label_loss)
    move(model, 0.3)
    torch.testing.assert_close(again.penalty(), method.penalty())


@pytest.mark.parametrize("name", ["l2", "si", "ewc"])
def test_restored_tensors_lie_where_the_parameters_are(name: str) -> None:
    """As checkpoints are read to the CPU; the meta device stands in for a GPU."""
    method = make_method(name, network(), COEF)
    two_tasks(method)
    elsewhere = make_method(name, network().to("meta"), COEF)
    elsewhere.restore(method.state())
    for tensors in elsewhere.state().values():
        assert tensors and all(tensor.is_meta for tensor in tensors.values())


def test_bad_names_and_coefficients_are_refused() -> None:
    with pytest.raises(ValueError, match="nearest: online-ewc"):
        make_method("onlin-ewc", network(), 1.0)
    with pytest.raises(ValueError, match="coef must be at least 0, got -1"):
        make_method("l2", network(), -1.0)


@pytest.mark.parametrize("name", ["si", "ewc"])
def test_a_state_of_another_network_is_refused(name: str) -> None:
    """Before any of the fused loops over it, which trust shapes and names."""
    method = make_method(name, nn.Linear(3, 2), 1.0)
    state = make_method(name, nn.Linear(3, 4), 1.0).state()
    with pytest.raises(ValueError, match=r"weight must be torch.float32 of shape \[2, 3\]"):
        method.restore(state)
    with pytest.raises(ValueError, match="of other parameters"):
        method.restore({**method.state(), "anchor": {"x": torch.zeros(1)}})
    with pytest.raises(ValueError, match="must be a tensor"):
        method.restore({**method.state(), "importance": {"weight": 1, "bias": 2}})
