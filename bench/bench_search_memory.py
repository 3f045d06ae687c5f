"""Memory and time of a search as large as a video's, beside the published formulation.

    python bench/bench_search_memory.py                     # Wan 2.1 at 480p: 16 x 21 x 60 x 104
    python bench/bench_search_memory.py --steps 20 --shape 16 4 30 52

A teacher of ``--steps`` steps and a dynamic programme over them, for one sample and a velocity that
costs next to nothing, each in a process of its own: in memory, with trajectories on disk, in 16
bits, and as the published code has it (all velocities and one source's candidates at once). Counted
is anonymous memory at its peak, above that of a process that imported torch and this package, as a
multiple of one array of the trajectory's size in float32; what lies in files the system can drop
and fetch again, and is shown beside it. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MIB, GIB = 2**20, 2**30
WAN = (16, 21, 60, 104)
BUDGET = 10
TARGETS = {"in memory": "2.3 arrays and 200 MiB", "on disk": "1 GiB, twice the time in memory"}


def make_model(shape: tuple[int, ...]) -> Any:
    import oss_ext as oss

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return torch.sin(x).mul_(1 - 0.5 * float(t[0]))

    return oss.models.from_callable(velocity, shape=shape, predicts="velocity")


def ours(
    shape: tuple[int, ...], steps: int, scratch: str | None, storage: torch.dtype | None = None
) -> tuple[int, ...]:
    import oss_ext as oss

    model = make_model(shape)
    teacher = oss.teacher(model, model.noise(1), steps=steps, scratch=scratch, storage=storage)
    found = oss.search(model, teacher, BUDGET, quality="dp", scope="instance")
    (schedule,) = found.schedules(BUDGET)
    assert schedule.indices is not None
    return schedule.indices


def published(shape: tuple[int, ...], steps: int, scratch: str | None) -> tuple[int, ...]:
    from alternatives import one_source_at_a_time, per_sample, searched_by

    with searched_by(per_sample(one_source_at_a_time)):
        return ours(shape, steps, scratch)


WAYS: dict[str, Callable[..., tuple[int, ...]]] = {
    "in memory": ours,
    "on disk": ours,
    "in float16": functools.partial(ours, storage=torch.float16),
    "published": published,
}


def measure(way: str, shape: tuple[int, ...], steps: int, folder: str) -> None:
    """Say that all is imported, wait, and print what ``way`` takes in this process."""
    import oss_ext  # noqa: F401

    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.perf_counter()
    rows = WAYS[way](shape, steps, folder if way == "on disk" else None)
    print(time.perf_counter() - begin, *rows)


def measured(command: Sequence[str]) -> tuple[int, int, list[float]]:
    """Anonymous memory and file pages at their peaks, seen from outside; what was printed."""
    from oss_ext.machine import Watch

    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdout.readline()
        watch = Watch(running.pid)
        watch.start()
        running.stdin.write("\n")
        running.stdin.flush()
        printed = [float(word) for word in running.stdout.read().split()]
        anonymous, files = watch.stop()
    if running.returncode:
        sys.exit(running.returncode)
    return anonymous, files, printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs="+", default=WAN)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--scratch", help="folder for the files; default: a temporary one")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = tuple(options.shape)
    if options.measure:
        measure(options.measure, shape, options.steps, options.scratch)
        return 0
    from oss_ext.machine import configuration

    array = (options.steps + 1) * torch.Size(shape).numel() * 4
    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    print(
        f"- {BUDGET} of {options.steps} steps of {shape}, float32; an array of "
        f"{array / MIB:.0f} MiB\n"
    )
    print("| | anonymous memory, MiB | arrays | in files, MiB | seconds |\n|:--|--:|--:|--:|--:|")
    found: dict[str, tuple[float, float]] = {}
    paths = set()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for way in options.ways:
            command = [sys.executable, __file__, "--measure", way, "--scratch", folder]
            command += ["--steps", str(options.steps), "--shape", *map(str, shape)]
            taken, files, (seconds, *rows) = measured(command)
            found[way] = (taken, seconds)
            if way != "in float16":  # its costs are rounded, and may have others nearest
                paths.add(tuple(rows))
            print(f"| {way} | {taken / MIB:.0f} | {taken / array:.2f} | {files / MIB:.0f} | "
                  f"{seconds:.1f} |", flush=True)  # fmt: skip
    print(f"\nThe schedules are {'the same' if len(paths) == 1 else 'NOT the same'}.")
    met = {}
    if "in memory" in found:
        met["in memory"] = found["in memory"][0] <= 2.3 * array + 200 * MIB
    if {"in memory", "on disk"} <= found.keys():
        slower = found["on disk"][1] / found["in memory"][1]
        met["on disk"] = found["on disk"][0] <= GIB and slower <= 2
    for way, reached in met.items():
        print(f"Target {way}, {TARGETS[way]}: {'reached' if reached else 'MISSED'}.")
    return int(len(paths) > 1 or not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
