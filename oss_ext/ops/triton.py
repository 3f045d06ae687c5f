"""Triton kernels: the operators on a GPU for which no native kernel was built.

Importing this file imports no triton; the first call does. On the CPU the kernels run under
Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before triton was imported: slowly, for
tests.

The elements of a sample are cut into blocks of ``BLOCK`` and the blocks into splits, both
functions of N, D and the dtype alone. ``pair_sums`` fills a slab per split, ``join`` adds the
slabs in order, and the costs that result are those of every operator here, bit for bit. Samples
are taken in groups that fit the workspace, ``WORKSPACE`` bytes up to N = 1024 whatever B and D.
No launch waits for the device, except for the first of a kind, which compiles, and times the
few ways to run ``pair_sums``; Triton keeps both on disk.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from oss_ext.ops import checks
from oss_ext.ops.backend import Backend, why_no_card

WORKSPACE = 16 * 2**20
SLABS = 5 * 2**20  # of one sample: all its splits together
MAX_SPLITS = 64
CELLS = 256  # pairs of a program that works on costs
GRID_LIMIT = 65535  # of the grid's second and third axis


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("oss_ext.ops.triton_kernels")


def _why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda":
        if device.type == "cpu" and interpreted:
            return None
        return "Triton kernels run on CUDA tensors; on the CPU only with TRITON_INTERPRET=1"
    return why_no_card(device)


def _merged(*tensors: Tensor) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
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
        return (1,), [(*o, 1) for o in outer]
    return tuple(sizes), [(*o, *own) for o, own in zip(outer, strides, strict=True)]


@dataclass(frozen=True)
class _Sources:
    """The sources of a call: all of a step's or a chunk's, from ``first`` to before ``stop``."""

    state: Tensor
    velocity: Tensor
    teacher: Tensor
    times: Tensor
    live: Tensor
    first: int

    @property
    def count(self) -> int:
        return len(self.velocity)

    @property
    def stop(self) -> int:
        return self.first + self.count

    @property
    def elements(self) -> int:
        return math.prod(self.state.shape[2:])

    @property
    def splits(self) -> int:
        last = len(self.state) - 1
        blocks = -(-self.elements // _kernels().BLOCK.value)
        return max(1, min(blocks, MAX_SPLITS, SLABS // (8 * last * last)))

    def groups(self, reduced: bool) -> Iterator[slice]:
        """Samples that are computed together."""
        cells = self.count * (self.stop - 1)
        room = WORKSPACE // 8 - (cells if reduced else 0)
        size = max(1, min(room // (self.splits * cells), GRID_LIMIT))
        for begin in range(0, self.state.shape[1], size):
            yield slice(begin, min(begin + size, self.state.shape[1]))

    def costs(
        self, group: slice, out: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Costs [count, stop - 1, samples of the group], float64; in ``out`` where given.

        ``wanted`` (int64 [targets], one source each) leaves all other pairs undefined.
        """
        kernels, width = _kernels(), self.stop - 1
        state, velocity, teacher, live = (
            tensor[:, group] for tensor in (self.state, self.velocity, self.teacher, self.live)
        )
        samples = state.shape[1]
        sums = torch.empty(
            (samples, self.splits, self.count, width), dtype=torch.float64, device=state.device
        )
        sizes, strides = _merged(state, velocity, teacher)

        def grid(tile: dict[str, int]) -> tuple[int, int, int]:
            tiles = -(-self.count // tile["SOURCES"]) * -(-width // tile["TARGETS"])
            return tiles, self.splits, samples

        kernels.pair_sums[grid](
            sums, state, velocity, teacher, self.times, live, wanted,
            *strides, live.stride(), sizes, self.first, self.stop, self.splits, self.elements,
            EVEN=self.elements % kernels.LANES.value == 0,
            enable_fp_fusion=False,
        )  # fmt: skip
        cost = sums[:, 0].permute(1, 2, 0) if out is None else out
        kernels.join[(-(-self.count * width // CELLS), samples)](
            cost, sums, live, cost.stride(), live.stride(), self.first, self.count, width,
            self.splits, self.elements, CELLS=CELLS, enable_fp_fusion=False,
        )  # fmt: skip
        return cost


def _sources(
    state: Tensor, velocity: Tensor, first: int, teacher: Tensor, times: Tensor,
    source_mask: Tensor | None, reduce: str,
) -> _Sources:  # fmt: skip
    rows, samples = state.shape[:2]
    if source_mask is None:
        live = torch.ones(rows, 1, dtype=torch.bool, device=state.device)
    else:
        live = source_mask.reshape(rows, -1)
    if reduce != "none":
        live = live.all(dim=1, keepdim=True)
    velocity = velocity[max(first, 1) - first :]  # row 0 is never a source
    live = live.expand(rows, samples)
    return _Sources(state, velocity, teacher, times.contiguous(), live, max(first, 1))


def _add_terms(objective: Tensor, cost: Tensor, reduce: str) -> None:
    """Adds what each sample of ``cost`` [count, width, samples] counts to [count, width]."""
    count, width, samples = cost.shape
    _kernels().add_terms[(-(-count * width // CELLS),)](
        objective, cost, cost.stride(), count, width, samples, LOG=reduce == "log_mean",
        FLOOR=checks.LOG_FLOOR, CELLS=CELLS, enable_fp_fusion=False,
    )  # fmt: skip


def _select(score: Tensor, parent: Tensor, cost: Tensor, first: int) -> None:
    """Improves ``score`` and ``parent`` [rows, samples] by costs of sources from ``first`` on."""
    rows, samples = score.shape
    for begin in range(0, samples, GRID_LIMIT):
        part = slice(begin, begin + GRID_LIMIT)
        grid = (-(-rows // 32), len(score[0, part]))
        _kernels().select[grid](
            score[:, part], parent[:, part], cost[..., part], score.stride(), parent.stride(),
            cost.stride(), first, len(cost), rows, SOURCES=32, TARGETS=32,
            enable_fp_fusion=False,
        )  # fmt: skip


def _pick(best_cost: Tensor, parent: Tensor, cost: Tensor, first: int) -> None:
    """``best_cost`` [rows, samples] becomes the winner's own where it is one of these sources."""
    _, width, samples = cost.shape
    index = (parent[:width] - first).expand(width, samples)
    picked = cost.gather(0, index.clamp(min=0)[None])[0]
    best_cost[:width] = torch.where(index >= 0, picked, best_cost[:width])


def _old_objective(best_cost: Tensor, reduce: str) -> Tensor:
    """[rows, 1]: what the best so far counts, added up as ``_add_terms`` does for new costs."""
    objective = best_cost.new_zeros((1, len(best_cost)), dtype=torch.float64)
    _add_terms(objective, best_cost[None], reduce)
    return objective.T


def _improve(sources: _Sources, best_cost: Tensor, parent: Tensor, reduce: str) -> None:
    """The argmin over these sources and the best so far, both [rows, samples], in place."""
    first, count, width = sources.first, sources.count, sources.stop - 1
    if reduce == "none":
        for group in sources.groups(reduced=False):
            _select(best_cost[:, group], parent[:, group], sources.costs(group), first)
        return
    objective = torch.zeros((count, width, 1), dtype=torch.float64, device=parent.device)
    groups = list(sources.groups(reduced=True))
    for group in groups:
        cost = sources.costs(group)
        _add_terms(objective, cost, reduce)
    _select(_old_objective(best_cost, reduce), parent, objective, first)
    for group in groups:
        if len(groups) > 1:
            cost = sources.costs(group, wanted=parent[:, 0].contiguous())
        _pick(best_cost[:, group], parent, cost, first)


def _advance(
    next_state: Tensor, state: Tensor, velocity: Tensor, first: int, times: Tensor, parent: Tensor
) -> None:
    rows, samples = state.shape[:2]
    elements = math.prod(state.shape[2:])
    in_place = next_state is state
    run = rows if in_place else 4
    parent = parent.expand(rows, samples)
    sizes, strides = _merged(next_state, state, velocity)
    for begin in range(0, samples, GRID_LIMIT):
        part = slice(begin, begin + GRID_LIMIT)
        grid = (-(-elements // 512), -(-rows // run), len(state[0, part]))
        _kernels().advance[grid](
            next_state[:, part], state[:, part], velocity[:, part], times, parent[:, part],
            *strides, parent.stride(), sizes, first, rows, elements, run,
            IN_PLACE=in_place, ELEMENTS=512, enable_fp_fusion=False,
        )  # fmt: skip


def _on_host(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def dp_cost(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor, *,
    source_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    checks.check_step("dp_cost", state, velocity, teacher, times, source_mask)
    if _on_host(state):
        checks.check_times("dp_cost", times)
    rows, samples = state.shape[:2]
    with torch.cuda.device_of(state):
        sources = _sources(state, velocity, 0, teacher, times, source_mask, "none")
        cost = state.new_full((rows, rows, samples), torch.inf, dtype=torch.float64)
        for group in sources.groups(reduced=False):
            sources.costs(group, out=cost[1:, :-1, group])
    return cost


def dp_select(cost: Tensor, reduce: str = "none") -> tuple[Tensor, Tensor]:
    checks.check_reduce("dp_select", reduce)
    checks.check_costs("dp_select", cost)
    rows, samples = cost.shape[1:]
    columns = samples if reduce == "none" else 1
    with torch.cuda.device_of(cost):
        best_cost = cost.new_full((rows, samples), torch.inf)
        parent = torch.full((rows, columns), -1, dtype=torch.int64, device=cost.device)
        if reduce == "none":
            _select(best_cost, parent, cost, 0)
            return best_cost, parent
        objective = cost.new_zeros((rows, rows, 1))
        _add_terms(objective, cost, reduce)
        _select(cost.new_full((rows, 1), torch.inf), parent, objective, 0)
        _pick(best_cost, parent, cost, 0)
    return best_cost, parent


def dp_advance(state: Tensor, velocity: Tensor, times: Tensor, parent: Tensor) -> Tensor:
    checks.check_state("dp_advance", state, times)
    checks.check_velocity("dp_advance", "velocity", velocity, state, state.shape[0])
    checks.check_parent("dp_advance", parent, state)
    if _on_host(state):
        checks.check_times("dp_advance", times)
        checks.check_parent_values("dp_advance", parent)
    with torch.cuda.device_of(state):
        next_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        _advance(next_state, state, velocity, 0, times.contiguous(), parent)
    return next_state


def dp_step(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor, *,
    source_mask: Tensor | None = None, reduce: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.check_reduce("dp_step", reduce)
    checks.check_step("dp_step", state, velocity, teacher, times, source_mask)
    if _on_host(state):
        checks.check_times("dp_step", times)
    rows, samples = state.shape[:2]
    columns = samples if reduce == "none" else 1
    with torch.cuda.device_of(state):
        sources = _sources(state, velocity, 0, teacher, times, source_mask, reduce)
        cost = state.new_full((rows, samples), torch.inf, dtype=checks.cost_dtype(state))
        parent = torch.full((rows, columns), -1, dtype=torch.int64, device=state.device)
        next_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        _improve(sources, cost, parent, reduce)
        _advance(next_state, state, velocity, 0, sources.times, parent)
    return next_state, cost, parent


def dp_accumulate_(
    state: Tensor, velocity_chunk: Tensor, first_source: int, teacher: Tensor, times: Tensor,
    best_cost: Tensor, best_parent: Tensor, *, source_mask: Tensor | None = None,
    reduce: str = "none",
) -> None:  # fmt: skip
    checks.check_accumulate(
        "dp_accumulate_", state, velocity_chunk, first_source, teacher, times, best_cost,
        best_parent, source_mask, reduce,
    )  # fmt: skip
    if _on_host(state):
        checks.check_times("dp_accumulate_", times)
        checks.check_chunk_order("dp_accumulate_", best_parent, first_source)
    with torch.cuda.device_of(state):
        sources = _sources(state, velocity_chunk, first_source, teacher, times, source_mask, reduce)
        _improve(sources, best_cost, best_parent, reduce)
        _advance(state, state, velocity_chunk, first_source, sources.times, best_parent)


BACKEND = Backend(
    name="triton",
    description="Triton kernels, compiled at the first call",
    operators={
        "dp_step": dp_step,
        "dp_cost": dp_cost,
        "dp_select": dp_select,
        "dp_advance": dp_advance,
        "dp_accumulate_": dp_accumulate_,
    },
    why_not=_why_not,
)
