"""Coarse to fine: a search near the paths of a cheaper one, and what it may and does cost."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    each_family,
    each_reduction,
    each_seed,
    each_start,
    faulty,
    fill_table,
    one_thread,  # noqa: F401
    random_case,
    random_mixture,
    random_times,
    recorded,
)
from oss_ext import dp
from oss_ext.coarse import coarse_to_fine, evaluations
from oss_ext.models import Model
from oss_ext.models.evaluation import Evaluator, NonFiniteError

BLOCK = 32
"""Rows per model call: whole steps."""


def search(
    model: Model,
    trajectory: oss.Trajectory,
    budgets: Sequence[int],
    *,
    reduce: str = "none",
    **options: Any,
) -> dp.Table:
    evaluator = Evaluator(model, trajectory.samples, BLOCK)
    return coarse_to_fine(evaluator, trajectory, budgets, reduce=reduce, **options)


def coarse_paths(
    model: Model, trajectory: oss.Trajectory, steps: int, stride: int, **options: Any
) -> list[tuple[int, ...]]:
    """The coarse path of every sample, or the joint one, in rows of the full grid."""
    seen, rows = trajectory.thinned(stride)
    table = fill_table(model, seen, steps, max_batch=BLOCK, **options)
    columns = range(table.parent.shape[2])
    return [tuple(rows[i] for i in table.backtrack(steps, column)) for column in columns]


# --- what it finds ------------------------------------------------------------------------------


@each_family
@each_start
@each_reduction
@each_seed(1)
def test_replay_reproduces_the_table(family: str, start: str, reduce: str, seed: int) -> None:
    model, trajectory = random_case(family, seed, steps=18)
    table = search(model, trajectory, [2, 4], reduce=reduce, start=start, stride=4)
    assert table.steps == 4
    for column in range(table.parent.shape[2]):
        samples = [column] if reduce == "none" else list(range(SAMPLES))
        for steps in range(1, 5):
            path = table.backtrack(steps, column)
            assert path[0] == 18 or start == "free"
            _, errors = dp.replay(model, trajectory, path)
            expected = torch.stack([table.cost[k, row] for k, row in enumerate(path[1:])])
            torch.testing.assert_close(
                errors[:, samples], expected[:, samples], rtol=1e-9, atol=1e-24
            )


@each_family
@each_start
@each_reduction
@each_seed(1)
def test_a_band_over_all_rows_is_the_full_search(
    family: str, start: str, reduce: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=14)
    options = {"reduce": reduce, "start": start}
    table = search(model, trajectory, [4], stride=3, band=14, **options)
    full = fill_table(model, trajectory, 4, max_batch=BLOCK, **options)
    assert torch.equal(table.parent, full.parent)
    assert torch.equal(table.cost, full.cost)


@each_start
@each_reduction
@pytest.mark.parametrize("stride", [1, 4])
@each_seed(1)
def test_a_band_of_nothing_is_the_coarse_path(
    start: str, reduce: str, stride: int, seed: int
) -> None:
    model, trajectory = random_case("network", seed, steps=14)
    options = {"reduce": reduce, "start": start}
    table = search(model, trajectory, [4], stride=stride, band=0, **options)
    expected = coarse_paths(model, trajectory, 4, stride, **options)
    assert [table.backtrack(4, column) for column in range(len(expected))] == expected
    seen, _ = trajectory.thinned(stride)
    cost = fill_table(model, seen, 4, **options).cost[3, 0]
    torch.testing.assert_close(table.cost[3, 0], cost, rtol=1e-9, atol=1e-24)


@each_start
@each_reduction
@pytest.mark.parametrize("band", [None, 1])
@each_seed(1)
def test_every_knot_lies_near_one_of_a_coarse_path(
    start: str, reduce: str, band: int | None, seed: int
) -> None:
    model, trajectory = random_case("mixture", seed, steps=30)
    options = {"reduce": reduce, "start": start}
    budgets, width = [3, 5], 4 if band is None else band
    table = search(model, trajectory, budgets, stride=4, band=band, **options)
    near = {m: coarse_paths(model, trajectory, m, 4, **options) for m in budgets}
    for column in range(table.parent.shape[2]):
        for steps in budgets:
            for k, row in enumerate(table.backtrack(steps, column)[:-1]):
                knots = [near[m][column][k] for m in budgets if k < m]
                assert min(abs(row - knot) for knot in knots) <= width


@each_seed(3)
def test_the_band_holds_the_rows_of_every_budgets_path(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=30)
    paths = [coarse_paths(model, trajectory, m, 3, reduce="mean")[0] for m in (2, 4)]
    expected, top = dp.evaluations(10, 4, "free"), 31
    for k in range(4):
        sources = {path[k] for path in paths if k < len(path) - 1 and path[k] < top}
        expected, top = expected + len(sources), max(sources)
    evaluator = Evaluator(model, SAMPLES, BLOCK)
    coarse_to_fine(evaluator, trajectory, [2, 4], reduce="mean", stride=3, band=0)
    assert evaluator.nfe == SAMPLES * expected


@each_start
@each_seed(4)
def test_a_single_step_is_never_above_the_coarse_one(start: str, seed: int) -> None:
    """With more steps it may be: the nearest states are not those that end nearest."""
    model, trajectory = random_case("network", seed, steps=18)
    seen, _ = trajectory.thinned(4)
    coarse = fill_table(model, seen, 1, start=start)
    table = search(model, trajectory, [1], start=start, stride=4)
    assert (table.cost[0, 0] <= coarse.cost[0, 0] * (1 + 1e-12)).all()


@each_seed(1)
def test_every_sample_has_its_own_band(seed: int) -> None:
    model = random_mixture(seed)
    noise, times = model.noise(SAMPLES, seed), random_times(seed, 18)
    table = search(model, oss.teacher(model, noise, times=times), [4], stride=4, band=1)
    for b in range(SAMPLES):
        own = search(model, oss.teacher(model, noise[[b]], times=times), [4], stride=4, band=1)
        assert torch.equal(table.parent[:, :, [b]], own.parent)
        torch.testing.assert_close(table.cost[:, :, [b]], own.cost, rtol=1e-9, atol=1e-24)


def test_it_ends_where_the_full_search_does_for_a_part_of_its_evaluations() -> None:
    """In the median: now and then the coarse paths lie elsewhere, and so does what is found."""
    ratios = []
    for seed in range(7):
        model = random_mixture(seed)
        trajectory = oss.teacher(model, model.noise(SAMPLES, seed), 48)
        evaluator = Evaluator(model, SAMPLES, BLOCK)
        table = coarse_to_fine(evaluator, trajectory, [5], reduce="log_mean", stride=4)
        full = fill_table(model, trajectory, 5, reduce="log_mean", max_batch=BLOCK)
        assert evaluator.nfe <= 0.45 * SAMPLES * dp.evaluations(48, 5, "free")
        ratios.append(float((table.cost[4, 0].log() - full.cost[4, 0].log()).mean().exp()))
    assert 0.9 < statistics.median(ratios) < 1.05


# --- what it costs ------------------------------------------------------------------------------


@each_start
@each_reduction
@each_seed(4)
def test_it_never_takes_more_evaluations_than_it_said(start: str, reduce: str, seed: int) -> None:
    draw = random.Random(seed)
    n = draw.randint(5, 24)
    stride = draw.randint(1, 5)
    budgets = draw.choices(range(1, min(5, math.ceil(n / stride)) + 1), k=draw.randint(1, 3))
    band = draw.choice([None, 0, 1, 2, 6])
    model, trajectory = random_case("mixture", seed % 2**32, steps=n)
    evaluator = Evaluator(model, SAMPLES, BLOCK)
    options: dict[str, Any] = {"start": start, "stride": stride, "band": band}
    coarse_to_fine(evaluator, trajectory, budgets, reduce=reduce, **options)
    assert evaluator.nfe <= SAMPLES * evaluations(n, budgets, **options)


@each_start
@each_reduction
@pytest.mark.parametrize("band", [0, 14])
def test_the_bound_is_met_where_no_bands_overlap_or_all_do(
    start: str, reduce: str, band: int
) -> None:
    model, trajectory = random_case("mixture", 5, steps=14)
    evaluator = Evaluator(model, SAMPLES, BLOCK)
    coarse_to_fine(evaluator, trajectory, [4], reduce=reduce, start=start, stride=3, band=band)
    assert evaluator.nfe == SAMPLES * evaluations(14, [4], start, 3, band)


def test_the_bound_is_the_formula() -> None:
    n, m = 200, 10
    assert evaluations(n, [m], "free", 8) == dp.evaluations(25, m, "free") + m * 17
    assert evaluations(n, [m], "pinned", 8) == dp.evaluations(25, m, "pinned") + 1 + (m - 1) * 17
    both = dp.evaluations(25, m, "free") + 5 * 2 * 17 + 5 * 17
    assert evaluations(n, [5, m, 5], "free", 8) == both
    assert evaluations(n, [m], "free", 8, 1) == dp.evaluations(25, m, "free") + m * 3
    assert evaluations(9, [3], "free", 2) == dp.evaluations(5, 3, "free") + 5 * 3
    assert evaluations(9, [3], "free", 3) == dp.evaluations(3, 3, "free") + 7 + 7 + 7
    assert evaluations(9, [3], "free", 3, 4) == dp.evaluations(3, 3, "free") + 9 + 8 + 7


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": []}, r"^budgets: expected one whole number or more, got \[\]"),
        ({"budgets": 3}, "^budgets: expected one whole number or more, got 3"),
        ({"budgets": [3, 0]}, "^budgets: expected 1 to 14, got 0"),
        ({"budgets": [15]}, "^budgets: expected 1 to 14, got 15"),
        ({"budgets": ["3"]}, "^budgets: expected a whole number, .* got '3'"),
        ({"stride": 0}, "^stride: expected 1 to 14, got 0"),
        ({"stride": 15}, "^stride: expected 1 to 14, got 15"),
        ({"stride": 7}, "^stride: expected 1 to 6, which leaves the coarse grid 3 steps, got 7"),
        ({"budgets": [8]}, "^stride: expected 1 to 1, which leaves .* 8 steps, got 4"),
        ({"band": -1}, "^band: expected at least 0, got -1"),
        ({"band": 1.5}, "^band: expected a whole number, at least 0, got 1.5"),
        ({"start": "late"}, r"^start: expected one of .*, got 'late'"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_called(
    options: dict[str, Any], message: str
) -> None:
    model, trajectory = random_case("mixture", 1, steps=14)
    model, calls = recorded(model)
    given = {"budgets": [3], "start": "free", "stride": 4, "band": None} | options
    with pytest.raises(ValueError, match=message):
        search(model, trajectory, **given)
    assert not calls
    with pytest.raises(ValueError, match=message):
        evaluations(14, **given)


@pytest.mark.parametrize("budget", [1, 2, 5, 7, 8, 14])
def test_the_largest_stride_that_is_named_serves(budget: int) -> None:
    model, trajectory = random_case("mixture", 1, steps=14)
    strides = [s for s in range(1, 15) if trajectory.thinned(s)[0].steps >= budget]
    table = search(model, trajectory, [budget], stride=max(strides))
    assert len(table.backtrack(budget)) == budget + 1
    for stride in range(max(strides) + 1, 15):
        with pytest.raises(ValueError, match=f"^stride: expected 1 to {max(strides)}, which"):
            search(model, trajectory, [budget], stride=stride)


def test_no_finite_path_is_an_error_that_names_step_time_and_sample() -> None:
    model, trajectory = random_case("mixture", 1, steps=14)
    sick = faulty(model, lambda t, sample: sample == 2)
    with pytest.raises(NonFiniteError, match=r"^step 1 .* sample 2: .*'faulty'.* t = .* 2$"):
        search(sick, trajectory, [3])


def test_broken_rows_are_gone_around() -> None:
    model, trajectory = random_case("mixture", 1, steps=14)
    broken = [2, 3, 8, 11]
    sick = faulty(model, lambda t, sample: torch.isin(t, trajectory.times[broken]))
    table = search(sick, trajectory, [3], reduce="mean", stride=3)
    assert not set(table.backtrack(3)) & set(broken)
