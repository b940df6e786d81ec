"""Networks of the experiments: shapes, gradients, and values against literal readings."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl.layers import LAYERS
from ncrl.tasks.models import (
    NETWORKS,
    DenseNet,
    GruRegressor,
    LeNet,
    Mlp,
    ProjectedLinear,
    ResNet18,
    SplitMlp,
)
from ncrl.tasks.models.mlp import Coded, dense_layers
from ncrl.tasks.recipes import Recipe
from tests.reference import dot, sigmoid

LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "neurocoder": {"num_slots": 4, "num_steps": 2, "num_heads": 2, "num_least_used": 1},
    "hypernet": {"num_layers": 2, "hidden": 5},
    "film": {"num_layers": 2, "hidden": 5},
    "moe": {"num_experts": 3, "top_k": 3},
    "nsm": {"num_slots": 3, "key_dim": 2},
}


class Case(NamedTuple):
    network: str
    options: dict[str, Any]
    inputs: tuple[int, ...]
    """Of one batch; 7 stands for the batch."""
    outputs: tuple[int, ...]


CASES = [
    Case("projected_linear", {"in_features": 16, "num_features": 6}, (7, 4, 4), (7, 10)),
    Case("mlp", {"in_features": 12, "hidden": [9, 8], "num_outputs": 5}, (7, 3, 4), (7, 5)),
    Case("mlp", {"in_features": 12, "hidden": [], "num_outputs": 5}, (7, 12), (7, 5)),
    Case("split_mlp", {"in_features": 16, "hidden": [9], "num_outputs": 2}, (7, 4, 4), (7, 2)),
    Case("lenet", {"num_outputs": 4}, (7, 3, 32, 32), (7, 4)),
    Case("densenet", {"depth": 7, "growth": 3}, (7, 3, 8, 8), (7, 10)),
    Case("gru", {"hidden_size": 6}, (3, 7, 2), (3, 7, 1)),
    Case(
        "ntm",
        {"controller_size": 12, "num_rows": 5, "row_size": 4, "num_outputs": 3},
        (3, 7, 10),
        (3, 7, 3),
    ),
]


def make(case: Case, layer: str = "linear") -> nn.Module:
    return NETWORKS[case.network](**case.options, coded=Coded(layer, LAYER_OPTIONS[layer]))


def outputs_of(network: nn.Module, x: Tensor) -> Tensor:
    y = network(x)
    return y[0] if isinstance(y, tuple) else y


def resized(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    return tuple(batch if size == 7 else size for size in shape)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.network)
@pytest.mark.parametrize("layer", list(LAYERS))
def test_gradients_reach_every_parameter(case: Case, layer: str) -> None:
    torch.manual_seed(0)
    network = make(case, layer)
    with torch.no_grad():  # away from starts at zero, behind which nothing has a gradient
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1 * parameter.shape[-1] ** -0.5)
    y = outputs_of(network, torch.randn(case.inputs))
    assert y.shape == case.outputs
    (y * torch.randn_like(y)).sum().backward()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in trained.values() if p.grad is not None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.network)
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_equal_part_of_a_batch(case: Case, batch: int) -> None:
    torch.manual_seed(1)
    network = make(case, "neurocoder").eval().double()
    x = torch.randn(case.inputs, dtype=torch.float64)
    over = case.inputs.index(7)
    with torch.no_grad():
        whole = outputs_of(network, x).narrow(case.outputs.index(7), 0, batch)
        part = outputs_of(network, x.narrow(over, 0, batch))
    assert part.shape == resized(case.outputs, batch)
    torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


def test_coded_layers_are_counted_from_the_output() -> None:
    def kinds(num_coded: int | None) -> list[str]:
        layers = dense_layers([4, 3, 3, 2], Coded("film"), num_coded=num_coded)
        return [type(layer).__name__ for layer in layers]

    assert kinds(None) == kinds(3) == ["FiLMLinear"] * 3
    assert kinds(1) == ["Linear", "Linear", "FiLMLinear"]
    assert kinds(0) == ["Linear"] * 3
    for impossible in (-1, 4):
        with pytest.raises(ValueError, match=rf"num_coded.*0 \.\. 3.*{impossible}"):
            kinds(impossible)


@pytest.mark.parametrize("hidden", [[0], [-3], [2.5]])
def test_impossible_widths_are_refused(hidden: list[Any]) -> None:
    with pytest.raises(ValueError, match="width must be an integer of at least 1"):
        Recipe(network="mlp", network_options={"in_features": 4, "hidden": hidden})


@pytest.mark.parametrize(
    ("network", "options", "name"),
    [
        ("projected_linear", {}, "in_features num_features num_outputs"),
        ("split_mlp", {"in_features": 2, "hidden": [2], "num_outputs": 2}, "num_tasks"),
        ("densenet", {}, "num_outputs growth"),
        ("gru", {"hidden_size": 2}, "hidden_size"),
        ("ntm", {}, "in_features num_outputs controller_size num_rows row_size"),
    ],
)
@pytest.mark.parametrize("size", [0, -1, 1.5, "3", True])
def test_impossible_sizes_are_refused(
    network: str, options: dict[str, Any], name: str, size: Any
) -> None:
    for one in name.split():
        with pytest.raises(ValueError, match=rf"{one} must be an integer of at least 1, got"):
            Recipe(network=network, network_options=options | {one: size})


def test_biases_follow_the_layers_options() -> None:
    biased = {n for n, _ in SplitMlp(4, [3, 3], 2).named_parameters() if n.endswith("bias")}
    assert biased == {"heads.0.bias"}  # hidden layers of Hsu et al. have none
    coded = SplitMlp(4, [3], 2, coded=Coded("film", {"bias": True}))
    assert coded.hidden[0].linear.bias is not None


def test_mlp_is_the_composition_of_its_layers() -> None:
    torch.manual_seed(2)
    network = Mlp(6, [5, 4], 3).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    w = {n: p.detach() for n, p in network.named_parameters()}
    hidden = (x @ w["layers.0.weight"].T + w["layers.0.bias"]).clamp(min=0)
    hidden = (hidden @ w["layers.1.weight"].T + w["layers.1.bias"]).clamp(min=0)
    expected = hidden @ w["layers.2.weight"].T + w["layers.2.bias"]
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_every_task_has_its_own_head() -> None:
    torch.manual_seed(3)
    network = SplitMlp(6, [5], 2, num_tasks=3)
    x = torch.randn(4, 6)
    answers = [network(x, task) for task in range(3)]
    assert not torch.equal(answers[0], answers[1])
    answers[1].sum().backward()
    assert network.heads[1].weight.grad is not None
    assert network.heads[0].weight.grad is None and network.heads[2].weight.grad is None
    with pytest.raises(IndexError):
        network(x, 3)


def test_the_projection_is_fixed_saved_and_keeps_the_scale() -> None:
    torch.manual_seed(4)
    network = ProjectedLinear()
    assert network.projection.shape == (784, 200)
    assert "projection" in network.state_dict()
    assert "projection" not in dict(network.named_parameters())
    assert abs(float(network.projection.std()) * 28 - 1) < 0.02
    other = ProjectedLinear()
    assert not torch.equal(other.projection, network.projection)
    other.load_state_dict(network.state_dict())
    x = torch.randn(2, 784)
    torch.testing.assert_close(other(x), network(x))


def test_lenet_is_what_its_docstring_says() -> None:
    torch.manual_seed(5)
    network = LeNet().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    w = {n: p.detach() for n, p in network.named_parameters()}
    assert w["conv1.weight"].shape == (20, 3, 5, 5) and w["conv2.weight"].shape == (50, 20, 5, 5)
    maps = images
    for name in ("conv1", "conv2"):
        maps = F.conv2d(F.pad(maps, (2, 2, 2, 2)), w[f"{name}.weight"], w[f"{name}.bias"])
        maps = maps.clamp(min=0).unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    features = maps.reshape(2, 3200)
    for index in range(4):
        prefix = f"classifier.layers.{index}"
        features = features @ w[f"{prefix}.weight"].T + w[f"{prefix}.bias"]
        if index < 3:
            features = features.clamp(min=0)
    torch.testing.assert_close(network(images), features, rtol=1e-10, atol=1e-10)


def normalised(state: Mapping[str, Tensor], prefix: str, maps: Tensor) -> Tensor:
    """Batch norm in eval mode."""

    def column(name: str) -> Tensor:
        return state[f"{prefix}.{name}"].view(1, -1, 1, 1)

    scale = column("weight") / torch.sqrt(column("running_var") + 1e-5)
    return (maps - column("running_mean")) * scale + column("bias")


def randomised(network: nn.Module) -> dict[str, Tensor]:
    """The state after giving batch norms statistics that differ from 0 and 1."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                tensor.normal_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_densenet_equals_a_literal_reading() -> None:
    torch.manual_seed(6)
    depth, growth = 10, 3  # two layers per block
    network = DenseNet(5, depth=depth, growth=growth).double().eval()
    state = randomised(network)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stage = 0
    maps = F.conv2d(images, state["stages.0.weight"], padding=1)
    for block in range(3):
        if block:
            stage += 1
            maps = normalised(state, f"stages.{stage}.norm", maps).clamp(min=0)
            maps = F.conv2d(maps, state[f"stages.{stage}.conv.weight"])
            maps = maps.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
        for _ in range(2):
            stage += 1
            new = normalised(state, f"stages.{stage}.norm", maps).clamp(min=0)
            new = F.conv2d(new, state[f"stages.{stage}.conv.weight"], padding=1)
            assert new.shape[1] == growth
            maps = torch.cat([maps, new], dim=1)
    assert maps.shape == (2, 16 + 3 * 2 * growth, 2, 2)
    features = normalised(state, "norm", maps).clamp(min=0).mean(dim=(2, 3))
    expected = features @ state["output.weight"].T + state["output.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [4, 6, 99])
def test_impossible_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth.*{depth}"):
        DenseNet(depth=depth)


def torchvision_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in torchvision's `resnet18` weights."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            prefix = f"layer{stage}.{block}"
            shapes[f"{prefix}.conv1.weight"] = (channels, width, 3, 3)
            shapes[f"{prefix}.conv2.weight"] = (channels, channels, 3, 3)
            norms |= {f"{prefix}.bn1": channels, f"{prefix}.bn2": channels}
            if channels != width:
                shapes[f"{prefix}.downsample.0.weight"] = (channels, width, 1, 1)
                norms[f"{prefix}.downsample.1"] = channels
            width = channels
    for name, channels in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes | {"fc.weight": (1000, 512), "fc.bias": (1000,)}


def test_resnet_has_torchvisions_names_and_shapes() -> None:
    with torch.device("meta"):
        network = ResNet18()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == torchvision_shapes()
    assert len(shapes) == 122
    assert sum(p.numel() for p in network.parameters()) == 11_689_512


def test_resnet_equals_a_literal_reading() -> None:
    torch.manual_seed(7)
    network = ResNet18(6).double().eval()
    state = randomised(network)

    def conv(name: str, maps: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(maps, weight, stride=stride, padding=weight.shape[2] // 2)

    images = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    maps = normalised(state, "bn1", conv("conv1", images, 2)).clamp(min=0)
    maps = F.pad(maps, (1, 1, 1, 1), value=-float("inf"))
    maps = maps.unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(4, 5))
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            prefix = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            hidden = normalised(state, f"{prefix}.bn1", conv(f"{prefix}.conv1", maps, stride))
            hidden = normalised(
                state, f"{prefix}.bn2", conv(f"{prefix}.conv2", hidden.clamp(min=0))
            )
            if stride == 2:
                maps = conv(f"{prefix}.downsample.0", maps, stride)
                maps = normalised(state, f"{prefix}.downsample.1", maps)
            maps = (hidden + maps).clamp(min=0)
    expected = maps.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-9, atol=1e-9)


def slow_gru(w: Mapping[str, Tensor], x: Tensor, hidden: Tensor) -> Tensor:
    """One timestep for one sequence: Cho et al. 2014 with torch's gate order r, z, n."""
    h = len(hidden)
    rows = []
    for i in range(3 * h):
        from_x = dot(w["weight_ih_l0"][i], x) + w["bias_ih_l0"][i]
        from_h = dot(w["weight_hh_l0"][i], hidden) + w["bias_hh_l0"][i]
        rows.append((from_x, from_h))
    new = []
    for i in range(h):
        reset = sigmoid(sum(rows[i]))
        update = sigmoid(sum(rows[h + i]))
        candidate = torch.tanh(rows[2 * h + i][0] + reset * rows[2 * h + i][1])
        new.append((1 - update) * candidate + update * hidden[i])
    return torch.stack(new)


def test_gru_equals_a_loop() -> None:
    torch.manual_seed(9)
    network = GruRegressor(4).double()
    inputs = torch.randn(5, 2, 2, dtype=torch.float64)
    state = torch.randn(1, 2, 4, dtype=torch.float64)
    outputs, last = network(inputs, state)
    w = dict(network.gru.named_parameters())
    for b in range(2):
        hidden = state[0, b]
        for t in range(5):
            hidden = slow_gru(w, inputs[t, b], hidden)
            expected = dot(network.output.weight[0], hidden) + network.output.bias[0]
            torch.testing.assert_close(outputs[t, b, 0], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(last[0, b], hidden, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c.network in ("gru", "ntm")])
def test_a_sequence_in_two_parts_equals_the_whole(case: Case) -> None:
    torch.manual_seed(10)
    network: Callable[..., Any] = make(case, "neurocoder").double()
    inputs = torch.randn(6, 2, case.inputs[2], dtype=torch.float64)
    whole, last = network(inputs)
    first, state = network(inputs[:2])
    second, state = network(inputs[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for actual, expected in zip(state, last, strict=True):
        torch.testing.assert_close(actual, expected)
