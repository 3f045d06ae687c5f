"""What tests of solvers share: exact runs, and steps of the field's own schedulers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from driver_cases import random_mixture
from oss_ext import solvers
from oss_ext.models import Model

LESS_THAN_ITS_ORDER = {"dpmpp-3m": 2}  # its D_2 stands where twice it should
"""Solvers whose published formula converges with another order than its name says."""

FIRST, LAST = 0.9, 0.5
"""Where orders are measured: no infinite log-SNR, and before samples decide for a component."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def never(x: Tensor, t: float) -> Tensor:
    raise AssertionError("a solver of one evaluation asked for another")


def velocity_of(model: Model, samples: int) -> Callable[[Tensor, float], Tensor]:
    """``velocity(x, t)`` as ``integrate`` asks for it."""
    sample = torch.arange(samples)
    return lambda x, t: model(x, torch.full((samples,), t, dtype=torch.float64), sample)


def even(steps: int) -> list[float]:
    """``steps`` steps of unequal size from FIRST to LAST, alike at every number of them."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (LAST + (FIRST - LAST) * (u + 0.3 * u * (u - 1))).tolist()


@functools.cache
def exact_case(seed: int) -> tuple[Model, Tensor, Tensor]:
    """A mixture, states at FIRST, and where they end at LAST: by Runge-Kutta, to 1e-13."""
    model = random_mixture(seed)
    noise = model.noise(8, seed)
    velocity, x = velocity_of(model, 8), noise
    for t, t_next in pairwise(even(1024)):
        h, middle = t_next - t, (t + t_next) / 2
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, middle)
        k3 = velocity(x + h / 2 * k2, middle)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, t_next))
    return model, noise, x


def final_error(name: str, steps: int, seed: int) -> float:
    """Root mean square error of a solver at LAST after ``steps`` steps."""
    model, noise, exact = exact_case(seed)
    *_, last = solvers.integrate(solvers.get(name), velocity_of(model, 8), noise, even(steps))
    return float((last - exact).square().mean().sqrt())
