"""What a search spends on which stage, known before it runs.

The measure is the paper's own search: ``N`` evaluations per sample for the teacher and one for
every live source of the dynamic programme (about ``M N``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oss_ext import arguments, dp

SHARES = {"fast": 1 / 5, "balanced": 1 / 2, "best": 3.0}
"""Of the paper's evaluations for a budget, teacher included, that a quality spends at most."""

QUALITIES = ("dp", *SHARES)
LEAST_RUNS = 6
"""Runs of the student that a descent needs to be worth its name."""


@dataclass(frozen=True)
class Plan:
    """Evaluations per calibration sample, the teacher's not counted.

    Attributes:
        quality: one of ``QUALITIES``.
        table: of the dynamic programme; 0 where there is none.
        refine: by budget, what its refinement may take.
    """

    quality: str
    table: int
    refine: dict[int, int]

    @property
    def nfe(self) -> int:
        """At most, altogether."""
        return self.table + sum(self.refine.values())

    def __str__(self) -> str:
        parts = [f"{self.table} for the dynamic programme"] if self.table else []
        parts += [f"{nfe} to refine {steps} steps" for steps, nfe in self.refine.items()]
        most = "at most " if self.refine else ""
        return f"{self.quality}: {most}{self.nfe} evaluations per sample ({', '.join(parts)})"


def plan(
    quality: str,
    teacher_steps: int,
    budgets: Sequence[int],
    start: str = "free",
    budget: int | None = None,
) -> Plan:
    """The plan of ``search(quality=...)``.

    Args:
        quality: ``dp``: Algorithm 1 alone. ``fast`` and ``balanced``: refinement from closed
            forms, with a fifth and half of the paper's evaluations. ``best``: the dynamic
            programme, then refinement from it and from the closed forms until no move helps, with
            three times the paper's evaluations at most.
        teacher_steps: N.
        budgets: numbers of steps asked for.
        start: ``free`` or ``pinned``.
        budget: evaluations per sample at most, all stages together; shortens refinement.

    Raises:
        ValueError: an unknown quality; a budget that does not pay for the dynamic programme and
            ``LEAST_RUNS`` student runs per number of steps.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality: expected one of {', '.join(QUALITIES)}, got {quality!r}")
    full = {k: dp.evaluations(teacher_steps, k, start) for k in budgets}
    table = full[max(budgets)] if quality in ("dp", "best") else 0
    refine, least = {}, {}
    if quality in SHARES:
        least = {k: LEAST_RUNS * k for k in budgets}
        for k in budgets:
            own = SHARES[quality] * (teacher_steps + full[k]) - teacher_steps
            refine[k] = max(least[k], int(own) - (full[k] if table else 0))
    if budget is not None:
        budget = arguments.whole_number("budget", budget)
        needed = table + sum(least.values())
        if budget < needed:
            raise ValueError(
                f"budget: expected at least {needed} evaluations per sample for quality "
                f"{quality!r} and {list(budgets)} steps, got {budget}"
            )
        if table + sum(refine.values()) > budget:
            share = (budget - needed) / (sum(refine.values()) - sum(least.values()))
            refine = {k: least[k] + int(share * (refine[k] - least[k])) for k in refine}
    return Plan(quality, table, refine)
