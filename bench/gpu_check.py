"""Builds the CUDA kernels, proves them on this machine's GPU and measures them, in one go.

    python bench/gpu_check.py [--no-bench]

Needs torch with CUDA, nvcc, cmake, ninja, pybind11, pytest and hypothesis in this Python, beside
what the package itself needs, and changes nothing but the source tree (the library in oss_ext/,
build/, bench/results/). Ends with 0 if all is well, with 1 if anything failed, and with 2 where
there is no GPU: then nothing was checked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# A few small cases of every kernel, for the tools that slow a program down a hundredfold.
SMALL = (
    "test_step_is_cost_select_advance or test_step_is_the_accumulation_of_chunks"
    " or test_chunks_add_up_to_one_call or test_the_combination_is_the_candidate"
)


def run(what: str, command: Sequence[str | Path], seconds: int, **environ: str) -> bool:
    """Whether a command ended well; says what it was and how long it took."""
    print(f"== {what}", flush=True)
    start = time.monotonic()
    try:
        settings = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        code = subprocess.run(command, cwd=ROOT, env=settings, timeout=seconds).returncode
        ended = "ok" if code == 0 else f"FAILED with {code}"
    except subprocess.TimeoutExpired:
        ended = f"FAILED: more than {seconds} s"
    print(f"-- {what}: {ended}, {time.monotonic() - start:.0f} s", flush=True)
    return ended == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--no-bench", action="store_true", help="prove, but do not measure")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: nothing was built, checked or measured")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version}")

    python, pytest = sys.executable, [sys.executable, "-m", "pytest", "-q", "-x", "--no-header"]
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    if not run("build", build, 240, OSS_CUDA="1"):
        return 1
    tests = sorted(str(path) for path in (ROOT / "python_tests").glob("test_ops_*.py"))
    searches = [str(ROOT / "python_tests" / f"test_{name}.py")
                for name in ("search_devices", "host_memory")]  # fmt: skip
    good = [
        run("operators on the GPU", [*pytest, "-k", "cuda", *tests], 240),
        run("searches on the GPU", [*pytest, "-k", "cuda", *searches], 120),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not here: memcheck and racecheck were not run")
    else:
        small = [*pytest, "-k", f"native-cuda and ({SMALL})", str(ROOT / "python_tests")]
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *small]
            good.append(run(f"compute-sanitizer {tool}", command, 180))
    if not options.no_bench:
        bench = [python, "bench/bench_dp_step.py", "--device", "cuda", "--save"]
        good.append(run("bench", bench, 400))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
