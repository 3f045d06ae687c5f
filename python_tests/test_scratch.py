"""Trajectories in files: the same bits, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import oss_ext as oss
from cli_cases import TINY, Oss, files
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_network,
)
from oss_ext import scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 7, 255)])
def test_an_array_on_disk_is_an_array(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = scratch.empty(shape, dtype, torch.device("cpu"), tmp_path)
    assert (x.shape, x.dtype, x.is_contiguous()) == (torch.Size(shape), dtype, True)
    values = torch.randn(shape).to(dtype)
    x[:] = values
    assert x.equal(values)
    assert list(tmp_path.iterdir()) == []  # it has no name


@each_seed(1)
@pytest.mark.parametrize("quality", ["dp", "balanced"])
def test_a_search_on_disk_gives_identical_bits(quality: str, seed: int, tmp_path: Path) -> None:
    model = random_network(seed, torch.float32)
    noise = model.noise(8, seed)
    found = []
    for folder in (None, tmp_path):
        teacher = oss.teacher(model, noise, steps=16, scratch=folder, keep_x0=True)
        assert (teacher.scratch is None) == (folder is None)
        result = oss.search(model, teacher, [2, 4], quality=quality)
        found.append((teacher, [result.schedule(k) for k in (2, 4)]))
    (memory, in_memory), (disk, on_disk) = found
    assert in_memory == on_disk
    assert memory.states.equal(disk.states)
    assert memory.x0 is not None
    assert disk.x0 is not None
    assert memory.x0.equal(disk.x0)
    assert list(tmp_path.iterdir()) == []


def test_both_large_arrays_are_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = scratch.empty

    def noted(shape: tuple[int, ...], *rest: object) -> torch.Tensor:
        made.append((tuple(shape), rest[-1]))
        return original(shape, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scratch, "empty", noted)
    model = random_network(1, torch.float32)
    teacher = oss.teacher(model, model.noise(4, 1), steps=8, scratch=tmp_path)
    oss.search(model, teacher, 2, quality="dp")
    assert made == [(tuple(teacher.states.shape), tmp_path)] * 2


def test_a_folder_without_room_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"for 4611686018427387904 bytes: '.*test_a_folder"):
        scratch.empty((2**60,), torch.float32, torch.device("cpu"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError) as missing:
        scratch.empty((1,), torch.float32, torch.device("cpu"), tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")


def test_other_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^scratch: expected noise on the CPU .*, got it on cuda"):
        scratch.check(tmp_path, torch.device("cuda"))
    scratch.check(None, torch.device("cuda"))
    scratch.check(os.fspath(tmp_path), torch.device("cpu"))


def test_the_command_searches_on_disk(oss: Oss) -> None:
    Path("files").mkdir()
    assert oss("search", *TINY, "--steps=2", "--out=memory").code == 0
    assert oss("search", *TINY, "--steps=2", "--out=disk", "--scratch=files").code == 0
    name = "analytic-2.json"
    assert Path("disk", name).read_bytes() == Path("memory", name).read_bytes()
    assert files("files") == set()
