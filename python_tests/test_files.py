"""Files are written whole or not at all, whenever the writer is interrupted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oss_ext.files import read_text, replacing


def interrupted_before(temporary: Path, path: Path) -> None:
    raise KeyboardInterrupt


def interrupted_after(temporary: Path, path: Path) -> None:
    os.rename(temporary, path)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("how", "left"), [(interrupted_before, "old"), (interrupted_after, "new")])
def test_an_interruption_beside_the_move_is_what_the_writer_sees(
    how: object, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", how)
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == left


def test_the_mark_that_editors_begin_a_file_with_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes("\ufeffgrün".encode())
    assert read_text(path) == "grün"
