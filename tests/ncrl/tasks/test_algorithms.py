"""Generators of algorithms against a decoder that reads questions vector by vector."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ncrl.diagnostics import LayerReport, describe
from ncrl.tasks import experiment as experiments
from ncrl.tasks.algorithms import experiment as command
from ncrl.tasks.algorithms.data import TASKS, Algorithms, algorithms
from ncrl.tasks.algorithms.experiment import bit_errors
from ncrl.tasks.experiment import random_stream
from ncrl.tasks.recipes import CONFIGS, Recipe
from ncrl.tasks.results import read_results
from tests.ncrl.tasks.files import read_recipe
from tests.ncrl.tasks.refusals import assert_refused

Vector = list[float]


def generated(num_sequences: int, num_tasks: int, seed: int = 0, **options: int) -> Algorithms:
    generator = torch.Generator().manual_seed(seed)
    return algorithms(num_sequences, num_tasks, generator, **options)


def is_identity(vector: Vector) -> bool:
    return vector[8] == 1 and vector[9] == 1 and sum(vector[:8]) == 1


class Question:
    """One question as its vectors say it, and the answer worked out from them."""

    def __init__(self, vectors: list[Vector]) -> None:
        identity, *self.vectors = vectors
        assert identity[4:8] == [0] * 4
        self.task = TASKS[identity[:4].index(1)]
        self.ranges: tuple[object, ...] = ()
        self.answer: list[Vector] = getattr(self, self.task)()

    def copy(self) -> list[Vector]:
        assert all(vector[8:] == [0, 0] for vector in self.vectors)
        self.ranges = (len(self.vectors),)
        return [vector[:8] for vector in self.vectors]

    def repeat_copy(self) -> list[Vector]:
        number, *vectors = self.vectors
        assert number[:9] == [0] * 9 and all(vector[8:] == [0, 0] for vector in vectors)
        self.ranges = (number[9], len(vectors))
        return [vector[:8] for _ in range(int(number[9])) for vector in vectors]

    def associative_recall(self) -> list[Vector]:
        items: list[list[Vector]] = []
        query: list[Vector] | None = None
        for vector in self.vectors:
            if vector[8] or vector[9]:
                assert not any(vector[:8]) and query is None
                if vector[8]:
                    items.append([])
                else:
                    query = []
            else:
                (items[-1] if query is None else query).append(vector[:8])
        assert query is not None and all(len(item) == 2 for item in [*items, query])
        places = [i for i, item in enumerate(items[:-1]) if item == query]
        self.ranges = (len(items), places[0])
        return items[places[0] + 1]

    def priority_sort(self) -> list[Vector]:
        assert len(self.vectors) == 3 and all(vector[8] == 0 for vector in self.vectors)
        assert all(-1 <= vector[9] < 1 for vector in self.vectors)
        places = sorted(range(3), key=lambda i: -self.vectors[i][9])
        self.ranges = tuple(places)
        return [self.vectors[i][:8] for i in places[:2]]


def questions_of(inputs: Tensor, length: int) -> list[Question]:
    """The questions in the first `length` vectors of inputs [T, 10]."""
    parts: list[list[Vector]] = []
    for vector in inputs[:length].tolist():
        if is_identity(vector):
            parts.append([])
        parts[-1].append(vector)
    return [Question(part) for part in parts]


@pytest.mark.parametrize("num_tasks", [1, 4, 8])
@pytest.mark.parametrize("num_outputs", [8, 9])
def test_answers_are_those_of_the_questions(num_tasks: int, num_outputs: int) -> None:
    made = generated(60, num_tasks, num_outputs=num_outputs)
    num_steps = len(made.inputs)
    assert made.inputs.shape == (num_steps, 60, 10)
    assert made.targets.shape == (num_steps, 60, num_outputs)
    longest = 0
    for n in range(60):
        answered = (made.task[:, n] >= 0).nonzero()[:, 0].tolist()
        begin = answered[0]
        assert answered == list(range(begin, begin + len(answered)))
        assert not made.inputs[begin:, n].any(), "inputs while answers are given"
        questions = questions_of(made.inputs[:, n], begin)
        assert len(questions) == num_tasks
        expected: list[tuple[Vector, int, bool]] = []
        for question in questions:
            task = TASKS.index(question.task)
            end = [[0.0] * 8 + [1.0]] if num_outputs == 9 else []
            vectors = [[*v, 0.0][:num_outputs] for v in question.answer]
            expected += [(v, task, False) for v in vectors] + [(v, task, True) for v in end]
        found = zip(
            made.targets[answered, n].tolist(),
            made.task[answered, n].tolist(),
            made.is_end[answered, n].tolist(),
            strict=True,
        )
        assert list(found) == expected
        elsewhere = made.task[:, n] < 0
        assert not made.targets[elsewhere, n].any() and not made.is_end[elsewhere, n].any()
        longest = max(longest, begin + len(answered))
    assert num_steps == longest


def test_every_case_of_table_5_is_drawn_and_no_other() -> None:
    made = generated(2000, 1)
    lengths = (made.task >= 0).long().argmax(0).tolist()
    questions = [questions_of(made.inputs[:, n], lengths[n])[0] for n in range(2000)]
    shares = Counter(question.task for question in questions)
    assert all(abs(shares[task] - 500) < 100 for task in TASKS)
    cases = {task: Counter(q.ranges for q in questions if q.task == task) for task in TASKS}
    assert set(cases["copy"]) == {(1,), (2,), (3,)}
    assert set(cases["repeat_copy"]) == {(n, length) for n in (1, 2) for length in (1, 2, 3)}
    assert set(cases["associative_recall"]) == {(2, 0), (3, 0), (3, 1)}
    assert len(cases["priority_sort"]) == 6
    # Each range evenly; recall draws the number of items first.
    expected = {
        "copy": [1 / 3] * 3,
        "repeat_copy": [1 / 6] * 6,
        "associative_recall": [1 / 2, 1 / 4, 1 / 4],
        "priority_sort": [1 / 6] * 6,
    }
    for task, chances in expected.items():
        counts = sorted(cases[task].values(), reverse=True)
        for count, chance in zip(counts, chances, strict=True):
            assert abs(count / shares[task] - chance) < 0.1
    bits = [bit for q in questions for vector in q.answer for bit in vector]
    assert abs(sum(bits) / len(bits) - 0.5) < 0.02


def test_sequences_follow_from_the_generator_and_differ() -> None:
    one, same, other = generated(5, 3), generated(5, 3), generated(5, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert one.inputs.shape != other.inputs.shape or not torch.equal(one.inputs, other.inputs)


def test_bit_errors_count_what_a_loop_counts() -> None:
    torch.manual_seed(0)
    test = generated(30, 4)
    logits = torch.randn(*test.targets.shape) + 3 * (2 * test.targets - 1)
    wrong, seen = Counter[str](), Counter[str]()
    for t in range(len(logits)):
        for n in range(30):
            if test.task[t, n] < 0 or test.targets[t, n, 8] == 1:
                continue
            for bit in range(8):
                name = TASKS[int(test.task[t, n])]
                is_wrong = (float(logits[t, n, bit]) > 0) != (float(test.targets[t, n, bit]) == 1)
                for key in (name, "all"):
                    seen[key] += 1
                    wrong[key] += is_wrong
    found = bit_errors(logits, test)
    assert set(found) == set(seen) == {"all", *TASKS}
    for key, value in found.items():
        assert abs(value - 100 * wrong[key] / seen[key]) < 1e-3


# The command

SMALL = ["--iterations", "2", "--batch-size", "3", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Flags of a run of a second or two."""
    monkeypatch.setattr(command, "TEST_SEQUENCES", 2)
    sizes = ["--network-options", "controller_size=6", "num_rows=5"]
    return [*SMALL, *sizes, "--logdir", str(tmp_path / "runs")]


def test_the_command_writes_rows_table_and_figure(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "algorithms.png"
    assert command.main([*small, "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    rows = read_results(tmp_path / "runs", "algorithms")
    assert {row.layer for row in rows} == {"linear", "hypernet", "film", "nsm", "neurocoder"}
    for row in rows:
        assert {"error_n4", "error_n8", "error_copy", "best_error_n4"} <= set(row.metrics)
        assert set(row.details["errors_n8"]) == {"all", *TASKS}
        assert ("layers" in row.details) is (row.layer == "neurocoder")
        assert f"| {row.name} |" in out
    assert figure.stat().st_size > 5_000


def test_another_network_is_refused() -> None:
    recipe = Recipe(task="algorithms", network="gru", iterations=1)
    with pytest.raises(ValueError, match="the network must be 'ntm', got 'gru'"):
        command.MultiAlgorithm(recipe, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--network-options", "num_outputs=7"], "num_outputs must be 8 or 9, got 7"),
        (["--network-options", "in_features=9"], "in_features must be 10, got 9"),
        (["--config", "polynomial"], "is a recipe for polynomial, not for algorithms"),
        (["--variant", "nms"], "nearest: nsm"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(command.main, [*SMALL, *flags], said, tmp_path, capsys)


def test_the_loss_is_the_cross_entropy_of_the_answers() -> None:
    recipe = read_recipe(CONFIGS / "algorithms.yaml", "linear")
    sizes = {"controller_size": 6, "num_rows": 5}
    recipe = dataclasses.replace(recipe, batch_size=3, network_options=sizes)
    experiment = command.MultiAlgorithm(recipe, 1, torch.device("cpu"))
    batch = experiment.generate(3, 4, random_stream(1, "train", 5))
    logits, _ = experiment.model(batch.inputs)
    losses = []
    for t in range(len(logits)):
        for n in range(3):
            if batch.task[t, n] >= 0:
                for logit, bit in zip(logits[t, n], batch.targets[t, n], strict=True):
                    chance = 1 / (1 + math.exp(-float(logit.detach())))
                    losses.append(-math.log(chance if bit else 1 - chance))
    assert abs(experiment.loss(5).item() - sum(losses) / len(losses)) < 1e-4


def test_layers_are_described_until_the_last_answer_of_a_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = read_recipe(CONFIGS / "algorithms.yaml")
    recipe = dataclasses.replace(recipe, network_options={"controller_size": 6, "num_rows": 5})
    monkeypatch.setattr(command, "TEST_SEQUENCES", 3)
    experiment = command.MultiAlgorithm(recipe, 1, torch.device("cpu"))
    described: list[int] = []

    def count(_layer: Any, x: Tensor) -> LayerReport:
        described.append(len(x))
        return describe(_layer, x)

    monkeypatch.setattr(experiments, "describe", count)
    with torch.no_grad():
        experiment.report()
    test = experiment.test[command.TRAINED_TASKS]
    steps = sum(int((test.task[:, n] >= 0).nonzero()[-1]) + 1 for n in range(3))
    assert described == [steps, steps] and steps < test.task.numel()
