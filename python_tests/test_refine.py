"""Refinement: never worse than its start, and often the best there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    dp_search,
    each_family,
    each_seed,
    one_thread,  # noqa: F401
    random_case,
    random_mixture,
    random_times,
    recorded,
)
from oss_ext.models.evaluation import Evaluator
from oss_ext.refine import KEEP_BYTES, Runner, exhaustive, refine
from oss_ext.solvers import SOLVERS

STEPS = 3
each_reduce = pytest.mark.parametrize("reduce", ["mean", "log_mean"])


def error_of(model: Any, trajectory: oss.Trajectory, schedule: oss.Schedule, reduce: str) -> float:
    """The mean final error of a schedule, from a run of its own."""
    images = oss.sample(model, trajectory.noise, schedule)
    mse = (images - trajectory.final).double().square().flatten(1).mean(dim=1)
    return float(mse.log().mean().exp() if reduce == "log_mean" else mse.mean())


def starts_of(model: Any, trajectory: oss.Trajectory, steps: int = STEPS) -> list[oss.Schedule]:
    found = dp_search(model, trajectory, steps).schedule(steps)
    return [found, oss.baselines.uniform(trajectory, steps)]


# --- what it finds ------------------------------------------------------------------------------


@each_family
@each_reduce
@each_seed(2)
def test_it_is_never_worse_than_the_best_start(family: str, reduce: str, seed: int) -> None:
    model, trajectory = random_case(family, seed, steps=14, samples=5)
    starts = starts_of(model, trajectory)
    found = refine(model, trajectory, starts, reduce=reduce, validation=0)
    errors = [error_of(model, trajectory, s, reduce) for s in starts]
    assert found.start_error == pytest.approx(min(errors), rel=1e-9)
    assert found.start == starts[errors.index(min(errors))]
    assert found.error <= found.start_error
    # And it is what it says it is.
    assert found.error == pytest.approx(
        error_of(model, trajectory, found.schedule, reduce), rel=1e-9
    )
    assert found.schedule.cost == pytest.approx(
        error_of(model, trajectory, found.schedule, "mean"), rel=1e-9
    )


@each_reduce
def test_it_finds_the_optimum_of_most_small_cases(reduce: str) -> None:
    """Coordinate moves may end in a local optimum: within 5 % of the best in 3 of 4 cases."""
    near = []
    for seed in range(12):
        model, trajectory = random_case("mixture", seed, steps=12, samples=8)
        starts = starts_of(model, trajectory)
        found = refine(model, trajectory, starts, reduce=reduce, validation=0)
        _, best = exhaustive(model, trajectory, STEPS, reduce=reduce)
        assert found.error >= best * (1 - 1e-9)
        near.append(found.error <= 1.05 * best)
    assert sum(near) >= 9


@each_reduce
@pytest.mark.parametrize("start", ["free", "pinned"])
@each_seed(1)
def test_exhaustive_search_is_the_best_of_all(reduce: str, start: str, seed: int) -> None:
    model, trajectory = random_case("network", seed, steps=7, samples=2)
    schedule, error = exhaustive(model, trajectory, STEPS, reduce=reduce, start=start)
    rows = [7] if start == "pinned" else range(1, 8)
    paths = [p for p in itertools.combinations(range(7, 0, -1), STEPS) if p[0] in rows]
    errors = [
        error_of(model, trajectory, trajectory.schedule((*path, 0)), reduce) for path in paths
    ]
    assert error == pytest.approx(min(errors), rel=1e-9)
    assert error_of(model, trajectory, schedule, reduce) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("solver", ["dpmpp-2m", "unipc-3", "heun"])
@each_seed(1)
def test_a_schedule_of_any_solver_is_refined_and_replays(solver: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=14, samples=5)
    rows = [(14, 9, 5, 2, 0), (13, 10, 6, 3, 0)]
    starts = [trajectory.schedule(path, solver=solver) for path in rows]
    budget = 40 * SOLVERS[solver].evaluations
    found = refine(model, trajectory, starts, budget=budget, validation=0)
    errors = [error_of(model, trajectory, s, "log_mean") for s in starts]
    assert found.start_error == pytest.approx(min(errors), rel=1e-9)
    assert found.error <= found.start_error
    assert found.schedule.solver == solver
    again = error_of(model, trajectory, found.schedule, "log_mean")
    assert found.error == pytest.approx(again, rel=1e-9)
    assert found.nfe <= budget


@each_seed(2)
def test_a_pinned_start_stays(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=14, samples=4)
    pinned = dp_search(model, trajectory, STEPS, start="pinned").schedule(STEPS)
    found = refine(model, trajectory, pinned, start="pinned", validation=0)
    assert found.schedule.indices is not None
    assert found.schedule.indices[0] == 14
    assert found.schedule.objective is not None
    assert found.schedule.objective.start == "pinned"


@each_seed(1)
def test_what_is_worse_on_unseen_samples_is_not_returned(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=14, samples=8)
    found = refine(model, trajectory, starts_of(model, trajectory), validation=0.25)
    assert found.validation is not None
    assert found.start_validation is not None
    assert found.schedule.samples == 6
    # Worse than its start it may be, but not by more than two samples can tell.
    group = torch.arange(6, 8)
    runner = Runner(Evaluator(model, 8, 2), trajectory, "euler", STEPS)
    assert found.schedule.indices is not None
    assert found.start.indices is not None
    after, before = (runner.errors(s.indices, group).log() for s in (found.schedule, found.start))
    difference = after - before
    assert float(difference.mean()) <= float(difference.std(correction=0)) / math.sqrt(2) + 1e-9
    assert math.log(found.validation) == pytest.approx(float(after.mean()))
    assert math.log(found.start_validation) == pytest.approx(float(before.mean()))


@each_seed(1)
def test_a_result_is_a_schedule_like_any_other(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=14, samples=4)
    found = refine(model, trajectory, starts_of(model, trajectory), validation=0)
    schedule = found.schedule
    assert schedule.method == "refined"
    assert oss.Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.search_nfe >= found.start.search_nfe
    # All that it cost: the teacher, the search that one of the starts came from, the descent.
    searched = max(s.search_nfe for s in starts_of(model, trajectory))
    assert schedule.search_nfe == searched + round(found.nfe)
    alone = refine(model, trajectory, oss.baselines.uniform(trajectory, STEPS), validation=0)
    assert alone.schedule.search_nfe == trajectory.nfe + round(alone.nfe)
    assert f"{STEPS} steps refined: error " in found.summary()


# --- how it runs --------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("group", [1, 2, SAMPLES])
@pytest.mark.parametrize("keep", [0, KEEP_BYTES])
@each_seed(1)
def test_paths_run_from_where_they_part_are_those_run_whole(
    family: str, group: int, keep: int, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=9)
    runner = Runner(Evaluator(model, SAMPLES, group), trajectory, "euler", 3, keep)
    for rows in [(9, 5, 2, 0), (9, 5, 1, 0), (8, 5, 2, 0), (9, 6, 2, 0), (9, 5, 2, 0)]:
        errors = torch.cat([runner.errors(rows, g) for g in runner.groups(range(SAMPLES))])
        whole = oss.sample(model, trajectory.noise, trajectory.schedule(rows))
        expected = (whole - trajectory.final).double().square().flatten(1).mean(dim=1)
        torch.testing.assert_close(errors, expected, rtol=1e-9, atol=0)


@each_seed(1)
def test_a_moved_knot_costs_the_evaluations_after_it(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=9)
    evaluator = Evaluator(model, SAMPLES)
    runner = Runner(evaluator, trajectory, "euler", 4)
    group = torch.arange(SAMPLES)
    spent = []
    for rows in [(9, 6, 3, 1, 0), (9, 6, 3, 2, 0), (9, 6, 4, 2, 0), (9, 6, 3, 1, 0)]:
        before = evaluator.nfe
        runner.errors(rows, group)
        spent.append((evaluator.nfe - before) // SAMPLES)
    assert spent == [4, 1, 2, 0]


@each_seed(1)
def test_with_room_for_one_path_what_most_paths_begin_with_is_kept(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=9)
    evaluator = Evaluator(model, SAMPLES, 1)
    runner = Runner(evaluator, trajectory, "euler", 8, keep_bytes=0)
    base = (9, 8, 7, 6, 5, 4, 3, 2, 0)
    spent = []
    for rows in [base, (*base[:7], 1, 0), (*base[:6], 2, 1, 0), (*base[:5], 3, 2, 1, 0), base]:
        before = evaluator.nfe
        for sample in range(SAMPLES):
            runner.errors(rows, torch.tensor([sample]))
        spent.append((evaluator.nfe - before) // SAMPLES)
    # The ends of paths are no states, and never forgotten.
    assert spent == [8, 1, 2, 3, 0]


@each_seed(1)
def test_a_moved_knot_costs_the_stages_after_it_too(seed: int) -> None:
    """Two evaluations a step, and one in the step to the clean end."""
    model, trajectory = random_case("mixture", seed, steps=9)
    evaluator = Evaluator(model, SAMPLES)
    runner = Runner(evaluator, trajectory, "heun", 4)
    group = torch.arange(SAMPLES)
    spent = []
    for rows in [(9, 6, 3, 1, 0), (9, 6, 3, 2, 0), (9, 6, 4, 2, 0), (9, 6, 3, 1, 0)]:
        before = evaluator.nfe
        errors = runner.errors(rows, group)
        spent.append((evaluator.nfe - before) // SAMPLES)
        whole = oss.sample(model, trajectory.noise, trajectory.schedule(rows, solver="heun"))
        expected = (whole - trajectory.final).square().flatten(1).mean(dim=1)
        torch.testing.assert_close(errors, expected, rtol=1e-9, atol=0)
    assert spent == [7, 2, 4, 0]


def test_samples_keep_their_conditions_in_their_groups() -> None:
    """A group's rows are evaluated as the samples they are, not as the first ones."""
    model, trajectory = random_case("network", 3, steps=6, samples=6)
    listening, calls = recorded(model)
    evaluator = Evaluator(listening, 6, 2)
    runner = Runner(evaluator, trajectory, "euler", 1)
    for group in runner.groups(range(6)):
        runner.errors((6, 0), group)
    assert [call.sample.tolist() for call in calls] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("budget", [18, 40, 200])
@each_seed(1)
def test_a_budget_is_kept(budget: int, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=14, samples=8)
    found = refine(model, trajectory, starts_of(model, trajectory), budget=budget)
    assert found.nfe <= budget
    assert found.error <= found.start_error


def test_a_check_on_few_samples_does_not_choose_what_is_worse_than_the_start() -> None:
    """Two validation samples speak for a descent from the worse start, which ended above it."""
    model, trajectory = random_case("mixture", 1858007483, steps=14, samples=8)
    found = refine(model, trajectory, starts_of(model, trajectory), budget=18)
    assert found.error <= found.start_error


@each_seed(1)
def test_more_budget_is_no_worse(seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=20, samples=4)
    start = oss.baselines.uniform(trajectory, STEPS)
    errors = [
        refine(model, trajectory, start, budget=budget, validation=0).error
        for budget in (15, 60, 240)
    ]
    assert errors == sorted(errors, reverse=True)


# --- bad input ----------------------------------------------------------------------------------


def case() -> tuple[Any, oss.Trajectory, oss.Schedule]:
    model = random_mixture(1)
    trajectory = oss.teacher(model, model.noise(4, 1), times=random_times(1, 8))
    return model, trajectory, oss.baselines.uniform(trajectory, STEPS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "max"}, "reduce: expected one of"),
        ({"start": "loose"}, "start: expected one of"),
        ({"budget": 8}, "budget: expected 12 or more, got 8"),
        ({"budget": 0}, "budget: expected at least 1, got 0"),
        ({"descents": 0}, "descents: expected at least 1, got 0"),
        ({"validation": 0.1}, "validation: expected a share below 1 that leaves out a sample"),
        ({"validation": 1.0}, "validation: expected a share below 1"),
        ({"validation": math.nan}, "validation: expected a finite number"),
        ({"max_batch": 0}, "max_batch: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    model, trajectory, start = case()
    with pytest.raises(ValueError, match=f"^{message}"):
        refine(model, trajectory, start, **options)


def test_starts_are_schedules_of_a_kind_on_the_grid() -> None:
    model, trajectory, start = case()
    other = oss.baselines.uniform(trajectory, 4)
    elsewhere = oss.teacher(model, model.noise(4, 1), times=random_times(2, 8))
    for starts, message in [
        ([], "expected one or more schedules"),
        ([start, 3], "expected a Schedule, got int"),
        ([start, other], r"expected schedules of as many steps, got \[3, 4\]"),
        (oss.baselines.uniform(elsewhere, STEPS), "expected schedules on the teacher's grid"),
        (start.split(at=0.5)[0], "expected schedules on the teacher's grid, to its clean end"),
    ]:
        with pytest.raises(ValueError, match=f"^starts: {message}"):
            refine(model, trajectory, starts)  # type: ignore[arg-type]
    below = trajectory.schedule((6, 3, 1, 0))
    with pytest.raises(ValueError, match=r"^start: expected starts that begin at the teacher's"):
        refine(model, trajectory, below, start="pinned")


def test_another_model_and_too_many_schedules_are_refused() -> None:
    model, trajectory, start = case()
    with pytest.raises(ValueError, match=r"^model: expected the teacher's"):
        refine(random_mixture(2), trajectory, start)
    with pytest.raises(ValueError, match=r"^steps: expected at most 10 schedules to try, got 56"):
        exhaustive(model, trajectory, STEPS, most=10)
