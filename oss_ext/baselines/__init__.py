"""Schedules that need no search, to compare with. A new one is a file and a line in BASELINES."""

from __future__ import annotations

from collections.abc import Callable

from oss_ext.baselines.uniform import uniform
from oss_ext.schedule import Schedule
from oss_ext.teacher import Trajectory

__all__ = ["BASELINES", "uniform"]

BASELINES: dict[str, Callable[[Trajectory, int], Schedule]] = {"uniform": uniform}
"""Every baseline by name: ``baseline(trajectory, steps)`` on the trajectory's grid."""
