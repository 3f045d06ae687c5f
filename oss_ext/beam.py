"""A beam: the dynamic programme with the best ``width`` states of every row instead of one.

    cost[s, i, j] = mean (z[k-1][s, i] + (t[j] - t[i]) v[s, i] - x[j])^2    for live (s, i), i > j
    (s, i)[k][m, j] = the m-th least cost[s, i, j] over slots s and sources i
    z[k][m, j]    = z[k-1][s, i] + (t[j] - t[i]) v[s, i]

The dynamic programme keeps the nearest state of every row, but the nearest need not stay so: its
final error was 1.4 times the optimum in the median of small cases, and a beam finds paths that it
dropped. The slots of a row are states that different paths led to, so that no path is kept twice;
a beam that is wide enough holds every path. Width 1 is ``dp.run``, to the bit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oss_ext import arguments, dp, ops
from oss_ext.events import tell
from oss_ext.models.base import There
from oss_ext.models.evaluation import Evaluator
from oss_ext.ops.reference import objective
from oss_ext.schedule import STARTS
from oss_ext.scratch import Held
from oss_ext.trajectory import Trajectory

Rows = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Beam:
    """The result of a beam over a trajectory with N steps and B samples.

    Step k has as many slots ``S_k`` as a row of it has paths, at most the width; slot 0 is the
    best. Only as many slots as a step filled are there.

    Attributes:
        reduce: how the samples share a path: ``none``, ``mean`` or ``log_mean``.
        cost: of every step ``[S_k, N+1, B]``, inf where there is no path.
        source: row that the step started from, int64 ``[S_k, N+1, B]``, or ``[S_k, N+1, 1]`` for a
            joint search; -1 where there is no path.
        slot: which of that row's slots, as ``source``.
    """

    reduce: str
    cost: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    slot: tuple[Tensor, ...]

    @property
    def steps(self) -> int:
        """M, the largest budget."""
        return len(self.cost)

    def paths(self, steps: int, sample: int = 0) -> list[tuple[Rows, float]]:
        """The paths of exactly ``steps`` steps that were kept, best first, with their costs.

        Args:
            steps: the budget, 1 to M.
            sample: which sample's paths; 0 for a joint search.

        Returns:
            Teacher rows, descending to 0, and the mean squared error of the final state; for a
            joint search its mean over the samples, geometric with ``log_mean``.

        Raises:
            ValueError: a budget or a sample that the beam does not hold.
        """
        steps = arguments.whole_number("steps", steps, most=self.steps)
        source = self.source[steps - 1]
        sample = arguments.whole_number("sample", sample, least=0, most=source.shape[2] - 1)
        kept = int((source[:, 0, sample] >= 0).sum())
        cost = self.cost[steps - 1][:kept, 0].double()
        cost = cost[:, [sample]] if self.reduce == "none" else cost
        values = objective(cost, self.reduce)[:, 0].tolist()
        if self.reduce == "log_mean":
            values = [math.exp(value) for value in values]
        return [(self._path(steps, m, sample), values[m]) for m in range(kept)]

    def best(self) -> dp.Table:
        """The best path of every row, as the table of a search."""
        cost = torch.stack([slots[0] for slots in self.cost])
        return _Best(cost, torch.stack([slots[0] for slots in self.source]), beam=self)

    def _path(self, steps: int, slot: int, sample: int) -> Rows:
        rows = [0]
        for k in range(steps - 1, -1, -1):
            at = slot, rows[-1], sample
            rows.append(int(self.source[k][at]))
            slot = int(self.slot[k][at])
        return tuple(reversed(rows))


@dataclass(frozen=True, eq=False)
class _Best(dp.Table):
    """A table whose best path need not lead through the best path of the rows before."""

    beam: Beam = field(kw_only=True)

    def backtrack(self, steps: int, sample: int = 0) -> Rows:
        return self.beam.paths(steps, sample)[0][0]


def evaluations(teacher_steps: int, steps: int, width: int, start: str = "free") -> int:
    """Model evaluations per sample of a beam to ``steps`` steps (teacher not included).

    A row has as many slots as there are paths to it, at most ``width``, and each is evaluated:

        S_0[i] = 1 for the sources i of the first step,  S_k[j] = min(width, sum_{i>j} S_{k-1}[i])
        evaluations = sum_{k=0..M-1} sum_{i>0} S_k[i]

    It is less where states came to NaN or inf.

    Raises:
        ValueError: bad arguments.
    """
    steps = arguments.whole_number("steps", steps, most=teacher_steps)
    width = arguments.whole_number("width", width)
    arguments.one_of("start", start, STARTS)
    return sum(sum(slots) for slots in _slots(teacher_steps, steps, width, start))


def _slots(teacher_steps: int, steps: int, width: int, start: str) -> Iterator[list[int]]:
    """S_k of rows N down to 1, for k = 0 to ``steps - 1``."""
    slots = [1] * teacher_steps if start == "free" else [1] + [0] * (teacher_steps - 1)
    for _ in range(steps):
        yield slots
        slots = [min(width, above) for above in itertools.accumulate(slots[:-1], initial=0)]


def held(
    trajectory: Trajectory, steps: int, *, width: int, reduce: str, start: str = "free"
) -> list[Held]:
    """What ``beam`` holds at its peak beside the teacher; arguments as there."""
    array, (rows, samples) = trajectory.states.nbytes, trajectory.states.shape[:2]
    most = [max(slots) for slots in _slots(trajectory.steps, steps, width, start)]
    # Those that a step starts from, but the first, which are the noise, and those it leads to with
    # the two that ``_advance`` makes on its way.
    own = [0, *most[1:]]
    following = [n + 2 for n in most[1:]] + [0]
    states, velocities, k = max(
        (a + c, b, k) for k, (a, b, c) in enumerate(zip(own, most, following, strict=True))
    )
    columns = samples if reduce == "none" else 1
    # Those of all pairs one after the other, together and turned over, and their order.
    costs = most[k] * rows**2 * 8 * (3 * samples + 4 * columns)
    return [Held("states", states * array), Held("velocities", velocities * array),
            Held("costs", costs)]  # fmt: skip


def beam(
    evaluator: Evaluator,
    trajectory: Trajectory,
    steps: int,
    *,
    width: int,
    reduce: str,
    start: str = "free",
) -> Beam:
    """Keep the best ``width`` paths to every row, for budgets 1 to ``steps``.

    Memory is that of ``width`` trajectories three times over (states, velocities and the states
    that follow), and ``width (N+1)^2 B`` costs.

    Args:
        evaluator: of the model; only states that a path led to are evaluated.
        trajectory: the teacher.
        steps: the largest budget, 1 to N.
        width: states kept at most per row and step. Of equal costs the largest source is kept, of
            its slots the lowest.
        reduce: ``none`` for paths per sample, ``mean`` or ``log_mean`` for joint ones.
        start: ``free`` or ``pinned``, as in ``dp.run``.

    Raises:
        ValueError: bad arguments.
        NonFiniteError: no finite path to the clean end is left; names time and sample.
    """
    teacher, times = trajectory.states, trajectory.times
    steps = arguments.whole_number("steps", steps, most=trajectory.steps)
    width = arguments.whole_number("width", width)
    device_times = times.to(teacher.device)
    state = teacher[-1:].expand_as(teacher)[None]
    live = dp.first_sources(trajectory, reduce, start)[None]
    leg = evaluator.leg()
    if leg.there:
        return leg.take(functools.partial(_there, reduce, live[0]))
    costs, sources, slots = [], [], []
    for k in range(1, steps + 1):
        velocity = teacher.new_empty(state.shape)
        # One request for all slots: blocks are filled up once per step.
        evaluator.fill(
            velocity.flatten(0, 1),
            state.flatten(0, 1),
            times.repeat(len(state)),
            live.flatten(0, 1).nonzero(),
        )
        cost = torch.stack(
            [
                ops.dp_cost(z, v, teacher, device_times, source_mask=mask)
                for z, v, mask in zip(state, velocity, live.to(teacher.device), strict=True)
            ],
            dim=1,
        )
        best, source, slot = _select(cost, width, reduce)
        dp.check_reached(source[0], k, reduce, evaluator)
        costs.append(best.to(dp.of_costs(teacher)).cpu())
        sources.append(source)
        slots.append(slot)
        reached = float(costs[-1][0, 0].double().mean())
        tell("step", step=k, steps=steps, cost=reached, teacher_steps=trajectory.steps)
        if k < steps:
            state = _advance(state, velocity, device_times, source, slot)
            live = dp.next_sources(source, trajectory.samples)
    leg.reached({"cost": costs, "source": sources, "slot": slots})
    return Beam(reduce=reduce, cost=tuple(costs), source=tuple(sources), slot=tuple(slots))


def _there(reduce: str, live: Tensor, kept: There) -> Beam:
    """A beam over rows and samples like those of ``live`` ``[N+1, B]``."""
    beam = Beam(reduce, *(tuple(kept[name]) for name in ("cost", "source", "slot")))
    columns = live.shape[1] if reduce == "none" else 1
    before = 1  # slots
    for cost, source, slot in zip(beam.cost, beam.source, beam.slot, strict=True):
        paths = (len(cost), len(live), columns)
        right = cost.shape[1:] == live.shape and source.shape == slot.shape == paths
        if not (right and int(slot.max()) < before and int(source.max()) < len(live)):
            raise ValueError(f"expected slots of {tuple(live.shape)}, got {tuple(cost.shape)}")
        before = len(cost)
    return beam


def _select(cost: Tensor, width: int, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
    """The least costs ``[N+1 (source), S, N+1 (target), B]`` of every target, best first.

    Returns:
        Cost ``[S', N+1, B]``, and on the CPU source and slot ``[S', N+1, B or 1]``, -1 where there
        is none. S' is ``width`` or the most that a target has.
    """
    rows, slots, _, samples = cost.shape
    # Ties go to what comes first here, the largest source and its lowest slot; torch.topk would
    # pick any of them.
    score = objective(cost, reduce).flip(0).flatten(0, 1)
    value, place = score.sort(dim=0, stable=True)
    most = int(value[:width].isfinite().flatten(1).any(dim=1).sum())
    value, place = value[: max(1, most)], place[: max(1, most)]
    by_place = cost.flip(0).flatten(0, 1)
    best = by_place.gather(0, place.expand(-1, -1, samples))
    reached = value.isfinite()
    best = torch.where(reached, best, torch.inf)
    source = torch.where(reached, rows - 1 - place // slots, -1)
    slot = torch.where(reached, place % slots, -1)
    return best, source.cpu(), slot.cpu()


def _advance(
    state: Tensor, velocity: Tensor, times: Tensor, source: Tensor, slot: Tensor
) -> Tensor:
    """The states ``[S', N+1, B, *dims]`` of the chosen (source, slot); zero where there is none."""
    following = velocity.new_zeros((len(source), *state.shape[1:]))
    for new in range(len(source)):
        for old in range(len(state)):
            taken = slot[new] == old
            if not bool(taken.any()):
                continue
            # The op's own arithmetic, so that width 1 is dp_step to the bit.
            parent = torch.where(taken, source[new], -1).to(state.device)
            moved = ops.dp_advance(state[old], velocity[old], times, parent)
            taken = taken.reshape(*taken.shape, *[1] * (state.dim() - 3)).to(state.device)
            following[new] = torch.where(taken, moved, following[new])
    return following
