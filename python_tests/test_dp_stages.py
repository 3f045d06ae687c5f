"""The dynamic programme with solvers that evaluate the model between source and target."""

from __future__ import annotations

import pytest
import torch

import oss_ext as oss
from driver_cases import (
    SAMPLES,
    assert_replays,
    each_family,
    each_reduction,
    each_seed,
    each_start,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext import dp
from oss_ext.dp.table import FEW
from oss_ext.metrics import DataMetric
from oss_ext.models.evaluation import Evaluator
from oss_ext.ops.reference import objective
from oss_ext.solvers import SOLVERS, Singlestep

STEPS = 3
SINGLESTEP = [name for name, s in SOLVERS.items() if isinstance(s, Singlestep)]
each_solver = pytest.mark.parametrize("solver", SINGLESTEP)


@each_solver
@each_family
@each_reduction
@each_start
@each_seed(1)
def test_replaying_a_path_gives_the_tables_cost(
    solver: str, family: str, reduce: str, start: str, seed: int
) -> None:
    model, trajectory = random_case(family, seed, steps=10)
    evaluator = Evaluator(model, SAMPLES)
    table = dp.run(evaluator, trajectory, STEPS, reduce=reduce, start=start, solver=solver)
    for steps in range(1, STEPS + 1):
        assert_replays(model, trajectory, table, solver, steps)


@pytest.mark.parametrize("solver", ["dpmpp-2m", *SINGLESTEP])
@each_reduction
def test_coefficients_in_chunks_change_no_bit(
    solver: str, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trajectory = random_case("network", 4, steps=10)
    tables = []
    for most in (2**25, 1):  # all sources at once, one at a time
        monkeypatch.setattr("oss_ext.dp.table.COEFFICIENT_BYTES", most)
        evaluator = Evaluator(model, SAMPLES)
        tables.append(dp.run(evaluator, trajectory, STEPS, reduce=reduce, solver=solver))
    assert torch.equal(tables[0].parent, tables[1].parent)
    assert torch.equal(tables[0].cost, tables[1].cost)


@each_solver
@each_reduction
@each_seed(1)
def test_the_parent_is_the_nearer_of_those_that_euler_finds_nearest(
    solver: str, reduce: str, seed: int
) -> None:
    """The first step, where all sources are the noise: every pair made and compared."""
    model, trajectory = random_case("network", seed, steps=7)
    evaluator = Evaluator(model, SAMPLES)
    table = dp.run(evaluator, trajectory, 1, reduce=reduce, solver=solver)
    times, everyone = trajectory.times.tolist(), torch.arange(SAMPLES)
    used, noise = SOLVERS[solver], trajectory.noise
    velocity = [evaluator.at(noise, t) for t in times[1:]]
    for j in range(7):
        by_euler, whole = [], []
        for i in range(j + 1, 8):
            euler = noise + (times[j] - times[i]) * velocity[i - 1]
            order = used.highest_orders([times[i], times[j]])[0]
            after, _ = used.step(
                None, noise, velocity[i - 1], times[i], times[j], order,
                lambda x, t: evaluator.at(x, t, everyone),
            )  # fmt: skip
            for found, end in ((by_euler, euler), (whole, after)):
                found.append((end - trajectory.states[j]).square().flatten(1).mean(dim=1))
        nearest = objective(torch.stack(by_euler), reduce).argsort(dim=0)[:FEW]
        exact = objective(torch.stack(whole), reduce)
        best = exact.gather(0, nearest).argmin(dim=0)
        expected = j + 1 + nearest.gather(0, best[None])[0]
        assert torch.equal(table.parent[0, j], expected)


@each_solver
@pytest.mark.parametrize("start", ["free", "pinned"])
def test_all_evaluations_are_counted_and_known_beforehand(solver: str, start: str) -> None:
    model, trajectory = random_case("mixture", 3, steps=9)
    evaluator = Evaluator(model, SAMPLES)
    dp.run(evaluator, trajectory, STEPS, reduce="none", start=start, solver=solver)
    per_step = SOLVERS[solver].evaluations
    least = SAMPLES * dp.evaluations(9, STEPS, start)
    assert least < evaluator.nfe <= SAMPLES * dp.evaluations(9, STEPS, start, per_step)


@each_solver
@pytest.mark.parametrize("last", [0.0, 0.02])
@each_seed(3)
def test_a_teacher_that_ends_above_zero_has_more_stages(
    solver: str, last: float, seed: int
) -> None:
    """Every target is reached by several evaluations there, the last one too."""
    model, _ = random_case("mixture", seed)
    times = torch.linspace(last, 1, 21, dtype=torch.float64)
    trajectory = oss.teacher(model, model.noise(4, seed), times=times)
    options = {"quality": "dp", "solver": solver, "reduce": "none", "scope": "instance"}
    result = oss.search(model, trajectory, 4, **options)
    per_step = SOLVERS[solver].evaluations
    clean = dp.evaluations(20, 4, "free", per_step)
    assert result.plan.nfe == clean + (FEW * 4 * (per_step - 1) if last else 0)
    assert result.nfe <= result.plan.nfe
    estimated = oss.search(model, trajectory, 4, dry_run=True, **options)
    assert estimated.nfe == result.plan.nfe


@pytest.mark.parametrize("quality", ["dp", "fast", "balanced", "best"])
@each_seed(1)
def test_a_search_keeps_what_it_says(quality: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=30, samples=8)
    result = oss.search(model, trajectory, 4, quality=quality, solver="heun", reduce="mean")
    schedule = result.schedule(4)
    assert schedule.solver == "heun"
    images = oss.sample(model, trajectory.noise, schedule)
    errors = (images - trajectory.final).square().flatten(1).mean(dim=1)
    assert float(errors[: schedule.samples].mean()) == pytest.approx(schedule.cost, rel=1e-9)
    assert result.nfe <= result.plan.nfe


def test_metrics_of_sources_are_refused() -> None:
    model, trajectory = random_case("mixture", 1)
    message = r"^metric: .*'xt'.* 'perceptual:MODULE'\) with solver 'heun', got 'x0'"
    for quality in ("dp", "best"):
        with pytest.raises(ValueError, match=message):
            oss.search(model, trajectory, 2, quality=quality, solver="heun", metric="x0")
    evaluator = Evaluator(model, SAMPLES)
    with pytest.raises(ValueError, match=message):
        dp.run(evaluator, trajectory, 2, reduce="mean", solver="heun", metric=DataMetric())
    assert evaluator.nfe == 0
