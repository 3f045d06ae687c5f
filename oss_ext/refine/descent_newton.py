"""Gauss-Newton steps: all knots moved at once, by what the whole final residual says.

A coordinate move learns one number from a run, whether it was better. The residual ``e(r)`` of the
student that uses rows ``r``, its end less the teacher's, holds as many as a sample has elements.
With secants in place of derivatives (networks need not be differentiable, nor times continuous)

    J[:, k] = (e(r + h u_k) - e(r)) / h
    (A + lambda diag A) d = -g,    A = sum_b w_b J_b^T J_b,    g = sum_b w_b J_b^T e_b

is a Levenberg-Marquardt step ``d``. For the mean error ``w = 1``; for the mean of its logarithm
``w_b = 1 / |e_b|^2``, which makes the weighted sum touch it from above. The secants cost a part of
a run each, on the front of the race alone; every step that is tried corrects them (Broyden, 1965).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.refine.base import Race, Rows
from oss_ext.trajectory import in_order

SECANT = 0.1
"""How far a knot is moved for its secant: this share of the room that it has."""

FAILURES, STEPS = 3, 6
"""After so many failures in a row, or steps, the secants are left."""

LEAST_GAIN = 0.02
"""A step that gains less, as a share of the error, is the last one on its secants."""


def gauss_newton(race: Race, rows: Rows, score: Tensor) -> tuple[Rows, Tensor]:
    """Secants around ``rows`` and steps on them as long as they help."""
    knots = range(race.first, len(rows) - 1)
    if not knots:
        return rows, score
    start = race.residuals(rows)
    if not race.may_go_on():
        return rows, score
    secants = torch.zeros(*start.shape, len(knots), dtype=start.dtype, device=start.device)
    front = score[: len(start)].mean()
    best_probe, best_change = rows, 0.0
    probes = []
    for column, k in reversed(list(enumerate(knots))):  # the last ones cost least
        step = _secant_step(rows, k, race.last_row)
        if step:
            probes.append((column, step, (*rows[:k], rows[k] + step, *rows[k + 1 :])))
    race.ahead([probe for _, _, probe in probes])
    for column, step, probe in probes:
        change = float(race.values(probe).mean() - front)
        if not math.isinf(change):  # else nothing is known of the knot, and it stays
            secants[..., column] = (race.residuals(probe) - start) / step
        if change < best_change:
            best_probe, best_change = probe, change
        if not race.may_go_on():
            return rows, score
    found, better = _steps(race, rows, score, start, secants)
    if found == rows and best_probe != rows:
        probed = race.better(best_probe, score)
        return (rows, score) if probed is None else (best_probe, probed)
    return found, better


def _steps(
    race: Race, rows: Rows, score: Tensor, residual: Tensor, secants: Tensor
) -> tuple[Rows, Tensor]:
    """Levenberg-Marquardt steps from ``rows``, correcting ``secants`` on the way."""
    damping, failures, steps = 0.1, 0, 0
    tried = {rows}
    while race.may_go_on() and failures < FAILURES and steps < STEPS:
        move = _step(residual, secants, damping, race.reduce)
        head, free = rows[: race.first], rows[race.first : -1]
        moved = (*head, *in_order([r + d for r, d in zip(free, move, strict=True)],
                                   (head[-1] if head else race.last_row + 1) - 1), 0)  # fmt: skip
        if moved in tried:
            damping, failures = 10 * damping, failures + 1
            continue
        tried.add(moved)
        found, after = race.better(moved, score), race.residuals(moved)
        taken = cpu.tensor([b - a for a, b in zip(free, moved[race.first : -1], strict=True)])
        taken = taken.to(secants)
        if after.isfinite().all():
            missed = (after - residual) - secants @ taken
            secants += missed[..., None] * (taken / taken.square().sum())
        if found is None:
            damping, failures = 10 * damping, failures + 1
            continue
        gain = float((score - found).mean())
        gain = gain if race.reduce == "log_mean" else gain / float(score.mean())
        rows, score, residual = moved, found, after
        damping, failures, steps = 0.3 * damping, 0, steps + 1
        if gain < LEAST_GAIN:
            break
    return rows, score


def _step(residual: Tensor, secants: Tensor, damping: float, reduce: str) -> list[float]:
    """The move of every free knot, in rows."""
    knots = secants.shape[-1]
    normal = torch.zeros(knots, knots, dtype=torch.float64, device=secants.device)
    gradient = torch.zeros(knots, dtype=torch.float64, device=secants.device)
    for e, j in zip(residual, secants, strict=True):  # a sample at a time, for memory
        e, j = e.double(), j.double()
        weight = 1.0
        if reduce == "log_mean":
            weight = 1 / max(float(e.square().sum()), torch.finfo(torch.float32).tiny)
        normal += weight * (j.T @ j)
        gradient += weight * (j.T @ e)
    scale = normal.diagonal()
    largest = float(scale.max())
    if not 0 < largest < torch.inf:
        return [0.0] * knots
    damped = normal + torch.diag(damping * scale + 1e-12 * largest)
    return torch.linalg.solve(damped, -gradient).nan_to_num().tolist()


def _secant_step(rows: Rows, k: int, last_row: int) -> int:
    """By how much to move knot ``k``: into the larger gap; 0 where there is no room."""
    up = (rows[k - 1] if k else last_row + 1) - rows[k] - 1
    down = rows[k] - rows[k + 1] - 1
    room = max(up, down)
    step = min(room, max(1, round(SECANT * room)))
    return step if up >= down else -step
