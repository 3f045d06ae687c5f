"""The best few sources of every target, judged by more than what finds them.

An argmin over all candidates takes what is known of them without an evaluation. Where the judgement
needs one, of whole steps or of the model at the candidates, it is made for the few sources that the
cheap argmin finds the nearest, and the best of these is the parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from oss_ext import cpu, ops
from oss_ext.dp.table import FEW, errors, source_chunks
from oss_ext.metrics import EvaluatedMetric, StateMetric
from oss_ext.models.evaluation import Evaluator
from oss_ext.models.hidden import Hidden
from oss_ext.ops.reference import objective
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Candidates:
    """A candidate of every target.

    Attributes:
        source: int64 ``[N+1, B or 1]``; -1: there is none.
        order: of the step from it, like ``source``; 0 where there is none.
        state: where the step ends, ``[N+1, B, *dims]``.
        cost: by which it was chosen, ``[N+1, B]`` float64; inf where there is none.
    """

    source: Tensor
    order: Tensor
    state: Tensor
    cost: Tensor


def nearest(
    compared: list[Tensor],
    teacher: Tensor,
    live: Tensor,
    reduce: str,
    tried: list[Tensor],
    bytes_per_source: int,
    made_for: Callable[[Tensor], tuple[Tensor, Tensor, list[int]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (order, source) of every target, with coefficients made in chunks of sources.

    Args:
        compared: tensors ``[N+1, B, *features]`` that candidates are a combination of.
        teacher: the targets, alike.
        live: bool ``[N+1, B]``, the sources.
        reduce: as in ``run``.
        tried: int64 ``[N+1, B or 1]``, sources of every target that are left out.
        bytes_per_source: that ``made_for`` takes for one.
        made_for: coefficients ``[orders, terms, S, N+1, B or 1]``, rows of the terms
            ``[terms, S, B]`` and numbers of terms of the sources ``[S]``.

    Returns:
        Cost ``[N+1, B]`` float64 on the device, source and place of the order ``[N+1, B or 1]`` on
        the CPU, -1 where there is none.
    """
    device, (rows, samples) = teacher.device, live.shape
    columns = samples if reduce == "none" else 1
    cost = torch.full((rows, samples), torch.inf, dtype=torch.float64, device=device)
    parent = torch.full((rows, columns), -1, dtype=torch.int64, device=device)
    chosen = torch.full_like(parent, -1)
    for source in source_chunks(rows, bytes_per_source):
        given, index, terms = made_for(source)
        for earlier in tried:
            given[:, 0, earlier[None] == source[:, None, None]] = torch.nan
        ops.dp_argmin_(
            compared, index.to(device), given.to(device), terms, int(source[0]), teacher, cost,
            parent, chosen, source_mask=live.to(device), reduce=reduce,
        )  # fmt: skip
    return cost, parent.cpu(), chosen.cpu()


class Judge:
    """Chooses the best of a few candidates by a metric.

    With a metric that is evaluated, the evaluation at a candidate that is chosen is the one that
    its row needs as a source of the next step, so that a row takes ``FEW`` evaluations in place of
    one. Targets that no path goes on from, the clean end among them, are judged by their states.

    Args:
        evaluator: of the model.
        trajectory: the teacher.
        metric: of whole steps' ends.
        reduce: as in ``run``.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        trajectory: Trajectory,
        metric: StateMetric | EvaluatedMetric,
        reduce: str,
    ) -> None:
        self._evaluator, self._reduce, self._selection = evaluator, reduce, metric.selection
        self._times, self._teacher = trajectory.times, trajectory.states
        self._metric = metric if isinstance(metric, EvaluatedMetric) else None
        module = None if self._metric is None else self._metric.module
        self._hidden = None if module is None else Hidden(evaluator.model, module)
        self._known = cpu.zeros(self._teacher.shape[:2], dtype=torch.bool)
        self._features: Tensor | None = None  # the teacher's, in rows that are known

    @staticmethod
    def held(
        evaluator: Evaluator, trajectory: Trajectory, metric: StateMetric | EvaluatedMetric
    ) -> list[Held]:
        """What it holds beside the states and velocities that candidates come from.

        With a metric of a module the model is evaluated once, to see how many features there are.
        """
        array = trajectory.states.nbytes
        if not isinstance(metric, EvaluatedMetric):
            return [Held("candidates", 3 * array)]  # two, and those chosen of them
        state, hidden = trajectory.states[-1], None
        samples = cpu.arange(min(len(state), evaluator.block))
        looking = None if metric.module is None else Hidden(evaluator.model, metric.module)
        with looking or nullcontext():
            velocity = evaluator.at(state[samples], float(trajectory.times[-1]), samples)
            if looking is not None:
                hidden = looking.take(evaluator.block)[: len(samples)]
        t = trajectory.times[-1:].expand(len(samples))
        features = metric.features(state[samples], velocity, t, hidden)
        known = trajectory.states.shape[:2].numel() * features[0].nbytes
        # The velocities of both too.
        return [Held("candidates", 5 * array), Held("features", known)]

    def best(
        self, candidates: Iterator[Candidates], onward: Tensor, step: int
    ) -> tuple[Candidates, Tensor | None]:
        """The best of the first few ``candidates``; of equals that of the largest source.

        Args:
            candidates: from other sources each time, the most promising ones first.
            onward: bool ``[N+1, B or 1]``, rows that may be sources of the next step.
            step: its number, from 1.

        Returns:
            The candidates, and the velocities at those that may be sources ``[N+1, B, *dims]``;
            None where the metric is not evaluated.
        """
        chosen, velocity = self._judged(next(candidates), onward, step)
        for candidate in islice(candidates, FEW - 1):
            other, its_velocity = self._judged(candidate, onward, step)
            old, new = objective(chosen.cost, self._reduce), objective(other.cost, self._reduce)
            above = (new == old) & new.isfinite() & (other.source > chosen.source)
            better = (new < old) | above
            pairs = zip(vars(chosen).values(), vars(other).values(), strict=True)
            source, order, state, cost = (_where(better, new, old) for old, new in pairs)
            chosen = Candidates(source, order, state, cost)
            if velocity is not None and its_velocity is not None:
                velocity = _where(better, its_velocity, velocity)
        dead = objective(chosen.cost, self._reduce).isinf()
        source, order = chosen.source.masked_fill(dead, -1), chosen.order.masked_fill(dead, 0)
        return replace(chosen, source=source, order=order), velocity

    def _judged(
        self, candidate: Candidates, onward: Tensor, step: int
    ) -> tuple[Candidates, Tensor | None]:
        """``candidate`` with the metric's costs, and the velocities that these took."""
        ends, teacher = (self._selection.of(x, step) for x in (candidate.state, self._teacher))
        cost = errors(ends, teacher, candidate.source)
        if self._metric is None:
            return replace(candidate, cost=cost), None
        there = ((candidate.source >= 0) & onward).expand(cost.shape).clone()
        there[0] = False
        self._learn(there)

        def compare(rows: Tensor, features: Tensor) -> None:
            known = self._of_teacher(features)[rows.to(features.device).unbind(1)]
            difference = self._selection.of((features - known)[None], step)
            cost[rows.unbind(1)] = difference[0].double().square().flatten(1).mean(dim=1).cpu()

        velocity = self._look(candidate.state, there, compare)
        return replace(candidate, cost=cost), velocity

    def _learn(self, there: Tensor) -> None:
        """Make the teacher's features in the rows ``there`` that have none yet."""

        def keep(rows: Tensor, features: Tensor) -> None:
            self._of_teacher(features)[rows.to(features.device).unbind(1)] = features

        self._look(self._teacher, there & ~self._known, keep)
        self._known |= there

    def _of_teacher(self, features: Tensor) -> Tensor:
        """The teacher's ``[N+1, B, *features]``, as ``features`` ``[R, *features]`` are."""
        shape = (*self._known.shape, *features.shape[1:])
        if self._features is None:
            self._features = features.new_empty(shape)
        if self._features.shape != shape:
            expected, got = tuple(self._features.shape[2:]), tuple(features.shape[1:])
            raise ValueError(f"metric: expected features of shape {expected} as before, got {got}")
        return self._features

    def _look(
        self, states: Tensor, there: Tensor, then: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Evaluate the model at the rows ``there`` of ``states``; returns the velocities.

        ``then`` is called after every model call with its rows ``[R, 2]`` and their features, so
        that those of candidates never are in memory all at once.
        """
        velocity = torch.empty_like(self._teacher)

        def looked(rows: Tensor, places: Tensor) -> None:
            assert self._metric is not None
            hidden = None
            if self._hidden is not None:
                hidden = self._hidden.take(self._evaluator.block)
                hidden = hidden[places.to(hidden.device)].to(states.device)
            at, t = rows.to(states.device).unbind(1), self._times[rows[:, 0]]
            then(rows, self._metric.features(states[at], velocity[at], t, hidden))

        with self._hidden or nullcontext():
            self._evaluator.fill(
                velocity, states, self._times, there.nonzero(), then=looked,
                looks_inside=self._hidden is not None,
            )  # fmt: skip
        return velocity


def _where(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where ``better`` ``[N+1, B or 1]``, else ``old``, both ``[N+1, B or 1, ...]``."""
    mask = better.to(old.device).view(*better.shape, *[1] * (old.dim() - 2))
    return torch.where(mask, new, old)
