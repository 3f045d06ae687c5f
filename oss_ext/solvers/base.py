"""The solver protocol: pure steps, state in and state out, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor


class Solver(Protocol):
    """One step of an ODE solver in flow coordinates.

    ``history`` is whatever a multistep solver carries from step to step; it is passed in and
    handed back, never kept inside, because a search steps from many histories at once. ``None``
    starts a path.
    """

    name: str

    def step(
        self, history: Any, x: Tensor, velocity: Tensor, t: float, t_next: float
    ) -> tuple[Tensor, Any]:
        """The state at ``t_next`` from ``x`` [B, *dims] and its velocity at ``t``."""
        ...


def integrate(
    solver: Solver,
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Sequence[float],
) -> Iterator[Tensor]:
    """Yield the states at ``times[1:]``, starting from ``x`` at ``times[0]``.

    Args:
        velocity: ``velocity(x, t)``, called once per step.
        x: ``[B, *dims]``.
        times: descending flow times.
    """
    history = None
    for t, t_next in pairwise(times):
        x, history = solver.step(history, x, velocity(x, t), t, t_next)
        yield x
