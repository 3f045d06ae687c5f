"""The public entry: from a model and its teacher to schedules for every budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oss_ext import arguments, dp
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.progress import progress_bar
from oss_ext.schedule import Objective, Schedule, aggregate_indices
from oss_ext.teacher import Trajectory


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Schedules for every budget up to the largest asked for, and what they cost.

    Attributes:
        trajectory: the teacher searched against.
        objective: what was minimised.
        steps: the budgets asked for, ascending; all budgets up to the largest are there.
        table: costs and parents of the dynamic programme.
        nfe: model evaluations of the search per sample, teacher not included.
        block: rows per model call.
        seconds: wall time of the search.
        peak_bytes: peak memory: of the GPU's allocator during the search, or on a CPU of the
            process so far.
    """

    trajectory: Trajectory
    objective: Objective
    steps: tuple[int, ...]
    table: dp.Table
    nfe: int
    block: int
    seconds: float
    peak_bytes: int

    def schedule(self, steps: int) -> Schedule:
        """The schedule of exactly ``steps`` steps for all samples.

        Raises:
            ValueError: a budget outside the table, or an instance search without ``aggregate``
                (use ``schedules``).
        """
        if self.objective.scope == "joint":
            return self._build(steps, self.table.backtrack(steps), self.cost(steps))
        if self.objective.aggregate is None:
            raise ValueError(
                "an instance search has a schedule per sample: use schedules(steps), or search "
                "with aggregate='mean' or 'median'"
            )
        paths = [self.table.backtrack(steps, b) for b in range(self.trajectory.samples)]
        # An averaged path was never run, so it has no cost yet.
        return self._build(steps, aggregate_indices(paths, self.objective.aggregate), None)

    def schedules(self, steps: int) -> list[Schedule]:
        """One schedule per sample; the same one for all after a joint search."""
        if self.objective.scope == "joint":
            return [self.schedule(steps)] * self.trajectory.samples
        return [
            self._build(
                steps, self.table.backtrack(steps, b), float(self.table.cost[steps - 1, 0, b])
            )
            for b in range(self.trajectory.samples)
        ]

    def cost(self, steps: int) -> float:
        """Mean squared error of the final state after exactly ``steps`` steps, over the samples."""
        steps = arguments.whole_number("steps", steps, most=self.table.steps)
        return float(self.table.cost[steps - 1, 0].double().mean())

    def cheaper(self, steps: int) -> int | None:
        """A smaller budget that is better than ``steps`` by the objective, the best, or None."""
        steps = arguments.whole_number("steps", steps, most=self.table.steps)
        final = self.table.cost[:steps, 0].double()
        if self.objective.reduce == "log_mean":
            final = final.log()
        best = int(final.mean(dim=1).argmin()) + 1
        return None if best == steps else best

    def _build(self, steps: int, indices: tuple[int, ...], cost: float | None) -> Schedule:
        return self.trajectory.schedule(
            indices,
            objective=self.objective,
            cost=cost,
            samples=self.trajectory.samples,
            search_nfe=self.nfe + self.trajectory.nfe,
        )

    def summary(self) -> str:
        """Evaluations, time, memory and the cost of every budget asked for, in a few lines."""
        o, t = self.objective, self.trajectory
        how = f"{o.scope}, {o.aggregate or o.reduce}, {o.start} start"
        lines = [
            f"{t.model}: {t.samples} samples, teacher {t.steps} steps ({t.solver}), {how}",
            f"{t.nfe} + {self.nfe} model evaluations per sample (teacher + search), in blocks of "
            f"{self.block}; {t.seconds:.1f} + {self.seconds:.1f} s; "
            f"peak memory {self.peak_bytes / 2**20:.0f} MiB",
        ]
        for steps in self.steps:
            fewer = self.cheaper(steps)
            note = f"  ({fewer} steps cost less: {self.cost(fewer):.3e})" if fewer else ""
            lines.append(f"{steps:3d} steps: mean squared error {self.cost(steps):.3e}{note}")
        return "\n".join(lines)


def check_budgets(steps: int | Sequence[int], teacher_steps: int) -> list[int]:
    """The budgets asked for, ascending; ``ValueError`` unless each is 1 to ``teacher_steps``."""
    budgets = list(steps) if isinstance(steps, Sequence) else [steps]
    if not budgets or any(type(k) is not int or not 1 <= k <= teacher_steps for k in budgets):
        raise ValueError(f"steps: expected whole numbers from 1 to {teacher_steps}, got {steps!r}")
    return sorted(set(budgets))


def make_objective(scope: str, reduce: str | None, aggregate: str | None, start: str) -> Objective:
    """The objective that the options of ``search`` describe; ``ValueError`` on a contradiction."""
    reduce = reduce or ("log_mean" if scope == "joint" else "none")
    return Objective(scope=scope, reduce=reduce, start=start, aggregate=aggregate)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the GPU's allocator, or of the process; 0 where no one counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows, where schedules can still be loaded and shown

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def search(
    model: Model,
    trajectory: Trajectory,
    steps: int | Sequence[int],
    *,
    scope: str = "joint",
    reduce: str | None = None,
    aggregate: str | None = None,
    start: str = "free",
    max_batch: int | None = None,
    velocity_bytes: int = dp.VELOCITY_BYTES,
    progress: bool = False,
) -> SearchResult:
    """Find which teacher steps to keep (paper Algorithm 1).

    Args:
        model: the model the teacher was made with.
        trajectory: ``oss_ext.teacher(...)``.
        steps: a budget or several, each 1 to N; one run serves all up to the largest.
        scope: ``joint``, one schedule for all samples, or ``instance``, one each.
        reduce: joint only: ``log_mean`` (default; mean PSNR) or ``mean`` (PSNR of the mean).
        aggregate: instance only: also one schedule from all, by ``mean`` or ``median``.
        start: ``free``, the first step may start below the last teacher time, or ``pinned``.
        max_batch: rows per model call; None: the number of samples.
        velocity_bytes: memory for the velocities of a step; more are streamed.
        progress: show a progress bar.

    Raises:
        ValueError: bad arguments; a model other than the teacher's.
        NonFiniteError: no finite path is left; the message names time and sample.
    """
    budgets = check_budgets(steps, trajectory.steps)
    objective = make_objective(scope, reduce, aggregate, start)
    trajectory.check_model(model)
    begin, samples = time.perf_counter(), trajectory.samples
    if trajectory.states.is_cuda:
        torch.cuda.reset_peak_memory_stats(trajectory.states.device)
    planned = dp.evaluations(trajectory.steps, budgets[-1], start) * samples
    with progress_bar("search", planned, progress) as bar:
        evaluator = Evaluator(model, samples, max_batch, bar.update)
        table = dp.run(
            evaluator,
            trajectory,
            budgets[-1],
            reduce=objective.reduce,
            start=start,
            velocity_bytes=velocity_bytes,
        )
    return SearchResult(
        trajectory=trajectory,
        objective=objective,
        steps=tuple(budgets),
        table=table,
        nfe=evaluator.nfe // samples,
        block=evaluator.block,
        seconds=time.perf_counter() - begin,
        peak_bytes=peak_memory(trajectory.states.device),
    )
