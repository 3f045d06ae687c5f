"""Steps of Algorithm 2: a multistep solver, the order of every step chosen with its source.

At step k every live source has k - 1 earlier outputs, those along its own best path. A candidate is
affine in state, velocity and these,

    candidate(o, i, j) = sum_r  c[o][r][i, j] * basis[r][row of term r for i]

with coefficients that depend on the times of the source's history: for a joint search one history
per row, for an instance search one per row and sample. They are made in chunks of sources.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oss_ext import cpu, ops
from oss_ext.dp.few import Candidates, Judge, nearest
from oss_ext.dp.table import chunk_bytes, errors, fill_rows, of_costs
from oss_ext.metrics import AffineMetric, EvaluatedMetric, Sources, StateMetric
from oss_ext.models.base import Kept, There
from oss_ext.models.evaluation import Evaluator
from oss_ext.scratch import Held
from oss_ext.solvers import Multistep
from oss_ext.solvers.base import OUTPUTS, combine
from oss_ext.trajectory import Trajectory

COEFFICIENTS = 3
"""Times the memory of a chunk's coefficients that making them takes, about."""


class OrderSteps:
    """States and histories of all rows, moved one step at a time.

    Args:
        evaluator: of the model.
        trajectory: the teacher.
        solver: of the student.
        reduce: as in ``run``.
        fixed: only the highest order that there is, for hosts that cannot vary it.
        metric: what candidates and the teacher are compared by. Where that does not depend on the
            order, steps are of the highest there is. Where it takes evaluations, they are made for
            the few that are nearest by their states.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        trajectory: Trajectory,
        solver: Multistep,
        reduce: str,
        fixed: bool,
        metric: AffineMetric | EvaluatedMetric,
    ) -> None:
        self._evaluator, self._solver, self._reduce, self._fixed = evaluator, solver, reduce, fixed
        self._times, self._teacher, self._x0 = trajectory.times, trajectory.states, trajectory.x0
        self._judge: Judge | None = None
        if isinstance(metric, EvaluatedMetric):
            self._judge = Judge(evaluator, trajectory, metric, reduce)
            metric = StateMetric(metric.selection)
        self._metric, self._taken = metric, 0
        self._targets: Tensor | None = None
        self._velocity: Tensor | None = None  # of the states, where the judge has evaluated them
        if metric.needs_x0 and self._x0 is None:
            raise ValueError(
                f"trajectory: expected one with x0 for the metric {metric.name!r} "
                "(teacher(..., keep_x0=True)), got none"
            )
        rows, samples = self._teacher.shape[:2]
        columns = samples if reduce == "none" else 1
        self._state = self._teacher[-1:].expand_as(self._teacher)
        # Earlier outputs, newest first, and where in each the history of a row is [N+1, columns].
        self._outputs: list[Tensor] = []
        self._back: list[Tensor] = []
        self._arrived = cpu.zeros(rows, columns, dtype=torch.int64)

    @staticmethod
    def held(
        evaluator: Evaluator,
        trajectory: Trajectory,
        steps: int,
        solver: Multistep,
        reduce: str,
        metric: AffineMetric | EvaluatedMetric,
    ) -> list[Held]:
        """What it holds beside the teacher."""
        rows, samples = trajectory.states.shape[:2]
        array, outputs = trajectory.states.nbytes, min(solver.remembers, steps - 1)
        # The states of the first step are the noise.
        held = [Held("states", array * (steps > 1)), Held("velocities", array),
                Held("earlier outputs", outputs * array)]  # fmt: skip
        if isinstance(metric, EvaluatedMetric):
            held += Judge.held(evaluator, trajectory, metric)
            metric = StateMetric(metric.selection)
        else:
            held.append(Held("states that follow", array))
        # What the metric copies of these, as seen on a row.
        row, t = trajectory.states[-1:], trajectory.times[-1:]
        live = cpu.ones(1, samples, dtype=torch.bool)
        compared, _ = metric.sources(Sources([row] * (2 + outputs), t, live, 1))
        seen = [*compared, metric.targets(row, row, 1)]
        own = row.untyped_storage().data_ptr()
        copied = sum(x.nbytes for x in seen if x.untyped_storage().data_ptr() != own)
        columns = samples if reduce == "none" else 1
        terms = (1 + outputs) * (2 + outputs)
        coefficients = COEFFICIENTS * chunk_bytes(rows, 8 * terms * rows * columns)
        return [*held, Held("features", rows * copied), Held("coefficients", coefficients)]

    def kept(self) -> Kept:
        """What ``go_on`` takes; nothing where evaluations at candidates are remembered too."""
        if self._judge is not None:
            return {}
        outputs = {f"output {n}": output for n, output in enumerate(self._outputs)}
        return {"state": self._state, "arrived": self._arrived, "back": self._back, **outputs}

    def go_on(self, there: There, taken: int) -> None:
        """From what ``kept`` said after ``taken`` steps."""
        self._taken, self._arrived = taken, torch.stack([*there["arrived"]])
        self._back = [*there["back"]]
        names = ["state", *(f"output {n}" for n in range(len(self._back)))]
        arrays = (torch.empty_like(self._teacher) for _ in names)
        self._state, *self._outputs = map(fill_rows, arrays, (there[name] for name in names))

    def step(self, live: Tensor, onward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cost, parent and order of a step from the sources ``live``, bool ``[N+1, B]``.

        ``onward``, bool ``[N+1, B or 1]``: which rows may be sources of the next one.
        """
        self._taken += 1
        if self._targets is None or self._metric.varies:
            self._targets = self._metric.targets(self._teacher, self._x0, self._taken)
        velocity = self._velocity
        if velocity is None:
            velocity = torch.empty_like(self._teacher)
            self._evaluator.fill(velocity, self._state, self._times, live.nonzero())
        candidates = self._candidates([self._state, velocity, *self._outputs], live)
        if self._judge is None:
            best = next(candidates)
        else:
            best, self._velocity = self._judge.best(candidates, onward, self._taken)
        if self._solver.remembers:
            self._remember(velocity, best.source.clamp(min=0))
        self._state, self._arrived, cost = best.state, best.order, best.cost
        if self._judge is not None or self._targets is not self._teacher:
            cost = errors(self._state, self._teacher, best.source)
        return cost.to(of_costs(self._state)), best.source, best.order

    def _candidates(self, basis: list[Tensor], live: Tensor) -> Iterator[Candidates]:
        """The best candidate of every target over (order, source), then that of another source."""
        rows, samples = live.shape
        columns = samples if self._reduce == "none" else 1
        compared, of_sources = self._metric.sources(Sources(basis, self._times, live, self._taken))
        assert self._targets is not None
        if compared[0].shape != self._targets.shape:
            expected, got = (tuple(x.shape[2:]) for x in (self._targets, compared[0]))
            raise ValueError(
                f"metric: expected features of shape {expected} as the teacher's, got {got}"
            )
        fixed = self._fixed or of_sources is not None
        orders = self._orders(fixed)

        def made_for(source: Tensor) -> tuple[Tensor, Tensor, list[int]]:
            given, terms = self._coefficients(
                orders, fixed, source[:, None, None], cpu.arange(rows)[None, :, None]
            )
            index = self._rows(source[:, None]).expand(-1, -1, samples)
            if of_sources is None:
                return given, index, terms
            exists = given[:, :1] * 0  # NaN where there is no step
            given = exists + of_sources[None, :, source, None, None]
            index = index[:1].expand(len(compared), -1, -1)
            return given, index, [len(compared)] * len(terms)

        tried: list[Tensor] = []
        while True:
            cost, parent, chosen = nearest(
                compared, self._targets, live, self._reduce, tried,
                8 * len(orders) * len(basis) * rows * columns, made_for,
            )  # fmt: skip
            tried.append(parent)
            state = self._moved(basis, orders, fixed, parent, chosen)
            yield Candidates(parent, cpu.tensor([0, *orders])[chosen + 1], state, cost)

    def _orders(self, fixed: bool) -> list[int]:
        """The orders that a step may have now, ascending."""
        highest = {self._highest(t) for t in self._times.tolist()}
        return sorted(highest) if fixed else list(range(1, max(highest) + 1))

    def _highest(self, t_next: float) -> int:
        return self._solver.highest_order(len(self._outputs), t_next)

    def _coefficients(
        self, orders: list[int], fixed: bool, source: Tensor, target: Tensor
    ) -> tuple[Tensor, list[int]]:
        """Coefficients ``[orders, terms, *shape]`` for rows that broadcast to ``shape``.

        The last axis of ``source`` is the history's: one, or the samples. A step that there is not
        has NaN for its first coefficient. Also the number of terms of every order.
        """
        column = cpu.arange(self._arrived.shape[1])
        times = [self._times[source], *(self._times[back[source, column]] for back in self._back)]
        t_next, arrived = self._times[target], self._arrived[source, column]
        # torch.broadcast_shapes would import a computer algebra: 32 MiB, and a second.
        shape = torch.broadcast_tensors(source, target, arrived)[0].shape
        given = cpu.zeros(len(orders), 2 + len(self._outputs), *shape, dtype=torch.float64)
        highest = cpu.tensor([self._highest(t) for t in self._times.tolist()])[target]
        terms = []
        for o, order in enumerate(orders):
            values = self._solver.coefficients(order, times, t_next, arrived)
            exists = highest == order if fixed else highest >= order
            for value in values:
                exists = exists & value.isfinite()
            for r, value in enumerate(values):
                given[o, r] = torch.where(exists, value, 0.0)
            given[o, 0] = torch.where(exists, given[o, 0], torch.nan)
            terms.append(len(values))
        return given, terms

    def _rows(self, source: Tensor) -> Tensor:
        """Which row of every term belongs to ``source`` ``[S, columns or 1]``: ``[terms, S, ...]``.

        Rows that nothing reached have no history, but they are no sources either.
        """
        column = cpu.arange(self._arrived.shape[1])
        own = source.expand(len(source), len(column))
        back = [rows[source, column].clamp(min=0) for rows in self._back]
        return torch.stack([own, own, *back])

    def _moved(
        self,
        basis: list[Tensor],
        orders: list[int],
        fixed: bool,
        parent: Tensor,
        chosen: Tensor,
    ) -> Tensor:
        """The state of every row, moved from its parent in the order chosen."""
        rows, samples = self._teacher.shape[:2]
        source, device = parent.clamp(min=0), self._state.device
        all_given, terms = self._coefficients(orders, fixed, source, cpu.arange(rows)[:, None])
        pick = chosen.clamp(min=0)[None, None].expand(1, *all_given.shape[1:])
        given, index = all_given.gather(0, pick)[0], self._rows(source)
        used = cpu.tensor(terms)[chosen.clamp(min=0)]
        left_out = (cpu.arange(len(basis))[:, None, None] >= used) | (parent < 0)
        given = torch.where(left_out, 0.0, given).expand(-1, -1, samples)
        index = torch.where(left_out, -1, index).expand(-1, -1, samples)
        return ops.dp_combine(basis, index.to(device), given.to(device))

    def _remember(self, velocity: Tensor, parent: Tensor) -> None:
        """Put the outputs of this step, in the velocities' memory, before the earlier ones."""
        of_state, of_velocity = OUTPUTS[self._solver.output](self._times)
        for row, parts in enumerate(zip(of_state.tolist(), of_velocity.tolist(), strict=True)):
            both = [tensor[row].to(of_costs(tensor)) for tensor in (self._state, velocity)]
            velocity[row] = combine(both, parts)
        column, keep = cpu.arange(parent.shape[1]), slice(self._solver.remembers)
        self._back = [parent, *(rows[parent, column] for rows in self._back)][keep]
        self._outputs = [velocity, *self._outputs][keep]
