"""What is free: of the machine, and of the container that the process is in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from oss_ext import machine
from oss_ext.machine import free_memory

GIB = 2**30
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the system says nothing")


def group(folder: Path, most: str, used: int, cached: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, usage, dropped = names if version == 2 else old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{dropped} {cached}\nactive_file 7\n")


def system(root: Path, cgroup: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    return root / "sys/fs/cgroup"


def rooms(root: Path) -> list[int]:
    return sorted(machine._group_rooms(root))


def test_every_group_above_the_process_leaves_it_some(tmp_path: Path) -> None:
    top = system(tmp_path, "0::/user/job\n")
    group(top / "user/job", str(4 * GIB), 3 * GIB, GIB)
    group(top / "user", str(9 * GIB), 8 * GIB, 0)
    group(top / "other", "1", 0, 0)
    assert rooms(tmp_path) == [GIB, 2 * GIB]


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    """Its name may be that of the outside, where nothing of it is."""
    top = system(tmp_path, "0::/../../docker/0123\n")
    group(top, str(2 * GIB), GIB, 0)
    assert rooms(tmp_path) == [GIB]


def test_groups_of_version_1_have_a_hierarchy_of_memory(tmp_path: Path) -> None:
    top = system(tmp_path, "7:cpu:/a\n4:hugetlb,memory:/job\n0::/\n")
    group(top / "memory/job", str(GIB), GIB // 2, GIB // 4, version=1)
    group(top / "memory", str(2**63 - 4096), 5 * GIB, 0, version=1)
    assert rooms(tmp_path)[0] == 3 * GIB // 4
    assert rooms(tmp_path)[1] > 2**62


@pytest.mark.parametrize("content", ["max", "", "lots", "-1"])
def test_a_group_without_a_limit_leaves_what_there_is(content: str, tmp_path: Path) -> None:
    top = system(tmp_path, "0::/\n")
    group(top, content, GIB, 0)
    assert rooms(tmp_path) == ([0] if content == "-1" else [])


def test_no_groups_leave_what_there_is(tmp_path: Path) -> None:
    assert rooms(tmp_path) == []
    system(tmp_path, "0::/\n")
    assert rooms(tmp_path) == []


@LINUX
def test_the_least_room_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory(torch.device("cpu"))
    assert whole is not None
    assert whole > 0
    monkeypatch.setattr(machine, "_group_rooms", lambda: iter([12345, 99999]))
    assert free_memory(torch.device("cpu")) == 12345
