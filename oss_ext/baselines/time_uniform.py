"""Uniform spacing in what the network is told: "linear timesteps", DPM-Solver's time-uniform."""

from __future__ import annotations

import torch

from oss_ext import arguments, cpu
from oss_ext.baselines.base import Baseline, model_times_at, schedule_through
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def time_uniform(trajectory: Trajectory, steps: int) -> Schedule:
    """Model times ``m_0 + k / steps (m_N - m_0)`` for ``k = steps .. 1``, then the clean end.

    ``m_0`` is the model's time of the clean end, as ``base.model_times_at`` has it. On a flow path
    these are the unshifted times, on a VE path that is told ``ln sigma`` those of ``logsnr`` down
    to the least sigma.

    Raises:
        ValueError: ``steps`` not within 1 to N.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    fractions = cpu.arange(steps, 0, -1, dtype=torch.float64) / steps
    return schedule_through(trajectory, model_times_at(trajectory, fractions), "time-uniform")


TIME_UNIFORM = Baseline(
    "time-uniform",
    "uniform in what the network is told (DPM-Solver's time-uniform)",
    lambda calibration, steps: time_uniform(calibration.trajectory, steps),
)
