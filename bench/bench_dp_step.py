"""Times ``torch.ops.oss.dp_step`` against other ways to compute the same step, in one run.

    python bench/bench_dp_step.py [--quick | --all] [--save]

The inputs are real ones: D/16 independent samples of an exact Gaussian-mixture flow side by side,
an Euler teacher and a student's states after two steps of the search, so that many sources come
close to the best. Every round times every method once, and ratios are taken within a round, so
that a slower moment of the machine hits them alike; what is timed is a method's second call. The
share of the FMA peak counts two multiply-adds per element of the N(N+1)/2 candidates; subtractions
and the advance are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alternatives import (
    Step,
    compiled_direct,
    one_source_at_a_time,
    true_parents,
    two_matrix_products,
)
from machine import FmaPeak, configuration, extra_memory
from oss_ext.models import analytic

K = 1024
# Beyond this many elements "one source at a time" takes up to a minute a call: only with --all.
SOURCES_UP_TO = 64 * K
SIZES = [(100, 16 * K), (200, 16 * K), (200, 64 * K), (200, 256 * K)]
DTYPES = [torch.float32, torch.bfloat16]
OURS, SOURCES, PRODUCTS, COMPILED = (
    "dp_step", "one source at a time", "two matrix products", "torch.compile"
)  # fmt: skip


def trajectory(steps: int, elements: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, velocity, teacher [N+1, D] and times [N+1] at the third step of a search."""
    model = analytic.load(shape=(16,), components=8, sd=0.1)
    patches = elements // 16
    times, sample = model.times(steps), torch.zeros(patches, dtype=torch.int64)

    def velocity(states: Tensor, i: int) -> Tensor:
        x = states[i].view(patches, 16)
        return model(x, times[i].expand(patches), sample).flatten()

    def velocities(states: Tensor) -> Tensor:
        row_0 = torch.zeros(elements)  # t = 0 is nobody's source
        return torch.stack([row_0, *(velocity(states, i) for i in range(1, steps + 1))])

    teacher = torch.empty(steps + 1, elements)
    teacher[-1] = model.noise(patches).flatten()
    for i in range(steps, 0, -1):
        dt = float(times[i - 1] - times[i])
        teacher[i - 1] = torch.add(teacher[i], velocity(teacher, i), alpha=dt)
    state = teacher[-1:].expand_as(teacher)
    for _ in range(2):
        state = fused(state, velocities(state), teacher, times)[0]
    return state, velocities(state), teacher, times


def fused(z: Tensor, v: Tensor, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``dp_step`` on a single sample."""
    step = torch.ops.oss.dp_step(z[:, None], v[:, None], x[:, None], times)
    next_state, cost, parent = (out[:, 0] for out in step)
    return next_state, cost, parent


@dataclass(frozen=True)
class Figures:
    """One method at one size: times of all rounds and what else is told about it."""

    method: str
    steps: int
    elements: int
    dtype: str
    seconds: list[float]
    speedup: list[float]
    peak_share: list[float]
    extra_bytes: int
    right_parents: float

    def row(self) -> str:
        ms = spread([1e3 * s for s in self.seconds], ".1f")
        ratio = "" if self.method == OURS else spread(self.speedup, ".1f")
        share = f"{100 * statistics.median(self.peak_share):.0f} %"
        extra, right = f"{self.extra_bytes / 2**20:.1f}", f"{100 * self.right_parents:.2f} %"
        size = (str(self.steps), f"{self.elements // K}k", self.dtype)
        return f"| {' | '.join([*size, self.method, ms, ratio, share, extra, right])} |"


HEADER = """\
| N | D | dtype | method | ms | dp_step is faster by | FMA peak | extra MiB | right parents |
|--:|--:|:--|:--|--:|--:|--:|--:|--:|"""


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def seconds_of(call: Callable[[], Any], warm_up: bool) -> float:
    """Of one call; short ones are repeated for a tenth of a second.

    Without an untimed call before it, a method pays for what the one before gave back to the
    system: memory that is touched for the first time can cost more than the computation.
    """
    if warm_up:
        call()
    start, calls, taken = time.perf_counter(), 0, 0.0
    while taken < 0.1:
        call()
        calls += 1
        taken = time.perf_counter() - start
    return taken / calls


def measure(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    rounds: int,
    peak: FmaPeak,
    everything: bool,
) -> list[Figures]:
    """All methods on the same inputs."""
    times = inputs[3]
    z, v, x = (a.to(dtype) for a in inputs[:3])
    steps, elements = len(z) - 1, z.shape[1]
    multiply_adds = steps * (steps + 1) * elements
    truth = true_parents(z, v, x, times)
    methods: dict[str, Step] = {
        OURS: fused,
        SOURCES: one_source_at_a_time,
        PRODUCTS: two_matrix_products,
        COMPILED: compiled_direct(),
    }
    if elements > SOURCES_UP_TO and not everything:
        del methods[SOURCES]
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    extra, right = {}, {}
    methods[COMPILED](z, v, x, times)  # compiles
    for name, method in methods.items():
        extra[name], outputs = extra_memory(lambda method=method: method(z, v, x, times))
        right[name] = float((outputs[2] == truth)[:-1].double().mean())
    peaks = []
    for _ in range(rounds):
        peaks.append(peak())
        for name, method in methods.items():
            # Whoever takes seconds touches more new memory by itself than was left to touch.
            brief = not seconds[name] or seconds[name][-1] < 1
            seconds[name].append(seconds_of(lambda method=method: method(z, v, x, times), brief))
    return [
        Figures(
            method=name,
            steps=steps,
            elements=elements,
            dtype=str(dtype).removeprefix("torch."),
            seconds=taken,
            speedup=[other / ours for other, ours in zip(taken, seconds[OURS], strict=True)],
            peak_share=[multiply_adds / s / p for s, p in zip(taken, peaks, strict=True)],
            extra_bytes=extra[name],
            right_parents=right[name],
        )
        for name, taken in seconds.items()
    ]


def targets(figures: list[Figures]) -> list[str]:
    """What is to be reached, and whether it was."""
    lines = []

    def target(what: str, values: list[float], least: float, form: str = ".1f") -> None:
        reached = "reached" if statistics.median(values) >= least else "MISSED"
        lines.append(f"- {what}: {spread(values, form)}, at least {least:{form}}: {reached}")

    at = {(f.method, f.steps, f.elements, f.dtype): f for f in figures}
    for (method, steps, elements, dtype), f in at.items():
        where = f"at ({steps}, {elements // K}k)"
        main = (steps, elements) == (200, 64 * K)
        if dtype == "bfloat16" and method == OURS:
            single = at[OURS, steps, elements, "float32"].seconds
            ratio = [a / b for a, b in zip(single, f.seconds, strict=True)]
            target(f"bfloat16 over float32 {where}", ratio, 1.0, ".2f")
        elif dtype == "float32" and method == PRODUCTS:
            target(f"over two matrix products {where}", f.speedup, 4.5 if main else 3.0)
        elif dtype == "float32" and method == SOURCES and main:
            target(f"over one source at a time {where}", f.speedup, 60)
        elif dtype == "float32" and method == OURS:
            target(f"share of the FMA peak {where}", f.peak_share, 0.6, ".2f")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the smallest size, three rounds")
    parser.add_argument("--all", action="store_true", help="every method at every size")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/<cpu>.md and .json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes, rounds = (SIZES[:1], 3) if options.quick else (SIZES, options.rounds)

    peak = FmaPeak(options.threads)
    facts = {
        **configuration(),
        "fma_peak": f"{peak() * 1e-9:.1f} billion/s, by {peak.method}",
        "rounds": rounds,
    }
    lines = ["# dp_step beside its alternatives", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "Median (least-most) of all rounds; B = 1.", "", *HEADER.splitlines()]
    print("\n".join(lines), flush=True)
    figures: list[Figures] = []
    for steps, elements in sizes:
        inputs = trajectory(steps, elements)
        for dtype in DTYPES:
            new = measure(inputs, dtype, rounds, peak, options.all)
            figures += new
            rows = [f.row() for f in new]
            print("\n".join(rows), flush=True)
            lines += rows
    verdict = ["", "## Targets", "", *targets(figures)]
    print("\n".join(verdict))

    if options.save:
        slug = re.sub(r"[^a-z0-9]+", "-", str(facts["cpu"]).lower()).strip("-")
        path = Path(__file__).parent / "results" / f"{slug}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines + verdict) + "\n")
        record = {"configuration": facts, "figures": [dataclasses.asdict(f) for f in figures]}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwrote {path} and {path.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
