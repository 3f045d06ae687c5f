"""Solvers by name. A new solver is a file and a line in SOLVERS."""

from __future__ import annotations

from oss_ext.solvers.base import Solver, integrate
from oss_ext.solvers.euler import Euler

__all__ = ["SOLVERS", "Solver", "get", "integrate"]

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (Euler(),)}


def get(name: str) -> Solver:
    """The solver called ``name``; ``ValueError`` lists the known ones."""
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[name]
