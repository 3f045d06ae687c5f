"""The operators ``torch.ops.oss.*``: their schemas, argument checks and fake kernels, once.

Backends register implementations for these schemas; none of them repeats a schema. The contract
of each operator is in the docstrings of ``oss_ext.ops``, which is also the public way to call it.

Layout shared by all of them: ``state``, ``velocity`` and ``teacher`` are ``[N+1, B, *dims]``,
time-major, index 0 the clean end; ``times`` is ``[N+1]`` float64, strictly increasing; source
masks are bool ``[N+1]`` or ``[N+1, B]``. The checks raise ``RuntimeError``, as the native ones do.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "log_mean")
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
LOG_FLOOR = 2.0**-126  # the smallest normal float32: log_mean must not see log(0)

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
}

library = torch.library.Library("oss", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)


def expect(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    """Raise the one form that argument errors have: operator, argument, expectation, fact."""
    if not condition:
        raise RuntimeError(f"{op}: {name}: expected {expected}, got {got}")


def _is(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def check_reduce(op: str, reduce: str) -> None:
    expect(reduce in REDUCTIONS, op, "reduce", f"one of {REDUCTIONS}", repr(reduce))


def check_state(op: str, state: Tensor, times: Tensor) -> None:
    """The state and the times that go with its rows."""
    known = ", ".join(str(dtype) for dtype in STATE_DTYPES)
    expect(state.dtype in STATE_DTYPES, op, "state", f"one of {known}", state.dtype)
    shaped = state.dim() >= 2 and state.shape[0] >= 2 and state.numel() > 0
    expect(shaped, op, "state", "[N+1, B, *dims] with N, B and D at least 1", _is(state))
    rows = state.shape[0]
    expect(
        times.dtype == torch.float64 and times.shape == (rows,) and times.device == state.device,
        op, "times", f"float64 of shape ({rows},) on {state.device}", _is(times),
    )  # fmt: skip


def check_like_state(op: str, name: str, tensor: Tensor, state: Tensor, rows: int) -> None:
    """``tensor`` has ``rows`` time rows, and state's device and remaining shape."""
    shape = (rows, *state.shape[1:])
    expect(
        tuple(tensor.shape) == shape and tensor.device == state.device,
        op, name, f"shape {shape} on {state.device}, as state", _is(tensor),
    )  # fmt: skip


def check_velocity(op: str, name: str, velocity: Tensor, state: Tensor, rows: int) -> None:
    check_like_state(op, name, velocity, state, rows)
    mixed = state.dtype == torch.float32 and velocity.dtype in HALF_DTYPES
    expected = f"{state.dtype} as state (a 16-bit type is allowed beside a float32 state)"
    expect(velocity.dtype == state.dtype or mixed, op, name, expected, velocity.dtype)


def check_teacher(op: str, teacher: Tensor, state: Tensor) -> None:
    check_like_state(op, "teacher", teacher, state, state.shape[0])
    same = teacher.dtype == state.dtype
    expect(same, op, "teacher", f"{state.dtype} as state", teacher.dtype)


def check_mask(op: str, source_mask: Tensor | None, state: Tensor) -> None:
    if source_mask is None:
        return
    rows, samples = state.shape[:2]
    expect(
        source_mask.dtype == torch.bool
        and tuple(source_mask.shape) in ((rows,), (rows, samples))
        and source_mask.device == state.device,
        op, "source_mask", f"bool of shape ({rows},) or ({rows}, {samples}) on {state.device}",
        _is(source_mask),
    )  # fmt: skip


def check_parent(op: str, parent: Tensor, state: Tensor) -> None:
    rows, samples = state.shape[:2]
    expect(
        parent.dtype == torch.int64
        and tuple(parent.shape) in ((rows, 1), (rows, samples))
        and parent.device == state.device,
        op, "parent", f"int64 of shape ({rows}, {samples}) or ({rows}, 1) on {state.device}",
        _is(parent),
    )  # fmt: skip


def check_step(
    op: str,
    state: Tensor,
    velocity: Tensor,
    teacher: Tensor,
    times: Tensor,
    source_mask: Tensor | None,
) -> None:
    check_state(op, state, times)
    check_velocity(op, "velocity", velocity, state, state.shape[0])
    check_teacher(op, teacher, state)
    check_mask(op, source_mask, state)


def check_costs(op: str, cost: Tensor) -> None:
    square = cost.dim() == 3 and cost.shape[0] == cost.shape[1] >= 2 and cost.shape[2] >= 1
    expected = "float64 [N+1, N+1, B] (source, target, sample)"
    expect(cost.dtype == torch.float64 and square, op, "cost", expected, _is(cost))


def check_accumulate(
    op: str,
    state: Tensor,
    velocity_chunk: Tensor,
    first_source: int,
    teacher: Tensor,
    times: Tensor,
    best_cost: Tensor,
    best_parent: Tensor,
    source_mask: Tensor | None,
    reduce: str,
) -> None:
    check_reduce(op, reduce)
    check_state(op, state, times)
    rows, samples = state.shape[:2]
    filled = velocity_chunk.dim() == state.dim() and velocity_chunk.shape[0] >= 1
    expected = "[C, B, *dims] with C at least 1"
    expect(filled, op, "velocity_chunk", expected, _is(velocity_chunk))
    chunk = velocity_chunk.shape[0]
    check_velocity(op, "velocity_chunk", velocity_chunk, state, chunk)
    check_teacher(op, teacher, state)
    check_mask(op, source_mask, state)
    expect(
        first_source >= 1 and first_source + chunk <= rows,
        op, "first_source", f"sources within 1 to {rows - 1}",
        f"{first_source} to {first_source + chunk - 1}",
    )  # fmt: skip
    for name, tensor in (("state", state), ("best_cost", best_cost), ("best_parent", best_parent)):
        shared = any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        expected = "memory of its own for every element, as it is written in place"
        expect(not shared, op, name, expected, f"strides {tensor.stride()}")
    for name, tensor, dtype, shape in (
        ("best_cost", best_cost, torch.float64, (rows, samples)),
        ("best_parent", best_parent, torch.int64, (rows, samples if reduce == "none" else 1)),
    ):
        expect(
            tensor.dtype == dtype and tuple(tensor.shape) == shape
            and tensor.device == state.device,
            op, name, f"{dtype} of shape {shape} on {state.device} (reduce={reduce!r})",
            _is(tensor),
        )  # fmt: skip


# Checks of values. On a GPU each would cost a synchronisation.


def check_times(op: str, times: Tensor) -> None:
    increasing = bool(times.isfinite().all()) and bool((times.diff() > 0).all())
    expect(increasing, op, "times", "finite, strictly increasing values", times.tolist())


def check_parent_values(op: str, parent: Tensor) -> None:
    rows = len(parent)
    target_of = torch.arange(rows, device=parent.device)[:, None]
    valid = bool(((parent == -1) | ((parent > target_of) & (parent < rows))).all())
    expected = f"-1 or a source above the target and at most {rows - 1}"
    expect(valid, op, "parent", expected, parent.tolist())


def check_chunk_order(op: str, best_parent: Tensor, first_source: int) -> None:
    reached = int(best_parent.max())
    expected = f"chunks in ascending order, so above {reached}"
    expect(reached < first_source, op, "first_source", expected, first_source)


def cost_dtype(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32


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
    check_reduce("dp_step", reduce)
    check_step("dp_step", state, velocity, teacher, times, source_mask)
    rows, samples = state.shape[:2]
    columns = samples if reduce == "none" else 1
    return (
        state.new_empty(state.shape),
        state.new_empty((rows, samples), dtype=cost_dtype(state)),
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
    check_step("dp_cost", state, velocity, teacher, times, source_mask)
    rows, samples = state.shape[:2]
    return state.new_empty((rows, rows, samples), dtype=torch.float64)


@torch.library.register_fake("oss::dp_select", lib=library)
def _fake_dp_select(cost: Tensor, reduce: str = "none") -> tuple[Tensor, Tensor]:
    check_reduce("dp_select", reduce)
    check_costs("dp_select", cost)
    rows, samples = cost.shape[1:]
    columns = samples if reduce == "none" else 1
    return cost.new_empty((rows, samples)), cost.new_empty((rows, columns), dtype=torch.int64)


@torch.library.register_fake("oss::dp_advance", lib=library)
def _fake_dp_advance(state: Tensor, velocity: Tensor, times: Tensor, parent: Tensor) -> Tensor:
    check_state("dp_advance", state, times)
    check_velocity("dp_advance", "velocity", velocity, state, state.shape[0])
    check_parent("dp_advance", parent, state)
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
    check_accumulate(
        "dp_accumulate_", state, velocity_chunk, first_source, teacher, times, best_cost,
        best_parent, source_mask, reduce,
    )  # fmt: skip
