"""What ``dp_step`` is compared with: other ways to compute the same step in PyTorch.

All take ``state, velocity, teacher`` [N+1, D] and ``times`` [N+1] float64, and return next state,
cost and parent as ``dp_step`` does for one sample. 16-bit inputs are converted to float32 first:
in 16-bit arithmetic none of them would find the parents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from oss_ext.models.evaluation import Evaluator
from oss_ext.trajectory import Trajectory

Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def differences(times: Tensor) -> Tensor:
    """``t[j] - t[i]`` at [i, j], float32."""
    return (times - times[:, None]).float()


def select(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Least cost and its source, the largest of equals, for costs [source, target]."""
    last = len(cost) - 1
    above = torch.ones_like(cost, dtype=torch.bool).tril(-1)
    cost = torch.where(above, cost, torch.inf)
    best, flipped = cost.flip(0).min(dim=0)
    return best, torch.where(best.isinf(), -1, last - flipped)


def advance(state: Tensor, velocity: Tensor, step: Tensor, parent: Tensor) -> Tensor:
    """``z[r] + (t[j] - t[r]) v[r]``, or the state's own row where r is -1."""
    source = parent.clamp(min=0)
    moved = state[source] + step[:, None] * velocity[source]
    return torch.where(parent[:, None] >= 0, moved, state)


def one_source_at_a_time(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The published code's way: each source moves to all its targets, the better ones are kept."""
    z, v, x = state.float(), velocity.float(), teacher.float()
    steps, next_state = differences(times), z.clone()
    best = z.new_full((len(z),), torch.inf)
    parent = torch.full_like(best, -1, dtype=torch.int64)
    for i in range(1, len(z)):
        moved = z[i] + steps[i, :i, None] * v[i]
        cost = (moved - x[:i]).square().mean(dim=1)
        better = cost <= best[:i]
        best[:i] = torch.where(better, cost, best[:i])
        parent[:i] = torch.where(better, i, parent[:i])
        next_state[:i] = torch.where(better[:, None], moved, next_state[:i])
    return next_state.to(state.dtype), best, parent


def one_pair_at_a_time(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 as it is printed: a loop over sources and targets."""
    z, v, x = state.float(), velocity.float(), teacher.float()
    steps, next_state = differences(times), z.clone()
    best, parent = [float("inf")] * len(z), [-1] * len(z)
    for i in range(1, len(z)):
        for j in range(i):
            moved = torch.add(z[i], v[i], alpha=float(steps[i, j]))
            cost = float((moved - x[j]).square_().mean())
            if cost <= best[j] and cost < float("inf"):
                best[j], parent[j] = cost, i
                next_state[j] = moved
    return next_state.to(state.dtype), z.new_tensor(best), torch.tensor(parent)


def two_matrix_products(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``|p + t[j] v - x[j]|^2`` with ``p = z - t[i] v`` multiplied out: fast, and it cancels."""
    z, v, x = state.float(), velocity.float(), teacher.float()
    t = times.float()
    p = z - t[:, None] * v
    pp, pv, vv, xx = ((a * b).sum(dim=1) for a, b in ((p, p), (p, v), (v, v), (x, x)))
    cost = pp[:, None] + xx + t * (2 * pv[:, None] + t * vv[:, None])
    cost -= 2 * (p @ x.T + t * (v @ x.T))
    best, parent = select(cost / z.shape[1])
    step = differences(times)[parent.clamp(min=0), torch.arange(len(z), device=z.device)]
    return advance(z, v, step, parent).to(state.dtype), best, parent


def direct(z: Tensor, v: Tensor, x: Tensor, steps: Tensor) -> Tensor:
    """Costs of all pairs of the sources ``z, v`` and the targets ``x``."""
    return (z[:, None] + steps[..., None] * v[:, None] - x).square().mean(dim=2)


def compiled_direct(group: int = 10) -> Step:
    """``torch.compile`` of the definition, which then keeps nothing N x N x D in memory.

    In one call per group of sources with the targets below them: a call for everything computes
    the pairs above the diagonal too, and one per source has too little to do.
    """
    torch.compiler.reset()
    costs_of, move = torch.compile(direct, dynamic=True), torch.compile(advance, dynamic=True)

    def step(
        state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, v, x = state.float(), velocity.float(), teacher.float()
        steps = differences(times)
        cost = torch.full_like(steps, torch.inf)
        for first in range(1, len(z), group):
            some = slice(first, first + group)
            below = slice(0, min(first + group, len(z)))
            cost[some, below] = costs_of(z[some], v[some], x[below], steps[some, below])
        best, parent = select(cost)
        taken = steps[parent.clamp(min=0), torch.arange(len(z), device=z.device)]
        return move(z, v, taken, parent).to(state.dtype), best, parent

    return step


def per_sample(step: Step) -> Step:
    """``step`` over tensors [N+1, B, D], one sample after the other."""

    def run(
        state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        samples = zip(*(x.unbind(1) for x in (state, velocity, teacher)), strict=True)
        parts = [step(*sample, times) for sample in samples]
        if len(parts) == 1:
            return parts[0]
        next_state, cost, parent = (torch.stack(part, dim=1) for part in zip(*parts, strict=True))
        return next_state, cost, parent

    return run


def true_parents(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor, block: int
) -> Tensor:
    """The definition in float64 for one sample, over blocks of elements."""
    rows, elements = state.shape
    cost = times.new_full((rows, rows), torch.inf).triu()  # 0 where there is a pair
    for first in range(0, elements, block):
        part = slice(first, first + block)
        z, v, x = (a[:, part].double() for a in (state, velocity, teacher))
        for i in range(1, rows):
            error = torch.addcmul(z[i], (times[:i] - times[i])[:, None], v[i]).sub_(x[:i])
            cost[i, :i] += error.square_().sum(dim=1)
    return select(cost)[1]


class _Steps:
    """``dp.EulerSteps`` by a step of [N+1, B, D], for searches of each sample by itself."""

    def __init__(self, step: Step, evaluator: Evaluator, trajectory: Trajectory) -> None:
        self._step, self._evaluator, self._times = step, evaluator, trajectory.times
        self._teacher = trajectory.states
        self._state = trajectory.noise.expand_as(self._teacher).contiguous()

    def step(self, live: Tensor, onward: Tensor) -> tuple[Tensor, Tensor, None]:
        # What is no source costs infinitely much.
        velocity = torch.full_like(self._state, torch.inf)
        self._evaluator.fill(velocity, self._state, self._times, live.nonzero())
        tensors = (x.flatten(2) for x in (self._state, velocity, self._teacher))
        state, cost, parent = self._step(*tensors, self._times)
        self._state = state.view(self._teacher.shape)
        return cost.view(live.shape), parent.view(live.shape), None

    def kept(self) -> dict[str, Tensor]:
        return {}  # no checkpoint goes on from within


@contextmanager
def searched_by(step: Step) -> Iterator[None]:
    """Searches in this block find the sources of Euler steps by ``step`` over [N+1, B, D]."""

    def steps(evaluator: Evaluator, trajectory: Trajectory, *rest: object) -> _Steps:
        return _Steps(step, evaluator, trajectory)

    with mock.patch("oss_ext.dp.EulerSteps", steps):
        yield
