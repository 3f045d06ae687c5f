"""EDM's spacing, uniform in ``sigma^(1/rho)`` (Karras et al. 2022, eq. 5)."""

from __future__ import annotations

import torch

from oss_ext import arguments, cpu
from oss_ext.baselines.base import EDM, Baseline, levels, schedule_through
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def karras(trajectory: Trajectory, steps: int, rho: float = 7.0) -> Schedule:
    """``sigma_k = (max^(1/rho) + k / (steps - 1) (min^(1/rho) - max^(1/rho)))^rho``, then clean.

    From the highest to the lowest sigma that the teacher asks at, both included; see
    ``base.levels``. (Hosts put a flow model's time in the place of sigma, which takes most steps
    to the clean end.)

    Raises:
        ValueError: ``steps`` not within 1 to N, ``rho`` not positive.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    power = 1 / arguments.number("rho", rho, positive=True)
    low, high = levels(trajectory)
    sigmas = cpu.linspace(high**power, low**power, steps, dtype=torch.float64) ** (1 / power)
    return schedule_through(trajectory, EDM.times_of(sigmas), "karras")


KARRAS = Baseline(
    "karras",
    "uniform in sigma^(1/7) (Karras et al. 2022, EDM)",
    lambda calibration, steps: karras(calibration.trajectory, steps),
)
