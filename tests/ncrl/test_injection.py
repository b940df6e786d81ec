"""inject and eject: a table of host models times a list of properties, then one by one.

Config sizes are tiny; what matters here is where layers go, not what they compute.
"""

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ncrl import (
    NeurocoderConfig,
    NeurocoderConv2d,
    NeurocoderLinear,
    eject,
    inject,
    orthogonal_loss,
)
from ncrl.injection import MAX_LISTED

CONFIG = NeurocoderConfig(
    num_slots=4, key_dim=2, num_heads=2, num_least_used=1, controller_size=3, sharpness=5.0
)


# Hosts


class Net(nn.Module):
    """A linear layer without bias, an untouched one between, and one with bias at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.net(x))
        return out


class Tied(nn.Module):
    """A language model whose output weight is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 11)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.hidden(self.embed(tokens)).tanh())
        return out


class Shared(nn.Module):
    """One linear layer at three places, two of them in one container."""

    def __init__(self) -> None:
        super().__init__()
        fc = nn.Linear(5, 5)
        self.encoder = nn.Sequential(fc, nn.Tanh(), fc)
        self.decoder = nn.ModuleDict({"fc": fc, "last": nn.Linear(5, 2)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder["last"](self.decoder["fc"](self.encoder(x)).tanh())
        return out


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "actor": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
                "critics": nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)]),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        critics = self.parts["critics"]
        assert isinstance(critics, nn.ModuleList)
        return torch.cat([self.parts["actor"](x), *[critic(x) for critic in critics]], dim=-1)


def learning_rate(_: float) -> float:
    return 0.01


def make_policy() -> ActorCriticPolicy:
    env = gym.make("CartPole-v1")
    return ActorCriticPolicy(
        env.observation_space, env.action_space, learning_rate, net_arch=[6], activation_fn=nn.Tanh
    )


def policy_output(model: Any, x: Tensor) -> Tensor:
    """Logits and value, without what SB3's forward does besides: sampling, casts to float32."""
    actor, critic = model.mlp_extractor(x)
    return torch.cat([model.action_net(actor), model.value_net(critic)], dim=1)


def make_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def call(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


class Host(NamedTuple):
    """A model and what to replace in it."""

    build: Callable[[], nn.Module]
    targets: str | list[str]
    names: list[str]
    """What `inject` should replace."""
    x: Tensor
    output: Callable[[Any, Tensor], Tensor] = call

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def injected(self) -> nn.Module:
        model = self.make()
        inject(model, CONFIG, self.targets)
        return model

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.to(dtype) if self.x.is_floating_point() else self.x


VECTORS = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[1, 5, 10], [2, 2, 0]])
HOSTS = {
    "mlp": Host(Net, ["fc", "net.0"], ["net.0", "fc"], VECTORS),
    "sb3-heads": Host(
        make_policy,
        ["action_net", "value_net"],
        ["action_net", "value_net"],
        VECTORS[:, :4],
        policy_output,
    ),
    "sb3-extractor": Host(
        make_policy,
        "mlp_extractor.*",
        ["mlp_extractor.policy_net.0", "mlp_extractor.value_net.0"],
        VECTORS[:, :4],
        policy_output,
    ),
    "torch-encoder": Host(
        make_encoder,
        ["linear1", "linear2"],
        [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)],
        torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)),
    ),
    "tied": Host(Tied, "lm_head", ["lm_head"], TOKENS),
    "shared": Host(Shared, "decoder.fc", ["encoder.0", "encoder.2", "decoder.fc"], VECTORS),
    "containers": Host(
        Containers,
        ["parts.critics.?", "actor.2"],
        ["parts.actor.2", "parts.critics.0", "parts.critics.1"],
        VECTORS,
    ),
}
all_hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def layers_of(model: nn.Module) -> list[NeurocoderLinear]:
    return [module for module in model.modules() if isinstance(module, NeurocoderLinear)]


def outside(names: list[str], name: str) -> bool:
    """Whether `name` is neither among `names` nor below one of them."""
    return not any(name == other or name.startswith(f"{other}.") for other in names)


def assert_same_objects(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def assert_same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def train(model: nn.Module, host: Host, steps: int = 3) -> None:
    """A few steps on the new layers alone, so that the rest of the host stays comparable."""
    parameters = [parameter for layer in layers_of(model) for parameter in layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(steps):
        optimizer.zero_grad()
        host.output(model, host.input()).square().sum().backward()
        optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert all(parameter.isfinite().all() for parameter in parameters)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(7)
    yield


# Properties of inject


@all_hosts
def test_replaces_what_it_names(host: Host) -> None:
    model = host.make()
    before = modules_of(model)
    assert inject(model, CONFIG, host.targets) == host.names
    for name in host.names:
        layer, linear = model.get_submodule(name), before[name]
        assert isinstance(layer, NeurocoderLinear) and isinstance(linear, nn.Linear)
        assert layer.config == CONFIG
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
        assert (layer.bias is None) == (linear.bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, linear.bias) and layer.bias is not linear.bias


@all_hosts
def test_leaves_everything_else_alone(host: Host) -> None:
    model = host.make()
    modules, parameters = modules_of(model), dict(model.named_parameters(remove_duplicate=False))
    inject(model, CONFIG, host.targets)
    rest = {name: module for name, module in modules.items() if outside(host.names, name)}
    after = {name: m for name, m in modules_of(model).items() if outside(host.names, name)}
    assert_same_objects(rest, after)
    assert_same_objects(
        {name: p for name, p in parameters.items() if outside(host.names, name)},
        {
            name: p
            for name, p in model.named_parameters(remove_duplicate=False)
            if outside(host.names, name)
        },
    )


@all_hosts
@pytest.mark.parametrize("training", [True, False])
def test_keeps_modes(host: Host, training: bool) -> None:
    model = host.make().train(training).requires_grad_(False)
    inject(model, CONFIG, host.targets)
    assert {module.training for module in model.modules()} == {training}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not outside(host.names, name)), name
    eject(model.train(not training))
    assert {module.training for module in model.modules()} == {not training}


@all_hosts
def test_keeps_dtype_and_shape(host: Host) -> None:
    model = host.make().double()
    x = host.input(torch.float64)
    shape = host.output(model, x).shape
    inject(model, CONFIG, host.targets)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    y = host.output(model, x)
    assert y.dtype == torch.float64 and y.shape == shape and y.isfinite().all()


@all_hosts
def test_originals_are_hidden(host: Host) -> None:
    model = host.make()
    held = {
        id(parameter) for name in host.names for parameter in model.get_submodule(name).parameters()
    }
    others = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if outside(host.names, name)
    }
    inject(model, CONFIG, host.targets)
    assert not (held - others) & {id(parameter) for parameter in model.parameters()}
    fresh = NeurocoderLinear(2, 2, CONFIG).state_dict()
    for name in host.names:
        assert set(model.get_submodule(name).state_dict()) <= set(fresh)


@all_hosts
def test_orthogonal_loss_sees_the_new_layers(host: Host) -> None:
    model = host.make()
    assert orthogonal_loss(model) == 0
    inject(model, CONFIG, host.targets)
    layers = layers_of(model)
    assert len(layers) == len({id(model.get_submodule(name)) for name in host.names})
    expected = sum(orthogonal_loss(layer).item() for layer in layers)
    assert expected > 0
    assert math.isclose(orthogonal_loss(model).item(), expected, rel_tol=1e-5)


@all_hosts
def test_a_second_injection_finds_nothing(host: Host) -> None:
    model = host.injected()
    before = modules_of(model)
    with pytest.raises(ValueError, match="Neurocoder layers in place already"):
        inject(model, CONFIG, host.targets)
    assert_same_objects(before, modules_of(model))


@all_hosts
def test_insides_of_layers_are_no_candidates(host: Host) -> None:
    model = host.injected()
    for target in ("key_net", "*.memory.key_net", "composition.head", "gate"):
        with pytest.raises(ValueError, match="no layer matches") as error:
            inject(model, CONFIG, target)
        assert "key_net," not in str(error.value) and "integration" not in str(error.value)


@all_hosts
def test_all_or_nothing(host: Host) -> None:
    model = host.make()
    before, state = modules_of(model), copy.deepcopy(model.state_dict())
    targets = [host.targets] if isinstance(host.targets, str) else host.targets
    with pytest.raises(ValueError, match="matches 'nowhere'"):
        inject(model, CONFIG, [*targets, "nowhere"])
    impossible = NeurocoderConfig(residual=False)
    with pytest.raises(ValueError, match="residual=False"):
        inject(model, impossible, targets, keep_weight=True)
    assert_same_objects(before, modules_of(model))
    assert_same_state(state, model.state_dict())


# Properties of eject


@all_hosts
def test_eject_restores_the_host(host: Host) -> None:
    model = host.make()
    modules, parameters = modules_of(model), dict(model.named_parameters(remove_duplicate=False))
    state, output = copy.deepcopy(model.state_dict()), host.output(model, host.input())
    inject(model, CONFIG, host.targets)
    train(model, host)
    assert eject(model) == host.names
    assert_same_objects(modules, modules_of(model))
    assert_same_objects(parameters, dict(model.named_parameters(remove_duplicate=False)))
    assert_same_state(state, model.state_dict())
    assert torch.equal(host.output(model, host.input()), output)
    assert eject(model) == []
    assert inject(model, CONFIG, host.names) == host.names


def deep_copied(model: nn.Module) -> Any:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@all_hosts
@pytest.mark.parametrize("duplicate", [deep_copied, pickled, saved])
def test_eject_from_a_copy(host: Host, duplicate: Callable[[nn.Module], Any]) -> None:
    model = host.make()
    state, output = copy.deepcopy(model.state_dict()), host.output(model, host.input())
    ties = sharing(model)
    originals = [model.get_submodule(name) for name in host.names]
    inject(model, CONFIG, host.targets)
    train(model, host)
    injected_output = host.output(model, host.input())
    twin = duplicate(model)
    assert torch.equal(host.output(twin, host.input()), injected_output)
    assert eject(twin) == host.names
    assert_same_state(state, twin.state_dict())
    assert torch.equal(host.output(twin, host.input()), output)
    assert sharing(twin) == ties
    assert not {id(module) for module in originals} & {id(module) for module in twin.modules()}
    # The model copied is as injected as before, and has kept its own originals.
    assert torch.equal(host.output(model, host.input()), injected_output)
    eject(model)
    assert all(
        model.get_submodule(name) is original
        for name, original in zip(host.names, originals, strict=True)
    )


def sharing(model: nn.Module) -> list[list[str]]:
    """Names of the same parameter, for every parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


@all_hosts
def test_originals_follow_to_another_type(host: Host) -> None:
    model = host.injected().double()
    ties = sharing(host.make())
    eject(model)
    expected = host.make().double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert_same_state(expected.state_dict(), model.state_dict())
    x = host.input(torch.float64)
    assert torch.equal(host.output(model, x), host.output(expected, x))
    assert sharing(model) == ties


@all_hosts
def test_originals_follow_to_another_device(host: Host) -> None:
    model = host.injected().to("meta")
    eject(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# What targets mean


class Names(nn.Module):
    """Linear layers by their dotted names, with nothing to compute."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(2, 2))


NAMED = ("fc", "net.fc", "net.afc", "attn.out", "blocks.0.attn.out", "blocks.1.attn.out.fc")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("fc", ["fc"]),
        ("net.fc", ["net.fc"]),
        ("afc", ["net.afc"]),
        ("out", ["attn.out", "blocks.0.attn.out"]),
        ("attn.out", ["attn.out"]),
        ("0.attn.out", ["blocks.0.attn.out"]),
        ("out.fc", ["blocks.1.attn.out.fc"]),
        ("*fc", ["fc", "net.fc", "net.afc", "blocks.1.attn.out.fc"]),
        ("*.fc", ["net.fc", "blocks.1.attn.out.fc"]),
        ("net.?fc", ["net.afc"]),
        ("blocks.[1-9].*", ["blocks.1.attn.out.fc"]),
        ("blocks.*", ["blocks.0.attn.out", "blocks.1.attn.out.fc"]),
        ("*", list(NAMED)),
        (["out", "fc", "net.fc"], ["fc", "net.fc", "attn.out", "blocks.0.attn.out"]),
        (("fc", "fc"), ["fc"]),
    ],
)
def test_targets(targets: str | list[str], names: list[str]) -> None:
    # attn.out is a linear layer here and a container there.
    model = Names(*[name for name in NAMED if name != "attn.out"])
    model.add_module("attn", Names("out"))
    order = [name for name in modules_of(model) if name in NAMED]
    expected = sorted(names, key=order.index)
    assert inject(model, CONFIG, targets) == expected
    assert {
        name for name, m in modules_of(model).items() if isinstance(m, NeurocoderLinear)
    } == set(expected)


@pytest.mark.parametrize(
    "target", ["c", ".fc", "fc.", "Fc", "net", "", "t.fc", "blocks", "net.*.fc"]
)
def test_what_does_not_match(target: str) -> None:
    with pytest.raises(ValueError, match="no layer matches"):
        inject(Names(*NAMED[:3]), CONFIG, target)


@pytest.mark.parametrize(
    ("target", "hint"),
    [("netfc", "net.fc"), ("FC", "fc"), ("encoder.blocks.0.atn.out", "blocks.0.attn.out")],
)
def test_no_match_lists_candidates_and_the_nearest(target: str, hint: str) -> None:
    with pytest.raises(ValueError, match="candidates") as error:
        inject(Names("fc", "net.fc", "blocks.0.attn.out"), CONFIG, target)
    assert str(error.value) == (
        f"no layer matches {target!r}; nearest: {hint!r}; candidates: fc, net.fc, blocks.0.attn.out"
    )


def test_a_target_that_is_another_module_is_called_by_its_type() -> None:
    model = Names("blocks.0.out", "fc")
    model.add_module("conv", nn.Conv1d(1, 1, 1))
    for target, name in [("blocks", "blocks"), ("0", "blocks.0")]:
        with pytest.raises(ValueError, match="no layer matches") as error:
            inject(model, CONFIG, target)
        assert str(error.value) == (
            f"no layer matches {target!r} ({name!r} is of type Module); nearest: '{name}.*'; "
            "candidates: blocks.0.out, fc"
        )
    with pytest.raises(ValueError, match=r"'conv' is of type Conv1d\); nearest: '.*fc'"):
        inject(model, CONFIG, "conv")


def test_targets_that_are_no_names_and_a_config_that_is_none() -> None:
    model = Names("fc")
    for target in (None, 3, nn.Linear, nn.Sequential(nn.Tanh()), [model.get_submodule("fc")]):
        with pytest.raises(ValueError, match="a target is the name of a layer or a pattern, got"):
            inject(model, CONFIG, target)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must be a NeurocoderConfig, got"):
        inject(model, {"num_slots": 5}, "fc")  # type: ignore[arg-type]


def test_nearest_looks_at_the_ends_of_names() -> None:
    model = Names("first.of.many.long.prefixes.projection", "second.of.many.long.prefixes.gate")
    with pytest.raises(ValueError, match=r"nearest: 'second\.of\.many\.long\.prefixes\.gate'"):
        inject(model, CONFIG, "gates")


@pytest.mark.parametrize("excess", [0, 1])
def test_as_many_candidates_as_fit_are_listed(excess: int) -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(MAX_LISTED + excess)])
    listed = ", ".join(map(str, range(MAX_LISTED)))
    rest = f", ... ({MAX_LISTED + 1} in all)" if excess else ""
    with pytest.raises(ValueError, match=re.escape(f"candidates: {listed}{rest}") + "$"):
        inject(model, CONFIG, "head")


def test_no_targets() -> None:
    with pytest.raises(ValueError, match="no targets given; candidates: fc"):
        inject(Names("fc"), CONFIG, [])


def test_the_rest_of_a_suffix_can_be_injected_later() -> None:
    model = Names("a.fc", "b.fc")
    inject(model, CONFIG, "a.fc")
    first = model.get_submodule("a.fc")
    assert inject(model, CONFIG, "fc") == ["b.fc"]
    assert model.get_submodule("a.fc") is first
    assert eject(model) == ["a.fc", "b.fc"]


def test_a_full_name_in_place_already_does_not_fall_back_to_a_suffix() -> None:
    model = Names("fc", "net.fc")
    inject(model, CONFIG, "fc")
    with pytest.raises(ValueError, match="already"):
        inject(model, CONFIG, "fc")
    assert type(model.get_submodule("net.fc")) is nn.Linear


@pytest.mark.parametrize(
    "options",
    [
        {"residual_rank": 2},
        {"residual_gate": False},
        {"preset": "official"},
        {"frozen_controller": True},
    ],
)
@pytest.mark.parametrize("keep_weight", [True, False])
def test_any_config(options: dict[str, Any], keep_weight: bool) -> None:
    host = HOSTS["mlp"]
    model = host.make()
    output, weight = host.output(model, host.input()), model.get_parameter("net.0.weight").T
    config = replace(CONFIG, **options)
    inject(model, config, host.targets, keep_weight=keep_weight)
    layer = model.get_submodule("net.0")
    assert isinstance(layer, NeurocoderLinear) and layer.config == config
    assert layer.integration is not None
    left_out = torch.linalg.svdvals(weight)[config.residual_rank or 5 :].norm()
    error = (layer.integration.matrix() - weight).norm()
    assert torch.allclose(error, left_out, atol=1e-5) == keep_weight
    host.output(model, host.input()).sum().backward()
    assert layer.memory.u.grad is not None and layer.memory.u.grad.any()
    eject(model)
    assert torch.equal(host.output(model, host.input()), output)


@pytest.mark.parametrize("keep_weight", [True, False])
def test_the_weight_of_a_convolution_is_kept_where_that_is_asked(keep_weight: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    weight = model[0].weight
    inject(model, CONFIG, "0", keep_weight=keep_weight)
    layer = model[0]
    assert isinstance(layer, NeurocoderConv2d) and layer.integration is not None
    kept = layer.integration.matrix().T.reshape(weight.shape)
    assert torch.equal(kept, weight) == keep_weight


def test_initial_values_do_not_depend_on_the_order_of_targets() -> None:
    states = []
    for targets in (["fc", "net.0"], ["net.0", "fc"], "*[0c]"):
        model = HOSTS["mlp"].make()
        inject(model, CONFIG, targets)
        states.append(model.state_dict())
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])


# Models and layers that cannot be injected into


def test_a_model_that_is_itself_linear() -> None:
    with pytest.raises(ValueError, match="from_linear"):
        inject(nn.Linear(2, 2), CONFIG, "")


@pytest.mark.parametrize("change", [eject, lambda model: inject(model, CONFIG, "*")])
def test_a_model_that_is_no_module(change: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"torch module, got SimpleNamespace; .*model\.policy"):
        change(SimpleNamespace(policy=nn.Linear(2, 2)))


def test_a_model_that_is_itself_a_neurocoder_layer() -> None:
    with pytest.raises(ValueError, match="no layer matches"):
        inject(NeurocoderLinear(2, 2, CONFIG), CONFIG, "*")
    model = HOSTS["mlp"].injected()
    with pytest.raises(ValueError, match="contains it"):
        eject(model.get_submodule("fc"))


def test_neurocoder_layers_of_the_host_stay() -> None:
    own = NeurocoderLinear(2, 2, CONFIG)
    model = nn.Sequential(own, nn.Linear(2, 2))
    assert inject(model, CONFIG, "*") == ["1"]
    assert eject(model) == ["1"]
    assert model[0] is own


class Double(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(register: str) -> nn.Linear:
    linear = nn.Linear(2, 2)
    getattr(linear, register)(lambda *_: None)
    return linear


def with_another_forward() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


def pruned() -> nn.Linear:
    linear = nn.Linear(2, 2)
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


SPECIAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Double(2, 2), "it is a Double"),
    "lazy": (lambda: nn.LazyLinear(2), "it is a LazyLinear"),
    "attention": (lambda: nn.MultiheadAttention(2, 1).out_proj, "it is a NonDynamically"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        "it is a ParametrizedLinear",
    ),
    "pruned": (pruned, "it has hooks"),
    "forward-hook": (lambda: hooked("register_forward_hook"), "it has hooks"),
    "backward-hook": (lambda: hooked("register_full_backward_hook"), "it has hooks"),
    "state-dict-hook": (lambda: hooked("register_state_dict_post_hook"), "it has hooks"),
    "forward": (with_another_forward, "its forward has been replaced"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "its numbers are .*complex64"),
}


@pytest.mark.parametrize(("build", "reason"), SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("target", ["special", "*"])
def test_special_layers_are_refused(
    build: Callable[[], nn.Module], reason: str, target: str
) -> None:
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "special": build()})
    before = modules_of(model)
    with pytest.raises(ValueError, match=f"matches 'special', which cannot be replaced: {reason}"):
        inject(model, CONFIG, ["plain", target])
    assert_same_objects(before, modules_of(model))
    with pytest.raises(ValueError, match=r"candidates: plain$"):
        inject(model, CONFIG, "nothing")


def test_a_lazy_layer_is_plain_after_its_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.zeros(1, 2))
    assert inject(model, CONFIG, "0") == ["0"]
    assert model(torch.zeros(1, 2)).shape == (1, 3)


def test_a_host_that_computes_with_the_weight_fails_loudly() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, how: str) -> Any:
            weight = self.fc.weight
            if how == "linear":
                return nn.functional.linear(x, weight, self.fc.bias)
            return {"matmul": lambda: x @ weight, "transposed": lambda: x @ weight.T}[how]()

    model = Functional()
    inject(model, CONFIG, "fc")
    for how in ("linear", "matmul", "transposed"):
        with pytest.raises(AttributeError, match="composes one for every input"):
            model(torch.zeros(2, 3), how)


# One host at a time


def test_a_shared_layer_stays_shared() -> None:
    model = HOSTS["shared"].injected()
    assert len(layers_of(model)) == 1
    assert model.get_submodule("encoder.0") is model.get_submodule("decoder.fc")


def test_a_tied_weight_stays_with_the_embedding() -> None:
    torch.manual_seed(0)
    model = Tied()
    weight, linear = model.embed.weight, model.lm_head
    inject(model, CONFIG, "lm_head", keep_weight=True)
    assert model.embed.weight is weight
    residual = model.get_parameter("lm_head.integration.residual")
    assert torch.equal(residual, weight.T)
    assert residual.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
    with torch.no_grad():
        weight.add_(1)
    eject(model)
    assert model.lm_head is linear and model.lm_head.weight is model.embed.weight
    copied = copy.deepcopy(HOSTS["tied"].injected())
    eject(copied)
    assert isinstance(copied, Tied) and copied.lm_head.weight is copied.embed.weight


def test_layers_on_two_devices() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    inject(model, CONFIG, "*")
    for child, device in zip(model, ("meta", "cpu"), strict=True):
        assert {parameter.device.type for parameter in child.parameters()} == {device}


def injected_a2c(targets: list[str]) -> A2C:
    model = A2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs={"net_arch": [8]})
    policy = model.policy
    inject(policy, CONFIG, targets)
    policy.optimizer = policy.optimizer_class(  # type: ignore[call-arg]
        policy.parameters(), lr=7e-4, **policy.optimizer_kwargs
    )
    return model


@pytest.mark.parametrize(
    "targets", [["action_net", "value_net"], ["mlp_extractor.*", "action_net"]]
)
def test_a2c_learns_with_injected_layers(targets: list[str], tmp_path: Path) -> None:
    model = injected_a2c(targets)
    policy = model.policy
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    model.learn(20)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    # In its only step the LSTM has no previous state to weigh.
    inert = {name for name in before if name.endswith("weight_hh")}
    assert moved == set(before) - inert
    action, _ = model.predict(model.observation_space.sample())
    assert model.action_space.contains(int(action))
    model.save(tmp_path / "model")
    other = injected_a2c(targets)
    other.set_parameters(tmp_path / "model")
    assert_same_state(model.policy.state_dict(), other.policy.state_dict())
    other.learn(10)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["linear1", "linear2"]])
def test_torch_encoder_layer_computes_the_same_in_every_mode(
    targets: list[str], norm_first: bool
) -> None:
    """torch's fast path for eval mode reads the weights of both linear layers."""
    layer = nn.TransformerEncoderLayer(
        4, 2, dim_feedforward=6, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    inject(layer, CONFIG, targets)
    x = HOSTS["torch-encoder"].x
    expected = layer.train()(x)
    layer.eval()
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("target", ["linear1", "linear2", "layers.0.linear1", "self_attn.q_proj"])
def test_torch_encoder_with_padding_computes_the_same_in_every_mode(target: str) -> None:
    model = make_encoder()
    inject(model, CONFIG, target)
    x = HOSTS["torch-encoder"].x
    padding = torch.tensor([[False, False, True], [False, False, False]])
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.inference_mode():
        y = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y[~padding], expected[~padding])


# NeurocoderLinear.from_linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_from_linear_takes_everything_but_the_weight(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(3, 2, bias=bias, dtype=dtype)
    layer = NeurocoderLinear.from_linear(linear, CONFIG, num_slots=6)
    assert type(layer) is NeurocoderLinear
    assert layer.config.num_slots == 6 and layer.config.num_heads == CONFIG.num_heads
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert (layer.bias is None) == (not bias)
    if layer.bias is not None:
        assert torch.equal(layer.bias, linear.bias) and layer.bias.requires_grad
    assert layer.integration is not None
    assert not torch.equal(layer.integration.matrix(), linear.weight.T)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4)])
def test_from_linear_keeps_the_best_weight_of_a_rank(shape: tuple[int, int], rank: int) -> None:
    """Eckart-Young: the error is the norm of the singular values left out."""
    linear = nn.Linear(*shape, dtype=torch.float64)
    options: dict[str, Any] = {"keep_weight": True, "residual_rank": rank}
    layer = NeurocoderLinear.from_linear(linear, CONFIG, **options)
    assert layer.integration is not None
    kept = layer.integration.matrix()
    left_out = torch.linalg.svdvals(linear.weight)[rank:].norm()
    error = (kept - linear.weight.T).norm()
    torch.testing.assert_close(error, left_out, rtol=1e-9, atol=1e-12)
    # The factors share the size, and every row or column of them learns.
    (kept * torch.randn(kept.shape, dtype=torch.float64)).sum().backward()
    left, right = (layer.get_parameter(f"integration.{name}") for name in ("left", "right"))
    used = min(rank, *shape)
    torch.testing.assert_close(left[:, :used].norm(dim=0), right[:used].norm(dim=1))
    for column in range(rank):
        learns = [left.grad[:, column].any(), right.grad[column].any()]  # type: ignore[index]
        assert any(learns), column


def test_from_linear_keeps_a_low_rank_weight_in_half_precision() -> None:
    linear = nn.Linear(4, 3, dtype=torch.bfloat16)
    layer = NeurocoderLinear.from_linear(linear, CONFIG, keep_weight=True, residual_rank=3)
    assert layer.integration is not None
    torch.testing.assert_close(layer.integration.matrix(), linear.weight.T, rtol=0.05, atol=0.01)


def test_from_linear_sized_by_numpy_integers() -> None:
    """As SB3 sizes some of its output layers."""
    size = torch.ones(2).numpy().astype("int64").sum()
    layer = NeurocoderLinear.from_linear(nn.Linear(size, size), CONFIG)
    assert type(layer.in_features) is int and layer.in_features == 2


@pytest.mark.parametrize("part", ["linear1", "linear2", "self_attn.q_proj"])
def test_torch_encoder_with_a_fast_first_layer_is_refused(part: str) -> None:
    model = make_encoder()
    with pytest.raises(ValueError, match="use_nested_tensor"):
        inject(nn.ModuleDict({"encoder": model}), CONFIG, f"layers.1.{part}")
    assert layers_of(model) == []
    inject(model, CONFIG, f"layers.0.{part}")
    assert inject(model, CONFIG, f"layers.1.{part}") == [f"layers.1.{part}"]
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = HOSTS["torch-encoder"].x
    with torch.inference_mode():
        assert model.eval()(x, src_key_padding_mask=padding).isfinite().all()
        eject(model)
        model.use_nested_tensor = False
        inject(model, CONFIG, f"layers.1.{part}")
        assert model.eval()(x, src_key_padding_mask=padding).isfinite().all()
