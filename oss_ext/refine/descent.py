"""The descents of a refinement, and the choice among what they found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.events import tell
from oss_ext.models.base import Kept, There, to_kept, to_text
from oss_ext.models.evaluation import Evaluator
from oss_ext.refine.base import Orders, Race, Rows, Runner, is_worse, mean_error
from oss_ext.refine.descent_newton import gauss_newton
from oss_ext.refine.descent_sweep import sweep
from oss_ext.schedule import Objective, Schedule
from oss_ext.trajectory import Trajectory

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
            "figures": cpu.tensor(own, dtype=torch.float64),
            "checks": cpu.tensor(checks, dtype=torch.float64),
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


def refined(
    evaluator: Evaluator,
    trajectory: Trajectory,
    by_path: Mapping[tuple[Rows, Orders], Schedule],
    descents: int,
    seen: Sequence[int],
    unseen: Sequence[int],
    keep_bytes: int,
    off_grid: bool,
    objective: Objective,
    limit: float,
    spent: int,
) -> Refinement:
    """What ``refine`` finds within ``limit`` rows, ``spent`` evaluations of a sample before it."""
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
    runner.check(best_start.score)
    trials, ends = len(by_path), []
    for path in paths[:descents]:
        if math.isinf(path.mean()):
            continue
        race = Race(runner, seen, objective, limit, path.orders)
        rows, score = descend(race, path.rows, path.score, _first_scale(path.rows))
        trials += race.trials
        # From a worse start a descent may not get as far as the best one stands.
        if float(score.mean()) <= best_start.mean():
            ends.append(_Found(rows, path.orders, score))
    found = [*sorted(ends, key=_Found.mean), best_start]
    if off_grid and evaluator.nfe < limit:
        runner = Runner(evaluator, trajectory, solver, steps, keep_bytes, FINENESS)
        place = {t: row for row, t in enumerate(runner.times)}
        grid = trajectory.times.tolist()
        found = [replace(f, rows=tuple(place[grid[row]] for row in f.rows)) for f in found]
        race = Race(runner, seen, objective, limit, found[0].orders)
        rows, score = descend(race, found[0].rows, found[0].score, FINENESS // 2)
        found[0] = replace(found[0], rows=rows, score=score)
        trials += race.trials
    checks = [runner.values(f.rows, unseen, reduce, f.orders) for f in found] if unseen else []
    chosen = 0
    for k in range(1, len(checks)):
        chosen = k if is_worse(checks[chosen] - checks[k]) else chosen
    best = found[chosen]
    if checks:
        runner.check(checks[chosen])
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
