"""The timestep spacings of Stable Diffusion's samplers, leading and trailing."""

from __future__ import annotations

import torch

from oss_ext import arguments, cpu
from oss_ext.baselines.base import Baseline, UnableError, even_rows, schedule_through
from oss_ext.noise import VPPath, ddim_timesteps
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory

OFFSET = 1  # of Stable Diffusion's leading timesteps


def ddim_leading(trajectory: Trajectory, steps: int) -> Schedule:
    """Every ``T // steps``-th timestep from the clean end on, plus 1, as Stable Diffusion has them.

    It starts below the teacher (unless the steps are as many). On a path without timesteps: every
    ``N // steps``-th row from row 1 on.

    Raises:
        ValueError: ``steps`` not within 1 to N.
        UnableError: fewer timesteps than that needs.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    if isinstance(trajectory.path, VPPath):
        return _spaced(trajectory, trajectory.path, steps, "leading")
    rows = [trajectory.steps // steps * k + 1 for k in range(steps - 1, -1, -1)]
    return trajectory.schedule([*rows, 0], method="ddim-leading")


def ddim_trailing(trajectory: Trajectory, steps: int) -> Schedule:
    """Every ``T / steps``-th timestep from the last one down (Lin et al. 2023).

    On a path without timesteps these are rows of the teacher's grid, and the same as ``uniform``.

    Raises:
        ValueError: ``steps`` not within 1 to N.
        UnableError: fewer timesteps than that needs.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    if isinstance(trajectory.path, VPPath):
        return _spaced(trajectory, trajectory.path, steps, "trailing")
    return trajectory.schedule(even_rows(trajectory.steps, steps), method="ddim-trailing")


def _spaced(trajectory: Trajectory, path: VPPath, steps: int, spacing: str) -> Schedule:
    leading, method = spacing == "leading", f"ddim-{spacing}"
    try:
        timesteps = ddim_timesteps(path, steps, spacing, OFFSET if leading else 0)
        times = path.flow_times(cpu.tensor(timesteps, dtype=torch.float64))
    except ValueError as error:  # fewer timesteps than steps, or one past the last by the offset
        raise UnableError(f"{method}: {error}") from None
    return schedule_through(trajectory, times, method, pinned=not leading)


DDIM_LEADING = Baseline(
    "ddim-leading",
    "Stable Diffusion's default timesteps, which start below the noisiest",
    lambda calibration, steps: ddim_leading(calibration.trajectory, steps),
)
DDIM_TRAILING = Baseline(
    "ddim-trailing",
    "timesteps evenly down from the noisiest (Lin et al. 2023); uniform off VP paths",
    lambda calibration, steps: ddim_trailing(calibration.trajectory, steps),
)
