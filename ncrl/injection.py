"""Neurocoder layers in the place of linear layers, convolutions and the projections of attention of
any torch model, and back again.

A layer can be replaced if whoever calls it sees nothing but its output. So only plain `nn.Linear`
and `nn.Conv2d` modules are: not subclasses (lazy and parametrized layers are), and none with hooks
(weight norm and pruning work by hooks). `nn.MultiheadAttention` never calls its projections: it is
opened first (see `ncrl.open_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, TypeGuard

from torch import nn

from ncrl.neurocoder import (
    NeurocoderConfig,
    NeurocoderConv2d,
    NeurocoderLinear,
    OfficialNeurocoderLinear,
)
from ncrl.open_attention import OpenAttention, Replacement
from ncrl.settings import nearest

Opened = Mapping[nn.Module, OpenAttention]
"""Attention of a host, and what would stand in its place."""

MAX_LISTED = 30
"""Candidates that an error message lists; a transformer can have hundreds."""


def inject(
    model: nn.Module,
    config: NeurocoderConfig | None,
    targets: str | Sequence[str],
    *,
    keep_weight: bool = False,
) -> list[str]:
    """Replace layers of `model` by Neurocoder layers, in place: `nn.Linear`, `nn.Conv2d`, and the
    `q_proj`, `k_proj`, `v_proj` and `out_proj` of `nn.MultiheadAttention`.

    This changes the outputs of the model: a new layer starts from scratch but for its bias. Even
    with `keep_weight` the gate and the smallest singular value scale the weight kept, and the
    active program is added to it.

    New layers have the sizes, bias, device, type and training mode of those they replace, and are
    trainable even where the host is frozen. Nothing else in the model changes. An optimiser built
    before knows only the old parameters: build it anew.

    Attention of which projections are replaced becomes a module that calls all four; those that are
    not replaced are `nn.Linear` there.

    A target is one of three things, tried in this order:

    1. the full name of a layer ("net.fc"): that layer alone, so that names returned can be given;
    2. the last parts of names ("fc", "self_attn.q_proj"): every layer whose name ends with them;
    3. a shell pattern for full names ("blocks.*.mlp.*", "layer[12].fc"; `*` spans dots as well).

    A layer with several names is replaced once, under all of them. A new layer shares no parameter
    with the host: a weight tied to an embedding stays the embedding's.

    Args:
        model: searched at any depth, but not inside Neurocoder layers.
        config: sizes and switches of the new layers; `NeurocoderConfig()` if None.
        targets: one target or several, each of which has to match.
        keep_weight: start the residual programs from the weights replaced; see
            `NeurocoderLinear.from_linear`.

    Returns:
        Names of the layers replaced, in the order of `model.named_modules()`.

    Raises:
        ValueError: if a target matches nothing (the message lists what could be matched) or a layer
            that cannot be replaced, or a new layer cannot be built. The model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> inject(model, NeurocoderConfig(num_slots=10), "2")
        ['2']
        >>> eject(model)
        ['2']
    """
    if isinstance(model, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: use "
            "from_linear of NeurocoderLinear or from_conv2d of NeurocoderConv2d, or wrap the model "
            "in nn.Sequential"
        )
    opened: Opened = {
        module: OpenAttention(module) for module in model.modules() if _can_open(module)
    }
    seats = _seats(model, opened)
    chosen: set[nn.Module] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        chosen.update(_select(target, seats))
    if not chosen:
        raise ValueError(f"no targets given; candidates: {_listed(_candidates(seats))}")
    opened = {host: one for host, one in opened.items() if chosen.intersection(one.children())}
    _check_encoders(model, chosen.union(opened))
    layers: dict[nn.Module, InjectedNeurocoder] = {}
    for plain in seats.values():  # in this order, whatever that of the targets
        if plain in chosen and plain not in layers:
            layers[plain] = _replacement(plain, config, keep_weight)
    replaced = [name for name, module in seats.items() if module in chosen]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in opened:
            model.set_submodule(name, opened[module])
    for name in replaced:
        model.set_submodule(name, layers[seats[name]])
    return replaced


def eject(model: nn.Module) -> list[str]:
    """Undo every `inject`: put the original modules back, the very same objects, in place.

    What the new layers have learned is dropped. If the rest of the model is as it was, so are its
    outputs and its state_dict, bit for bit. An optimiser has to be built anew, as after `inject`.

    Until then each new layer keeps its original, hidden from `parameters()` and `state_dict()`: no
    optimiser moves it, no checkpoint holds it. It goes where the layer goes: to another device or
    type, and into a deepcopy or pickle of the model, as a copy that is tied to what the original
    was tied to.

    Returns:
        Names of the layers put back, in the order of `model.named_modules()`; [] if there are none.

    Raises:
        ValueError: if `model` is itself an injected layer.
    """
    if isinstance(model, InjectedNeurocoder):
        raise ValueError("an injected layer cannot eject itself: pass the model that contains it")
    names = []
    for name, layer in _seats(model).items():
        if isinstance(layer, InjectedNeurocoder):
            (original,) = layer.original
            model.set_submodule(name, original.train(layer.training))
            names.append(name)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, OpenAttention):
            model.set_submodule(name, module.close())
    return names


class InjectedNeurocoder(Replacement, NeurocoderLinear):
    """A Neurocoder layer that can be ejected. Made by `inject`."""


class InjectedOfficialNeurocoder(InjectedNeurocoder, OfficialNeurocoderLinear):
    """The authors' layer likewise."""


class InjectedConv2d(InjectedNeurocoder, NeurocoderConv2d):
    """A convolution likewise."""


def _replacement(
    plain: nn.Module, config: NeurocoderConfig | None, keep_weight: bool
) -> InjectedNeurocoder:
    layer: InjectedNeurocoder
    if isinstance(plain, nn.Conv2d):
        layer = InjectedConv2d.from_conv2d(plain, config, keep_weight=keep_weight)
    else:
        assert isinstance(plain, nn.Linear)
        is_official = config is not None and config.preset == "official"
        kind = InjectedOfficialNeurocoder if is_official else InjectedNeurocoder
        layer = kind.from_linear(plain, config, keep_weight=keep_weight)
    layer.original = (plain,)
    return layer.train(plain.training)


def _can_open(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    return (
        type(module) is nn.MultiheadAttention
        and type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        and module.bias_k is None
        and not module.add_zero_attn
        and not (_meddled(module) or _meddled(module.out_proj))
    )


def _seats(model: nn.Module, opened: Opened = MappingProxyType({})) -> dict[str, nn.Module]:
    """Layers below `model` that are or could be Neurocoder layers, by all their names, but nothing
    inside these; of attention, the projections that it would have if it were opened."""
    seats: dict[str, nn.Module] = {}
    insides: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(insides):
            continue
        if module in opened:
            seats |= {f"{name}.{part}": one for part, one in opened[module].named_children()}
        elif isinstance(module, (nn.Linear, nn.Conv2d, NeurocoderLinear)):
            if name:
                seats[name] = module
        else:
            continue
        insides += (f"{name}." if name else "",)
    return seats


def _select(target: str, seats: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The layers that `target` means; raises ValueError unless all can be replaced."""
    names = _matching(target, seats)
    plain = [name for name in names if not isinstance(seats[name], NeurocoderLinear)]
    if not plain:
        raise ValueError(_no_match(target, names, _candidates(seats)))
    for name in plain:
        if reason := _obstacle(seats[name]):
            raise ValueError(f"{target!r} matches {name!r}, which cannot be replaced: {reason}")
    return [seats[name] for name in plain]


def _matching(target: str, names: Iterable[str]) -> list[str]:
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: name == target,
        lambda name: name.endswith(f".{target}"),
        lambda name: fnmatchcase(name, target),
    )
    return next(filter(None, (list(filter(rule, names)) for rule in rules)), [])


def _obstacle(module: nn.Module) -> str | None:
    """Why this layer cannot be replaced, if so."""
    if isinstance(module, NeurocoderLinear):
        return "it is a Neurocoder layer already"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return (
            f"it is a {type(module).__name__}, not a plain nn.Linear or nn.Conv2d, and its owner "
            "may use its weight without calling it"
        )
    return _meddled(module)


def _meddled(module: nn.Module) -> str | None:
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it has hooks (weight norm, pruning), which would be lost"
    if "forward" in vars(module):
        return "its forward has been replaced"
    return None


def _candidates(seats: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in seats.items() if _obstacle(module) is None]


def _no_match(target: str, present: list[str], candidates: list[str]) -> str:
    """What to say where no plain layer matches, but perhaps Neurocoder layers do."""
    if present:
        fault = f"{target!r} matches only Neurocoder layers in place already ({_listed(present)})"
    else:
        fault = f"no layer matches {target!r}"
    if not candidates:
        return f"{fault}; the model has none that can be replaced"
    # A target may be meant for the end of a name, so every end of one is compared.
    ends: dict[str, str] = {}
    for name in candidates:
        end = name.lower()
        while end:
            ends.setdefault(end, name)
            end = end.partition(".")[2]
    hint = ends[nearest(target.lower(), ends)]
    return f"{fault}; nearest: {hint!r}; candidates: {_listed(candidates)}"


def _listed(names: list[str]) -> str:
    listed = ", ".join(names[:MAX_LISTED])
    return listed if len(names) <= MAX_LISTED else f"{listed}, ... ({len(names)} in all)"


def _check_encoders(model: nn.Module, chosen: Collection[nn.Module]) -> None:
    """Refuse what would fail only later: in eval mode, with a padding mask.

    `nn.TransformerEncoder` then looks at its first layer alone to decide whether all layers are fed
    nested tensors, which none but fast paths can read.
    """

    def is_slow(layer: Any) -> bool:
        parts = layer.linear1, layer.linear2, layer.self_attn
        return any(part in chosen or isinstance(part, Replacement) for part in parts)

    for name, encoder in model.named_modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not encoder.use_nested_tensor:
            continue
        first, *others = map(is_slow, encoder.layers)
        if any(others) and not first:
            raise ValueError(
                f"the nn.TransformerEncoder {name!r} feeds nested tensors to all its layers if the "
                "first one has a fast path, which linear1, linear2 and self_attn give it: make one "
                "of these a target in layer 0 as well, or set use_nested_tensor of the encoder to "
                "False"
            )
