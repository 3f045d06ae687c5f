"""Exhaustive search: the oracle for small cases."""

from __future__ import annotations

import itertools
import math

from oss_ext import arguments
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.refine.base import Runner, mean_error
from oss_ext.schedule import Objective, Schedule
from oss_ext.trajectory import Trajectory


@arguments.takes(model=Model, trajectory=Trajectory)
def exhaustive(
    model: Model,
    trajectory: Trajectory,
    steps: int,
    *,
    reduce: str = "log_mean",
    start: str = "free",
    solver: str = "euler",
    max_batch: int | None = None,
    most: int = 20_000,
) -> tuple[Schedule, float]:
    """The best of all schedules of ``steps`` steps on the teacher's grid, and its error.

    The student takes them with ``solver`` in its usual orders.

    The oracle for small cases: paths share what they have in common, but there are ``binomial(N,
    steps)`` of them.

    Raises:
        ValueError: bad arguments, or more than ``most`` schedules.
        NonFiniteError: the model returned NaN or inf on the way of every schedule.
    """
    n = trajectory.steps
    steps = arguments.whole_number("steps", steps, most=n)
    objective = Objective(reduce=reduce, start=start)
    trajectory.check_model(model)
    pinned = start == "pinned"
    count = math.comb(n - 1, steps - 1) if pinned else math.comb(n, steps)
    if count > most:
        raise ValueError(f"steps: expected at most {most} schedules to try, got {count}")
    evaluator = Evaluator(model, trajectory.samples, max_batch)
    runner = Runner(evaluator, trajectory, solver, steps)
    samples = range(trajectory.samples)
    free = itertools.combinations(range(n - 1 if pinned else n, 0, -1), steps - pinned)
    # In this order neighbours share the most of their paths.
    paths = ((n, *rows, 0) if pinned else (*rows, 0) for rows in free)
    error, rows = min((mean_error(runner.values(p, samples, reduce), reduce), p) for p in paths)
    runner.check(runner.values(rows, samples, reduce))
    schedule = trajectory.schedule(
        rows,
        solver=solver,
        method="exhaustive",
        objective=objective,
        cost=float(runner.values(rows, samples, "mean").mean()),
        samples=trajectory.samples,
        search_nfe=trajectory.nfe + evaluator.nfe // trajectory.samples,
    )
    return schedule, error
