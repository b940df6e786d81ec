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

Shapes: N sequences, n questions each, T timesteps; m draws of every task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TASKS = ("copy", "repeat_copy", "associative_recall", "priority_sort")

NUM_BITS = 8
FIRST, SECOND = NUM_BITS, NUM_BITS + 1  # channels of an input beside the bits
NUM_INPUTS = NUM_BITS + 2
MOST_VECTORS = 3
MOST_REPEATS = 2
ITEMS = (2, 3)  # items of an associative recall
ITEM_LENGTH = 2
SORTED, KEPT = 3, 2  # vectors of a priority sort, and how many of them are asked for

# The vector that names a task, for each [1, 10], and the one that ends an answer, [1, 9].
NAMES = F.pad(torch.eye(len(TASKS)), (0, NUM_INPUTS - len(TASKS))).unsqueeze(1)
NAMES[..., [FIRST, SECOND]] = 1
END = F.one_hot(torch.tensor([NUM_BITS])).float()

Cases = Callable[[int], tuple[Tensor, Tensor]]
"""From the number of a draw to its question [q, 10], without the task's name, and its answer
[a, 9], without its end."""


class Algorithms(NamedTuple):
    """N sequences of T timesteps. Time comes first, as in `Ntm`."""

    inputs: Tensor  # [T, N, 10]
    targets: Tensor  # [T, N, num_outputs], 0 or 1; 0 where nothing is asked for
    # Of the answer at every timestep, an index into `TASKS`: [T, N]; -1 where there is none.
    task: Tensor
    is_end: Tensor  # whether this is the end of an answer, [T, N]


def algorithms(
    num_sequences: int, num_tasks: int, generator: torch.Generator, *, num_outputs: int = 9
) -> Algorithms:
    """N random sequences of n questions; T is that of the longest.

    Answers have 9 outputs, or 8 if their ends are not marked.
    """
    if num_outputs not in (NUM_BITS, NUM_BITS + 1):
        raise ValueError(f"num_outputs must be {NUM_BITS} or {NUM_BITS + 1}, got {num_outputs}")
    count = num_sequences * num_tasks
    drawn = torch.randint(len(TASKS), (count,), generator=generator).tolist()
    # Every task draws for every place, of which one is taken: draws are small.
    cases = [draw(count, generator) for draw in (_copy, _repeat_copy, _recall, _sort)]
    ends = [END] if num_outputs > NUM_BITS else []
    sequences = []
    for first in range(0, count, num_tasks):
        questions, answers, owners = [], [], []
        for place in range(first, first + num_tasks):
            task = drawn[place]
            question, answer = cases[task](place)
            questions += [NAMES[task], question]
            answers += [answer, *ends]
            owners += [task] * (len(answer) + len(ends))
        sequences.append((torch.cat(questions), torch.cat(answers), torch.tensor(owners)))

    num_steps = max(len(asked) + len(answered) for asked, answered, _ in sequences)
    inputs = torch.zeros(num_steps, num_sequences, NUM_INPUTS)
    targets = torch.zeros(num_steps, num_sequences, NUM_BITS + 1)
    tasks = torch.full((num_steps, num_sequences), -1)
    for n, (asked, answered, owner) in enumerate(sequences):
        during = slice(len(asked), len(asked) + len(answered))
        inputs[: len(asked), n], targets[during, n], tasks[during, n] = asked, answered, owner
    return Algorithms(inputs, targets[..., :num_outputs], tasks, targets[..., NUM_BITS] > 0)


def _bits(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(2, (*shape, NUM_BITS), generator=generator).float()


def _vectors(bits: Tensor, first: Any = 0.0, second: Any = 0.0) -> Tensor:
    """Bits [m, l, 8] with both channels beside them, [m, l, 10]."""
    channels = torch.zeros(*bits.shape[:2], 2)
    channels[..., 0], channels[..., 1] = first, second
    return torch.cat([bits, channels], dim=2)


def _answer(bits: Tensor) -> Tensor:
    """Bits [..., 8] with the end channel, [..., 9]."""
    return F.pad(bits, (0, 1))


def _from_one_to(most: int, count: int, generator: torch.Generator) -> list[int]:
    """Numbers from 1 to `most`, each as likely as the others, m of them."""
    return (1 + torch.randint(most, (count,), generator=generator)).tolist()


def _copy(count: int, generator: torch.Generator) -> Cases:
    bits = _bits(generator, count, MOST_VECTORS)
    length = _from_one_to(MOST_VECTORS, count, generator)
    vectors, answers = _vectors(bits), _answer(bits)
    return lambda i: (vectors[i, : length[i]], answers[i, : length[i]])


def _repeat_copy(count: int, generator: torch.Generator) -> Cases:
    bits = _bits(generator, count, MOST_VECTORS)
    length = _from_one_to(MOST_VECTORS, count, generator)
    repeats = _from_one_to(MOST_REPEATS, count, generator)
    how_often = _vectors(torch.zeros(count, 1, NUM_BITS), second=torch.tensor(repeats)[:, None])
    vectors, answers = torch.cat([how_often, _vectors(bits)], dim=1), _answer(bits)
    return lambda i: (vectors[i, : 1 + length[i]], answers[i, : length[i]].repeat(repeats[i], 1))


def _recall(count: int, generator: torch.Generator) -> Cases:
    most = ITEMS[1]
    items = _bits(generator, count, most, ITEM_LENGTH)  # [m, 3, 2, 8]
    number = torch.randint(ITEMS[0], most + 1, (count,), generator=generator)
    # Of the items but the last, each as likely as the others.
    chosen = (torch.rand(count, generator=generator) * (number - 1)).long()
    none, places = torch.zeros(count, 1, NUM_BITS), torch.arange(count)
    begin = _vectors(none, first=1)
    shown = torch.cat([part for i in range(most) for part in (begin, _vectors(items[:, i]))], dim=1)
    asked = torch.cat([_vectors(none, second=1), _vectors(items[places, chosen])], dim=1)
    answers, length = _answer(items[places, chosen + 1]), (number * (1 + ITEM_LENGTH)).tolist()
    return lambda i: (torch.cat([shown[i, : length[i]], asked[i]]), answers[i])


def _sort(count: int, generator: torch.Generator) -> Cases:
    bits = _bits(generator, count, SORTED)
    priority = 2 * torch.rand(count, SORTED, generator=generator) - 1
    best = priority.argsort(1, descending=True)[:, :KEPT]
    vectors, answers = _vectors(bits, second=priority), _answer(bits)
    return lambda i: (vectors[i], answers[i, best[i]])
