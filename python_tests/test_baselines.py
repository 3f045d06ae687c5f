"""Schedules that need no search."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import oss_ext as oss
from driver_cases import constant_velocity
from oss_ext.baselines import BASELINES, Calibration, uniform


def teacher(steps: int) -> oss.Trajectory:
    model = constant_velocity(shape=(1,))
    return oss.teacher(model, model.noise(1), steps)


@pytest.mark.parametrize(
    ("teacher_steps", "steps", "indices"),
    [
        (10, 1, (10, 0)),
        (10, 2, (10, 5, 0)),
        (10, 4, (10, 8, 5, 3, 0)),  # halves are rounded up
        (200, 5, (200, 160, 120, 80, 40, 0)),
        (7, 3, (7, 5, 2, 0)),
        (4, 4, (4, 3, 2, 1, 0)),
    ],
)
def test_uniform_is_evenly_spaced_in_teacher_steps(
    teacher_steps: int, steps: int, indices: tuple[int, ...]
) -> None:
    assert uniform(teacher(teacher_steps), steps).indices == indices


@pytest.mark.parametrize("teacher_steps", [1, 2, 13, 31])
def test_uniform_fits_every_budget(teacher_steps: int) -> None:
    trajectory = teacher(teacher_steps)
    for steps in range(1, teacher_steps + 1):
        indices = uniform(trajectory, steps).indices
        assert indices is not None
        gaps = [high - low for high, low in pairwise(indices)]
        assert (indices[0], indices[-1], len(gaps)) == (teacher_steps, 0, steps)
        assert max(gaps) - min(gaps) <= 1
        assert min(gaps) > 0


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_names_itself_and_claims_no_search(name: str) -> None:
    model = constant_velocity(shape=(1,))
    trajectory = oss.teacher(model, model.noise(1), 6)
    calibration = Calibration(model, trajectory, most=3)
    schedule = BASELINES[name].make(calibration, 3)
    assert (schedule.method, schedule.objective, schedule.cost) == (name, None, None)
    assert schedule.steps == 3
    assert (schedule.model, schedule.model_hash) == (trajectory.model, trajectory.model_hash)
    assert schedule.teacher_times == tuple(trajectory.times.tolist())


@pytest.mark.parametrize("steps", [0, -1, 7])
def test_a_budget_outside_1_to_n_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^steps: expected 1 to 6.*, got {steps}"):
        uniform(teacher(6), steps)


@pytest.mark.parametrize("steps", [True, 2.0, "2", None])
def test_a_budget_is_a_whole_number(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^steps: expected .*, got"):
        uniform(teacher(6), steps)
