"""Solvers: what every one of them is held to, and the loop that runs them."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import oss_ext as oss
from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
    recorded,
)
from oss_ext import solvers
from oss_ext.solvers import SOLVERS, Multistep
from oss_ext.solvers.base import OUTPUTS
from solver_cases import NOT_ITS_ORDER, draw, final_error, never

each_solver = pytest.mark.parametrize("name", SOLVERS)
each_multistep = pytest.mark.parametrize(
    "name", [name for name, s in SOLVERS.items() if isinstance(s, Multistep)]
)


# --- every solver -------------------------------------------------------------------------------


@each_solver
def test_its_error_falls_with_its_order(name: str) -> None:
    """On the exact mixture, in float64: the slope of the error over the step."""
    slopes = []
    for seed in range(3):
        errors = [final_error(name, steps, seed) for steps in (64, 128)]
        slopes.append(math.log2(errors[0] / errors[1]))
    expected = NOT_ITS_ORDER.get(name, SOLVERS[name].order)
    assert sorted(slopes)[1] == pytest.approx(expected, abs=0.4)


@each_solver
def test_a_constant_output_is_integrated_exactly(name: str) -> None:
    """Data that does not depend on the state: every solver is Euler, and Euler is exact."""
    solver, target = solvers.get(name), draw(1, 3, 4)
    if solver.output == "velocity":

        def velocity(x: Tensor, t: float) -> Tensor:
            return target
    else:

        def velocity(x: Tensor, t: float) -> Tensor:
            return (x - target) / t

    times = [0.9, 0.7, 0.4, 0.3, 0.1, 0.0]
    noise = draw(2, 3, 4)
    *_, last = solvers.integrate(solver, velocity, noise, times)
    expected = noise - 0.9 * target if solver.output == "velocity" else target
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-12)


@each_solver
@each_seed(2)
def test_it_runs_from_pure_noise_to_the_clean_end(name: str, seed: int) -> None:
    """Both ends are limits: half the log-SNR is infinite there."""
    model = random_mixture(seed)
    trajectory = oss.teacher(model, model.noise(3, seed), 6, solver=name)
    assert trajectory.times[-1] == 1
    assert trajectory.states.isfinite().all()
    assert trajectory.solver == name


@each_solver
def test_a_step_leaves_its_inputs_alone(name: str) -> None:
    model = random_mixture(1)
    noise = model.noise(2, 1)
    before = noise.clone()
    seen = []

    def velocity(x: Tensor, t: float) -> Tensor:
        v = model(x, torch.full((2,), t, dtype=torch.float64), torch.arange(2))
        seen.append((v, v.clone()))
        return v

    list(solvers.integrate(solvers.get(name), velocity, noise, [0.9, 0.7, 0.5, 0.3, 0.0]))
    assert torch.equal(noise, before)
    assert all(torch.equal(v, copy) for v, copy in seen)


@each_solver
def test_it_evaluates_as_often_as_it_says(name: str) -> None:
    solver, calls = solvers.get(name), []

    def velocity(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return -x

    times = [0.9, 0.8, 0.6, 0.4, 0.2, 0.1]
    list(solvers.integrate(solver, velocity, torch.ones(1, 1), times))
    assert len(calls) == 5 * solver.evaluations
    assert set(times[:-1]) <= set(calls)


@each_solver
@pytest.mark.parametrize("first", [1.0, 0.9])
@pytest.mark.parametrize("last", [0.0, 0.1])
def test_the_evaluations_of_a_run_are_known_beforehand(
    name: str, first: float, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps from pure noise and to the clean end take fewer: so do the totals that bars show."""
    totals: dict[str, int] = {}

    def bar(desc: str, total: int, **_: object) -> Any:
        totals[desc] = total
        return contextlib.nullcontext(SimpleNamespace(update=lambda rows: None))

    monkeypatch.setattr("oss_ext.progress.tqdm", bar)
    times = [first, 0.8, 0.6, 0.3, last]
    model, calls = recorded(random_mixture(1))
    trajectory = oss.teacher(model, model.noise(2), times=torch.tensor(times[::-1]), solver=name)
    evaluations = solvers.evaluations(solvers.get(name), trajectory.times.flip(0).tolist())
    assert len(calls) == trajectory.nfe == evaluations
    assert totals["teacher"] == 2 * evaluations
    for orders in ((), (1, 1, 1, 1)):
        calls.clear()
        schedule = trajectory.schedule((4, 3, 2, 1, 0), solver=name, orders=orders)
        oss.sample(model, trajectory.noise, schedule)
        assert totals["sample"] == 2 * len(calls)
        assert len(calls) == (4 if orders else evaluations)


@each_solver
def test_its_usual_orders_can_be_made(name: str) -> None:
    solver = solvers.get(name)
    for times in ([1.0, 0.0], [1.0, 0.6, 0.0], [1.0, 0.8, 0.5, 0.3, 0.1, 0.0], [0.9, 0.5, 0.4]):
        orders = solver.usual_orders(times)
        solver.check_orders(orders, times)
        assert max(orders) <= solver.order


@each_multistep
@each_seed(2)
def test_the_coefficients_are_what_a_step_does(name: str, seed: int) -> None:
    """The affine form that a search uses, on state, velocity and earlier outputs."""
    solver = solvers.get(name)
    assert isinstance(solver, Multistep)
    times = [0.93, 0.71, 0.55, 0.42, 0.2, 0.11]
    x, history, outputs = draw(seed, 2, 3), None, []
    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = draw(seed + k + 1, 2, 3)
        order = solver.highest_order(k, t_next)
        known = [torch.tensor(s, dtype=torch.float64) for s in times[k::-1]]
        arrived = torch.tensor(history.order if history else 0)
        given = solver.coefficients(
            order, known, torch.tensor(t_next, dtype=torch.float64), arrived
        )
        basis = [x, v, *outputs]
        expected = sum(float(c) * term for c, term in zip(given, basis, strict=False))
        of_state, of_velocity = OUTPUTS[solver.output](known[0])
        outputs.insert(0, of_state * x + of_velocity * v)
        x, history = solver.step(history, x, v, t, t_next, order, never)
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@each_multistep
@each_seed(1)
def test_coefficients_of_many_sources_are_those_of_each(name: str, seed: int) -> None:
    """Histories and orders of arrival that differ from source to source, in one call."""
    solver = solvers.get(name)
    assert isinstance(solver, Multistep)
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(6, solver.remembers + 2, generator=generator, dtype=torch.float64)
    *times, t_next = grid.sort(dim=1).values.T  # [6] each, ascending from the oldest
    times, t_next = [t_next, *times[::-1]], times[0] * torch.tensor([[0.9], [0.5]])
    arrived = torch.arange(6) % (solver.remembers + 1)
    for order in range(1, solver.order + 1):
        given = solver.coefficients(order, times, t_next, arrived)
        for source, target in itertools.product(range(6), range(2)):
            alone = solver.coefficients(
                order, [t[source] for t in times], t_next[target, source], arrived[source]
            )
            for c, expected in zip(given, alone, strict=True):
                value = c.expand(2, 6)[target, source]
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


# --- Euler --------------------------------------------------------------------------------------


def test_an_euler_step_follows_the_velocity() -> None:
    x, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -20.0]])
    moved, history = solvers.get("euler").step(None, x, v, 0.75, 0.5, 1, never)
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
    euler, _ = solvers.get("euler").step(None, x, v, t, t_next, 1, never)
    scale = math.cos(angle_next) + math.sin(angle_next)
    torch.testing.assert_close(scale * euler, ddim, rtol=0, atol=2e-14)


# --- the loop -----------------------------------------------------------------------------------


def test_integrate_asks_once_per_step_and_yields_every_state() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return torch.full_like(x, 4.0)

    path = solvers.integrate(solvers.get("euler"), velocity, torch.ones(1, 1), [1.0, 0.5, 0.0])
    assert [float(x) for x in path] == [-1.0, -3.0]
    assert asked == [1.0, 0.5]


def test_integrate_hands_the_history_and_the_orders_on() -> None:
    class Counting(solvers.Solver):
        name = "counting"

        def highest_order(self, known: int, t_next: float) -> int:
            return 1

        def step(
            self, history: Any, x: Tensor, velocity: Tensor, t: float, t_next: float, order: int,
            evaluate: Any,
        ) -> tuple[Tensor, Any]:  # fmt: skip
            history = (history or 0) + order
            return x * 0 + history, history

    times, one = [1.0, 0.6, 0.3, 0.0], torch.ones(1, 1)
    for orders, states in [((), [1.0, 2.0, 3.0]), ((1, 3, 2), [1.0, 4.0, 6.0])]:
        path = solvers.integrate(Counting(), lambda x, t: x, one, times, orders)
        assert [float(x) for x in path] == states


def test_solvers_are_registered_under_their_own_names() -> None:
    assert all(solver.name == name for name, solver in SOLVERS.items())


def test_an_unknown_solver_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^unknown solver 'magic'; known solvers: euler"):
        solvers.get("magic")


# --- orders of a schedule -----------------------------------------------------------------------


def student(orders: tuple[int, ...], solver: str = "dpmpp-2m") -> Tensor:
    model = random_mixture(1)
    trajectory = oss.teacher(model, model.noise(2, 1), 10)
    schedule = trajectory.schedule((10, 7, 4, 2, 0), solver=solver, orders=orders)
    return oss.sample(model, trajectory.noise, schedule)


def test_a_schedule_without_orders_takes_the_solvers_usual_ones() -> None:
    assert torch.equal(student(()), student((1, 2, 2, 1)))
    assert not torch.equal(student(()), student((1, 2, 1, 1)))
    assert torch.equal(student((1, 1, 1, 1)), student((), solver="euler"))


ORDERS = r"^orders: expected one per step, at most \[1, 2, 2, 1\] with solver 'dpmpp-2m', got"


@pytest.mark.parametrize("orders", [(1, 3, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2)])
def test_orders_that_a_solver_does_not_have_are_refused(orders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=ORDERS):
        student(orders)


@pytest.mark.parametrize("orders", [(1, 2, 2), (1, 2, 2, 1, 1), (0, 2, 2, 1)])
def test_orders_are_one_per_step(orders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=ORDERS):
        solvers.get("dpmpp-2m").check_orders(orders, [1.0, 0.7, 0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "dpmpp-2m", "orders": (1, 3, 2, 1)}, ORDERS),
        ({"solver": "magic"}, "^unknown solver 'magic'"),
    ],
)
def test_no_run_begins_before_all_solvers_and_orders_are_known_to_be(
    change: dict[str, Any], message: str
) -> None:
    model, calls = recorded(random_mixture(1))
    trajectory = oss.teacher(model, model.noise(2, 1), 10)
    good = trajectory.schedule((10, 7, 4, 2, 0))
    calls.clear()
    with pytest.raises(ValueError, match=message):
        oss.compare(model, trajectory, {"good": good, "bad": replace(good, **change)})
    with pytest.raises(ValueError, match=message):
        oss.refine(model, trajectory, replace(good, **change), validation=0.0)
    assert not calls
