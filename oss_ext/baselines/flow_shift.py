"""Uniform flow times, shifted towards noise (SD3, FLUX)."""

from __future__ import annotations

import torch

from oss_ext import arguments, cpu
from oss_ext.baselines.base import Baseline, schedule_through
from oss_ext.noise import shifted
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def flow_shift(trajectory: Trajectory, steps: int, shift: float = 3.0) -> Schedule:
    """``t = s u / (1 + (s - 1) u)`` at ``u = k / steps``, ``k = steps .. 1``, then the clean end.

    Scaled to what the teacher spans, which may start below pure noise. Esser et al. 2024 (SD3,
    eq. 23) have s = 3 at 1024 x 1024. A teacher that is shifted itself has the same in ``uniform``.

    Raises:
        ValueError: ``steps`` not within 1 to N, ``shift`` not positive.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    shift = arguments.number("shift", shift, positive=True)
    u = cpu.arange(steps, 0, -1, dtype=torch.float64) / steps
    first, last = trajectory.times[[0, -1]]
    times = first + (last - first) * shifted(u, shift)
    return schedule_through(trajectory, times, "flow-shift")


FLOW_SHIFT = Baseline(
    "flow-shift",
    "uniform flow times with shift 3 (Esser et al. 2024, SD3)",
    lambda calibration, steps: flow_shift(calibration.trajectory, steps),
)
