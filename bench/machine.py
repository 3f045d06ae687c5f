"""Facts about the machine and the process that figures are printed with."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oss_ext import ops
from oss_ext.ops import native
from oss_ext.version import __version__


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def configuration() -> dict[str, Any]:
    """Device, versions and settings."""
    built = native.build_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": ops.serving("cpu").name,
        "instruction set": built.get("cpu_capability", native.why_not),
        "compiler": built.get("compiler"),
        "oss_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


class FmaPeak:
    """The machine's float32 multiply-adds per second, measured at every call.

    By a loop of nothing else where there is a C++ compiler, by a large matrix product otherwise.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.folder = tempfile.TemporaryDirectory()
        self.program = Path(self.folder.name) / "fma_peak"
        source = Path(__file__).with_name("fma_peak.cpp")
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        self.method = "a large float32 matrix product, no C++ compiler was found"
        if compiler:
            flags = ["-O3", "-march=native", "-pthread"]
            subprocess.run([compiler, *flags, str(source), "-o", self.program], check=True)
            self.method = "a loop of independent multiply-adds (fma_peak.cpp)"

    def __call__(self) -> float:
        if self.program.exists():
            command = [str(self.program), str(self.threads)]
            return float(subprocess.check_output(command, text=True)) * 1e9
        size = 2048
        a = torch.ones(size, size)
        start = time.perf_counter()
        a @ a
        return size**3 / (time.perf_counter() - start)


def extra_memory(call: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    """Bytes that ``call`` takes at its peak beside what it returns, by Linux's own count; and that.

    Freed memory that the C library holds back is returned first, or reusing it would not count.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def resident(field: str) -> int:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    before = resident("VmRSS")
    outputs = call()
    return max(0, resident("VmHWM") - before - sum(x.nbytes for x in outputs)), outputs
