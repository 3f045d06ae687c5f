"""Refinement: descent on the student's true final error over the knots of its schedule.

The dynamic programme assumes that the nearer state always stays nearer (paper Assumption 1); what
counts is Eq. 8, the distance of the final state alone. From one or several starts, knots are moved
by 1, 2, 4, ... teacher rows and moves that lower that error are kept. A move of knot k changes
nothing before it, so runs begin at the last state that is known. Samples are run in groups, and a
move that is clearly worse on the first ones is not run on the rest.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oss_ext import arguments, solvers
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.progress import progress_bar
from oss_ext.schedule import Objective, Schedule
from oss_ext.teacher import Trajectory

GROUPS = 4
"""Into which the calibration samples are parted for racing, unless ``max_batch`` says otherwise."""

LEAST_SEEN = 4
"""Samples that a trial is run on before it can be called hopeless."""

KEEP_BYTES = 2**29
"""Memory for the states and velocities of paths that were run."""

Rows = tuple[int, ...]


@dataclass(frozen=True)
class Refinement:
    """What refinement found, and what it started from.

    Attributes:
        schedule: the best schedule; its ``cost`` is the arithmetic mean of the final errors over
            the calibration samples.
        start: the best of the starts.
        error, start_error: mean final error on the calibration samples, as ``reduce`` has it.
        validation, start_validation: the same on samples that the descent did not see; None
            without a split.
        trials: schedules that were run, in full or in part.
        nfe: model evaluations per sample of the trajectory.
    """

    schedule: Schedule
    start: Schedule
    error: float
    start_error: float
    validation: float | None
    start_validation: float | None
    trials: int
    nfe: float

    def summary(self) -> str:
        """Errors before and after, and what they cost, in two lines."""
        gain = 10 * math.log10(self.start_error / self.error) if self.error > 0 else math.inf
        lines = [
            f"{self.schedule.steps} steps refined: error {self.start_error:.3e} -> "
            f"{self.error:.3e} ({gain:.2f} dB) in {self.trials} trials, {self.nfe:.0f} evaluations "
            "per sample"
        ]
        if self.validation is not None and self.start_validation is not None:
            lines.append(f"on unseen samples {self.start_validation:.3e} -> {self.validation:.3e}")
        return "\n".join(lines)


class Runner:
    """Runs paths of teacher rows to the clean end, from where they part from earlier ones.

    Args:
        evaluator: of the model; its block is the number of samples run at once.
        trajectory: the teacher.
        solver: name of the student's solver.
        keep_bytes: memory for states and velocities; the oldest are forgotten.
    """

    def __init__(
        self, evaluator: Evaluator, trajectory: Trajectory, solver: str, keep_bytes: int
    ) -> None:
        self._evaluator, self._trajectory = evaluator, trajectory
        self._solver, self._times = solvers.get(solver), trajectory.times.tolist()
        # What is known after a prefix of rows: state, history and, once it was needed, velocity.
        self._known: OrderedDict[tuple[int, Rows], list[Any]] = OrderedDict()
        self.last_row = trajectory.steps
        group = trajectory.states[0, : evaluator.block]
        self._keep = max(len(self._times), keep_bytes // (2 * group.nbytes))

    def groups(self, samples: Sequence[int]) -> Iterator[Tensor]:
        """``samples`` in the groups that are run at once."""
        yield from torch.tensor(list(samples)).split(self._evaluator.block)

    def errors(self, rows: Rows, group: Tensor) -> Tensor:
        """Mean squared final error of the path ``rows`` (descending, to 0), ``[len(group)]``."""
        name = int(group[0])
        for known in range(len(rows), 1, -1):
            if (name, rows[:known]) in self._known:
                break
        else:
            known = 1
        for k in range(known, len(rows)):
            self._step(name, rows[:k], rows[k], group)
        x = self._entry(name, rows, group)[0]
        target = self._trajectory.final[group.to(x.device)]
        return (x - target).double().square().flatten(1).mean(dim=1).cpu()

    def values(self, rows: Rows, samples: Sequence[int], reduce: str) -> Tensor:
        """What a search averages and minimises for ``rows``, of every one of ``samples``."""
        errors = [self.errors(rows, group) for group in self.groups(samples)]
        return _value(torch.cat(errors), reduce)

    def _entry(self, name: int, prefix: Rows, group: Tensor) -> list[Any]:
        key = (name, prefix)
        if key not in self._known:  # a start: the noise as it is, whatever the first row
            self._known[key] = [self._trajectory.noise[group.to(self._trajectory.noise.device)],
                                None, None]  # fmt: skip
        self._known.move_to_end(key)
        return self._known[key]

    def _step(self, name: int, prefix: Rows, row: int, group: Tensor) -> None:
        entry = self._entry(name, prefix, group)
        t, t_next = self._times[prefix[-1]], self._times[row]
        if entry[2] is None:
            entry[2] = self._evaluator.at(entry[0], t, group)
        x, history = self._solver.step(entry[1], entry[0], entry[2], t, t_next)
        self._known[name, (*prefix, row)] = [x, history, None]
        while len(self._known) > self._keep:
            self._known.popitem(last=False)


class Descent:
    """Coordinate descent over the rows of a path, for as long as it may go on."""

    def __init__(
        self,
        runner: Runner,
        samples: Sequence[int],
        reduce: str,
        pinned: bool,
        may_go_on: Callable[[], bool],
    ) -> None:
        self._runner, self._samples, self._reduce = runner, samples, reduce
        self._pinned, self._may_go_on = pinned, may_go_on
        self.trials = 0

    def run(self, rows: Rows, score: Tensor) -> tuple[Rows, Tensor]:
        """The best path found from ``rows``, whose score is known, and its score."""
        top = max(1, rows[0] // (2 * len(rows)))
        scale = 1 << int(math.log2(top))
        while scale >= 1 and self._may_go_on():
            rows, score, improved = self._sweep(rows, score, scale)
            if not improved:
                scale //= 2
        return rows, score

    def _sweep(self, rows: Rows, score: Tensor, scale: int) -> tuple[Rows, Tensor, bool]:
        """Every knot tried once either way, the last ones, which cost least, first."""
        improved = False
        first = 1 if self._pinned else 0
        for k in range(len(rows) - 2, first - 1, -1):
            for step in (scale, -scale):
                while self._may_go_on():
                    moved = self._moved(rows, k, step)
                    found = None if moved is None else self._better(moved, score)
                    if moved is None or found is None:
                        break
                    rows, score, improved = moved, found, True
        return rows, score, improved

    def _moved(self, rows: Rows, k: int, step: int) -> Rows | None:
        """``rows`` with knot ``k`` elsewhere; None where that is no path."""
        row = rows[k] + step
        above = rows[k - 1] if k else self._runner.last_row + 1
        return (*rows[:k], row, *rows[k + 1 :]) if above > row > rows[k + 1] else None

    def _better(self, rows: Rows, score: Tensor) -> Tensor | None:
        """The score of ``rows`` if it is below ``score`` in the mean, else None, early."""
        self.trials += 1
        values: list[Tensor] = []
        seen = 0
        for group in self._runner.groups(self._samples):
            values.append(_value(self._runner.errors(rows, group), self._reduce))
            seen += len(group)
            difference = torch.cat(values) - score[:seen]
            if seen >= LEAST_SEEN and _is_worse(difference):
                return None
        return torch.cat(values) if float(difference.mean()) < 0 else None


def exhaustive(
    model: Model,
    trajectory: Trajectory,
    steps: int,
    *,
    reduce: str = "log_mean",
    start: str = "free",
    max_batch: int | None = None,
    most: int = 20_000,
) -> tuple[Schedule, float]:
    """The best of all schedules of ``steps`` steps on the teacher's grid, and its error.

    The oracle for small cases: paths share what they have in common, but there are ``binomial(N,
    steps)`` of them.

    Raises:
        ValueError: bad arguments, or more than ``most`` schedules.
    """
    n = trajectory.steps
    steps = arguments.whole_number("steps", steps, most=n)
    objective = Objective(reduce=reduce, start=start)
    trajectory.check_model(model)
    pinned = start == "pinned"
    count = math.comb(n - 1, steps - 1) if pinned else math.comb(n, steps)
    if count > most:
        raise ValueError(f"steps: expected at most {most} schedules to try, got {count}")
    evaluator = Evaluator(model, trajectory.samples, max_batch)
    runner = Runner(evaluator, trajectory, trajectory.solver, KEEP_BYTES)
    samples = range(trajectory.samples)
    free = itertools.combinations(range(n - 1 if pinned else n, 0, -1), steps - pinned)
    # In this order neighbours share the most of their paths.
    paths = ((n, *rows, 0) if pinned else (*rows, 0) for rows in free)
    error, rows = min((_mean_error(runner.values(p, samples, reduce), reduce), p) for p in paths)
    schedule = trajectory.schedule(
        rows,
        method="exhaustive",
        objective=objective,
        cost=float(runner.values(rows, samples, "mean").mean()),
        samples=trajectory.samples,
        search_nfe=trajectory.nfe + evaluator.nfe // trajectory.samples,
    )
    return schedule, error


def _check_starts(starts: Sequence[Schedule], trajectory: Trajectory) -> dict[Rows, Schedule]:
    """The starts by their rows; ``ValueError`` if they are not of a kind, on the one grid."""
    if not starts or not all(isinstance(s, Schedule) for s in starts):
        raise ValueError(f"starts: expected one or more schedules, got {starts!r:.100}")
    lengths = {s.steps for s in starts}
    if len(lengths) > 1:
        raise ValueError(f"starts: expected schedules of as many steps, got {sorted(lengths)}")
    grid = tuple(trajectory.times.tolist())
    by_rows: dict[Rows, Schedule] = {}
    for s in starts:
        if s.indices is None or s.teacher_times != grid or s.indices[-1] != 0:
            raise ValueError("starts: expected schedules on the teacher's grid, to its clean end")
        by_rows.setdefault(s.indices, s)
    if len({s.solver for s in starts}) > 1:
        raise ValueError("starts: expected schedules of one solver")
    return by_rows


def _value(errors: Tensor, reduce: str) -> Tensor:
    """What is averaged and minimised, per sample: the final error or its logarithm."""
    tiny = torch.finfo(torch.float32).tiny  # an exact copy of the teacher is as good as it gets
    return errors.clamp_min(tiny).log() if reduce == "log_mean" else errors


def _is_worse(difference: Tensor) -> bool:
    """Whether paired differences are above 0 in the mean by more than chance has it."""
    spread = float(difference.std(correction=0)) / math.sqrt(len(difference))
    return not float(difference.mean()) <= spread  # so is what is not a number


def _mean_error(value: Tensor, reduce: str) -> float:
    mean = float(value.mean())
    return math.exp(mean) if reduce == "log_mean" else mean


def refine(
    model: Model,
    trajectory: Trajectory,
    starts: Schedule | Sequence[Schedule],
    *,
    reduce: str = "log_mean",
    start: str = "free",
    budget: int | None = None,
    descents: int = 2,
    validation: float = 0.25,
    max_batch: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    progress: bool = False,
) -> Refinement:
    """Descend on the final error (paper Eq. 8) from the best of ``starts``.

    Args:
        model: the model the teacher was made with.
        trajectory: ``oss_ext.teacher(...)``, the calibration samples.
        starts: schedules on the teacher's grid, all of as many steps; searched, uniform, ...
        reduce: ``log_mean`` (mean PSNR) or ``mean`` (PSNR of the mean error).
        start: ``free``, the first knot may move too, or ``pinned``, it stays at the teacher's last
            time.
        budget: model evaluations per sample of the trajectory; None: until no move helps.
        descents: how many of the starts, the best first, to descend from.
        validation: share of the samples that the descent does not see. If its result is worse on
            them than the start, by more than their spread, the start is returned. 0: none.
        max_batch: samples run at once; None: a quarter of them.
        keep_bytes: memory for states to start from again.
        progress: show a progress bar.

    Returns:
        Never worse than the best start on the samples descended on.

    Raises:
        ValueError: bad arguments, starts off the grid or of different lengths, a budget that does
            not pay for one run of every start, fewer samples than a split needs.
        NonFiniteError: the model returned NaN or inf.
    """
    candidates = [starts] if isinstance(starts, Schedule) else list(starts)
    by_rows = _check_starts(candidates, trajectory)
    steps = len(next(iter(by_rows))) - 1
    trajectory.check_model(model)
    pinned = start == "pinned"
    objective = Objective(reduce=reduce, start=start)
    if pinned and any(s.starts_below for s in candidates):
        raise ValueError("start: expected starts that begin at the teacher's last time")
    samples = trajectory.samples
    held = int(samples * arguments.number("validation", validation))
    if not 0 <= validation < 1 or (validation > 0 and held < 1):
        raise ValueError(
            f"validation: expected a share below 1 that leaves out a sample or more of {samples}, "
            f"or 0, got {validation}"
        )
    descents = arguments.whole_number("descents", descents)
    needed = steps * (len(by_rows) + 2)
    if budget is not None and arguments.whole_number("budget", budget) < needed:
        raise ValueError(f"budget: expected {needed} or more, got {budget}")
    seen, unseen = range(samples - held), range(samples - held, samples)
    limit = math.inf if budget is None else budget * samples - 2 * steps * held
    with progress_bar("refine", 0 if budget is None else budget * samples, progress) as bar:
        group = math.ceil(len(seen) / GROUPS) if max_batch is None else max_batch
        evaluator = Evaluator(model, samples, group, bar.update)
        runner = Runner(evaluator, trajectory, candidates[0].solver, keep_bytes)
        descent = Descent(runner, seen, reduce, pinned, lambda: evaluator.nfe < limit)
        paths = sorted(
            ((runner.values(rows, seen, reduce), rows) for rows in by_rows),
            key=lambda item: float(item[0].mean()),
        )
        start_score, start_rows = best_score, best_rows = paths[0]
        for score, rows in paths[:descents]:
            rows, score = descent.run(rows, score)
            if float(score.mean()) < float(best_score.mean()):
                best_score, best_rows = score, rows
        judged = (start_rows, best_rows) if held else ()
        checks = [runner.values(rows, unseen, reduce) for rows in judged]
        if checks and _is_worse(checks[1] - checks[0]):
            best_score, best_rows, checks[1] = start_score, start_rows, checks[0]
        cost = float(runner.values(best_rows, seen, "mean").mean())
    begun = by_rows[start_rows]
    # The teacher's own evaluations, and those of the searches that the starts came from.
    before = max(trajectory.nfe, *(s.search_nfe for s in candidates))
    schedule = trajectory.schedule(
        best_rows,
        solver=begun.solver,
        method="refined",
        objective=objective,
        cost=cost,
        samples=len(seen),
        search_nfe=before + round(evaluator.nfe / samples),
    )
    return Refinement(
        schedule=schedule,
        start=begun,
        error=_mean_error(best_score, reduce),
        start_error=_mean_error(start_score, reduce),
        validation=_mean_error(checks[1], reduce) if checks else None,
        start_validation=_mean_error(checks[0], reduce) if checks else None,
        trials=len(by_rows) + descent.trials,
        nfe=evaluator.nfe / samples,
    )
