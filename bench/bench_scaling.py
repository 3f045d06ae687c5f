"""Times a search by one and by several processes, and says what a cost model gives for more.

    python bench/bench_scaling.py                          # the bundled digits, 1 and 2 processes
    python bench/bench_scaling.py --shape 4 128 128 --call-seconds 0.2 --processes 2 4 8

The model: a step asks for n calls at once, and W processes make them in ceil(n / W) rounds. The
first process moves a state and a velocity for every call that another one makes, one after the
other, and does the rest of the search alone:

    T(W) = sum ceil(n / W) x call + calls of others x message + rest

n, call and rest are measured with one process, message between two that do nothing else. On cores
that share a processor, calls at the same time are slower than one alone: so the table says what a
call takes in each run, and what the model of cost gives with that. A network on a GPU leaves the
cores alone: ``--shape`` and ``--call-seconds`` put one in its place that waits as long, which can
be timed with more processes than there are cores. Exits with 1 where the schedules differ.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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


class Timed(Wrapped):
    """Notes what its calls take."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.seconds: list[float] = []

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for x, t, sample in requests:
            begin = time.perf_counter()
            v = self._model(x, t, sample)
            self.seconds.append(time.perf_counter() - begin)
            yield v


class Counted(Wrapped):
    """Asked for all calls of a step together: how many they are."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.at_once, self.calls = 2**31, [0]

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        self.calls.append(len(requests))
        return super().answers(requests)


def load(options: argparse.Namespace) -> Model:
    if options.shape is None:
        return oss.models.load(options.model)

    def network(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        time.sleep(options.call_seconds)
        return x * (1 - 0.5 * float(t[0]))

    return oss.models.from_callable(network, shape=options.shape, name="waiting")


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
    model = Timed(load(options))
    several = options.inside > 1
    message = message_seconds(model.shape, options.max_batch) if several else 0.0
    with oss.sharing(model) as shared:
        if shared is None:
            return
        asked = shared if several else Counted(shared)
        model.seconds.clear()
        schedule, seconds = run(asked, options)
    facts = {"schedule": schedule, "seconds": seconds, "message": message,
             "call": statistics.mean(model.seconds)}  # fmt: skip
    if isinstance(asked, Counted):
        facts["calls"] = asked.calls
    print(json.dumps(facts))


def measured(processes: int, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", __file__, f"--inside={processes}"]  # fmt: skip
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def seconds(
    processes: int, calls: Sequence[int], call: float, message: float, rest: float
) -> float:
    """T(W) of the text above."""
    rounds = sum(-(-n // processes) for n in calls)
    return rounds * call + (sum(calls) - rounds) * message + rest


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
    parser.add_argument("--shape", type=int, nargs="+", help="of a state, without a model")
    parser.add_argument("--call-seconds", type=float, default=0.1, help="with --shape")
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options)
        return 0
    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    name = options.model
    if options.shape is not None:
        name = f"a stand-in of {options.call_seconds} s a call, states of {options.shape}"
    print(
        f"- {name}: {options.samples} samples, {options.max_batch} a call, "
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
    call, message = median(1, "call"), median(options.processes[0], "message")
    rest = median(1, "seconds") - sum(calls) * call
    print(f"{sum(calls)} calls of {1e3 * call:.1f} ms; a message {1e3 * message:.2f} ms; the rest "
          f"{rest:.2f} s.\n")  # fmt: skip
    print(
        "| processes | s | efficiency | a call, ms | model of cost, s | measured / model | "
        "with this call |\n|--:|--:|--:|--:|--:|--:|--:|"
    )
    for count in [1, *options.processes]:
        taken, own = median(count, "seconds"), median(count, "call")
        plain, loaded = (seconds(count, calls, each, message, rest) for each in (call, own))
        shares = [found[1]["seconds"] / found[count]["seconds"] / count for found in rounds]
        print(f"| {count} | {taken:.2f} | {statistics.median(shares):.0%} | {1e3 * own:.1f} | "
              f"{plain:.2f} | {taken / plain:.2f} | {taken / loaded:.2f} |")  # fmt: skip
    print("\n| processes | model of cost, s | efficiency |\n|--:|--:|--:|")
    alone = seconds(1, calls, call, message, rest)
    for count in PREDICTED:
        taken = seconds(count, calls, call, message, rest)
        print(f"| {count} | {taken:.1f} | {alone / taken / count:.0%} |")
    same = len({found[count]["schedule"] for found in rounds for count in found}) == 1
    print(f"\nThe schedules are {'the same' if same else 'NOT the same'}.")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
