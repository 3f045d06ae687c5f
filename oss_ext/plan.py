"""What a search spends on which stage, known before it runs.

The measure is the paper's own search: ``N`` evaluations per sample for the teacher and one for
every live source of the dynamic programme (about ``M N``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from oss_ext import arguments, beam, coarse, dp, metrics, solvers
from oss_ext.metrics import XT, Metric

SHARES = {"fast": 1 / 5, "balanced": 1 / 2, "best": 3.0}
"""Of the paper's evaluations for a budget, teacher included, that a quality spends at most."""

QUALITIES = ("dp", *SHARES)


@dataclass(frozen=True)
class _Coarse:
    """A search from coarse to fine.

    Attributes:
        strides: the first whose cost is within half of what there is for refinement is taken.
        share: of the samples that dynamic programmes see, if that leaves ``LEAST_COARSE``.
        banded: whether it looks at the rows around its paths; what that costs buys more when it is
            spent on the descent, if there is little.
    """

    strides: tuple[int, ...] = (4, 8, 16)
    share: float = 1.0
    banded: bool = True


COARSE = {
    "fast": (_Coarse(strides=(8, 16), share=0.5, banded=False),),
    "balanced": (
        _Coarse(strides=(4,)),
        _Coarse(share=0.5),
        _Coarse(share=0.5, banded=False),
    ),
    "best": (_Coarse(),),
}
"""Those of a quality; the first that there is room for is run. Fewer samples rather than rows."""

LEAST_COARSE = 4
"""Samples that a search from coarse to fine is run on, if there are as many."""

LEAST_RUNS = 6
"""Runs of the student that a descent needs to be worth its name."""

VALIDATION = 0.25
"""Share of the samples that what refinement found is checked on; nothing before has seen them."""

LEAST_SPLIT = 8
"""Calibration samples from which on they are."""


@dataclass(frozen=True)
class Plan:
    """Evaluations per calibration sample, the teacher's not counted.

    Dynamic programmes are run on the samples that are not left out, and cost as much less.

    Attributes:
        quality: one of ``QUALITIES``.
        held_out: calibration samples that are left out, to check what refinement found.
        table: of the dynamic programme; 0 where there is none.
        refine: by budget, what its refinement may take.
        coarse: of a search from coarse to fine, at most; 0 where there is none.
        stride, band: of that, see ``coarse_to_fine``.
        coarse_samples: that it is run on.
    """

    quality: str
    held_out: int
    table: int
    refine: dict[int, int]
    coarse: int = 0
    stride: int = 0
    band: int = 0
    coarse_samples: int = 0

    @property
    def nfe(self) -> int:
        """At most, altogether."""
        return self.table + self.coarse + sum(self.refine.values())

    def kept(self, state: int, rows: int, least: int) -> int:
        """Bytes of answers that a checkpoint holds at most at once, beside the teacher's.

        Args:
            state: bytes of an answer, for all samples.
            rows: of states that stand in for the answers of a dynamic programme before it has
                ended; then there are these, those that are written in their place, and as many
                answers. 0: none do.
            least: bytes of answers that these are written for.
        """
        tables = [min(n, 3 * rows) * state + least * (n > 3 * rows) if rows else n * state
                  for n in (self.table, self.coarse)]  # fmt: skip
        return max(*tables, *(n * state for n in self.refine.values()))

    def __str__(self) -> str:
        parts = [f"{self.table} for the dynamic programme"] if self.table else []
        parts += [f"{self.coarse} from coarse to fine"] if self.coarse else []
        parts += [f"{nfe} to refine {steps} steps" for steps, nfe in self.refine.items()]
        most = "at most " if self.refine else ""
        return f"{self.quality}: {most}{self.nfe} evaluations per sample ({', '.join(parts)})"


def plan(
    quality: str,
    teacher_steps: int,
    budgets: int | Sequence[int],
    start: str = "free",
    *,
    samples: int = 1,
    budget: int | None = None,
    width: int = 1,
    solver: str = "euler",
    metric: Metric | str = XT,
    clean: bool = True,
) -> Plan:
    """The plan of ``search(quality=...)``.

    Args:
        quality: ``dp``: Algorithm 1 alone. ``fast``: refinement with a fifth of the paper's
            evaluations, from a closed form and, where that leaves room, from a coarse search on
            half of the samples. ``balanced``: with half of them, from closed forms and a search
            from coarse to fine, on half of the samples where there is no room for all. ``best``:
            the whole dynamic programme, then refinement from all of these until no move helps, with
            three times the paper's evaluations at most.
        teacher_steps: N.
        budgets: numbers of steps asked for.
        start: ``free`` or ``pinned``.
        samples: of the calibration.
        budget: evaluations per sample at most, all stages together; shortens refinement.
        width: states per row that the dynamic programme keeps; more is a beam, whose further
            evaluations come on top.
        solver: of the student. With one of several evaluations a step there is no search from
            coarse to fine.
        metric: of dynamic programmes; one that evaluates candidates makes them cost more.
        clean: whether the teacher ends at t = 0, where solvers of several evaluations a step take
            one.

    Raises:
        ValueError: an unknown quality or solver; steps that the teacher does not have; a budget
            that does not pay for the dynamic programme and ``LEAST_RUNS`` student runs per number
            of steps; a metric that no dynamic programme would compare by, or none with this solver;
            a beam that none would keep.
    """
    arguments.one_of("quality", quality, QUALITIES)
    arguments.whole_number("teacher_steps", teacher_steps)
    budgets = check_budgets(budgets, teacher_steps)
    metric = metrics.get(metric)
    per_step = solvers.get(solver).evaluations
    dp.check_metric(solver, metric)
    if arguments.whole_number("beam", width) > 1:
        if quality not in ("dp", "best"):
            raise ValueError(
                f"beam: expected 1 with quality {quality!r}, got {width}; 'dp' and 'best' keep one"
            )
        if solver != "euler" or metric != XT:
            raise ValueError(
                f"beam: expected 1 with solver {solver!r} and metric {metric.name!r}, got {width}; "
                "there is one with 'euler' and 'xt'"
            )
    paper, own = (
        {k: dp.evaluations(teacher_steps, k, start, *options) for k in budgets}
        for options in ((), (per_step, metric.evaluated, clean))
    )
    split = quality in SHARES and arguments.whole_number("samples", samples) >= LEAST_SPLIT
    held_out = int(VALIDATION * samples) if split else 0
    seen = 1 - held_out / samples
    table = 0
    if quality in ("dp", "best"):
        most = max(budgets)
        table = own[most] if width == 1 else beam.evaluations(teacher_steps, most, width, start)
        table = math.ceil(seen * table)
    refine, least = {}, {}
    if quality in SHARES:
        least = {k: LEAST_RUNS * k * per_step for k in budgets}
        for k in budgets:
            share = SHARES[quality] * (teacher_steps + paper[k]) - teacher_steps
            spent = math.ceil(seen * own[k]) if table else 0
            refine[k] = max(least[k], int(share) - spent)
    planned = Plan(quality, held_out, table, refine)
    if quality in COARSE and per_step == 1:
        planned = _with_coarse(planned, teacher_steps, budgets, start, least, samples, metric)
    if budget is not None and arguments.whole_number("budget", budget) < planned.nfe:
        needed = table + sum(least.values())
        if budget < needed:
            raise ValueError(
                f"budget: expected at least {needed} evaluations per sample for quality "
                f"{quality!r} and {list(budgets)} steps, got {budget}"
            )
        # The search from coarse to fine is dropped first, then refinement is shortened.
        total = sum(refine.values())
        share = min(1.0, (budget - needed) / max(total - sum(least.values()), 1))
        refine = {k: least[k] + int(share * (refine[k] - least[k])) for k in refine}
        planned = Plan(quality, held_out, table, refine)
    if metric != XT and not planned.table and not planned.coarse:
        raise ValueError(
            f"metric: expected 'xt' where quality {quality!r} runs no dynamic programme, got "
            f"{metric.name!r}; 'dp' and 'best' run one"
        )
    return planned


def check_budgets(steps: int | Sequence[int], teacher_steps: int) -> list[int]:
    """The budgets asked for, ascending; ``ValueError`` unless each is 1 to ``teacher_steps``."""
    budgets = list(steps) if isinstance(steps, Sequence) else [steps]
    if not budgets:
        raise ValueError(f"steps: expected one whole number or more, got {steps!r}")
    return sorted({arguments.whole_number("steps", k, most=teacher_steps) for k in budgets})


def make_plan(
    quality: str | None,
    scope: str,
    teacher_steps: int,
    budgets: Sequence[int],
    start: str,
    *,
    off_grid: bool,
    **measures: Any,
) -> Plan:
    """The plan that the options of ``search`` describe; ``ValueError`` on a contradiction.

    Args:
        measures: keywords of ``plan``.
    """
    quality = quality or ("balanced" if scope == "joint" else "dp")
    if scope != "joint" and quality != "dp":
        raise ValueError(f"quality: expected 'dp' with scope {scope!r}, got {quality!r}")
    if off_grid and quality == "dp":
        raise ValueError("off_grid: expected a quality that refines, got 'dp'")
    return plan(quality, teacher_steps, budgets, start, **measures)


def _with_coarse(
    planned: Plan,
    teacher_steps: int,
    budgets: Sequence[int],
    start: str,
    least: dict[int, int],
    samples: int,
    metric: Metric,
) -> Plan:
    """``planned`` with a part of its refinement spent on a search from coarse to fine."""
    total = sum(planned.refine.values())
    room = total - sum(least.values())
    seen = samples - planned.held_out
    searches = [(each, stride) for each in COARSE[planned.quality] for stride in each.strides]
    for how, stride in searches:
        part = min(seen, max(LEAST_COARSE, math.ceil(how.share * seen)))
        if stride > teacher_steps or -(-teacher_steps // stride) < max(budgets):
            continue
        band = stride if how.banded else 0
        own = coarse.evaluations(
            teacher_steps, budgets, start, stride, band, evaluated=metric.evaluated
        )
        cost = math.ceil(part / samples * own)
        if cost <= min(total / 2, room):
            share = (room - cost) / room
            rest = {k: least[k] + int(share * (n - least[k])) for k, n in planned.refine.items()}
            return replace(
                planned, refine=rest, coarse=cost, stride=stride, band=band, coarse_samples=part
            )
    return planned
