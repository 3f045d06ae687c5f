"""The native operators keep to their workspace; the measuring is bench/bench_memory.py's."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from oss_ext.ops import native

LEAK = """
import ctypes, torch
from oss_ext import ops

class Heap(ctypes.Structure):
    _fields_ = [(f"field{k}", ctypes.c_size_t) for k in range(10)]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
x, times = torch.randn(9, 3, 20), torch.arange(9.0).double()
terms = {"index": torch.arange(8)[None, :, None].expand(1, 8, 3), "terms": [1]}
terms |= {"coefficients": torch.ones(1, 1, 8, 9, 3).double(), "first_source": 1, "target": x}

def call(reduce):
    columns = 3 if reduce == "none" else 1
    ops.dp_step(x, x, x, times, reduce=reduce)
    ops.dp_select(ops.dp_cost(x, x, x, times), reduce)
    cost = torch.full((9, 3), torch.inf, dtype=torch.float64)
    parent = torch.full((9, columns), -1)
    ops.dp_accumulate_(x.clone(), x[1:], 1, x, times, cost, parent, reduce=reduce)
    cost.fill_(torch.inf)
    ops.dp_argmin_([x], **terms, best_cost=cost, best_parent=parent.fill_(-1),
                   best_order=parent - 0, reduce=reduce)

for reduce in ("none", "log_mean"):
    for _ in range(50):
        call(reduce)
    before = mallinfo2().field7  # bytes in use
    for _ in range(2000):
        call(reduce)
    print((mallinfo2().field7 - before) / 2000)
"""
SCRIPT = Path(__file__).parents[1] / "bench" / "bench_memory.py"


@pytest.mark.skipif(not native.available, reason=str(native.why_not))
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_no_call_takes_more_than_the_contract_allows() -> None:
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert "| dp_step |" in result.stdout, result.stderr
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(not native.available, reason=str(native.why_not))
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is asked of glibc")
def test_calls_leave_nothing_behind() -> None:
    result = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    grown = [float(bytes_a_call) for bytes_a_call in result.stdout.split()]
    # Python's own objects come and go by some thousand bytes; a string, of one operator of the
    # five, would be 48 a call.
    assert len(grown) == 2
    assert max(grown) < 16
