"""The public entry: from a model and its teacher to schedules for every budget."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch

from oss_ext import arguments, baselines, dp, metrics, solvers
from oss_ext.beam import beam as run_beam
from oss_ext.coarse import coarse_to_fine
from oss_ext.estimate import Estimate, estimate
from oss_ext.machine import peak_memory
from oss_ext.metrics import Metric
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator, NonFiniteError
from oss_ext.noise import is_clean
from oss_ext.plan import VALIDATION, check_budgets, make_plan
from oss_ext.progress import progress_bar
from oss_ext.refine import least_runs, refine
from oss_ext.result import SearchResult
from oss_ext.schedule import Objective, Schedule
from oss_ext.trajectory import Trajectory

STARTS = {
    "fast": ("uniform",),
    "balanced": ("uniform", "logsnr", "flow-shift"),
    "best": ("uniform", "logsnr", "flow-shift"),
}
"""Closed forms that refinement starts from, beside the paths of dynamic programmes."""

DESCENTS = {"fast": 1, "balanced": 2, "best": 4}
"""How many starts, the best first, are refined as long as the budget lasts."""


def make_objective(
    scope: str, reduce: str | None, aggregate: str | None, start: str, metric: str = "xt"
) -> Objective:
    """The objective that the options of ``search`` describe; ``ValueError`` on a contradiction."""
    reduce = reduce or ("log_mean" if scope == "joint" else "none")
    return Objective(scope, reduce, start, aggregate, metric)


@overload
def search(
    model: Model,
    trajectory: Trajectory,
    steps: int | Sequence[int],
    *,
    quality: str | None = None,
    budget: int | None = None,
    scope: str = "joint",
    reduce: str | None = None,
    aggregate: str | None = None,
    start: str = "free",
    solver: str = "euler",
    fixed_order: bool = False,
    metric: str | Metric = "xt",
    beam: int = 1,
    off_grid: bool = False,
    max_batch: int | None = None,
    velocity_bytes: int = dp.VELOCITY_BYTES,
    progress: bool = False,
) -> SearchResult: ...
@overload
def search(
    model: Model,
    trajectory: Trajectory,
    steps: int | Sequence[int],
    *,
    dry_run: Literal[True],
    **options: Any,
) -> Estimate: ...
@arguments.takes(model=Model, trajectory=Trajectory)  # type: ignore[misc]  # see `dry_run`
def search(
    model: Model,
    trajectory: Trajectory,
    steps: int | Sequence[int],
    *,
    quality: str | None = None,
    budget: int | None = None,
    scope: str = "joint",
    reduce: str | None = None,
    aggregate: str | None = None,
    start: str = "free",
    solver: str = "euler",
    fixed_order: bool = False,
    metric: str | Metric = "xt",
    beam: int = 1,
    off_grid: bool = False,
    max_batch: int | None = None,
    velocity_bytes: int = dp.VELOCITY_BYTES,
    progress: bool = False,
    dry_run: bool = False,
) -> SearchResult | Estimate:
    """Find the steps that bring the student nearest to the teacher.

    Args:
        model: the model the teacher was made with.
        trajectory: ``oss_ext.teacher(...)``.
        steps: a budget or several, each 1 to N.
        quality: ``fast``, ``balanced`` (default) or ``best``, by what it may spend, or ``dp``:
            Algorithm 1 alone (the default of an instance search), one run of which serves all
            budgets up to the largest. ``oss_ext.plan`` says beforehand what each spends.
        budget: model evaluations per sample at most, the teacher's not counted.
        scope: ``joint``, one schedule for all samples, or ``instance``, one each.
        reduce: joint only: ``log_mean`` (default; mean PSNR) or ``mean`` (PSNR of the mean).
        aggregate: instance only: also one schedule from all, by ``mean`` or ``median``.
        start: ``free``, the first step may start below the last teacher time, or ``pinned``.
        solver: of the student, a name in ``oss_ext.solvers.SOLVERS``. A multistep one may take
            every step in its order or any lower one (paper Algorithm 2); the schedule says which.
        fixed_order: schedules in the solver's usual orders, for hosts that cannot vary them.
        metric: what dynamic programmes compare: a name (``xt``, ``x0``, ``x0-candidate``,
            ``perceptual:MODULE``) or one of ``oss_ext.metrics``; refinement lowers the error of
            the final state whatever it is. Where ``fast`` or ``balanced`` has no room for one,
            it takes ``xt`` only.
        beam: states per row that the dynamic programme of ``dp`` and ``best`` keeps; more cost as
            many times the evaluations. Euler and ``xt`` only.
        off_grid: knots may stand between the teacher's times, for hosts that take any time.
        max_batch: rows per model call; None: the number of samples.
        velocity_bytes: memory for the velocities of a step; more are streamed. Euler and ``xt``
            only: what else there is keeps them all.
        progress: show a progress bar.
        dry_run: search nothing; return what it will take, an ``Estimate``, from a few calls of the
            model. The trajectory may then be the outline that ``teacher(dry_run=True)`` gives.

    Raises:
        ValueError: bad arguments; a model other than the teacher's.
        NonFiniteError: no finite path is left; the message names time and sample.
    """
    budgets = check_budgets(steps, trajectory.steps)
    compared = metrics.get(metric)
    objective = make_objective(scope, reduce, aggregate, start, compared.name)
    samples = trajectory.samples
    planned = make_plan(
        quality, scope, trajectory.steps, budgets, start, off_grid=off_grid, metric=compared,
        samples=samples, budget=budget, width=beam, solver=solver, clean=is_clean(trajectory.times),
    )  # fmt: skip
    trajectory.check_model(model, outline=dry_run)
    if dry_run:
        return estimate(
            model, trajectory, planned, budgets, reduce=objective.reduce, start=start,
            solver=solver, metric=compared, width=beam, max_batch=max_batch,
            velocity_bytes=velocity_bytes,
        )  # fmt: skip
    begin = time.perf_counter()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    seen = trajectory.first(samples - planned.held_out)
    table, coarse_table = None, None
    with progress_bar("search", (planned.table + planned.coarse) * samples, progress) as bar:
        evaluator = Evaluator(model, seen.samples, max_batch, bar.update)
        options: dict[str, Any] = {"reduce": objective.reduce, "start": start}
        if planned.table and beam > 1:
            table = run_beam(evaluator, seen, budgets[-1], width=beam, **options).best()
        options |= {"solver": solver, "fixed_order": fixed_order, "metric": compared}
        options |= {"velocity_bytes": velocity_bytes}
        if planned.table and beam == 1:
            table = dp.run(evaluator, seen, budgets[-1], **options)
        if planned.coarse:
            # Refinement has other starts, where no path of few rows stays finite.
            with contextlib.suppress(NonFiniteError):
                coarse_table = coarse_to_fine(
                    evaluator, seen.first(planned.coarse_samples), budgets, stride=planned.stride,
                    band=planned.band, **options,
                )  # fmt: skip
    result = SearchResult(
        trajectory=trajectory,
        samples=samples,
        objective=objective,
        steps=tuple(budgets),
        plan=planned,
        solver=solver,
        fixed_order=fixed_order,
        table=table,
        nfe=math.ceil(evaluator.nfe / samples),
        block=evaluator.block,
        seconds=time.perf_counter() - begin,
        peak_bytes=peak_memory(model.device),
    )
    if not planned.refine:
        return result
    refined, per_step = {}, solvers.get(solver).evaluations
    for k, nfe in planned.refine.items():
        starts = _starts(model, result, coarse_table, k)
        descents = DESCENTS[planned.quality]
        while k * per_step * least_runs(len(starts), descents) > nfe:
            descents, starts = (descents - 1, starts) if descents > 1 else (1, starts[:-1])
        refined[k] = refine(
            model,
            trajectory,
            starts,
            reduce=objective.reduce,
            start=start,
            budget=nfe,
            descents=descents,
            validation=VALIDATION if planned.held_out else 0.0,
            off_grid=off_grid,
            max_batch=max_batch,
            progress=progress,
        )
    return replace(
        result,
        refined=refined,
        nfe=result.nfe + math.ceil(sum(found.nfe for found in refined.values())),
        seconds=time.perf_counter() - begin,
        peak_bytes=peak_memory(model.device),
    )


def _starts(
    model: Model, result: SearchResult, coarse_table: dp.Table | None, steps: int
) -> list[Schedule]:
    """Where the refinement of a budget begins."""
    trajectory, pinned = result.trajectory, result.objective.start == "pinned"
    starts = []
    for table in (result.table, coarse_table):
        if table is not None:
            rows = table.backtrack(steps)
            orders = () if result.fixed_order else table.orders(rows)
            starts.append(trajectory.schedule(rows, orders=orders))
    calibration = baselines.Calibration(model, trajectory, steps)
    for name in STARTS[result.plan.quality]:
        try:
            made = baselines.BASELINES[name].make(calibration, steps)
        except baselines.UnableError:
            continue
        nearest = trajectory.nearest_rows(made.times)
        if not pinned or nearest[0] == trajectory.steps:
            starts.append(trajectory.schedule(nearest, method=name))
    # What was spent before refinement, to be counted in what comes of it.
    spent = trajectory.nfe + result.nfe
    return [replace(s, solver=result.solver, search_nfe=spent) for s in starts]
