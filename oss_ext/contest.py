"""Every way to choose steps, made on the same calibration samples and judged on the same others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.baselines import BASELINES, Calibration, UnableError
from oss_ext.evaluate import Score, Unable, compare
from oss_ext.events import stage
from oss_ext.models.base import Model, There, to_kept, to_text
from oss_ext.models.evaluation import NonFiniteError
from oss_ext.plan import QUALITIES, check_budgets
from oss_ext.runs import Contender, contender_name
from oss_ext.schedule import Schedule
from oss_ext.search import search
from oss_ext.trajectory import Trajectory

METHODS = (*BASELINES, *QUALITIES)
"""Everything that can be compared: baselines, then the qualities of a search."""

SHOWN = 8
"""Samples whose final states are kept to be looked at."""


@dataclass(frozen=True, eq=False)
class Made:
    """Contenders, and what making them has shown.

    Attributes:
        contenders: by budget, then in the order asked for.
        table: cost of the joint dynamic programme, as ``Run`` has it; None if none was run.
        spread: by number of steps, the rows of every sample's own search, as ``Run`` has them.
    """

    contenders: tuple[Contender, ...]
    table: Tensor | None = None
    spread: dict[int, Tensor] = field(default_factory=dict)


def check_methods(methods: Sequence[str]) -> list[str]:
    """``methods`` without repetitions; ``ValueError`` for one that is unknown or for none."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(
            f"methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}"
        )
    return list(dict.fromkeys(methods))


def make(
    model: Model,
    trajectory: Trajectory,
    steps: int | Sequence[int],
    methods: Sequence[str] = METHODS,
    *,
    solver: str = "euler",
    start: str = "free",
    max_batch: int | None = None,
    progress: bool = False,
    on_method: Callable[[str], object] = lambda name: None,
) -> Made:
    """Schedules of every method for every budget; one that is unable is there without a schedule.

    So is one that finds no path on which the model stays finite.

    Args:
        model: the model the teacher was made with.
        trajectory: the calibration samples.
        steps: a budget or several.
        methods: names of ``METHODS``.
        solver: of the students. What searches, does so with it; other baselines only choose
            times, and are run with it.
        start: ``free`` or ``pinned``, for what searches or learns: baselines with a formula begin
            where it says.
        max_batch: rows per model call.
        progress: show progress bars.
        on_method: called with each contender's name before it is made.

    Raises:
        ValueError: bad arguments.
        NonFiniteError: a sample has no path of its own, which ``spread`` would hold.
    """
    budgets = check_budgets(steps, trajectory.steps)
    names = check_methods(methods)
    calibration = Calibration(model, trajectory, budgets[-1], max_batch, solver, start)
    sharing = [name for name in names if name in BASELINES and BASELINES[name].uses_table]
    if sharing:
        on_method("the paths of every sample")
    begin = time.perf_counter()
    spread = {k: calibration.table.paths(k) for k in budgets} if sharing else {}
    table_seconds = time.perf_counter() - begin
    contenders, table = [], None
    for budget, name in itertools.product(budgets, names):
        contender = Contender(contender_name(name, budget), name, budget, None)
        on_method(contender.name)
        leg, begin = model.leg(), time.perf_counter()
        own: Tensor | None = None
        if leg.there:
            schedule, seconds, own = leg.take(_there)
            contenders.append(replace(contender, schedule=schedule, seconds=seconds))
            table = table if own is None else own
            continue
        try:
            with stage(contender.name):
                if name in BASELINES:
                    schedule = replace(BASELINES[name].make(calibration, budget), solver=solver)
                else:
                    result = search(
                        model, trajectory, budget, quality=name, solver=solver, start=start,
                        max_batch=max_batch, progress=progress,
                    )  # fmt: skip
                    schedule = result.schedule(budget)
                    own = result.mean_cost()
        except (UnableError, NonFiniteError) as reason:
            contenders.append(replace(contender, note=str(reason)))
            continue
        seconds = time.perf_counter() - begin
        if name in sharing:  # its part of the table, which would have been enough for it
            needed, made = map(calibration.table_nfe, (budget, budgets[-1]))
            seconds += table_seconds * needed / made
        table = table if own is None else own
        leg.reached({
            "schedule": to_kept(schedule.to_json()),
            "seconds": cpu.tensor([seconds], dtype=torch.float64),
            "table": [] if own is None else [own],
        })  # fmt: skip
        contenders.append(replace(contender, schedule=schedule, seconds=seconds))
    return Made(tuple(contenders), table, spread)


def _there(kept: There) -> tuple[Schedule, float, Tensor | None]:
    """A contender's schedule, the seconds that it took, and the table, if there was one."""
    (seconds,) = map(float, kept["seconds"])
    return Schedule.from_json(to_text(kept["schedule"])), seconds, next(iter(kept["table"]), None)


def judge(
    model: Model,
    held_out: Trajectory,
    contenders: Sequence[Contender],
    *,
    max_batch: int | None = None,
    progress: bool = False,
) -> list[Score | Unable]:
    """Scores of ``contenders`` on samples that no search has used, in their order.

    One is unable without a schedule, or where the model does not stay finite with it. Of the
    final states only those of the first ``SHOWN`` samples are kept.

    Raises:
        ValueError: as ``compare``.
    """
    scores: list[Score | Unable] = []
    for c in contenders:
        if c.schedule is None:
            scores.append(Unable(c.name, c.steps, c.note))
            continue
        try:
            (score,) = compare(
                model, held_out, {c.name: c.schedule}, amplitude=[c.name] if c.amplitude else [],
                max_batch=max_batch, progress=progress,
            )  # fmt: skip
        except NonFiniteError as reason:
            scores.append(Unable(c.name, c.steps, str(reason)))
            continue
        scores.append(replace(score, images=score.images[:SHOWN].clone()))
    return scores
