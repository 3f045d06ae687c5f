"""Measure the teacher's amplitudes where a schedule evaluates the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from oss_ext import arguments, cpu
from oss_ext.amplitude import LEVELS, Amplitude, check_levels, quantiles
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory


@arguments.takes(schedule=Schedule)
def calibrate(
    teacher: Trajectory | Iterable[Trajectory],
    schedule: Schedule,
    *,
    levels: Sequence[float] = LEVELS,
) -> Schedule:
    """``schedule`` with the teacher's quantiles at the start of each of its steps.

    Quantiles are over all elements of a sample, in flow coordinates, and averaged over the samples.
    ``sample(..., amplitude=True)`` applies them; see ``oss_ext.amplitude``.

    Args:
        teacher: the calibration samples, which may be those of the search; the paper takes 512.
            One is enough to calculate with, and then a student takes over that one's amplitudes.
            Several trajectories are looked at one after the other, so that a generator of them
            needs the memory of one.
        schedule: on the teacher's grid or between its rows, where states are taken to be linear.
        levels: which quantiles, two ascending numbers between 0 and 1.

    Raises:
        ValueError: bad levels; no trajectory, one of another model or grid than the schedule's
            teacher, or one that is not finite or whose two quantiles are equal at a step.
    """
    levels = check_levels(levels)
    total, samples = cpu.zeros(schedule.steps, 2, dtype=torch.float64), 0
    for trajectory in teacher if isinstance(teacher, Iterable) else [teacher]:
        arguments.of_type("teacher", trajectory, Trajectory)
        _check_teacher(trajectory, schedule)
        for k, t in enumerate(schedule.times[:-1]):
            total[k] += quantiles(trajectory.at(t), levels).sum(dim=0).cpu()
        samples += trajectory.samples
    if not samples:
        raise ValueError("teacher: expected a trajectory or several, got none")
    if not total.isfinite().all():
        raise ValueError("teacher: expected finite states, got NaN or inf")
    low, high = (total / samples).T.tolist()
    for t, below, above in zip(schedule.times, low, high, strict=False):
        if below == above:
            raise ValueError(
                f"teacher: expected states whose quantiles {levels[0]:g} and {levels[1]:g} differ, "
                f"got {below:g} for both at t = {t:g}"
            )
    return replace(schedule, amplitude=Amplitude(levels, tuple(low), tuple(high), samples))


def _check_teacher(trajectory: Trajectory, schedule: Schedule) -> None:
    """``ValueError`` unless the schedule was made with a teacher like this one."""
    if schedule.model_hash != trajectory.model_hash:
        raise ValueError(
            f"schedule: expected one for the teacher's model, {trajectory.model!r} with hash "
            f"{trajectory.model_hash}, got one for {schedule.model!r} with hash "
            f"{schedule.model_hash or '(none)'}"
        )
    times = tuple(trajectory.times.tolist())
    theirs, ours = (schedule.teacher_times, schedule.teacher_solver), (times, trajectory.solver)
    if theirs != ours:
        raise ValueError(
            f"schedule: expected one of this teacher, {trajectory.steps} steps of "
            f"{trajectory.solver}, got one of {len(schedule.teacher_times) - 1} steps of "
            f"{schedule.teacher_solver}" + (" at other times" * (len(times) == len(theirs[0])))
        )
