"""Algorithm 1: the dynamic programme over teacher times, its table, backtracking and replay.

    z[0][i] = x[N] for every i (free start) or only for i = N (pinned start)
    for k = 1 .. M:
        v[i]      = velocity(z[k-1][i], t[i])                         for live sources i
        cost[i,j] = mean (z[k-1][i] + (t[j] - t[i]) v[i] - x[j])^2    for live i > j
        r[k][j]   = argmin_i cost[i,j]
        z[k][j]   = z[k-1][r] + (t[j] - t[r]) v[r],  r = r[k][j]

Exactly k steps: row k of the table is the answer for the budget k, so one run to M steps holds
the schedule of every budget up to M. A target without a finite candidate is dead and is no source
of the next step. Replaying a backtracked path gives the table's state and cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_ext import arguments, ops
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator, NonFiniteError
from oss_ext.sampling import student_states
from oss_ext.schedule import STARTS
from oss_ext.teacher import Trajectory

VELOCITY_BYTES = 2**30
"""Velocities of one step kept at once by default; more are streamed through in chunks."""


@dataclass(frozen=True, eq=False)
class Table:
    """The result of a dynamic programme over a trajectory with N steps and B samples.

    Attributes:
        cost: ``[M, N+1, B]``: ``cost[k-1, j, b]`` after exactly k steps at target ``j``.
        parent: int64 ``[M, N+1, B]``, or ``[M, N+1, 1]`` for a joint search; -1 where dead.
    """

    cost: Tensor
    parent: Tensor

    @property
    def steps(self) -> int:
        """M, the largest budget."""
        return len(self.cost)

    def backtrack(self, steps: int, sample: int = 0) -> tuple[int, ...]:
        """Teacher rows of the best path of exactly ``steps`` steps, descending to 0.

        Args:
            steps: the budget, 1 to M.
            sample: which sample's path; 0 for a joint search.

        Raises:
            ValueError: a budget or a sample that the table does not hold.
        """
        steps = arguments.whole_number("steps", steps, most=self.steps)
        arguments.whole_number("sample", sample, least=0, most=self.parent.shape[2] - 1)
        rows = [0]
        for k in range(steps, 0, -1):
            rows.append(int(self.parent[k - 1, rows[-1], sample]))
        return tuple(reversed(rows))


def evaluations(teacher_steps: int, steps: int, start: str) -> int:
    """Model evaluations per sample of a search to ``steps`` steps (teacher not included)."""
    first = teacher_steps if start == "free" else 1
    return first + sum(teacher_steps - k + 1 for k in range(2, steps + 1))


def run(
    evaluator: Evaluator,
    trajectory: Trajectory,
    steps: int,
    *,
    reduce: str,
    start: str = "free",
    velocity_bytes: int = VELOCITY_BYTES,
) -> Table:
    """Fill the table for budgets 1 to ``steps``.

    Args:
        evaluator: of the model; only live sources are evaluated.
        trajectory: the teacher.
        reduce: ``none`` for a path per sample, ``mean`` or ``log_mean`` for a joint one.
        start: ``free`` or ``pinned``, see above.
        velocity_bytes: memory for velocities; what exceeds it is streamed. The bits are equal
            where the rows of a model call are (``max_batch`` the samples, or 1).

    Raises:
        ValueError: ``steps`` not within 1 to N, or an unknown ``start``.
        NonFiniteError: no finite path to the clean end is left; names time and sample.
    """
    teacher, times = trajectory.states, trajectory.times
    rows, samples = teacher.shape[:2]
    steps = arguments.whole_number("steps", steps, most=rows - 1)
    if start not in STARTS:
        raise ValueError(f"start: expected one of {STARTS}, got {start!r}")
    chunk = max(1, velocity_bytes // (teacher[0].nbytes))
    state = teacher[-1:].expand_as(teacher)
    live = torch.zeros(rows, samples, dtype=torch.bool)
    live[1 if start == "free" else rows - 1 :] = True
    costs, parents = [], []
    for k in range(1, steps + 1):
        state, cost, parent = _step(evaluator, state, live, teacher, times, reduce, chunk)
        costs.append(cost.cpu())
        parents.append(parent.cpu())
        dead = (parents[-1][0] < 0).nonzero()
        if len(dead):
            sample = int(dead[0]) if reduce == "none" else None
            who = "the batch" if sample is None else f"sample {sample}"
            raise NonFiniteError(
                f"step {k} has no finite path to the clean end for {who}: "
                f"{evaluator.describe_bad(sample) or 'every cost overflowed'}"
            )
        live = (parents[-1] >= 0).expand(rows, samples).clone()
        live[0] = False
    return Table(cost=torch.stack(costs), parent=torch.stack(parents))


def _step(
    evaluator: Evaluator,
    state: Tensor,
    live: Tensor,
    teacher: Tensor,
    times: Tensor,
    reduce: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.dp_step`` with the velocities of the live sources, all at once or in chunks."""
    rows, samples = live.shape
    device_times, mask = times.to(state.device), live.to(state.device)
    if chunk >= rows - 1:
        velocity = torch.empty_like(teacher)
        evaluator.fill(velocity, state, times, live.nonzero())
        return ops.dp_step(state, velocity, teacher, device_times, source_mask=mask, reduce=reduce)
    state = state.clone(memory_format=torch.contiguous_format)
    cost = torch.full((rows, samples), torch.inf, dtype=torch.float64, device=state.device)
    parent = torch.full_like(cost[:, : samples if reduce == "none" else 1], -1, dtype=torch.int64)
    for first in range(1, rows, chunk):
        last = min(first + chunk, rows)
        sources = live[first:last].nonzero()
        if len(sources):
            velocity = torch.empty_like(teacher[first:last])
            evaluator.fill(velocity, state[first:last], times[first:last], sources)
            ops.dp_accumulate_(
                state, velocity, first, teacher, device_times, cost, parent,
                source_mask=mask, reduce=reduce,
            )  # fmt: skip
    return state, cost.to(state.dtype), parent


def replay(
    model: Model, trajectory: Trajectory, indices: Sequence[int], max_batch: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """Run the path ``indices`` (descending teacher rows) from the trajectory's noise.

    Returns:
        The state ``[B, *dims]`` after every step, and the mean squared distance to the teacher
        at the same row, ``[steps, B]`` float64.
    """
    schedule = trajectory.schedule(indices)
    states = list(student_states(model, trajectory.noise, schedule, max_batch=max_batch))
    errors = [
        (x - trajectory.states[row]).double().square().flatten(1).mean(dim=1)
        for x, row in zip(states, indices[1:], strict=True)
    ]
    return states, torch.stack(errors)
