"""Searches of a quality: what they may spend, what they return, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

import oss_ext as oss
from driver_cases import (
    dp_search,
    each_family,
    each_seed,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext import beam, coarse, dp
from oss_ext.models.evaluation import Evaluator
from oss_ext.plan import LEAST_RUNS, LEAST_SPLIT, QUALITIES, plan
from oss_ext.refine import least_runs

REFINING = QUALITIES[1:]
each_quality = pytest.mark.parametrize("quality", REFINING)


def error_of(model: Any, trajectory: oss.Trajectory, schedule: oss.Schedule) -> float:
    """The geometric mean of the final errors."""
    (score,) = oss.compare(model, trajectory, {"s": schedule})
    return float(score.mse.clamp_min(1e-30).log().mean().exp())


# --- the plan -----------------------------------------------------------------------------------


def test_the_dynamic_programme_alone_spends_what_the_paper_does() -> None:
    made = plan("dp", 200, [5, 10])
    assert (made.table, made.refine, made.nfe) == (1955, {}, 1955)
    assert plan("dp", 200, [5, 10], "pinned").nfe == dp.evaluations(200, 10, "pinned")


@pytest.mark.parametrize(
    ("quality", "steps", "nfe"),
    [
        ("fast", 10, 231),  # (200 + 1955) / 5 - 200
        ("fast", 20, 602),
        ("balanced", 5, 395),
        ("balanced", 10, 877),
        ("best", 10, 6265),  # 3 (200 + 1955) - 200, the dynamic programme among it
        ("fast", 5, 38),
    ],
)
def test_a_quality_is_a_share_of_what_the_paper_spends(quality: str, steps: int, nfe: int) -> None:
    assert nfe - 1 <= plan(quality, 200, [steps]).nfe <= nfe  # shares are rounded down


def test_every_number_of_steps_has_its_share() -> None:
    together = plan("fast", 200, [5, 10])
    alone = [plan("fast", 200, [steps]).nfe for steps in (5, 10)]
    assert together.nfe == pytest.approx(sum(alone), abs=2)
    assert together.refine[10] > 2 * together.refine[5] > 0
    assert plan("balanced", 200, [5, 10]).nfe == pytest.approx(395 + 877, abs=2)


@pytest.mark.parametrize(
    ("teacher_steps", "budgets", "stride", "part"),
    [
        (200, [10], 4, 12),
        (200, [5, 10], 4, 12),
        (100, [10], 4, 6),
        (50, [5], 4, 6),
        (50, [20], 0, 0),
    ],
)
def test_a_balanced_search_is_coarse_on_fewer_samples_rather_than_on_fewer_rows(
    teacher_steps: int, budgets: list[int], stride: int, part: int
) -> None:
    made = plan("balanced", teacher_steps, budgets, samples=16)
    assert (made.stride, made.coarse_samples) == (stride, part)


def test_a_search_from_coarse_to_fine_takes_half_of_a_balanced_one_at_most() -> None:
    for budgets in ([10], [20], [5, 10, 20]):
        made = plan("balanced", 200, budgets)
        assert 0 < made.coarse <= sum(made.refine.values()) + len(budgets)
        assert made.coarse == coarse.evaluations(200, budgets, "free", made.stride)
    assert plan("balanced", 12, [12]).coarse == 0  # nothing is coarser than that
    assert plan("fast", 200, [5]).coarse == plan("dp", 200, [10]).coarse == 0


@pytest.mark.parametrize(
    ("samples", "part", "stride"), [(1, 1, 16), (7, 4, 16), (12, 5, 8), (16, 6, 8), (64, 24, 8)]
)
def test_a_fast_search_is_coarse_on_half_of_the_samples(
    samples: int, part: int, stride: int
) -> None:
    made = plan("fast", 200, [10], samples=samples)
    assert (made.stride, made.band, made.coarse_samples) == (stride, 0, part)
    own = coarse.evaluations(200, [10], "free", stride, band=0)
    assert made.coarse == math.ceil(part * own / samples)
    assert made.nfe == pytest.approx(231, abs=1)


@pytest.mark.parametrize("samples", [LEAST_SPLIT, 13, 16, 512])
def test_dynamic_programmes_cost_less_where_samples_are_left_out(samples: int) -> None:
    made, whole = plan("best", 200, [10], samples=samples), plan("best", 200, [10])
    assert made.held_out == samples // 4
    share = (samples - made.held_out) / samples
    assert made.table == math.ceil(share * whole.table)
    coarse_cost = coarse.evaluations(200, [10], "free", made.stride)
    assert made.coarse == math.ceil(share * coarse_cost)
    assert made.nfe == pytest.approx(whole.nfe, abs=2)  # refinement has what they do not take
    assert plan("dp", 200, [10], samples=samples) == plan("dp", 200, [10])


@each_quality
def test_a_descent_is_never_given_less_than_it_needs(quality: str) -> None:
    assert plan(quality, 12, [4]).refine[4] >= LEAST_RUNS * 4
    assert least_runs(1, 1) <= LEAST_RUNS


@each_quality
@pytest.mark.parametrize("budget", [2100, 2500, 4000])
def test_a_budget_caps_the_plan(quality: str, budget: int) -> None:
    made, free = plan(quality, 200, [5, 10], budget=budget), plan(quality, 200, [5, 10])
    assert made.nfe <= min(budget, free.nfe)
    assert made.nfe >= min(budget, free.nfe) - 2  # it is used
    assert made.table == free.table


def test_a_plan_says_where_evaluations_go() -> None:
    assert str(plan("fast", 200, [5, 10], samples=16)) == (
        "fast: at most 268 evaluations per sample (83 from coarse to fine, 34 to refine 5 steps, "
        "151 to refine 10 steps)"
    )
    assert str(plan("dp", 200, [10])) == (
        "dp: 1955 evaluations per sample (1955 for the dynamic programme)"
    )


@pytest.mark.parametrize("quality", ["", "quick", None, 3])
def test_unknown_qualities_are_refused_with_the_known_ones(quality: Any) -> None:
    with pytest.raises(ValueError, match=r"^quality: expected one of dp, fast, .*, got"):
        plan(quality, 200, [5])


@pytest.mark.parametrize(("quality", "needed"), [("fast", 30), ("best", 1020), ("dp", 990)])
def test_a_budget_that_pays_for_nothing_is_refused(quality: str, needed: int) -> None:
    assert plan(quality, 200, [5], budget=needed).nfe == needed
    with pytest.raises(
        ValueError, match=rf"^budget: expected at least {needed} .*got {needed - 1}"
    ):
        plan(quality, 200, [5], budget=needed - 1)


# --- the search ---------------------------------------------------------------------------------


@each_quality
@each_family
@pytest.mark.parametrize("samples", [4, 9])
@each_seed(1)
def test_it_spends_what_was_said_and_counts_it(
    quality: str, family: str, samples: int, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=30, samples=samples)
    result = oss.search(model, trajectory, [3, 5], quality=quality)
    assert result.nfe <= result.plan.nfe
    assert result.plan == plan(quality, 30, [3, 5], samples=samples)
    for steps in (3, 5):
        schedule = result.schedule(steps)
        assert (schedule.steps, schedule.method) == (steps, "refined")
        assert schedule.search_nfe <= trajectory.nfe + result.nfe
        assert result.cost(steps) == schedule.cost
        assert f"{steps} steps refined" in result.summary()
        assert result.cheaper(steps) is None


@each_quality
@each_family
@each_seed(2)
def test_it_is_never_worse_than_uniform_steps(quality: str, family: str, seed: int) -> None:
    model, trajectory = random_case(family, seed, steps=30, samples=4)
    found = oss.search(model, trajectory, 4, quality=quality).schedule(4)
    uniform = oss.baselines.uniform(trajectory, 4)
    assert error_of(model, trajectory, found) <= error_of(model, trajectory, uniform) * (1 + 1e-9)


@each_seed(2)
def test_the_best_is_never_worse_than_the_dynamic_programme(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=30, samples=4)
    best = oss.search(model, trajectory, 4, quality="best").schedule(4)
    paper = dp_search(model, trajectory, 4).schedule(4)
    assert error_of(model, trajectory, best) <= error_of(model, trajectory, paper) * (1 + 1e-9)


def test_other_budgets_of_the_best_are_the_tables_and_say_so() -> None:
    model, trajectory = random_case("mixture", 0, steps=20, samples=3)
    result = oss.search(model, trajectory, [2, 5], quality="best")
    table = dp_search(model, trajectory, 5)
    for steps in (1, 3, 4):
        assert result.schedule(steps).method == "oss"
        assert result.schedule(steps).indices == table.schedule(steps).indices


@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_without_a_table_other_budgets_are_refused(quality: str) -> None:
    model, trajectory = random_case("mixture", 0, steps=20, samples=3)
    result = oss.search(model, trajectory, [2, 5], quality=quality)
    for ask in (result.schedule, result.cost, result.cheaper):
        with pytest.raises(
            ValueError, match=r"^steps: this search has schedules of 2, 5 steps, .* 3"
        ):
            ask(3)


@each_quality
@each_seed(2)
def test_the_least_budget_is_enough(quality: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=20, samples=8)
    least = sum(LEAST_RUNS * k for k in (3, 4)) + plan(quality, 20, [4], samples=8).table
    result = oss.search(model, trajectory, [3, 4], quality=quality, budget=least)
    assert result.nfe <= least
    assert result.schedule(4).method == "refined"


@pytest.mark.parametrize("quality", ["dp", "best"])
@each_seed(2)
def test_a_beam_takes_the_place_of_the_dynamic_programme(quality: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=16, samples=4)
    result = oss.search(model, trajectory, [2, 4], quality=quality, beam=3)
    assert result.plan.table == beam.evaluations(16, 4, 3)
    assert result.table is not None
    evaluator = Evaluator(model, 4)
    paths = beam.beam(evaluator, trajectory, 4, width=3, reduce="log_mean").paths(3)
    schedule = result.schedule(3)
    assert (schedule.indices, schedule.method) == (paths[0][0], "oss")
    geometric = float(result.table.cost[2, 0].log().mean().exp())
    assert geometric == pytest.approx(paths[0][1], rel=1e-6)
    assert error_of(model, trajectory, schedule) == pytest.approx(paths[0][1], rel=1e-4)
    if quality == "dp":
        assert result.nfe == evaluator.nfe // 4 == result.plan.nfe


@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_a_beam_needs_a_dynamic_programme(quality: str) -> None:
    model, trajectory = random_case("mixture", 0, steps=16, samples=3)
    with pytest.raises(ValueError, match=r"^beam: expected 1 with quality .*, got 2"):
        oss.search(model, trajectory, 2, quality=quality, beam=2)


def test_balanced_is_the_default_and_the_programme_alone_of_an_instance_search() -> None:
    model, trajectory = random_case("mixture", 0, steps=20, samples=3)
    assert oss.search(model, trajectory, 2).plan.quality == "balanced"
    assert oss.search(model, trajectory, 2, scope="instance").plan.quality == "dp"


@pytest.mark.parametrize("steps", [1, 6])
@each_quality
def test_one_step_and_all_steps(quality: str, steps: int) -> None:
    model, trajectory = random_case("mixture", 0, steps=6, samples=3)
    schedule = oss.search(model, trajectory, steps, quality=quality).schedule(steps)
    assert schedule.steps == steps
    if steps == 6:
        assert schedule.indices == (6, 5, 4, 3, 2, 1, 0)


@each_quality
def test_a_pinned_start_stays(quality: str) -> None:
    model, trajectory = random_case("mixture", 1, steps=20, samples=3)
    schedule = oss.search(model, trajectory, 4, quality=quality, start="pinned").schedule(4)
    assert schedule.indices is not None
    assert schedule.indices[0] == 20
    assert not schedule.starts_below


@each_family
def test_knots_off_the_grid_are_no_worse_and_run_as_said(family: str) -> None:
    model, trajectory = random_case(family, 3, steps=8, samples=4)
    on = oss.search(model, trajectory, 3, quality="best")
    off = oss.search(model, trajectory, 3, quality="best", off_grid=True)
    assert off.refined[3].error <= on.refined[3].error * (1 + 1e-9)
    schedule = off.schedule(3)
    assert schedule.times[-1] == float(trajectory.times[0])
    assert off.refined[3].error == pytest.approx(error_of(model, trajectory, schedule), rel=1e-6)
    assert (schedule.indices is None) == any(
        t not in trajectory.times.tolist() for t in schedule.times
    )


@pytest.mark.parametrize("samples", [1, LEAST_SPLIT - 1, LEAST_SPLIT])
def test_samples_are_left_out_where_there_are_enough(samples: int) -> None:
    model, trajectory = random_case("mixture", 1, steps=12, samples=samples)
    found = oss.search(model, trajectory, 3, quality="fast").refined[3]
    assert (found.validation is None) == (samples < LEAST_SPLIT)
    assert found.schedule.samples == samples - (samples // 4 if samples >= LEAST_SPLIT else 0)


def test_the_result_is_the_same_again() -> None:
    model, trajectory = random_case("mixture", 5, steps=20, samples=4)
    first, second = (oss.search(model, trajectory, 4).schedule(4) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "fast", "scope": "instance"}, "quality: expected 'dp' with scope"),
        ({"quality": "dp", "off_grid": True}, "off_grid: expected a quality that refines"),
        ({"budget": 5}, "budget: expected at least 12 "),
        ({"budget": 0}, "budget: expected at least 1"),
        ({"budget": 2.5}, "budget: expected a whole number"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(
    options: dict[str, Any], message: str
) -> None:
    model, trajectory = random_case("mixture", 0, steps=20, samples=3)
    with pytest.raises(ValueError, match=f"^{message}"):
        oss.search(model, trajectory, 2, **options)


def test_the_gain_is_measured_in_decibels() -> None:
    model, trajectory = random_case("mixture", 2, steps=20, samples=4)
    found = oss.search(model, trajectory, 3).refined[3]
    gain = 10 * math.log10(found.start_error / found.error)
    assert f"({gain:.2f} dB)" in found.summary()
