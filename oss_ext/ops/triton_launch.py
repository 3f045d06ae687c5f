"""How the Triton kernels are launched: splits, groups of samples, what is written where.

The elements of a sample are cut into blocks of ``BLOCK`` and the blocks into splits, both
functions of N, D and the dtype alone. ``pair_sums`` fills a slab per split, ``join`` adds the
slabs in order, and the costs that result are those of every operator here, bit for bit. Samples
are taken in groups that fit the workspace, ``WORKSPACE`` bytes up to N = 1024 whatever B and D.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from oss_ext.ops import checks

WORKSPACE = 16 * 2**20
SLABS = 5 * 2**20  # of one sample: all its splits together
MAX_SPLITS = 64
CELLS = 256  # pairs of a program that works on costs
ELEMENTS = 512  # of a program that moves rows
GRID_LIMIT = 65535  # of the grid's second and third axis


@functools.cache
def kernels() -> ModuleType:
    """Imports triton."""
    return importlib.import_module("oss_ext.ops.triton_kernels")


def _merged(*tensors: Tensor) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Sizes of dims and, per tensor, strides (row, sample, *dims), with neighbouring dims that
    are one run in every tensor made one."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for axis in range(2, tensors[0].dim()):
        size = tensors[0].shape[axis]
        steps = [tensor.stride(axis) for tensor in tensors]
        if size == 1:
            continue
        runs_on = all(own[-1:] == [step * size] for own, step in zip(strides, steps, strict=True))
        if sizes and runs_on:
            sizes[-1] *= size
        else:
            sizes.append(size)
        for own, step in zip(strides, steps, strict=True):
            own[len(sizes) - 1 :] = [step]
    outer = [tensor.stride()[:2] for tensor in tensors]
    if not sizes:
        return (1,), tuple((*o, 1) for o in outer)
    return tuple(sizes), tuple((*o, *own) for o, own in zip(outer, strides, strict=True))


def _groups(samples: int, size: int) -> Iterator[slice]:
    for begin in range(0, samples, size):
        yield slice(begin, min(begin + size, samples))


@dataclass(frozen=True)
class Best:
    """The best so far: ``cost`` [rows, samples], and the numbers of the source and, where there
    is a choice, of the order, [rows, samples] or reduced [rows, 1]. Updated in place."""

    cost: Tensor
    parent: Tensor
    order: Tensor | None = None

    def of(self, group: slice) -> Best:
        order = None if self.order is None else self.order[:, group]
        return Best(self.cost[:, group], self.parent[:, group], order)


@dataclass(frozen=True)
class Candidates:
    """One order's candidates of the sources from ``first`` to before ``stop``.

    ``basis[r]`` and ``target`` are [rows, B, *dims], ``live`` is bool [sources, B]. ``index``
    [terms, sources, B] and ``coefficients`` [terms, sources, rows, B] say what a candidate is;
    without them it is Euler's step, ``times`` are given, and row k of each basis is that of source
    ``first + k``.
    """

    basis: list[Tensor]
    target: Tensor
    live: Tensor
    first: int
    times: Tensor | None = None
    index: Tensor | None = None
    coefficients: Tensor | None = None
    order: int = 0

    @property
    def count(self) -> int:
        return len(self.live)

    @property
    def stop(self) -> int:
        return self.first + self.count

    @property
    def elements(self) -> int:
        return math.prod(self.target.shape[2:])

    @property
    def splits(self) -> int:
        last = len(self.target) - 1
        blocks = -(-self.elements // kernels().BLOCK.value)
        return max(1, min(blocks, MAX_SPLITS, SLABS // (8 * last * last)))

    def groups(self, reduced: bool) -> Iterator[slice]:
        """Samples that are computed together."""
        cells = self.count * (self.stop - 1)
        room = WORKSPACE // 8 - (cells if reduced else 0)
        size = max(1, min(room // (self.splits * cells), GRID_LIMIT))
        return _groups(self.target.shape[1], size)

    def costs(
        self, group: slice, out: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Costs [count, stop - 1, samples of the group], float64; in ``out`` where given.

        ``wanted`` (int64 [targets], one source each) leaves all other pairs undefined.
        """
        width = self.stop - 1
        basis = tuple(tensor[:, group] for tensor in self.basis)
        target, live = self.target[:, group], self.live[:, group]
        index, coefficients = (
            None if x is None else x[..., group] for x in (self.index, self.coefficients)
        )
        samples = target.shape[1]
        sums = torch.empty(
            (samples, self.splits, self.count, width), dtype=torch.float64, device=target.device
        )
        sizes, (target_strides, *basis_strides) = _merged(target, *basis)

        def grid(tile: dict[str, int]) -> tuple[int, int, int]:
            tiles = -(-self.count // tile["SOURCES"]) * -(-width // tile["TARGETS"])
            return tiles, self.splits, samples

        kernels().pair_sums[grid](
            sums, *basis, *[None] * (checks.MAX_TERMS - len(basis)), target, self.times, index,
            coefficients, live, wanted,
            tuple(basis_strides), target_strides, None if index is None else index.stride(),
            None if coefficients is None else coefficients.stride(), live.stride(),
            tuple(map(len, basis)), sizes, self.first, self.stop, self.splits, self.elements,
            EVEN=self.elements % kernels().WHOLE == 0,
            enable_fp_fusion=False,
        )  # fmt: skip
        cost = sums[:, 0].permute(1, 2, 0) if out is None else out
        kernels().join[(-(-self.count * width // CELLS), samples)](
            cost, sums, live, cost.stride(), live.stride(), self.first, self.count, width,
            self.splits, self.elements, CELLS=CELLS, enable_fp_fusion=False,
        )  # fmt: skip
        return cost


def add_terms(objective: Tensor, cost: Tensor, reduce: str) -> None:
    """Adds what each sample of ``cost`` [count, width, samples] counts to [count, width]."""
    count, width, samples = cost.shape
    kernels().add_terms[(-(-count * width // CELLS),)](
        objective, cost, cost.stride(), count, width, samples, LOG=reduce == "log_mean",
        FLOOR=checks.LOG_FLOOR, CELLS=CELLS, enable_fp_fusion=False,
    )  # fmt: skip


def select(best: Best, cost: Tensor, first: int, order: int = 0) -> None:
    """Improves ``best`` by the costs [sources, targets, samples] of sources from ``first`` on.

    Orders come from the highest down: of equals the later one wins."""
    rows = len(best.cost)
    for group in _groups(best.cost.shape[1], GRID_LIMIT):
        part = best.of(group)
        grid = (-(-rows // 32), part.cost.shape[1])
        kernels().select[grid](
            part.cost, part.parent, part.order, cost[..., group], part.cost.stride(),
            part.parent.stride(), None if part.order is None else part.order.stride(),
            cost.stride(), order, first, len(cost), rows, SOURCES=32, TARGETS=32,
            enable_fp_fusion=False,
        )  # fmt: skip


def pick(best_cost: Tensor, winner: Tensor, cost: Tensor, first: int) -> None:
    """``best_cost`` [rows, samples] becomes the winner's own where it is one of these sources."""
    _, width, samples = cost.shape
    index = (winner[:width] - first).expand(width, samples)
    picked = cost.gather(0, index.clamp(min=0)[None])[0]
    best_cost[:width] = torch.where(index >= 0, picked, best_cost[:width])


def _old_objective(best_cost: Tensor, reduce: str) -> Tensor:
    """[rows, 1]: what the best so far counts, added up as ``add_terms`` does for new costs."""
    objective = best_cost.new_zeros((1, len(best_cost)), dtype=torch.float64)
    add_terms(objective, best_cost[None], reduce)
    return objective.T


def improve(candidates: Candidates, best: Best, reduce: str) -> None:
    """The argmin over these candidates and the best so far, in place."""
    first, order = candidates.first, candidates.order
    if reduce == "none":
        for group in candidates.groups(reduced=False):
            select(best.of(group), candidates.costs(group), first, order)
        return
    count, width = candidates.count, candidates.stop - 1
    objective = best.cost.new_zeros((count, width, 1), dtype=torch.float64)
    groups = list(candidates.groups(reduced=True))
    # One group's costs fill the workspace: those of several are computed again, and are never
    # held while the next come.
    kept = candidates.costs(groups[0]) if len(groups) == 1 else None
    for group in groups:
        add_terms(objective, candidates.costs(group) if kept is None else kept, reduce)
    score = _old_objective(best.cost, reduce)
    select(Best(score, best.parent, best.order), objective, first, order)
    winner = best.parent
    if best.order is not None:
        winner = torch.where(best.order == order, winner, -1)
    wanted = winner[:, 0].contiguous()
    for group in groups:
        pick(
            best.cost[:, group], winner,
            candidates.costs(group, wanted=wanted) if kept is None else kept, first,
        )  # fmt: skip


def advance(
    next_state: Tensor, state: Tensor, velocity: Tensor, first: int, times: Tensor, parent: Tensor
) -> None:
    """Moves targets from their parents, where their velocities are here: those from ``first``."""
    rows, samples = state.shape[:2]
    elements = math.prod(state.shape[2:])
    in_place = next_state is state
    run = rows if in_place else 4
    parent = parent.expand(rows, samples)
    sizes, strides = _merged(next_state, state, velocity)
    for group in _groups(samples, GRID_LIMIT):
        grid = (-(-elements // ELEMENTS), -(-rows // run), len(state[0, group]))
        kernels().advance[grid](
            next_state[:, group], state[:, group], velocity[:, group], times, parent[:, group],
            *strides, parent.stride(), sizes, first, rows, elements, run,
            IN_PLACE=in_place, ELEMENTS=ELEMENTS, enable_fp_fusion=False,
        )  # fmt: skip


def combine(out: Tensor, basis: list[Tensor], index: Tensor, coefficients: Tensor) -> None:
    """Fills ``out`` [targets, samples, *dims] as ``oss_ext.ops.dp_combine`` says."""
    targets, samples = out.shape[:2]
    elements = math.prod(out.shape[2:])
    sizes, (out_strides, *basis_strides) = _merged(out, *basis)
    for group in _groups(samples, GRID_LIMIT):
        grid = (-(-elements // ELEMENTS) * targets, len(out[0, group]))
        kernels().combine[grid](
            out[:, group], tuple(tensor[:, group] for tensor in basis), index[..., group],
            coefficients[..., group], out_strides, tuple(basis_strides), index.stride(),
            coefficients.stride(), sizes, elements, ELEMENTS=ELEMENTS, enable_fp_fusion=False,
        )  # fmt: skip
