"""What a search will take: evaluations, memory and time, before anything long runs.

Evaluations are those of its plan. Memory is what the stages themselves say that they hold, each
beside what allocates it. Time is that of a few calls of the model, and of a dynamic programme over
a part of every state with a model that costs nothing.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from oss_ext import beam, coarse, dp, refine
from oss_ext.files import existing_folder
from oss_ext.machine import free_memory, taken
from oss_ext.metrics import XT, CandidateDataMetric, DataMetric, EvaluatedMetric, Metric
from oss_ext.models.base import Model, Request
from oss_ext.models.evaluation import Evaluator
from oss_ext.models.wrapped import Wrapped
from oss_ext.plan import Plan
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory
from oss_ext.words import size, span

T = TypeVar("T")

CALLS = 4
"""Of the model in a probe; the first is left out."""

PART_BYTES = 2**24
"""Of the teacher that dynamic programmes are timed with: as many elements of every state."""

PART_STEPS = 3
"""Of these dynamic programmes, at most."""


@dataclass(frozen=True)
class Stage:
    """A stage of a search.

    Attributes:
        name: what it is.
        nfe: model evaluations per calibration sample, at most.
        held: in memory and in files at its peak, the teacher included.
        seconds: that it takes, about.
    """

    name: str
    nfe: int
    held: tuple[Held, ...]
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes that are not in files."""
        return sum(held.bytes for held in self.held if held.folder is None)


@dataclass(frozen=True)
class Estimate:
    """What a search will take.

    Attributes:
        samples: of the calibration.
        stages: of the search; the teacher too, unless there is one already.
        device: whose memory its arrays are in.
        table: bytes of costs and parents, which are in the host's memory.
        kept: in files as long as the run lasts, whatever the stage.
        block: rows per model call.
        call: seconds of one.
        probed: seconds that it took to find out.
    """

    samples: int
    stages: tuple[Stage, ...]
    device: torch.device
    table: int
    block: int
    call: float
    probed: float
    kept: tuple[Held, ...] = ()

    @property
    def nfe(self) -> int:
        """Model evaluations per calibration sample, at most."""
        return sum(stage.nfe for stage in self.stages)

    @property
    def seconds(self) -> float:
        """That it takes, about."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak(self) -> Stage:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.memory)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes at the peak by place: ``host``, and devices that have their own memory.

        They come on top of what the process holds with the model loaded.
        """
        in_memory = [[held for held in stage.held if held.folder is None] for stage in self.stages]
        found = _most(in_memory, lambda held: _place(held.device or self.device))
        return found | {"host": found.get("host", 0) + self.table}

    @property
    def files(self) -> dict[str, int]:
        """Bytes on disk at the peak, by folder."""
        in_files = [
            [held for held in (*stage.held, *self.kept) if held.folder is not None]
            for stage in self.stages
        ]
        return _most(in_files, lambda held: os.fspath(held.folder or ""))

    def with_teachers(self, times: int) -> Estimate:
        """The same with the teacher made so many times."""
        teacher, *rest = self.stages
        more = replace(teacher, nfe=times * teacher.nfe, seconds=times * teacher.seconds)
        return replace(self, stages=(more, *rest))

    def shortages(self) -> list[str]:
        """What does not fit into what is free now, a line each."""
        needs = [(place, needed, self._free(place)) for place, needed in self.memory.items()]
        needs += [(folder, needed, _free_disk(folder)) for folder, needed in self.files.items()]
        return [
            f"does not fit: {place} needs {size(needed)}, {size(free)} free"
            for place, needed, free in needs
            if free is not None and needed > free
        ]

    def __str__(self) -> str:
        most = "at most " if any("refinement" in stage.name for stage in self.stages) else ""
        parts = ", ".join(f"{stage.nfe} {stage.name}" for stage in self.stages)
        lines = [
            f"evaluations: {most}{self.nfe} per sample ({parts}), {self.nfe * self.samples} in all"
        ]
        for place, needed in self.memory.items():
            free = self._free(place)
            lines.append(f"memory, {place}: {size(needed)}" + _of_free(free))
        lines.append(f"  at its peak, the {self.peak.name}: {_parts(self.peak.held)}")
        for folder, needed in self.files.items():
            lines.append(f"disk, {folder}: {size(needed)}" + _of_free(_free_disk(folder)))
        times = ", ".join(f"{span(stage.seconds)} {stage.name}" for stage in self.stages)
        lines += [
            f"time: about {span(self.seconds)} ({times})",
            f"  from a probe of {span(self.probed)}: a call of {self.block} rows takes "
            f"{span(self.call)}",
        ]
        return "\n".join([*lines, *self.shortages()])

    def _free(self, place: str) -> int | None:
        return free_memory(torch.device("cpu" if place == "host" else place))


def estimate(
    model: Model,
    trajectory: Trajectory,
    planned: Plan,
    budgets: Sequence[int],
    *,
    reduce: str,
    start: str = "free",
    solver: str = "euler",
    metric: Metric = XT,
    width: int = 1,
    max_batch: int | None = None,
    velocity_bytes: int = dp.VELOCITY_BYTES,
) -> Estimate:
    """What the search that ``planned`` describes will take.

    What a metric's own network takes, what refinement does beside evaluations, and what is sent to
    other processes, is not in the time. What the system's allocator keeps of freed memory is not in
    the memory: glibc's keeps blocks of less than 32 MiB, unless it is told otherwise
    (MALLOC_MMAP_THRESHOLD_=65536).

    Args:
        model: the model; it is called a few times.
        trajectory: the teacher, or the outline of one that is still to be made.
        planned: ``plan(...)``.
        budgets: numbers of steps asked for.
        reduce, start, solver, metric, width, max_batch, velocity_bytes: as in ``search``.

    Raises:
        ValueError: a model that returned something else than velocities.
        NonFiniteError: the model returned NaN or inf; the message names time and sample.
    """
    begin, samples = time.perf_counter(), trajectory.samples
    seen, most = trajectory.first(samples - planned.held_out), max(budgets)
    whole = Evaluator(model, samples, max_batch)
    probe = _probe(model, trajectory, lambda it: Evaluator(it, samples, max_batch))
    call, there = probe.seconds, trajectory.held()
    stages: list[Stage] = []

    def add(
        name: str,
        nfe: int,
        held: Sequence[Held],
        each: float,
        rest: float,
        evaluator: Evaluator,
        asked: int,
    ) -> None:
        """``each`` evaluation takes so long and ``rest`` besides, ``asked`` for together."""
        (calling,) = evaluator.held(trajectory.states.dtype)
        calling = replace(calling, bytes=max(calling.bytes, probe.within))
        calls = math.ceil(asked / evaluator.block)
        shared = math.ceil(calls / model.at_once) / calls
        seconds = nfe * samples * (each * shared + rest)
        stages.append(Stage(name, nfe, (*there, *held, calling), seconds))

    if trajectory.outline:
        # The state, its velocity, the state that follows and what a solver remembers.
        moving = [Held("step", 4 * trajectory.noise.nbytes)]
        each = probe.seconds / probe.rows
        add("teacher", trajectory.nfe, moving, each, 0.0, whole, samples)
    table = Evaluator(model, seen.samples, max_batch)
    options: dict[str, Any] = {"reduce": reduce, "solver": solver, "metric": metric}
    options |= {"velocity_bytes": velocity_bytes}
    if planned.table or planned.coarse:
        each = probe.model / min(probe.rows, seen.samples)
        rest = _op_seconds(model, seen, most, max_batch, width, start, options)
    if planned.table:
        held = (
            dp.held(table, seen, most, **options)
            if width == 1
            else beam.held(seen, most, width=width, reduce=reduce, start=start)
        )
        asked = trajectory.steps * seen.samples
        add("dynamic programme", planned.table, held, each, rest, table, asked)
    if planned.coarse:
        part = seen.first(planned.coarse_samples)
        held = coarse.held(table, part, budgets, stride=planned.stride, **options)
        asked = math.ceil(trajectory.steps / planned.stride) * part.samples
        add("from coarse to fine", planned.coarse, held, each, rest, table, asked)
    if planned.refine:
        runs = functools.partial(
            refine.evaluator_of, samples=samples, seen=seen.samples, max_batch=max_batch
        )
        probe = _probe(model, trajectory, runs)
        for steps, nfe in planned.refine.items():
            held = refine.held(runs(model), trajectory, steps, seen.samples, solver, nfe)
            each = probe.seconds / min(probe.rows, seen.samples)
            name = f"refinement of {steps} steps"
            add(name, nfe, held, each, 0.0, runs(model), seen.samples)
    return Estimate(
        samples=samples,
        stages=tuple(stages),
        device=trajectory.states.device,
        table=most * (trajectory.steps + 1) * samples * 3 * 8 * bool(planned.table),
        block=whole.block,
        call=call,
        probed=time.perf_counter() - begin,
    )


@dataclass(frozen=True)
class _Probe:
    """Model calls as an evaluator makes them.

    Attributes:
        rows: that a call serves.
        seconds: of one, all that the evaluator does included.
        model: of these, the model's own.
        within: bytes that a call takes at its peak.
    """

    rows: int
    seconds: float
    model: float
    within: int


class _Timed(Wrapped):
    """A model that notes how long it takes."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.seconds: list[float] = []

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        for request in requests:
            answer, seconds = _timed(request[0].device, functools.partial(self._model, *request))
            self.seconds.append(seconds)
            yield answer


def _timed(device: torch.device, do: Callable[[], T]) -> tuple[T, float]:
    """What ``do`` gives, and the seconds until it is there."""
    begin = time.perf_counter()
    result = do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def _probe(
    model: Model, trajectory: Trajectory, evaluator_of: Callable[[Model], Evaluator]
) -> _Probe:
    """Call the model a few times as the evaluator of it does."""
    timed, device = _Timed(model), model.device
    evaluator = evaluator_of(timed)
    rows = min(evaluator.block, trajectory.samples)
    times = trajectory.times[1:].flip(0)[:CALLS].tolist()  # the clean end is never asked

    def call() -> list[float]:
        noise = trajectory.noise[:rows]
        return [_timed(device, functools.partial(evaluator.at, noise, t))[1] for t in times]

    seconds, within = taken(device, call)
    whole, own = (statistics.median(s[1:] or s) for s in (seconds, timed.seconds))
    return _Probe(rows, whole, own, within)


class _Free(Wrapped):
    """A model of ``model``'s calls that costs nothing."""

    def answers(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        return iter([x for x, _, _ in requests])


def _op_seconds(
    model: Model,
    trajectory: Trajectory,
    steps: int,
    max_batch: int | None,
    width: int,
    start: str,
    options: dict[str, Any],
) -> float:
    """Of a dynamic programme per model evaluation, beside this."""
    flat = trajectory.states.flatten(2)
    elements = max(1, PART_BYTES // flat[..., :1].nbytes)
    part = flat[..., :elements].contiguous()
    small = replace(trajectory, states=part, x0=part, scratch=None, outline=False, ends=None)
    metric = options["metric"]
    alike: Metric = DataMetric() if metric.needs_x0 else XT
    alike = CandidateDataMetric() if isinstance(metric, EvaluatedMetric) else alike
    options = options | {"metric": alike, "start": start}
    steps = min(steps, PART_STEPS)
    for _ in range(2):  # once to warm up
        evaluator = Evaluator(_Free(model), trajectory.samples, max_batch)
        run: Callable[[], object] = functools.partial(dp.run, evaluator, small, steps, **options)
        if width > 1:
            how = {"width": width, "reduce": options["reduce"], "start": start}
            run = functools.partial(beam.beam, evaluator, small, steps, **how)
        _, seconds = _timed(part.device, run)
    return seconds / evaluator.nfe * flat.shape[2] / part.shape[2]


def _place(device: torch.device) -> str:
    if str(device) == "cuda":  # of a model that says no more
        return f"cuda:{torch.cuda.current_device()}"
    return "host" if device.type == "cpu" else str(device)


def _most(stages: Sequence[Sequence[Held]], place_of: Callable[[Held], str]) -> dict[str, int]:
    """Bytes by place, of the stage that takes the most of it."""
    found: dict[str, int] = {}
    for stage in stages:
        own: dict[str, int] = {}
        for held in stage:
            own[place_of(held)] = own.get(place_of(held), 0) + held.bytes
        found = {place: max(found.get(place, 0), own.get(place, 0)) for place in found | own}
    return found


def _free_disk(folder: str) -> int:
    return shutil.disk_usage(existing_folder(folder)).free


def _of_free(free: int | None) -> str:
    return "" if free is None else f" of {size(free)} free"


def _parts(held: Sequence[Held]) -> str:
    there = sorted((h for h in held if h.folder is None and h.bytes), key=lambda h: -h.bytes)
    return ", ".join(f"{h.what} {size(h.bytes)}" for h in there)
