"""Checks of the operators' arguments, shared by all that Python implements.

Layout shared by all of them: ``state``, ``velocity`` and ``teacher`` are ``[N+1, B, *dims]``,
time-major, index 0 the clean end; ``times`` is ``[N+1]`` float64, strictly increasing; source
masks are bool ``[N+1]`` or ``[N+1, B]``; ``basis`` is a list of ``[rows, B, *dims]``. The checks
raise ``RuntimeError``, as the native ones do.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "log_mean")
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
MAX_TERMS = 6
MAX_ORDERS = 4
LOG_FLOOR = 2.0**-126  # the smallest normal float32: log_mean must not see log(0)


def expect(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    """Raise the one form that argument errors have: operator, argument, expectation, fact."""
    if not condition:
        raise RuntimeError(f"{op}: {name}: expected {expected}, got {got}")


def _is(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def check_reduce(op: str, reduce: str) -> None:
    expect(reduce in REDUCTIONS, op, "reduce", f"one of {REDUCTIONS}", repr(reduce))


def check_rows(op: str, name: str, tensor: Tensor, least: int) -> None:
    """``tensor`` is ``[rows, B, *dims]``, with so many rows at least."""
    known = ", ".join(str(dtype) for dtype in STATE_DTYPES)
    expect(tensor.dtype in STATE_DTYPES, op, name, f"one of {known}", tensor.dtype)
    shaped = tensor.dim() >= 2 and tensor.shape[0] >= least and tensor.numel() > 0
    rows = "N+1" if least == 2 else "rows"
    expected = f"[{rows}, B, *dims] with {'N, ' if least == 2 else ''}B and D at least 1"
    expect(shaped, op, name, expected, _is(tensor))


def check_state(op: str, state: Tensor, times: Tensor) -> None:
    """The state and the times that go with its rows."""
    check_rows(op, "state", state, 2)
    rows = state.shape[0]
    expect(
        times.dtype == torch.float64 and times.shape == (rows,) and times.device == state.device,
        op, "times", f"float64 of shape ({rows},) on {state.device}", _is(times),
    )  # fmt: skip


def check_like(
    op: str, name: str, tensor: Tensor, rows: int, main: Tensor, main_name: str = "state"
) -> None:
    """``tensor`` has ``rows`` time rows, and main's device and remaining shape."""
    shape = (rows, *main.shape[1:])
    expect(
        tuple(tensor.shape) == shape and tensor.device == main.device,
        op, name, f"shape {shape} on {main.device}, as {main_name}", _is(tensor),
    )  # fmt: skip


def check_dtype_beside(
    op: str, name: str, tensor: Tensor, main: Tensor, main_name: str = "state"
) -> None:
    """``tensor`` has main's dtype, or a 16-bit one beside float32."""
    mixed = main.dtype == torch.float32 and tensor.dtype in HALF_DTYPES
    expected = f"{main.dtype} as {main_name} (a 16-bit type is allowed beside float32)"
    expect(tensor.dtype == main.dtype or mixed, op, name, expected, tensor.dtype)


def check_velocity(op: str, name: str, velocity: Tensor, state: Tensor, rows: int) -> None:
    check_like(op, name, velocity, rows, state)
    check_dtype_beside(op, name, velocity, state)


def check_teacher(op: str, teacher: Tensor, state: Tensor) -> None:
    check_like(op, "teacher", teacher, state.shape[0], state)
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
    rows = state.shape[0]
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
    check_own_memory(op, state=state)
    check_best(op, state, reduce, best_cost, best_parent=best_parent)


def check_own_memory(op: str, **written: Tensor) -> None:
    for name, tensor in written.items():
        shared = any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        expected = "memory of its own for every element, as it is written in place"
        expect(not shared, op, name, expected, f"strides {tensor.stride()}")


def check_best(op: str, main: Tensor, reduce: str, best_cost: Tensor, **numbers: Tensor) -> None:
    """The running best of an operator that is called for one chunk of sources after another."""
    rows, samples = main.shape[:2]
    columns = samples if reduce == "none" else 1
    check_own_memory(op, best_cost=best_cost, **numbers)
    for name, tensor, dtype, shape in (
        ("best_cost", best_cost, torch.float64, (rows, samples)),
        *((name, tensor, torch.int64, (rows, columns)) for name, tensor in numbers.items()),
    ):
        expect(
            tensor.dtype == dtype and tuple(tensor.shape) == shape
            and tensor.device == main.device,
            op, name, f"{dtype} of shape {shape} on {main.device} (reduce={reduce!r})",
            _is(tensor),
        )  # fmt: skip


def check_basis(op: str, basis: list[Tensor], main: Tensor, main_name: str) -> None:
    """Tensors ``[rows, B, *dims]`` like ``main``, the first of its dtype."""
    for r, tensor in enumerate(basis):
        name = f"basis[{r}]"
        check_rows(op, name, tensor, 1)
        check_like(op, name, tensor, tensor.shape[0], main, main_name)
        if r == 0:
            same = tensor.dtype == main.dtype
            expect(same, op, name, f"{main.dtype} as {main_name}", tensor.dtype)
        check_dtype_beside(op, name, tensor, main, main_name)


def check_count(op: str, basis: list[Tensor]) -> None:
    expected = f"1 to {MAX_TERMS} tensors"
    expect(1 <= len(basis) <= MAX_TERMS, op, "basis", expected, len(basis))


def _check_index(op: str, index: Tensor, main: Tensor, terms: int, what: str) -> int:
    """``index`` is ``[terms, what, B]``; gives the size in the middle."""
    samples = main.shape[1]
    expect(
        index.dtype == torch.int64 and index.dim() == 3 and index.shape[1] >= 1
        and index.shape[0] == terms and index.shape[2] == samples and index.device == main.device,
        op, "index", f"int64 of shape ({terms}, {what}, {samples}) on {main.device}", _is(index),
    )  # fmt: skip
    return index.shape[1]


def check_argmin(
    op: str,
    basis: list[Tensor],
    index: Tensor,
    coefficients: Tensor,
    terms: list[int],
    first_source: int,
    target: Tensor,
    best_cost: Tensor,
    best_parent: Tensor,
    best_order: Tensor,
    source_mask: Tensor | None = None,
    reduce: str = "none",
) -> None:
    check_reduce(op, reduce)
    check_count(op, basis)
    check_rows(op, "target", target, 2)
    check_basis(op, basis, target, "target")
    rows, samples = target.shape[:2]
    orders, most = len(terms), len(basis)
    expect(1 <= orders <= MAX_ORDERS, op, "terms", f"1 to {MAX_ORDERS} orders", terms)
    within = all(1 <= n <= most for n in terms)
    expect(within, op, "terms", f"numbers from 1 to {most}, the size of basis", terms)
    chunk = _check_index(op, index, target, most, "C")
    expect(
        first_source >= 1 and first_source + chunk <= rows,
        op, "first_source", f"sources within 1 to {rows - 1}",
        f"{first_source} to {first_source + chunk - 1}",
    )  # fmt: skip
    shape = (orders, most, chunk, rows)
    expect(
        coefficients.dtype == torch.float64
        and tuple(coefficients.shape) in ((*shape, samples), (*shape, 1))
        and coefficients.device == target.device,
        op, "coefficients", f"float64 of shape {(*shape, samples)} or {(*shape, 1)} "
        f"on {target.device}", _is(coefficients),
    )  # fmt: skip
    check_mask(op, source_mask, target)
    check_best(op, target, reduce, best_cost, best_parent=best_parent, best_order=best_order)


def check_combine(op: str, basis: list[Tensor], index: Tensor, coefficients: Tensor) -> None:
    check_count(op, basis)
    check_rows(op, "basis[0]", basis[0], 1)
    check_basis(op, basis, basis[0], "basis[0]")
    _check_index(op, index, basis[0], len(basis), "T")
    expect(
        coefficients.dtype == torch.float64 and coefficients.shape == index.shape
        and coefficients.device == index.device,
        op, "coefficients", f"float64 of shape {tuple(index.shape)} on {index.device}, as index",
        _is(coefficients),
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


def check_candidates(
    op: str,
    basis: list[Tensor],
    index: Tensor,
    coefficients: Tensor,
    terms: list[int],
    first_source: int,
    live: Tensor,
) -> None:
    """What ``live`` sources ([C, B]) use: ``index`` within the basis, finite ``coefficients``."""
    sources = first_source + torch.arange(index.shape[1], device=index.device)
    below = torch.arange(coefficients.shape[3], device=index.device) < sources[:, None]
    there = ~coefficients[:, 0].isnan() & below[:, :, None] & live[:, None]
    for o, count in enumerate(terms):
        for r in range(count):
            for c, b in (there[o].any(dim=1) & ~within(index[r], basis[r])).nonzero()[:1].tolist():
                expected = f"a row of basis[{r}] where order {o} has a candidate for "
                expected += f"source {first_source + c} of sample {b}"
                expect(False, op, "index", expected, int(index[r, c, b]))
            values = coefficients[o, r].expand(there[o].shape)
            for c, j, b in (there[o] & ~values.isfinite()).nonzero()[:1].tolist():
                expected = f"a number for order {o}, term {r}, source {first_source + c}, "
                expected += f"target {j} and sample {b} (NaN in term 0: no candidate)"
                expect(False, op, "coefficients", expected, float(values[c, j, b]))


def within(index: Tensor, tensor: Tensor) -> Tensor:
    return (index >= 0) & (index < tensor.shape[0])


def check_terms(op: str, basis: list[Tensor], index: Tensor, coefficients: Tensor) -> None:
    """The values that ``dp_combine`` uses."""
    for r, tensor in enumerate(basis):
        valid = bool(((index[r] == -1) | within(index[r], tensor)).all())
        expected = f"-1 or a row of basis[{r}], at most {tensor.shape[0] - 1}"
        expect(valid, op, "index", expected, index[r].tolist())
    finite = bool(((index == -1) | coefficients.isfinite()).all())
    expect(finite, op, "coefficients", "numbers where a term is used", coefficients.tolist())


def cost_dtype(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32
