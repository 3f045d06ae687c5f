"""Schedules of solvers other than Euler: hosts that have the solver take them, others refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from driver_cases import each_seed, random_mixture
from oss_ext import Schedule, export, solvers
from oss_ext.export import FORMATS, ExportError
from oss_ext.noise import FlowPath, Path, VPPath
from solver_cases import velocity_of


def make(times: list[float], path: Path) -> Schedule:
    """A schedule that takes every step of its teacher."""
    return Schedule.from_indices(
        range(len(times))[::-1], times[::-1], model="m", model_hash="h", path=path
    )


SD = VPPath()
FLOW = make([1.0, 0.8125, 0.375, 0.1, 0.0], FlowPath(1000.0))
VP = make([*SD.flow_times(torch.tensor([980.0, 500.0, 20.0])).tolist(), 0.0], SD)

# --- solvers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-3m", "heun"])
def test_a_host_without_the_solver_refuses_the_schedule(name: str, solver: str) -> None:
    """Times of one solver, run by another's sampler, would be something else than was searched."""
    schedule = replace(FLOW, solver=solver)  # where hosts' 2M is another
    if FORMATS[name].final_zero is None:
        assert export.to(schedule, name) == export.to(FLOW, name)
        return
    has = ", ".join(FORMATS[name].solvers(FLOW.path))
    if solver == has:
        schedule = replace(FLOW, solver="euler")
    expected = (
        rf"{name}: the schedule is one of '{schedule.solver}', and of our .* has {has} for a flow"
    )
    with pytest.raises(ExportError, match=expected):
        export.to(schedule, name)
    export.to(schedule, name, force=True)


def euler_in_sigma(slopes: list[Tensor]) -> Tensor:
    return slopes[0]


def ipndm_in_sigma(slopes: list[Tensor]) -> Tensor:
    """As published, from the newest; constant weights, whatever the steps are."""
    weights = {1: (1,), 2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}[min(len(slopes), 4)]
    terms = [w * d for w, d in zip(weights, slopes, strict=False)]
    return sum(terms[1:], terms[0]) / sum(weights)


def run_slopes(
    denoised: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: tuple[float, ...],
    slope: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """A sampler of the k-diffusion kind that moves by a combination of slopes in sigma, and at
    the end to the data prediction."""
    slopes: list[Tensor] = []
    for sigma, after in pairwise(sigmas):
        slopes.insert(0, (x - denoised(x, sigma)) / sigma)
        x = x + (after - sigma) * (slope(slopes) if after else slopes[0])
    return x


def run_2m(
    denoised: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: tuple[float, ...]
) -> Tensor:
    """DPM-Solver++ 2M as k-diffusion writes it, in ``-log sigma``."""
    old, before = None, 0.0
    for sigma, after in pairwise(sigmas):
        new = denoised(x, sigma)
        step = math.log(sigma / after) if after else math.inf
        mixed = new
        if old is not None and after:
            ratio = before / step
            mixed = (1 + 0.5 / ratio) * new - 0.5 / ratio * old
        x = after / sigma * x - math.expm1(-step) * mixed
        old, before = new, step
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": partial(run_slopes, slope=euler_in_sigma),
    "ipndm-4": partial(run_slopes, slope=ipndm_in_sigma),
    "dpmpp-2m": run_2m,
}


@pytest.mark.parametrize("solver", SAMPLERS)
@each_seed(2)
def test_samplers_of_hosts_step_as_the_solver_that_was_searched(solver: str, seed: int) -> None:
    model = random_mixture(seed)
    velocity = velocity_of(model, 3)
    times = SD.flow_times(torch.tensor([980.0, 700.0, 520.0, 260.0, 90.0, 20.0])).tolist()
    schedule = replace(make([*times, 0.0], SD), solver=solver)
    x = model.noise(3, seed).double()
    *_, expected = solvers.integrate(solvers.get(solver), velocity, x, schedule.times)

    def denoised(state: Tensor, sigma: float) -> Tensor:
        t = sigma / (1 + sigma)
        flow = state * (1 - t)
        return flow - t * velocity(flow, t)

    sigmas = schedule.sigmas
    got = SAMPLERS[solver](denoised, x * (1 + sigmas[0]), sigmas)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@each_seed(2)
def test_wans_own_code_steps_as_the_solver_that_was_searched(seed: int) -> None:
    """Its dpm++, in log SNR of a flow path: the first step, from pure noise, has infinite length,
    and the last is of order 1."""
    model = random_mixture(seed)
    velocity = velocity_of(model, 3)
    schedule = replace(make([1.0, 0.96, 0.9, 0.75, 0.5, 0.2, 0.0], FLOW.path), solver="dpmpp-2m")
    x = model.noise(3, seed).double()
    *_, expected = solvers.integrate(solvers.get("dpmpp-2m"), velocity, x, schedule.times)
    given: list[float] = eval(export.to(schedule, "wan"), {"np": np}).tolist()
    told = [int(1000 * sigma) for sigma in given]

    def log_snr(sigma: float) -> float:
        return (
            math.log((1 - sigma) / sigma) if 0 < sigma < 1 else math.copysign(math.inf, 0.5 - sigma)
        )

    old, before = None, 0.0
    for step, sigma, after in zip(told, given, [*given[1:], 0.0], strict=True):
        new = x - sigma * velocity(x, step / 1000)
        length = log_snr(after) - log_snr(sigma)
        mixed = new
        if old is not None and after > 0:
            mixed = new + 0.5 * (new - old) * length / before
        x = after / sigma * x - (1 - after) * math.expm1(-length) * mixed
        old, before = new, length
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)  # sigmas are float32


def test_every_sampler_of_a_host_is_one_of_these() -> None:
    assert {solver for form in FORMATS.values() for solver in form.samplers} == set(SAMPLERS)


@pytest.mark.parametrize("name", FORMATS)
def test_hosts_name_the_sampler(name: str) -> None:
    form = FORMATS[name]
    if form.flow_only or form.whole_timesteps or form.final_zero is None:
        return
    for solver, sampler in form.samplers.items():
        schedule = replace(VP, solver=solver)
        assert export.to(schedule, name) == export.to(VP, name)
        assert name == "text" or sampler in form.about(solver)
        assert "{" not in form.about(solver)


def test_hosts_of_usual_orders_refuse_others() -> None:
    schedule = replace(VP, solver="dpmpp-2m", orders=(1, 2, 1))
    export.to(schedule, "comfyui")
    with pytest.raises(ExportError, match=r"comfyui: .* usual order, .* \(--fixed-order\)"):
        export.to(replace(schedule, orders=(1, 1, 1)), "comfyui")
