"""Solvers: pure steps, and the loop that runs them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext import solvers
from oss_ext.noise import flow_grid


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_euler_step_follows_the_velocity() -> None:
    x, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -20.0]])
    moved, history = solvers.get("euler").step(None, x, v, 0.75, 0.5)
    assert moved.tolist() == [[-1.5, 7.0]]
    assert history is None
    assert x.tolist() == [[1.0, 2.0]]  # state in, state out


@each_seed(3)
def test_euler_is_ddim_in_the_models_own_coordinates(seed: int) -> None:
    """A variance-preserving path: ``x' = (alpha + beta) x`` and ``x'_j = alpha x0 + beta eps``."""
    x, v = draw(seed, 4, 5), draw(seed + 1, 4, 5)
    angle, angle_next = 1.2, 0.7  # alpha = cos, beta = sin
    t, t_next = (math.sin(a) / (math.cos(a) + math.sin(a)) for a in (angle, angle_next))
    x0, eps = x - t * v, x + (1 - t) * v
    ddim = math.cos(angle_next) * x0 + math.sin(angle_next) * eps
    euler, _ = solvers.get("euler").step(None, x, v, t, t_next)
    scale = math.cos(angle_next) + math.sin(angle_next)
    torch.testing.assert_close(scale * euler, ddim, rtol=0, atol=2e-14)


@each_seed(2)
def test_euler_converges_with_order_one(seed: int) -> None:
    model = random_mixture(seed)
    noise, sample = model.noise(8, seed), torch.arange(8)

    def final(steps: int) -> Tensor:
        def velocity(x: Tensor, t: float) -> Tensor:
            return model(x, torch.full((8,), t, dtype=torch.float64), sample)

        # Not down to t = 0: where samples decide for a component, a few steps are far off.
        times = [t for t in flow_grid(steps).flip(0).tolist() if t >= 0.5]
        *_, last = solvers.integrate(solvers.get("euler"), velocity, noise, times)
        return last

    exact = 2 * final(1024) - final(512)
    errors = [float((final(steps) - exact).square().mean().sqrt()) for steps in (128, 256)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def test_integrate_asks_once_per_step_and_yields_every_state() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.full_like(x, 4.0)

    path = solvers.integrate(solvers.get("euler"), velocity, torch.ones(1, 1), [1.0, 0.5, 0.0])
    assert [float(x) for x in path] == [-1.0, -3.0]
    assert asked == [1.0, 0.5]


def test_integrate_hands_the_history_on() -> None:
    class Counting:
        name = "counting"

        def step(
            self, history: int | None, x: Tensor, velocity: Tensor, t: float, t_next: float
        ) -> tuple[Tensor, int]:
            history = (history or 0) + 1
            return x * 0 + history, history

    path = solvers.integrate(Counting(), lambda x, t: x, torch.ones(1, 1), [1.0, 0.6, 0.3, 0.0])
    assert [float(x) for x in path] == [1.0, 2.0, 3.0]


def test_solvers_are_registered_under_their_own_names() -> None:
    assert all(solver.name == name for name, solver in solvers.SOLVERS.items())


def test_an_unknown_solver_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown solver 'magic'; known solvers: euler"):
        solvers.get("magic")
