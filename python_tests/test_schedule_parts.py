"""Parts of a schedule: cut for image-to-image, split between experts or stages."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import dp_search, each_family, each_seed, example_schedule, random_case
from noise_cases import EXAMPLES
from oss_ext import Schedule, ScheduleError
from oss_ext.noise import VPPath

# Times 1, 0.4, 0.1, 0 of the teacher's 0, 0.1, 1/3, 0.4, 0.7, 1.
EXAMPLE = example_schedule()
STEPS = 4


def found(family: str, seed: int, start: str = "free") -> tuple[oss.models.Model, Any, Schedule]:
    """A random model, its teacher and a searched schedule."""
    model, trajectory = random_case(family, seed)
    return model, trajectory, dp_search(model, trajectory, STEPS, start=start).schedule(STEPS)


# --- cut ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "times", "indices"),
    [
        (1.0, (1.0, 0.4, 0.1, 0.0), (5, 3, 1, 0)),
        (0.7, (0.7, 0.4, 0.1, 0.0), (4, 3, 1, 0)),
        (0.6, (0.6, 0.4, 0.1, 0.0), None),  # no time of the teacher's
        (0.4, (0.4, 0.1, 0.0), (3, 1, 0)),
        (0.4 - 1e-12, (0.4 - 1e-12, 0.1, 0.0), None),
        (0.1, (0.1, 0.0), (1, 0)),
        (0.01, (0.01, 0.0), None),
        (1, (1.0, 0.4, 0.1, 0.0), (5, 3, 1, 0)),
    ],
)
def test_a_schedule_cut_at_a_level_starts_at_that_level(
    sigma: float, times: tuple[float, ...], indices: tuple[int, ...] | None
) -> None:
    part = EXAMPLE.cut(sigma=sigma)
    assert part.times == times
    assert part.indices == indices
    assert part.cost is None  # nothing was measured of it


@pytest.mark.parametrize(
    ("strength", "times"),
    [
        (1.0, (1.0, 0.4, 0.1, 0.0)),
        (1, (1.0, 0.4, 0.1, 0.0)),
        (0.99, (0.7, 0.4, 0.1, 0.0)),
        (0.8, (0.7, 0.4, 0.1, 0.0)),
        (0.6, (0.4, 0.1, 0.0)),
        (0.5, (1 / 3, 0.1, 0.0)),
        (0.2, (0.1, 0.0)),
        (0.01, (0.1, 0.0)),  # at least one step
    ],
)
def test_strength_is_the_share_of_the_teachers_steps(
    strength: float, times: tuple[float, ...]
) -> None:
    part = EXAMPLE.cut(strength=strength)
    assert part.times == times
    assert part.indices == tuple(EXAMPLE.teacher_times.index(t) for t in times)


@pytest.mark.parametrize("path", ["scaled_linear", "ve", "flow_scaled"])
def test_levels_are_counted_as_sigmas_are(path: str) -> None:
    schedule = replace(EXAMPLE, path=EXAMPLES[path], indices=None, times=(0.9, 0.4, 0.1, 0.0))
    level = 0.5 if path == "flow_scaled" else 1.5
    part = schedule.cut(sigma=level)
    assert part.sigmas[0] == pytest.approx(level, rel=1e-12)
    assert part.times[1:] == ((0.4, 0.1, 0.0))
    assert schedule.cut(sigma=schedule.sigmas[1]).times == pytest.approx((0.4, 0.1, 0.0))


def test_pure_noise_on_a_vp_path_is_no_level_to_cut_at() -> None:
    schedule = replace(EXAMPLE, path=VPPath(zero_terminal_snr=True))
    assert schedule.sigmas[0] == math.inf
    with pytest.raises(ScheduleError):
        schedule.cut(sigma=math.inf)
    assert schedule.cut(strength=1.0).times == schedule.times


@pytest.mark.parametrize("options", [{}, {"sigma": 0.5, "strength": 0.5}])
def test_a_cut_is_by_one_of_sigma_and_strength(options: dict[str, float]) -> None:
    with pytest.raises(ScheduleError, match=r"^cut: expected sigma or strength, got"):
        EXAMPLE.cut(**options)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 1.0001, math.nan, math.inf])
def test_a_level_that_the_schedule_does_not_reach_is_refused(sigma: float) -> None:
    with pytest.raises(ScheduleError, match=r"^sigma: expected a (level above sigma 0|finite)"):
        EXAMPLE.cut(sigma=sigma)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan])
def test_a_strength_that_makes_no_sense_is_refused(strength: float) -> None:
    with pytest.raises(ScheduleError, match=r"^strength: expected a (number above 0|finite)"):
        EXAMPLE.cut(strength=strength)


@pytest.mark.parametrize("options", [{"sigma": "0.5"}, {"strength": "0.5"}, {"sigma": [0.5]}])
def test_a_level_is_a_number(options: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError):
        EXAMPLE.cut(**options)


def test_a_strength_below_the_end_of_a_part_is_refused() -> None:
    first, _ = EXAMPLE.split(at=0.2)
    with pytest.raises(ScheduleError, match=r"^\w+: expected"):
        first.cut(strength=0.2)


@each_family
@each_seed(2)
def test_a_cut_schedule_samples_from_a_state_of_that_level(family: str, seed: int) -> None:
    """Its steps are the whole schedule's from there on: from the same state to the same end."""
    model, trajectory, schedule = found(family, seed)
    whole = list(oss.sampling.student_states(model, trajectory.noise, schedule))
    for k, t in enumerate(schedule.times[1:-1]):
        part = schedule.cut(sigma=t)
        assert part.times == schedule.times[k + 1 :]
        assert torch.equal(oss.sample(model, whole[k], part), whole[-1])


# --- split --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "times"),
    [
        (0.5, [(1.0, 0.4), (0.4, 0.1, 0.0)]),
        (0.4, [(1.0, 0.4, 0.1), (0.1, 0.0)]),  # starts exactly there: above
        (0.4 + 1e-12, [(1.0, 0.4), (0.4, 0.1, 0.0)]),
        (0.2, [(1.0, 0.4, 0.1), (0.1, 0.0)]),
        (1.0, [(1.0, 0.4), (0.4, 0.1, 0.0)]),
        (1, [(1.0, 0.4), (0.4, 0.1, 0.0)]),
        ([0.5], [(1.0, 0.4), (0.4, 0.1, 0.0)]),
        ((0.5, 0.2), [(1.0, 0.4), (0.4, 0.1), (0.1, 0.0)]),
        ([0.4 + 1e-12, 0.4], [(1.0, 0.4), (0.4, 0.1), (0.1, 0.0)]),
    ],
)
def test_a_step_belongs_to_the_part_that_it_starts_in(
    at: float | list[float], times: list[tuple[float, ...]]
) -> None:
    parts = EXAMPLE.split(at=at)
    assert [part.times for part in parts] == times
    for part in parts:
        assert part.indices == tuple(EXAMPLE.teacher_times.index(t) for t in part.times)
        assert part.cost is None
        first = EXAMPLE.teacher_times.index(part.times[0])
        assert part.teacher_times == EXAMPLE.teacher_times[: first + 1]
        assert part.objective == EXAMPLE.objective


@pytest.mark.parametrize("at", [0.1, 0.05, 0.0, 1.1, 2, -1.0, [0.5, 0.45], [0.5, 0.05], []])
def test_a_level_with_no_step_above_or_below_is_refused(at: float | list[float]) -> None:
    with pytest.raises(ScheduleError, match=r"^at: expected levels with a step in every part, got"):
        EXAMPLE.split(at=at)


@pytest.mark.parametrize("at", [[0.2, 0.5], [0.5, 0.5], [0.5, 0.2, 0.3], [math.nan, math.nan]])
def test_levels_descend(at: list[float]) -> None:
    with pytest.raises(ScheduleError, match=r"^at: expected (levels that descend|a finite)"):
        EXAMPLE.split(at=at)


@pytest.mark.parametrize("at", ["0.5", None, ["a"]])
def test_levels_are_numbers(at: Any) -> None:
    with pytest.raises(ScheduleError, match=r"^at: expected"):
        EXAMPLE.split(at=at)


@pytest.mark.parametrize("path", ["scaled_linear", "ve", "flow_scaled"])
def test_experts_are_told_apart_by_sigma(path: str) -> None:
    schedule = replace(EXAMPLE, path=EXAMPLES[path], indices=None, times=(0.9, 0.4, 0.1, 0.0))
    level = schedule.sigmas[1]
    above, below = schedule.split(at=level)
    assert (above.times, below.times) == ((0.9, 0.4, 0.1), (0.1, 0.0))
    assert above.sigmas[-1] == below.sigmas[0] < level


def every_split(schedule: Schedule) -> list[list[float]]:
    """Levels between the steps: one alone, and all of them at once."""
    levels = [math.sqrt(high * low) for high, low in pairwise(schedule.sigmas[:-1])]
    return [*([level] for level in levels), levels]


@each_family
@pytest.mark.parametrize("start", ["free", "pinned"])
@each_seed(2)
def test_parts_one_after_the_other_are_the_whole(family: str, start: str, seed: int) -> None:
    model, trajectory, schedule = found(family, seed, start)
    whole = oss.sample(model, trajectory.noise, schedule)
    for at in every_split(schedule):
        parts = schedule.split(at=at)
        assert len(parts) == len(at) + 1
        assert sum(part.steps for part in parts) == schedule.steps
        for part, after in pairwise(parts):
            assert part.times[-1] == after.times[0]
        x = trajectory.noise
        for part in parts:
            x = oss.sample(model, x, part)
        assert torch.equal(x, whole)


@each_family
@each_seed(1)
def test_parts_can_be_saved_and_loaded(family: str, seed: int, tmp_path: File) -> None:
    _, _, schedule = found(family, seed)
    parts = [
        part
        for at in every_split(schedule)
        for part in [*schedule.split(at=at), schedule.cut(sigma=at[0]), schedule.cut(strength=0.5)]
    ]
    for part in parts:
        part.save(tmp_path / "part.json")
        assert Schedule.load(tmp_path / "part.json") == part


def test_parts_have_parts() -> None:
    _, below = EXAMPLE.split(at=0.5)
    assert [part.times for part in below.split(at=0.2)] == [(0.4, 0.1), (0.1, 0.0)]
    assert below.cut(sigma=0.2).times == (0.2, 0.1, 0.0)
    above, _ = EXAMPLE.split(at=0.2)
    assert above.cut(sigma=0.5).times == (0.5, 0.4, 0.1)
    with pytest.raises(ScheduleError, match=r"^sigma: expected a level above sigma 0.1"):
        above.cut(sigma=0.05)


def test_only_what_starts_below_the_teacher_has_a_free_start() -> None:
    assert not EXAMPLE.starts_below
    above, below = EXAMPLE.split(at=0.5)
    assert not above.starts_below
    assert not below.starts_below
    assert not EXAMPLE.cut(sigma=0.9).starts_below
    free = replace(EXAMPLE, times=EXAMPLE.times[1:], indices=EXAMPLE.indices[1:])
    assert free.starts_below
    above, below = free.split(at=0.2)
    assert above.starts_below
    assert not below.starts_below
    assert not free.cut(strength=1.0).starts_below
