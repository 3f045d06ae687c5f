"""Run folders: read back as they were written, and refused where they are something else."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from driver_cases import each_seed
from oss_ext.runs import ARRAYS, RUN, Contender, Run, RunError, file_name
from run_cases import random_run


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@each_seed(3)
def test_a_run_is_read_back_as_it_was(seed: int, tmp_path: Path) -> None:
    run = random_run(seed)
    run.save(tmp_path / "new" / "run")
    back = Run.load(tmp_path / "new" / "run")
    for field in fields(run):
        assert_same(getattr(run, field.name), getattr(back, field.name))


def test_what_was_not_judged_is_not_there(tmp_path: Path) -> None:
    empty: dict[str, Any] = {key: {} for key in ("along", "quantiles", "images", "spread")}
    random_run(0, mse=None, table=None, **empty).save(tmp_path)
    back = Run.load(tmp_path)
    assert (back.mse, back.table) == (None, None)
    assert all(getattr(back, name) == {} for name in empty)


def test_saving_again_replaces_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    random_run(0).save(tmp_path)
    random_run(1).save(tmp_path)
    assert_same(Run.load(tmp_path).mse, random_run(1).mse)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_interrupted_save_leaves_the_old_description_and_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_run(0).save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("oss_ext.runs.save", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            random_run(1).save(tmp_path)
    assert_same(Run.load(tmp_path).mse, random_run(0).mse)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_schedules_never_share_a_file() -> None:
    run = random_run(0)
    first = next(c for c in run.contenders if c.schedule is not None)
    twins = (replace(first, name="a b", file=""), replace(first, name="a-b", file=""))
    with pytest.raises(RunError, match="a file for each"):
        replace(run, contenders=twins, mse=None)


def test_two_contenders_never_share_a_name() -> None:
    run = random_run(0)
    first = next(c for c in run.contenders if c.schedule is not None)
    with pytest.raises(RunError, match=r"^contenders: expected a name for each, got \["):
        replace(run, contenders=(first, replace(first, file="other.json")), mse=None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform 10", "uniform-10"),
        ("../../etc", "etc"),
        ("a/b\\c:d", "a-b-c-d"),
        ("…", "schedule"),
    ],
)
def test_names_make_harmless_file_names(name: str, expected: str) -> None:
    assert file_name(name) == expected


def test_a_contender_without_a_schedule_has_no_file() -> None:
    assert Contender("x", "gits", 3, None, note="why").file == ""


def edit(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / RUN).read_text()) | changes
    (folder / RUN).write_text(json.dumps({k: v for k, v in body.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a run of this package"),
        ({"format_version": 2}, "a run of version 2, this release reads 1"),
        ({"format_version": "gone"}, "a run of version None"),
        ({"machine": "gone"}, "missing or of the wrong kind: 'machine'"),
        ({"contenders": 3}, "missing or of the wrong kind"),
        ({"contenders": [{"name": "x"}]}, "missing or of the wrong kind"),
    ],
)
def test_a_run_of_another_kind_is_refused_with_its_path(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    random_run(0).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(RunError, match=message) as caught:
        Run.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_description_is_refused(content: bytes, tmp_path: Path) -> None:
    random_run(0).save(tmp_path)
    (tmp_path / RUN).write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: (not|expected UTF-8)"):
        Run.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 64])
def test_damaged_arrays_are_refused(content: bytes, tmp_path: Path) -> None:
    random_run(0).save(tmp_path)
    (tmp_path / ARRAYS).write_bytes(content)
    with pytest.raises(RunError, match=str(tmp_path)):
        Run.load(tmp_path)


def test_a_damaged_schedule_is_refused(tmp_path: Path) -> None:
    run = random_run(0)
    run.save(tmp_path)
    name = next(c.file for c in run.contenders if c.file)
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match="not a schedule"):
        Run.load(tmp_path)


def test_a_folder_without_a_run_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Run.load(tmp_path)
