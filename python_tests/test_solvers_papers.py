"""Solvers beside their papers, written out plainly, and in other coordinates than their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext import solvers
from oss_ext.solvers.base import OUTPUTS, History
from solver_cases import draw, never, velocity_of


@each_seed(2)
def test_dpm_3s_is_algorithm_2_of_its_paper(seed: int) -> None:
    """Lu et al. 2022a, DPM-Solver-3 with r_1 = 1/3 and r_2 = 2/3, written out on a VP path."""
    model = random_mixture(seed)
    velocity, x = velocity_of(model, 4), model.noise(4, seed)
    t, t_next = 0.83, 0.47

    def half_log_snr(t: float) -> float:
        return math.log((1 - t) / t)

    def alpha_sigma(log_snr: float) -> tuple[float, float]:
        return (1 + math.exp(-2 * log_snr)) ** -0.5, (1 + math.exp(2 * log_snr)) ** -0.5

    def noise(u: Tensor, log_snr: float) -> Tensor:
        t = 1 / (1 + math.exp(log_snr))
        state = u / sum(alpha_sigma(log_snr))
        return state + (1 - t) * velocity(state, t)

    begin, end = half_log_snr(t), half_log_snr(t_next)
    h, r_1, r_2 = end - begin, 1 / 3, 2 / 3
    alpha, sigma = alpha_sigma(begin)
    u_0 = x * (alpha + sigma)
    eps = noise(u_0, begin)
    alpha_1, sigma_1 = alpha_sigma(begin + r_1 * h)
    u_1 = alpha_1 / alpha * u_0 - sigma_1 * math.expm1(r_1 * h) * eps
    d_1 = noise(u_1, begin + r_1 * h) - eps
    alpha_2, sigma_2 = alpha_sigma(begin + r_2 * h)
    second = math.expm1(r_2 * h) / (r_2 * h) - 1
    u_2 = alpha_2 / alpha * u_0 - sigma_2 * (math.expm1(r_2 * h) * eps + r_2 / r_1 * second * d_1)
    d_2 = noise(u_2, begin + r_2 * h) - eps
    alpha_3, sigma_3 = alpha_sigma(end)
    third = math.expm1(h) / h - 1
    u_3 = alpha_3 / alpha * u_0 - sigma_3 * (math.expm1(h) * eps + third / r_2 * d_2)

    solver = solvers.get("dpm-3s")
    ours, _ = solver.step(None, x, velocity(x, t), t, t_next, 3, velocity)
    torch.testing.assert_close(ours, u_3 / (alpha_3 + sigma_3), rtol=1e-12, atol=1e-12)


WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Adams-Bashforth on equal steps."""


@pytest.mark.parametrize("order", WEIGHTS)
@pytest.mark.parametrize("name", ["adams", "adams-sigma", "ipndm"])
def test_adams_on_equal_steps_has_the_classical_weights(name: str, order: int) -> None:
    clocks = [1.3 - 0.2 * k for k in range(-order + 1, 2)]  # of outputs, oldest first, and the end
    times = [s / (1 + s) for s in clocks] if name != "adams" else [s / 2 for s in clocks]
    outputs = [draw(k, 3, 4) for k in range(order)]
    x, (*before, t, t_next) = draw(9, 3, 4), times
    v = outputs[-1] if name == "adams" else (outputs[-1] - x) / (1 - t)
    past = History(tuple(before[::-1]), tuple(outputs[-2::-1]), 0)
    solver = solvers.get(f"{name}-{order}")
    ours, _ = solver.step(past, x, v, t, t_next, order, never)
    mean = sum(w * o for w, o in zip(WEIGHTS[order], outputs[::-1], strict=True))
    if name == "adams":
        expected = x + (t_next - t) * mean
    else:
        expected = (x / (1 - t) + (clocks[-1] - clocks[-2]) * mean) * (1 - t_next)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


CLOCKS: dict[str, Callable[[float], float]] = {
    "adams": lambda t: t,
    "adams-sigma": lambda t: t / (1 - t),
    "deis": lambda t: math.log((1 - t) / t),
    "unipc": lambda t: math.log((1 - t) / t),
}
"""In what these solvers extrapolate polynomials."""


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name in ("adams", "adams-sigma") for order in (2, 3, 4)]
    + [("deis", 2), ("deis", 3), ("unipc", 3)],  # UniPC's weight of a single difference is another
)
def test_it_integrates_polynomials_on_unequal_steps_exactly(name: str, order: int) -> None:
    """Beside Gauss's quadrature; the output is a polynomial of the clock of degree order - 1."""
    solver, clock = solvers.get(f"{name}-{order}"), CLOCKS[name]
    powers = draw(order, order, 3, 4)

    def output(t: float) -> Tensor:
        return sum((clock(t) ** i * c for i, c in enumerate(powers)), torch.zeros(3, 4))

    *before, t, t_next = [0.93, 0.81, 0.75, 0.52, 0.34][-order - 1 :]
    x = draw(8, 3, 4)
    of_state, of_velocity = OUTPUTS[solver.output](torch.tensor(t, dtype=torch.float64))
    v = (output(t) - of_state * x) / of_velocity
    past = History(tuple(before[::-1]), tuple(output(s) for s in before[::-1]), 0)
    ours, _ = solver.step(past, x, v, t, t_next, order, never)

    # Of x' = o;  (x / (1 - t))' = o / (1 - t)^2;  (x / t)' = -o / t^2.
    scale = {"velocity": lambda t: 1, "noise": lambda t: 1 - t, "data": lambda t: t}[solver.output]
    nodes, shares = np.polynomial.legendre.leggauss(60)
    places = t + (t_next - t) * (nodes + 1) / 2
    sign = -1 if solver.output == "data" else 1
    integral = sum(
        share * (t_next - t) / 2 * sign * output(s) / scale(s) ** 2
        for s, share in zip(places.tolist(), shares.tolist(), strict=True)
    )
    expected = (x / scale(t) + integral) * scale(t_next)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# --- coordinates --------------------------------------------------------------------------------

ALPHA_BETA: dict[str, Callable[[float], tuple[float, float]]] = {
    "flow": lambda t: (1 - t, t),
    "vp": lambda t: ((1 - t) / math.hypot(t, 1 - t), t / math.hypot(t, 1 - t)),
    "ve": lambda t: (1.0, t / (1 - t)),
}
TIMES, ORDERS = [0.93, 0.82, 0.71, 0.55, 0.32, 0.21, 0.12], (1, 2, 1, 2, 3, 3)


def update(
    path: str, solver: str, order: int, x: Tensor, t: float, t_next: float,
    nodes: list[tuple[float, Tensor]],
) -> Tensor:  # fmt: skip
    """UniPC's step (Zhao et al. 2023, eq. 3 and 5) by the data prediction, in a path's coordinates.

    The first of ``nodes`` is at ``t``; the others are as many as the order of the step asks for.
    """
    (alpha, sigma), (alpha_next, sigma_next) = ALPHA_BETA[path](t), ALPHA_BETA[path](t_next)
    h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
    (_, newest), *others = nodes
    x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * newest
    if not others:
        return x
    shares = []
    for s, _ in others:
        alpha_s, sigma_s = ALPHA_BETA[path](s)
        shares.append((math.log(alpha_s / sigma_s) - math.log(alpha / sigma)) / h)
    b = -h if "bh1" in solver else math.expm1(-h)
    phi, moments = math.expm1(-h) / -h - 1, []
    for k in range(1, len(others) + 1):
        moments.append(phi * math.factorial(k) / b)
        phi = phi / -h - 1 / math.factorial(k + 1)
    r = torch.tensor(shares, dtype=torch.float64)
    powers = torch.stack([r**k for k in range(len(others))])
    a = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
    if len(others) == 1:
        a = [0.5]
    added = sum(w / s * (o - newest) for w, s, (_, o) in zip(a, shares, others, strict=True))
    return x - alpha_next * b * added


@pytest.mark.parametrize("path", ALPHA_BETA)
@pytest.mark.parametrize("name", ["unipc-2", "unipc-3", "unipc-2-bh1", "unipc-3-bh1"])
@each_seed(1)
def test_unipc_is_its_paper_in_any_coordinates_and_orders(name: str, path: str, seed: int) -> None:
    """The corrected state kept, the weights solved for: what the solver here does without."""
    model, solver = random_mixture(seed), solvers.get(name)
    velocity, x = velocity_of(model, 4), model.noise(4, seed)
    orders = [min(order, solver.order) for order in ORDERS]
    *_, ours = solvers.integrate(solver, velocity, x, TIMES, orders)
    state = corrected = x * sum(ALPHA_BETA[path](TIMES[0]))
    nodes: list[tuple[float, Tensor]] = []
    for k, (t, t_next) in enumerate(pairwise(TIMES)):
        flow = state / sum(ALPHA_BETA[path](t))
        newest = (t, flow - t * velocity(flow, t))
        if k:
            begin, *earlier = nodes[: orders[k - 1]]
            known = [begin, *earlier, newest]
            corrected = update(path, name, orders[k - 1], corrected, begin[0], t, known)
        nodes.insert(0, newest)
        state = update(path, name, orders[k], corrected, t, t_next, nodes[: orders[k]])
    expected = state / sum(ALPHA_BETA[path](TIMES[-1]))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ALPHA_BETA)
@pytest.mark.parametrize("name", ["dpm-2m", "dpmpp-2m"])
@each_seed(1)
def test_a_solver_in_the_log_snr_is_the_same_in_any_coordinates(
    name: str, path: str, seed: int
) -> None:
    model = random_mixture(seed)
    velocity, x = velocity_of(model, 4), model.noise(4, seed)
    *_, ours = solvers.integrate(solvers.get(name), velocity, x, TIMES)
    state, before = x * sum(ALPHA_BETA[path](TIMES[0])), None
    for t, t_next in pairwise(TIMES):
        (alpha, sigma), (alpha_next, sigma_next) = ALPHA_BETA[path](t), ALPHA_BETA[path](t_next)
        flow = state / (alpha + sigma)
        v, mark = velocity(flow, t), math.log(alpha / sigma)
        h = math.log(alpha_next / sigma_next) - mark
        output = flow - t * v if name == "dpmpp-2m" else flow + (1 - t) * v
        mean = output
        if before is not None:
            mean = output + h / (mark - before[0]) / 2 * (output - before[1])
        before = mark, output
        if name == "dpmpp-2m":
            state = sigma_next / sigma * state - alpha_next * math.expm1(-h) * mean
        else:
            state = alpha_next / alpha * state - sigma_next * math.expm1(h) * mean
    expected = state / sum(ALPHA_BETA[path](TIMES[-1]))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("flow", "sigma"), [("heun", "heun-sigma"), ("adams-2", "adams-sigma-2")])
@each_seed(2)
def test_others_are_not(flow: str, sigma: str, seed: int) -> None:
    """Which is why they name their coordinates."""
    model = random_mixture(seed)
    velocity, x = velocity_of(model, 8), model.noise(8, seed)
    coarse = [0.98, 0.75, 0.5, 0.25, 0.0]
    ends = []
    for name in (flow, sigma):
        *_, end = solvers.integrate(solvers.get(name), velocity, x, coarse)
        ends.append(end)
    assert (ends[0] - ends[1]).norm() > 1e-2 * ends[0].norm()
