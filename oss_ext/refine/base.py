"""What the moves of a descent share: paths that are run, and a race that compares two of them."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from oss_ext import cpu, solvers
from oss_ext.models.base import AHEAD_BYTES
from oss_ext.models.evaluation import Evaluator, NonFiniteError
from oss_ext.schedule import Objective
from oss_ext.trajectory import Trajectory

GROUPS = 4
"""Into which the calibration samples are parted for racing, unless ``max_batch`` says otherwise."""

LEAST_SEEN = 4
"""Samples that a trial is run on before it can be called hopeless."""

KEEP_BYTES = 2**29
"""Memory for the states and velocities of paths that were run."""

Rows = tuple[int, ...]
Orders = tuple[int, ...]


class Runner:
    """Runs paths of rows to the clean end, from where they part from earlier ones.

    Args:
        evaluator: of the model; its block is the number of samples run at once.
        trajectory: the teacher.
        solver: name of the student's solver.
        steps: of the paths.
        keep_bytes: memory for states and velocities; those that were of no use for longest are
            forgotten. One path of every sample is kept in any case.
        fineness: rows per teacher step; those between are evenly spaced in flow time, and at times
            that the network knows.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        trajectory: Trajectory,
        solver: str,
        steps: int,
        keep_bytes: int = KEEP_BYTES,
        fineness: int = 1,
    ) -> None:
        self._evaluator, self._trajectory = evaluator, trajectory
        self._solver = solvers.get(solver)
        least = evaluator.model.path.span[0]
        fine = fine_times(trajectory, fineness)
        self.times = [fine[0], *(t for t in fine[1:] if t >= min(least, fine[fineness]))]
        # What is known after a prefix of rows, taken in some orders: state, history and, once it
        # was needed, velocity.
        self._known: OrderedDict[tuple[int, Rows, Orders], list[Any]] = OrderedDict()
        self._errors: dict[tuple[int, Rows, Orders], Tensor] = {}  # of whole paths
        self.last_row = len(self.times) - 1
        self._group = evaluator.block  # stays, where calls come to have fewer rows
        self._keep = most_kept(self._group, trajectory, self._solver, steps, keep_bytes)

    @property
    def nfe(self) -> int:
        """Model evaluations so far, in rows."""
        return self._evaluator.nfe

    @property
    def at_once(self) -> int:
        """Model calls that are made at the same time."""
        return self._evaluator.model.at_once

    def groups(self, samples: Sequence[int]) -> Iterator[Tensor]:
        """``samples`` in the groups that are run at once."""
        yield from cpu.tensor(list(samples)).split(self._group)

    def orders_of(self, rows: Rows, orders: Orders) -> Orders:
        """What the steps of ``rows`` are taken in: ``orders`` as far as there are such steps.

        From pure noise and to the clean end there are none of a high order, wherever the path that
        ``orders`` were chosen for began and ended.
        """
        times = [self.times[row] for row in rows]
        if not orders:
            return self._solver.usual_orders(times)
        return tuple(map(min, orders, self._solver.highest_orders(times)))

    def residuals(self, rows: Rows, group: Tensor, orders: Orders = ()) -> Tensor:
        """Where the path ``rows`` (descending, to 0) ends, less the teacher's end, ``[n, D]``.

        ``orders`` are those of its steps; the solver's usual ones if empty. Where the model returns
        NaN or inf on the way, for whichever sample, all is NaN: such a path is no student.
        """
        name = int(group[0])
        # Those of a step may depend on where the path begins and ends, so they are part of what is
        # known of a prefix.
        orders = self.orders_of(rows, orders)
        known = self._first_unknown(name, rows, orders)
        # The shortest prefix last, which most paths have in common with this one.
        for k in range(known, 1, -1):
            if (name, rows[:k], orders[: k - 1]) in self._known:
                self._known.move_to_end((name, rows[:k], orders[: k - 1]))
        try:
            for k in range(known, len(rows)):
                self._step(name, rows[: k + 1], orders[:k], group)
        except NonFiniteError:
            return torch.full_like(self._noise(group).flatten(1), torch.nan)
        x = self._entry(name, rows, orders, group)[0]
        return (x - self._trajectory.final[group.to(x.device)]).flatten(1)

    def ahead(self, paths: Sequence[tuple[Rows, Tensor, Orders]]) -> None:
        """Have the model evaluated at the same time where ``paths`` will ask for it.

        Args:
            paths: rows, samples and orders, as ``residuals`` will be given them, the first ones
                first; those that there is no memory for are left out.

        Nothing is known, counted or kept afterwards that was not before. Solvers that evaluate the
        model within a step wait for each evaluation.
        """
        if self.at_once == 1 or self._solver.evaluations > 1:
            return
        paths = [path for path in paths if self._end_of(*path) not in self._errors]
        if not paths:
            return
        rows, group, _ = paths[0]
        most = AHEAD_BYTES // (len(rows) * len(group) * self._trajectory.noise[0].nbytes)
        walks = []
        for rows, group, orders in paths[: max(self.at_once, most)]:
            orders = self.orders_of(rows, orders)
            known = self._first_unknown(int(group[0]), rows, orders)
            walks.append((rows, group, orders, known))
        made: dict[Any, list[Any]] = {}
        for k in range(1, max(len(rows) for rows, *_ in walks)):
            wanted = {}
            for rows, group, orders, known in walks:
                if known <= k < len(rows):
                    key = (int(group[0]), rows[:k], orders[: k - 1])
                    if key not in made:
                        made[key] = [*(self._known.get(key) or [self._noise(group), None, None])]
                    entry = made[key]
                    if entry[2] is None:
                        wanted[key] = (entry, self.times[rows[k - 1]], group)
            asked = [(entry[0], t, group) for entry, t, group in wanted.values()]
            answers = self._evaluator.ahead(asked)
            if answers is None:
                return
            for (entry, _, _), v in zip(wanted.values(), answers, strict=True):
                entry[2] = v
            for rows, group, orders, known in walks:
                if known <= k < len(rows):
                    x, history, v = made[int(group[0]), rows[:k], orders[: k - 1]]
                    t, t_next = self.times[rows[k - 1]], self.times[rows[k]]
                    moved = self._solver.step(history, x, v, t, t_next, orders[k - 1], _refuse)
                    made[int(group[0]), rows[: k + 1], orders[:k]] = [*moved, None]

    def errors(self, rows: Rows, group: Tensor, orders: Orders = ()) -> Tensor:
        """Mean squared final error of the path ``rows``, ``[len(group)]`` float64; inf, not NaN."""
        end = self._end_of(rows, group, orders)
        if end not in self._errors:
            residuals = self.residuals(rows, group, orders)
            errors = residuals.double().square().mean(dim=1).cpu()
            self._errors[end] = errors.nan_to_num(nan=torch.inf, posinf=torch.inf)
        return self._errors[end]

    def check(self, value: Tensor) -> None:
        """``NonFiniteError``, saying what the model did, where the best that there is is inf."""
        if not value.isfinite().all():
            raise NonFiniteError(
                "no path has a finite error on every sample: "
                f"{self._evaluator.describe_bad() or 'states or errors overflowed'}"
            )

    def values(
        self, rows: Rows, samples: Sequence[int], reduce: str, orders: Orders = ()
    ) -> Tensor:
        """What a search averages and minimises for ``rows``, of every one of ``samples``."""
        groups = list(self.groups(samples))
        self.ahead([(rows, group, orders) for group in groups])
        errors = [self.errors(rows, group, orders) for group in groups]
        return _value(torch.cat(errors), reduce)

    def _end_of(self, rows: Rows, group: Tensor, orders: Orders) -> tuple[int, Rows, Orders]:
        return int(group[0]), rows, self.orders_of(rows, orders)

    def _first_unknown(self, name: int, rows: Rows, orders: Orders) -> int:
        """How many of ``rows`` are the longest prefix that is known."""
        for known in range(len(rows), 1, -1):
            if (name, rows[:known], orders[: known - 1]) in self._known:
                return known
        return 1

    def _noise(self, group: Tensor) -> Tensor:
        return self._trajectory.noise[group.to(self._trajectory.noise.device)]

    def _entry(self, name: int, prefix: Rows, orders: Orders, group: Tensor) -> list[Any]:
        key = (name, prefix, orders)
        if key not in self._known:  # a start: the noise as it is, whatever the first row
            self._known[key] = [self._noise(group), None, None]
        self._known.move_to_end(key)
        return self._known[key]

    def _step(self, name: int, prefix: Rows, orders: Orders, group: Tensor) -> None:
        """The last step of ``prefix``, from what is known before it."""
        entry = self._entry(name, prefix[:-1], orders[:-1], group)
        t, t_next = self.times[prefix[-2]], self.times[prefix[-1]]
        evaluate = functools.partial(self._evaluator.at, samples=group)
        if entry[2] is None:
            entry[2] = evaluate(entry[0], t)
        x, history = self._solver.step(
            entry[1], entry[0], entry[2], t, t_next, orders[-1], evaluate
        )
        self._known[name, prefix, orders] = [x, history, None]
        while len(self._known) > self._keep:
            self._known.popitem(last=False)


class Race:
    """Which of two paths is better on ``samples``, found with few evaluations.

    Groups of samples are run one after the other, and a path that is clearly worse on the first
    ones is not run on the rest.

    Args:
        runner: of the paths.
        samples: those that paths are compared on.
        objective: whose ``reduce`` and ``start`` hold for them.
        limit: model evaluations, in rows, from which on ``may_go_on`` says no.
        orders: of the steps of every path that is raced; the solver's usual ones if empty.

    Attributes:
        reduce: ``mean`` or ``log_mean``.
        orders: as given.
        first: the first knot that may move: 0, or 1 with a pinned start.
        last_row: where a path may start.
        trials: paths that were raced.
        front: the groups that are run before a path can be called hopeless.
    """

    def __init__(
        self,
        runner: Runner,
        samples: Sequence[int],
        objective: Objective,
        limit: float = math.inf,
        orders: Orders = (),
    ) -> None:
        self._runner, self._limit = runner, limit
        self._groups, self.reduce = list(runner.groups(samples)), objective.reduce
        self.orders, self.last_row = orders, runner.last_row
        self.first = int(objective.start == "pinned")
        self.trials = 0
        seen = cpu.tensor([len(group) for group in self._groups]).cumsum(0)
        self.front = self._groups[: int((seen < LEAST_SEEN).sum()) + 1]

    @property
    def nfe(self) -> int:
        """Model evaluations so far, in rows."""
        return self._runner.nfe

    def may_go_on(self) -> bool:
        """Whether evaluations are left."""
        return self.nfe < self._limit

    def ahead(self, paths: Sequence[Rows]) -> None:
        """These will be run on the front."""
        runs = [(rows, group, self.orders) for rows in paths for group in self.front]
        self._runner.ahead(runs)

    def guess(self, paths: Iterable[Rows]) -> list[Rows]:
        """As many of ``paths`` as can be run at the same time; each only if those before fail."""
        runs = [(rows, group, self.orders) for rows in paths for group in self._groups]
        at_once = self._runner.at_once
        whole = at_once - at_once % len(self._groups)  # a part of a path is waited for again
        runs = runs[: whole or max(at_once, len(self.front))]
        self._runner.ahead(runs)
        return [rows for rows, group, _ in runs if group is self._groups[0]]

    def residuals(self, rows: Rows) -> Tensor:
        """Final residuals of ``rows`` on the front, ``[n, D]``."""
        return torch.cat([self._runner.residuals(rows, group, self.orders) for group in self.front])

    def values(self, rows: Rows) -> Tensor:
        """What is averaged and minimised for ``rows`` on the front, ``[n]``."""
        return torch.cat([self._values(rows, group) for group in self.front])

    def better(self, rows: Rows, score: Tensor) -> Tensor | None:
        """The score of ``rows`` if it is below ``score`` in the mean, else None, early."""
        self.trials += 1
        values: list[Tensor] = []
        seen, together = 0, max(len(self.front), self._runner.at_once)
        for place, group in enumerate(self._groups):
            if place % together == 0:
                next_ones = self._groups[place : place + together]
                self._runner.ahead([(rows, each, self.orders) for each in next_ones])
            values.append(self._values(rows, group))
            seen += len(group)
            difference = torch.cat(values) - score[:seen]
            if seen >= LEAST_SEEN and is_worse(difference):
                return None
        return torch.cat(values) if float(difference.mean()) < 0 else None

    def _values(self, rows: Rows, group: Tensor) -> Tensor:
        return _value(self._runner.errors(rows, group, self.orders), self.reduce)


def most_kept(
    group: int,
    trajectory: Trajectory,
    solver: solvers.Solver,
    steps: int,
    keep_bytes: int = KEEP_BYTES,
) -> int:
    """States of ``group`` samples that a runner keeps: of a path of every sample at the least."""
    tensors = 2 if solver.order == 1 else 3  # state, velocity, what the history adds
    one = trajectory.states[0, :group].nbytes
    path = math.ceil(trajectory.samples / group) * (steps + 1)
    return max(trajectory.steps + 1, path, keep_bytes // (tensors * one))


def fine_times(trajectory: Trajectory, fineness: int) -> list[float]:
    """Flow times of the teacher's rows, with ``fineness - 1`` between each two of them."""
    times = trajectory.times
    shares = cpu.arange(fineness, dtype=torch.float64) / fineness
    between = times[:-1, None] + shares * times.diff()[:, None]
    between[:, 0] = times[:-1]
    return [*between.flatten().tolist(), float(times[-1])]


def _refuse(x: Tensor, t: float) -> Tensor:
    raise AssertionError("a multistep solver evaluates nothing within a step")


def _value(errors: Tensor, reduce: str) -> Tensor:
    """What is averaged and minimised, per sample: the final error or its logarithm."""
    tiny = torch.finfo(torch.float32).tiny  # an exact copy of the teacher is as good as it gets
    return errors.clamp_min(tiny).log() if reduce == "log_mean" else errors


def is_worse(difference: Tensor) -> bool:
    """Whether paired differences are above 0 in the mean by more than chance has it."""
    mean = float(difference.mean())
    if math.isinf(mean):
        return mean > 0
    spread = float(difference.std(correction=0)) / math.sqrt(len(difference))
    return not mean <= spread  # so is what is not a number


def mean_error(value: Tensor, reduce: str) -> float:
    """The error that stands for ``value``: its mean, or the geometric mean."""
    mean = float(value.mean())
    return math.exp(mean) if reduce == "log_mean" else mean
