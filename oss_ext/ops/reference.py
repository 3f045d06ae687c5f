"""The definition of the operators in plain torch, and the fallback where no kernel is built.

Everything is computed in float64, one (source, target) pair at a time, so that it can be read
beside the paper's algorithms and never holds more than a few rows. A kernel is right when it
agrees with this file within the error model stated at ``oss_ext.ops.dp_step``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from oss_ext.ops import checks, schema
from oss_ext.ops.backend import Backend


def candidate(state: Tensor, velocity: Tensor, times: Tensor, source: int, target: int) -> Tensor:
    """``z[i] + (t[j] - t[i]) v[i]`` for every sample, [B, *dims] in float64."""
    return state[source].double() + (times[target] - times[source]) * velocity[source].double()


def live_sources(state: Tensor, source_mask: Tensor | None) -> Tensor:
    """[N+1, B] bool; row 0 has no target below it and is never a source."""
    rows, samples = state.shape[:2]
    if source_mask is None:
        live = state.new_ones((rows, samples), dtype=torch.bool)
    else:
        live = source_mask.reshape(rows, -1).expand(rows, samples).clone()
    live[0] = False
    return live


def dp_cost(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor, *,
    source_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    checks.check_step("dp_cost", state, velocity, teacher, times, source_mask)
    checks.check_times("dp_cost", times)
    rows, samples = state.shape[:2]
    live = live_sources(state, source_mask)
    cost = state.new_full((rows, rows, samples), torch.inf, dtype=torch.float64)
    for i in range(1, rows):
        for j in range(i if bool(live[i].any()) else 0):
            mean = mean_square(candidate(state, velocity, times, i, j), teacher[j])
            cost[i, j] = torch.where(live[i], mean, torch.inf)
    return cost


def mean_square(value: Tensor, target: Tensor) -> Tensor:
    """[B]: the mean over elements of (value - target)^2."""
    # In one order of memory: torch adds up in the order of strides, and the bits would follow it.
    mean = (value - target.double()).square().reshape(len(target), -1).contiguous().mean(dim=1)
    if target.dtype != torch.float64:  # what float32 cannot hold is no finite cost
        mean = torch.where(mean.float().isinf(), torch.inf, mean)
    return mean


def objective(cost: Tensor, reduce: str) -> Tensor:
    """What the argmin compares: [..., B] costs -> [..., B] or, reduced, [..., 1]; NaN is inf."""
    finite = cost.isfinite()
    if reduce == "none":
        return torch.where(finite, cost, torch.inf)
    values = cost.clamp(min=checks.LOG_FLOOR).log() if reduce == "log_mean" else cost
    # In index order, as the kernels add: costs that are equal there are equal here.
    mean = functools.reduce(torch.add, values.unbind(-1))[..., None] / cost.shape[-1]
    return torch.where(finite.all(dim=-1, keepdim=True), mean, torch.inf)


def dp_select(cost: Tensor, reduce: str = "none") -> tuple[Tensor, Tensor]:
    checks.check_reduce("dp_select", reduce)
    checks.check_costs("dp_select", cost)
    rows = cost.shape[0]
    score = objective(cost, reduce)
    # Only sources above the target count; argmin of the flipped rows is the largest of equals.
    allowed = torch.ones(rows, rows, dtype=torch.bool, device=cost.device).tril(-1)
    score = torch.where(allowed[:, :, None], score, torch.inf)
    parent = rows - 1 - score.flip(0).argmin(dim=0)
    parent = torch.where(score.amin(dim=0).isinf(), -1, parent)
    picked = cost.gather(0, parent.clamp(min=0).expand(rows, cost.shape[2])[None])[0]
    return torch.where(parent >= 0, picked, torch.inf), parent


def dp_advance(state: Tensor, velocity: Tensor, times: Tensor, parent: Tensor) -> Tensor:
    checks.check_state("dp_advance", state, times)
    checks.check_velocity("dp_advance", "velocity", velocity, state, state.shape[0])
    checks.check_parent("dp_advance", parent, state)
    checks.check_times("dp_advance", times)
    rows, samples = state.shape[:2]
    checks.check_parent_values("dp_advance", parent)
    next_state = state.clone(memory_format=torch.contiguous_format)
    for j, sources in enumerate(parent.expand(rows, samples).tolist()):
        for b, i in enumerate(sources):
            if i >= 0:
                pair = slice(b, b + 1)
                value = candidate(state[:, pair], velocity[:, pair], times, i, j)
                next_state[j, pair] = value.to(state.dtype)
    return next_state


def dp_step(
    state: Tensor, velocity: Tensor, teacher: Tensor, times: Tensor, *,
    source_mask: Tensor | None = None, reduce: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    checks.check_reduce("dp_step", reduce)
    checks.check_step("dp_step", state, velocity, teacher, times, source_mask)
    checks.check_times("dp_step", times)
    cost = dp_cost(state, velocity, teacher, times, source_mask=source_mask)
    best_cost, parent = dp_select(cost, reduce)
    next_state = dp_advance(state, velocity, times, parent)
    return next_state, best_cost.to(checks.cost_dtype(state)), parent


def dp_accumulate_(
    state: Tensor, velocity_chunk: Tensor, first_source: int, teacher: Tensor, times: Tensor,
    best_cost: Tensor, best_parent: Tensor, *, source_mask: Tensor | None = None,
    reduce: str = "none",
) -> None:  # fmt: skip
    checks.check_accumulate(
        "dp_accumulate_", state, velocity_chunk, first_source, teacher, times, best_cost,
        best_parent, source_mask, reduce,
    )  # fmt: skip
    checks.check_times("dp_accumulate_", times)
    checks.check_chunk_order("dp_accumulate_", best_parent, first_source)
    live = live_sources(state, source_mask)
    stop = first_source + velocity_chunk.shape[0]
    for j in range(stop - 1):  # upwards: target j reads sources above j only, so in place is safe
        for i in range(max(first_source, j + 1), stop):
            step = times[j] - times[i]
            moved = state[i].double() + step * velocity_chunk[i - first_source].double()
            cost = torch.where(live[i], mean_square(moved, teacher[j]), torch.inf)
            new, old = objective(cost, reduce), objective(best_cost[j], reduce)
            wins = (new <= old) & new.isfinite()
            best_parent[j] = torch.where(wins, i, best_parent[j])
            best_cost[j] = torch.where(wins, cost, best_cost[j])
        for b, i in enumerate(best_parent[j].expand(len(best_cost[j])).tolist()):
            if i >= first_source:
                step = times[j] - times[i]
                moved = state[i, b].double() + step * velocity_chunk[i - first_source, b].double()
                state[j, b] = moved.to(state.dtype)


def combination(basis: list[Tensor], index: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_r c[r, b] basis[r][index[r, b], b]``, [B, *dims] in float64; -1: not that term."""
    sample = torch.arange(index.shape[1], device=index.device)
    total = torch.zeros(basis[0].shape[1:], dtype=torch.float64, device=index.device)
    each = (-1, *[1] * (total.dim() - 1))
    for tensor, rows, factors in zip(basis, index, coefficients, strict=False):
        term = factors.reshape(each) * tensor[rows.clamp(min=0), sample].double()
        total += torch.where((rows >= 0).reshape(each), term, 0)
    return total


def dp_argmin_(
    basis: list[Tensor], index: Tensor, coefficients: Tensor, terms: list[int], first_source: int,
    target: Tensor, best_cost: Tensor, best_parent: Tensor, best_order: Tensor, *,
    source_mask: Tensor | None = None, reduce: str = "none",
) -> None:  # fmt: skip
    checks.check_argmin(
        "dp_argmin_", basis, index, coefficients, terms, first_source, target, best_cost,
        best_parent, best_order, source_mask, reduce,
    )  # fmt: skip
    checks.check_chunk_order("dp_argmin_", best_parent, first_source)
    samples = target.shape[1]
    stop = first_source + index.shape[1]
    live = live_sources(target, source_mask)[first_source:stop]
    checks.check_candidates(
        "dp_argmin_", basis, index, coefficients, terms, first_source, live
    )  # fmt: skip
    factors = coefficients.expand(*coefficients.shape[:4], samples)
    for j in range(stop - 1):
        for i in range(max(first_source, j + 1), stop):
            c = i - first_source
            for o in reversed(range(len(terms))):  # the last of equals wins: the lowest order
                used = slice(terms[o])
                there = live[c] & ~factors[o, 0, c, j].isnan()
                rows = torch.where(there, index[used, c], -1)
                value = combination(basis, rows, factors[o, used, c, j])
                cost = torch.where(there, mean_square(value, target[j]), torch.inf)
                new, old = objective(cost, reduce), objective(best_cost[j], reduce)
                wins = (new <= old) & new.isfinite()
                best_parent[j] = torch.where(wins, i, best_parent[j])
                best_order[j] = torch.where(wins, o, best_order[j])
                best_cost[j] = torch.where(wins, cost, best_cost[j])


def dp_combine(basis: list[Tensor], index: Tensor, coefficients: Tensor) -> Tensor:
    checks.check_combine("dp_combine", basis, index, coefficients)
    checks.check_terms("dp_combine", basis, index, coefficients)
    rows = zip(index.unbind(1), coefficients.unbind(1), strict=True)
    return torch.stack([combination(basis, *row).to(basis[0].dtype) for row in rows])


BACKEND = Backend(
    name="reference",
    description="float64 definition in plain torch, any device; slow",
    operators={
        "dp_step": dp_step,
        "dp_cost": dp_cost,
        "dp_select": dp_select,
        "dp_advance": dp_advance,
        "dp_accumulate_": dp_accumulate_,
        "dp_argmin_": dp_argmin_,
        "dp_combine": dp_combine,
    },
    why_not=lambda device: None,
)
# The fallback of every device: a kernel registered for a device's own key comes before it.
for _name, _function in BACKEND.operators.items():
    schema.library.impl(_name, _function, "CompositeExplicitAutograd")
