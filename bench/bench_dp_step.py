"""Times ``torch.ops.oss.dp_step`` against other ways to compute the same step, in one run.

    python bench/bench_dp_step.py [--device cuda] [--quick | --all] [--save]

The inputs are real ones: D/16 independent samples of an exact Gaussian-mixture flow side by side,
an Euler teacher and a student's states after two steps of the search, so that many sources come
close to the best. Every round times every method once, and ratios are taken within a round, so
that a slower moment of the machine hits them alike; what is timed is not a method's first call. The
share of the FMA peak counts two multiply-adds per element of the N(N+1)/2 candidates; subtractions
and the advance are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alternatives import (
    Step,
    compiled_direct,
    one_source_at_a_time,
    per_sample,
    true_parents,
    two_matrix_products,
)
from machine import METERS, FmaPeak, gpu_floors
from oss_ext import ops
from oss_ext.events import one_line
from oss_ext.machine import configuration
from oss_ext.models import analytic

K = 1024


@dataclass(frozen=True)
class Size:
    """A step: N, D, B and what has that shape."""

    steps: int
    elements: int
    samples: int = 1
    what: str = ""

    def __str__(self) -> str:
        many = f", B = {self.samples}" if self.samples > 1 else ""
        return f"({self.steps}, {self.elements}{many})"


FLUX, DIT = Size(200, 256 * K, 1, "FLUX 1024"), Size(200, 4096, 1, "DiT")
SIZES = {
    "cpu": [Size(100, 16 * K), Size(200, 16 * K), Size(200, 64 * K), Size(200, 256 * K)],
    "cuda": [  # the main one first: a machine may not be there for as long as all take
        FLUX,
        DIT,
        Size(200, 4096, 16, "DiT"),
        Size(100, 2_096_640, 1, "Wan 480p"),
        Size(100, 4_838_400, 1, "Wan 720p"),
    ],
}
MAIN = {"cpu": Size(200, 64 * K), "cuda": FLUX}
# Beyond this many elements "one source at a time" takes up to a minute a call: only with --all.
SOURCES_UP_TO = {"cpu": 64 * K, "cuda": 10**9}
DTYPES = [torch.float32, torch.bfloat16]
OURS, SOURCES, PRODUCTS, COMPILED = (
    "dp_step", "one source at a time", "two matrix products", "torch.compile"
)  # fmt: skip
# Of the true parents, which ties within roundings may miss; a kernel that is wrong misses more.
LEAST_RIGHT = 0.99
TRITON, PRODUCTS_TF32 = "dp_step (triton)", "two matrix products, TF32"


def trajectory(size: Size, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, velocity, teacher [N+1, B, D] and times [N+1] at the third step of a search."""
    model = analytic.load(shape=(16,), components=8, sd=0.1, device=device)
    elements = size.samples * size.elements
    patches = elements // 16
    times = model.times(size.steps).to(device)
    sample = torch.zeros(patches, dtype=torch.int64, device=device)

    def velocity(states: Tensor, i: int) -> Tensor:
        x = states[i].view(patches, 16)
        return model(x, times[i].expand(patches), sample).flatten()

    def velocities(states: Tensor) -> Tensor:
        out = torch.zeros(states.shape, device=device)  # t = 0 is nobody's source
        for i in range(1, size.steps + 1):
            out[i] = velocity(states, i)
        return out

    teacher = torch.empty(size.steps + 1, elements, device=device)
    teacher[-1] = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    for i in range(size.steps, 0, -1):
        dt = float(times[i - 1] - times[i])
        teacher[i - 1] = torch.add(teacher[i], velocity(teacher, i), alpha=dt)
    state = teacher[-1:].expand_as(teacher)
    shape = (size.steps + 1, 1, elements)
    for _ in range(2):
        step = [x.reshape(shape) for x in (state, velocities(state), teacher)]
        state = torch.ops.oss.dp_step(*step, times)[0].view_as(teacher)
    shape = (size.steps + 1, size.samples, size.elements)
    return state.view(shape), velocities(state).view(shape), teacher.view(shape), times


def fused(backend: str | None = None) -> Step:
    def step(z: Tensor, v: Tensor, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.dp_step(z, v, x, times, backend=backend)

    return step


def in_tf32(z: Tensor, v: Tensor, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return two_matrix_products(z, v, x, times)
    finally:
        torch.set_float32_matmul_precision(before)


def methods_for(size: Size, device: str, everything: bool) -> dict[str, Step]:
    """Every way to compute the step, ours first."""
    methods: dict[str, Step] = {OURS: fused()}
    if device == "cuda" and ops.BACKENDS["triton"].why_not(torch.device(device)) is None:
        methods[TRITON] = fused("triton")
    if everything or size.elements <= SOURCES_UP_TO[device]:
        methods[SOURCES] = per_sample(one_source_at_a_time)
    methods[PRODUCTS] = per_sample(two_matrix_products)
    if device == "cuda":
        methods[PRODUCTS_TF32] = per_sample(in_tf32)
    methods[COMPILED] = per_sample(compiled_direct())
    return methods


@dataclass(frozen=True)
class Figures:
    """One method at one size: times of all rounds and what else is told about it."""

    method: str
    size: Size
    dtype: str
    seconds: list[float]
    speedup: list[float]
    peak_share: list[float]
    extra_bytes: int
    right_parents: float

    def row(self) -> str:
        ms = spread([1e3 * s for s in self.seconds], ".0f" if max(self.seconds) > 0.5 else ".3g")
        ratio = "" if self.method == OURS else spread(self.speedup, ".1f")
        share = f"{100 * statistics.median(self.peak_share):.0f} %"
        extra, right = f"{self.extra_bytes / 2**20:.1f}", f"{100 * self.right_parents:.2f} %"
        s = self.size
        shape = (str(s.steps), f"{s.elements / K:.6g}k", str(s.samples), self.dtype)
        return f"| {' | '.join([*shape, self.method, ms, ratio, share, extra, right])} |"


HEADER = """\
| N | D | B | dtype | method | ms | dp_step is faster by | FMA peak | extra MiB | right parents |
|--:|--:|--:|:--|:--|--:|--:|--:|--:|--:|"""


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def measure(
    size: Size,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    rounds: int,
    peak: FmaPeak,
    everything: bool,
) -> tuple[list[Figures], list[str]]:
    """All methods on the same inputs; and which failed, and why."""
    device, times = inputs[0].device.type, inputs[3]
    meter = METERS[device]
    size_of_one = 3 * inputs[0].numel() * dtype.itemsize
    copies = [
        tuple(a.to(dtype, copy=True) for a in inputs[:3]) for _ in range(meter.copies(size_of_one))
    ]
    multiply_adds = size.steps * (size.steps + 1) * size.elements * size.samples
    block = 4 * K if device == "cpu" else K * K
    sample_0 = (a[:, 0] for a in copies[0])
    truth = true_parents(*sample_0, times, block)
    methods = methods_for(size, device, everything)
    extra, right, failed = {}, {}, []
    for name, method in list(methods.items()):
        try:
            if name in (COMPILED, TRITON) or device == "cuda":
                method(*copies[0], times)  # compiles, loads
            extra[name], outputs = meter.extra_memory(
                lambda method=method: method(*copies[0], times)
            )
        except Exception as error:  # of a compiler or for want of memory: the others go on
            if name == OURS:
                raise
            failed.append(f"- {name} failed at {size}, {dtype}: {one_line(error)}")
            del methods[name]
            continue
        found = outputs[2] if outputs[2].dim() == 1 else outputs[2][:, 0]
        right[name] = float((found == truth)[:-1].double().mean())
        del outputs
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks = []
    for _ in range(rounds):
        # A CPU is shared with others; to ask a GPU takes half a second of another process.
        peaks.append(peak() if device == "cpu" or not peaks else peaks[-1])
        for name, method in methods.items():
            # Whoever takes seconds touches more new memory by itself than was left to touch.
            brief = not seconds[name] or seconds[name][-1] < 1
            taken = meter.seconds(
                lambda k, method=method: method(*copies[k % len(copies)], times), brief
            )
            seconds[name].append(taken)
    figures = [
        Figures(
            method=name,
            size=size,
            dtype=str(dtype).removeprefix("torch."),
            seconds=taken,
            speedup=[other / ours for other, ours in zip(taken, seconds[OURS], strict=True)],
            peak_share=[multiply_adds / s / p for s, p in zip(taken, peaks, strict=True)],
            extra_bytes=extra[name],
            right_parents=right[name],
        )
        for name, taken in seconds.items()
    ]
    return figures, failed


def targets(figures: list[Figures], device: str, launch: float) -> list[str]:
    """What is to be reached, and whether it was; ``launch``: seconds of the smallest one."""
    lines = []

    def target(what: str, values: list[float], least: float, form: str = ".1f") -> None:
        reached = "reached" if statistics.median(values) >= least else "MISSED"
        lines.append(f"- {what}: {spread(values, form)}, at least {least:{form}}: {reached}")

    products = {"cpu": (4.5, 3.0), "cuda": (3.0, None)}[device]
    sources = {"cpu": 60, "cuda": 100}[device]
    at = {(f.method, f.size, f.dtype): f for f in figures}
    for (method, size, dtype), f in at.items():
        main = size == MAIN[device]
        least = products[0] if main else products[1]
        if dtype == "bfloat16" and method == OURS:
            single = at[OURS, size, "float32"].seconds
            ratio = [a / b for a, b in zip(single, f.seconds, strict=True)]
            target(f"bfloat16 over float32 at {size}", ratio, 1.0, ".2f")
        elif dtype == "float32" and method == PRODUCTS and least is not None:
            target(f"over two matrix products at {size}", f.speedup, least)
        elif dtype == "float32" and method == SOURCES and main:
            target(f"over one source at a time at {size}", f.speedup, sources)
        elif dtype == "float32" and method == OURS and device == "cpu":
            target(f"share of the FMA peak at {size}", f.peak_share, 0.6, ".2f")
        elif dtype == "float32" and method == OURS and main:
            target(f"0.80 ms over the time at {size}", [0.8e-3 / s for s in f.seconds], 1, ".2f")
        elif dtype == "float32" and method == OURS and size == DIT:
            share = [4 * launch / s for s in f.seconds]
            target(f"four launches over the time at {size}", share, 1, ".2f")
    return lines


def save(path: Path, lines: list[str], facts: dict[str, object], figures: list[Figures]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    record = {"configuration": facts, "figures": [dataclasses.asdict(f) for f in figures]}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest size, three rounds")
    parser.add_argument("--all", action="store_true", help="every method at every size")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default: 2")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/<device>.md and .json"
    )
    options = parser.parse_args()
    device: str = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if ops.serving(device).name != "native":
        why = ops.BACKENDS["native"].why_not(torch.device(device))
        parser.error(f"--device {device}: expected the native kernels there, but {why}")
    torch.set_num_threads(options.threads)
    sizes, rounds = SIZES[device], options.rounds
    if options.quick:
        sizes, rounds = [min(sizes, key=lambda size: size.elements * size.samples)], 3

    peak = FmaPeak(device, options.threads)
    facts = {
        **configuration(device),
        "fma_peak": f"{peak() * 1e-9:.1f} billion/s, by {peak.method}",
        "rounds": rounds,
    }
    launch = 0.0
    if device == "cuda":
        copy, launch = gpu_floors()
        facts["copy"] = f"{copy * 1e-12:.2f} TB/s read and written"
        facts["smallest launch"] = f"{launch * 1e6:.1f} us"
    lines = ["# dp_step beside its alternatives", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "Median (least-most) of all rounds.", "", *HEADER.splitlines()]
    print("\n".join(lines), flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu" if device == "cuda" else "cpu"]).lower())
    path = Path(__file__).parent / "results" / f"{slug.strip('-')}.md"
    figures: list[Figures] = []
    failed: list[str] = []
    verdict: list[str] = []
    for size in sizes:
        inputs = trajectory(size, device)
        for dtype in DTYPES:
            new, without = measure(size, inputs, dtype, rounds, peak, options.all)
            figures, failed = figures + new, failed + without
            rows = [f.row() for f in new]
            print("\n".join(rows + without), flush=True)
            lines += rows
            verdict = ["", "## Targets", "", *targets(figures, device, launch), *failed]
            if options.save:  # every time: what was measured outlasts what comes after it
                save(path, lines + verdict, facts, figures)
        del inputs
    print("\n".join(verdict))
    if options.save:
        print(f"\nwrote {path} and {path.with_suffix('.json').name}")
    wrong = [f for f in figures if f.method in (OURS, TRITON) and f.right_parents < LEAST_RIGHT]
    for f in wrong:
        print(f"{f.method} is WRONG at {f.size}, {f.dtype}: too few of its parents are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
