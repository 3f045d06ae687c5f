"""Quadratic spacing in what the network is told: more steps near the clean end (DDIM)."""

from __future__ import annotations

import torch

from oss_ext import arguments, cpu
from oss_ext.baselines.base import Baseline, model_times_at, schedule_through
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def quadratic(trajectory: Trajectory, steps: int) -> Schedule:
    """Model times ``m_0 + (k / steps)^2 (m_N - m_0)`` for ``k = steps .. 1``, then the clean end.

    ``tau_k = c k^2`` of Song et al. 2021 (DDIM, appendix D.2) with ``c`` such that the first is the
    teacher's start; not rounded to whole timesteps. ``m_0``: see ``base.model_times_at``.

    Raises:
        ValueError: ``steps`` not within 1 to N.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    fractions = (cpu.arange(steps, 0, -1, dtype=torch.float64) / steps) ** 2
    return schedule_through(trajectory, model_times_at(trajectory, fractions), "quadratic")


QUADRATIC = Baseline(
    "quadratic",
    "quadratic in what the network is told (Song et al. 2021, DDIM)",
    lambda calibration, steps: quadratic(calibration.trajectory, steps),
)
