"""Measures the workspace of the operators: what a call takes beside its outputs, at its peak.

    python bench/bench_memory.py

The contract: 8 MiB up to N = 200 and 32 MiB up to N = 1024, whatever the samples, the elements,
the layout and the number of threads. Exits with 1 where it is exceeded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context

import torch
from torch import Tensor

from machine import METERS
from oss_ext import ops
from oss_ext.machine import configuration

MIB = 2**20


@dataclass(frozen=True)
class Case:
    op: str = "dp_step"
    steps: int = 200
    samples: int = 1
    elements: int = 2**15  # a copy of an input would take 25 MiB
    dtype: torch.dtype = torch.float32
    reduce: str = "none"
    strided: bool = False
    threads: int = 2

    @property
    def limit(self) -> int:
        return (8 if self.steps <= 200 else 32) * MIB


PLAIN = Case()
LONG = Case(steps=1024, elements=2**12)
CASES = [
    PLAIN,
    replace(PLAIN, dtype=torch.bfloat16),
    replace(PLAIN, dtype=torch.float64),
    replace(PLAIN, strided=True),
    replace(PLAIN, threads=64),
    replace(PLAIN, samples=64, elements=2**10),
    replace(PLAIN, samples=64, elements=2**10, reduce="log_mean"),
    replace(PLAIN, samples=2**12, elements=2**2),
    replace(PLAIN, op="dp_cost"),
    replace(PLAIN, op="dp_advance"),
    replace(PLAIN, op="dp_accumulate_"),
    replace(PLAIN, op="dp_accumulate_", samples=64, elements=2**10, reduce="log_mean"),
    replace(PLAIN, op="dp_argmin_"),
    replace(PLAIN, op="dp_argmin_", dtype=torch.float64),
    replace(PLAIN, op="dp_argmin_", threads=64),
    replace(PLAIN, op="dp_argmin_", samples=2**9, elements=2**4),
    replace(PLAIN, op="dp_argmin_", samples=16, elements=2**10, reduce="log_mean"),
    replace(PLAIN, op="dp_combine"),
    LONG,
    replace(LONG, threads=64),
    replace(LONG, samples=4, elements=2**10, reduce="log_mean"),
    replace(LONG, op="dp_argmin_"),
]


def prepare(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the operator; memory does not depend on the values."""
    rows = case.steps + 1
    shape = (rows, case.elements, case.samples) if case.strided else (rows, case.samples, -1)
    state, velocity, teacher = (
        torch.ones(rows * case.samples * case.elements, dtype=case.dtype).view(shape) for _ in "zvx"
    )
    if case.strided:
        state, velocity, teacher = (x.mT for x in (state, velocity, teacher))
    times = torch.linspace(0, 1, rows, dtype=torch.float64)
    if case.op == "dp_step":
        return lambda: ops.dp_step(state, velocity, teacher, times, reduce=case.reduce)
    if case.op == "dp_cost":
        return lambda: (ops.dp_cost(state, velocity, teacher, times),)
    if case.op == "dp_advance":
        parent = torch.arange(1, rows + 1)[:, None]
        parent[-1] = -1
        return lambda: (ops.dp_advance(state, velocity, times, parent),)
    basis = [state, velocity, teacher, state, velocity, state]
    if case.op == "dp_combine":
        index = torch.ones(len(basis), rows, case.samples, dtype=torch.int64)
        return lambda: (ops.dp_combine(basis, index, index.double()),)
    best_cost = torch.full((rows, case.samples), torch.inf, dtype=torch.float64)
    best_parent = torch.full_like(best_cost, -1, dtype=torch.int64)
    best_parent = best_parent if case.reduce == "none" else best_parent[:, :1]
    if case.op == "dp_argmin_":
        best_order = best_parent.clone()
        index = torch.ones(len(basis), case.steps, case.samples, dtype=torch.int64)
        coefficients = torch.ones(4, len(basis), case.steps, rows, 1, dtype=torch.float64)

        def argmin() -> tuple[()]:
            best_cost.fill_(torch.inf), best_parent.fill_(-1)
            ops.dp_argmin_(
                basis, index, coefficients, [6, 6, 6, 6], 1, teacher, best_cost, best_parent,
                best_order, reduce=case.reduce,
            )  # fmt: skip
            return ()

        return argmin

    def accumulate() -> tuple[()]:
        ops.dp_accumulate_(
            state, velocity[1:], 1, teacher, times, best_cost, best_parent, reduce=case.reduce
        )
        return ()

    return accumulate


def workspace(case: Case) -> int:
    """Bytes beside the outputs of one call."""
    torch.set_num_threads(case.threads)
    prepare(replace(case, steps=2, samples=1, elements=1))()  # starts the threads
    return METERS["cpu"].extra_memory(prepare(case))[0]


def in_a_process_of_its_own(measure: Callable[[Case], int], case: Case) -> int:
    """What an earlier call kept for later would not be seen; EOFError where the process died.

    No pool: its helper threads do not go with a fork.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure(case)))
    process.start()
    sender.close()
    taken: int = receiver.recv()
    process.join()
    return taken


def main() -> int:
    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    print()
    names = [field.name for field in fields(Case)]
    print("|", " | ".join([*names, "MiB", "at most"]), "|")
    print("|:--" * (len(names) + 2) + "|")
    exceeded = 0
    for case in CASES:
        taken = in_a_process_of_its_own(workspace, case)
        exceeded += taken > case.limit
        cells = [getattr(case, name) for name in names]
        cells += [f"{taken / MIB:.1f}", f"{case.limit // MIB}"]
        print("|", *(f"{str(cell).removeprefix('torch.')} |" for cell in cells), flush=True)
    if exceeded:
        print(f"\n{exceeded} of {len(CASES)} take more than they may")
    return min(exceeded, 1)


if __name__ == "__main__":
    sys.exit(main())
