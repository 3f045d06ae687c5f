"""What a solver is: Euler, corrected by differences of model outputs; and the loop that runs one.

In flow coordinates every solver here takes a step of one form, with velocity v at (x, t):

    x(t') = x + (t' - t) v + sum_{r >= 1} g_r (O_r - O_0)

O_0 is the model's output at (x, t) in the form that the solver extrapolates: the data, the noise
or the velocity itself. The others are earlier outputs of the same path (multistep) or come from
stages between t and t' (singlestep). Where the output is constant all solvers are Euler, which is
DDIM and DPM-Solver-1; they differ in their weights g. A step is affine in what it is given, which
is what lets a search compare all of them with one operator (paper appendix B).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]

# What a model's output is in (x, v) at time t: the coefficients of both.
OUTPUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "velocity": lambda t: (torch.zeros_like(t), torch.ones_like(t)),
    "data": lambda t: (torch.ones_like(t), -t),
    "noise": lambda t: (torch.ones_like(t), 1 - t),
}


@dataclass(frozen=True, eq=False)
class History:
    """What a multistep solver carries from step to step.

    Attributes:
        times: of the outputs, newest first.
        outputs: ``[B, *dims]`` each, as the solver extrapolates them.
        order: of the step that led here.
    """

    times: tuple[float, ...]
    outputs: tuple[Tensor, ...]
    order: int


class Solver(ABC):
    """A solver. Nothing is kept inside: a search steps from many histories at once.

    Attributes:
        name: in ``SOLVERS``, in schedules and on the command line.
        title: what it is and where it was published.
        order: the highest order of a step.
        output: which of ``OUTPUTS`` it extrapolates.
        to_clean: the highest order of a step to t = 0, where half the log-SNR is infinite.
        evaluations: model evaluations of a step, at most.
    """

    name: str
    title: str
    order: int
    output: str = "velocity"
    to_clean: int = 1
    evaluations: int = 1

    @abstractmethod
    def step(
        self,
        history: History | None,
        x: Tensor,
        velocity: Tensor,
        t: float,
        t_next: float,
        order: int,
        evaluate: Velocity,
    ) -> tuple[Tensor, History | None]:
        """One step.

        Args:
            history: of the path so far; None starts one.
            x: the state at ``t``, ``[B, *dims]``.
            velocity: the model's at ``x`` and ``t``.
            t, t_next: flow times, descending.
            order: of this step; at most what ``highest_order`` says.
            evaluate: the model, for solvers that evaluate between ``t`` and ``t_next``.

        Returns:
            The state at ``t_next``, and the history that the next step is given.
        """

    @abstractmethod
    def highest_order(self, known: int, t_next: float) -> int:
        """Of a step to ``t_next`` with ``known`` earlier outputs at hand."""

    def usual_orders(self, times: Sequence[float]) -> tuple[int, ...]:
        """The order of every step over descending ``times``, as the solver's authors have it.

        As high as the history allows, and lower again in the last steps to the clean end.
        """
        steps = len(times) - 1
        orders = [self.highest_order(k, t) for k, t in enumerate(times[1:])]
        if times[-1] == 0:
            orders = [min(order, max(steps - k, self.to_clean)) for k, order in enumerate(orders)]
        return tuple(orders)

    def check_orders(self, orders: Sequence[int], times: Sequence[float]) -> None:
        """``ValueError`` unless ``orders`` are such that every step over ``times`` can be made."""
        highest = [self.highest_order(k, t) for k, t in enumerate(times[1:])]
        valid = len(orders) == len(highest)
        if not valid or any(not 1 <= o <= most for o, most in zip(orders, highest, strict=True)):
            raise ValueError(
                f"orders: expected one per step, at most {highest} with solver {self.name!r}, "
                f"got {list(orders)}"
            )


class Multistep(Solver):
    """A solver whose differences are to earlier outputs of the path."""

    @property
    def remembers(self) -> int:
        """How many earlier outputs a step may ask for."""
        return self.order - 1

    def highest_order(self, known: int, t_next: float) -> int:
        return min(self.order, known + 1, self.to_clean if t_next == 0 else self.order)

    @abstractmethod
    def weights(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        """The weights g_1, g_2, ... of a step of ``order`` (2 or more, where it is not ``Euler``).

        Args:
            order: of the step.
            times: of the newest output, which is where the step starts, and of earlier ones.
            t_next: where it goes. All of these broadcast, in float64.
            arrived: orders of the steps that led to the newest output, 0 at a path's start.
        """

    def coefficients(
        self, order: int, times: Sequence[Tensor], t_next: Tensor, arrived: Tensor
    ) -> list[Tensor]:
        """A step of ``order`` as a combination of state, velocity and earlier outputs, float64.

        Arguments as in ``weights``. What is not finite stands for a step that there is not.
        """
        weights = self.weights(order, times, t_next, arrived)
        return affine(self.output, times[0], t_next, weights)

    def step(
        self,
        history: History | None,
        x: Tensor,
        velocity: Tensor,
        t: float,
        t_next: float,
        order: int,
        evaluate: Velocity,
    ) -> tuple[Tensor, History | None]:
        history = history or History((), (), 0)
        times = [torch.tensor(s, dtype=torch.float64) for s in (t, *history.times, t_next)]
        arrived = torch.tensor(history.order)
        given = self.coefficients(order, times[:-1], times[-1], arrived)
        moved = combine([x, velocity, *history.outputs], [float(c) for c in given])
        if not self.remembers:
            return moved, None
        newest = combine([x, velocity], [float(c) for c in OUTPUTS[self.output](times[0])])
        keep = slice(self.remembers)
        return moved, History((t, *history.times)[keep], (newest, *history.outputs)[keep], order)


class Singlestep(Solver):
    """A solver whose differences are to outputs at stages of its own within the step."""

    def highest_order(self, known: int, t_next: float) -> int:
        return self.to_clean if t_next == 0 else self.order

    @abstractmethod
    def stages(
        self, order: int, t: Tensor, t_next: Tensor
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The stages of a step of ``order``, 2 or more: ``order - 1`` times, and weights.

        Returns:
            Times s_1, s_2, ..., float64. Weights of the differences that lead to each of these,
            then to ``t_next``: none for s_1, g_1 for s_2, ...
        """

    def step(
        self,
        history: History | None,
        x: Tensor,
        velocity: Tensor,
        t: float,
        t_next: float,
        order: int,
        evaluate: Velocity,
    ) -> tuple[Tensor, History | None]:
        begin, end = (torch.tensor(s, dtype=torch.float64) for s in (t, t_next))
        between, weights = self.stages(order, begin, end) if order > 1 else ([], [[]])
        basis = [x, velocity]
        for s, given in zip([*between, end], weights, strict=True):
            moved = combine(basis, [float(c) for c in affine(self.output, begin, s, given)])
            if s is not end:
                parts = [float(c) for c in OUTPUTS[self.output](s)]
                basis.append(combine([moved, evaluate(moved, float(s))], parts))
        return moved, None


def half_log_snr(t: Tensor) -> Tensor:
    """lambda = ``log((1 - t) / t)``: -inf at pure noise, inf at the clean end."""
    return torch.log1p(-t) - torch.log(t)


def affine(output: str, t: Tensor, t_next: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Coefficients of state, velocity and the other outputs for weights g of the differences."""
    of_state, of_velocity = OUTPUTS[output](t)
    total = sum(weights, torch.zeros_like(t_next - t))
    return [1 - total * of_state, (t_next - t) - total * of_velocity, *weights]


def combine(basis: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """``sum_r coefficients[r] basis[r]`` over the terms that have a coefficient."""
    total = basis[0] if coefficients[0] == 1 else basis[0] * coefficients[0]
    for term, c in zip(basis[1 : len(coefficients)], coefficients[1:], strict=True):
        total = torch.add(total, term, alpha=c)
    return total


def integrate(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    orders: Sequence[int] = (),
) -> Iterator[Tensor]:
    """Yield the states at ``times[1:]``, starting from ``x`` at ``times[0]``.

    Args:
        velocity: ``velocity(x, t)``, called once per step and for each stage of a solver.
        x: ``[B, *dims]``.
        times: descending flow times.
        orders: of every step; none: the solver's usual ones.
    """
    history = None
    orders = orders or solver.usual_orders(times)
    for (t, t_next), order in zip(pairwise(times), orders, strict=True):
        x, history = solver.step(history, x, velocity(x, t), t, t_next, order, velocity)
        yield x
