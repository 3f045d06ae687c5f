"""Meters: of time and memory on the CPU and on a GPU, and of what the device can do at most."""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oss_ext.machine import return_freed

Call = Callable[[], tuple[Tensor, ...]]


class FmaPeak:
    """The device's float32 multiply-adds per second, measured at every call.

    By a loop of nothing else where there is a compiler for the device, by a large matrix product
    otherwise.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.arguments = device, [str(threads)] if device == "cpu" else []
        self.folder = tempfile.TemporaryDirectory()
        self.program = Path(self.folder.name) / "fma_peak"
        name = os.environ.get("CXX", "g++") if device == "cpu" else "nvcc"
        source = Path(__file__).with_name("fma_peak.cpp" if device == "cpu" else "fma_peak.cu")
        compiler = shutil.which(name)
        self.method = f"a large float32 matrix product, {name} was not found"
        if compiler:
            flags = ["-march=native", "-pthread"] if device == "cpu" else ["-arch=native"]
            command = [compiler, "-O3", *flags, str(source), "-o", str(self.program)]
            failed = (
                subprocess.run(command).returncode
                or subprocess.run(self._loop(), stdout=subprocess.DEVNULL).returncode
            )
            self.method = f"a loop of independent multiply-adds ({source.name})"
            if failed:
                self.program.unlink(missing_ok=True)
                self.method = f"a large float32 matrix product, {source.name} did not run"

    def _loop(self) -> list[str]:
        return [str(self.program), *self.arguments]

    def __call__(self) -> float:
        if self.program.exists():
            return float(subprocess.check_output(self._loop(), text=True)) * 1e9
        size = 2048 if self.device == "cpu" else 8192
        a = torch.ones(size, size, device=self.device)
        return size**3 / METERS[self.device].seconds(lambda k: a @ a)


class CpuMeter:
    """Times and memory of calls on the CPU. Calls get a running number."""

    def copies(self, size: int) -> int:
        """Of inputs of ``size`` bytes, to be used in turn."""
        return 1

    def seconds(self, call: Callable[[int], Any], warm_up: bool = True) -> float:
        """Of one call; short ones are repeated for a tenth of a second.

        Without an untimed call before it, a method pays for what the one before gave back to the
        system: memory that is touched for the first time can cost more than the computation.
        """
        if warm_up:
            call(0)
        start, calls, taken = time.perf_counter(), 0, 0.0
        while taken < 0.1:
            call(calls)
            calls += 1
            taken = time.perf_counter() - start
        return taken / calls

    def extra_memory(self, call: Call) -> tuple[int, tuple[Tensor, ...]]:
        """Bytes that ``call`` takes at its peak beside what it returns, by Linux's count; and that.

        Freed memory that the C library holds back is returned first, or reusing it would not count.
        """
        return_freed()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

        def resident(field: str) -> int:
            found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
            assert found is not None
            return int(found[1]) * 1024

        before = resident("VmRSS")
        outputs = call()
        return max(0, resident("VmHWM") - before - sum(x.nbytes for x in outputs)), outputs


SLEEP = 500_000  # cycles of a GPU, about a quarter of a millisecond


class GpuMeter:
    """Times by CUDA events and memory by torch's allocator."""

    def copies(self, size: int) -> int:
        """Of inputs of ``size`` bytes, to be used in turn: none is in the cache when it is used."""
        cache = torch.cuda.get_device_properties().L2_cache_size
        return max(3, 1 + math.ceil(2 * cache / size))

    def seconds(self, call: Callable[[int], Any], warm_up: bool = True) -> float:
        """Median of up to 50 calls, a quarter of a second of them at most.

        The GPU sleeps while the host brings a call's first kernels, or their way would be timed.
        """
        if warm_up:
            call(0)
        torch.cuda.synchronize()
        taken: list[float] = []
        while len(taken) < 50 and sum(taken) < 0.25:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP)
            begin.record()
            call(len(taken) + 1)
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(taken)

    def extra_memory(self, call: Call) -> tuple[int, tuple[Tensor, ...]]:
        """Bytes that ``call`` takes at its peak beside what it returns; and that."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # What is asked for: the allocator hands out large blocks that are up to 1 MiB larger.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        outputs = call()
        torch.cuda.synchronize()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        kept = sum(x.nbytes for x in outputs)
        return max(0, peak - before - kept), outputs


METERS: dict[str, CpuMeter | GpuMeter] = {"cpu": CpuMeter(), "cuda": GpuMeter()}


def gpu_floors() -> tuple[float, float]:
    """What no kernel undercuts: a copy (bytes per second, read and written), a launch (seconds)."""
    one, meter = torch.zeros(1, device="cuda"), METERS["cuda"]
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / meter.seconds(lambda k: target.copy_(source))
    return copy, meter.seconds(lambda k: one.zero_())
