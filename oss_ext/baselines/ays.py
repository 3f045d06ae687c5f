"""Align Your Steps: published tables, interpolated to other budgets (Sabour et al. 2024)."""

from __future__ import annotations

import numpy as np
import torch

from oss_ext import arguments, cpu, presets
from oss_ext.baselines.base import Baseline, schedule_through
from oss_ext.noise import VEPath
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


def ays(trajectory: Trajectory, steps: int, preset: str | None = None) -> Schedule:
    """The noise levels of a table at equal signal-to-noise ratio, then the clean end.

    Log-linear in sigma between the table's own, as its authors interpolate: evenly spaced places
    in the table, ends included, where the last entry is the least sigma of the table's model, of
    which sampling makes the clean end. Levels beyond what the teacher spans are cut to it, and the
    first is the teacher's start.

    Args:
        preset: name of the table; None: Stable Video Diffusion's on a VE path, else Stable
            Diffusion 1's.

    Raises:
        ValueError: ``steps`` not within 1 to N, an unknown preset.
        UnableError: times that repeat, where the teacher spans little of the table.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    if preset is None:
        preset = "svd-ays-10" if isinstance(trajectory.path, VEPath) else "sd1-ays-10"
    table = presets.load(preset).schedule
    known = cpu.tensor([*table.times[:-1], table.path.span[0]], dtype=torch.float64).logit()
    places = np.linspace(0, 1, steps + 1)[:-1]
    found = np.interp(places, np.linspace(0, 1, len(known)), known)
    return schedule_through(trajectory, torch.from_numpy(found).sigmoid(), "ays")


AYS = Baseline(
    "ays",
    "Align Your Steps' table for Stable Diffusion 1, on VE paths that for SVD (Sabour et al. 2024)",
    lambda calibration, steps: ays(calibration.trajectory, steps),
)
