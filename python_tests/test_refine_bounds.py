"""Refinement at its bounds: nothing to move, orders and times that there are not, and budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_case,
)
from oss_ext import noise
from oss_ext.refine import refine
from oss_ext.solvers import get


def spread_model(path: noise.Path, predicts: str, scale: float = 0.6) -> oss.models.Model:
    """The exact network of independent Gaussians of several widths, on any path."""
    width = scale * torch.tensor([0.3, 0.7, 1.0, 1.6, 2.5])

    def network(x: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        alpha, beta = path.alpha_beta(path.flow_times(t))
        alpha, beta = alpha[:, None].to(x.dtype), beta[:, None].to(x.dtype)
        both = (alpha * width) ** 2 + beta**2
        x0 = alpha * width**2 * x / both + 0.3 * torch.tanh(x / both.sqrt())
        return x0 if predicts == "x0" else (x - alpha * x0) / beta

    return oss.models.from_callable(network, (5,), path=path, predicts=predicts)


def replayed(model: Any, trajectory: oss.Trajectory, schedule: oss.Schedule) -> float:
    images = oss.sample(model, trajectory.noise, schedule)
    mse = (images - trajectory.final).double().square().flatten(1).mean(dim=1)
    return float(mse.log().mean().exp())


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun"])
def test_one_pinned_step_has_nothing_to_move(quality: str, solver: str) -> None:
    model, trajectory = random_case("mixture", 3, steps=14, samples=8)
    found = oss.search(model, trajectory, [1, 3], start="pinned", quality=quality, solver=solver)  # type: ignore[call-overload]
    assert found.schedule(1).indices == (14, 0)


@pytest.mark.parametrize("solver", ["dpm-2s", "dpm-3s", "dpmpp-2s", "heun-sigma"])
@each_seed(2)
def test_a_first_step_that_moves_to_pure_noise_gets_an_order_that_there_is(
    solver: str, seed: int
) -> None:
    model, trajectory = random_case("mixture", seed, steps=20, samples=5)
    trajectory = oss.teacher(model, trajectory.noise, 20)
    assert float(trajectory.times[-1]) == 1
    given = trajectory.schedule((19, 12, 5, 0), solver=solver, orders=(2, 2, 1))
    found = refine(model, trajectory, given, validation=0)
    schedule = found.schedule
    get(solver).check_orders(schedule.orders, schedule.times)
    assert found.error == pytest.approx(replayed(model, trajectory, schedule), rel=1e-9)
    best = oss.search(model, trajectory, 3, solver=solver, quality="best").schedule(3)
    oss.sample(model, trajectory.noise, best)


PATHS: dict[str, tuple[noise.Path, str]] = {
    "vp": (noise.VPPath("scaled_linear"), "eps"),
    "cosine": (noise.VPPath("cosine"), "eps"),
    "continuous": (noise.VPContinuousPath(first=1e-3), "eps"),
    "ve": (noise.VEPath(), "x0"),
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("steps", [12, 20])
def test_steps_off_the_grid_keep_to_times_that_the_network_knows(name: str, steps: int) -> None:
    path, predicts = PATHS[name]
    model = spread_model(path, predicts)
    trajectory = oss.teacher(model, model.noise(8), steps)
    for rows in ((steps, 6, 3, 1, 0), (steps, 6, 3, 2, 1, 0), (5, 3, 2, 0)):
        found = refine(model, trajectory, trajectory.schedule(rows), off_grid=True, validation=0)
        assert found.schedule.times[-2] >= path.span[0]
        error = replayed(model, trajectory, found.schedule)
        assert found.error == pytest.approx(error, rel=1e-3)
        assert found.error <= found.start_error


@pytest.mark.parametrize("max_batch", [None, 1])
@pytest.mark.parametrize("samples", [8, 16])
def test_a_budget_is_kept_off_the_grid_too(samples: int, max_batch: int | None) -> None:
    model = oss.models.load("analytic", shape=[3, 4, 4])
    trajectory = oss.teacher(model, model.noise(samples), 40)
    start = oss.baselines.uniform(trajectory, 4)
    for budget in (16, 20, 28, 36, 44, 100, 150, 200):
        found = refine(
            model, trajectory, start, budget=budget, reduce="mean", off_grid=True,
            max_batch=max_batch,
        )  # fmt: skip
        assert found.nfe <= budget


@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun"])
@each_seed(1)
def test_a_budget_is_kept_where_states_are_forgotten(solver: str, seed: int) -> None:
    model, trajectory = random_case("mixture", seed, steps=30, samples=16)
    start = replace(oss.baselines.uniform(trajectory, 8), solver=solver)
    for budget in range(64, 112, 8):
        for max_batch in (1, 2):
            found = refine(
                model, trajectory, start, budget=budget, max_batch=max_batch, keep_bytes=0,
                validation=0.5,
            )  # fmt: skip
            assert found.nfe <= budget


def test_little_memory_costs_few_evaluations_more() -> None:
    model = oss.models.load("analytic", shape=[3, 4, 4])
    trajectory = oss.teacher(model, model.noise(16), 40)
    start = oss.baselines.uniform(trajectory, 10)
    much, little = (refine(model, trajectory, start, keep_bytes=keep) for keep in (2**29, 0))
    assert little.schedule.times == much.schedule.times
    assert little.nfe < 1.4 * much.nfe
