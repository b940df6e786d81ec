"""Memory that is used again: pieces are apart, aligned, and never handed out twice at once."""

from collections.abc import Iterator

import pytest
import torch

from ncrl.neurocoder import workspace
from ncrl.neurocoder.workspace import ALIGNMENT, MOST_WAITING, Workspace


@pytest.fixture(autouse=True)
def nothing_waiting() -> Iterator[None]:
    workspace.release()
    yield
    workspace.release()


def addresses(*tensors: torch.Tensor) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def test_pieces_are_apart_aligned_and_known_by_name() -> None:
    space = Workspace(torch.empty(0), 5 + 7, 2)
    first, second = space.take("first", 5), space.take("second", 7)
    first.fill_(1.0)
    second.fill_(2.0)
    assert torch.equal(first, torch.ones(5))
    assert space.take("first", 5, 1).data_ptr() == first.data_ptr()
    assert (second.data_ptr() - first.data_ptr()) % ALIGNMENT == 0


def test_memory_is_used_again_only_when_nobody_has_it() -> None:
    like = torch.empty(0)
    spaces = [Workspace(like, 1000, 1) for _ in range(2)]
    seen = addresses(*(space.take("piece", 1000) for space in spaces))
    assert len(seen) == 2
    del spaces
    again = Workspace(like, 1000, 1)
    assert again.take("piece", 1000).data_ptr() in seen


def test_other_types_get_memory_of_their_own() -> None:
    single = Workspace(torch.empty(0), 1000, 1)
    single.take("piece", 1000).fill_(1.0)
    del single
    double = Workspace(torch.empty(0, dtype=torch.float64), 1000, 1)
    assert double.take("piece", 1000).dtype == torch.float64


def test_what_waits_is_bounded() -> None:
    like = torch.empty(0)
    for size in range(1, 9):
        Workspace(like, size * MOST_WAITING // 40, 1)  # dies at once
        waiting = sum(b.nbytes for blocks in workspace._waiting.values() for b in blocks)
        assert 0 < waiting <= MOST_WAITING
    workspace.release()
    Workspace(like, MOST_WAITING, 1)  # four times as many bytes
    assert not any(workspace._waiting.values())


def test_memory_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        Workspace(torch.empty(0), 1000, 1).take("piece", 1000)
    piece = Workspace(torch.empty(0), 1000, 1).take("piece", 1000)
    piece.fill_(1.0)
    assert (piece * torch.ones((), requires_grad=True)).requires_grad
