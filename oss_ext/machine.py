"""The machine and the process: facts that figures are printed with, memory taken and free."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from oss_ext import ops
from oss_ext.ops import native
from oss_ext.version import __version__

T = TypeVar("T")


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def configuration(device: str = "cpu") -> dict[str, Any]:
    """Device, versions and settings."""
    built = native.build_info()
    if device == "cuda":
        facts: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "compute capability": "{}.{}".format(*torch.cuda.get_device_capability()),
            "CUDA of torch": torch.version.cuda,
            "CUDA kernels": built.get("cuda_reason", native.why_not),
        }
    else:
        facts = {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction set": built.get("cpu_capability", native.why_not),
            "compiler": built.get("compiler"),
        }
    release = platform.release().split("-")[0]  # after that comes the distribution's own name
    return facts | {
        "backend": ops.serving(device).name,
        "oss_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {release} {platform.machine()}",
    }


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the GPU's allocator, or of the process; 0 where no one counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows, where schedules can still be loaded and shown

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Watch(threading.Thread):
    """The peak of a process's anonymous memory and of its file pages, on Linux.

    Args:
        process: its number, or this one.
    """

    def __init__(self, process: int | str = "self") -> None:
        super().__init__(daemon=True)
        self._status = f"/proc/{process}/status"
        self.first, self.peak = self._now(), (0, 0)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.005):
            self._look()

    def stop(self) -> tuple[int, int]:
        """Bytes of both at their peaks, anonymous ones above the first."""
        self._ended.set()
        self.join()
        self._look()
        return self.peak[0] - self.first[0], self.peak[1]

    def _look(self) -> None:
        anonymous, files = self._now()
        self.peak = max(self.peak[0], anonymous), max(self.peak[1], files)

    def _now(self) -> tuple[int, int]:
        try:
            found = _fields(self._status)
        except OSError:  # another process, which has ended
            found = {}
        return found.get("RssAnon", 0), found.get("RssFile", 0)


def _fields(path: str) -> dict[str, int]:
    """Bytes that Linux says in a file of kilobytes."""
    text = Path(path).read_text()
    return {
        name: 1024 * int(kilobytes) for name, kilobytes in re.findall(r"(\w+):\s*(\d+) kB", text)
    }


def taken(device: torch.device, do: Callable[[], T]) -> tuple[T, int]:
    """What ``do`` gives, and the memory of ``device`` that it took at its peak; 0 where no one
    counts it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return do(), torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        return do(), 0
    watch = Watch()
    watch.start()
    try:
        result = do()
    finally:
        rise, _ = watch.stop()
    return result, max(0, rise)


def return_freed() -> None:
    """Give back to the system what glibc's allocator keeps of freed memory.

    Blocks of megabytes that come and go with every model call leave holes that no other fits into:
    hundreds of MiB after some hundred calls. It takes milliseconds.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries have none
        if trim is not None:
            trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that arrays on ``device`` may still take; None where no one says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or sys.platform != "linux":
        return None
    return min([_fields("/proc/meminfo")["MemAvailable"], *_group_rooms()])


def _group_rooms(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that the process's control groups, those of containers among them, leave it.

    Of version 2, and of version 1, where every controller has a hierarchy of its own. What a group
    caches of files that nobody maps counts as free, as in ``MemAvailable``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used, cached = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        here = top / name.lstrip("/")
        for group in (here, *here.parents):
            if not group.is_relative_to(top):
                break
            try:
                most = (group / limit).read_text().strip()
                if most != "max":
                    dropped = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                    taken = int((group / used).read_text()) - int(dropped.get(cached, 0))
                    yield max(0, int(most) - taken)
            except (OSError, ValueError):
                continue  # not of this group: in a container's own view, names are of the outside
