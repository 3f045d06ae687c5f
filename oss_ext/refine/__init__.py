"""Refinement: descent on the student's true final error over the knots of its schedule.

The dynamic programme assumes that the nearer state always stays nearer (paper Assumption 1); what
counts is Eq. 8, the distance of the final state alone. From one or several starts, two kinds of
moves lower that error: Gauss-Newton steps, which move all knots at once by secants of the final
residual, and coordinate moves by 1, 2, 4, ... teacher rows. Each is used as long as it pays. A move
of knot k changes nothing before it, so runs begin at the last state that is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, solvers
from oss_ext.events import tell
from oss_ext.models.base import Kept, Model, There, to_kept, to_text
from oss_ext.models.evaluation import Evaluator
from oss_ext.progress import progress_bar
from oss_ext.refine.base import (
    GROUPS,
    KEEP_BYTES,
    LEAST_SEEN,
    Orders,
    Race,
    Rows,
    Runner,
    is_worse,
    mean_error,
    most_kept,
)
from oss_ext.refine.exhaustive import exhaustive
from oss_ext.refine.newton import gauss_newton
from oss_ext.refine.sweep import sweep
from oss_ext.schedule import Objective, Schedule
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory

__all__ = ["KEEP_BYTES", "Refinement", "Runner", "evaluator_of", "exhaustive", "held", "refine"]

FINENESS = 8
"""Places per teacher step where knots off the grid may stand."""


@dataclass(frozen=True)
class Refinement:
    """What refinement found, and what it started from.

    Attributes:
        schedule: the best schedule; its ``cost`` is the arithmetic mean of the final errors over
            the calibration samples.
        start: the best of the starts.
        error, start_error: mean final error on the calibration samples, as ``reduce`` has it.
        validation, start_validation: the same on samples that the descent did not see; None
            without a split.
        trials: schedules that were run, in full or in part.
        nfe: model evaluations per sample of the trajectory.
    """

    schedule: Schedule
    start: Schedule
    error: float
    start_error: float
    validation: float | None
    start_validation: float | None
    trials: int
    nfe: float

    def kept(self) -> Kept:
        """What ``there`` takes."""
        own, checks = [self.error, self.start_error, self.trials, self.nfe], []
        if self.validation is not None and self.start_validation is not None:
            checks = [self.validation, self.start_validation]
        return {
            "schedule": to_kept(self.schedule.to_json()),
            "start": to_kept(self.start.to_json()),
            "figures": torch.tensor(own, dtype=torch.float64),
            "checks": torch.tensor(checks, dtype=torch.float64),
        }

    @classmethod
    def there(cls, kept: There) -> Refinement:
        """That which ``kept`` was called of."""
        schedule, start = (Schedule.from_json(to_text(kept[at])) for at in ("schedule", "start"))
        error, start_error, trials, nfe = map(float, kept["figures"])
        validation, start_validation = [*map(float, kept["checks"])] or (None, None)
        return cls(
            schedule, start, error, start_error, validation, start_validation, int(trials), nfe
        )

    def summary(self) -> str:
        """Errors before and after, and what they cost, in two lines."""
        gain = 10 * math.log10(self.start_error / self.error) if self.error > 0 else math.inf
        lines = [
            f"{self.schedule.steps} steps refined: error {self.start_error:.3e} -> "
            f"{self.error:.3e} ({gain:.2f} dB) in {self.trials} trials, {self.nfe:.0f} evaluations "
            "per sample"
        ]
        if self.validation is not None and self.start_validation is not None:
            lines.append(f"on unseen samples {self.start_validation:.3e} -> {self.validation:.3e}")
        return "\n".join(lines)


def descend(race: Race, rows: Rows, score: Tensor, scale: int) -> tuple[Rows, Tensor]:
    """The best path found from ``rows``, whose score is known, and its score.

    Gauss-Newton steps win where the end depends smoothly on the knots, coordinate moves where it
    does not; which it is shows as the gain per evaluation.

    Args:
        scale: of the first coordinate moves, in rows.
    """
    newton_pays = sweep_pays = math.inf
    stuck: Rows | None = None  # where Gauss-Newton steps have found nothing
    while race.may_go_on() and (scale >= 1 or stuck != rows):
        before, spent = float(score.mean()), race.nfe
        newton = stuck != rows and (scale < 1 or newton_pays >= sweep_pays)
        moved, score = (
            gauss_newton(race, rows, score) if newton else sweep(race, rows, score, scale)
        )
        pays = (before - float(score.mean())) / max(race.nfe - spent, 1)
        # What was not used is not forgotten: it is tried again when the other pays less and less.
        if newton:
            newton_pays, sweep_pays = pays, max(sweep_pays, _nearer(sweep_pays, pays))
        else:
            sweep_pays, newton_pays = pays, max(newton_pays, _nearer(newton_pays, pays))
        if moved == rows and newton:
            stuck = rows
        elif moved == rows:
            scale //= 2
        rows = moved
        error, moves = mean_error(score, race.reduce), "gauss-newton" if newton else "sweep"
        tell("round", moves=moves, error=error, trials=race.trials)
    return rows, score


@dataclass(frozen=True, eq=False)
class _Found:
    """A path and its score on the samples descended on."""

    rows: Rows
    orders: Orders
    score: Tensor

    def mean(self) -> float:
        return float(self.score.mean())


def _nearer(value: float, other: float) -> float:
    return value if math.isinf(value) else value + (other - value) / 4


def _first_scale(rows: Rows) -> int:
    """The largest power of two that is at most half the mean gap, at least 1."""
    return 1 << int(math.log2(max(1, rows[0] // (2 * len(rows)))))


def _check_starts(
    starts: Sequence[Schedule], trajectory: Trajectory
) -> dict[tuple[Rows, Orders], Schedule]:
    """The starts by rows and orders; ``ValueError`` unless of a kind, on the one grid."""
    if not starts:
        raise ValueError("starts: expected one or more schedules, got none")
    lengths = {s.steps for s in starts}
    if len(lengths) > 1:
        raise ValueError(f"starts: expected schedules of as many steps, got {sorted(lengths)}")
    grid = tuple(trajectory.times.tolist())
    by_path: dict[tuple[Rows, Orders], Schedule] = {}
    for s in starts:
        if s.indices is None or s.teacher_times != grid or s.indices[-1] != 0:
            raise ValueError("starts: expected schedules on the teacher's grid, to its clean end")
        solvers.get(s.solver).check_orders(s.orders, s.times)
        by_path.setdefault((s.indices, s.orders), s)
    if len({s.solver for s in starts}) > 1:
        raise ValueError("starts: expected schedules of one solver")
    return by_path


def evaluator_of(
    model: Model,
    samples: int,
    seen: int,
    max_batch: int | None,
    on_progress: Callable[[int], object] = lambda rows: None,
) -> Evaluator:
    """As ``refine`` has it, for ``samples`` of which it descends on the first ``seen``."""
    group = math.ceil(seen / GROUPS) if max_batch is None else max_batch
    return Evaluator(model, samples, group, on_progress)


def held(
    evaluator: Evaluator, trajectory: Trajectory, steps: int, seen: int, solver: str, budget: int
) -> list[Held]:
    """What ``refine`` holds at its peak beside the teacher.

    Args:
        evaluator: ``evaluator_of(...)``.
        trajectory: the teacher.
        steps: of the schedules.
        seen: samples descended on.
        solver: of the student.
        budget: model evaluations per sample.
    """
    used, group = solvers.get(solver), evaluator.block
    # A trial moves one knot, the first as often as the last, and leaves a state after it, one at
    # every knot below and the end. The end has no velocity, nor are evaluations spent on it.
    share = (steps + 1) / (steps + 3)
    made = budget * trajectory.samples / used.evaluations / group
    states = min(most_kept(group, trajectory, used, steps), made / share)
    tensors = 1 + share + (used.order > 1)
    row = trajectory.noise[0].nbytes
    front = min(seen, -(-LEAST_SEEN // group) * group)
    # The residuals that they are between, and secants with their correction beside them.
    secants = (3 + 2 * steps) * front * row
    paths = int(states * tensors * min(group, seen) * row)
    return [Held("paths", paths), Held("secants", secants)]


@arguments.takes(model=Model, trajectory=Trajectory)
def refine(
    model: Model,
    trajectory: Trajectory,
    starts: Schedule | Sequence[Schedule],
    *,
    reduce: str = "log_mean",
    start: str = "free",
    budget: int | None = None,
    descents: int = 2,
    validation: float = 0.25,
    off_grid: bool = False,
    max_batch: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    progress: bool = False,
) -> Refinement:
    """Descend on the final error (paper Eq. 8) from the best of ``starts``.

    Args:
        model: the model the teacher was made with.
        trajectory: ``oss_ext.teacher(...)``, the calibration samples.
        starts: schedules on the teacher's grid, all of as many steps; searched, uniform, ...
        reduce: ``log_mean`` (mean PSNR) or ``mean`` (PSNR of the mean error).
        start: ``free``, the first knot may move too, or ``pinned``, it stays at the teacher's last
            time.
        budget: model evaluations per sample of the trajectory; None: until no move helps.
        descents: how many of the starts, the best first, to descend from.
        validation: share of the samples that the descent does not see, nor should its starts have.
            If its result is worse on them than another descent's or the start, by more than their
            spread, that is returned. 0: none.
        off_grid: at last let knots stand between the teacher's times too, for hosts and models
            that take any time.
        max_batch: samples run at once; None: a quarter of them.
        keep_bytes: memory for states to start from again.
        progress: show a progress bar.

    Returns:
        Never worse than the best start on the samples descended on.

    Raises:
        ValueError: bad arguments, starts off the grid, of different lengths or with orders that
            their solver does not have, a budget that does not pay for one run of every start,
            fewer samples than a split needs.
        NonFiniteError: the model returned NaN or inf.
    """
    candidates = list(starts) if isinstance(starts, Iterable) else [starts]
    for candidate in candidates:
        arguments.of_type("starts", candidate, Schedule)
    by_path = _check_starts(candidates, trajectory)
    steps = candidates[0].steps
    trajectory.check_model(model)
    pinned = start == "pinned"
    objective = Objective(reduce=reduce, start=start)
    if pinned and any(s.starts_below for s in candidates):
        raise ValueError("start: expected starts that begin at the teacher's last time")
    samples = trajectory.samples
    held = int(samples * arguments.number("validation", validation))
    if not 0 <= validation < 1 or (validation > 0 and held < 1):
        raise ValueError(
            f"validation: expected a share below 1 that leaves out a sample or more of {samples}, "
            f"or 0, got {validation}"
        )
    descents = arguments.whole_number("descents", descents)
    checked = min(descents, len(by_path)) + 1
    run = steps * solvers.get(candidates[0].solver).evaluations
    needed = run * (len(by_path) + checked + 1)
    if budget is not None and arguments.whole_number("budget", budget) < needed:
        raise ValueError(f"budget: expected {needed} or more, got {budget}")
    seen, unseen = range(samples - held), range(samples - held, samples)
    # The checks at the end, and a trial that has begun, must be paid for too.
    # So must what is run again where rows are made finer: the path so far, and its cost.
    reserved = run * (checked * held + len(seen) * (3 if off_grid else 1))
    most = 0 if budget is None else budget * samples
    limit = most - reserved if most else math.inf
    with progress_bar("refine", most, progress, steps=steps) as bar:
        evaluator = evaluator_of(model, samples, len(seen), max_batch, bar.update)
        leg = evaluator.leg()
        if leg.there:
            refinement = leg.take(Refinement.there)
        else:
            options: dict[str, Any] = {"reduce": reduce, "pinned": pinned, "limit": limit}
            # The teacher's own evaluations, and those of the searches that the starts came from.
            spent = max(trajectory.nfe, *(s.search_nfe for s in candidates))
            refinement = _refine(
                evaluator, trajectory, by_path, descents, seen, unseen, keep_bytes, off_grid,
                objective, spent, options,
            )  # fmt: skip
            leg.reached(refinement.kept())
    tell(
        "refined",
        steps=steps,
        error=refinement.error,
        start_error=refinement.start_error,
        validation=refinement.validation,
        start_validation=refinement.start_validation,
        trials=refinement.trials,
    )
    return refinement


def _refine(
    evaluator: Evaluator,
    trajectory: Trajectory,
    by_path: Mapping[tuple[Rows, Orders], Schedule],
    descents: int,
    seen: Sequence[int],
    unseen: Sequence[int],
    keep_bytes: int,
    off_grid: bool,
    objective: Objective,
    spent: int,
    options: dict[str, Any],
) -> Refinement:
    """What ``refine`` finds; ``options`` are those of its races, ``spent`` evaluations before."""
    reduce, first = objective.reduce, next(iter(by_path.values()))
    solver, steps = first.solver, first.steps
    runner = Runner(evaluator, trajectory, solver, steps, keep_bytes)
    groups = list(runner.groups(seen))
    runner.ahead([(rows, group, orders) for rows, orders in by_path for group in groups])
    paths = sorted(
        (_Found(rows, orders, runner.values(rows, seen, reduce, orders))
         for rows, orders in by_path),
        key=_Found.mean,
    )  # fmt: skip
    best_start = paths[0]
    trials, ends = len(by_path), []
    for path in paths[:descents]:
        race = Race(runner, evaluator, seen, orders=path.orders, **options)
        rows, score = descend(race, path.rows, path.score, _first_scale(path.rows))
        trials += race.trials
        # From a worse start a descent may not get as far as the best one stands.
        if float(score.mean()) <= best_start.mean():
            ends.append(_Found(rows, path.orders, score))
    found = [*sorted(ends, key=_Found.mean), best_start]
    if off_grid and evaluator.nfe < options["limit"]:
        runner = Runner(evaluator, trajectory, solver, steps, keep_bytes, FINENESS)
        place = {t: row for row, t in enumerate(runner.times)}
        grid = trajectory.times.tolist()
        found = [replace(f, rows=tuple(place[grid[row]] for row in f.rows)) for f in found]
        race = Race(runner, evaluator, seen, orders=found[0].orders, **options)
        rows, score = descend(race, found[0].rows, found[0].score, FINENESS // 2)
        found[0] = replace(found[0], rows=rows, score=score)
        trials += race.trials
    checks = [runner.values(f.rows, unseen, reduce, f.orders) for f in found] if unseen else []
    chosen = 0
    for k in range(1, len(checks)):
        chosen = k if is_worse(checks[chosen] - checks[k]) else chosen
    best = found[chosen]
    cost = float(runner.values(best.rows, seen, "mean", best.orders).mean())
    begun, samples = by_path[best_start.rows, best_start.orders], trajectory.samples
    schedule = trajectory.schedule_at(
        [runner.times[row] for row in best.rows],
        solver=solver,
        orders=best.orders and runner.orders_of(best.rows, best.orders),
        method="refined",
        objective=objective,
        cost=cost,
        samples=len(seen),
        search_nfe=spent + round(evaluator.nfe / samples),
    )
    return Refinement(
        schedule=schedule,
        start=begun,
        error=mean_error(best.score, reduce),
        start_error=mean_error(best_start.score, reduce),
        validation=mean_error(checks[chosen], reduce) if checks else None,
        start_validation=mean_error(checks[-1], reduce) if checks else None,
        trials=trials,
        nfe=evaluator.nfe / samples,
    )
