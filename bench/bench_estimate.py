"""What `oss plan` says of a search beside what the search takes.

    python bench/bench_estimate.py
    python bench/bench_estimate.py --cases euler multistep --samples 4 --steps 50

Each case is a teacher and a search of a velocity that costs little, estimated in one process and
run in another. Memory is anonymous memory at its peak, above that of a process that imported torch
and this package and made the model. The allocator of glibc keeps freed blocks of less than 32 MiB
for later use, as many as chance has it; here it is told to hand back what is large, unless
``--default-allocator``. Exits with 1 where an estimate of memory is off by more than 10 %, or one
of evaluations is exceeded.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench_search_memory import MIB, make_model

DP: dict[str, Any] = {"quality": "dp"}
CASES: dict[str, dict[str, Any]] = {
    "euler": DP,
    "euler, on disk": DP | {"scratch": True},
    "x0": DP | {"metric": "x0"},
    "x0, on disk": DP | {"metric": "x0", "scratch": True},
    "dpmpp-2m": DP | {"solver": "dpmpp-2m"},
    "dpmpp-3m, on disk": DP | {"solver": "dpmpp-3m", "scratch": True},
    "dpmpp-2s": DP | {"solver": "dpmpp-2s"},
    "x0-candidate": DP | {"metric": "x0-candidate"},
    "beam of 3": DP | {"beam": 3},
    "instance": DP | {"scope": "instance"},
    "instance, dpmpp-2m": DP | {"scope": "instance", "solver": "dpmpp-2m"},
    "instance, dpmpp-2s": DP | {"scope": "instance", "solver": "dpmpp-2s"},
    "groups": DP | {"scope": "instance", "group": 2},
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "balanced, on disk": {"quality": "balanced", "scratch": True},
    "balanced, dpmpp-2m": {"quality": "balanced", "solver": "dpmpp-2m"},
    "best": {"quality": "best"},
}
"""Options of the search; ``scratch`` is the teacher's, ``group`` of a search in groups."""

BUDGETS = [5, 10]
HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


def measure(case: str, options: argparse.Namespace, dry_run: bool) -> None:
    """Print bytes, evaluations per sample and seconds, in this process."""
    import oss_ext as oss
    from oss_ext.machine import Watch

    model = make_model(tuple(options.shape))
    given = {"max_batch": options.max_batch} | CASES[case]
    scratch = options.scratch if given.pop("scratch", False) else None
    teach = functools.partial(oss.teacher, steps=options.steps, scratch=scratch)
    teach = functools.partial(teach, keep_x0=given.get("metric") == "x0")
    teach = functools.partial(teach, max_batch=options.max_batch)
    group = given.pop("group", None)
    watch = Watch()
    watch.start()
    begin = time.perf_counter()
    noise = model.noise(options.samples)
    if dry_run:
        if group is None:
            trajectory = teach(model, noise, dry_run=True)
            found = oss.search(model, trajectory, BUDGETS, dry_run=True, **given)
        else:
            given.pop("scope")
            found = oss.estimate_groups(model, noise, BUDGETS, group=group, teach=teach, **given)
        print(found, file=sys.stderr)
        print(found.memory["host"], found.nfe, found.seconds, found.probed)
        return
    if group is None:
        trajectory = teach(model, noise)
        result = oss.search(model, trajectory, BUDGETS, **given)
    else:
        given.pop("scope")
        result = oss.search_groups(model, noise, BUDGETS, group=group, teach=teach, **given)
    seconds = time.perf_counter() - begin
    anonymous, _ = watch.stop()
    print(anonymous, result.trajectory.nfe + result.nfe, seconds, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs="+", default=(4, 64, 64))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--scratch", help="folder for the files; default: a temporary one")
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print the estimates themselves")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options, options.dry_run)
        return 0
    from oss_ext.machine import configuration

    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    print(f"- {BUDGETS} of {options.steps} steps, {options.samples} samples of "
          f"{tuple(options.shape)}, float32\n")  # fmt: skip
    print("| | memory, MiB: estimate | measured | ratio | evaluations: estimate | spent "
          "| seconds: estimate | measured | probe |\n|:--" + 8 * "|--:" + "|")  # fmt: skip
    met, environment = True, {**os.environ}
    environment |= {} if options.default_allocator else HANDS_BACK
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for case in options.cases:
            command = [sys.executable, __file__, "--measure", case, "--scratch", folder]
            command += ["--shape", *map(str, options.shape), "--samples", str(options.samples)]
            command += ["--steps", str(options.steps)]
            if options.max_batch:
                command += ["--max-batch", str(options.max_batch)]
            (said, nfe, seconds, probed), (taken, spent, real, _) = (
                map(float, subprocess.run(
                    [*command, *more], check=True, text=True, env=environment,
                    stdout=subprocess.PIPE, stderr=None if options.verbose else subprocess.DEVNULL,
                ).stdout.split())
                for more in (["--dry-run"], [])
            )  # fmt: skip
            print(f"| {case} | {said / MIB:.0f} | {taken / MIB:.0f} | {said / taken:.2f} | "
                  f"{nfe:.0f} | {spent:.0f} | {seconds:.1f} | {real:.1f} | {probed:.2f} |",
                  flush=True)  # fmt: skip
            met = met and abs(said / taken - 1) <= 0.1 and spent <= nfe
    print(
        f"\nTarget, memory within 10 % and no more evaluations: {'reached' if met else 'MISSED'}."
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
