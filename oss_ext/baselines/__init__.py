"""Other ways to choose steps, to compare with. A new one is a file and an entry of BASELINES."""

from __future__ import annotations

from oss_ext.baselines.base import Baseline, Calibration, UnableError
from oss_ext.baselines.uniform import UNIFORM, uniform

__all__ = ["BASELINES", "Baseline", "Calibration", "UnableError", "uniform"]

BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in (UNIFORM,)}
"""Every baseline by name."""
