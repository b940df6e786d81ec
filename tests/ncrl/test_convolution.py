"""NeurocoderConv2d against convolutions with the kernels that a slow reading composes.

Shape letters: B batch, C channels, P slots, R components.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncrl import NeurocoderConfig, NeurocoderConv2d, orthogonal_loss
from tests.ncrl.layers import LargestTensor, parameters_of, random_input, relative_error
from tests.reference import (
    Sizes,
    attention_reference,
    neurocoder_reference,
    program_reference,
)

OPTIONS: dict[str, Any] = dict(
    num_slots=5, key_dim=3, num_heads=2, num_steps=2, num_least_used=1, controller_size=4
)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": dict(stride=2, padding=1),
    "rectangle": dict(kernel_size=(3, 2), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    "groups": dict(groups=2, padding=1),
    "depthwise": dict(groups=4, padding=1, out_channels=8),
    "same": dict(padding="same", kernel_size=(4, 3), dilation=(1, 2)),
    "valid": dict(padding="valid", bias=False),
    "reflect": dict(padding=(1, 2), padding_mode="reflect", stride=(2, 1)),
    "circular-same": dict(
        padding="same", padding_mode="circular", kernel_size=(2, 3), dilation=(1, 2)
    ),
    "replicate-valid": dict(padding="valid", padding_mode="replicate", residual=False),
    "one-by-one": dict(kernel_size=1),
    "residual-rank": dict(residual_rank=2, groups=2),
    "residual-without-gate": dict(residual_gate=False, padding=1),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def seat_of(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments that nn.Conv2d has, too."""
    seat = dict(in_channels=4, out_channels=6, kernel_size=3) | case
    return {name: value for name, value in seat.items() if not name.startswith("residual")}


def make(case: dict[str, Any]) -> NeurocoderConv2d:
    """A layer with no parameter at its start."""
    torch.manual_seed(0)
    layer = NeurocoderConv2d(**{**OPTIONS, **seat_of(case), **case}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def literal(layer: NeurocoderConv2d, case: dict[str, Any], images: Tensor) -> Tensor:
    """Image by image: the program by loops, as the kernel of torch's own convolution."""
    plain = nn.Conv2d(**seat_of(case), dtype=torch.float64)
    state = parameters_of(layer)
    sizes = Sizes(5, 3, 2, 2, 1, 1.0, "slot-head", False)
    outputs = []
    for image in images:
        description = torch.stack([channel.sum() / channel.numel() for channel in image])
        weights = attention_reference(state, sizes, description)
        _, program = program_reference(state, sizes, description, weights)
        with torch.no_grad():
            plain.weight.copy_(program.T.reshape(plain.weight.shape))
            if plain.bias is not None:
                plain.bias.copy_(state["bias"])
            outputs.append(plain(image))
    return torch.stack(outputs)


@all_cases
def test_outputs_equal_those_of_composed_kernels(case: dict[str, Any]) -> None:
    layer = make(case)
    images = random_input(3, 4, 7, 6)
    assert relative_error(layer(images), literal(layer, case, images)) < 1e-9
    assert relative_error(layer(images[1]), layer(images)[1]) < 1e-9
    kernels = layer.kernel(images)
    assert kernels.shape == (3, *nn.Conv2d(**seat_of(case)).weight.shape)


@pytest.mark.parametrize("name", ["stride", "groups", "circular-same"])
def test_gradients_equal_those_through_composed_kernels(name: str) -> None:
    case = CASES[name]
    layer = make(case)
    images = random_input(2, 4, 7, 6).requires_grad_()
    target = random_input(*layer(images).shape, seed=5)
    inputs = [images, *layer.parameters()]
    folded = torch.autograd.grad((layer(images) * target).sum(), inputs)
    plain = nn.Conv2d(**seat_of(case), bias=False, dtype=torch.float64)
    outputs = []
    for image, kernel in zip(images, layer.kernel(images), strict=True):
        called = torch.func.functional_call(plain, {"weight": kernel}, image[None])
        outputs.append(called[0] + layer.bias[:, None, None])
    through = torch.autograd.grad((torch.stack(outputs) * target).sum(), inputs)
    for ours, theirs in zip(folded, through, strict=True):
        assert relative_error(ours, theirs) < 1e-9


def test_a_context_takes_the_place_of_the_description() -> None:
    layer = make({})
    images = random_input(2, 4, 7, 6)
    context = layer.description(images).flip(0)
    swapped = [F.conv2d(images[i], layer.kernel(images)[1 - i]) for i in range(2)]
    expected = torch.stack(swapped) + layer.bias[:, None, None]
    assert relative_error(layer(images, context), expected) < 1e-9
    assert relative_error(layer(images[1], context[1]), expected[1]) < 1e-9


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 1, 4), (3, 4)])
def test_every_image_needs_its_own_context(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 inputs need as many contexts"):
        make({})(random_input(2, 4, 7, 6), random_input(*shape))


def test_a_single_image_needs_a_context_without_further_dimensions() -> None:
    with pytest.raises(ValueError, match=r"have shape \[4\], got \[1, 4\]"):
        make({})(random_input(4, 7, 6), random_input(1, 4))


def test_a_kernel_of_one_on_one_position_is_the_linear_layer() -> None:
    layer = make(dict(kernel_size=1))
    x = random_input(3, 4)
    sizes = Sizes(5, 3, 2, 2, 1, 1.0, "slot-head", False)
    expected = neurocoder_reference(parameters_of(layer), sizes, x)["output"]
    assert relative_error(layer(x[:, :, None, None])[..., 0, 0], expected) < 1e-9


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_is_that_of_the_input(channels_last: bool) -> None:
    layer = make(CASES["groups"])
    images = random_input(2, 4, 7, 6)
    form = torch.channels_last if channels_last else torch.contiguous_format
    y = layer(images.contiguous(memory_format=form))
    assert y.is_contiguous(memory_format=form)
    assert relative_error(y, layer(images)) < 1e-12


def test_images_that_have_both_memory_formats_give_plain_outputs() -> None:
    images = random_input(2, 1, 7, 6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert make(dict(in_channels=1))(images).is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_one_by_one_in_vmap(channels_last: bool) -> None:
    layer, images = make(CASES["groups"]), random_input(3, 2, 4, 7, 6)
    if channels_last:
        images = images.movedim(2, -1).contiguous().movedim(-1, 2)
    found = torch.vmap(layer)(images)
    assert relative_error(found, layer(images.flatten(0, 1)).unflatten(0, (3, 2))) < 1e-12


def test_no_image_gets_a_kernel_of_its_own() -> None:
    layer = NeurocoderConv2d(64, 64, 3, num_slots=4, num_heads=2, num_least_used=0)
    with LargestTensor() as seen, torch.no_grad():
        layer(torch.zeros(16, 64, 4, 4))
    assert seen.largest < 16 * layer.memory.u.shape[1] * 64 / 4


@all_cases
def test_a_layer_made_from_a_convolution_has_its_seat(case: dict[str, Any]) -> None:
    conv = nn.Conv2d(**seat_of(case), dtype=torch.float64)
    layer = NeurocoderConv2d.from_conv2d(conv, NeurocoderConfig(**OPTIONS))
    images = random_input(2, 4, 7, 6)
    assert layer(images).shape == conv(images).shape
    for name in ("stride", "padding", "dilation", "groups", "kernel_size", "padding_mode"):
        assert getattr(layer, name) == getattr(conv, name)
        assert f"{name}={getattr(conv, name)}" in repr(layer).replace("'", "")
    assert (layer.bias is None) == (conv.bias is None)
    assert layer.integration is not None
    assert not torch.equal(layer._as_kernels(layer.integration.matrix()), conv.weight)


def test_a_layer_is_made_on_the_device_of_its_convolution() -> None:
    conv = nn.Conv2d(4, 6, 3, device="meta")
    layer = NeurocoderConv2d.from_conv2d(conv, NeurocoderConfig(**OPTIONS))
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_slots_grow_and_weights_can_be_kept() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    config = NeurocoderConfig(**OPTIONS)
    layer = NeurocoderConv2d.from_conv2d(conv, config, keep_weight=True)
    assert layer.integration is not None and layer.bias is not None
    assert torch.equal(layer.bias, conv.bias)  # type: ignore[arg-type]
    kept = layer._as_kernels(layer.integration.matrix())
    assert torch.equal(kept, conv.weight)
    with pytest.raises(ValueError, match="needs a residual program"):
        NeurocoderConv2d.from_conv2d(conv, config, keep_weight=True, residual=False)
    images = random_input(2, 4, 5, 5)
    before = layer(images)
    layer.freeze_slots()
    assert torch.equal(layer(images), before)
    layer.grow(2)
    assert layer.attend(layer.description(images)).v.shape == (2, 4, 7)
    assert copy.deepcopy(layer)(images).shape == before.shape
    assert orthogonal_loss(layer).item() > 0


def test_impossible_arguments_are_refused() -> None:
    for options, message in (
        (dict(groups=3), "divisible by groups"),
        (dict(num_slots=0), "num_slots"),
        (dict(preset="official"), "official"),
    ):
        with pytest.raises(ValueError, match=message):
            NeurocoderConv2d(4, 6, 3, **options)  # type: ignore[arg-type]
    for shape in ((2, 3, 5, 5), (4, 5), (1, 2, 4, 5, 5)):
        with pytest.raises(ValueError, match="in_channels=4, got shape"):
            make({})(random_input(*shape))


def test_autocast_gives_the_type_of_a_plain_convolution() -> None:
    layer = NeurocoderConv2d(4, 6, 3, num_slots=5)
    images = torch.randn(2, 4, 7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(images)
        assert half.dtype == F.conv2d(images, torch.zeros(6, 4, 3, 3)).dtype
    torch.testing.assert_close(half.float(), layer(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_no_images_give_no_outputs(name: str) -> None:
    layer, x = make(CASES[name]), torch.zeros(0, 4, 6, 6, dtype=torch.float64)
    y = layer(x)
    y.sum().backward()
    assert y.shape == nn.Conv2d(**seat_of(CASES[name]), dtype=torch.float64)(x).shape


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_exported_with_free_sizes(name: str, tmp_path: Path) -> None:
    layer, x = make(CASES[name]).float().eval(), torch.randn(5, 4, 6, 6)
    free = ({axis: torch.export.Dim(f"size{axis}", min=4) for axis in (0, 2, 3)},)
    example = torch.randn(5, 4, 6, 7)
    exported = torch.export.export(layer, (example,), dynamic_shapes=free).module()
    for other in (torch.randn(7, 4, 6, 6), torch.randn(4, 4, 9, 8)):
        torch.testing.assert_close(exported(other), layer(other))
    file = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), file, dynamo=False)
    assert file.stat().st_size > 0
