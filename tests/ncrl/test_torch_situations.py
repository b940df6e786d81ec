"""Whatever works for `nn.Linear` works for every layer in its seat."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from ncrl import NeurocoderConfig, inject
from ncrl.layers import make_layer
from ncrl.seat import LinearSeat

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "neurocoder": {"num_slots": 6, "num_heads": 2},
    "neurocoder-steps": {"num_slots": 6, "num_heads": 2, "num_steps": 2},
    "neurocoder-linear": {
        **{"num_slots": 6, "num_heads": 2, "controller": "linear", "gate": "head"},
        "learned_sharpness": True,
    },
    "neurocoder-detached": {
        **{"num_slots": 6, "num_heads": 2, "num_steps": 2, "gate": "slot"},
        **{"detach_usage": True, "residual_rank": 2},
    },
    "neurocoder-without-gate": {"num_slots": 6, "num_heads": 2, "residual_gate": False},
    "neurocoder-projection": {
        **{"num_slots": 6, "num_heads": 2, "controller": "projection", "num_least_used": 0},
    },
    "neurocoder-official": {"num_slots": 6, "num_heads": 2, "num_steps": 2, "preset": "official"},
    "hypernet": {"hidden": 5},
    "film": {"hidden": 5},
    "moe": {"num_experts": 3},
    "nsm": {"num_slots": 3},
}
every_layer = pytest.mark.parametrize("name", OPTIONS)


def make(name: str, in_features: int = 4, out_features: int = 3, seed: int = 0) -> nn.Module:
    """In eval mode, with parameters away from their start."""
    torch.manual_seed(seed)
    layer = make_layer(name.split("-")[0], in_features, out_features, **OPTIONS[name])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@every_layer
def test_compiled_in_one_piece(name: str) -> None:
    layer, x = make(name), inputs(5, 4)
    torch.testing.assert_close(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
    )


@every_layer
def test_traced_by_make_fx_with_its_gradient(name: str) -> None:
    layer, x, other = make(name), inputs(5, 4), -inputs(5, 4)
    torch.testing.assert_close(make_fx(layer)(x)(other), layer(other))

    def slope(z: Tensor) -> Tensor:
        return grad(lambda z: layer(z).square().sum())(z)

    torch.testing.assert_close(make_fx(slope)(x)(other), slope(other))


@every_layer
def test_a_leaf_of_torch_fx(name: str) -> None:
    """Like all modules that are not torch's own, it has to be named as a leaf."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, LinearSeat) or super().is_leaf_module(m, name)

    model, x = nn.Sequential(make(name), nn.ReLU()), inputs(5, 4)
    torch.testing.assert_close(fx.GraphModule(model, Tracer().trace(model))(x), model(x))


@every_layer
def test_exported_with_a_free_batch(name: str) -> None:
    layer = make(name)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (inputs(5, 4),), dynamic_shapes=shapes).module()
    for batch in (2, 9):
        torch.testing.assert_close(exported(inputs(batch, 4)), layer(inputs(batch, 4)))


@pytest.mark.parametrize("name", ["neurocoder-steps", "neurocoder-official"])
@pytest.mark.filterwarnings("ignore")
def test_exported_with_a_free_batch_by_the_older_onnx_exporter(name: str) -> None:
    layer = make(name)
    check_older_onnx(layer, inputs(5, 4), inputs(3, 4))


@pytest.mark.filterwarnings("ignore")
def test_attention_exported_with_a_free_batch_by_the_older_onnx_exporter() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.attention(x, x, x, padding)[0]

    host = Host().eval()
    inject(host, NeurocoderConfig(num_slots=6), "*_proj")
    paddings = (torch.arange(7).expand(batch, 7) > 4 for batch in (2, 3))
    check_older_onnx(host, *zip((inputs(2, 7, 4), inputs(3, 7, 4)), paddings, strict=True))


def check_older_onnx(module: nn.Module, example: Any, other: Any) -> None:
    """Numbers of an exported file for other inputs than those that the exporter was shown."""
    example, other = (x if isinstance(x, tuple) else (x,) for x in (example, other))
    names = [f"x{index}" for index in range(len(example))]
    axes = {name: {0: "batch"} for name in names}
    file = io.BytesIO()
    torch.onnx.export(module, example, file, input_names=names, dynamic_axes=axes, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, other, strict=True)})
    torch.testing.assert_close(torch.as_tensor(found), module(*other), rtol=1e-4, atol=1e-5)


@every_layer
def test_per_sample_gradients_and_ensembles(name: str) -> None:
    layer, x = make(name), inputs(5, 4)
    torch.testing.assert_close(vmap(layer)(x), layer(x))
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, values, (row[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for n, parameter in layer.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[n].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)
    members = [make(name, seed=seed) for seed in range(3)]
    stacked, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    together = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(stacked, buffers)
    torch.testing.assert_close(together[2], members[2](x))


@every_layer
def test_jacobians_and_checkpoints(name: str) -> None:
    """By forward and by backward mode, and by one backward pass for each output."""
    layer, x = make(name), inputs(4).requires_grad_()
    rows = [torch.autograd.grad(output, x, retain_graph=True)[0] for output in layer(x)]
    for found in (jacrev(layer)(x), jacfwd(layer)(x), jacobian(layer, x, vectorize=True)):
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-5)
    kept = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(kept[0], x)[0], rows[0])


@every_layer
def test_without_data(name: str) -> None:
    """On the meta device, where a host builds what it fills later, and with fake tensors."""
    kind, _, _ = name.partition("-")
    layer = make_layer(kind, 4, 3, device="meta", **OPTIONS[name])
    assert layer(torch.empty(2, 5, 4, device="meta")).shape == (2, 5, 3)
    with torch.device("meta"):
        layer = make_layer(kind, 4, 3, **OPTIONS[name])
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(inputs(5, 4)).isfinite().all()
    with FakeTensorMode():
        assert make_layer(kind, 4, 3, **OPTIONS[name])(torch.empty(5, 4)).shape == (5, 3)


@every_layer
def test_autocast_answers_in_half_precision(name: str) -> None:
    layer, x = make(name), inputs(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0.1, atol=0.1)


@every_layer
def test_a_bias_of_another_type(name: str) -> None:
    """A part in bfloat16 gives an answer, or torch's own word on types; never a TypeError."""
    layer = make(name).requires_grad_(False)
    for parameter in layer.parameters():
        changed = parameter.data
        parameter.data = changed.bfloat16()
        for no_grad in (True, False):
            try:
                with torch.set_grad_enabled(not no_grad):
                    layer(inputs(5, 4))
            except RuntimeError as error:
                assert "type" in str(error)
        parameter.data = changed


@every_layer
def test_in_an_encoder_layer_of_torch(name: str) -> None:
    """In eval mode without gradients it would compute with the weights of its linear layers."""
    host = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    host.linear1, host.linear2 = make(name, 4, 8), make(name, 8, 4)
    host.eval()
    x = inputs(2, 3, 4)
    with torch.no_grad():
        found = host(x)
    torch.testing.assert_close(found, host(x).detach(), rtol=1e-4, atol=1e-5)


@every_layer
def test_a_seat_without_a_weight_says_so(name: str) -> None:
    layer = make(name)
    if name != "linear":
        with pytest.raises(AttributeError, match="Call the layer instead"):
            inputs(5, 4) @ layer.weight


@every_layer
def test_hooks_and_pruning_of_inner_linear_layers_take_part(name: str) -> None:
    layer, x = make(name).train(), inputs(5, 4)
    called: set[str] = set()
    inner = {n: part for n, part in layer.named_modules() if type(part) is nn.Linear}
    for n, part in inner.items():
        part.register_forward_hook(lambda *_, n=n: called.add(n))
    layer(x)
    assert called == set(inner), "an nn.Linear that is there is called"
    prunable = [(part, "weight") for part in inner.values()]
    if prunable:
        prune.global_unstructured(prunable, pruning_method=prune.L1Unstructured, amount=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    for part, _ in prunable:
        gradient = part.get_parameter("weight_orig").grad
        assert gradient is None or not gradient[part.get_buffer("weight_mask") == 0].any()


@pytest.mark.parametrize("name", ["neurocoder", "neurocoder-official", "hypernet", "nsm"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization(name: str) -> None:
    model: Callable[[Tensor], Tensor] = nn.Sequential(nn.Linear(4, 4), make(name)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    with torch.no_grad():
        torch.testing.assert_close(quantized(inputs(5, 4)), model(inputs(5, 4)), rtol=0, atol=0.3)
