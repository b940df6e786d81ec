"""Slots that are frozen and added: values against a literal reading, and what survives.

Shape letters: B batch, P slots, K key, H heads.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl import NeurocoderConfig, NeurocoderLinear, orthogonal_loss
from ncrl.layers import make_layer
from ncrl.neurocoder.composition import split_head
from ncrl.neurocoder.growth import replace_parameter
from ncrl.neurocoder.integration import Attention
from ncrl.neurocoder.orthogonality import orthogonal_part
from tests.ncrl.layers import parameters_of, random_input, relative_error
from tests.reference import (
    Sizes,
    attention_reference,
    cosine,
    neurocoder_reference,
    orthogonal_norm_reference,
    program_reference,
    softplus,
)

OPTIONS: dict[str, Any] = dict(
    num_slots=4, key_dim=3, num_heads=2, num_steps=2, num_least_used=1, controller_size=5
)
PROJECTION: dict[str, Any] = dict(
    controller="projection",
    num_slots=4,
    key_dim=3,
    num_heads=2,
    num_steps=1,
    num_least_used=0,
    sharpness=5.0,
)
GATES = ("slot-head", "slot", "head")


def make(seed: int = 0, **options: Any) -> NeurocoderLinear:
    """A layer with no parameter at its start."""
    torch.manual_seed(seed)
    layer = NeurocoderLinear(7, 6, **{**OPTIONS, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def train(layer: NeurocoderLinear, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        x = random_input(5, 7, seed=step)
        (layer(x).square().mean() + 0.1 * orthogonal_loss(layer)).backward()
        optimizer.step()


def whole_state(layer: NeurocoderLinear) -> dict[str, Tensor]:
    """Parameters of a layer of the same slots of which none is frozen."""
    state = parameters_of(layer)
    for name in "uvs":
        state[f"memory.{name}"] = layer.memory.stored(name).detach()
    return state


@pytest.mark.parametrize("gate", GATES)
def test_a_grown_layer_is_the_layer_of_all_its_slots(gate: str) -> None:
    layer = make(gate=gate)
    layer.freeze_slots()
    layer.grow(3)
    sizes = Sizes(7, 3, 2, 2, 1, 1.0, gate, False)
    x = random_input(4, 7)
    # The key network has not changed since the slots were frozen, so their keys are what it says.
    expected = neurocoder_reference(whole_state(layer), sizes, x)
    assert relative_error(layer(x), expected["output"]) < 1e-9
    assert relative_error(layer.program(x), expected["program"]) < 1e-9
    loss = sum(orthogonal_norm_reference(layer.memory.stored(name)) for name in "uv")
    assert relative_error(orthogonal_loss(layer), torch.as_tensor(loss)) < 1e-9


@pytest.mark.parametrize("gate", GATES)
def test_gates_of_old_slots_stay_and_new_ones_are_half_open(gate: str) -> None:
    layer = make(gate=gate)
    before = [
        p.detach().clone() for p in (layer.composition.head.weight, layer.composition.head.bias)
    ]
    old_config = layer.config
    layer.grow(2)
    after = [layer.composition.head.weight, layer.composition.head.bias]
    for old, new in zip(before, after, strict=True):
        old_queries, old_gates = split_head(old.movedim(0, -1), old_config)
        queries, gates = split_head(new.movedim(0, -1), layer.config)
        assert torch.equal(queries, old_queries)
        assert old_gates is not None and gates is not None
        count = old_gates.shape[-1]
        assert torch.equal(gates[..., :count], old_gates)
        assert not gates[..., count:].any()
    assert layer.composition.head.out_features == len(after[1])


def test_a_projection_layer_equals_a_literal_reading() -> None:
    layer = make(**PROJECTION, residual=True)
    assert isinstance(layer.composition.center, Tensor)
    layer.composition.center.normal_()
    layer.freeze_slots()
    layer.grow(2)
    x = random_input(3, 7)
    memory, network = layer.memory, layer.composition
    slots = [memory.stored(name) for name in "uvs"]
    keys = memory.keys()  # [H, P, K]
    for b in range(3):
        described = network.projection @ (x[b] - network.center)
        evidence = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
        for h in range(2):
            query = described[3 * h : 3 * h + 3]
            for group, slots_of in enumerate((range(4), range(4, 6))):
                best = max(5.0 * cosine(query, keys[h, p]) for p in slots_of)
                evidence[group] = evidence[group] + best
        shares = torch.stack(evidence).softmax(0)
        sigma, u, v = [], [], []
        for h in range(2):
            query = described[3 * h : 3 * h + 3]
            own = [5.0 * cosine(query, keys[h, p]) for p in range(6)]
            inside = [torch.stack(own[:4]).softmax(0), torch.stack(own[4:]).softmax(0)]
            weights = torch.cat([part * share for part, share in zip(inside, shares, strict=True)])
            u.append(sum(weights[p] * slots[0][p] for p in range(6)))
            v.append(sum(weights[p] * slots[1][p] for p in range(6)))
            sigma.append(softplus(sum(weights[p] * slots[2][p, 0] for p in range(6))))
        program = sum(sum(sigma[n:]) * torch.outer(u[n], v[n]) for n in range(2))
        assert layer.integration is not None and layer.integration.gate is not None
        gate = (layer.integration.gate.weight @ x[b] + layer.integration.gate.bias).sigmoid()
        program = program + gate * sigma[1] * layer.integration.matrix()
        assert relative_error(layer.program(x)[b], program) < 1e-9
        assert relative_error(layer(x)[b], x[b] @ program + layer.bias) < 1e-9


@pytest.mark.parametrize("options", [OPTIONS, PROJECTION], ids=["lstm", "projection"])
def test_frozen_slots_stay_bit_for_bit_whatever_is_trained(options: dict[str, Any]) -> None:
    layer = make(**options)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    train(layer, optimizer)
    before = layer(random_input(4, 7))
    layer.freeze_slots(optimizer)
    assert torch.equal(layer(random_input(4, 7)), before)
    layer.grow(3, optimizer)
    held = [layer.memory.stored(name)[:4].clone() for name in "uvs"] + [layer.memory.keys()[:, :4]]
    new = layer.memory.stored("u")[4:].clone()
    train(layer, optimizer)
    now = [layer.memory.stored(name)[:4] for name in "uvs"] + [layer.memory.keys()[:, :4]]
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
    assert not torch.equal(layer.memory.stored("u")[4:], new)
    x = random_input(2, 7)
    attention: Attention = layer.attend(x)
    assert attention.u.shape[-1] == 7 and (attention.u[..., :4] > 0).all()


def test_slots_freeze_and_grow_while_an_old_loss_is_kept() -> None:
    """As by a loop that has not left it behind: its graph knows the parameters' old shapes."""
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    changes = (
        lambda: None,
        lambda: layer.freeze_slots(optimizer),
        lambda: layer.grow(2, optimizer),
    )
    for change in changes:
        change()
        before = layer.memory.u.detach().clone()
        optimizer.zero_grad()
        loss = layer(random_input(5, 7)).square().mean()
        loss.backward()
        optimizer.step()
        assert len(before) == 0 or not torch.equal(layer.memory.u, before)


def test_freezing_again_holds_the_slots_that_came_since() -> None:
    layer = make()
    layer.freeze_slots()
    layer.grow(2)
    rows, keys = layer.memory.stored("v").clone(), layer.memory.keys().clone()
    layer.freeze_slots()
    layer.freeze_slots()
    assert layer.memory.v.shape == (0, 6)
    layer.grow(1)
    assert torch.equal(layer.memory.stored("v")[:6], rows)
    assert torch.equal(layer.memory.keys()[:, :6], keys)


@pytest.mark.parametrize("frozen", [False, True])
def test_new_rows_start_at_right_angles_to_old_ones_while_there_is_room(frozen: bool) -> None:
    layer = make()  # 4 slots, widths 7 and 6
    if frozen:
        layer.freeze_slots()
    layer.grow(2)
    assert layer.memory.s[-2:].all()  # drawn, as in a new layer
    for name in "uv":
        rows = layer.memory.stored(name)
        assert (rows[4:] @ rows[:4].T).abs().max() < 1e-12
        assert (rows[4:].norm(dim=1) > 0.1).all()
    layer.grow(3)  # 6 rows of width 6 leave no room in v
    assert (layer.memory.stored("v")[6:].norm(dim=1) > 0.1).all()
    rows = random_input(2, 5)
    assert torch.equal(orthogonal_part(rows, random_input(5, 5)), rows)


def test_rows_that_nearly_are_others_end_at_right_angles_to_them_at_their_own_lengths() -> None:
    others = random_input(2, 5)
    rows = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64) @ others
    rows += 1e-9 * random_input(2, 5, seed=9)
    free = orthogonal_part(rows, others)
    assert (free @ others.T).abs().max() < 1e-13
    assert torch.allclose(free.norm(dim=1), rows.norm(dim=1), rtol=1e-12)


def test_growth_does_not_thaw_a_frozen_controller() -> None:
    layer = make(frozen_controller=True)
    layer.grow(2)
    assert not any(p.requires_grad for p in layer.composition.parameters())


def test_an_optimiser_that_keeps_rows_and_columns_goes_on_through_growth() -> None:
    layer = make()
    optimizer = torch.optim.Adafactor(layer.parameters(), lr=0.05)
    train(layer, optimizer)
    kept = dict(optimizer.state[layer.memory.u])
    layer.grow(2, optimizer)
    state = optimizer.state[layer.memory.u]
    assert torch.equal(state["row_var"][:4], kept["row_var"]) and not state["row_var"][4:].any()
    assert torch.equal(state["col_var"], kept["col_var"])
    train(layer, optimizer)
    layer.freeze_slots(optimizer)
    layer.grow(1, optimizer)
    train(layer, optimizer)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_one_that_keeps_columns_goes_on_from_a_single_slot() -> None:
    layer = make()
    optimizer = torch.optim.Adafactor(layer.parameters(), lr=0.05)
    layer.freeze_slots(optimizer)
    layer.grow(1, optimizer)
    train(layer, optimizer)
    layer.grow(3, optimizer)
    train(layer, optimizer)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_a_load_that_is_refused_leaves_the_frozen_slots_as_they_were() -> None:
    few = make()
    few.freeze_slots()
    few.grow(2)
    more = make()
    for _ in range(2):
        more.freeze_slots()
        more.grow(2)
    groups, x = more.memory.groups(), torch.randn(3, more.in_features, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="frozen"):
        more.load_state_dict(few.state_dict())
    assert more.memory.groups() == groups and more(x).isfinite().all()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("num_slots", [3, 4, 5, 7])
@pytest.mark.parametrize("options", [OPTIONS, PROJECTION], ids=["lstm", "projection"])
def test_a_load_that_is_refused_freezes_nothing(
    options: dict[str, Any], num_slots: int, strict: bool
) -> None:
    frozen = make(**{**options, "num_slots": 4})
    frozen.freeze_slots()
    frozen.grow(5)
    layer = make(**{**options, "num_slots": num_slots})
    with pytest.raises(RuntimeError, match="memory: 9 slots, 4 of them frozen"):
        layer.load_state_dict(frozen.state_dict(), strict=strict)
    assert layer.memory.groups() == [num_slots] == [len(layer.memory.u)]
    assert layer(random_input(3, layer.in_features)).isfinite().all()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD])
@pytest.mark.parametrize("gate", GATES)
def test_an_optimiser_goes_on_through_growth(kind: type[torch.optim.Optimizer], gate: str) -> None:
    """Old rows move as those of a layer in which new rows have no gradient."""
    layer = make(gate=gate)
    options = {"momentum": 0.9} if kind is not torch.optim.Adam else {}
    optimizer = kind(layer.parameters(), lr=0.05, **options)
    train(layer, optimizer)
    old = dict(layer.named_parameters())
    kept = {name: dict(optimizer.state[p]) for name, p in old.items()}
    order = list(old)
    layer.grow(2, optimizer)
    new = dict(layer.named_parameters())
    assert list(new) == order
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(ours, new.values(), strict=True))
    for name in ("memory.u", "memory.v", "memory.s"):
        for key, value in kept[name].items():
            grown = optimizer.state[new[name]][key]
            if isinstance(value, Tensor) and value.dim() == 2:
                assert torch.equal(grown[:4], value) and not grown[4:].any()
            else:
                assert grown is value
    assert set(optimizer.state) == set(new.values())
    train(layer, optimizer)


def test_fused_momentum_goes_on_beside_slots_that_are_new() -> None:
    """Its kernel needs a buffer for every parameter, or for none; zeros are what none begins as."""
    layers = [make(), make()]
    for layer, fused in zip(layers, (True, False), strict=True):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, fused=fused)
        train(layer, optimizer)
        layer.freeze_slots(optimizer)
        torch.manual_seed(1)
        layer.grow(2, optimizer)
        train(layer, optimizer)
    for ours, plain in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain)


def test_an_optimiser_that_keeps_the_list_of_its_parameters_knows_the_new_ones() -> None:
    layer = make()
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1)
    layer.freeze_slots(optimizer)
    layer.grow(2, optimizer)
    new = layer.memory.u.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(random_input(5, 7)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(layer.memory.u, new)


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_what_an_optimiser_keeps_is_changed_with_its_parameter(rows: int) -> None:
    """`rows` of four are left. Without any, averages begin anew, and so does their counter."""
    module = torch.nn.Linear(3, 4)
    old = module.weight
    optimizer = torch.optim.Adam([{"params": [module.bias]}, {"params": [old], "lr": 0.5}])
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    kept = optimizer.state[old]
    kept["exp of rows"], kept["of columns"] = torch.ones(4, 1), torch.ones(1, 3)
    first = dict(kept)
    replace_parameter(module, "weight", lambda t: t[:rows], optimizer)
    cut = module.weight
    assert torch.equal(cut, old[:rows])
    assert cut.untyped_storage().nbytes() == cut.nbytes, "nothing of the rest is held"
    assert [group["params"][0] for group in optimizer.param_groups] == [module.bias, cut]
    assert old not in optimizer.state
    for name, value in first.items():
        expected = value[:rows] if name.startswith("exp") else value
        assert torch.equal(optimizer.state[cut][name], expected)
    replace_parameter(module, "weight", lambda t: F.pad(t, (0, 0, 0, 1)), optimizer)
    assert module.weight.shape == (rows + 1, 3) and not module.weight[rows:].any()
    assert (module.weight in optimizer.state) == (rows > 0)


@pytest.mark.parametrize("built_before", [False, True])
def test_a_checkpoint_of_a_grown_layer_goes_on_exactly(built_before: bool) -> None:
    """Also in the usual order: model, optimiser, then the weights of the one and the state of the
    other."""
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    train(layer, optimizer)
    layer.freeze_slots(optimizer)
    layer.grow(3, optimizer)
    train(layer, optimizer)
    other = make(seed=1, num_slots=7)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
    other.load_state_dict(layer.state_dict())
    if not built_before:
        other_optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = other.memory.u.detach().clone()
    for each, its in ((layer, optimizer), (other, other_optimizer)):
        train(each, its)
    assert not torch.equal(other.memory.u, before)
    assert other.config == layer.config
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(random_input(2, 7)), layer(random_input(2, 7)))
        copied.load_state_dict(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_gradients_from_before_loading_are_not_those_of_the_slots_that_are_left() -> None:
    layer = make()
    layer.freeze_slots()
    layer.grow(3)
    other = make(seed=1, num_slots=7)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(random_input(5, 7)).square().mean().backward()
    other.load_state_dict(layer.state_dict())
    optimizer.step()
    for name in "uvs":
        assert torch.equal(other.memory.stored(name), layer.memory.stored(name)), name


@pytest.mark.parametrize(
    ("counts", "others"), [((4, 2, 1), (7,)), ((3, 1, 3), (1, 3, 3)), ((4, 3), (1, 3, 3))]
)
def test_groups_of_slots_are_loaded(counts: tuple[int, ...], others: tuple[int, ...]) -> None:
    """Also into a layer that has frozen as many slots, but not at the same times."""

    def grown(*counts: int) -> NeurocoderLinear:
        layer = make(seed=counts[0], **PROJECTION | dict(num_slots=counts[0]))
        for count in counts[1:]:
            layer.freeze_slots()
            layer.grow(count)
        return layer

    layer, other = grown(*counts), grown(*others)
    other.load_state_dict(layer.state_dict())
    assert other.memory.groups() == layer.memory.groups() == list(counts)
    assert torch.equal(other(random_input(3, 7)), layer(random_input(3, 7)))


def test_programs_for_one_input_from_another() -> None:
    layer = make(context_features=3, residual=True)
    x, context = random_input(2, 4, 7), random_input(2, 4, 3, seed=2)
    applied = torch.einsum("...i,...io->...o", x, layer.program(context)) + layer.bias
    assert relative_error(layer(x, context), applied) < 1e-9
    sizes = Sizes(4, 3, 2, 2, 1, 1.0, "slot-head", False)
    state = parameters_of(layer)
    expected = attention_reference(state, sizes, context[0, 0])
    for part, literal in zip(layer.attend(context), expected, strict=True):
        assert relative_error(part[0, 0], torch.stack(literal)) < 1e-9
    sigma, program = program_reference(state, sizes, context[0, 0], expected)
    assert relative_error(layer.singular_values(context)[0, 0], sigma) < 1e-9
    assert relative_error(layer.program(context)[0, 0], program) < 1e-9


def test_autocast_leaves_what_slots_read_of_another_input_in_float32() -> None:
    """A mean that no slot reads would cost all eight bits."""
    layer = make(context_features=3, residual=False).float()
    with torch.no_grad():
        layer.memory.u -= layer.memory.u.mean(1, keepdim=True)
    x, context = 1000 + random_input(4, 7).float(), random_input(4, 3, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, context)
    assert relative_error(y.float(), layer(x, context)) < 0.1


def test_refusals() -> None:
    official = make_layer("neurocoder", 5, 4, preset="official")
    for call in (official.freeze_slots, lambda: official.grow(2)):
        with pytest.raises(ValueError, match="official"):
            call()
    with pytest.raises(ValueError, match="context_features=3"):
        make_layer("neurocoder", 5, 4, preset="official", context_features=3)
    with pytest.raises(ValueError, match="num_slots must be an integer of at least 1, got 0"):
        make().grow(0)
    with pytest.raises(ValueError, match="got no context"):
        make(context_features=3)(random_input(2, 7))
    with pytest.raises(ValueError, match="got a context"):
        make()(random_input(2, 7), random_input(2, 7))
    with pytest.raises(ValueError, match="context_features=3, got shape"):
        make(context_features=3)(random_input(2, 7), random_input(2, 4))
    with pytest.raises(ValueError, match="10 inputs need as many contexts, got 2"):
        make(context_features=4)(random_input(2, 5, 7), random_input(2, 4))
    with pytest.raises(ValueError, match=r"have shape \[2, 5, 4\], got \[5, 2, 4\]"):
        make(context_features=4)(random_input(2, 5, 7), random_input(5, 2, 4))
    with pytest.raises(ValueError, match="needs num_least_used=0, got 2"):
        NeurocoderConfig(controller="projection")
