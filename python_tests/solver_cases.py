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
from oss_ext.solvers import Multistep
from oss_ext.solvers.base import OUTPUTS, History

NOT_ITS_ORDER = {
    "dpm-3m": 2,  # its D_2 stands where twice it should
    "dpmpp-3m": 2,
    "unipc-2": 3,  # the corrector is an order ahead of the predictor that it is named after
    "unipc-3": 4,
    "unipc-2-bh1": 3,
    "unipc-3-bh1": 4,
    "ipndm-3": 2,  # weights of equal steps, on steps that are nearly so
    "ipndm-4": 2,
}
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


FINE = 1024


@functools.cache
def exact_case(seed: int) -> tuple[Model, list[Tensor]]:
    """A mixture, and states of it at ``even(FINE)``: by Runge-Kutta, to 1e-13."""
    model = random_mixture(seed)
    x = model.noise(8, seed)
    velocity, states = velocity_of(model, 8), [x]
    for t, t_next in pairwise(even(FINE)):
        h, middle = t_next - t, (t + t_next) / 2
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, middle)
        k3 = velocity(x + h / 2 * k2, middle)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, t_next))
        states.append(x)
    return model, states


def final_error(name: str, steps: int, seed: int) -> float:
    """Root mean square error of a solver at LAST after ``steps`` steps.

    A multistep solver starts from exact outputs: the error of the low orders that it starts with
    otherwise would be all that is seen.
    """
    solver, times = solvers.get(name), even(steps)
    model, states = exact_case(seed)
    exact, velocity = states[:: FINE // steps], velocity_of(model, 8)
    first = solver.order - 1 if isinstance(solver, Multistep) else 0
    outputs = []
    for x, t in zip(exact[:first], times, strict=False):
        of_state, of_velocity = OUTPUTS[solver.output](torch.tensor(t, dtype=torch.float64))
        outputs.append(of_state * x + of_velocity * velocity(x, t))
    history = History(tuple(times[:first][::-1]), tuple(outputs[::-1]), 0) if first else None
    x = exact[first]
    for t, t_next in pairwise(times[first:]):
        v = velocity(x, t)
        x, history = solver.step(history, x, v, t, t_next, solver.order, velocity)
    return float((x - exact[-1]).square().mean().sqrt())
