"""Uniform spacing in the teacher's steps: what "just use fewer steps" means (paper Eq. 5)."""

from __future__ import annotations

from oss_ext import arguments
from oss_ext.baselines.base import Baseline
from oss_ext.schedule import Schedule
from oss_ext.teacher import Trajectory


def uniform(trajectory: Trajectory, steps: int) -> Schedule:
    """Rows ``floor(N k / steps + 1/2)`` for ``k = steps .. 0``, so from N down to 0.

    Raises:
        ValueError: ``steps`` not within 1 to N.
    """
    n = trajectory.steps
    steps = arguments.whole_number("steps", steps, most=n)
    indices = [(2 * n * k + steps) // (2 * steps) for k in range(steps, -1, -1)]
    return trajectory.schedule(indices, method="uniform")


UNIFORM = Baseline(
    "uniform",
    "every so many of the teacher's steps",
    lambda calibration, steps: uniform(calibration.trajectory, steps),
)
