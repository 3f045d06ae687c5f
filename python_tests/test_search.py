"""The public search: budgets, scopes, what the result says, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    SHAPE,
    dp_search,
    each_family,
    each_seed,
    one_thread,  # noqa: F401
    random_case,
    recorded,
)
from oss_ext import dp, models
from oss_ext.baselines import uniform
from oss_ext.metrics import Metric
from oss_ext.models import from_callable
from oss_ext.models.evaluation import Evaluator, NonFiniteError
from oss_ext.result import SearchResult
from oss_ext.schedule import Objective, aggregate_indices


def final_errors(model: models.Model, trajectory: oss.Trajectory, schedule: oss.Schedule) -> Tensor:
    (score,) = oss.compare(model, trajectory, {"s": schedule})
    return score.mse


def with_costs(result: SearchResult, costs: list[float]) -> SearchResult:
    """The result of a search in which k steps cost ``costs[k-1]``."""
    n, samples = result.trajectory.steps, result.trajectory.samples
    cost = torch.tensor(costs, dtype=torch.float64)[:, None, None].expand(-1, n + 1, samples)
    table = dp.Table(cost, torch.ones(len(costs), n + 1, 1, dtype=torch.int64))
    return replace(result, table=table, steps=(len(costs),))


@each_family
@pytest.mark.parametrize("reduce", [None, "mean", "log_mean"])
@pytest.mark.parametrize("start", ["free", "pinned"])
@each_seed(1)
def test_a_joint_search_gives_one_schedule_per_budget(
    family: str, reduce: str | None, start: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed)
    result = dp_search(model, trajectory, [4, 2], reduce=reduce, start=start)
    assert result.steps == (2, 4)
    for steps in range(1, 5):  # the budgets between come for free
        schedule = result.schedule(steps)
        assert schedule.steps == steps
        assert schedule.indices == result.table.backtrack(steps)
        errors = final_errors(model, trajectory, schedule)
        assert schedule.cost == pytest.approx(float(errors.mean()), rel=1e-11)
        assert result.cost(steps) == schedule.cost
        assert result.schedules(steps) == [schedule] * SAMPLES
        assert schedule.objective == Objective("joint", reduce or "log_mean", start)


@each_family
@each_seed(2)
def test_an_instance_search_gives_every_sample_its_own(family: str, seed: int) -> None:
    model, trajectory = random_case(family, seed)
    result = dp_search(model, trajectory, 3, scope="instance")
    schedules = result.schedules(3)
    assert len(schedules) == SAMPLES
    for sample, schedule in enumerate(schedules):
        assert schedule.indices == result.table.backtrack(3, sample)
        errors = final_errors(model, trajectory, schedule)
        assert schedule.cost == pytest.approx(float(errors[sample]), rel=1e-11)
        assert schedule.objective == Objective("instance", "none")
    with pytest.raises(ValueError, match=r"a schedule per sample: use schedules\(steps\)"):
        result.schedule(3)


@pytest.mark.parametrize("aggregate", ["mean", "median"])
@each_seed(2)
def test_instance_schedules_can_be_aggregated(aggregate: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed)
    result = dp_search(model, trajectory, 3, scope="instance", aggregate=aggregate)
    paths = [schedule.indices or () for schedule in result.schedules(3)]
    schedule = result.schedule(3)
    assert schedule.indices == aggregate_indices(paths, aggregate)
    assert schedule.cost is None  # nobody has run it
    assert schedule.objective == Objective("instance", "none", aggregate=aggregate)


@pytest.mark.parametrize("reduce", ["mean", "log_mean"])
@each_seed(3)
def test_one_step_is_the_best_for_the_chosen_mean(reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed)
    errors = torch.stack(
        [
            final_errors(model, trajectory, trajectory.schedule([row, 0]))
            for row in range(1, trajectory.steps + 1)
        ]
    )
    objective = errors if reduce == "mean" else errors.log()
    best = int(objective.mean(dim=1).argmin()) + 1
    assert dp_search(model, trajectory, 1, reduce=reduce).schedule(1).indices == (best, 0)


def test_a_searched_schedule_carries_its_origin() -> None:
    model, trajectory = random_case("network", 1)
    result = dp_search(model, trajectory, 3, start="pinned")
    schedule = result.schedule(3)
    assert (schedule.model, schedule.model_hash) == (model.name, model.fingerprint())
    assert (schedule.method, schedule.solver, schedule.path.name) == ("oss", "euler", "flow")
    assert schedule.samples == SAMPLES
    n = trajectory.steps
    assert result.nfe == 1 + (n - 1) + (n - 2)
    assert schedule.search_nfe == n + result.nfe
    assert schedule.times == tuple(float(trajectory.times[i]) for i in schedule.indices or ())


def test_more_budgets_change_no_schedule() -> None:
    model, trajectory = random_case("mixture", 5)
    alone = dp_search(model, trajectory, 2).schedule(2)
    together = dp_search(model, trajectory, (2, 5, 5)).schedule(2)
    assert replace(together, search_nfe=alone.search_nfe) == alone


def test_searching_twice_gives_the_same() -> None:
    model, trajectory = random_case("network", 6, dtype=torch.float32)
    first, second = (dp_search(model, trajectory, 4) for _ in range(2))
    assert first.schedule(4) == second.schedule(4)
    assert torch.equal(first.table.cost, second.table.cost)


def test_a_searched_schedule_beats_uniform_on_samples_it_has_not_seen() -> None:
    model = models.load("analytic", shape=[2, 4, 4], seed=3)
    trajectory = oss.teacher(model, model.noise(8, seed=0), 24)
    held_out = oss.teacher(model, model.noise(32, seed=1), 24)
    found = dp_search(model, trajectory, 5).schedule(5)
    searched, plain = oss.compare(model, held_out, {"oss": found, "uniform": uniform(held_out, 5)})
    assert searched.mean_psnr > plain.mean_psnr + 1


def test_the_summary_tells_what_was_spent_and_found() -> None:
    model, trajectory = random_case("mixture", 2)
    result = dp_search(model, trajectory, [2, 3], max_batch=4)
    first, spent, *found = result.summary().splitlines()
    assert first == (
        "analytic: 3 samples, teacher 9 steps (euler), dp, joint, log_mean, free start, "
        "student euler"
    )
    assert spent.startswith(
        "9 + 24 model evaluations per sample (teacher + search), in blocks of 4"
    )
    assert "peak memory" in spent
    assert [line.split(":")[0].strip() for line in found] == ["2 steps", "3 steps"]
    assert all(f"{result.cost(k):.3e}" in line for k, line in zip((2, 3), found, strict=True))
    assert result.seconds > 0
    assert result.peak_bytes > 2**20


def test_fewer_steps_that_cost_less_are_pointed_out() -> None:
    model, trajectory = random_case("mixture", 2)
    result = with_costs(dp_search(model, trajectory, 2), [3.0, 1.0, 2.0, 1.5])
    assert [result.cheaper(steps) for steps in (1, 2, 3, 4)] == [None, None, 2, 2]
    assert result.summary().endswith(" (2 steps cost less: 1.000e+00)")


@pytest.mark.parametrize("steps", [0, -1, 3])
@pytest.mark.parametrize("ask", ["cost", "cheaper"])
def test_costs_of_budgets_outside_the_table_are_refused(ask: str, steps: int) -> None:
    model, trajectory = random_case("mixture", 2)
    result = dp_search(model, trajectory, 2)
    with pytest.raises(ValueError, match=f"^steps: expected 1 to 2, got {steps}"):
        getattr(result, ask)(steps)


@pytest.mark.parametrize("scope", ["joint", "instance"])
@pytest.mark.parametrize("steps", [0, -1, 3])
def test_schedules_of_budgets_outside_the_table_are_refused(scope: str, steps: int) -> None:
    model, trajectory = random_case("mixture", 2)
    result = dp_search(model, trajectory, 2, scope=scope)
    with pytest.raises(ValueError, match=f"^steps: expected 1 to 2, got {steps}"):
        result.schedules(steps)


@pytest.mark.parametrize(
    "steps",
    [
        0,
        -3,
        10,
        True,
        "5",
        [],
        [3, 0],
        [3, 10],
        [2.0],
        [True, 2],
        2.0,
        None,
        [1, "2"],
    ],
    ids=repr,
)
def test_steps_that_no_search_has_are_refused(steps: Any) -> None:
    model, trajectory = random_case("mixture", 0)
    with pytest.raises(ValueError, match=r"^steps: expected"):
        dp_search(model, trajectory, steps)


class Nothing(Metric):
    """One of no kind that there is."""

    name = "nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "global"}, r"^scope: expected one of .*, got 'global'"),
        ({"reduce": "max"}, r"^reduce: expected one of .*, got 'max'"),
        ({"reduce": "none"}, r"^reduce: expected .* scope 'joint', got 'none'"),
        ({"reduce": "mean", "scope": "instance"}, r"^reduce: .* scope 'instance', got 'mean'"),
        ({"start": "late"}, r"^start: expected one of .*, got 'late'"),
        ({"aggregate": "mean"}, r"^aggregate: expected none with scope 'joint', got 'mean'"),
        ({"aggregate": "mode", "scope": "instance"}, r"^aggregate: .*, got 'mode'"),
        ({"max_batch": 0}, r"^max_batch: expected at least 1, got 0"),
        ({"velocity_bytes": -1}, r"^velocity_bytes: expected at least 0, got -1"),
        ({"velocity_bytes": None}, r"^velocity_bytes: expected a whole number"),
        ({"solver": ["euler"]}, r"^unknown solver \['euler'\]; known solvers: euler"),
        ({"metric": Nothing()}, r"^metric: expected one of states .* 'euler', got 'nothing'"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_called(
    options: dict[str, Any], message: str
) -> None:
    model, calls = recorded(random_case("mixture", 0)[0])
    trajectory = oss.teacher(model, model.noise(1), 4)
    calls.clear()
    with pytest.raises(ValueError, match=message):
        dp_search(model, trajectory, 2, **options)
    assert calls == []


def test_the_programme_itself_refuses_an_unknown_start() -> None:
    model, trajectory = random_case("mixture", 0)
    evaluator = Evaluator(model, trajectory.samples)
    with pytest.raises(ValueError, match=r"^start: expected one of .*, got 'late'"):
        dp.run(evaluator, trajectory, 2, reduce="none", start="late")


def test_another_model_than_the_teachers_is_refused() -> None:
    model, trajectory = random_case("network", 0)
    other, _ = random_case("network", 1)
    expected = f"^model: expected the teacher's, 'custom' with hash {model.fingerprint()}, got"
    with pytest.raises(ValueError, match=expected):
        dp_search(other, trajectory, 2)


def test_a_search_without_a_finite_path_names_step_time_and_sample() -> None:
    broken = False

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        return torch.where(broken & (sample == 1), math.nan, 1.0)[:, None, None] * x

    model = from_callable(velocity, SHAPE)
    trajectory = oss.teacher(model, model.noise(2), 4)
    broken = True
    with pytest.raises(NonFiniteError, match=r"^step 1 .* batch: .* at t = 0.25 for sample 1$"):
        dp_search(model, trajectory, 2)
    with pytest.raises(NonFiniteError, match=r"^step 1 .* sample 1: .* t = 0.25 for sample 1$"):
        dp_search(model, trajectory, 2, scope="instance")


def test_a_model_of_another_shape_during_the_search_is_an_error() -> None:
    rows = 0

    def velocity(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return x if rows <= 2 * 4 else x[:, 0]

    model = from_callable(velocity, SHAPE, name="mine")
    trajectory = oss.teacher(model, model.noise(2), 4)
    with pytest.raises(ValueError, match=r"^model 'mine' returned torch.float32 \(2, 3\)"):
        dp_search(model, trajectory, 2)
