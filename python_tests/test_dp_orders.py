"""Algorithm 2: multistep solvers, with the order of every step chosen with its source."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    assert_replays,
    dp_search,
    each_family,
    each_reduction,
    each_seed,
    each_start,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext import dp
from oss_ext.dp.euler import EulerSteps
from oss_ext.dp.orders import OrderSteps
from oss_ext.metrics import StateMetric
from oss_ext.models.evaluation import Evaluator
from oss_ext.ops.reference import objective
from oss_ext.solvers import SOLVERS, Multistep

STEPS = 4
MULTISTEP = [name for name, s in SOLVERS.items() if isinstance(s, Multistep) and s.order > 1]
each_solver = pytest.mark.parametrize("solver", MULTISTEP)
each_fixed = pytest.mark.parametrize("fixed", [False, True])


def table_of(model: Any, trajectory: oss.Trajectory, **options: Any) -> dp.Table:
    return dp.run(Evaluator(model, trajectory.samples), trajectory, STEPS, **options)


def plainly(
    model: Any, trajectory: oss.Trajectory, solver: Multistep, reduce: str, fixed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by the solver's own steps, one (source, order, target) after the other."""
    times, samples = trajectory.times.tolist(), trajectory.samples
    columns = samples if reduce == "none" else 1
    evaluator = Evaluator(model, samples)
    groups = [torch.tensor([b]) for b in range(samples)] if reduce == "none" else [
        torch.arange(samples)
    ]  # fmt: skip
    points: dict[tuple[int, int], Any] = {
        (i, c): (trajectory.noise[groups[c]], None)
        for i in range(1, len(times)) for c in range(columns)
    }  # fmt: skip
    costs, parents, orders = [], [], []
    for k in range(STEPS):
        cost = torch.full((len(times), samples), torch.inf, dtype=torch.float64)
        parent = torch.full((len(times), columns), -1)
        order = torch.zeros_like(parent)
        following = {}
        for c, group in enumerate(groups):
            moves = []
            for i in range(len(times) - 1, 0, -1):  # the largest source wins a tie
                if (i, c) in points:
                    x, history = points[i, c]
                    moves.append((i, x, history, evaluator.at(x, times[i], group)))
            for j, t_next in enumerate(times):
                most = solver.highest_order(k, t_next)
                least = torch.inf
                for i, x, history, v in moves:
                    for o in range(most if fixed else 1, most + 1) if i > j else ():
                        y, after = solver.step(history, x, v, times[i], t_next, o, evaluator.at)
                        error = (y - trajectory.states[j, group]).square().flatten(1).mean(dim=1)
                        value = float(objective(error, "mean" if reduce == "none" else reduce))
                        if value < least:
                            least, following[j, c] = value, (y, after)
                            cost[j, group], parent[j, c], order[j, c] = error, i, o
        points = {(j, c): point for (j, c), point in following.items() if j > 0}
        costs.append(cost)
        parents.append(parent)
        orders.append(order)
    return torch.stack(costs), torch.stack(parents), torch.stack(orders)


@each_solver
@each_reduction
@each_fixed
@each_seed(1)
def test_the_table_is_that_of_the_solvers_own_steps(
    solver: str, reduce: str, fixed: bool, seed: int
) -> None:
    model, trajectory = random_case("network", seed, steps=7)
    table = table_of(model, trajectory, reduce=reduce, solver=solver, fixed_order=fixed)
    used = SOLVERS[solver]
    assert isinstance(used, Multistep)
    cost, parent, order = plainly(model, trajectory, used, reduce, fixed)
    torch.testing.assert_close(table.cost, cost, rtol=1e-9, atol=1e-12)
    assert torch.equal(table.parent, parent)
    assert table.order is not None
    assert torch.equal(table.order, order)


@each_solver
@each_family
@each_reduction
@each_start
@each_seed(1)
def test_replaying_a_path_in_its_orders_gives_the_tables_cost(
    solver: str, family: str, reduce: str, start: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=12)
    table = table_of(model, trajectory, reduce=reduce, start=start, solver=solver)
    for steps in range(1, STEPS + 1):
        assert_replays(model, trajectory, table, solver, steps)


@each_reduction
@each_seed(1)
def test_first_order_alone_is_algorithm_1(reduce: str, seed: int) -> None:
    model, trajectory = random_case("network", seed, steps=9)
    euler = SOLVERS["euler"]
    assert isinstance(euler, Multistep)
    fused = EulerSteps(Evaluator(model, SAMPLES), trajectory, reduce, dp.VELOCITY_BYTES)
    general = OrderSteps(Evaluator(model, SAMPLES), trajectory, euler, reduce, False, StateMetric())
    live = dp.first_sources(trajectory, reduce, "free")
    for _ in range(STEPS):
        cost, parent, _ = fused.step(live, live)
        again, same, order = general.step(live, live)
        assert torch.equal(again, cost)
        assert torch.equal(same, parent)
        assert torch.equal(order, (parent >= 0).long())
        live = dp.next_sources(parent, SAMPLES)


@each_solver
@each_seed(1)
def test_a_choice_of_orders_costs_no_evaluations(solver: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=9)
    evaluator = Evaluator(model, SAMPLES)
    table = dp.run(evaluator, trajectory, STEPS, reduce="none", solver=solver)
    assert evaluator.nfe == SAMPLES * dp.evaluations(9, STEPS, "free")
    # Up to the second step all sources are those of Algorithm 1, and its candidates among ours; but
    # UniPC, which remembers more for it, corrects what the first step came to.
    used = SOLVERS[solver]
    assert isinstance(used, Multistep)
    alike = 2 if used.remembers < used.order else 1
    euler = table_of(model, trajectory, reduce="none")
    assert bool((table.cost[:alike] <= euler.cost[:alike] * (1 + 1e-9)).all())


@each_solver
@each_seed(1)
def test_a_fixed_order_is_the_highest_there_is(solver: str, seed: int) -> None:
    model, trajectory = random_case("network", seed, steps=9)
    table = table_of(model, trajectory, reduce="log_mean", solver=solver, fixed_order=True)
    rows = table.backtrack(STEPS)
    times = [float(trajectory.times[row]) for row in rows]
    highest = tuple(SOLVERS[solver].highest_order(k, t) for k, t in enumerate(times[1:]))
    assert table.orders(rows) == highest


def test_rows_of_other_solvers_are_refused_with_those_that_can_be_searched() -> None:
    model, trajectory = random_case("mixture", 1)
    with pytest.raises(ValueError, match=r"^unknown solver 'magic'; known solvers: euler"):
        table_of(model, trajectory, reduce="none", solver="magic")


# --- search -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["dp", "fast", "balanced", "best"])
@each_seed(1)
def test_a_search_with_a_solver_keeps_what_it_says(quality: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=30, samples=8)
    result = oss.search(model, trajectory, 4, quality=quality, solver="dpmpp-2m", reduce="mean")
    schedule = result.schedule(4)
    assert schedule.solver == "dpmpp-2m"
    assert oss.Schedule.from_json(schedule.to_json()) == schedule
    images = oss.sample(model, trajectory.noise, schedule)
    errors = (images - trajectory.final).square().flatten(1).mean(dim=1)
    assert float(errors[: schedule.samples].mean()) == pytest.approx(schedule.cost, rel=1e-9)
    assert result.nfe <= result.plan.nfe
    assert "student dpmpp-2m" in result.summary()


@each_seed(1)
def test_instance_schedules_have_orders_of_their_own(seed: int) -> None:
    model, trajectory = random_case("network", seed, steps=12)
    result = dp_search(
        model, trajectory, 4, scope="instance", aggregate="median", solver="dpmpp-2m"
    )
    for b, schedule in enumerate(result.schedules(4)):
        images = oss.sample(model, trajectory.noise, schedule)
        error = (images - trajectory.final)[b].square().mean()
        assert float(error) == pytest.approx(schedule.cost, rel=1e-9)
        assert len(schedule.orders) == 4
    together = result.schedule(4)
    assert together.orders == ()
    assert together.solver == "dpmpp-2m"


def test_a_beam_takes_euler_steps_only() -> None:
    model, trajectory = random_case("mixture", 1)
    with pytest.raises(
        ValueError, match=r"^beam: expected 1 with solver 'dpmpp-2m' and metric 'xt', got"
    ):
        dp_search(model, trajectory, 2, solver="dpmpp-2m", beam=2)


@pytest.mark.parametrize("quality", ["dp", "fast", "balanced"])
@pytest.mark.parametrize("solver", ["dpmpp-3m", "unipc-3", "deis-3", "dpm-3s", "ipndm-4"])
@each_seed(1)
def test_a_search_in_fixed_order_gives_the_usual_orders(
    solver: str, quality: str, seed: int
) -> None:
    """Those fall to the clean end, where a host has them so; a cost is of the path as it is run."""
    model, trajectory = random_case("mixture", seed, steps=30, samples=8)
    result = oss.search(model, trajectory, [3, 6], quality=quality, solver=solver, fixed_order=True)
    for steps in result.steps:
        schedule = result.schedule(steps)
        assert schedule.orders in ((), SOLVERS[solver].usual_orders(schedule.times))
        if schedule.cost is not None and quality == "dp":
            error = oss.sample(model, trajectory.noise, schedule) - trajectory.final
            assert schedule.cost == pytest.approx(float(error.square().mean()), rel=1e-4)
