"""Uniform flow times, shifted towards noise (SD3, FLUX)."""

from __future__ import annotations

from oss_ext import arguments
from oss_ext.baselines.base import (
    SHIFT,
    Baseline,
    Calibration,
    UnableError,
    schedule_through,
    shifted_times,
)
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def flow_shift(trajectory: Trajectory, steps: int, shift: float = SHIFT) -> Schedule:
    """``t = s u / (1 + (s - 1) u)`` at ``u = k / steps``, ``k = steps .. 1``, then the clean end.

    Scaled to what the teacher spans, which may start below pure noise. Esser et al. 2024 (SD3,
    eq. 23) have s = 3 at 1024 x 1024. A teacher that is shifted itself has the same in ``uniform``.

    Raises:
        ValueError: ``steps`` not within 1 to N, ``shift`` not positive.
        UnableError: times that repeat.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    shift = arguments.number("shift", shift, positive=True)
    return schedule_through(trajectory, shifted_times(trajectory, steps, shift), "flow-shift")


def flow_shift_free(trajectory: Trajectory, steps: int, shift: float = SHIFT) -> Schedule:
    """``flow_shift`` of one step more, whose first is left out: a free start, for nothing.

    Raises:
        As ``flow_shift``.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    shift = arguments.number("shift", shift, positive=True)
    times = shifted_times(trajectory, steps + 1, shift)[1:]
    return schedule_through(trajectory, times, "flow-shift-free", pinned=False)


def _free(calibration: Calibration, steps: int) -> Schedule:
    if calibration.start == "pinned":
        raise UnableError("flow-shift-free: begins below the teacher's last time")
    return flow_shift_free(calibration.trajectory, steps)


FLOW_SHIFT = Baseline(
    "flow-shift",
    "uniform flow times with shift 3 (Esser et al. 2024, SD3)",
    lambda calibration, steps: flow_shift(calibration.trajectory, steps),
)
FLOW_SHIFT_FREE = Baseline(
    "flow-shift-free", "flow-shift of one step more, whose first is left out", _free
)
