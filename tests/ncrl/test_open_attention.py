"""Attention whose projections are called: equal to torch's, and coded per token."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ncrl import NeurocoderConfig, NeurocoderConv2d, NeurocoderLinear, eject, inject
from ncrl.open_attention import OpenAttention
from tests.ncrl.layers import parameters_of, random_input, relative_error
from tests.reference import Sizes, neurocoder_reference

CONFIG = NeurocoderConfig(num_slots=4, key_dim=2, num_heads=2, num_least_used=1, controller_size=3)
SIZES = Sizes(4, 2, 2, 1, 1, 1.0, "slot-head", False)
WIDTH, HEADS, BATCH, LENGTH = 6, 2, 3, 5
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options, dtype=torch.float64)
    with torch.no_grad():  # biases start at zero
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def masks(name: str) -> dict[str, Any]:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 3:] = True
    per_head = random_input(BATCH * HEADS, LENGTH, LENGTH)
    return {
        "none": {},
        "causal": dict(attn_mask=causal, is_causal=True),
        "padding": dict(key_padding_mask=padding),
        "both": dict(key_padding_mask=padding, attn_mask=causal),
        "floats": dict(attn_mask=per_head),
    }[name]


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both", "floats"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_opened_attention_computes_the_same(
    mask: str, need_weights: bool, batch_first: bool
) -> None:
    host = attention(batch_first=batch_first)
    shape = (BATCH, LENGTH) if batch_first else (LENGTH, BATCH)
    q, k, v = (random_input(*shape, WIDTH, seed=seed) for seed in range(3))
    call = dict(masks(mask), need_weights=need_weights)
    expected, weights = host(q, k, v, **call)
    ours, our_weights = OpenAttention(host)(q, k, v, **call)
    assert relative_error(ours, expected) < 1e-12
    assert (our_weights is None) == (weights is None)
    if weights is not None:
        assert relative_error(our_weights, weights) < 1e-12
        _, apart = OpenAttention(host)(q, k, v, **call, average_attn_weights=False)
        assert relative_error(apart, host(q, k, v, **call, average_attn_weights=False)[1]) < 1e-12


@pytest.mark.parametrize(
    "mask",
    [
        {},
        dict(key_padding_mask=torch.arange(7) > 4),
        dict(attn_mask=torch.ones(LENGTH, 7, dtype=torch.bool).triu(2)),
        dict(attn_mask=random_input(HEADS, LENGTH, 7)),
    ],
    ids=["free", "padding", "bools", "floats"],
)
@pytest.mark.parametrize("options", [dict(bias=False), dict(kdim=3, vdim=4), dict()])
def test_one_sequence_other_widths_no_bias(
    options: dict[str, Any], mask: dict[str, Tensor]
) -> None:
    host = attention(**options)
    q = random_input(LENGTH, WIDTH)
    k = random_input(7, options.get("kdim", WIDTH), seed=2)
    v = random_input(7, options.get("vdim", WIDTH), seed=3)
    expected = host(q, k, v, **mask)
    for ours, theirs in zip(OpenAttention(host)(q, k, v, **mask), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_that_of_torch_and_in_training_alone(need_weights: bool) -> None:
    host = attention(dropout=0.5, batch_first=True)
    x = random_input(BATCH, LENGTH, WIDTH)
    found = []
    for module in (host, OpenAttention(host)):
        for training in (True, False):
            torch.manual_seed(3)
            y, weights = module.train(training)(x, x, x, need_weights=need_weights)
            found.append((y, y if weights is None else weights))
    for ours, theirs in zip(found[2:], found[:2], strict=True):
        assert relative_error(ours[0], theirs[0]) < 1e-12
        assert relative_error(ours[1], theirs[1]) < 1e-12
    assert relative_error(found[2][0], found[3][0]) > 0.1


def test_a_hint_of_causality_needs_a_mask() -> None:
    """As in torch; without a word, queries would attend to what comes later."""
    host, x = attention(batch_first=True), random_input(BATCH, LENGTH, WIDTH)
    for module, kind in ((host, RuntimeError), (OpenAttention(host), ValueError)):
        with pytest.raises(kind, match="attn_mask"):
            module(x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_large_scores_in_half_precision(need_weights: bool) -> None:
    """Products that exceed what float16 holds, but not once they are divided by sqrt(width)."""
    host = nn.MultiheadAttention(64, 1, batch_first=True, dtype=torch.float16)
    with torch.no_grad():
        host.in_proj_weight.copy_(torch.eye(64).repeat(3, 1))
    x = torch.full((1, 3, 64), 40.0).half() * torch.tensor([1, -1, 0.5]).half().view(1, 3, 1)
    ours, theirs = (
        module(x, x, x, need_weights=need_weights)[0] for module in (OpenAttention(host), host)
    )
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs)


def test_coded_projections_are_read_literally() -> None:
    model = nn.ModuleDict({"attn": attention(batch_first=True)})
    names = inject(model, CONFIG, "attn.*")
    assert names == [f"attn.{name}" for name in PROJECTIONS]
    x = random_input(BATCH, LENGTH, WIDTH)
    layers = [model.get_submodule(name) for name in names]
    for layer in layers:
        assert isinstance(layer, NeurocoderLinear)

    def project(layer: nn.Module, tokens: Tensor) -> Tensor:
        outputs = neurocoder_reference(parameters_of(layer), SIZES, tokens.flatten(0, 1))["output"]
        return outputs.view(*tokens.shape[:2], -1)

    q, k, v = (project(layer, x) for layer in layers[:3])
    mixed = torch.zeros_like(q)
    size = WIDTH // HEADS
    for b in range(BATCH):
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            for i in range(LENGTH):
                scores = torch.stack([q[b, i, own] @ k[b, j, own] for j in range(LENGTH)])
                weights = (scores / size**0.5).softmax(0)
                mixed[b, i, own] = sum(weights[j] * v[b, j, own] for j in range(LENGTH))
    expected = project(layers[3], mixed)
    assert relative_error(model["attn"](x, x, x)[0], expected) < 1e-9


class Host(nn.Module):
    """A convolution, a transformer and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.encoder(tokens, src_key_padding_mask=padding).mean(1))
        return logits


TARGETS = ["conv", "*.self_attn.*_proj", "head"]


def host() -> Host:
    torch.manual_seed(0)
    return Host()


@pytest.mark.parametrize(
    "targets", [TARGETS, "conv", "q_proj", "encoder.layers.0.self_attn.out_proj"]
)
@pytest.mark.parametrize("training", [True, False])
def test_eject_restores_bit_for_bit(targets: Any, training: bool) -> None:
    model = host().train(training)
    x = torch.randn(2, 1, 7, 7)
    modules = dict(model.named_modules())
    state, before = copy.deepcopy(model.state_dict()), model(x)
    names = inject(model, CONFIG, targets)
    assert not torch.allclose(model(x), before, atol=1e-4)
    for name in names:
        kind = NeurocoderConv2d if name == "conv" else NeurocoderLinear
        assert isinstance(model.get_submodule(name), kind)
    new = [p for m in model.modules() if isinstance(m, NeurocoderLinear) for p in m.parameters()]
    optimizer = torch.optim.AdamW(new, lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    assert eject(model) == names
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[n] is modules[n] for n in modules)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), before)


def test_what_the_rest_of_attention_learns_stays() -> None:
    model = nn.ModuleDict({"attn": attention(batch_first=True)})
    before = copy.deepcopy(model.state_dict())
    inject(model, CONFIG, "q_proj")
    x = random_input(BATCH, LENGTH, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model["attn"](x, x, x)[0].square().sum().backward()
    optimizer.step()
    trained = model["attn"].v_proj.weight.clone()
    eject(model)
    weight = model["attn"].in_proj_weight
    assert torch.equal(weight[:WIDTH], before["attn.in_proj_weight"][:WIDTH])
    assert torch.equal(weight[2 * WIDTH :], trained)
    assert not torch.equal(trained, before["attn.in_proj_weight"][2 * WIDTH :])


@pytest.mark.parametrize("training", [True, False])
def test_the_rest_of_opened_attention_stays_frozen_and_in_its_mode(training: bool) -> None:
    model = nn.ModuleDict({"attn": attention()}).requires_grad_(False).train(training)
    host = model["attn"]
    inject(model, CONFIG, "k_proj")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("attn.k_proj."), name
    assert {module.training for module in model.modules()} == {training}
    model.train(not training)
    eject(model)
    assert model["attn"] is host
    assert {module.training for module in model.modules()} == {not training}


def test_biases_and_weights_are_frozen_apart() -> None:
    """As where only biases are trained (BitFit)."""
    model = nn.ModuleDict({"attn": attention()})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    inject(model, CONFIG, "k_proj")
    for name, parameter in model.named_parameters():
        is_trained = name.endswith("bias") or name.startswith("attn.k_proj.")
        assert parameter.requires_grad == is_trained, name


def test_attention_follows_to_another_type() -> None:
    model = nn.ModuleDict({"attn": attention()})
    inject(model, CONFIG, "k_proj")
    model.float()
    eject(model)
    x = torch.randn(LENGTH, WIDTH)
    assert model["attn"](x, x, x)[0].dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_shared_attention_stays_shared() -> None:
    host = attention()
    model = nn.ModuleDict({"one": host, "other": host})
    names = inject(model, CONFIG, "one.q_proj")
    assert names == ["one.q_proj", "other.q_proj"]
    assert isinstance(model["one"], OpenAttention) and model["one"] is model["other"]
    assert eject(model) == names
    assert model["one"] is model["other"] is host


class Doubled(nn.MultiheadAttention):
    """Not what its weights alone say."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        y, weights = super().forward(*arguments, **options)
        return 2 * y, weights


def hooked(part: str) -> nn.Module:
    host = attention()
    host.get_submodule(part).register_forward_hook(lambda _module, _inputs, y: y)
    return host


def parametrized() -> nn.Module:
    host = attention()
    nn.utils.parametrize.register_parametrization(host.out_proj, "weight", nn.Identity())
    return host


CLOSED: dict[str, Callable[[], nn.Module]] = {
    "a bias of keys": lambda: attention(add_bias_kv=True),
    "a key of zeros": lambda: attention(add_zero_attn=True),
    "another class": lambda: Doubled(WIDTH, HEADS),
    "a hook": lambda: hooked(""),
    "a hook of a part": lambda: hooked("out_proj"),
    "a weight that is computed": parametrized,
}


@pytest.mark.parametrize("kind", CLOSED)
def test_attention_with_more_than_its_four_projections_is_not_opened(kind: str) -> None:
    host = CLOSED[kind]()
    model = nn.ModuleDict({"attn": host})
    with pytest.raises(ValueError, match="none that can be replaced"):
        inject(model, CONFIG, "q_proj")
    assert model["attn"] is host


def test_attention_that_cannot_be_opened_is_left_alone() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2, add_bias_kv=True)})
    with pytest.raises(ValueError, match=r"NonDynamicallyQuantizableLinear.* may use its weight"):
        inject(model, CONFIG, "out_proj")
    for itself in (nn.Conv2d(1, 1, 1), nn.MultiheadAttention(6, 2)):
        with pytest.raises(ValueError, match="the model is itself a"):
            inject(itself, CONFIG, "q_proj")


class Copies(TorchDispatchMode):
    """Counts the elements that are copied inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_attention_is_copied_only_where_it_is_a_target() -> None:
    model = nn.ModuleDict({"far": attention(), "near": attention(), "head": nn.Linear(2, 2)})
    with Copies() as copies:
        inject(model, CONFIG, "head")
    assert copies.elements == 0
    with Copies() as copies:
        inject(model, CONFIG, "near.q_proj")
    assert copies.elements == sum(map(torch.numel, attention().parameters()))
    weight = model["near"].original.in_proj_weight.clone()
    with torch.no_grad():
        model["near"].k_proj.weight.add_(1)
    assert torch.equal(model["near"].original.in_proj_weight, weight)
