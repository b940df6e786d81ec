"""Paths that users give."""

from __future__ import annotations

from pathlib import Path

import pytest

from ncrl.files import given_path


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/runs") == tmp_path / "runs"
    assert given_path("a~/~b") == Path("a~/~b")
    assert given_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
