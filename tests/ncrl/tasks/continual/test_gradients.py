"""Sums of per-sample gradients beside a literal loop over samples."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.baselines import FiLMLinear, HyperNetLinear, NSMLinear
from ncrl.baselines.lowrank import LowRankLinear
from ncrl.tasks.continual import gradients as gradients_module
from ncrl.tasks.continual.gradients import CHUNK, SampleGradients, SampleLoss, Sums
from ncrl.tasks.continual.methods import own_label_loss
from ncrl.tasks.models.mlp import Coded, SplitMlp

IN, OUT = 6, 5


def loop(model: nn.Module, loss: SampleLoss, inputs: Tensor) -> Sums:
    """One backward pass for every sample."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    second = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    for index in range(len(inputs)):
        value = loss(model, inputs[index : index + 1])
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        for name, gradient in zip(names, gradients, strict=True):
            first[name] += gradient
            second[name] += gradient**2
    return Sums(first, second)


def gradient_sums(model: nn.Module, loss: SampleLoss, inputs: Tensor, chunk: int = 4) -> Sums:
    return SampleGradients(model, loss, inputs[0]).sums(inputs, chunk=chunk)


def assert_same(found: Sums, expected: Sums) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(
                ours[name], value, rtol=1e-6, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


class Odd(nn.Module):
    """Weights used twice, transposed, sliced, and in no product at all."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Parameter(torch.randn(IN, IN))
        self.wide = nn.Parameter(torch.randn(OUT, 2 * IN))
        self.scale = nn.Parameter(torch.randn(OUT))
        self.unused = nn.Parameter(torch.randn(3, 2))
        self.frozen = nn.Parameter(torch.randn(IN), requires_grad=False)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.tied).tanh() @ self.tied.T + self.frozen
        x = x + self.conv(x.unsqueeze(1)).mean(1)
        return (x @ self.wide[:, :IN].T + x @ self.wide[:, IN:].T * 0.5) * self.scale


class Split(nn.Module):
    """Weights made of others, and a parameter that is split; `whole` uses it unsplit as well."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.pieces = nn.Parameter(torch.randn(2, IN * OUT + OUT))
        self.rectified = nn.Parameter(torch.randn(IN, IN))
        self.first, self.second = (nn.Parameter(torch.randn(n, IN)) for n in (2, OUT - 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.rectified.relu()
        weights, biases = torch.split(self.pieces, [IN * OUT, OUT], dim=1)
        y = torch.matmul(x, weights.view(2, IN, OUT)) + biases.unsqueeze(1)  # [2, B, OUT]
        y = y.prod(0) + F.linear(x, torch.cat([self.first, self.second]))
        return y * self.pieces.mean() if self.whole else y


class Generated(nn.Module):
    """A matrix that follows from the sample, on the right of a product, as of a hypernetwork."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, IN), nn.Linear(IN, IN * OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        generated = self.second(x)
        y = x.unsqueeze(1) @ generated.view(-1, IN, OUT)  # [B, 1, OUT]
        return y.squeeze(1) + generated[:, :OUT]


NEUROCODER = {"num_slots": 7, "num_heads": 2, "key_dim": 3, "controller_size": 4}


def split(layer: str, **options: object) -> SplitMlp:
    return SplitMlp(IN, [9, 8], OUT, coded=Coded(layer, options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "odd": Odd,
    "split": lambda: Split(whole=False),
    "changed in place": lambda: nn.Sequential(
        *(nn.Linear(IN, 5, bias=False), nn.ReLU(inplace=True)),
        *(nn.Linear(5, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, OUT)),
    ),
    "split and whole": lambda: Split(whole=True),
    "generated": Generated,
    "mlp": lambda: SplitMlp(IN, [9, 8], OUT),
    "low rank": lambda: SplitMlp(IN, [9, 8], OUT, hidden_rank=2),
    "neurocoder": lambda: split("neurocoder", residual=False, **NEUROCODER),
    "neurocoder, steps": lambda: split("neurocoder", num_steps=2, **NEUROCODER),
    "official": lambda: split("neurocoder", preset="official", residual=False, **NEUROCODER),
    "official, residual": lambda: split("neurocoder", preset="official", **NEUROCODER),
    "nsm": lambda: split("nsm", num_slots=3, key_dim=2),
    "nsm, biases": lambda: NSMLinear(IN, OUT, num_slots=2, key_dim=2, bias=True),
    "film": lambda: nn.Sequential(nn.Linear(IN, 4), nn.ReLU(), FiLMLinear(4, OUT, hidden=3)),
    "hypernet": lambda: HyperNetLinear(IN, OUT, hidden=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_sums_equal_a_loop_over_samples(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(7, IN, dtype=torch.float64)
    found = gradient_sums(model, own_label_loss, x, chunk=3)  # chunks of 3, 3 and 1
    assert_same(found, loop(model, own_label_loss, x))
    if name == "odd":
        assert "frozen" not in found.squares
        assert not found.squares["unused"].any()


def test_the_batch_may_have_the_size_of_anything_else() -> None:
    """As many samples as slots: nothing may take the one axis for the other."""
    torch.manual_seed(0)
    model = split("neurocoder", **NEUROCODER).double()
    x = torch.randn(NEUROCODER["num_slots"], IN, dtype=torch.float64)
    assert_same(gradient_sums(model, own_label_loss, x), loop(model, own_label_loss, x))


def test_other_losses_and_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(IN, OUT)).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(call: Callable[..., Tensor], sample: Tensor) -> Tensor:
        outputs = call(sample)
        return F.mse_loss(outputs, torch.ones_like(outputs), reduction="sum") + sample.sum()

    assert_same(gradient_sums(model, loss, x), loop(model, loss, x))


def test_a_gradient_that_no_sample_changes_counts_for_each() -> None:
    model = LowRankLinear(2, 2, rank=1, bias=False)

    def loss(call: Callable[..., Tensor], sample: Tensor) -> Tensor:
        return call(torch.ones(1, 2)).sum() + 0 * sample.sum()

    found = gradient_sums(model, loss, torch.zeros(5, 2))
    assert_same(found, loop(model, loss, torch.zeros(5, 2)))


@pytest.mark.parametrize("ends", [(-2, 2), (6, 2), (-1, -3), (99, -99)])
def test_slices_of_a_weight_that_overlap(ends: tuple[int, int]) -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(OUT, 8))

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.weight[:, : ends[0]], self.weight[:, ends[1] :]
            return x[:, : left.shape[1]] @ left.T + x[:, -right.shape[1] :] @ right.T

    torch.manual_seed(0)
    model, x = Sliced().double(), torch.randn(5, 8, dtype=torch.float64)
    assert_same(gradient_sums(model, own_label_loss, x), loop(model, own_label_loss, x))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2000, 2000, bias=False), nn.Linear(2000, 2, bias=False)),
        NSMLinear(2000, 400, num_slots=5, key_dim=5),
    ],
    ids=["linear", "nsm"],
)
def test_large_models_take_no_gradients_of_their_own_size(model: nn.Module) -> None:
    """256 gradients of these models would be 4 GB."""
    x = torch.randn(256, 2000)
    with torch.profiler.profile(profile_memory=True) as profile:
        gradient_sums(model, own_label_loss, x, chunk=256)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 256 * 2000 * 2000  # bytes; a quarter of what floats would take


@pytest.mark.parametrize(("most_numbers", "largest"), [(1, 1), (3 * 20, 3), (1 << 28, CHUNK)])
def test_large_gradients_come_in_small_chunks(
    most_numbers: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution's gradient is no thin product: 20 numbers for each of these samples."""
    monkeypatch.setattr(gradients_module, "MOST_NUMBERS", most_numbers)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 5, bias=False), nn.Flatten()).double()
    x = torch.randn(8, 1, 5, dtype=torch.float64)
    gradients = SampleGradients(model, own_label_loss, x[0])
    assert gradients._chunk == largest
    assert_same(gradients.sums(x), loop(model, own_label_loss, x))


def test_no_samples_are_refused() -> None:
    gradients = SampleGradients(nn.Linear(2, 2), own_label_loss, torch.zeros(2))
    with pytest.raises(ValueError, match="no samples"):
        gradients.sums(torch.zeros(0, 2))


def test_weights_may_change_between_calls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 4), nn.BatchNorm1d(4), nn.Linear(4, OUT)).double()
    model.eval()
    x = torch.randn(5, IN, dtype=torch.float64)
    gradients = SampleGradients(model, own_label_loss, x[0])
    gradients.sums(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
            tensor += torch.rand_like(tensor)
    assert_same(gradients.sums(x[:3]), loop(model, own_label_loss, x[:3]))
