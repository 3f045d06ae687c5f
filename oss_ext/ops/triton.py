"""Triton kernels: the operators on a GPU for which no native kernel was built.

Importing this file imports no triton; the first call does. On the CPU the kernels run under
Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before triton was imported: slowly, for
tests.

``oss_ext.ops.triton_launch`` says how the work is cut. No launch waits for the device, except for
the first of a kind, which compiles, and times the few ways to run ``pair_sums``; Triton keeps both
on disk.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from oss_ext.ops import checks
from oss_ext.ops import triton_launch as launch
from oss_ext.ops.backend import Backend, why_no_card
from oss_ext.ops.triton_launch import Best, Candidates


def _why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda":
        if device.type == "cpu" and interpreted:
            return None
        return "Triton kernels run on CUDA tensors; on the CPU only with TRITON_INTERPRET=1"
    return why_no_card(device)


def _live(main: Tensor, source_mask: Tensor | None, reduce: str) -> Tensor:
    """[N+1, B] bool: the sources that count."""
    rows, samples = main.shape[:2]
    if source_mask is None:
        live = torch.ones(rows, 1, dtype=torch.bool, device=main.device)
    else:
        live = source_mask.reshape(rows, -1)
    if reduce != "none":
        live = live.all(dim=1, keepdim=True)
    return live.expand(rows, samples)


def _steps(
    state: Tensor, velocity: Tensor, first: int, teacher: Tensor, times: Tensor,
    source_mask: Tensor | None, reduce: str,
) -> Candidates:  # fmt: skip
    """Euler's, from sources whose velocities begin with that of ``first``."""
    begin, stop = max(first, 1), first + len(velocity)  # row 0 is never a source
    basis = [state[begin:stop], velocity[begin - first :]]
    live = _live(state, source_mask, reduce)[begin:stop]
    return Candidates(basis, teacher, live, begin, times=times.contiguous())


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
        steps = _steps(state, velocity, 0, teacher, times, source_mask, "none")
        cost = state.new_full((rows, rows, samples), torch.inf, dtype=torch.float64)
        for group in steps.groups(reduced=False):
            steps.costs(group, out=cost[1:, :-1, group])
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
            launch.select(Best(best_cost, parent), cost, 0)
            return best_cost, parent
        objective = cost.new_zeros((rows, rows, 1))
        launch.add_terms(objective, cost, reduce)
        launch.select(Best(cost.new_full((rows, 1), torch.inf), parent), objective, 0)
        launch.pick(best_cost, parent, cost, 0)
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
        launch.advance(next_state, state, velocity, 0, times.contiguous(), parent)
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
        steps = _steps(state, velocity, 0, teacher, times, source_mask, reduce)
        cost = state.new_full((rows, samples), torch.inf, dtype=checks.cost_dtype(state))
        parent = torch.full((rows, columns), -1, dtype=torch.int64, device=state.device)
        next_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        launch.improve(steps, Best(cost, parent), reduce)
        launch.advance(next_state, state, velocity, 0, times.contiguous(), parent)
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
        times = times.contiguous()
        steps = _steps(state, velocity_chunk, first_source, teacher, times, source_mask, reduce)
        launch.improve(steps, Best(best_cost, best_parent), reduce)
        launch.advance(state, state, velocity_chunk, first_source, times, best_parent)


def dp_argmin_(
    basis: list[Tensor], index: Tensor, coefficients: Tensor, terms: list[int], first_source: int,
    target: Tensor, best_cost: Tensor, best_parent: Tensor, best_order: Tensor, *,
    source_mask: Tensor | None = None, reduce: str = "none",
) -> None:  # fmt: skip
    checks.check_argmin(
        "dp_argmin_", basis, index, coefficients, terms, first_source, target, best_cost,
        best_parent, best_order, source_mask, reduce,
    )  # fmt: skip
    chunk = slice(first_source, first_source + index.shape[1])
    if _on_host(target):
        checks.check_chunk_order("dp_argmin_", best_parent, first_source)
        checks.check_candidates(
            "dp_argmin_", basis, index, coefficients, terms, first_source,
            _live(target, source_mask, "none")[chunk],
        )  # fmt: skip
    coefficients = coefficients.expand(*coefficients.shape[:4], target.shape[1])
    best = Best(best_cost, best_parent, best_order)
    with torch.cuda.device_of(target):
        live = _live(target, source_mask, reduce)[chunk]
        for order in reversed(range(len(terms))):  # the last of equals wins: the lowest
            used = slice(terms[order])
            candidates = Candidates(
                basis[used], target, live, first_source, index=index[used],
                coefficients=coefficients[order, used], order=order,
            )  # fmt: skip
            launch.improve(candidates, best, reduce)


def dp_combine(basis: list[Tensor], index: Tensor, coefficients: Tensor) -> Tensor:
    checks.check_combine("dp_combine", basis, index, coefficients)
    if _on_host(index):
        checks.check_terms("dp_combine", basis, index, coefficients)
    with torch.cuda.device_of(index):
        out = basis[0].new_empty((index.shape[1], *basis[0].shape[1:]))
        launch.combine(out, basis, index, coefficients)
    return out


BACKEND = Backend(
    name="triton",
    description="Triton kernels, compiled at the first call",
    operators={
        "dp_step": dp_step,
        "dp_cost": dp_cost,
        "dp_select": dp_select,
        "dp_advance": dp_advance,
        "dp_accumulate_": dp_accumulate_,
        "dp_argmin_": dp_argmin_,
        "dp_combine": dp_combine,
    },
    why_not=_why_not,
)
