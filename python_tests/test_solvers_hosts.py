"""Solvers beside those of diffusers, and beside their papers where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from driver_cases import (
    each_seed,
    one_thread,  # noqa: F401
    random_mixture,
)
from oss_ext import solvers
from solver_cases import velocity_of

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`algorithm_types.dpmsolver:FutureWarning"),
]

SIGMAS = {
    "flow": (0.97, 0.9, 0.76, 0.61, 0.4, 0.22, 0.1, 0.03),
    "vp": (21.0, 9.0, 4.2, 2.0, 0.9, 0.41, 0.15, 0.04),
    "ve": (40.0, 14.0, 5.1, 2.3, 1.0, 0.44, 0.2, 0.05),
}
"""What hosts of these coordinates call sigma."""

SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "flow": torch.ones_like,
    "vp": lambda t: 1 / torch.hypot(t, 1 - t),
    "ve": lambda t: 1 / (1 - t),
}
"""The host's state as a multiple of that in flow coordinates."""


@dataclass(frozen=True)
class Host:
    """A scheduler of diffusers that runs one of the solvers here."""

    solver: str
    coordinates: str
    scheduler: str
    options: dict[str, Any]
    to_clean: bool = False
    step: Callable[..., Any] = lambda scheduler, *args: scheduler.step(*args)

    def __str__(self) -> str:
        return f"{self.solver}-{self.coordinates}" + "-to-clean" * self.to_clean


def lambda_hosts() -> list[Host]:
    """Those that run on flow and VP paths, to the clean end where theirs is no NaN."""
    classes = []
    for order in (2, 3):
        for name, algorithm in (("dpm", "dpmsolver"), ("dpmpp", "dpmsolver++")):
            options = {"algorithm_type": algorithm, "solver_order": order}
            classes.append((f"{name}-{order}m", "DPMSolverMultistepScheduler", options))
        for variant in ("bh2", "bh1"):
            name = f"unipc-{order}" + "-bh1" * (variant == "bh1")
            options = {"solver_type": variant, "solver_order": order}
            classes.append((name, "UniPCMultistepScheduler", options))
        classes.append((f"deis-{order}", "DEISMultistepScheduler", {"solver_order": order}))
    for name, algorithm in (("dpm", "dpmsolver"), ("dpmpp", "dpmsolver++")):
        options = {"algorithm_type": algorithm, "solver_order": 2}
        classes.append((f"{name}-2s", "DPMSolverSinglestepScheduler", options))
    hosts = []
    for name, scheduler, options in classes:
        data = solvers.get(name).output == "data" and "bh1" not in name
        for coordinates in ("flow", "vp"):
            flow = coordinates == "flow"
            predicts = "flow_prediction" if flow and not name.startswith("dpm-") else "epsilon"
            given = options | {"use_flow_sigmas": flow, "prediction_type": predicts}
            for to_clean in (False, True)[: 1 + data]:
                ends: dict[str, Any] = {"lower_order_final": to_clean}
                if not to_clean and scheduler != "DEISMultistepScheduler":
                    ends["final_sigmas_type"] = "sigma_min"
                hosts.append(Host(name, coordinates, scheduler, given | ends, to_clean))
    return hosts


def sigma_hosts() -> list[Host]:
    def lms(order: int) -> Callable[..., Any]:
        return lambda scheduler, *args: scheduler.step(*args, order=order)

    hosts = [
        Host("heun", "flow", "FlowMatchHeunDiscreteScheduler", {"shift": 1.0}, True),
        Host("heun-sigma", "ve", "HeunDiscreteScheduler", {}, True),
    ]
    for order in (2, 3, 4):
        name = f"adams-sigma-{order}"
        hosts.append(Host(name, "ve", "LMSDiscreteScheduler", {}, True, lms(order)))
    return hosts


def sigmas_of(host: Host) -> list[float]:
    """Noise levels at the ends of the solver's steps."""
    given = [float(torch.tensor(s)) for s in SIGMAS[host.coordinates]]  # as float32 has them
    return [*given, 0.0] if host.to_clean else given


def flow_time(host: Host, sigma: float) -> float:
    return sigma if host.coordinates == "flow" else sigma / (1 + sigma)


def evaluated_at(host: Host, sigmas: list[float]) -> list[float]:
    """Noise levels of all evaluations of a host, and the last."""
    if "Heun" in host.scheduler:
        inner = [s for s in sigmas[1:-1] for _ in range(2)]
        return [sigmas[0], *inner, sigmas[-1]]
    if "Singlestep" not in host.scheduler:
        return sigmas
    found = [sigmas[0]]
    for s, s_next in pairwise(sigmas):
        if s_next > 0:  # a stage half-way in the log-SNR
            t, t_next = flow_time(host, s), flow_time(host, s_next)
            ratio = math.sqrt(t / (1 - t) * t_next / (1 - t_next))
            found.append(ratio / (1 + ratio) if host.coordinates == "flow" else ratio)
        found.append(s_next)
    return found


def run_host(host: Host, velocity: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
    """Where the scheduler ends, from the same state, in flow coordinates."""
    sigmas = evaluated_at(host, sigmas_of(host))
    scheduler = getattr(diffusers, host.scheduler)(**host.options)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(sigmas) - 1, 0, -1, dtype=torch.float32)
    scheduler.num_inference_steps = len(scheduler.timesteps)
    scheduler.set_begin_index(0)
    if "Singlestep" in host.scheduler:
        scheduler.order_list = [1, 2] * (len(sigmas) // 2) + [1]
    scheduler.is_scale_input_called = True  # asked for by one of them
    times = torch.tensor([flow_time(host, s) for s in sigmas], dtype=torch.float64)
    scales = SCALES[host.coordinates](times)
    state = x * scales[0]
    for k, timestep in enumerate(scheduler.timesteps):
        at = state.double() / scales[k]
        v = velocity(at, float(times[k]))
        noise = scheduler.config.get("prediction_type", "flow_prediction") == "epsilon"
        output = at + (1 - times[k]) * v if noise else v
        state = host.step(scheduler, output, timestep, state).prev_sample
    return state.double() / scales[-1]


@pytest.mark.parametrize("host", [*lambda_hosts(), *sigma_hosts()], ids=str)
@each_seed(1)
def test_it_ends_where_the_scheduler_of_diffusers_does(host: Host, seed: int) -> None:
    """In float32, as they compute at least in parts."""
    model = random_mixture(seed)
    velocity, x = velocity_of(model, 4), model.noise(4, seed)
    times = [flow_time(host, s) for s in sigmas_of(host)]
    *_, ours = solvers.integrate(solvers.get(host.solver), velocity, x, times)
    theirs = run_host(host, velocity, x)
    *_, euler = solvers.integrate(solvers.get("euler"), velocity, x, times)
    assert (ours - euler).norm() > 1e-2 * ours.norm()  # it matters which solver it is
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@each_seed(1)
def test_ipndm_ends_where_the_scheduler_of_diffusers_does(seed: int) -> None:
    """Of order 4 on a VP path, told the velocity ``alpha eps - beta x0`` of that."""
    model = random_mixture(seed)
    velocity, x = velocity_of(model, 4), model.noise(4, seed)
    times = [flow_time(Host("ipndm-4", "vp", "", {}), s) for s in SIGMAS["vp"]]
    *_, ours = solvers.integrate(solvers.get("ipndm-4"), velocity, x, times)
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(len(times))
    t = torch.tensor(times, dtype=torch.float64)
    scale = SCALES["vp"](t)
    scheduler.alphas, scheduler.betas = (1 - t) * scale, t * scale
    scheduler.timesteps = torch.arange(len(times) - 1, 0, -1, dtype=torch.float32)
    scheduler.set_begin_index(0)
    state = x * scale[0]
    for k, timestep in enumerate(scheduler.timesteps):
        at = state / scale[k]
        v = velocity(at, times[k])
        eps, x0 = at + (1 - t[k]) * v, at - t[k] * v
        output = scheduler.alphas[k] * eps - scheduler.betas[k] * x0
        state = scheduler.step(output, timestep, state).prev_sample
    torch.testing.assert_close(ours, state / scale[-1], rtol=1e-10, atol=1e-10)
