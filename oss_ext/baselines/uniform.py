"""Uniform spacing in the teacher's steps: what "just use fewer steps" means (paper Eq. 5)."""

from __future__ import annotations

from oss_ext import arguments
from oss_ext.baselines.base import Baseline, even_rows
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def uniform(trajectory: Trajectory, steps: int) -> Schedule:
    """Rows ``floor(N k / steps + 1/2)`` for ``k = steps .. 0``, so from N down to 0.

    Raises:
        ValueError: ``steps`` not within 1 to N.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    return trajectory.schedule(even_rows(trajectory.steps, steps), method="uniform")


UNIFORM = Baseline(
    "uniform",
    "every so many of the teacher's steps",
    lambda calibration, steps: uniform(calibration.trajectory, steps),
)
