"""DM: time steps that minimise a bound which knows no model (Xue et al. 2024, DM-NonUniform).

In ``lambda = ln(alpha / beta)`` the exact solution is ``x0_hat`` integrated with weight e^lambda;
a multistep solver puts a polynomial through its last values instead. Step n multiplies the error
of ``x0_hat(lambda_j)`` by

    w[n, j] = int_{lambda_n}^{lambda_n+1} e^lambda l_j(lambda) dlambda

with ``l_j`` Lagrange's polynomial on the step's nodes, and the errors are taken to be of the size
``eps_j = sigma_j^p / alpha_j``, in variance-preserving terms. Minimised over the inner lambda is

    bound = sum_n |(w[n, j] eps_j)_j|_2
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oss_ext import arguments
from oss_ext.baselines.base import (
    Baseline,
    Calibration,
    UnableError,
    even_lambdas,
    schedule_through,
)
from oss_ext.schedule import Schedule

ORDER = 3
"""The published solver's; lower in the first and in the last steps."""

LEAST_GAP = 1e-3  # in lambda: constraints are to be strict

Vector = NDArray[np.float64]

_PLACES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def dm(
    calibration: Calibration, steps: int, order: int = ORDER, power: float | None = None
) -> Schedule:
    """The inner lambda by constrained minimisation from uniform ones; no model evaluations.

    From the teacher's start to the least level that it asks at, of which sampling makes the clean
    end (as in ``logsnr``). The published code adds the weights of a node over the steps before it
    takes absolute values; only the first steps, and in small budgets more of them, it bounds each
    alone, for stability. Here all are: the sums have minima in which steps cancel each other, and
    optimisers do not agree on one.

    Args:
        order: of the multistep solver that the bound is for; whatever the student's is.
        power: p; None: as published, 1 for pixels and 2 for latents (a model without a data range).

    Raises:
        ValueError: ``steps`` not within 1 to N, ``order`` not a whole number from 1 on.
        UnableError: SciPy is missing; times that repeat.
    """
    trajectory = calibration.trajectory
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    order = arguments.whole_number("order", order)
    if power is None:
        power = 2.0 if calibration.model.data_range is None else 1.0
    start = even_lambdas(trajectory, steps).numpy()
    found = minimised(start, order, power) if steps > 1 else start
    return schedule_through(trajectory, torch.from_numpy(-found[:-1]).sigmoid(), "dm")


def bound(lambdas: Vector, order: int, power: float) -> float:
    """The bound above for ascending ``lambdas`` ``[steps + 1]``."""
    steps = len(lambdas) - 1
    error = np.logaddexp(0, 2 * lambdas) * (-power / 2) + np.logaddexp(0, -2 * lambdas) / 2
    of_step = np.minimum(order, np.minimum(np.arange(1, steps + 1), np.arange(steps, 0, -1)))
    total = 0.0
    for k in np.unique(of_step):
        step = np.flatnonzero(of_step == k)
        gap = (lambdas[step + 1] - lambdas[step])[:, None]
        at = lambdas[step, None] + gap * (_PLACES + 1) / 2
        measure = gap / 2 * _WEIGHTS * np.exp(at)
        squares = np.zeros(len(step))
        for j in range(k):
            node = lambdas[step - j, None]
            others = [lambdas[step - m, None] for m in range(k) if m != j]
            basis = np.prod([(at - other) / (node - other) for other in others], axis=0)
            squares += ((measure * basis).sum(axis=1) * np.exp(error[step - j])) ** 2
        total += float(np.sqrt(squares).sum())
    return total


def minimised(start: Vector, order: int, power: float) -> Vector:
    """``start`` with inner values that lower the bound, ascending still; else ``start`` itself.

    By SLSQP, which ends where the paper's trust-region method does, in a fraction of its steps.

    Raises:
        UnableError: SciPy is missing.
    """
    try:
        optimize: Any = importlib.import_module("scipy.optimize")
    except ImportError:
        raise UnableError("dm: needs SciPy: pip install scipy") from None
    first, last, count = start[0], start[-1], len(start) - 1
    scale = bound(start, order, power)

    def objective(inner: Vector) -> float:
        return bound(np.concatenate([[first], inner, [last]]), order, power) / scale

    # Gap by gap: the ends are no variables and stand on the right-hand side.
    gaps = np.eye(count, count - 1) - np.eye(count, count - 1, -1)
    least = np.full(count, min(LEAST_GAP, (last - first) / count / 2))
    least[0] += first
    least[-1] -= last
    constraint = optimize.LinearConstraint(gaps, least, np.inf)
    result = optimize.minimize(objective, start[1:-1], method="SLSQP", constraints=[constraint])
    found: Vector = np.concatenate([[first], result.x, [last]])
    lower = result.fun < 1 and bool((np.diff(found) > 0).all())
    return found if lower else start


DM = Baseline(
    "dm", "least error bound of a third-order solver, by SciPy (Xue et al. 2024, DM-NonUniform)", dm
)
