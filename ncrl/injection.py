"""Neurocoder layers in the place of the linear layers of any torch model, and back again.

A linear layer can be replaced if whoever calls it sees nothing but its output. So only plain
`nn.Linear` modules are: not subclasses (`nn.MultiheadAttention` computes with the weight of its
`out_proj`, which is one, and never calls it; lazy and parametrized layers are subclasses too), and
none with hooks (weight norm and pruning work by hooks).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from ncrl.neurocoder import NeurocoderConfig, NeurocoderLinear, OfficialNeurocoderLinear
from ncrl.settings import nearest

Injected = TypeVar("Injected", bound="InjectedNeurocoder")

MAX_LISTED = 30
"""Candidates that an error message lists; a transformer can have hundreds."""


def inject(
    model: nn.Module,
    config: NeurocoderConfig | None,
    targets: str | Sequence[str],
    *,
    keep_weight: bool = False,
) -> list[str]:
    """Replace linear layers of `model` by Neurocoder layers, in place.

    This changes the outputs of the model: a new layer starts from scratch but for its bias. Even
    with `keep_weight` the gate and the smallest singular value scale the weight kept, and the
    active program is added to it.

    New layers have the widths, bias, device, type and training mode of those they replace, and are
    trainable even where the host is frozen. Nothing else in the model changes. An optimiser built
    before knows only the old parameters: build it anew.

    A target is one of three things, tried in this order:

    1. the full name of a layer ("net.fc"): that layer alone, so that names returned can be given;
    2. the last parts of names ("fc", "attn.out"): every layer whose name ends with them;
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
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear layer, which cannot be replaced in place: use "
            "NeurocoderLinear.from_linear(model, config), or wrap the model in nn.Sequential"
        )
    seats = _seats(model)
    chosen: set[nn.Module] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        chosen.update(_select(target, seats))
    if not chosen:
        raise ValueError(f"no targets given; candidates: {_listed(_candidates(seats))}")
    _check_encoders(model, chosen)
    is_official = config is not None and config.preset == "official"
    kind = InjectedOfficialNeurocoder if is_official else InjectedNeurocoder
    layers: dict[nn.Module, InjectedNeurocoder] = {}
    for linear in seats.values():  # in this order, whatever that of the targets
        if linear in chosen and linear not in layers:
            assert isinstance(linear, nn.Linear)
            layer = kind.from_linear(linear, config, keep_weight=keep_weight)
            layer.original = (linear,)
            layers[linear] = layer.train(linear.training)
    replaced = [name for name, module in seats.items() if module in chosen]
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
    return names


class InjectedNeurocoder(NeurocoderLinear):
    """A Neurocoder layer that can be ejected. Made by `inject`."""

    original: tuple[nn.Linear, ...] = ()
    """The layer replaced. In a tuple, where torch does not take it for a part of this one."""

    def _apply(self: Injected, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Injected:
        # `.to()`, `.half()`, `.share_memory()` and the like all end here.
        for linear in self.original:
            linear._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class InjectedOfficialNeurocoder(InjectedNeurocoder, OfficialNeurocoderLinear):
    """The authors' layer likewise."""


def _seats(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Neurocoder layers below `model` by all their names, but nothing inside these."""
    seats: dict[str, nn.Module] = {}
    insides: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, NeurocoderLinear)) and not name.startswith(insides):
            insides += (f"{name}." if name else "",)
            if name:
                seats[name] = module
    return seats


def _select(target: str, seats: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The linear layers that `target` means; raises ValueError unless all can be replaced."""
    names = _matching(target, seats)
    linears = [name for name in names if isinstance(seats[name], nn.Linear)]
    if not linears:
        raise ValueError(_no_match(target, names, _candidates(seats)))
    for name in linears:
        if reason := _obstacle(seats[name]):
            raise ValueError(f"{target!r} matches {name!r}, which cannot be replaced: {reason}")
    return [seats[name] for name in linears]


def _matching(target: str, names: Iterable[str]) -> list[str]:
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: name == target,
        lambda name: name.endswith(f".{target}"),
        lambda name: fnmatchcase(name, target),
    )
    return next(filter(None, (list(filter(rule, names)) for rule in rules)), [])


def _obstacle(module: nn.Module) -> str | None:
    """Why this layer cannot be replaced, if so."""
    if not isinstance(module, nn.Linear):
        return "it is a Neurocoder layer already"
    if type(module) is not nn.Linear:
        return (
            f"it is a {type(module).__name__}, not a plain nn.Linear, and its owner may use its "
            "weight without calling it"
        )
    if any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks")):
        return "it has hooks (weight norm, pruning), which would be lost"
    if "forward" in vars(module):
        return "its forward has been replaced"
    return None


def _candidates(seats: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in seats.items() if _obstacle(module) is None]


def _no_match(target: str, present: list[str], candidates: list[str]) -> str:
    """What to say where no linear layer matches, but perhaps Neurocoder layers do."""
    if present:
        fault = f"{target!r} matches only Neurocoder layers in place already ({_listed(present)})"
    else:
        fault = f"no nn.Linear matches {target!r}"
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
        parts = layer.linear1, layer.linear2
        return any(part in chosen or isinstance(part, InjectedNeurocoder) for part in parts)

    for name, encoder in model.named_modules():
        if not isinstance(encoder, nn.TransformerEncoder) or not encoder.use_nested_tensor:
            continue
        first, *others = map(is_slow, encoder.layers)
        if any(others) and not first:
            raise ValueError(
                f"the nn.TransformerEncoder {name!r} feeds nested tensors to all its layers if the "
                "first one has a fast path, which linear1 and linear2 give it: make one of these "
                "a target in layer 0 as well, or set use_nested_tensor of the encoder to False"
            )
