"""Profiles ``torch.ops.oss.dp_step`` and holds it against what the device allows.

    python bench/profile_dp_step.py [--device cuda] [--steps 200] [--elements 262144]

Writes a trace for chrome://tracing or Perfetto, with a range (NVTX too) around every call, lists
what took the time, and prints the bytes that must move and the instructions that must issue beside
the rates measured here. On a GPU it also prints the Nsight Compute command for the cost pass.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench_dp_step import DTYPES, MAIN, SIZES, Size, trajectory
from machine import METERS, FmaPeak, gpu_floors
from oss_ext.machine import configuration


def floors(size: Size, itemsize: int, peak: float, copy: float | None) -> list[str]:
    """The least that a step can take: reading for the costs, arithmetic, then the advance."""
    values = (size.steps + 1) * size.elements * size.samples
    pairs = size.steps * (size.steps + 1) // 2
    instructions = 3 * pairs * size.elements * size.samples  # two multiply-adds, one subtraction
    lines = [
        f"costs: {3 * values * itemsize / 1e9:.3g} GB read, {instructions / 1e9:.4g} billion "
        f"float32 instructions = {1e3 * instructions / peak:.3g} ms at the measured rate",
        f"advance: up to {3 * values * itemsize / 1e9:.3g} GB read and written, after the argmin",
    ]
    if copy is not None:
        ms = 1e3 * 3 * values * itemsize / copy
        lines.append(f"memory: {ms:.3g} ms for either at the measured rate of a copy")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--steps", type=int, help="N; default: the main size of the benchmark")
    parser.add_argument("--elements", type=int, help="D")
    parser.add_argument("--samples", type=int, default=1, help="B")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/profile.json"))
    options = parser.parse_args()
    device: str = options.device
    main_size = MAIN[device]
    size = Size(
        options.steps or main_size.steps, options.elements or main_size.elements, options.samples
    )
    print(*(f"- {name}: {value}" for name, value in configuration(device).items()), sep="\n")
    peak = FmaPeak(device, torch.get_num_threads())()
    copy = gpu_floors()[0] if device == "cuda" else None

    inputs = trajectory(size, device)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step = torch.ops.oss.dp_step
    variants = {dtype: [a.to(dtype) for a in inputs[:3]] for dtype in DTYPES}
    for dtype, tensors in variants.items():
        seconds = METERS[device].seconds(lambda k, tensors=tensors: step(*tensors, inputs[3]))
        print(f"\n{size}, {dtype}: {1e3 * seconds:.3g} ms")
        print(*floors(size, dtype.itemsize, peak, copy), sep="\n")
    mark = torch.cuda.nvtx.range if device == "cuda" else nullcontext
    with profile(activities=activities) as profiler:
        for dtype, tensors in variants.items():
            for _ in range(options.calls):
                with record_function(f"dp_step {dtype}"), mark(f"dp_step {dtype}"):
                    step(*tensors, inputs[3])
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=60))
    options.out.parent.mkdir(exist_ok=True, parents=True)
    profiler.export_chrome_trace(str(options.out))
    print(f"wrote {options.out}")
    if device == "cuda":
        print(
            "ncu --clock-control none --set full --kernel-name regex:cost_kernel --launch-skip 2 "
            "--launch-count 1 "
            f"python bench/profile_dp_step.py --device cuda --steps {size.steps} "
            f"--elements {size.elements} --samples {size.samples}"
        )


if __name__ == "__main__":
    main()
