"""Times a search by one and by several processes, and says what a cost model gives for more.

    python bench/bench_scaling.py                          # the bundled digits, 1 and 2 processes
    python bench/bench_scaling.py --call-seconds 1.5 --shape 16 21 60 104   # another model's size

The model: a step asks for n calls at once, and W processes make them in ceil(n / W) rounds. The
first process moves a state and a velocity for every call that another one makes, one after the
other, and does the rest of the search alone:

    T(W) = sum ceil(n / W) x call + calls of others x message + rest

n comes from the search itself, call, message and rest are measured with it. For other models give
``--call-seconds`` and ``--shape``: the calls are then those of a search of the size given, and
a message is scaled by its bytes. Exits with 1 where the schedules differ.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import oss_ext as oss
from oss_ext.machine import configuration
from oss_ext.models import Model
from oss_ext.models.base import Request
from oss_ext.models.wrapped import Wrapped

PREDICTED = (8, 64, 256, 1024)
PROBES = 20


class Counted(Wrapped):
    """Asked for all calls of a step together: how many, and how long they take."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.at_once, self.calls, self.seconds = 2**31, [0], 0.0

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        self.calls.append(len(requests))
        for x, t, sample in requests:
            begin = time.perf_counter()
            v = self._model(x, t, sample)
            self.seconds += time.perf_counter() - begin
            yield v


def run(model: Model, options: argparse.Namespace) -> tuple[str, float]:
    """The schedule of teacher and search, and their seconds."""
    begin = time.perf_counter()
    noise = model.noise(options.samples)
    batch = options.max_batch
    teacher = oss.teacher(model, noise, steps=options.teacher_steps, max_batch=batch)
    found = oss.search(model, teacher, options.steps, quality=options.quality, max_batch=batch)
    return found.schedule(options.steps).to_json(), time.perf_counter() - begin


def message_seconds(shape: Sequence[int], rows: int) -> float:
    """Of one call made elsewhere, its evaluation aside."""
    nothing = oss.models.from_callable(lambda x, t, sample: x, shape=tuple(shape))
    with oss.sharing(nothing) as shared:
        if shared is None:
            return math.nan
        x, t = shared.noise(rows), torch.ones(rows, dtype=torch.float64)
        request = (x, t, torch.arange(rows))

        def seconds(calls: int) -> float:
            begin = time.perf_counter()
            list(shared.answers([request] * calls))
            return time.perf_counter() - begin

        return statistics.median(seconds(2) - seconds(1) for _ in range(PROBES))


def inside(options: argparse.Namespace) -> None:
    """What every process does; the first prints what it measured."""
    model = oss.models.load(options.model)
    facts: dict[str, Any] = {}
    message = message_seconds(model.shape, options.max_batch) if options.processes > 1 else 0.0
    with oss.sharing(model) as shared:
        if shared is None:
            return
        asked = shared if options.processes > 1 else Counted(shared)
        facts["schedule"], facts["seconds"] = run(asked, options)
        facts["message"] = message
        if isinstance(asked, Counted):
            facts |= {"calls": asked.calls, "in_calls": asked.seconds}
    print(json.dumps(facts))


def measured(processes: int, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", __file__, f"--inside={processes}"]  # fmt: skip
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def predictor(
    calls: Sequence[int], call: float, message: float, rest: float
) -> Callable[[int], float]:
    """T(W) of the text above."""

    def seconds(processes: int) -> float:
        rounds = sum(-(-n // processes) for n in calls)
        return rounds * call + (sum(calls) - rounds) * message + rest

    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="digits", metavar="NAME|FILE.py:FUNCTION")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quality", default="dp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--call-seconds", type=float, help="of a model to predict for")
    parser.add_argument("--shape", type=int, nargs="+", help="of its states")
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        options.processes = options.inside
        inside(options)
        return 0
    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    print(
        f"- {options.model}: {options.samples} samples, {options.max_batch} a call, "
        f"{options.teacher_steps} -> {options.steps} steps, {options.quality}, teacher included; "
        f"medians of {options.rounds} rounds\n"
    )
    rounds = [
        {count: measured(count, sys.argv[1:]) for count in [1, *options.processes]}
        for _ in range(options.rounds)
    ]

    def median(count: int, fact: str) -> float:
        return statistics.median(found[count][fact] for found in rounds)

    calls = rounds[0][1]["calls"]
    in_calls, message = median(1, "in_calls"), median(options.processes[0], "message")
    rest = median(1, "seconds") - in_calls
    call = in_calls / sum(calls)
    seconds = predictor(calls, call, message, rest)
    print(f"{sum(calls)} calls of {1e3 * call:.1f} ms; a message {1e3 * message:.2f} ms; the rest "
          f"{rest:.2f} s.\n")  # fmt: skip
    print(
        "| processes | s | efficiency | model of cost, s | measured / model |\n"
        "|--:|--:|--:|--:|--:|"
    )
    for count in [1, *options.processes]:
        taken, expected = median(count, "seconds"), seconds(count)
        shares = [found[1]["seconds"] / found[count]["seconds"] / count for found in rounds]
        print(f"| {count} | {taken:.2f} | {statistics.median(shares):.0%} | {expected:.2f} | "
              f"{taken / expected:.2f} |")  # fmt: skip
    if options.call_seconds is not None:
        size = math.prod(options.shape or oss.models.load(options.model).shape)
        scale = size / math.prod(oss.models.load(options.model).shape)
        call, message, rest = options.call_seconds, message * scale, rest * scale
        seconds = predictor(calls, call, message, rest)
        print(f"\nA model of {call} s a call and {size} values a state (message {1e3 * message:.1f}"
              f" ms, rest {rest:.1f} s, scaled):")  # fmt: skip
    print("\n| processes | model of cost, s | efficiency |\n|--:|--:|--:|")
    for count in PREDICTED:
        print(f"| {count} | {seconds(count):.1f} | {seconds(1) / seconds(count) / count:.0%} |")
    same = len({found[count]["schedule"] for found in rounds for count in found}) == 1
    print(f"\nThe schedules are {'the same' if same else 'NOT the same'}.")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
