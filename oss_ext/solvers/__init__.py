"""Solvers by name. A new family is a file and its name in SOLVERS."""

from __future__ import annotations

from oss_ext.solvers import adams, deis, dpm, euler, heun, ipndm, unipc
from oss_ext.solvers.base import (
    History,
    Multistep,
    Singlestep,
    Solver,
    evaluations,
    integrate,
)

__all__ = [
    "SOLVERS", "History", "Multistep", "Singlestep", "Solver", "evaluations", "get", "integrate",
]  # fmt: skip

_FAMILIES: tuple[tuple[Solver, ...], ...] = (
    euler.FAMILY,
    dpm.FAMILY,
    unipc.FAMILY,
    deis.FAMILY,
    adams.FAMILY,
    ipndm.FAMILY,
    heun.FAMILY,
)
SOLVERS: dict[str, Solver] = {solver.name: solver for family in _FAMILIES for solver in family}


def get(name: str) -> Solver:
    """The solver called ``name``; ``ValueError`` lists the known ones."""
    if name not in list(SOLVERS):  # whatever it is, hashable or not
        raise ValueError(f"unknown solver {name!r}; known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[name]
