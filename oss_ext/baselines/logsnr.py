"""Uniform spacing in the log signal-to-noise ratio (DPM-Solver)."""

from __future__ import annotations

from oss_ext import arguments
from oss_ext.baselines.base import Baseline, even_lambdas, schedule_through
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def logsnr(trajectory: Trajectory, steps: int) -> Schedule:
    """``steps`` equal intervals of ``lambda = ln(alpha / beta)``, the last one to the clean end.

    From the teacher's start to the least level that it asks at, as Lu et al. 2022 (DPM-Solver) end
    at a small time: the network is not asked there; ``exponential`` does ask there. See
    ``base.levels``.

    Raises:
        ValueError: ``steps`` not within 1 to N.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    lambdas = even_lambdas(trajectory, steps)
    return schedule_through(trajectory, (-lambdas[:-1]).sigmoid(), "logsnr")


LOGSNR = Baseline(
    "logsnr",
    "uniform in log-SNR, its end moved to the clean end (Lu et al. 2022, DPM-Solver)",
    lambda calibration, steps: logsnr(calibration.trajectory, steps),
)
