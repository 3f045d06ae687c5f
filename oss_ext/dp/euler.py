"""Steps of Algorithm 1: first order, by the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor

from oss_ext import ops
from oss_ext.models.evaluation import Evaluator
from oss_ext.teacher import Trajectory


class EulerSteps:
    """The states of all rows, moved one step at a time.

    Args:
        evaluator: of the model.
        trajectory: the teacher.
        reduce: as in ``run``.
        velocity_bytes: memory for velocities; what exceeds it is streamed through in chunks.
    """

    def __init__(
        self, evaluator: Evaluator, trajectory: Trajectory, reduce: str, velocity_bytes: int
    ) -> None:
        self._evaluator, self._times, self._reduce = evaluator, trajectory.times, reduce
        self._teacher = trajectory.states
        self._state = self._teacher[-1:].expand_as(self._teacher)
        self._chunk = max(1, velocity_bytes // self._teacher[0].nbytes)

    def step(self, live: Tensor, onward: Tensor) -> tuple[Tensor, Tensor, None]:
        """Cost and parent of a step from the sources ``live``, bool ``[N+1, B]``."""
        rows = len(live)
        times, mask = self._times.to(self._state.device), live.to(self._state.device)
        if self._chunk < rows - 1:
            return self._streamed(live, times, mask)
        velocity = torch.empty_like(self._teacher)
        self._evaluator.fill(velocity, self._state, self._times, live.nonzero())
        self._state, cost, parent = ops.dp_step(
            self._state, velocity, self._teacher, times, source_mask=mask, reduce=self._reduce
        )
        return cost, parent, None

    def _streamed(self, live: Tensor, times: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, samples = live.shape
        columns = samples if self._reduce == "none" else 1
        state = self._state.clone(memory_format=torch.contiguous_format)
        cost = torch.full((rows, samples), torch.inf, dtype=torch.float64, device=state.device)
        parent = torch.full_like(cost[:, :columns], -1, dtype=torch.int64)
        for first in range(1, rows, self._chunk):
            last = min(first + self._chunk, rows)
            sources = live[first:last].nonzero()
            if len(sources):
                velocity = torch.empty_like(self._teacher[first:last])
                self._evaluator.fill(velocity, state[first:last], self._times[first:last], sources)
                ops.dp_accumulate_(
                    state, velocity, first, self._teacher, times, cost, parent,
                    source_mask=mask, reduce=self._reduce,
                )  # fmt: skip
        self._state = state
        return cost.to(state.dtype), parent, None
