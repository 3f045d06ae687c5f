"""How much of a step of the dynamic programme early abandoning could save, on recorded steps.

    python bench/bench_early_abandoning.py                       # the bundled digits, 200 -> 10
    python bench/bench_early_abandoning.py --model examples/power_spectra.py:calibration \\
        --samples 2 --records out/power_spectra/steps.pt         # evaluates the network once

A sum of squares only grows, in floating point too. So a candidate whose partial cost has passed the
best complete cost may be dropped without a change of any bit. What that leaves of the work is
counted here as the CPU kernel does it: blocks of 256 float32 elements, tiles of one source and six
targets, which are dropped whole or not at all. A block of every sample is taken before the next
block of any: by ``log_mean`` a sample that is not begun could still cost 2^-126 and win for all,
so that in the order of the samples nothing could be dropped before the last of them.

Three ways to know what a partial cost has to pass:

- best known: the winners' costs, as if they were given. No order of the sources leaves less.
- every 16th first: these sources are computed in full, and the others compared with their best.
- directions: likewise, but the others are compared before any block, by a lower bound of their cost
  from their coordinates in a few principal directions of the sample's teacher and the length of the
  rest, ``|c - x|^2 >= |P c - P x|^2 + (|c - P c| - |x - P x|)^2``. Neither its own price nor what
  it must leave for rounding is counted.

The limit is the ratio that a kernel would reach that leaves so much of the loop over the elements
of pairs and is otherwise as fast as it is, the checks being free. What is not in that loop is
measured by calls that have everything else: all pairs with a few elements each (sums, logarithms,
the argmin), and all elements of one source only (the targets' packing, the advance). Times are the
calling thread's own, on one thread, of calls taken in turn.

Early abandoning is not in the kernel, where it was to give 1.3 or more. On 21cmPSDenoiser and by
``log_mean``, the default of searches, partial costs allow 1.28 at the most even with the best known
and free checks, and 1.22 with an order of sources that can be had: the loop is 0.53 to 0.58 of the
step there, and 0.60 to 0.67 of it are left. The directions leave less, but were no faster when
tried, for what they cost themselves: bench/results/early-abandoning.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import oss_ext as oss
from oss_ext import dp, ops
from oss_ext.machine import configuration
from oss_ext.models.evaluation import Evaluator

BLOCK, TILE = 256, 6  # of the CPU kernel: elements, targets
APART = 16  # sources that are computed in full to begin with
DIRECTIONS = 8
FEW = 32  # elements: the kernel takes as many at a time


@dataclass(frozen=True)
class Recorded:
    """What a step of a search is computed from; state, velocity and teacher are [N+1, B, D]."""

    number: int
    state: Tensor
    velocity: Tensor
    teacher: Tensor
    times: Tensor
    live: Tensor  # [N+1, B]

    def run(self, reduce: str, elements: int | None = None, live: Tensor | None = None) -> None:
        z, v, x = (a[..., :elements] for a in (self.state, self.velocity, self.teacher))
        mask = self.live if live is None else live
        ops.dp_step(z, v, x, self.times, source_mask=mask, reduce=reduce)


def record(evaluator: Evaluator, teacher: oss.Trajectory, steps: list[int], reduce: str
           ) -> list[Recorded]:  # fmt: skip
    """Those of ``steps`` of a search, as it made them."""
    kept: list[Recorded] = []
    compute, number = ops.dp_accumulate_, 0

    def spy(state: Tensor, velocity: Tensor, first: int, *rest: Any, **options: Any) -> None:
        nonlocal number
        number += 1
        assert len(velocity) == len(state) - 1, "velocities come in one chunk"
        if number in steps:
            padded = torch.cat([torch.zeros_like(velocity[:1]), velocity])
            z, v, x = (a.flatten(2).clone() for a in (state, padded, rest[0]))
            live = options["source_mask"].expand(state.shape[:2]).clone()
            kept.append(Recorded(number, z, v, x, rest[1], live))
        compute(state, velocity, first, *rest, **options)

    with mock.patch("oss_ext.ops.dp_accumulate_", spy):
        dp.run(evaluator, teacher, max(steps), reduce=reduce, velocity_bytes=2**40)
    return kept


def partial_sums(step: Recorded) -> Tensor:
    """Sums of squares up to the end of each block, [source, target, B, blocks]."""
    z, v, x, rows = step.state, step.velocity, step.teacher, len(step.times)
    blocks = -(-x.shape[2] // BLOCK)
    out = torch.zeros(rows, rows, x.shape[1], blocks, dtype=torch.float64)
    for i in range(1, rows):
        h = (step.times[:i] - step.times[i]).to(z.dtype)[:, None, None]
        squares = (z[i] + h * v[i] - x[:i]).double().square()
        out[i, :i] = torch.stack([part.sum(dim=-1) for part in squares.split(BLOCK, -1)], -1)
    return out.cumsum(dim=-1)


def lower_bounds(step: Recorded) -> Tensor:
    """Of the sums of squares, from ``DIRECTIONS`` of the teacher, [source, target, B]."""
    h = step.times - step.times[:, None]
    bounds = []
    for z, v, x in zip(*(a.double().unbind(1) for a in (step.state, step.velocity, step.teacher)),
                       strict=True):  # fmt: skip
        axes = torch.linalg.svd(x, full_matrices=False).Vh[:DIRECTIONS].T
        inside = (z @ axes)[:, None] + h[..., None] * (v @ axes)[:, None] - x @ axes
        z, v, x = (a - a @ axes @ axes.T for a in (z, v, x))
        zz, zv, vv = (a.sum(dim=1, keepdim=True) for a in (z * z, z * v, v * v))
        length = (zz + 2 * h * zv + h * h * vv).clamp(min=0).sqrt()
        bounds.append(inside.square().sum(dim=-1) + (length - x.norm(dim=1)).square())
    return torch.stack(bounds, dim=-1)


def objective(sums: Tensor, elements: int, reduce: str) -> Tensor:
    """[source, target, B], or 1 for B, of sums of squares."""
    cost = sums / elements
    if reduce == "none":
        return cost
    return (cost.clamp(min=2.0**-126).log() if reduce == "log_mean" else cost).mean(-1, True)


def tiles(pairs: Tensor) -> int:
    """How many tiles hold any of ``pairs``, [source, target, ...]."""
    padded = torch.nn.functional.pad(pairs.movedim(1, -1), (0, -pairs.shape[1] % TILE))
    return int(padded.unflatten(-1, (-1, TILE)).any(dim=-1).sum())


def work_left(step: Recorded, reduce: str) -> tuple[float, float, float]:
    """Share of the kernel's work by the three ways above."""
    rows, elements = len(step.times), step.teacher.shape[2]
    live = step.live if reduce == "none" else step.live.all(dim=1, keepdim=True)
    pairs = live[:, None] & torch.ones(rows, rows, dtype=torch.bool).tril(-1)[..., None]
    sums = partial_sums(step)
    blocks = sums.shape[3]
    complete = torch.where(pairs, objective(sums[..., -1], elements, reduce), torch.inf)
    begun = [objective(sums[..., k], elements, reduce) for k in range(blocks - 1)]
    bound = objective(lower_bounds(step), elements, reduce)
    # The largest live source is among them, so that every target below it has a best.
    last = int(live.any(dim=1).nonzero().max())
    full = torch.arange(rows) % APART == last % APART
    rest = pairs & ~full[:, None, None]
    best = complete[full].amin(dim=0)
    before = tiles(pairs & full[:, None, None]) * blocks

    def by_blocks(pairs: Tensor, best: Tensor) -> int:
        return tiles(pairs) + sum(tiles(pairs & (partial <= best)) for partial in begun)

    ways = (
        by_blocks(pairs, complete.amin(dim=0)),
        before + by_blocks(rest, best),
        before + tiles(rest & (bound <= best)) * blocks,
    )
    known, first, directions = (way / (tiles(pairs) * blocks) for way in ways)
    return known, first, directions


def times_of(step: Recorded, reduce: str, rounds: int) -> tuple[float, float]:
    """Milliseconds of the step, and of its loop over the elements of pairs."""
    one = torch.zeros_like(step.live)
    one[int(step.live.all(dim=1).nonzero().max())] = True
    calls: list[dict[str, Any]] = [{}, {"elements": FEW}, {"live": one}]
    calls.append(calls[1] | calls[2])  # what those two have in common
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for options, seconds in zip(calls, taken, strict=True):
            begin = time.thread_time()
            step.run(reduce, **options)
            seconds.append(time.thread_time() - begin)
    whole, few, single, both = (1e3 * statistics.median(seconds[1:]) for seconds in taken)
    elements = step.teacher.shape[2]
    return whole, (whole - few - single + both) * elements / (elements - FEW)


def recorded(options: argparse.Namespace) -> dict[str, list[Recorded]]:
    """By reduction, steps of its own search; from ``--records`` where it is there."""
    if options.records and options.records.exists():
        kept = torch.load(options.records)
        return {name: [Recorded(**step) for step in kept[name]] for name in options.reduce}
    model = oss.models.load(options.model)
    teacher = oss.teacher(model, model.noise(options.samples), steps=options.teacher_steps)
    found = {}
    for name in options.reduce:
        evaluator = Evaluator(model, options.samples)
        found[name] = record(evaluator, teacher, options.steps, name)
    if options.records:
        torch.save({n: [vars(step) for step in steps] for n, steps in found.items()},
                   options.records)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="digits", metavar="NAME|FILE.py:FUNCTION")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10], help="to record")
    parser.add_argument("--reduce", nargs="+", default=["log_mean", "mean", "none"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--records", type=Path, help="keep the steps in this file, or read them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = recorded(options)
    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    rows, samples, elements = steps[options.reduce[0]][0].teacher.shape
    shape = f"{samples} samples of {elements} elements, N = {rows - 1}"
    print(f"- {options.model}: {shape}, {options.rounds} rounds\n")
    head = ["reduce", "step", "ms", "in the loop", "best known", "limit"]
    head += [f"every {APART}th first", "limit", f"{DIRECTIONS} directions", "limit"]
    print(f"| {' | '.join(head)} |\n|:--|{'--:|' * (len(head) - 1)}", flush=True)
    for reduce in options.reduce:
        for step in steps[reduce]:
            whole, loop = times_of(step, reduce, options.rounds)
            cells = [reduce, str(step.number), f"{whole:.2f}", f"{loop / whole:.2f}"]
            for left in work_left(step, reduce):
                cells += [f"{left:.2f}", f"{whole / (whole - (1 - left) * loop):.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
