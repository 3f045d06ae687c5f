"""Refinement: descent on the student's true final error over the knots of its schedule.

The dynamic programme assumes that the nearer state always stays nearer (paper Assumption 1); what
counts is Eq. 8, the distance of the final state alone. From one or several starts, two kinds of
moves lower that error: Gauss-Newton steps, which move all knots at once by secants of the final
residual, and coordinate moves by 1, 2, 4, ... teacher rows. Each is used as long as it pays. A move
of knot k changes nothing before it, so runs begin at the last state that is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from oss_ext import arguments, solvers
from oss_ext.events import tell
from oss_ext.models.base import Model
from oss_ext.models.evaluation import Evaluator
from oss_ext.progress import progress_bar
from oss_ext.refine.base import (
    GROUPS,
    KEEP_BYTES,
    LEAST_SEEN,
    Orders,
    Rows,
    Runner,
    most_kept,
)
from oss_ext.refine.descent import Refinement, refined
from oss_ext.refine.exhaustive import exhaustive
from oss_ext.schedule import Objective, Schedule
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory

__all__ = [
    "KEEP_BYTES",
    "Refinement",
    "Runner",
    "evaluator_of",
    "exhaustive",
    "held",
    "least_runs",
    "refine",
]


def _check_starts(
    starts: Sequence[Schedule], trajectory: Trajectory
) -> dict[tuple[Rows, Orders], Schedule]:
    """The starts by rows and orders; ``ValueError`` unless of a kind, on the one grid."""
    if not starts:
        raise ValueError("starts: expected one or more schedules, got none")
    lengths = {s.steps for s in starts}
    if len(lengths) > 1:
        raise ValueError(f"starts: expected schedules of as many steps, got {sorted(lengths)}")
    grid = tuple(trajectory.times.tolist())
    by_path: dict[tuple[Rows, Orders], Schedule] = {}
    for s in starts:
        if s.indices is None or s.teacher_times != grid or s.indices[-1] != 0:
            raise ValueError("starts: expected schedules on the teacher's grid, to its clean end")
        solvers.get(s.solver).check_orders(s.orders, s.times)
        by_path.setdefault((s.indices, s.orders), s)
    if len({s.solver for s in starts}) > 1:
        raise ValueError("starts: expected schedules of one solver")
    return by_path


def evaluator_of(
    model: Model,
    samples: int,
    seen: int,
    max_batch: int | None,
    on_progress: Callable[[int], object] = lambda rows: None,
) -> Evaluator:
    """As ``refine`` has it, for ``samples`` of which it descends on the first ``seen``."""
    group = math.ceil(seen / GROUPS) if max_batch is None else max_batch
    return Evaluator(model, samples, group, on_progress)


def held(
    evaluator: Evaluator, trajectory: Trajectory, steps: int, seen: int, solver: str, budget: int
) -> list[Held]:
    """What ``refine`` holds at its peak beside the teacher.

    Args:
        evaluator: ``evaluator_of(...)``.
        trajectory: the teacher.
        steps: of the schedules.
        seen: samples descended on.
        solver: of the student.
        budget: model evaluations per sample.
    """
    used, group = solvers.get(solver), evaluator.block
    # A trial moves one knot, the first as often as the last, and leaves a state after it, one at
    # every knot below and the end. The end has no velocity, nor are evaluations spent on it.
    share = (steps + 1) / (steps + 3)
    made = budget * trajectory.samples / used.evaluations / group
    states = min(most_kept(group, trajectory, used, steps), made / share)
    tensors = 1 + share + (used.order > 1)
    row = trajectory.noise[0].nbytes
    front = min(seen, -(-LEAST_SEEN // group) * group)
    # The residuals that they are between, and secants with their correction beside them.
    secants = (3 + 2 * steps) * front * row
    paths = int(states * tensors * min(group, seen) * row)
    return [Held("paths", paths), Held("secants", secants)]


@arguments.takes(model=Model, trajectory=Trajectory)
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
    off_grid: bool = False,
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
        validation: share of the samples that the descent does not see, nor should its starts have.
            If its result is worse on them than another descent's or the start, by more than their
            spread, that is returned. 0: none.
        off_grid: at last let knots stand between the teacher's times too, for hosts and models
            that take any time.
        max_batch: samples run at once; None: a quarter of them.
        keep_bytes: memory for states to start from again.
        progress: show a progress bar.

    Returns:
        Never worse than the best start on the samples descended on.

    Raises:
        ValueError: bad arguments, starts off the grid, of different lengths or with orders that
            their solver does not have, a budget that does not pay for one run of every start,
            fewer samples than a split needs.
        NonFiniteError: the model returned NaN or inf on the way of every start, or of what was
            found on the samples left out.
    """
    candidates = list(starts) if isinstance(starts, Iterable) else [starts]
    for candidate in candidates:
        arguments.of_type("starts", candidate, Schedule)
    by_path = _check_starts(candidates, trajectory)
    steps = candidates[0].steps
    trajectory.check_model(model)
    pinned = start == "pinned"
    objective = Objective(reduce=reduce, start=start)
    if pinned and any(s.starts_below for s in candidates):
        raise ValueError("start: expected starts that begin at the teacher's last time")
    samples = trajectory.samples
    held_out = int(samples * arguments.number("validation", validation))
    if not 0 <= validation < 1 or (validation > 0 and held_out < 1):
        raise ValueError(
            f"validation: expected a share below 1 that leaves out a sample or more of {samples}, "
            f"or 0, got {validation}"
        )
    descents = arguments.whole_number("descents", descents)
    checked = _checked(len(by_path), descents)
    run = steps * solvers.get(candidates[0].solver).evaluations
    needed = run * least_runs(len(by_path), descents)
    if budget is not None and arguments.whole_number("budget", budget) < needed:
        raise ValueError(f"budget: expected {needed} or more, got {budget}")
    seen, unseen = range(samples - held_out), range(samples - held_out, samples)
    # The checks at the end, and a trial that has begun, must be paid for too.
    # So must what is run again where rows are made finer: the path so far, and its cost.
    reserved = run * (checked * held_out + len(seen) * (3 if off_grid else 1))
    most = 0 if budget is None else budget * samples
    limit = most - reserved if most else math.inf
    with progress_bar("refine", most, progress, steps=steps) as bar:
        evaluator = evaluator_of(model, samples, len(seen), max_batch, bar.update)
        leg = evaluator.leg()
        if leg.there:
            refinement = leg.take(Refinement.there)
        else:
            # The teacher's own evaluations, and those of the searches that the starts came from.
            spent = max(trajectory.nfe, *(s.search_nfe for s in candidates))
            refinement = refined(
                evaluator, trajectory, by_path, descents, seen, unseen, keep_bytes, off_grid,
                objective, limit, spent,
            )  # fmt: skip
            leg.reached(refinement.kept())
    tell(
        "refined",
        steps=steps,
        error=refinement.error,
        start_error=refinement.start_error,
        validation=refinement.validation,
        start_validation=refinement.start_validation,
        trials=refinement.trials,
    )
    return refinement


def least_runs(starts: int, descents: int) -> int:
    """Runs of the student that ``refine``'s ``budget`` has to pay for: of every start, of those
    that are checked on other samples, and one to find a better one by."""
    return starts + _checked(starts, descents) + 1


def _checked(starts: int, descents: int) -> int:
    """Students that are checked: what every descent found, and the best start."""
    return min(descents, starts) + 1
