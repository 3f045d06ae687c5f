"""GITS: dynamic programming over the teacher's deviation from a straight line (Chen et al. 2024).

With ``y = x / (1 - t)``, the states of ``alpha = 1`` that the paper has, ``d(y)`` is the distance
of ``y`` from the line through the teacher's first and last. A step from the teacher's own row i
to row j costs what it adds to that:

    cost[i, j] = mean_b (d(y[i] -> j) - d(y[j]))
    V[k][i] = min_{j < i} cost[i, j] + coefficient V[k-1][j]

The costs are fixed: no step starts from a state that the student would have reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from oss_ext import arguments, cpu, solvers
from oss_ext.baselines.base import Baseline, Calibration
from oss_ext.models.evaluation import Evaluator
from oss_ext.schedule import Schedule
from oss_ext.trajectory import Trajectory

COEFFICIENTS = (1.15, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)
"""The published default and sweep; above 1, later steps weigh more."""


def gits(
    calibration: Calibration, steps: int, coefficients: Sequence[float] = COEFFICIENTS
) -> Schedule:
    """The path from N to 0 with the least sum of fixed costs; they need the teacher alone.

    A teacher that is not Euler's, or was kept in 16 bits, does not show its velocities: they are
    evaluated once more. Of the paths that several ``coefficients`` have, the one with the least
    mean squared final error on the calibration samples, which takes a run of each.

    Raises:
        ValueError: ``steps`` not within 1 to N, none of the ``coefficients`` or one not positive.
        NonFiniteError: the model returned NaN or inf.
    """
    trajectory = calibration.trajectory
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    weights = [arguments.number("coefficients", c, positive=True) for c in coefficients]
    if not weights:
        raise ValueError("coefficients: expected one or more, got none")
    evaluator = Evaluator(calibration.model, trajectory.samples, calibration.max_batch)
    cost = deviation_costs(trajectory, evaluator)
    paths = dict.fromkeys(tuple(cheapest_path(cost, steps, weight)) for weight in weights)
    made = [trajectory.schedule(path, solver=calibration.solver, method="gits") for path in paths]
    spent = trajectory.nfe + evaluator.nfe // trajectory.samples
    best = made[0]
    if len(made) > 1:
        best = min(made, key=calibration.error)
        solver = solvers.get(calibration.solver)
        spent += sum(solvers.evaluations(solver, s.times, s.orders) for s in made)
    return replace(best, samples=trajectory.samples, search_nfe=spent)


def deviation_costs(trajectory: Trajectory, evaluator: Evaluator) -> Tensor:
    """``cost[i, j]`` of an Euler step from row i to row j, ``[N+1, N+1]`` float64; inf for j >= i.

    Args:
        trajectory: the teacher.
        evaluator: of its model, asked only where the teacher does not show its velocities: it is
            not Euler's, or was kept in 16 bits, whose rounding the division by a step magnifies.
    """
    shows = trajectory.solver == "euler" and trajectory.ends is None
    times, count = trajectory.times, len(trajectory.times)
    line = trajectory.noise.double() - (1 - times[-1]) / (1 - times[0]) * trajectory.final.double()
    unit = torch.nn.functional.normalize(line.flatten(1), dim=1)

    def across(x: Tensor) -> Tensor:
        flat = x.double().flatten(1)
        return flat - (flat * unit).sum(1, keepdim=True) * unit

    end = across(trajectory.final) / (1 - times[0])
    distance = cpu.full((count, count), torch.inf, dtype=torch.float64)
    distance[0, 0] = 0
    for i in range(1, count):
        x = trajectory.states[i]
        if shows:
            velocity = (trajectory.states[i - 1] - x) / float(times[i - 1] - times[i])
        else:
            velocity = evaluator.at(x, float(times[i]))
        basis = torch.stack([across(x), across(velocity), end], dim=1)
        products = (basis @ basis.mT).cpu()
        to = times[: min(i + 1, count - 1)]  # row i too: the teacher's own distance
        weights = torch.stack([1 / (1 - to), (to - times[i]) / (1 - to), -torch.ones_like(to)], 1)
        square = torch.einsum("jp,bpq,jq->bj", weights, products, weights)
        distance[i, : len(to)] = square.clamp_min(0).sqrt().mean(0)
    own = distance.diagonal().clone()
    own[-1] = 0  # on the line
    below = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    return torch.where(below, distance - own, torch.inf)


def cheapest_path(cost: Tensor, steps: int, coefficient: float) -> list[int]:
    """Rows N to 0 of the path ``s`` with the least ``sum_k coefficient^k cost[s_k, s_k+1]``."""
    last = len(cost) - 1
    value = np.full(last + 1, np.inf)
    value[0] = 0
    choices = []
    for _ in range(steps):
        total = cost.numpy() + coefficient * value
        choices.append(last - total[:, ::-1].argmin(axis=1))  # the nearest of equals, as published
        value = total.min(axis=1)
    rows = [last]
    for choice in reversed(choices):
        rows.append(int(choice[rows[-1]]))
    return rows


GITS = Baseline(
    "gits", "least deviation from a straight line, by fixed costs (Chen et al. 2024)", gits
)
