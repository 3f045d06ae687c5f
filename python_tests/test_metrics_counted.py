"""Evaluations at candidates: all of them counted, and never more than planned."""

from __future__ import annotations

from typing import Any

import pytest

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    assert_replays,
    each_reduction,
    each_seed,
    each_start,
    one_thread,  # noqa: F401
)
from metric_cases import METRICS, case, each_metric, each_solver
from oss_ext import coarse, dp
from oss_ext.models.evaluation import Evaluator
from oss_ext.plan import plan
from oss_ext.solvers import SOLVERS

STEPS = 3


@each_metric
@each_solver
@each_start
@each_reduction
def test_evaluations_are_counted_and_within_the_plan(
    metric: str, solver: str, start: str, reduce: str
) -> None:
    model, trajectory = case(3, steps=9)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.networks()[""].register_forward_hook(count)
    evaluator = Evaluator(model, SAMPLES, max_batch=1)
    options = {"reduce": reduce, "start": start, "solver": solver, "metric": METRICS[metric]}
    dp.run(evaluator, trajectory, STEPS, **options)
    assert evaluator.nfe == calls
    per_step = SOLVERS[solver].evaluations
    planned = SAMPLES * dp.evaluations(9, STEPS, start, per_step, evaluated=True)
    # The highest target of a step has one candidate, or fewer than FEW.
    least = planned - SAMPLES * STEPS * dp.FEW * per_step
    if start == "pinned":  # the first step has one source, every target one candidate
        least -= SAMPLES * 9 * dp.FEW * per_step
    assert least <= evaluator.nfe <= planned


def test_the_plan_is_the_sum_that_it_says() -> None:
    first, later = 9, 8 + 7
    assert dp.evaluations(9, 3, "free", evaluated=True) == first + 8 + dp.FEW * later
    assert dp.evaluations(9, 3, "pinned", evaluated=True) == 1 + 8 + dp.FEW * later
    heun = dp.FEW * (8 + 7 + 6)
    assert dp.evaluations(9, 3, "free", 2, evaluated=True) == first + 8 + dp.FEW * later + heun


@each_metric
@each_reduction
@each_start
@pytest.mark.parametrize("stride", [2, 3, 5])
@each_seed(1)
def test_a_search_from_coarse_to_fine_spends_what_it_says(
    metric: str, reduce: str, start: str, stride: int, seed: int
) -> None:
    model, trajectory = case(seed, steps=20)
    evaluator = Evaluator(model, SAMPLES)
    options = {"reduce": reduce, "start": start, "stride": stride}
    table = coarse.coarse_to_fine(evaluator, trajectory, [2, 4], metric=METRICS[metric], **options)
    planned = coarse.evaluations(20, [2, 4], start, stride, evaluated=True)
    assert evaluator.nfe <= SAMPLES * planned
    assert_replays(model, trajectory, table, "euler", 4)


@pytest.mark.parametrize("quality", ["dp", "best"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("metric", ["x0-candidate", "perceptual:inner.1"])
@each_seed(1)
def test_a_search_keeps_to_its_plan_and_names_its_metric(
    quality: str, solver: str, metric: str, seed: int
) -> None:
    model, trajectory = case(seed, steps=30, samples=8)
    options: dict[str, Any] = {"quality": quality, "solver": solver, "reduce": "mean"}
    result = oss.search(model, trajectory, 4, metric=metric, **options)
    assert result.nfe <= result.plan.nfe
    assert result.objective.metric == metric
    schedule = result.schedule(4)
    assert schedule.objective is not None
    assert schedule.objective.metric == (metric if quality == "dp" else "xt")  # of refinement
    images = oss.sample(model, trajectory.noise, schedule)
    errors = (images - trajectory.final).square().flatten(1).mean(dim=1)
    assert float(errors[: schedule.samples].mean()) == pytest.approx(schedule.cost, rel=1e-9)


def test_a_plan_knows_of_evaluations_at_candidates() -> None:
    plain = plan("best", 200, [5, 10])
    evaluated = plan("best", 200, [5, 10], metric=METRICS["x0-candidate"])
    assert evaluated.table == dp.evaluations(200, 10, "free", evaluated=True) > plain.table
    expected = coarse.evaluations(200, [5, 10], "free", evaluated.stride, evaluated=True)
    assert evaluated.coarse == expected > 0
    assert evaluated.nfe <= plain.nfe


@pytest.mark.parametrize("metric", ["x0", "x0-candidate"])
@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_a_metric_that_nothing_would_be_compared_by_is_refused(quality: str, metric: str) -> None:
    model, trajectory = case(1, steps=12)
    with pytest.raises(ValueError, match=rf"^metric: expected 'xt' where quality {quality!r} runs"):
        oss.search(model, trajectory, 4, quality=quality, metric=metric, budget=100)
