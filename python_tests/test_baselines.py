"""What all baselines have in common, and the ones that the teacher's grid alone decides."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

import oss_ext as oss
from baseline_cases import KINDS, calibration_on, each_kind, model_on, teacher_on
from driver_cases import constant_velocity, one_thread, random_mixture, recorded  # noqa: F401
from noise_cases import EXAMPLES
from oss_ext.baselines import BASELINES, Calibration, UnableError, uniform
from oss_ext.baselines.base import schedule_through
from oss_ext.noise import Path, VPPath

STEPS = 4
each_baseline = pytest.mark.parametrize("name", BASELINES)
FREE = {"ddim-leading", "flow-shift-free", "oss-median", "oss-mean", "ld3"}  # to start below
CLOCKWORK = {name for name in BASELINES if name not in {"gits", "oss-median", "oss-mean", "ld3"}}


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


@cache
def made(kind: str, name: str, steps: int) -> tuple[Calibration, oss.Schedule]:
    calibration = calibration_on(EXAMPLES[kind], STEPS)
    return calibration, BASELINES[name].make(calibration, steps)


@each_baseline
@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_names_itself_and_claims_no_search(kind: str, name: str) -> None:
    calibration, schedule = made(kind, name, STEPS)
    trajectory = calibration.trajectory
    assert (schedule.method, schedule.objective, schedule.cost) == (name, None, None)
    assert (schedule.model, schedule.model_hash) == (trajectory.model, trajectory.model_hash)
    assert schedule.path == trajectory.path
    assert schedule.teacher_times == tuple(trajectory.times.tolist())


@each_baseline
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_baseline_descends_from_the_teachers_start_to_its_end(
    kind: str, name: str, steps: int
) -> None:
    calibration, schedule = made(kind, name, steps)
    trajectory = calibration.trajectory
    assert schedule.steps == steps
    assert schedule.times[-1] == float(trajectory.times[0])
    start = float(trajectory.times[-1])
    assert schedule.times[0] <= start if name in FREE else schedule.times[0] == start
    images = oss.sample(calibration.model, trajectory.noise, schedule)  # the network knows them all
    assert bool(images.isfinite().all())


@each_baseline
def test_search_nfe_is_what_was_spent(name: str) -> None:
    model, calls = recorded(random_mixture(0))
    calibration = Calibration(model, oss.teacher(model, model.noise(2), 9), most=3)
    calls.clear()
    schedule = BASELINES[name].make(calibration, 3)
    spent = sum(len(call.x) for call in calls) / 2
    if name in CLOCKWORK:
        assert (schedule.search_nfe, spent) == (0, 0)
    elif name == "ld3":  # 4 starts, a gradient check, 40 epochs of which 3 go backward as well
        assert spent == 3 + 4 * 3 + 40 * (3 + 3)
        assert schedule.search_nfe == 9 + spent + 2 + 40 * 3 * 2
    else:
        assert schedule.search_nfe == 9 + spent


@each_baseline
@pytest.mark.parametrize("steps", [0, -1, 13, True, 2.0, "2", None])
def test_a_budget_is_a_whole_number_from_1_to_n(name: str, steps: Any) -> None:
    calibration = calibration_on(EXAMPLES["ve"], most=12)
    with pytest.raises(ValueError, match=r"^steps: expected .*, got") as caught:
        BASELINES[name].make(calibration, steps)
    assert not isinstance(caught.value, UnableError)


@each_baseline
@pytest.mark.parametrize(
    "path", [EXAMPLES["flow"], EXAMPLES["few_timesteps"]], ids=lambda p: p.name
)
def test_as_many_steps_as_the_teacher_has_are_served(name: str, path: Path) -> None:
    model = model_on(path)
    trajectory = oss.teacher(model, model.noise(1), 5)
    calibration = Calibration(model, trajectory, 5)
    assert BASELINES[name].make(calibration, 5).steps == 5
    assert BASELINES[name].make(dataclasses.replace(calibration, most=1), 1).steps == 1


@each_kind
def test_times_out_of_reach_are_moved_to_the_end_of_it(path: Path) -> None:
    trajectory = teacher_on(path)
    first, last = path.span[0], float(trajectory.times[-1])
    times = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    if first > 0:
        found = schedule_through(trajectory, times, "x", pinned=False)
        assert found.times == pytest.approx((last, 0.5, first, 0), rel=1e-12)
    else:  # the clean end would be asked at
        with pytest.raises(UnableError, match=r"^x: 3 steps need times that descend"):
            schedule_through(trajectory, times, "x")


def test_a_rounding_beside_a_row_is_the_row() -> None:
    trajectory = teacher_on(VPPath())
    times = trajectory.times.flip(0)[:-1] * (1 + 3e-16)
    assert schedule_through(trajectory, times, "x").indices == tuple(range(12, -1, -1))
    assert schedule_through(trajectory, times - 1e-6, "x").indices is None


def test_a_pinned_start_is_the_teachers_whatever_the_first_time_is() -> None:
    trajectory = teacher_on(VPPath())
    times = torch.tensor([0.6, 0.5], dtype=torch.float64)
    start = float(trajectory.times[-1])
    assert schedule_through(trajectory, times, "x").times == (start, 0.5, 0)
    assert schedule_through(trajectory, times, "x", pinned=False).times == (0.6, 0.5, 0)


@pytest.mark.parametrize("again", [1.0, 0.5, math.nan])
def test_times_that_repeat_are_refused(again: float) -> None:
    trajectory = teacher_on(EXAMPLES["flow"])
    times = torch.tensor([1.0, 0.5, again], dtype=torch.float64)
    with pytest.raises(UnableError, match=r"^x: 3 steps need times that descend.*ask for fewer"):
        schedule_through(trajectory, times, "x")
