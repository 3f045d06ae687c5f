"""The public entry: from a model and its teacher to schedules for every budget."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from oss_ext import arguments, baselines, dp, metrics, solvers
from oss_ext.beam import beam as run_beam
from oss_ext.coarse import coarse_to_fine
from oss_ext.estimate import Estimate, estimate
from oss_ext.machine import peak_memory
from oss_ext.metrics import Metric
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.plan import VALIDATION, Plan, check_budgets, make_plan
from oss_ext.progress import progress_bar
from oss_ext.refine import Refinement, refine
from oss_ext.schedule import Objective, Schedule, aggregate_indices
from oss_ext.teacher import Trajectory

STARTS = {
    "fast": ("uniform",),
    "balanced": ("uniform", "logsnr", "flow-shift"),
    "best": ("uniform", "logsnr", "flow-shift"),
}
"""Closed forms that refinement starts from, beside the paths of dynamic programmes."""

DESCENTS = {"fast": 1, "balanced": 2, "best": 4}
"""How many starts, the best first, are refined as long as the budget lasts."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Schedules for the budgets asked for, and what they cost.

    Attributes:
        trajectory: the teacher searched against; of a search in groups, the first one's.
        samples: calibration samples.
        objective: what was minimised.
        steps: the budgets asked for, ascending.
        plan: what the search was to spend.
        solver: of the student.
        fixed_order: whether schedules are in the solver's usual orders.
        table: costs and parents of the dynamic programme, for all budgets up to the largest; None
            without one.
        refined: by budget, what refinement found.
        nfe: model evaluations of the search per sample, teacher not included.
        block: rows per model call of the dynamic programme.
        seconds: wall time of the search.
        peak_bytes: peak memory: of the GPU's allocator during the search, or on a CPU of the
            process so far.
    """

    trajectory: Trajectory
    samples: int
    objective: Objective
    steps: tuple[int, ...]
    plan: Plan
    solver: str
    fixed_order: bool
    table: dp.Table | None
    nfe: int
    block: int
    seconds: float
    peak_bytes: int
    refined: dict[int, Refinement] = field(default_factory=dict)

    def schedule(self, steps: int) -> Schedule:
        """The schedule of exactly ``steps`` steps for all samples.

        Refined (``method`` says so) for the budgets asked for, unless the quality is ``dp``;
        other budgets are those of the dynamic programme.

        Raises:
            ValueError: a budget that was not searched, or an instance search without
                ``aggregate`` (use ``schedules``).
        """
        if steps in self.refined:
            return self.refined[steps].schedule
        table = self._table(steps)
        if self.objective.scope == "joint":
            rows = table.backtrack(steps)
            return self._build(rows, self.cost(steps), table.orders(rows))
        if self.objective.aggregate is None:
            raise ValueError(
                "an instance search has a schedule per sample: use schedules(steps), or search "
                "with aggregate='mean' or 'median'"
            )
        paths = table.paths(steps).tolist()
        # An averaged path was never run, so it has no cost yet, and the solver's usual orders.
        return self._build(aggregate_indices(paths, self.objective.aggregate), None)

    def schedules(self, steps: int) -> list[Schedule]:
        """One schedule per sample; the same one for all after a joint search."""
        if self.objective.scope == "joint":
            return [self.schedule(steps)] * self.samples
        table = self._table(steps)
        return [
            self._build(tuple(rows), float(table.cost[steps - 1, 0, b]), table.orders(rows, b))
            for b, rows in enumerate(table.paths(steps).tolist())
        ]

    def spread(self, steps: int) -> Tensor:
        """The rows that every sample's own schedule takes, int64 ``[B, steps + 1]``, noise first.

        Raises:
            ValueError: a budget that was not searched, or a joint search, which has one schedule.
        """
        if self.objective.scope == "joint":
            raise ValueError("scope: expected an instance search, got a joint one")
        return self._table(steps).paths(steps)

    def cost(self, steps: int) -> float:
        """Mean squared error of the final state after exactly ``steps`` steps, over the samples.

        Of a refined schedule: over the samples that refinement has seen. Of a search with
        ``fixed_order`` and ``dp``: with every step as high as it can be; the schedule has no cost
        of its own where the usual orders are others.
        """
        if steps in self.refined:
            cost = self.refined[steps].schedule.cost
            assert cost is not None
            return cost
        return float(self._table(steps).cost[steps - 1, 0].double().mean())

    def cheaper(self, steps: int) -> int | None:
        """A smaller budget that is better than ``steps`` by the objective, the best, or None.

        As the dynamic programme has it; None for refined schedules.
        """
        if steps in self.refined:
            return None
        final = self._table(steps).cost[:steps, 0].double()
        if self.objective.reduce == "log_mean":
            final = final.log()
        best = int(final.mean(dim=1).argmin()) + 1
        return None if best == steps else best

    def mean_cost(self) -> Tensor | None:
        """Geometric mean of the table's costs over the samples, ``[M, N + 1]``."""
        return None if self.table is None else self.table.cost.double().log().mean(dim=2).exp()

    def _table(self, steps: int) -> dp.Table:
        """The table, if it holds ``steps``."""
        if self.table is None:
            raise ValueError(
                f"steps: this search has schedules of {', '.join(map(str, self.refined))} steps, "
                f"got {steps!r}"
            )
        arguments.whole_number("steps", steps, most=self.table.steps)
        return self.table

    def _build(
        self, indices: tuple[int, ...], cost: float | None, orders: tuple[int, ...] = ()
    ) -> Schedule:
        if self.fixed_order and orders:
            times = [float(self.trajectory.times[row]) for row in indices]
            usual = solvers.get(self.solver).usual_orders(times)
            # Where these fall step by step to the end, the table, which does not know how many
            # steps are left, had other ones: this path was not run either.
            orders, cost = usual, cost if orders == usual else None
        return self.trajectory.schedule(
            indices,
            solver=self.solver,
            orders=orders,
            objective=self.objective,
            cost=cost,
            samples=self._table(len(indices) - 1).cost.shape[2],
            search_nfe=self.nfe + self.trajectory.nfe,
        )

    def summary(self) -> str:
        """Evaluations, time, memory and the cost of every budget asked for, in a few lines."""
        o, t = self.objective, self.trajectory
        how = f"{self.plan.quality}, {o.scope}, {o.aggregate or o.reduce}, {o.start} start"
        lines = [
            f"{t.model}: {self.samples} samples, teacher {t.steps} steps ({t.solver}), {how}, "
            f"student {self.solver}",
            f"{t.nfe} + {self.nfe} model evaluations per sample (teacher + search), "
            f"in blocks of {self.block}; {t.seconds:.1f} + {self.seconds:.1f} s; "
            f"peak memory {self.peak_bytes / 2**20:.0f} MiB",
        ]
        for steps in self.steps:
            if steps in self.refined:
                lines.append(self.refined[steps].summary())
                continue
            fewer = self.cheaper(steps)
            note = f"  ({fewer} steps cost less: {self.cost(fewer):.3e})" if fewer else ""
            lines.append(f"{steps:3d} steps: mean squared error {self.cost(steps):.3e}{note}")
            if o.scope == "instance" and self.samples > 1:
                apart = self.spread(steps)[:, :-1].double().std(dim=0)
                lines.append(
                    f"          samples' own steps vary by {float(apart.mean()):.1f} teacher rows "
                    f"(standard deviation), the worst by {float(apart.max()):.1f}"
                )
        return "\n".join(lines)


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
        samples=samples, budget=budget, width=beam, solver=solver,
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
    seen = trajectory.first(samples - planned.held)
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
        # What refinement needs at the least: see its budget.
        while k * per_step * (len(starts) + min(descents, len(starts)) + 2) > nfe:
            descents, starts = (descents - 1, starts) if descents > 1 else (1, starts[:-1])
        refined[k] = refine(
            model,
            trajectory,
            starts,
            reduce=objective.reduce,
            start=start,
            budget=nfe,
            descents=descents,
            validation=VALIDATION if planned.held else 0.0,
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
