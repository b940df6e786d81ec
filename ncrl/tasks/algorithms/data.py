"""Sequences of small algorithms: copy, repeat copy, associative recall, priority sort.

Paper, section 4.3 and Table 5. A sequence asks for n of them, drawn with replacement, one question
after the other; then come zeros, while all answers are given in the same order.

What a vector of 10 numbers means is ours: 8 random bits, then the channels `FIRST` and `SECOND`.

- A question begins with its task: one of the bits 0 to 3, and both channels.
- copy: 1 to 3 vectors of bits. Answer: the same.
- repeat_copy: how often, 1 or 2, in `SECOND`; then 1 to 3 vectors. Answer: them, so many times.
- associative_recall: 2 or 3 items, each a vector with `FIRST` alone and 2 vectors of bits; then a
  vector with `SECOND` alone and one of the items but the last. Answer: the item after it.
- priority_sort: 3 vectors of bits, each with a priority from U(-1, 1) in `SECOND`. Answer: the 2 of
  highest priority, the highest first.

After its vectors every answer has one with the end channel, the ninth output, and nothing else,
unless there are only 8 outputs.

Shapes: N sequences, n questions each, T timesteps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TASKS = ("copy", "repeat_copy", "associative_recall", "priority_sort")

NUM_BITS = 8
FIRST, SECOND = NUM_BITS, NUM_BITS + 1  # channels of an input beside the bits
NUM_INPUTS = NUM_BITS + 2
END = NUM_BITS  # channel of an output that marks the end of an answer
MOST_VECTORS = 3
MOST_REPEATS = 2
ITEMS = (2, 3)  # items of an associative recall
ITEM_LENGTH = 2
SORTED, KEPT = 3, 2  # vectors of a priority sort, and how many of them are asked for
# Most vectors of a question, those of an associative recall.
QUESTION = 1 + ITEMS[1] * (1 + ITEM_LENGTH) + 1 + ITEM_LENGTH
# Most vectors of an answer, those of a repeat copy and its end.
ANSWER = MOST_VECTORS * MOST_REPEATS + 1


class Algorithms(NamedTuple):
    """N sequences of T timesteps. Time comes first, as in `Ntm`."""

    inputs: Tensor  # [T, N, 10]
    targets: Tensor  # [T, N, num_outputs], 0 or 1; 0 where nothing is asked for
    # Of the answer at every timestep, an index into `TASKS`: [T, N]; -1 where there is none.
    task: Tensor
    is_end: Tensor  # whether this is the end of an answer, [T, N]


class _Part(NamedTuple):
    """Questions or answers of m draws, each with a place for every vector it could have."""

    vectors: Tensor  # [m, L, width]
    present: Tensor  # which places are taken, [m, L]


def algorithms(
    num_sequences: int, num_tasks: int, generator: torch.Generator, *, num_outputs: int = 9
) -> Algorithms:
    """N random sequences of n questions; T is that of the longest.

    Answers have 9 outputs, or 8 if their ends are not marked.
    """
    if num_outputs not in (NUM_BITS, NUM_BITS + 1):
        raise ValueError(f"num_outputs must be {NUM_BITS} or {NUM_BITS + 1}, got {num_outputs}")
    count = num_sequences * num_tasks
    drawn = torch.randint(len(TASKS), (count,), generator=generator)
    # Every task for every place, of which one is taken: they are small.
    made = [make(count, generator) for make in (_copy, _repeat_copy, _recall, _sort)]
    rows = torch.arange(count)
    questions, answers = (
        _Part(*(torch.stack(field)[drawn, rows] for field in zip(*parts, strict=True)))
        for parts in zip(*made, strict=True)
    )
    ends = torch.zeros(count, ANSWER, 1)
    if num_outputs > NUM_BITS:
        length = answers.present.sum(1)
        ends[rows, length] = 1
        answers.present[rows, length] = True
    answers = _Part(torch.cat([answers.vectors, ends], dim=2), answers.present)

    inputs, asked = _in_a_row(questions, num_sequences)
    outputs, answered = _in_a_row(answers, num_sequences)
    owner = _Part(drawn[:, None, None].expand(-1, ANSWER, 1).float(), answers.present)
    owners, _ = _in_a_row(owner, num_sequences)
    num_steps = int((asked + answered).max())
    at = torch.arange(num_steps)[:, None] - asked  # timestep within the answers, [T, N]
    during = (at >= 0) & (at < answered)
    index = at.clamp(0, outputs.shape[1] - 1)
    sequence = torch.arange(num_sequences)
    targets = outputs[sequence, index] * during[..., None]  # [T, N, 9]
    task = torch.where(during, owners[sequence, index, 0].long(), -1)
    padded = inputs.new_zeros(num_steps, num_sequences, NUM_INPUTS)
    shown = min(num_steps, inputs.shape[1])
    padded[:shown] = inputs.transpose(0, 1)[:shown]
    return Algorithms(padded, targets[..., :num_outputs], task, targets[..., END] > 0)


def _in_a_row(part: _Part, num_sequences: int) -> tuple[Tensor, Tensor]:
    """The vectors that are present, sequence by sequence without gaps: [N, most, width], and how
    many there are, [N]."""
    width = part.vectors.shape[2]
    present = part.present.reshape(num_sequences, -1)
    vectors = part.vectors.reshape(num_sequences, -1, width)
    place = present.long().cumsum(1) - 1
    row = torch.arange(num_sequences)[:, None].expand_as(place)
    packed = vectors.new_zeros(vectors.shape)
    packed[row[present], place[present]] = vectors[present]
    return packed, present.sum(1)


def _bits(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(2, (*shape, NUM_BITS), generator=generator).float()


def _vectors(bits: Tensor, first: Any = 0.0, second: Any = 0.0) -> Tensor:
    """Bits [m, l, 8] with both channels beside them, [m, l, 10]."""
    channels = torch.zeros(*bits.shape[:2], 2)
    channels[..., 0], channels[..., 1] = first, second
    return torch.cat([bits, channels], dim=2)


def _question(task: str, *parts: tuple[Tensor, Tensor | None]) -> _Part:
    """A task's name and then vectors [m, l, 10], with which are present, [m, l], all if None."""
    count = len(parts[0][0])
    name = torch.zeros(count, 1, NUM_INPUTS)
    name[:, 0, [TASKS.index(task), FIRST, SECOND]] = 1
    made = [_padded(v, present, v.shape[1]) for v, present in [(name, None), *parts]]
    vectors, present = (torch.cat(tensors, dim=1) for tensors in zip(*made, strict=True))
    return _padded(vectors, present, QUESTION)


def _padded(vectors: Tensor, present: Tensor | None, length: int) -> _Part:
    """In so many places; where no vector is present there are zeros."""
    if present is None:
        present = torch.ones(vectors.shape[:2], dtype=torch.bool)
    missing = length - vectors.shape[1]
    vectors = F.pad(vectors * present[..., None], [0, 0, 0, missing])
    return _Part(vectors, F.pad(present, [0, missing]))


def _lengths(count: int, generator: torch.Generator) -> Tensor:
    """Which of the most vectors there are, [m, 3]."""
    length = torch.randint(1, MOST_VECTORS + 1, (count, 1), generator=generator)
    return torch.arange(MOST_VECTORS) < length


def _copy(count: int, generator: torch.Generator) -> tuple[_Part, _Part]:
    bits, present = _bits(generator, count, MOST_VECTORS), _lengths(count, generator)
    return _question("copy", (_vectors(bits), present)), _padded(bits, present, ANSWER)


def _repeat_copy(count: int, generator: torch.Generator) -> tuple[_Part, _Part]:
    bits, present = _bits(generator, count, MOST_VECTORS), _lengths(count, generator)
    repeats = torch.randint(1, MOST_REPEATS + 1, (count, 1), generator=generator)
    how_often = _vectors(torch.zeros(count, 1, NUM_BITS), second=repeats.float())
    question = _question("repeat_copy", (how_often, None), (_vectors(bits), present))
    # Place p of the answer holds vector p mod length, for the first length * repeats places.
    place = torch.arange(MOST_VECTORS * MOST_REPEATS).expand(count, -1)
    length = present.sum(1, keepdim=True)
    repeated = bits.gather(1, (place % length)[..., None].expand(-1, -1, NUM_BITS))
    return question, _padded(repeated, place < length * repeats, ANSWER)


def _recall(count: int, generator: torch.Generator) -> tuple[_Part, _Part]:
    most = ITEMS[1]
    items = _bits(generator, count, most, ITEM_LENGTH)  # [m, 3, 2, 8]
    number = torch.randint(ITEMS[0], most + 1, (count,), generator=generator)
    # Of the items but the last, each as likely as the others.
    chosen = (torch.rand(count, generator=generator) * (number - 1)).long()
    row, none = torch.arange(count), torch.zeros(count, 1, NUM_BITS)
    parts: list[tuple[Tensor, Tensor | None]] = []
    for i in range(most):
        shown = (i < number)[:, None]
        parts += [(_vectors(none, first=1), shown), (_vectors(items[:, i]), shown.expand(-1, 2))]
    parts += [(_vectors(none, second=1), None), (_vectors(items[row, chosen]), None)]
    answer = _padded(items[row, chosen + 1], None, ANSWER)
    return _question("associative_recall", *parts), answer


def _sort(count: int, generator: torch.Generator) -> tuple[_Part, _Part]:
    bits = _bits(generator, count, SORTED)
    priority = 2 * torch.rand(count, SORTED, generator=generator) - 1
    # Whole vectors change places, never single columns.
    best = priority.argsort(1, descending=True)[:, :KEPT, None].expand(-1, -1, NUM_BITS)
    question = _question("priority_sort", (_vectors(bits, second=priority), None))
    return question, _padded(bits.gather(1, best), None, ANSWER)
