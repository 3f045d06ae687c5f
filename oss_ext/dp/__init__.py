"""The dynamic programme over teacher times: its table, backtracking and replay.

    z[0][i] = x[N] for every i (free start) or only for i = N (pinned start)
    for k = 1 .. M:
        v[i]      = velocity(z[k-1][i], t[i])                         for live sources i
        cost[i,j] = mean (z[k-1][i] + (t[j] - t[i]) v[i] - x[j])^2    for live i > j
        r[k][j]   = argmin_i cost[i,j]
        z[k][j]   = z[k-1][r] + (t[j] - t[r]) v[r],  r = r[k][j]

That is Algorithm 1. With a multistep solver (Algorithm 2) a source has a candidate of every order
that its history allows, and the argmin is over (order, source). A singlestep one makes its steps
from the few sources of every target that Euler finds the nearest. A metric that takes evaluations
at the candidates chooses from a few in the same way.

Exactly k steps: row k of the table is the answer for the budget k, so one run to M steps holds
the schedule of every budget up to M. A target without a finite candidate is dead and is no source
of the next step. Replaying a backtracked path gives the table's state and cost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from oss_ext import arguments, cpu, solvers
from oss_ext.dp.euler import EulerSteps
from oss_ext.dp.orders import OrderSteps
from oss_ext.dp.stages import StageSteps
from oss_ext.dp.table import (
    FEW,
    Table,
    check_reached,
    evaluations,
    first_sources,
    next_sources,
    of_costs,
)
from oss_ext.events import tell
from oss_ext.metrics import XT, AffineMetric, EvaluatedMetric, Metric, StateMetric
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.sampling import student_states
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory

__all__ = [
    "FEW", "VELOCITY_BYTES", "Table", "check_metric", "check_reached", "evaluations",
    "first_sources", "held", "next_sources", "of_costs", "replay", "run",
]  # fmt: skip

VELOCITY_BYTES = 2**27
"""Velocities of one step kept at once by default; more are streamed through in chunks."""


def check_metric(solver: str, metric: Metric) -> None:
    """``ValueError`` unless steps of ``solver`` can be compared with the teacher by ``metric``."""
    if isinstance(metric, StateMetric | EvaluatedMetric):
        return
    if isinstance(solvers.get(solver), solvers.Singlestep) or not isinstance(metric, AffineMetric):
        raise ValueError(
            "metric: expected one of states ('xt') or of evaluations at candidates "
            f"('x0-candidate', 'perceptual:MODULE') with solver {solver!r}, got {metric.name!r}"
        )


def run(
    evaluator: Evaluator,
    trajectory: Trajectory,
    steps: int,
    *,
    reduce: str,
    start: str = "free",
    allowed: Tensor | None = None,
    velocity_bytes: int = VELOCITY_BYTES,
    solver: str = "euler",
    fixed_order: bool = False,
    metric: Metric = XT,
) -> Table:
    """Fill the table for budgets 1 to ``steps``.

    Args:
        evaluator: of the model; only live sources are evaluated.
        trajectory: the teacher.
        reduce: ``none`` for a path per sample, ``mean`` or ``log_mean`` for a joint one.
        start: ``free`` or ``pinned``, see above.
        allowed: bool ``[M, N+1]``, or ``[M, N+1, B]`` with ``none``: ``allowed[k-1, i]``, whether
            row ``i`` may be a source of step k. None: all rows. Every target keeps its cost and
            parent in the table; where it is not allowed, no path goes on from it.
        velocity_bytes: memory for velocities; what exceeds it is streamed. The bits are equal
            where the rows of a model call are (``max_batch`` the samples, or 1). Euler and ``xt``
            only.
        solver: of the student. One that evaluates the model between the steps takes further
            evaluations, see ``evaluations``.
        fixed_order: only the highest order that the history and the target allow.
        metric: what is compared with the teacher. Costs in the table are those of the whole state
            in any case.

    Raises:
        ValueError: ``steps`` not within 1 to N, an unknown ``reduce``, ``start`` or ``solver``, a
            ``metric`` that does not go with it, ``velocity_bytes`` below 0, or ``allowed`` of
            another shape or with a step that none of its rows can be a source of.
        NonFiniteError: no finite path to the clean end is left; names time and sample.
    """
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    arguments.whole_number("velocity_bytes", velocity_bytes, least=0)
    check_metric(solver, metric)
    live = first_sources(trajectory, reduce, start)
    if allowed is None:
        allowed = cpu.ones(steps, 1, 1, dtype=torch.bool)
    else:
        allowed = _check_allowed(allowed, steps, reduce, live)
    onward = torch.cat([allowed[1:], torch.zeros_like(allowed[:1])])
    used = solvers.get(solver)
    leg = evaluator.leg()
    shape, joint = (steps, len(live), trajectory.samples), reduce != "none"
    before = leg.take(lambda there: Table.there(there, shape, joint)) if leg.there else None
    if before is not None and before.steps == steps:
        return before
    mover: EulerSteps | OrderSteps | StageSteps
    if isinstance(used, solvers.Singlestep):
        assert isinstance(metric, StateMetric | EvaluatedMetric)
        mover = StageSteps(evaluator, trajectory, used, reduce, metric)
    elif used.order == 1 and metric == XT:
        mover = EulerSteps(evaluator, trajectory, reduce, velocity_bytes)
    else:
        assert isinstance(used, solvers.Multistep)
        assert isinstance(metric, AffineMetric | EvaluatedMetric)
        mover = OrderSteps(evaluator, trajectory, used, reduce, fixed_order, metric)
    costs, parents, orders = [], [], []
    if before is not None:
        leg.take(functools.partial(mover.go_on, taken=before.steps))
        costs, parents = list(before.cost), list(before.parent)
        orders = [] if before.order is None else list(before.order)
        live = next_sources(parents[-1], trajectory.samples)
    for k in range(len(costs) + 1, steps + 1):
        cost, parent, order = mover.step(live & allowed[k - 1], onward[k - 1])
        costs.append(cost.cpu())
        parents.append(parent.cpu())
        orders += [] if order is None else [order]
        live = next_sources(parents[-1], trajectory.samples)
        check_reached(parents[-1], k, reduce, evaluator)
        reached = float(costs[-1][0].double().mean())
        tell("step", step=k, steps=steps, cost=reached, teacher_steps=trajectory.steps)
        table = Table(
            torch.stack(costs), torch.stack(parents), torch.stack(orders) if orders else None
        )
        moving = mover.kept() if k < steps else {}
        if k == steps or (moving and leg.pays(sum(map(_bytes, moving.values())))):
            leg.reached({**table.kept(), **moving})
    return table


def _bytes(tensors: Sequence[Tensor] | Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def held(
    evaluator: Evaluator,
    trajectory: Trajectory,
    steps: int,
    *,
    reduce: str,
    velocity_bytes: int = VELOCITY_BYTES,
    solver: str = "euler",
    metric: Metric = XT,
) -> list[Held]:
    """What ``run`` holds at its peak beside the teacher; arguments as there."""
    used = solvers.get(solver)
    if isinstance(used, solvers.Singlestep):
        assert isinstance(metric, StateMetric | EvaluatedMetric)
        return StageSteps.held(evaluator, trajectory, steps, used, reduce, metric)
    if used.order == 1 and metric == XT:
        return EulerSteps.held(trajectory, velocity_bytes)
    assert isinstance(used, solvers.Multistep)
    assert isinstance(metric, AffineMetric | EvaluatedMetric)
    return OrderSteps.held(evaluator, trajectory, steps, used, reduce, metric)


def _check_allowed(allowed: Tensor, steps: int, reduce: str, live: Tensor) -> Tensor:
    """``allowed`` as ``[M, N+1, B or 1]``, with a source for every step and sample."""
    rows, samples = live.shape
    shapes = [(steps, rows)] + [(steps, rows, samples)] * (reduce == "none")
    if allowed.dtype != torch.bool or tuple(allowed.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        got = f"{allowed.dtype} of shape {tuple(allowed.shape)}"
        raise ValueError(f"allowed: expected bool of shape {expected}, got {got}")
    allowed = allowed.cpu().reshape(steps, rows, -1)
    number = cpu.arange(rows)[:, None]
    for k in range(steps):
        # What a step can reach lies below the highest of its sources.
        top = torch.where(live & allowed[k], number, 0).amax(dim=0)
        if not bool(top.all()):
            who = f" for sample {int(top.argmin())}" if allowed.shape[2] > 1 else ""
            raise ValueError(
                "allowed: expected for every step a row that can be its source, got none for "
                f"step {k + 1}{who}"
            )
        live = (number > 0) & (number < top)
    return allowed


def replay(
    model: Model,
    trajectory: Trajectory,
    indices: Sequence[int],
    max_batch: int | None = None,
    *,
    solver: str = "euler",
    orders: Sequence[int] = (),
) -> tuple[list[Tensor], Tensor]:
    """Run the path ``indices`` (descending teacher rows) from the trajectory's noise.

    Returns:
        The state ``[B, *dims]`` after every step, and the mean squared distance to the teacher
        at the same row, ``[steps, B]`` float64.
    """
    schedule = trajectory.schedule(indices, solver=solver, orders=tuple(orders))
    states = list(student_states(model, trajectory.noise, schedule, max_batch=max_batch))
    errors = [
        (x - trajectory.states[row]).double().square().flatten(1).mean(dim=1)
        for x, row in zip(states, indices[1:], strict=True)
    ]
    return states, torch.stack(errors)
