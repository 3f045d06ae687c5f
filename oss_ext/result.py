"""What a search returns: schedules for every budget, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from oss_ext import arguments, dp, solvers, words
from oss_ext.plan import Plan
from oss_ext.refine import Refinement
from oss_ext.schedule import Objective, Schedule, aggregate_indices
from oss_ext.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Schedules for the budgets asked for, and what they cost.

    Attributes:
        trajectory: the teacher searched against; of a search in groups, the first one's.
        samples: calibration samples.
        objective: what was minimised.
        steps: the budgets asked for, ascending.
        plan: what the search was to spend.
        solver: of the student.
        fixed_order: whether schedules are in the solver's usual orders.
        table: costs and parents of the dynamic programme, for all budgets up to the largest; None
            without one.
        refined: by budget, what refinement found.
        nfe: model evaluations of the search per sample, teacher not included.
        block: rows per model call of the dynamic programme.
        seconds: wall time of the search.
        peak_bytes: peak memory: of the GPU's allocator during the search, or on a CPU of the
            process so far.
    """

    trajectory: Trajectory
    samples: int
    objective: Objective
    steps: tuple[int, ...]
    plan: Plan
    solver: str
    fixed_order: bool
    table: dp.Table | None
    nfe: int
    block: int
    seconds: float
    peak_bytes: int
    refined: dict[int, Refinement] = field(default_factory=dict)

    def schedule(self, steps: int) -> Schedule:
        """The schedule of exactly ``steps`` steps for all samples.

        Refined (``method`` says so) for the budgets asked for, unless the quality is ``dp``;
        other budgets are those of the dynamic programme.

        Raises:
            ValueError: a budget that was not searched, or an instance search without
                ``aggregate`` (use ``schedules``).
        """
        if steps in self.refined:
            return self.refined[steps].schedule
        table = self._table(steps)
        if self.objective.scope == "joint":
            rows = table.backtrack(steps)
            return self._build(rows, self.cost(steps), table.orders(rows))
        if self.objective.aggregate is None:
            raise ValueError(
                "an instance search has a schedule per sample: use schedules(steps), or search "
                "with aggregate='mean' or 'median'"
            )
        paths = table.paths(steps).tolist()
        # An averaged path was never run, so it has no cost yet, and the solver's usual orders.
        return self._build(aggregate_indices(paths, self.objective.aggregate), None)

    def schedules(self, steps: int) -> list[Schedule]:
        """One schedule per sample; the same one for all after a joint search."""
        if self.objective.scope == "joint":
            return [self.schedule(steps)] * self.samples
        table = self._table(steps)
        return [
            self._build(tuple(rows), float(table.cost[steps - 1, 0, b]), table.orders(rows, b))
            for b, rows in enumerate(table.paths(steps).tolist())
        ]

    def spread(self, steps: int) -> Tensor:
        """The rows that every sample's own schedule takes, int64 ``[B, steps + 1]``, noise first.

        Raises:
            ValueError: a budget that was not searched, or a joint search, which has one schedule.
        """
        if self.objective.scope == "joint":
            raise ValueError("scope: expected an instance search, got a joint one")
        return self._table(steps).paths(steps)

    def cost(self, steps: int) -> float:
        """Mean squared error of the final state after exactly ``steps`` steps, over the samples.

        Of a refined schedule: over the samples that refinement has seen. Of a search with
        ``fixed_order`` and ``dp``: with every step as high as it can be; the schedule has no cost
        of its own where the usual orders are others.
        """
        if steps in self.refined:
            cost = self.refined[steps].schedule.cost
            assert cost is not None
            return cost
        return float(self._table(steps).cost[steps - 1, 0].double().mean())

    def cheaper(self, steps: int) -> int | None:
        """A smaller budget that is better than ``steps`` by the objective, the best, or None.

        As the dynamic programme has it; None for refined schedules.
        """
        if steps in self.refined:
            return None
        final = self._table(steps).cost[:steps, 0].double()
        if self.objective.reduce == "log_mean":
            final = final.log()
        best = int(final.mean(dim=1).argmin()) + 1
        return None if best == steps else best

    def mean_cost(self) -> Tensor | None:
        """Geometric mean of the table's costs over the samples, ``[M, N + 1]``."""
        return None if self.table is None else self.table.cost.double().log().mean(dim=2).exp()

    def _table(self, steps: int) -> dp.Table:
        """The table, if it holds ``steps``."""
        if self.table is None:
            raise ValueError(
                f"steps: this search has schedules of {', '.join(map(str, self.refined))} steps, "
                f"got {steps!r}"
            )
        arguments.whole_number("steps", steps, most=self.table.steps)
        return self.table

    def _build(
        self, indices: tuple[int, ...], cost: float | None, orders: tuple[int, ...] = ()
    ) -> Schedule:
        if self.trajectory.ends is not None:
            cost = None  # of rounded states, which no student has
        if self.fixed_order and orders:
            times = [float(self.trajectory.times[row]) for row in indices]
            usual = solvers.get(self.solver).usual_orders(times)
            # Where these fall step by step to the end, the table, which does not know how many
            # steps are left, had other ones: this path was not run either.
            orders, cost = usual, cost if orders == usual else None
        return self.trajectory.schedule(
            indices,
            solver=self.solver,
            orders=orders,
            objective=self.objective,
            cost=cost,
            samples=self._table(len(indices) - 1).cost.shape[2],
            search_nfe=self.nfe + self.trajectory.nfe,
        )

    def summary(self) -> str:
        """Evaluations, time, memory and the cost of every budget asked for, in a few lines."""
        o, t = self.objective, self.trajectory
        how = f"{self.plan.quality}, {o.scope}, {o.aggregate or o.reduce}, {o.start} start"
        lines = [
            f"{t.model}: {self.samples} samples, teacher {t.steps} steps ({t.solver}), {how}, "
            f"student {self.solver}",
            f"{t.nfe} + {self.nfe} model evaluations per sample (teacher + search), "
            f"in blocks of {self.block}; {t.seconds:.1f} + {self.seconds:.1f} s; "
            f"peak memory {words.size(self.peak_bytes)}",
        ]
        for steps in self.steps:
            if steps in self.refined:
                lines.append(self.refined[steps].summary())
                continue
            fewer = self.cheaper(steps)
            note = f"  ({fewer} steps cost less: {self.cost(fewer):.3e})" if fewer else ""
            lines.append(f"{steps:3d} steps: mean squared error {self.cost(steps):.3e}{note}")
            if o.scope == "instance" and self.samples > 1:
                apart = self.spread(steps)[:, :-1].double().std(dim=0)
                lines.append(
                    f"          samples' own steps vary by {float(apart.mean()):.1f} teacher rows "
                    f"(standard deviation), the worst by {float(apart.max()):.1f}"
                )
        return "\n".join(lines)
