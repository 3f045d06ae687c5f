"""The paper's own schedules for many samples: a path for each, then their average."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oss_ext.baselines.base import Baseline, Calibration
from oss_ext.schedule import Schedule, aggregate_indices


def middle(paths: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """``floor((a[n // 2] + a[n // 2 - 1]) / 2)`` of every column sorted: the published median.

    For an odd number of paths that is half a rank below the median. Descending paths give a
    descending one: each order statistic falls by 1 or more from knot to knot, hence the sum of
    two by 2 or more, and the floor of its half by 1 or more.

    Args:
        paths: rows of the teacher's grid, each list descending, all of one length.
    """
    half = len(paths) // 2
    columns = (sorted(column) for column in zip(*paths, strict=True))
    return tuple((column[half] + column[half - 1]) // 2 for column in columns)


def oss_median(calibration: Calibration, steps: int) -> Schedule:
    """A path of the dynamic programme per sample, then ``middle`` (the published code).

    Raises:
        ValueError: ``steps`` not within 1 to the calibration's ``most``.
        NonFiniteError: a sample without a finite path.
    """
    return _averaged(calibration, steps, middle, "oss-median")


def oss_mean(calibration: Calibration, steps: int) -> Schedule:
    """A path of the dynamic programme per sample, then the mean (the paper's OSS-ave).

    Raises:
        As ``oss_median``.
    """
    return _averaged(calibration, steps, lambda p: aggregate_indices(p, "mean"), "oss-mean")


def _averaged(
    calibration: Calibration,
    steps: int,
    average: Callable[[list[tuple[int, ...]]], tuple[int, ...]],
    method: str,
) -> Schedule:
    trajectory = calibration.trajectory
    paths = [calibration.table.backtrack(steps, b) for b in range(trajectory.samples)]
    return trajectory.schedule(
        average(paths),
        solver=calibration.solver,
        method=method,
        samples=trajectory.samples,
        search_nfe=trajectory.nfe + calibration.table_nfe(steps),
    )


OSS_MEDIAN = Baseline(
    "oss-median",
    "Optimal Stepsize as published: the median of a path per sample",
    oss_median,
    uses_table=True,
)
OSS_MEAN = Baseline(
    "oss-mean",
    "Optimal Stepsize as its paper has it: the mean of a path per sample",
    oss_mean,
    uses_table=True,
)
