"""Times whole searches, end to end, beside the published formulations of the same algorithm.

    python bench/bench_search.py                             # the bundled digits, 200 -> 10 steps
    python bench/bench_search.py --ways oss_ext --samples 16

The model, its evaluations and the schedule that comes out are the same; what differs is how a step
of the dynamic programme finds the best source of every target: by the fused operator, by one source
at a time (the published code), or by one pair at a time (Algorithm 1 as it is printed). Time is
split into the model's, the step's and the rest; medians of ``--rounds`` interleaved rounds. Exits
with 1 where the schedules differ, or step and rest of oss_ext take 5 % of its search or more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

from torch import Tensor

import oss_ext as oss
from alternatives import (
    Step,
    one_pair_at_a_time,
    one_source_at_a_time,
    per_sample,
    searched_by,
)  # fmt: skip
from oss_ext.machine import configuration
from oss_ext.models.base import Request
from oss_ext.models.wrapped import Wrapped

SHARE = 0.05
"""Of a search that the step and the rest may take together."""

WAYS: dict[str, Step | None] = {
    "oss_ext": None,
    "one source at a time": one_source_at_a_time,
    "one pair at a time": one_pair_at_a_time,
}


class Stopwatch:
    """Seconds spent inside of what it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


class Timed(Wrapped):
    """A model whose calls are timed."""

    def __init__(self, model: oss.models.Model, watch: Stopwatch) -> None:
        super().__init__(model)
        self._timed = watch.around(model)

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for request in requests:
            yield self._timed(*request)


def search(
    model: oss.models.Model, options: argparse.Namespace, way: str
) -> tuple[Any, list[float]]:
    """Schedules, and seconds: of the model, of the step, of the rest."""
    in_model, in_step = Stopwatch(), Stopwatch()
    timed = Timed(model, in_model)
    teacher = oss.teacher(model, model.noise(options.samples), steps=options.teacher_steps)
    with ExitStack() as patches:
        step = WAYS[way]
        if step is None:
            own = in_step.around(oss.ops.dp_accumulate_)
            patches.enter_context(mock.patch("oss_ext.ops.dp_accumulate_", own))
        else:
            patches.enter_context(searched_by(in_step.around(per_sample(step))))
        begin = time.perf_counter()
        found = oss.search(timed, teacher, options.steps, scope="instance", quality="dp")
        total = time.perf_counter() - begin
    rows = [schedule.indices for schedule in found.schedules(options.steps)]
    return rows, [in_model.seconds, in_step.seconds, total - in_model.seconds - in_step.seconds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="digits", metavar="NAME|FILE.py:FUNCTION")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    model = oss.models.load(options.model)
    print(*(f"- {name}: {value}" for name, value in configuration().items()), sep="\n")
    size = f"{options.samples} samples of {list(model.shape)}"
    steps = f"{options.teacher_steps} -> {options.steps} steps"
    print(f"- {model.name}: {size}, {steps}, {options.rounds} rounds\n")
    taken: dict[str, list[list[float]]] = {way: [] for way in options.ways}
    schedules = []
    for _ in range(options.rounds):
        for way in options.ways:
            rows, seconds = search(model, options, way)
            schedules.append(rows)
            taken[way].append(seconds)
    print(
        "| | model, s | step, s | rest, s | together | step and rest |\n|:--|--:|--:|--:|--:|--:|"
    )
    shares = {}
    for way, rounds in taken.items():
        parts = [statistics.median(column) for column in zip(*rounds, strict=True)]
        shares[way] = statistics.median(1 - seconds[0] / sum(seconds) for seconds in rounds)
        cells = [f"{part:.2f}" for part in [*parts, sum(parts)]]
        print("|", " | ".join([way, *cells, f"{shares[way]:.1%}"]), "|")
    same = all(rows == schedules[0] for rows in schedules)
    print(f"\nThe schedules are {'the same' if same else 'NOT the same'}.")
    met = shares.get("oss_ext", 0) < SHARE
    print(f"Target, step and rest below {SHARE:.0%}: {'reached' if met else 'MISSED'}.")
    return int(not (same and met))


if __name__ == "__main__":
    sys.exit(main())
