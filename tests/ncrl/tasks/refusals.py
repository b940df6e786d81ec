"""What all task commands do about bad input."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


def assert_refused(
    main: Callable[[list[str]], int], words: Sequence[str], message: str, logdir: Path, capsys: Any
) -> None:
    """One line with `message`, exit code 2, and no result."""
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--logdir", str(logdir)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not list(logdir.rglob("result.json"))
