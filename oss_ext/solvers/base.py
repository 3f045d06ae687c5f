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

from oss_ext import cpu

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
        from_noise: the highest order of a step from t = 1, where it is so too.
        tapers: whether its authors lower the order step by step before such an end.
    """

    name: str
    title: str
    order: int
    output: str = "velocity"
    to_clean: int = 1
    from_noise: int = 1
    tapers: bool = True

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

    @property
    def evaluations(self) -> int:
        """Model evaluations of a step, at most."""
        return self.evaluations_of(self.order)

    def evaluations_of(self, order: int) -> int:
        """Model evaluations of a step of ``order``."""
        return 1

    @abstractmethod
    def highest_order(self, known: int, t_next: float) -> int:
        """Of a step to ``t_next`` with ``known`` earlier outputs at hand."""

    def highest_orders(self, times: Sequence[float]) -> list[int]:
        """The highest order of every step over descending ``times``."""
        orders = [self.highest_order(k, t) for k, t in enumerate(times[1:])]
        if times[0] == 1:
            orders[0] = min(orders[0], self.from_noise)
        return orders

    def usual_orders(self, times: Sequence[float]) -> tuple[int, ...]:
        """The order of every step over descending ``times``, as the solver's authors have it.

        As high as it can be, and of most solvers lower again in the last steps to the clean end.
        """
        steps, orders = len(times) - 1, self.highest_orders(times)
        if times[-1] == 0 and self.tapers:
            orders = [min(order, max(steps - k, self.to_clean)) for k, order in enumerate(orders)]
        return tuple(orders)

    def check_orders(self, orders: Sequence[int], times: Sequence[float]) -> None:
        """``ValueError`` unless every step over ``times`` can be made in its one of ``orders``.

        None at all are the usual ones.
        """
        highest = self.highest_orders(times)
        lengths = (0, len(highest))
        valid = all(1 <= o <= most for o, most in zip(orders, highest, strict=False))
        if len(orders) not in lengths or not valid:
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
        """The weights g_1, g_2, ... of a step of ``order``; those left out at the end are 0.

        Args:
            order: of the step; there are outputs enough for it.
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
        evaluate: Velocity | None = None,
    ) -> tuple[Tensor, History | None]:
        history = history or History((), (), 0)
        times = [cpu.tensor(s, dtype=torch.float64) for s in (t, *history.times, t_next)]
        arrived = cpu.tensor(history.order)
        given = self.coefficients(order, times[:-1], times[-1], arrived)
        moved = combine([x, velocity, *history.outputs], [float(c) for c in given])
        if not self.remembers:
            return moved, None
        newest = combine([x, velocity], [float(c) for c in OUTPUTS[self.output](times[0])])
        keep = slice(self.remembers)
        return moved, History((t, *history.times)[keep], (newest, *history.outputs)[keep], order)


class Singlestep(Solver):
    """A solver whose differences are to outputs at stages of its own within the step."""

    def evaluations_of(self, order: int) -> int:
        return order  # where it starts, and at every stage

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
        begin, end = (cpu.tensor(s, dtype=torch.float64) for s in (t, t_next))
        between, weights = self.stages(order, begin, end) if order > 1 else ([], [[]])
        basis = [x, velocity]

        def moved(s: Tensor, given: list[Tensor]) -> Tensor:
            return combine(basis, [float(c) for c in affine(self.output, begin, s, given)])

        for s, given in zip(between, weights[:-1], strict=True):
            stage = moved(s, given)
            parts = [float(c) for c in OUTPUTS[self.output](s)]
            basis.append(combine([stage, evaluate(stage, float(s))], parts))
        return moved(end, weights[-1]), None


def half_log_snr(t: Tensor) -> Tensor:
    """lambda = ``log((1 - t) / t)``: -inf at pure noise, inf at the clean end."""
    return torch.log1p(-t) - torch.log(t)


def exponent(output: str, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """How a step integrates its output exactly where that is constant: ``-s (exp(k) - 1) O``.

    With h the step in half the log-SNR, data: s = 1 - t', k = -h; noise: s = t', k = h.

    Returns:
        s and k.
    """
    h = half_log_snr(t_next) - half_log_snr(t)
    return (1 - t_next, -h) if output == "data" else (t_next, h)


def exponential_moments(k: Tensor, count: int) -> list[Tensor]:
    """``k int_0^1 exp(k (1 - r)) r^i dr`` for i = 1 to ``count``: i! times the remainder of the
    exponential series, ``(exp(k) - 1 - k - ...) / k^i``.

    ``-s`` times these is what a step adds for an output that is ``r^i`` at the share r of it, with
    s and k of ``exponent``. The limits are taken at k = -inf.
    """
    moments = [torch.expm1(k)]
    for i in range(1, count + 1):
        moments.append(i * moments[-1] / k - 1)
    return moments[1:]


def lagrange(inverse: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """Weights of differences for the integral of the polynomial through them.

    The polynomial in r is 0 at r = 0 and O_j - O_0 at r_j. As many nodes as moments.

    Args:
        inverse: ``1 / r_j``: the step as a multiple of the way to every node. One that is
            infinitely far has 0, and no weight.
        moments: integrals of r, r^2, ...

    Returns:
        w_j, such that ``sum_j w_j (O_j - O_0)`` is the integral.
    """
    weights = []
    for j, own in enumerate(inverse):
        # r / r_j prod_m (1 - r / r_m) / (1 - r_j / r_m), the other nodes m, by powers of r.
        powers, scale, none = [torch.ones_like(own)], own, torch.zeros_like(own)
        for m, other in enumerate(inverse):
            if m != j:
                raised = zip([*powers, none], [none, *powers], strict=True)
                powers = [c - other * below for c, below in raised]
                scale = scale * (own / (own - other))
        terms = [c * moment for c, moment in zip(powers, moments, strict=True)]
        weights.append(scale * sum(terms[1:], terms[0]))
    return weights


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


def evaluations(solver: Solver, times: Sequence[float], orders: Sequence[int] = ()) -> int:
    """How often ``integrate`` evaluates the model with these arguments."""
    return sum(solver.evaluations_of(order) for order in orders or solver.usual_orders(times))


def integrate(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    orders: Sequence[int] = (),
    before: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the states at ``times[1:]``, starting from ``x`` at ``times[0]``.

    Args:
        velocity: ``velocity(x, t)``, called once per step and for each stage of a solver.
        x: ``[B, *dims]``.
        times: descending flow times.
        orders: of every step; none: the solver's usual ones.
        before: ``before(step, x)``, the state that a step starts from in place of x.
    """
    history = None
    orders = orders or solver.usual_orders(times)
    for k, ((t, t_next), order) in enumerate(zip(pairwise(times), orders, strict=True)):
        x = x if before is None else before(k, x)
        x, history = solver.step(history, x, velocity(x, t), t, t_next, order, velocity)
        yield x
