"""Steps of Algorithm 1: first order, by the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor

from oss_ext import ops, scratch
from oss_ext.dp.table import fill_rows, of_costs
from oss_ext.machine import return_freed
from oss_ext.models.base import Kept, There
from oss_ext.models.evaluation import Evaluator
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory

LARGE = 2**28
"""Bytes of states beside which it counts what the allocator keeps for itself."""


class EulerSteps:
    """The states of all rows, moved one step at a time, in place.

    Sources come in ascending chunks as their velocities are made, and each moves only rows below
    it, which were all used before. So there are the teacher, the states and a chunk of velocities,
    and nothing else of their size.

    Args:
        evaluator: of the model.
        trajectory: the teacher.
        reduce: as in ``run``.
        velocity_bytes: memory for velocities; at least one row's are there.
    """

    def __init__(
        self, evaluator: Evaluator, trajectory: Trajectory, reduce: str, velocity_bytes: int
    ) -> None:
        self._evaluator, self._times, self._reduce = evaluator, trajectory.times, reduce
        self._teacher = trajectory.states
        self._state = scratch.empty(
            self._teacher.shape, self._teacher.dtype, self._teacher.device, trajectory.scratch
        )
        self._state[:] = trajectory.noise
        self._velocity = torch.empty_like(_chunk(trajectory, velocity_bytes))

    @staticmethod
    def held(trajectory: Trajectory, velocity_bytes: int) -> list[Held]:
        """What it holds beside the teacher."""
        velocities = _chunk(trajectory, velocity_bytes).nbytes
        states = Held("states", trajectory.states.nbytes, trajectory.scratch)
        return [states, Held("velocities", velocities)]

    def kept(self) -> Kept:
        """What ``go_on`` takes."""
        return {"state": self._state}

    def go_on(self, there: There, taken: int) -> None:
        """From what ``kept`` said after ``taken`` steps."""
        fill_rows(self._state, there["state"])

    def step(self, live: Tensor, onward: Tensor) -> tuple[Tensor, Tensor, None]:
        """Cost and parent of a step from the sources ``live``, bool ``[N+1, B]``."""
        state, (rows, samples) = self._state, live.shape
        if state.nbytes >= LARGE:
            return_freed()
        times, mask = self._times.to(state.device), live.to(state.device)
        columns = samples if self._reduce == "none" else 1
        cost = torch.full((rows, samples), torch.inf, dtype=torch.float64, device=state.device)
        parent = torch.full_like(cost[:, :columns], -1, dtype=torch.int64)
        for first in range(1, rows, len(self._velocity)):
            velocity = self._velocity[: rows - first]
            here = slice(first, first + len(velocity))
            sources = live[here].nonzero()
            if len(sources):
                self._evaluator.fill(velocity, state[here], self._times[here], sources)
                ops.dp_accumulate_(
                    state, velocity, first, self._teacher, times, cost, parent,
                    source_mask=mask, reduce=self._reduce,
                )  # fmt: skip
        return cost.to(of_costs(state)), parent, None


def _chunk(trajectory: Trajectory, velocity_bytes: int) -> Tensor:
    """The teacher's rows that are sources of as many velocities as are there at once."""
    rows = max(1, velocity_bytes // trajectory.states[0].nbytes)
    return trajectory.states[1 : 1 + rows]
