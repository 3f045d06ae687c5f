"""The paper's teachers on one network: its three schedules (table 2) and its sizes (table 3)."""

from __future__ import annotations

import pytest

import oss_ext as oss
from driver_cases import dp_search, one_thread, random_mixture  # noqa: F401
from oss_ext.noise import GRIDS

SEARCHED, HELD_OUT = 0, 1  # seeds of the noise


def scores(model: oss.models.Model, grid: str, steps: int, budget: int) -> tuple[float, float]:
    """Mean squared error on unseen samples of ``budget`` uniform and of as many searched steps."""
    times = GRIDS[grid](model.path, steps)
    start = float(times[-1])
    teacher = oss.teacher(model, model.noise(4, SEARCHED, start=start), times=times)
    found = dp_search(model, teacher, budget, reduce="mean").schedule(budget)
    unseen = oss.teacher(model, model.noise(8, HELD_OUT, start=start), times=times)
    contest = {"uniform": oss.baselines.uniform(unseen, budget), "searched": found}
    uniform, searched = oss.compare(model, unseen, contest)
    return float(uniform.mse.mean()), float(searched.mse.mean())


@pytest.mark.parametrize("grid", ["edm", "ddim", "flow"])
def test_searched_steps_beat_uniform_ones_for_every_teacher_schedule(grid: str) -> None:
    """The bundled network; the paper's claim at 100 teacher steps (table 2), here with 30."""
    uniform, searched = scores(oss.models.load("digits"), grid, 30, 5)
    assert searched < uniform


@pytest.mark.parametrize("steps", [100, 200, 500, 1000])
def test_every_teacher_size_of_the_paper_can_be_searched(steps: int) -> None:
    """A closed-form network, which a thousand steps are cheap for."""
    uniform, searched = scores(random_mixture(5), "flow", steps, 4)
    assert searched < uniform
