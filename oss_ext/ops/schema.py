"""The operators ``torch.ops.oss.*``: their schemas and fake kernels, once.

Backends register implementations for these schemas; none of them repeats a schema. The contract
of each operator is in the docstrings of ``oss_ext.ops``, which is also the public way to call it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oss_ext.ops import checks

SCHEMAS = {
    "dp_step": "(Tensor state, Tensor velocity, Tensor teacher, Tensor times, *, "
    'Tensor? source_mask=None, str reduce="none") '
    "-> (Tensor next_state, Tensor cost, Tensor parent)",
    "dp_cost": "(Tensor state, Tensor velocity, Tensor teacher, Tensor times, *, "
    "Tensor? source_mask=None) -> Tensor",
    "dp_select": '(Tensor cost, str reduce="none") -> (Tensor best_cost, Tensor parent)',
    "dp_advance": "(Tensor state, Tensor velocity, Tensor times, Tensor parent) -> Tensor",
    "dp_accumulate_": "(Tensor(a!) state, Tensor velocity_chunk, int first_source, "
    "Tensor teacher, Tensor times, Tensor(b!) best_cost, Tensor(c!) best_parent, *, "
    'Tensor? source_mask=None, str reduce="none") -> ()',
    "dp_argmin_": "(Tensor[] basis, Tensor index, Tensor coefficients, int[] terms, "
    "int first_source, Tensor target, Tensor(a!) best_cost, Tensor(b!) best_parent, "
    'Tensor(c!) best_order, *, Tensor? source_mask=None, str reduce="none") -> ()',
    "dp_combine": "(Tensor[] basis, Tensor index, Tensor coefficients) -> Tensor",
}

library = torch.library.Library("oss", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)


@torch.library.register_fake("oss::dp_step", lib=library)
def _fake_dp_step(
    state: Tensor,
    velocity: Tensor,
    teacher: Tensor,
    times: Tensor,
    *,
    source_mask: Tensor | None = None,
    reduce: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_reduce("dp_step", reduce)
    checks.check_step("dp_step", state, velocity, teacher, times, source_mask)
    rows, samples = state.shape[:2]
    columns = samples if reduce == "none" else 1
    return (
        state.new_empty(state.shape),
        state.new_empty((rows, samples), dtype=checks.cost_dtype(state)),
        state.new_empty((rows, columns), dtype=torch.int64),
    )


@torch.library.register_fake("oss::dp_cost", lib=library)
def _fake_dp_cost(
    state: Tensor,
    velocity: Tensor,
    teacher: Tensor,
    times: Tensor,
    *,
    source_mask: Tensor | None = None,
) -> Tensor:
    checks.check_step("dp_cost", state, velocity, teacher, times, source_mask)
    rows, samples = state.shape[:2]
    return state.new_empty((rows, rows, samples), dtype=torch.float64)


@torch.library.register_fake("oss::dp_select", lib=library)
def _fake_dp_select(cost: Tensor, reduce: str = "none") -> tuple[Tensor, Tensor]:
    checks.check_reduce("dp_select", reduce)
    checks.check_costs("dp_select", cost)
    rows, samples = cost.shape[1:]
    columns = samples if reduce == "none" else 1
    return cost.new_empty((rows, samples)), cost.new_empty((rows, columns), dtype=torch.int64)


@torch.library.register_fake("oss::dp_advance", lib=library)
def _fake_dp_advance(state: Tensor, velocity: Tensor, times: Tensor, parent: Tensor) -> Tensor:
    checks.check_state("dp_advance", state, times)
    checks.check_velocity("dp_advance", "velocity", velocity, state, state.shape[0])
    checks.check_parent("dp_advance", parent, state)
    return state.new_empty(state.shape)


@torch.library.register_fake("oss::dp_accumulate_", lib=library)
def _fake_dp_accumulate_(
    state: Tensor,
    velocity_chunk: Tensor,
    first_source: int,
    teacher: Tensor,
    times: Tensor,
    best_cost: Tensor,
    best_parent: Tensor,
    *,
    source_mask: Tensor | None = None,
    reduce: str = "none",
) -> None:
    checks.check_accumulate(
        "dp_accumulate_", state, velocity_chunk, first_source, teacher, times, best_cost,
        best_parent, source_mask, reduce,
    )  # fmt: skip


@torch.library.register_fake("oss::dp_argmin_", lib=library)
def _fake_dp_argmin_(*args: Any, **kwargs: Any) -> None:
    checks.check_argmin("dp_argmin_", *args, **kwargs)


@torch.library.register_fake("oss::dp_combine", lib=library)
def _fake_dp_combine(basis: list[Tensor], index: Tensor, coefficients: Tensor) -> Tensor:
    checks.check_combine("dp_combine", basis, index, coefficients)
    return basis[0].new_empty((index.shape[1], *basis[0].shape[1:]))
