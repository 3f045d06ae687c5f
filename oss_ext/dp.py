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
from oss_ext.schedule import REDUCTIONS, STARTS
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
            ValueError: a budget or a sample that the table does not hold, or one without a path.
        """
        steps = arguments.whole_number("steps", steps, most=self.steps)
        arguments.whole_number("sample", sample, least=0, most=self.parent.shape[2] - 1)
        rows = [0]
        for k in range(steps, 0, -1):
            rows.append(int(self.parent[k - 1, rows[-1], sample]))
            if rows[-1] < 0:
                raise ValueError(f"steps: expected a budget with a finite path, got {steps}")
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
    allowed: Tensor | None = None,
    velocity_bytes: int = VELOCITY_BYTES,
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
            where the rows of a model call are (``max_batch`` the samples, or 1).

    Raises:
        ValueError: ``steps`` not within 1 to N, an unknown ``reduce`` or ``start``, or ``allowed``
            of another shape or with a step that none of its rows can be a source of.
        NonFiniteError: no finite path to the clean end is left; names time and sample.
    """
    teacher, times = trajectory.states, trajectory.times
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    chunk = max(1, velocity_bytes // (teacher[0].nbytes))
    state = teacher[-1:].expand_as(teacher)
    live = first_sources(trajectory, reduce, start)
    if allowed is not None:
        allowed = _check_allowed(allowed, steps, reduce, live)
    costs, parents = [], []
    for k in range(1, steps + 1):
        mask = live if allowed is None else live & allowed[k - 1]
        state, cost, parent = _step(evaluator, state, mask, teacher, times, reduce, chunk)
        costs.append(cost.cpu())
        parents.append(parent.cpu())
        live = next_sources(parents[-1], trajectory.samples)
        check_reached(parents[-1], k, reduce, evaluator)
    return Table(cost=torch.stack(costs), parent=torch.stack(parents))


def first_sources(trajectory: Trajectory, reduce: str, start: str) -> Tensor:
    """Sources of the first step, bool ``[N+1, B]``; ``ValueError`` for an unknown option."""
    arguments.one_of("reduce", reduce, REDUCTIONS)
    arguments.one_of("start", start, STARTS)
    live = torch.zeros(trajectory.steps + 1, trajectory.samples, dtype=torch.bool)
    live[1 if start == "free" else trajectory.steps :] = True
    return live


def next_sources(parent: Tensor, samples: int) -> Tensor:
    """Sources of the step after ``parent`` ``[..., N+1, B or 1]``: what it reached, but row 0."""
    live = (parent >= 0).expand(*parent.shape[:-1], samples).clone()
    live[..., 0, :] = False
    return live


def check_reached(parent: Tensor, step: int, reduce: str, evaluator: Evaluator) -> None:
    """``NonFiniteError`` unless ``parent`` ``[N+1, B or 1]`` reaches the clean end everywhere."""
    dead = (parent[0] < 0).nonzero()
    if len(dead):
        sample = int(dead[0]) if reduce == "none" else None
        who = "the batch" if sample is None else f"sample {sample}"
        raise NonFiniteError(
            f"step {step} has no finite path to the clean end for {who}: "
            f"{evaluator.describe_bad(sample) or 'every cost overflowed'}"
        )


def _check_allowed(allowed: Tensor, steps: int, reduce: str, live: Tensor) -> Tensor:
    """``allowed`` as ``[M, N+1, B or 1]``, with a source for every step and sample."""
    rows, samples = live.shape
    shapes = [(steps, rows)] + [(steps, rows, samples)] * (reduce == "none")
    if allowed.dtype != torch.bool or tuple(allowed.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        got = f"{allowed.dtype} of shape {tuple(allowed.shape)}"
        raise ValueError(f"allowed: expected bool of shape {expected}, got {got}")
    allowed = allowed.cpu().reshape(steps, rows, -1)
    number = torch.arange(rows)[:, None]
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
