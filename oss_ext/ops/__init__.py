"""The fused dynamic-programming step and its pieces, on any backend.

Every function here calls ``torch.ops.oss.<name>``, which the dispatcher sends to the fastest
kernel that is registered for the tensors' device, or the reference on cards that are too old for
the kernels; ``backend="<name>"`` calls one backend directly and raises ``RuntimeError`` with its
reason when it cannot serve.

Notation, as in the paper's Algorithm 1: ``z`` = state, ``v`` = velocity, ``x`` = teacher,
``t`` = times, ``i`` = source row, ``j < i`` = target row, index 0 the clean end. Tensors are
``[N+1, B, *dims]``: time rows, samples, any trailing dims of D elements. state and teacher are
float32, float64, bfloat16 or float16 and alike; velocity too, or 16-bit beside a float32 state.
``times`` is ``[N+1]`` float64, strictly increasing and finite. All sit on one device.

Bad arguments raise ``RuntimeError`` naming the argument, what was expected and what came. The
values of times and of parents are checked on the CPU; elsewhere that would cost a
synchronisation, and bad values are undefined behaviour.

They have no derivatives, as an argmin has none, and autograd does not see that the operators which
end in an underscore have changed a tensor: call them without gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oss_ext.ops import checks, native, reference, schema, triton
from oss_ext.ops.backend import Backend, too_old

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (native.BACKEND, triton.BACKEND, reference.BACKEND)
}
"""Every backend by name, fastest first: the order in which the dispatcher prefers them."""


def serving(device: torch.device | str = "cpu", op: str = "dp_step") -> Backend:
    """The backend that the function ``op`` uses for tensors on ``device``."""
    device = torch.device(device)
    return next(b for b in BACKENDS.values() if b.why_not_call(op, device) is None)


_serving_card = functools.cache(serving)  # a card does not change, and asking takes time


def _first(args: tuple[Any, ...]) -> Tensor:
    """The tensor that says where a call runs."""
    head = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
    return head if isinstance(head, Tensor) else args[1]


def _on_cuda(op: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _serving_card(_first(args).device, op).operators[op](*args, **kwargs)

    return kernel


# Registering twice would replace the native kernels without a word. What serves depends on the
# card, and is only asked when a tensor comes from one.
for _name in schema.SCHEMAS:
    if not native.build_info().get("cuda"):
        schema.library.impl(_name, _on_cuda(_name), "CUDA")


def _call(op: str, backend: str | None, *args: Any, **kwargs: Any) -> Any:
    for position, value in enumerate(args):
        if value is None:  # which torch lets through as a tensor
            missing = getattr(torch.ops.oss, op).default._schema.arguments[position]
            checks.expect(False, op, missing.name, str(missing.type), "None")
    if backend is None:
        # The dispatcher knows native kernels for every card, also for one that cannot run them.
        first, eager = _first(args), not torch.compiler.is_compiling()
        if eager and isinstance(first, Tensor) and too_old(first.device):
            return reference.BACKEND.operators[op](*args, **kwargs)
        return getattr(torch.ops.oss, op)(*args, **kwargs)
    known = ", ".join(BACKENDS)
    checks.expect(backend in BACKENDS, op, "backend", f"one of {known}", repr(backend))
    chosen, device = BACKENDS[backend], _first(args).device
    reason = chosen.why_not_call(op, device)
    if reason is not None:
        able = ", ".join(n for n, b in BACKENDS.items() if b.why_not_call(op, device) is None)
        expected = f"one that can serve {device} ({able})"
        checks.expect(False, op, "backend", expected, f"{backend!r}: {reason}")
    return chosen.operators[op](*args, **kwargs)


def dp_step(
    state: Tensor,
    velocity: Tensor,
    teacher: Tensor,
    times: Tensor,
    *,
    source_mask: Tensor | None = None,
    reduce: str = "none",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Algorithm 1 for all (source, target) pairs, fused (paper Eq. 9 to 11).

        cost[i, j] = mean over elements of (z[i] + (t[j] - t[i]) v[i] - x[j])^2,  live i > j
        r[j]       = argmin_i cost[i, j]
        next[j]    = z[r[j]] + (t[j] - t[r[j]]) v[r[j]]

    Arithmetic is float32 (float64 for float64 inputs) with ``t[j] - t[i]`` subtracted in float64
    and rounded once; sums are float32 within a fixed block of elements and float64 across blocks,
    so the bits do not depend on the number of threads. Nothing of size N x N x D or N x D is
    allocated beside ``next_state``. Against the float64 reference a cost differs by at most
    ``1e-5 ref + 2 sqrt(ref) d + d^2`` with ``d = 4 u rms(|z| + |v| + |x|)``, ``u = 2^-24``
    (float64: 1e-12 and ``2^-53``), and by ``2^-120`` where squares underflow; parents differ only
    where two costs are that close. A cost is inf where a sum of squares, of some hundred elements,
    passes the largest number of the compute type.

    Args:
        state, velocity, teacher: ``[N+1, B, *dims]``, any strides.
        times: ``[N+1]`` float64.
        source_mask: bool ``[N+1]`` or ``[N+1, B]``, which sources are live. Row 0 never is;
            velocity rows that are not live count for nothing, whatever they hold.
        reduce: ``"none"``: a parent per sample. ``"mean"``, ``"log_mean"``: one parent for the
            batch, by ``mean_b cost_b`` or ``mean_b log(max(cost_b, 2^-126))``; a source then
            counts for a target only if live and its cost finite in every sample.
        backend: a name in ``BACKENDS``; None lets the dispatcher choose.

    Returns:
        ``next_state`` ``[N+1, B, *dims]`` of state's dtype; ``cost`` ``[N+1, B]``, the winner's
        own mean per sample, float32 (float64 for float64 inputs), inf where there is none;
        ``parent`` int64 ``[N+1, B]``, or ``[N+1, 1]`` with a reduction. Ties go to the largest
        source; NaN and inf never win. A target without a live finite source has parent -1 and
        keeps state's row: mask it as a source of the next step (``parent >= 0``).
    """
    return _call(
        "dp_step", backend, state, velocity, teacher, times,
        source_mask=source_mask, reduce=reduce,
    )  # fmt: skip


def dp_cost(
    state: Tensor,
    velocity: Tensor,
    teacher: Tensor,
    times: Tensor,
    *,
    source_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The costs that ``dp_step`` compares: ``[N+1, N+1, B]`` float64 (source, target, sample).

    Inf where the source is not live or not above the target; otherwise the mean as computed,
    which may be NaN or inf. Arguments as in ``dp_step``.
    """
    return _call("dp_cost", backend, state, velocity, teacher, times, source_mask=source_mask)


def dp_select(
    cost: Tensor, reduce: str = "none", *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The argmin of ``dp_step`` over costs ``[N+1, N+1, B]`` float64, e.g. joined from shards.

    Returns ``best_cost`` ``[N+1, B]`` float64, the winner's own cost per sample, and ``parent``
    as ``dp_step`` does. ``reduce`` runs over samples in index order.
    """
    return _call("dp_select", backend, cost, reduce)


def dp_advance(
    state: Tensor,
    velocity: Tensor,
    times: Tensor,
    parent: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Move every target from its parent: ``z[r] + (t[j] - t[r]) v[r]``, ``[N+1, B, *dims]``.

    ``parent`` is int64 ``[N+1, B]`` or ``[N+1, 1]``; a row with parent -1 keeps state's row.
    """
    return _call("dp_advance", backend, state, velocity, times, parent)


def dp_accumulate_(
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
    backend: str | None = None,
) -> None:
    """``dp_step`` in place, for velocities that come in chunks of sources and never all at once.

    Chunks hold the full batch and come in ascending source order (anything else raises): source
    ``i`` writes rows below ``i`` only, which no later source reads. After the last chunk
    ``state`` is ``dp_step``'s ``next_state`` and ``best_cost``, ``best_parent`` its cost (before
    rounding) and parent, bit for bit.

    Args:
        state: ``[N+1, B, *dims]``, updated in place; the elements of each [row, sample] must be
            contiguous, and no part of its memory may lie within that of another argument.
        velocity_chunk: ``[C, B, *dims]``, sources ``first_source .. first_source + C - 1``.
        best_cost: ``[N+1, B]`` float64, inf before the first chunk; updated in place.
        best_parent: int64 ``[N+1, B]``, or ``[N+1, 1]`` with a reduction, -1 before the first
            chunk; updated in place.
        source_mask, reduce: as in ``dp_step``, for all N+1 sources.
    """
    _call(
        "dp_accumulate_", backend, state, velocity_chunk, first_source, teacher, times,
        best_cost, best_parent, source_mask=source_mask, reduce=reduce,
    )  # fmt: skip


def dp_argmin_(
    basis: list[Tensor],
    index: Tensor,
    coefficients: Tensor,
    terms: list[int],
    first_source: int,
    target: Tensor,
    best_cost: Tensor,
    best_parent: Tensor,
    best_order: Tensor,
    *,
    source_mask: Tensor | None = None,
    reduce: str = "none",
    backend: str | None = None,
) -> None:
    """The argmin over (order, source) of candidates of any affine form (paper Algorithm 2).

        candidate[o, i, j] = sum_{r < terms[o]} c[o, r, i, j] basis[r][index[r, i]]
        cost[o, i, j] = mean over elements of (candidate[o, i, j] - target[j])^2,  live i > j

    Each order is a way to step that the search may choose anew for every pair: Euler's terms are
    the state and the velocity, those of a multistep solver reach back to earlier outputs, whose
    rows depend on the source's own history. Sources come in chunks, as in ``dp_accumulate_``, but
    nothing is moved: ``dp_combine`` does that.

    Arithmetic, error model and reductions are those of ``dp_step``, whose costs and parents result
    bit for bit from the terms ``1 * state + (t[j] - t[i]) * velocity``; with ``d = 4 u rms(sum_r
    |c[r] basis[r]| + |target|)``. Coefficients are rounded once to the compute type. Nothing of
    size N x N x D or N x D is allocated.

    Args:
        basis: R = 1 to 6 tensors ``[rows, B, *dims]``, any strides, any number of rows. The first
            has target's dtype, the others too or are 16-bit beside float32.
        index: int64 ``[R, C, B]``: which row of ``basis[r]`` is a term of source ``first_source +
            c`` in sample b. -1: it has no such term, and no order that uses it a candidate.
        coefficients: float64 ``[O, R, C, N+1, B]``, or ``[O, R, C, N+1, 1]`` for all samples, for
            O = 1 to 4 orders. NaN in term 0: there is no such candidate. Otherwise finite (checked
            on the CPU), but for what counts for nothing: targets not below the source, terms that
            the order does not use, sources that are not live.
        terms: for every order, how many of the terms it uses.
        first_source: the chunk holds sources ``first_source .. first_source + C - 1``.
        target: ``[N+1, B, *dims]``.
        best_cost: ``[N+1, B]`` float64, inf before the first chunk; updated in place.
        best_parent, best_order: int64 ``[N+1, B]``, or ``[N+1, 1]`` with a reduction, -1 before
            the first chunk; updated in place, and so in memory of their own. The source that won,
            and its order.
        source_mask, reduce: as in ``dp_step``. With a reduction, a source's order counts for a
            target only if it has a finite candidate there in every sample.

    Ties go to the largest source, then to the lowest order; NaN and inf never win. Rows of a basis
    that belong to sources that are not live count for nothing, whatever they hold.
    """
    _call(
        "dp_argmin_", backend, basis, index, coefficients, terms, first_source, target, best_cost,
        best_parent, best_order, source_mask=source_mask, reduce=reduce,
    )  # fmt: skip


def dp_combine(
    basis: list[Tensor], index: Tensor, coefficients: Tensor, *, backend: str | None = None
) -> Tensor:
    """``out[j] = sum_r c[r, j] basis[r][index[r, j]]``, ``[T, B, *dims]`` of basis[0]'s dtype.

    With the winners' rows and coefficients it gives the candidates that ``dp_argmin_`` compared,
    rounded once. ``basis`` is as there.

    Args:
        index: int64 ``[R, T, B]``; -1 leaves the term out, and a target without terms is zero.
        coefficients: ``[R, T, B]`` float64, finite where the term is used.
    """
    return _call("dp_combine", backend, basis, index, coefficients)
