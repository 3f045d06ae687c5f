"""Times ``torch.ops.oss.dp_argmin_`` against ``dp_step``, in one run.

    python bench/bench_dp_argmin.py [--rounds 9] [--threads 2]

Every round times every call once, and ratios are taken within a round, so that a slower moment of
the machine hits them alike. A candidate of R terms needs R + 2 operations per element where Euler's
needs 3, which has no product for its first term; the bound on the time of a (source, order) is 1.4
(R + 1) / 3 of what ``dp_step`` takes, its advance included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from bench_dp_step import Size, spread
from machine import METERS
from oss_ext import ops
from oss_ext.machine import configuration

SIZES = [Size(200, 16 * 1024), Size(100, 4096)]
TERMS = [2, 3, 4]
ORDERS = [1, 2, 3]


def bound(terms: int) -> float:
    return 1.4 * (terms + 1) / 3


def calls(size: Size) -> dict[tuple[int, int], Callable[[], object]]:
    """``dp_step`` at (0, 0), and ``dp_argmin_`` at (terms, orders)."""
    rows, shape = size.steps + 1, (size.steps + 1, size.samples, size.elements)
    basis = [torch.randn(shape) for _ in range(max(TERMS))]
    target = torch.randn(shape)
    times = torch.linspace(0, 1, rows, dtype=torch.float64)
    index = torch.arange(1, rows)[None, :, None].expand(max(TERMS), -1, size.samples)
    best_cost = torch.empty(rows, size.samples, dtype=torch.float64)
    best_parent = torch.empty(rows, size.samples, dtype=torch.int64)
    best_order = torch.empty_like(best_parent)

    def argmin(terms: int, orders: int) -> Callable[[], object]:
        coefficients = torch.rand(orders, terms, size.steps, rows, 1, dtype=torch.float64)

        def call() -> None:
            best_cost.fill_(torch.inf), best_parent.fill_(-1), best_order.fill_(-1)
            ops.dp_argmin_(
                basis[:terms], index[:terms], coefficients, [terms] * orders, 1, target,
                best_cost, best_parent, best_order,
            )  # fmt: skip

        return call

    step = {(0, 0): lambda: ops.dp_step(basis[0], basis[1], target, times)}
    return step | {(r, o): argmin(r, o) for r in TERMS for o in ORDERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default: 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(*(f"- {name}: {value}" for name, value in configuration("cpu").items()), sep="\n")
    print("\nMedian (least-most) of all rounds; times of dp_step for each order.\n")
    print("| N | D | terms | orders | ms | times of dp_step | at most | |")
    print("|--:|--:|--:|--:|--:|--:|--:|:--|")
    meter = METERS["cpu"]
    for size in SIZES:
        methods = calls(size)
        taken: dict[tuple[int, int], list[float]] = {key: [] for key in methods}
        for turn in range(options.rounds):
            keys = list(methods)
            for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
                taken[key].append(meter.seconds(lambda k, call=methods[key]: call()))
        step = taken.pop((0, 0))
        for (terms, orders), seconds in taken.items():
            ratio = [a / b / orders for a, b in zip(seconds, step, strict=True)]
            verdict = "reached" if statistics.median(ratio) <= bound(terms) else "MISSED"
            ms = spread([1e3 * s for s in seconds], ".3g")
            row = (size.steps, size.elements, terms, orders, ms, spread(ratio, ".2f"))
            print(f"| {' | '.join(map(str, row))} | {bound(terms):.2f} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
