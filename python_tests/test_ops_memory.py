"""The native operators keep to their workspace; the measuring is bench/bench_memory.py's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from oss_ext.ops import native

SCRIPT = Path(__file__).parents[1] / "bench" / "bench_memory.py"


@pytest.mark.skipif(not native.available, reason=str(native.why_not))
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_no_call_takes_more_than_the_contract_allows() -> None:
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert "| dp_step |" in result.stdout, result.stderr
    assert result.returncode == 0, result.stdout
