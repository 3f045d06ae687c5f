"""How far the schedules of single samples lie apart (paper figure 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from oss_ext import cpu
from oss_ext.report.base import plain, write_figure
from oss_ext.report.markup import plural
from oss_ext.schedule import Schedule

SHARES = (0.0, 0.25, 0.75, 1.0)
"""Of the samples, below the edges of the bands."""

COLOR = "#1a73e8"


def plot_spread(
    schedules: Mapping[str, Schedule],
    spread: Mapping[str, Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Write a picture of averaged schedules among those that they are the average of.

    Args:
        schedules: by name, on the teacher's grid.
        spread: by the same names, the teacher rows of every sample's own schedule, int64
            ``[B, steps + 1]``, noise first.
    """
    figure = Figure(figsize=(1 + 4 * len(schedules), 3.6), layout="constrained")
    for axes, (name, schedule) in zip(
        figure.subplots(1, len(schedules), sharey=True, squeeze=False)[0],
        schedules.items(),
        strict=True,
    ):
        rows, grid = spread[name], cpu.tensor(schedule.teacher_times, dtype=torch.float64)
        shares = cpu.tensor(SHARES, dtype=torch.float64)
        low, first, third, high = rows.double().quantile(shares, dim=0).round().long()
        steps = range(rows.shape[1])
        axes.fill_between(steps, grid[low], grid[high], color=COLOR, alpha=0.15, lw=0,
                          label=f"all {plural(len(rows), 'sample')}")  # fmt: skip
        axes.fill_between(steps, grid[first], grid[third], color=COLOR, alpha=0.3, lw=0,
                          label="half of them")  # fmt: skip
        made = schedule.objective.aggregate if schedule.objective else None
        axes.plot(steps, schedule.times, "o-", color=COLOR, ms=4, label=made or "schedule")
        axes.set_xlabel("step")
        axes.set_title(plain(name))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("flow time t")
    write_figure(figure, path)
