"""Coarse to fine: the dynamic programme on a thinned teacher, then near its paths on the full one.

Model evaluations are what a search costs, and the full programme spends one at every row and step.
Here the teacher is first seen at every ``stride``-th row only, which costs about a ``stride``-th;
the second programme, on all rows, has as sources of step k only the rows within ``band`` of a row
that a coarse path starts its step k from:

    allowed[k] = union over budgets m > k of  path_m[k] - band .. path_m[k] + band,  in 1 .. N

The coarse paths lie in the band themselves, so that every budget has one. A dynamic programme
keeps the nearest state of every row, which need not be the one that ends nearest: the result can
be better or worse than the full search's, and even than the coarse one's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, cpu, dp
from oss_ext.metrics import XT, Metric
from oss_ext.models.evaluation import Evaluator
from oss_ext.schedule import STARTS
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory


def evaluations(
    teacher_steps: int,
    budgets: Sequence[int],
    start: str,
    stride: int,
    band: int | None = None,
    evaluated: bool = False,
) -> int:
    """Model evaluations per sample that a search never exceeds (teacher not included).

    With n = ceil(N / stride), M the largest budget and c(k) the number of budgets of k or more:

        dp.evaluations(n, M, start) + sum_{k=1..M} min(c(k) (2 band + 1), N - k + 1)

    and 1 for the sum's first term with a pinned start. A metric that is ``evaluated`` has in
    ``dp.evaluations`` its own, takes ``dp.FEW`` times the sum's later terms, and one for every
    teacher's state that these stand for, at most N - 1.

    Raises:
        ValueError: bad arguments, as ``coarse_to_fine`` has them.
    """
    wanted, band = _check(teacher_steps, budgets, stride, band)
    arguments.one_of("start", start, STARTS)
    coarse = dp.evaluations(-(-teacher_steps // stride), wanted[-1], start, evaluated=evaluated)
    fine = [
        min(sum(m >= k for m in wanted) * (2 * band + 1), teacher_steps - k + 1)
        for k in range(1, wanted[-1] + 1)
    ]
    first, later = 1 if start == "pinned" else fine[0], sum(fine[1:])
    if evaluated:
        first, later = first + min(later, teacher_steps - 1), dp.FEW * later
    return coarse + first + later


def coarse_to_fine(
    evaluator: Evaluator,
    trajectory: Trajectory,
    budgets: Sequence[int],
    *,
    reduce: str,
    start: str = "free",
    stride: int = 4,
    band: int | None = None,
    velocity_bytes: int = dp.VELOCITY_BYTES,
    solver: str = "euler",
    fixed_order: bool = False,
    metric: Metric = XT,
) -> dp.Table:
    """The table of a search over all rows, at the price of the rows near a coarse search's paths.

    Args:
        evaluator: of the model.
        trajectory: the teacher.
        budgets: the numbers of steps wanted, each 1 to N.
        reduce, start, velocity_bytes, solver, fixed_order, metric: as in ``dp.run``. With the
            reduction ``none`` every sample has its band.
        stride: of the coarse search.
        band: rows to either side of a coarse path's; None: ``stride``, which covers the gaps.

    Returns:
        The table of the full grid for budgets 1 to the largest. Those not asked for have the best
        of paths that were kept for the others, which can be many times worse: name them all.

    Raises:
        ValueError: bad arguments, or a coarse grid of fewer steps than the largest budget.
        NonFiniteError: no finite path to the clean end is left; names time and sample.
    """
    wanted, band = _check(trajectory.steps, budgets, stride, band)
    seen, rows = trajectory.thinned(stride)
    search = functools.partial(
        dp.run, reduce=reduce, start=start, velocity_bytes=velocity_bytes, solver=solver,
        fixed_order=fixed_order, metric=metric,
    )  # fmt: skip
    coarse = search(evaluator, seen, wanted[-1])
    allowed = _near(coarse, rows, wanted, band)
    return search(evaluator, trajectory, wanted[-1], allowed=allowed)


def held(
    evaluator: Evaluator,
    trajectory: Trajectory,
    budgets: Sequence[int],
    *,
    stride: int,
    **options: Any,
) -> list[Held]:
    """What ``coarse_to_fine`` holds at its peak beside the teacher: when it sees all rows.

    Args:
        options: keywords of ``dp.held``.
    """
    there = dp.held(evaluator, trajectory, max(budgets), **options)
    if trajectory.steps % stride == 0:
        return there
    thinned = -(-trajectory.steps // stride) + 1
    kept = [x for x in (trajectory.states, trajectory.x0) if x is not None]
    return [*there, Held("thinned teacher", sum(thinned * x[0].nbytes for x in kept))]


def _near(table: dp.Table, rows: Sequence[int], budgets: Sequence[int], band: int) -> Tensor:
    """Rows of the full grid within ``band`` of the paths' rows, as ``allowed`` of ``dp.run``."""
    samples = table.parent.shape[2]
    allowed = cpu.zeros(budgets[-1], rows[-1] + 1, samples, dtype=torch.bool)
    for b in range(samples):
        for steps in budgets:
            for k, knot in enumerate(table.backtrack(steps, b)[:-1]):
                allowed[k, max(1, rows[knot] - band) : rows[knot] + band + 1, b] = True
    return allowed.squeeze(2)


def _check(
    teacher_steps: int, budgets: Sequence[int], stride: int, band: int | None
) -> tuple[list[int], int]:
    """The budgets, ascending, and the band; ``ValueError`` names what cannot be."""
    if not isinstance(budgets, Sequence) or not budgets:
        raise ValueError(f"budgets: expected one whole number or more, got {budgets!r}")
    wanted = sorted({arguments.whole_number("budgets", m, most=teacher_steps) for m in budgets})
    stride = arguments.whole_number("stride", stride, most=teacher_steps)
    most = next(s for s in range(teacher_steps, 0, -1) if -(-teacher_steps // s) >= wanted[-1])
    if stride > most:
        raise ValueError(
            f"stride: expected 1 to {most}, which leaves the coarse grid {wanted[-1]} steps, got "
            f"{stride}"
        )
    return wanted, arguments.whole_number("band", stride if band is None else band, least=0)
