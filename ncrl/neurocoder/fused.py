"""The same programs as `composition` and `integration` compose, with a gradient derived by hand.

What costs time in a Neurocoder layer is passes over attention, 3 H P numbers for each step and
input. This module makes as few as it can, in place where it can, on blocks of inputs that fit into
the caches, and keeps three such tensors for the backward pass (six when there are several steps).
Tests hold it to the plain equations.

Shapes: B inputs, P slots, H heads, J steps, R = J * H components, K key width, h LSTM width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ncrl.neurocoder.attention import NORM_FLOOR, inverse_norm, kth_smallest
from ncrl.neurocoder.composition import split_slots
from ncrl.neurocoder.config import NeurocoderConfig
from ncrl.neurocoder.integration import sum_of_smaller
from ncrl.neurocoder.workspace import Workspace

BLOCK = 1 << 21
"""Attention weights, 3 R P for each input, that are worked on at a time."""

LOG2_E = math.log2(math.e)

LARGEST_EXPONENT = 60.0
"""Up to this sharpness e to the power of a score, and sums of them, can neither overflow nor vanish
in single precision, so that the softmax need not look for the largest first. On the CPU, powers of
two then take half the time of `torch.softmax`."""


class Saved(NamedTuple):
    """What the backward pass needs of a block, beside inputs and outputs."""

    queries: Tensor
    """Unit queries, [3, K, H, J B]."""

    inverse_norm: Tensor
    """1 / length of the queries before, [3, 1, H, J B]."""

    content: Tensor
    """Content attention, [3, P, H, J B]."""

    gates: Tensor | None
    """After the sigmoid, broadcasting with `content`."""

    moved: Tensor
    """gates * (content - least), how far each weight was moved from usage to content attention.
    Where there is no usage attention, and so for J = 1, the weights themselves."""

    weights: Tensor
    """[3, P, H, J B]."""

    read_u: Tensor
    """x u_n^T, [H, J, B]."""

    read_s: Tensor
    """w^s_n M_S, [H, J, B]."""

    selected: Tensor | None
    """1 where a slot is among the least used, else 0: [3, P, H, J B]; the first step is void."""

    won: Tensor | None
    """1 where a weight is the largest of all steps so far; likewise."""

    peaks: Tensor | None
    """The most used slot before each step after the first, [J - 1, 3, 1, H, B]."""


_Usage = tuple[Tensor | None, Tensor | None, Tensor | None]

Kept = list[tuple[Saved, Workspace]]
"""What the backward pass needs of every block, and the memory that it lies in."""


def mix_program(
    inputs: Sequence[Tensor], config: NeurocoderConfig, *, keep: bool
) -> tuple[Tensor, Tensor, Kept]:
    """Attend to the memory, and apply the program found there.

    Args:
        inputs: hidden, weight, bias and sharpness, what the composition network says about B inputs
            (see `Control`); keys [3, P, K], unit length; M_S [P, 1]; and the projection M_U x^T,
            [P, B].
        config: sizes and switches.
        keep: whether there will be a backward pass.

    Returns:
        The weight of every stored v in the output (c of y = c M_V), [P, B], the singular values
        sigma, [R, B], and what `gradients` needs.
    """
    hidden, *shared, projection = inputs
    bias = shared[1]
    steps, size = config.num_steps, _block_size(projection, config)
    scratch = _scratch(bias, size, config)
    kept: Kept = []
    outputs = []
    for states, read in zip(_split(hidden, size, steps), _split(projection, size), strict=True):
        workspace = _workspace(bias, read.shape[1], config)
        block = states, *shared, read
        mixture, sigma, saved = _mix_block(block, config, workspace, scratch)
        outputs.append((mixture, sigma))
        if keep:
            kept.append((saved, workspace))
    mixture, sigma = (_join(parts) for parts in zip(*outputs, strict=True))
    return mixture, sigma, kept


def _mix_block(
    inputs: Sequence[Tensor], config: NeurocoderConfig, workspace: Workspace, scratch: Workspace
) -> tuple[Tensor, Tensor, Saved]:
    """`mix_program` for one block."""
    hidden, weight, bias, sharpness, keys, memory_s, projection = inputs
    steps, batch = config.num_steps, projection.shape[1]
    attention = 3, config.num_slots, config.num_heads, steps * batch
    rows = workspace.take("rows", len(bias), steps * batch)
    torch.addmm(bias.unsqueeze(1), weight, hidden, out=rows)
    queries, gates = split_slots(rows, config)
    scale = inverse_norm(queries, dim=1)
    queries = queries * scale
    content, weights = (workspace.take(name, *attention) for name in ("content", "weights"))
    # A learned one is known to the device alone, and asking would wait for it.
    largest = math.inf if config.learned_sharpness else config.sharpness
    flat = (tensor.flatten(2) for tensor in (queries, weights, content))
    _attend(keys, sharpness, *flat, largest=largest)
    usage: _Usage = (None, None, None)
    if gates is None:
        moved = weights = content
    elif steps == 1:
        moved = torch.mul(gates.sigmoid_(), content, out=weights)
    else:
        moved = workspace.take("moved", *attention)
        usage = _gate(content, gates.sigmoid_(), moved, weights, config, batch, workspace)

    by_step = (*attention[:3], steps, batch)
    weight_u, weight_v, weight_s = weights.view(by_step)  # [P, H, J, B]
    scratch_u, scratch_v, _ = scratch.take("grad", *by_step)
    read_u = torch.mul(weight_u, projection[:, None, None], out=scratch_u).sum(0)  # [H, J, B]
    read_s = (memory_s.T @ weight_s.flatten(1)).view_as(read_u)
    sigma = sum_of_smaller(F.softplus(read_s.transpose(0, 1)).flatten(0, 1))  # [R, B]
    strength = _by_head(sigma, steps) * read_u  # [H, J, B]
    mixture = torch.mul(weight_v, strength, out=scratch_v).sum((1, 2))  # [P, B]
    saved = Saved(queries, scale, content, gates, moved, weights, read_u, read_s, *usage)
    return mixture, sigma, saved


def _attend(
    keys: Tensor,
    sharpness: Tensor,
    queries: Tensor,
    scores: Tensor,
    content: Tensor,
    *,
    largest: float,
) -> None:
    """Softmax over slots of the sharpened cosine of unit keys [3, P, K] and queries [3, K, N], into
    `content`; `scores` is written over. Both are [3, P, N]. `largest`: bound of the sharpness."""
    is_double_or_single = keys.dtype in (torch.float64, torch.float32)
    if keys.device.type != "cpu" or not is_double_or_single or largest > LARGEST_EXPONENT:
        torch.bmm(keys * sharpness, queries, out=scores)
        torch.softmax(scores, dim=1, out=content)
        return
    torch.bmm(keys * (sharpness * LOG2_E), queries, out=scores)
    torch.exp2(scores, out=content)
    content.div_(content.sum(1, keepdim=True))


def _block_size(projection: Tensor, config: NeurocoderConfig) -> int:
    """Inputs in a block; blocks are about equal."""
    batch = projection.shape[1]
    num_blocks = math.ceil(3 * config.num_components * config.num_slots * batch / BLOCK)
    return math.ceil(batch / max(num_blocks, 1))


def _split(tensor: Tensor, size: int, steps: int = 1) -> Sequence[Tensor]:
    """[rows, J B] -> [rows, J b] for every block of b inputs."""
    if tensor.shape[1] <= steps * size:
        return [tensor]
    blocks = torch.split(tensor.reshape(len(tensor), steps, -1), size, dim=2)
    return [block.flatten(1) for block in blocks]


def _join(blocks: Sequence[Tensor], steps: int = 1) -> Tensor:
    """The inverse of `_split`."""
    if len(blocks) == 1:
        return blocks[0]
    by_step = [block.reshape(len(block), steps, -1) for block in blocks]
    return torch.cat(by_step, dim=2).flatten(1)


def _workspace(bias: Tensor, size: int, config: NeurocoderConfig) -> Workspace:
    """Memory for what a block keeps for the backward pass that is as large as attention."""
    # content, weights; moved, selected, won. The gates are among the rows.
    several = config.num_steps > 1 and config.num_least_used > 0
    return _space(bias, size, config, 5 if several else 2)


def _scratch(bias: Tensor, size: int, config: NeurocoderConfig) -> Workspace:
    """Memory that one block after the other writes over."""
    # grad; at_gates
    return _space(bias, size, config, 1 if config.num_steps == 1 else 2)


def _space(bias: Tensor, size: int, config: NeurocoderConfig, num_attentions: int) -> Workspace:
    """Memory for this many tensors as large as attention, and for one of the head's rows."""
    per_input = len(bias) + num_attentions * 3 * config.num_slots * config.num_heads
    numel = per_input * config.num_steps * size
    return Workspace(bias, numel, num_attentions + 1)


def _gate(
    content: Tensor,
    gates: Tensor,
    moved: Tensor,
    weights: Tensor,
    config: NeurocoderConfig,
    batch: int,
    workspace: Workspace,
) -> _Usage:
    """`compose_attention` for several steps and gates after the sigmoid, into `moved` and
    `weights`.

    Returns:
        The last three fields of `Saved`.
    """
    # Numbers, not truth values: torch converts those, slowly, wherever they meet numbers.
    selected, won = (workspace.take(name, *content.shape) for name in ("selected", "won"))
    peaks: list[Tensor] = []
    usage: Tensor | None = None
    for here in _steps(config, batch):
        if usage is None:
            torch.mul(gates[here], content[here], out=moved[here])
            weights[here] = moved[here]
            usage = weights[here].clone()
            continue
        peak, index = first_largest(usage)
        peaks.append(index)
        selected[here].copy_(usage).le_(kth_smallest(usage, config.num_least_used))
        least = (peak - usage).mul_(selected[here])
        torch.mul(content[here] - least, gates[here], out=moved[here])
        torch.add(least, moved[here], out=weights[here])
        won[here].copy_(weights[here]).ge_(usage)
        usage = torch.maximum(usage, weights[here])
    return selected, won, torch.stack(peaks)


def gradients(
    inputs: Sequence[Tensor],
    sigma: Tensor,
    config: NeurocoderConfig,
    kept: Kept,
    grad_outputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors that `mix_program` takes, from those of mixture and sigma."""
    hidden, *shared, projection = inputs
    steps, size = config.num_steps, _block_size(projection, config)
    scratch = _scratch(shared[1], size, config)
    hiddens = _split(hidden, size, steps)
    others = (_split(tensor, size) for tensor in (projection, sigma, *grad_outputs))
    found = []
    for (saved, _), h, p, s, *grads in zip(kept, hiddens, *others, strict=True):
        block = h, *shared, p
        found.append(_block_gradients(block, s, config, saved, scratch, *grads))
    by_block = list(zip(*found, strict=True))
    grad_shared = (sum(parts[1:], parts[0]) for parts in by_block[1:-1])
    return _join(by_block[0], steps), *grad_shared, _join(by_block[-1])


def first_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of values [3, P, H, B] over P and the first slot that has it: [3, 1, H, B] each.

    Like `max`, whose search for the index is many times slower.
    """
    num_slots = values.shape[1]
    largest = values.amax(1, keepdim=True)
    from_the_end = torch.arange(num_slots, 0, -1, dtype=values.dtype, device=values.device)
    found = values.clone().eq_(largest).mul_(from_the_end[:, None, None]).amax(1, keepdim=True)
    return largest, (num_slots - found).long().clamp_(max=num_slots - 1)  # NaN equals nothing


def _block_gradients(
    inputs: Sequence[Tensor],
    sigma: Tensor,
    config: NeurocoderConfig,
    saved: Saved,
    scratch: Workspace,
    grad_mixture: Tensor,
    grad_sigma: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors that `_mix_block` takes."""
    hidden, weight, bias, sharpness, keys, memory_s, projection = inputs
    steps, batch = config.num_steps, projection.shape[1]
    by_step = (*saved.weights.shape[:3], steps, batch)
    weight_u, weight_v, weight_s = saved.weights.view(by_step)  # [P, H, J, B] each
    content, gates = saved.content, saved.gates
    sigma = _by_head(sigma, steps)

    # The program, backwards: the gradient of every attention weight into `grad`.
    grad = scratch.take("grad", *saved.weights.shape)  # [3, P, H, J B]
    grad_u, grad_v, grad_s = grad.view(by_step)
    grad_strength = torch.mul(weight_v, grad_mixture[:, None, None], out=grad_v).sum(0)  # [H, J, B]
    grad_read_u = grad_strength * sigma
    # sigma_n sums over k >= n, so its gradient sums over n <= k.
    grad_sigma = grad_sigma + (grad_strength * saved.read_u).transpose(0, 1).flatten(0, 1)
    grad_read_s = _by_head(grad_sigma.cumsum(0), steps) * saved.read_s.sigmoid()
    grad_projection = torch.mul(weight_u, grad_read_u, out=grad_u).sum((1, 2))
    torch.mul(grad_read_u, projection[:, None, None], out=grad_u)
    torch.mul(sigma * saved.read_u, grad_mixture[:, None, None], out=grad_v)
    torch.mul(grad_read_s, memory_s[:, None, None], out=grad_s)
    grad_memory_s = weight_s.flatten(1) @ grad_read_s.reshape(-1, 1)

    # The gates, backwards; then `grad` is content times the gradient of content.
    grad_rows = scratch.take("rows", len(bias), hidden.shape[1])
    grad_queries, grad_gates = split_slots(grad_rows, config)
    if gates is None or grad_gates is None:
        grad *= content
    else:
        if steps > 1 and not config.detach_usage:
            _add_gradient_through_usage(grad, saved, config, batch)
        if steps == 1:  # where the weights are gates * content themselves
            at_gates = grad.mul_(saved.moved)
        else:
            at_gates = torch.mul(grad, saved.moved, out=scratch.take("at_gates", *grad.shape))
            grad.mul_(gates).mul_(content)
        # sigmoid' = g (1 - g), and `moved` has the factor g already.
        if gates.shape == content.shape:
            torch.addcmul(at_gates, at_gates, gates, value=-1, out=grad_gates)
        else:
            shared = torch.addcmul(at_gates, at_gates, gates, value=-1)
            grad_gates.copy_(shared.sum_to_size(gates.shape))

    # The softmax, the cosines and the lengths of the queries, backwards.
    grad.addcmul_(content, grad.sum(1, keepdim=True), value=-1)
    grad = grad.flatten(2)  # [3, P, H J B]
    # The long side first: MKL is twice as fast in this order as in the other, here and below.
    grad_keys = torch.bmm(saved.queries.flatten(2), grad.transpose(1, 2)).mT * sharpness
    grad_sharp = torch.bmm(keys.mT, grad).view_as(grad_queries)
    along = (grad_sharp * saved.queries).sum(1, keepdim=True)  # [3, 1, H, J B]
    grad_sharpness = along.sum()
    # A query shorter than the floor is divided by a constant.
    along *= saved.inverse_norm.clone().lt_(1 / NORM_FLOOR)
    torch.addcmul(grad_sharp, along, saved.queries, value=-1, out=grad_queries)
    grad_queries *= saved.inverse_norm * sharpness

    return (
        weight.T @ grad_rows,
        (hidden @ grad_rows.T).T,
        grad_rows.sum(1),
        grad_sharpness,
        grad_keys,
        grad_memory_s,
        grad_projection,
    )


def _add_gradient_through_usage(
    grad: Tensor, saved: Saved, config: NeurocoderConfig, batch: int
) -> None:
    """Add to `grad`, from the last step to the first, what weights do to later steps."""
    gates, selected, won, peaks = saved.gates, saved.selected, saved.won, saved.peaks
    assert gates is not None and selected is not None and won is not None and peaks is not None
    first, *later = _steps(config, batch)
    grad_usage = torch.zeros_like(grad[first])  # of the usage after the step at hand
    for here, peak in zip(reversed(later), reversed(peaks), strict=True):
        passed_on = grad_usage * won[here]
        grad[here] += passed_on
        grad_least = torch.addcmul(grad[here], grad[here], gates[here], value=-1)
        grad_least *= selected[here]
        grad_usage.sub_(passed_on).sub_(grad_least)
        grad_usage.scatter_add_(1, peak, grad_least.sum(1, keepdim=True))
    grad[first] += grad_usage  # the usage after the first step is that step's weights


def _steps(config: NeurocoderConfig, batch: int) -> list[tuple[Any, ...]]:
    """For each step, the index of its part of an axis J B that comes last."""
    return [(..., slice(j * batch, (j + 1) * batch)) for j in range(config.num_steps)]


def _by_head(per_component: Tensor, steps: int) -> Tensor:
    """[R, B] -> [H, J, B]; component n = step * H + head."""
    num_components, batch = per_component.shape
    return per_component.view(steps, num_components // steps, batch).transpose(0, 1)
