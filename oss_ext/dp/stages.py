"""Steps of a solver that evaluates the model between source and target.

Where such a step ends takes evaluations for every pair. They are made for the few sources of a
target that are nearest by an Euler step, which needs none; among these the best after its whole
step is the parent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oss_ext import cpu
from oss_ext.dp.few import Candidates, Judge, nearest
from oss_ext.dp.table import errors, fill_rows, of_costs
from oss_ext.metrics import EvaluatedMetric, StateMetric
from oss_ext.models.base import Kept, There
from oss_ext.models.evaluation import Evaluator
from oss_ext.scratch import Held
from oss_ext.solvers import Singlestep
from oss_ext.solvers.base import OUTPUTS, affine
from oss_ext.trajectory import Trajectory


class StageSteps:
    """The states of all rows, moved one step at a time.

    Args:
        evaluator: of the model.
        trajectory: the teacher.
        solver: of the student.
        reduce: as in ``run``.
        metric: what the ends of whole steps and the teacher are compared by.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        trajectory: Trajectory,
        solver: Singlestep,
        reduce: str,
        metric: StateMetric | EvaluatedMetric,
    ) -> None:
        self._evaluator, self._solver, self._reduce = evaluator, solver, reduce
        self._times, self._teacher = trajectory.times, trajectory.states
        self._state = self._teacher[-1:].expand_as(self._teacher)
        self._selection, self._taken = metric.selection, 0
        self._judge = Judge(evaluator, trajectory, metric, reduce)
        self._velocity: Tensor | None = None  # of the states, where the judge has evaluated them

    @staticmethod
    def held(
        evaluator: Evaluator,
        trajectory: Trajectory,
        steps: int,
        solver: Singlestep,
        reduce: str,
        metric: StateMetric | EvaluatedMetric,
    ) -> list[Held]:
        """What it holds beside the teacher."""
        array = trajectory.states.nbytes
        judged = Judge.held(evaluator, trajectory, metric)
        # While the second candidate is made, there are itself and the first, with its velocities
        # where there are any, and of a column's samples what ``_after`` and ``_steps`` name.
        columns = trajectory.samples if reduce == "none" else 1
        of_column = of_costs(trajectory.states).itemsize * trajectory.states.numel() // columns
        making = (2 + metric.evaluated) * array + (solver.order + 8) * of_column
        if making > judged[0].bytes:
            judged[0] = Held("candidates", making)
        # The states of the first step are the noise.
        return [Held("states", array * (steps > 1)), Held("velocities", array), *judged]

    def kept(self) -> Kept:
        """What ``go_on`` takes; nothing where evaluations at candidates are remembered too."""
        return {"state": self._state} if self._velocity is None else {}

    def go_on(self, there: There, taken: int) -> None:
        """From what ``kept`` said after ``taken`` steps."""
        self._taken = taken
        self._state = fill_rows(torch.empty_like(self._teacher), there["state"])

    def step(self, live: Tensor, onward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost, parent and order of a step from the sources ``live``, bool ``[N+1, B]``.

        ``onward``, bool ``[N+1, B or 1]``: which rows may be sources of the next one.
        """
        self._taken += 1
        velocity = self._velocity
        if velocity is None:
            velocity = torch.empty_like(self._teacher)
            self._evaluator.fill(velocity, self._state, self._times, live.nonzero())
        best, self._velocity = self._judge.best(
            self._candidates(velocity, live), onward, self._taken
        )
        self._state = best.state
        cost = errors(self._state, self._teacher, best.source)
        return cost.to(of_costs(self._state)), best.source, best.order

    def _orders(self, t: Tensor) -> Tensor:
        """The highest orders of steps from ``t`` ``[N+1, ...]`` to the times of the rows."""
        highest = cpu.tensor([self._solver.highest_order(0, s) for s in self._times.tolist()])
        highest = highest.view(-1, *[1] * (t.dim() - 1)).expand_as(t)
        return torch.where(t == 1, highest.clamp(max=self._solver.from_noise), highest)

    def _candidates(self, velocity: Tensor, live: Tensor) -> Iterator[Candidates]:
        """Whole steps to every target, those from the nearest source by an Euler step first."""
        rows, samples = live.shape
        columns = samples if self._reduce == "none" else 1
        compared, teacher = (
            [self._selection.of(tensor, self._taken) for tensor in tensors]
            for tensors in ([self._state, velocity], [self._teacher])
        )

        def made_for(source: Tensor) -> tuple[Tensor, Tensor, list[int]]:
            given = cpu.ones(1, 2, len(source), rows, columns, dtype=torch.float64)
            given[0, 1] = (self._times[None, :] - self._times[source][:, None])[..., None]
            return given, source[:, None].expand(2, len(source), samples), [2]

        tried: list[Tensor] = []
        while True:
            cost, parent, _ = nearest(
                compared, teacher[0], live, self._reduce, tried, 8 * 2 * rows * columns, made_for
            )
            tried.append(parent)
            whole = self._orders(self._times[parent.clamp(min=0)])
            whole = torch.where(parent < 0, 0, whole)
            yield Candidates(parent, whole, self._after(velocity, parent), cost.cpu())

    def _after(self, velocity: Tensor, source: Tensor) -> Tensor:
        """Where the steps from ``source`` end, ``[N+1, B, *dims]``; zeros where there is none."""
        samples = self._teacher.shape[1]
        after = torch.zeros_like(self._teacher)
        # One column after the other: the times of its stages are its own.
        groups = cpu.arange(samples).chunk(source.shape[1])
        for column, group in enumerate(groups):
            from_row = source[:, column].clamp(min=0)
            place = group.to(after.device)
            x, v = (tensor[from_row.to(tensor.device)[:, None], place].to(of_costs(tensor))
                    for tensor in (self._state, velocity))  # fmt: skip
            moved = self._steps(x, v, self._times[from_row], source[:, column], group)
            after[:, place] = moved.to(after.dtype)
        return after

    def _steps(self, x: Tensor, v: Tensor, t: Tensor, source: Tensor, group: Tensor) -> Tensor:
        """One step of every row from ``x`` and ``v`` ``[N+1, b, *dims]`` at ``t`` to its time."""
        orders, after = self._orders(t), torch.zeros_like(x)
        for order in orders[source >= 0].unique().tolist():
            kept = ((orders == order) & (source >= 0)).nonzero().flatten()
            begin, end = t[kept], self._times[kept]
            between, weights = self._solver.stages(order, begin, end) if order > 1 else ([], [[]])
            basis = [x[kept.to(x.device)], v[kept.to(x.device)]]
            for stage, s in enumerate([*between, end]):
                moved = _sum(basis, affine(self._solver.output, begin, s, weights[stage]))
                if stage < len(between):
                    slope = torch.empty_like(moved)
                    everyone = cpu.ones(len(kept), len(group)).nonzero()
                    self._evaluator.fill(slope, moved, s, everyone, group)
                    basis.append(_sum([moved, slope], list(OUTPUTS[self._solver.output](s))))
            after[kept.to(x.device)] = moved
        return after


def _sum(basis: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    """``sum_r coefficients[r] basis[r]`` with a coefficient per row."""
    total = torch.zeros_like(basis[0])
    for term, c in zip(basis, coefficients, strict=True):
        total += c.to(term).view(-1, *[1] * (term.dim() - 1)) * term
    return total
