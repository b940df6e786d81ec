"""Neurocoder layers in the place of layers of any torch model, and back again.

A layer can be replaced if whoever calls it sees nothing but its output. So only plain `nn.Linear`
and `nn.Conv2d` modules are: not subclasses, and none with hooks (weight norm and pruning work by
hooks). `nn.MultiheadAttention` never calls its projections: it is opened first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from typing import TypeGuard

from torch import nn

from ncrl.checks import nearest, shown
from ncrl.neurocoder import (
    NeurocoderConfig,
    NeurocoderConv2d,
    NeurocoderLinear,
    layer_class,
)
from ncrl.open_attention import ORIGINAL, OpenAttention
from ncrl.seat import has_hooks

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

    This changes the outputs of the model: a new layer starts from scratch but for its bias.

    New layers have the sizes, bias, device, type and training mode of those they replace, and are
    trainable even where the host is frozen. Nothing else in the model changes. An optimiser or
    `DistributedDataParallel` built before knows only the old parameters: build it anew.

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
        ValueError: if `model` is no module, if a target matches nothing (the message lists what
            could be matched) or a layer that cannot be replaced, or a new layer cannot be built.
            The model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> inject(model, NeurocoderConfig(num_slots=10), "2")
        ['2']
        >>> eject(model)
        ['2']
    """
    _check_model(model)
    if isinstance(model, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: use "
            "from_linear of NeurocoderLinear or from_conv2d of NeurocoderConv2d, or wrap the model "
            "in nn.Sequential"
        )
    opened: dict[nn.Module, OpenAttention] = {
        module: OpenAttention(module) for module in model.modules() if _can_open(module)
    }
    seats = _seats(model, opened)
    chosen: set[nn.Module] = set()
    several = isinstance(targets, Iterable) and not isinstance(targets, str)
    for target in targets if several else [targets]:
        if not isinstance(target, str):
            raise ValueError(f"a target is the name of a layer or a pattern, got {shown(target)}")
        chosen.update(_select(target, seats, model))
    if not chosen:
        raise ValueError(f"no targets given; candidates: {_listed(_candidates(seats))}")
    _check_encoders(model, {*chosen, *(m for m, o in opened.items() if chosen & {*o.children()})})
    layers: dict[nn.Module, NeurocoderLinear] = {}
    for plain in seats.values():  # in this order, whatever that of the targets
        if plain in chosen and plain not in layers:
            layer = _coded(plain, config, keep_weight)
            vars(layer)[ORIGINAL] = plain
            layers[plain] = layer.train(plain.training)
    replaced = [name for name, module in seats.items() if module in chosen]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in opened and chosen.intersection(opened[module].children()):
            model.set_submodule(name, opened[module].with_own_weights())
    for name in replaced:
        model.set_submodule(name, layers[seats[name]])
    return replaced


def eject(model: nn.Module) -> list[str]:
    """Undo every `inject`: put the original modules back, the very same objects, in place.

    What the new layers have learned is dropped. If the rest of the model is as it was, so are its
    outputs and its state_dict, bit for bit. An optimiser has to be built anew, as after `inject`.

    Until then each new layer keeps its original, hidden from `parameters()` and `state_dict()`, but
    not from copies and pickles of the model. It comes back to where the layer is, in device and
    type.

    Returns:
        Names of the layers put back, in the order of `model.named_modules()`; [] if there are none.

    Raises:
        ValueError: if `model` is no module, or itself an injected layer.
    """
    _check_model(model)
    if ORIGINAL in vars(model):
        raise ValueError("an injected layer cannot eject itself: pass the model that contains it")
    names = []
    for name, layer in _seats(model).items():
        if isinstance(layer, NeurocoderLinear) and ORIGINAL in vars(layer):
            original = vars(layer)[ORIGINAL].to(layer.memory.u)
            model.set_submodule(name, original.train(layer.training))
            names.append(name)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, OpenAttention):
            model.set_submodule(name, module.close())
    return names


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected a torch module, got {type(model).__name__}; an algorithm of "
            "Stable-Baselines3 has one: model.policy"
        )


def _coded(plain: nn.Module, config: NeurocoderConfig | None, keep: bool) -> NeurocoderLinear:
    """A new layer in the sizes of a plain one."""
    if isinstance(plain, nn.Conv2d):
        return NeurocoderConv2d.from_conv2d(plain, config, keep_weight=keep)
    assert isinstance(plain, nn.Linear)
    kind = layer_class(getattr(config, "preset", "paper"))
    return kind.from_linear(plain, config, keep_weight=keep)


def _can_open(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    return (
        type(module) is nn.MultiheadAttention
        and type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
        and module.bias_k is None
        and not module.add_zero_attn
        and not (_meddled(module) or _meddled(module.out_proj))
    )


def _seats(
    model: nn.Module, opened: Mapping[nn.Module, OpenAttention] | None = None
) -> dict[str, nn.Module]:
    """Layers below `model` that are or could be Neurocoder layers, by all their names, but nothing
    inside these; of attention, the projections that it would have if it were opened."""
    seats: dict[str, nn.Module] = {}
    insides: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(insides):
            continue
        if opened and module in opened:
            seats |= {f"{name}.{part}": one for part, one in opened[module].named_children()}
        elif not isinstance(module, (nn.Linear, nn.Conv2d, NeurocoderLinear)):
            continue
        elif name:
            seats[name] = module
        insides += (f"{name}." if name else "",)
    return seats


def _select(target: str, seats: Mapping[str, nn.Module], model: nn.Module) -> list[nn.Module]:
    """The layers that `target` means; raises ValueError unless all can be replaced."""
    names = _matching(target, seats)
    plain = [name for name in names if not isinstance(seats[name], NeurocoderLinear)]
    if not plain:
        raise ValueError(_no_match(target, names, seats, model))
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
    if not module.weight.dtype.is_floating_point:
        return f"its numbers are of type {module.weight.dtype}, not real floating-point ones"
    return _meddled(module)


def _meddled(module: nn.Module) -> str | None:
    if has_hooks(module):
        return "it has hooks (weight norm, pruning), which would be lost"
    if "forward" in vars(module):
        return "its forward has been replaced"
    return None


def _check_encoders(model: nn.Module, changed: Set[nn.Module]) -> None:
    """Refuse what would fail only later: in eval mode, with a padding mask.

    `nn.TransformerEncoder` then looks at its first layer alone to decide whether all layers are fed
    nested tensors, which none but fast paths can read.
    """
    coded = (NeurocoderLinear, OpenAttention)
    for name, encoder in model.named_modules():
        if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
            first, *others = (
                any(part in changed or isinstance(part, coded) for part in layer.modules())
                for layer in encoder.layers
            )
            if any(others) and not first:
                raise ValueError(
                    f"the nn.TransformerEncoder {name!r} feeds nested tensors to all its layers if "
                    "the first one has a fast path: make a part of layer 0 a target as well, or "
                    "set use_nested_tensor of the encoder to False"
                )


def _candidates(seats: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in seats.items() if _obstacle(module) is None]


def _no_match(
    target: str, present: list[str], seats: Mapping[str, nn.Module], model: nn.Module
) -> str:
    """What to say where no plain layer matches, but perhaps Neurocoder layers or others do."""
    candidates, insides = _candidates(seats), tuple(f"{name}." for name in seats)
    others = dict(model.named_modules())
    other = next(
        (name for name in _matching(target, others) if name and not name.startswith(insides)), None
    )
    if present:
        fault = f"{target!r} matches only Neurocoder layers in place already ({_listed(present)})"
    else:
        fault = f"no layer matches {target!r}"
        if other is not None:
            fault += f" ({other!r} is of type {type(others[other]).__name__})"
    if not candidates:
        return f"{fault}; the model has none that can be replaced"
    if any(name.startswith(f"{other}.") for name in candidates):
        return f"{fault}; nearest: '{other}.*'; candidates: {_listed(candidates)}"
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
