"""Uniform spacing in log sigma between the least and the greatest (k-diffusion's exponential)."""

from __future__ import annotations

from oss_ext import arguments
from oss_ext.baselines.base import Baseline, even_lambdas, schedule_through
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def exponential(trajectory: Trajectory, steps: int) -> Schedule:
    """Uniform in ``ln sigma`` from the highest to the lowest that the teacher asks at, then clean.

    That is uniform in log-SNR, as ``logsnr`` is; but the lowest level is a step of its own here,
    and the end of the last one there: a difference of one step in so few.

    Raises:
        ValueError: ``steps`` not within 1 to N.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    lambdas = even_lambdas(trajectory, steps - 1)
    return schedule_through(trajectory, (-lambdas).sigmoid(), "exponential")


EXPONENTIAL = Baseline(
    "exponential",
    "uniform in log sigma down to the least sigma (k-diffusion)",
    lambda calibration, steps: exponential(calibration.trajectory, steps),
)
