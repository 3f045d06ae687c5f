"""The Triton kernels of ``oss_ext.ops.triton``, which says what they are launched for.

Importing this file imports triton, so only ``oss_ext.ops.triton`` does, and only at its first
call. ``z``, ``v``, ``x``, ``t``, ``i`` and ``j`` are as in ``oss_ext.ops``.

Bits depend on nothing but the inputs. Products and sums are rounded where they are written: fused
operations are written out, and all launches forbid others. A sum over the lanes of a tile adds
the lanes in pairs, whatever threads hold them, because the compiler chooses the layout of a tile
by alignment, strides and number of warps.

A tensor ``[rows, samples, *dims]`` is a pointer and the strides (row, sample, *dims); ``sizes``
are those of dims, which the host has merged where it could.
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(32)
"""Elements of a tile, each summed in a lane of its own."""

BLOCK: tl.constexpr = tl.constexpr(2048)
"""Elements whose squares are summed in the compute type, 64 in a lane; float64 beyond."""

CONFIGS = [
    triton.Config({"SOURCES": 8, "TARGETS": 32}, num_warps=8),
    triton.Config({"SOURCES": 8, "TARGETS": 16}, num_warps=4),
    triton.Config({"SOURCES": 4, "TARGETS": 32}, num_warps=4),
    triton.Config({"SOURCES": 4, "TARGETS": 16}, num_warps=4),
]
"""The tiles of pairs that are tried: larger ones read less, smaller ones leave room for more
programs. They change no bit, because every pair has sums of its own."""

INTERPRETED = [triton.Config({"SOURCES": 8, "TARGETS": 64})]
"""The interpreter takes the same time for any number of targets."""


@triton.jit
def offsets_of(e, sizes, a, b, c):
    """Where elements ``e`` lie within rows with the strides a, b and c (row, sample, *dims)."""
    last: tl.constexpr = len(sizes) - 1
    at_a, at_b, at_c = e * 0, e * 0, e * 0
    for k in tl.static_range(last):
        along = e % sizes[last - k]
        at_a += along * a[2 + last - k]
        at_b += along * b[2 + last - k]
        at_c += along * c[2 + last - k]
        e = e // sizes[last - k]
    return at_a + e * a[2], at_b + e * b[2], at_c + e * c[2]


@triton.jit
def lanes_sums(parts):
    """S tuples of ``[T, LANES]`` -> ``[T, S]``, every sum over the lanes the same tree."""
    targets: tl.constexpr = parts[0].shape[0]
    sources: tl.constexpr = len(parts)
    for _ in tl.static_range(3):  # halves beside each other, until there is one of 8 or of 4
        if len(parts) > 1:  # known to the compiler
            joined = ()
            for k in tl.static_range(len(parts) // 2):
                joined = joined + (tl.join(parts[k], parts[k + len(parts) // 2]),)
            parts = joined
    x = parts[0]
    for k in tl.static_range(1, 6):
        x = tl.sum(tl.reshape(x, (targets, 2, LANES >> k, sources)), axis=1)
    return tl.reshape(x, (targets, sources))


@triton.autotune(
    INTERPRETED if triton.knobs.runtime.interpret else CONFIGS,
    key=["splits"],
    cache_results=True,
)
@triton.jit(
    do_not_specialize=["first", "stop", "splits", "elements"],
    # Wider loads would put neighbouring elements into one thread, and targets across lanes.
    do_not_specialize_on_alignment=["state_strides", "velocity_strides", "teacher_strides"],
)
def pair_sums(
    sums, state, velocity, teacher, times, live, wanted,
    state_strides, velocity_strides, teacher_strides, live_strides, sizes,
    first, stop, splits, elements,
    EVEN: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """Sums of squared differences of one split of the elements, for a tile of pairs.

    Writes ``sums`` [samples, splits, stop - first, stop - 1] float64 for sources first .. stop - 1
    and the targets below each. Tiles in which no source is ``live`` are left out, and, if
    ``wanted`` is given ([targets] sources), those that hold no (wanted[j], j).

    Sources are taken one by one, in tuples, and targets along an axis: so every load has the
    layout of the sums, warps along the targets and lanes along the elements, and none has to be
    exchanged between threads.
    """
    width = stop - 1
    across = (width + TARGETS - 1) // TARGETS
    source = first + tl.program_id(0) // across * SOURCES
    target = tl.program_id(0) % across * TARGETS
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    i = source + tl.arange(0, SOURCES).to(tl.int64)
    j = target + tl.arange(0, TARGETS).to(tl.int64)
    needed = (i < stop) & (i > target)
    needed &= tl.load(live + i * live_strides[0] + sample * live_strides[1], needed, other=0) != 0
    if wanted is not None:
        best = tl.load(wanted + j, mask=j < width, other=-1)
        needed &= tl.max((i[:, None] == best[None, :]).to(tl.int32), axis=1) != 0
    if tl.max(needed.to(tl.int32), axis=0) == 0:
        return

    # Rows past the end are computed as the last one and not written.
    row = tl.minimum(j, width - 1)[:, None]
    teacher += sample * teacher_strides[1] + row * teacher_strides[0]
    sums += (sample * splits + split) * (stop - first) * width
    cell = sums + (i[None, :] - first) * width + j[:, None]
    written = (i[None, :] < stop) & (j[:, None] < i[None, :])
    compute: tl.constexpr = tl.float64 if state.dtype.element_ty == tl.float64 else tl.float32
    t = tl.load(times + row)
    dt = ()
    z_row = ()
    v_row = ()
    for s in tl.static_range(SOURCES):
        k = tl.minimum(source + s, stop - 1).to(tl.int64)
        dt = dt + ((t - tl.load(times + k)).to(compute),)
        z_row = z_row + (state + sample * state_strides[1] + k * state_strides[0],)
        v_row = v_row + (
            velocity + sample * velocity_strides[1] + (k - first) * velocity_strides[0],
        )
    lane = tl.arange(0, LANES).to(tl.int64)[None, :]
    blocks = (elements + BLOCK - 1) // BLOCK + tl.full((), 0, tl.int64)
    first_block = blocks * split // splits
    for block in range(first_block, blocks * (split + 1) // splits):
        partial = ()
        for _ in tl.static_range(SOURCES):
            partial = partial + (tl.full((TARGETS, LANES), 0, compute),)
        begin = block * BLOCK
        end = tl.minimum(begin + BLOCK, elements)
        for e0 in range(begin, end, LANES):
            e = e0 + lane
            inside = (e < elements) | EVEN
            at_z, at_v, at_x = offsets_of(
                e, sizes, state_strides, velocity_strides, teacher_strides
            )
            x = tl.load(teacher + at_x, mask=inside, other=0).to(compute)
            added = ()
            for s in tl.static_range(SOURCES):
                z = tl.load(z_row[s] + at_z, mask=inside, other=0).to(compute)
                v = tl.load(v_row[s] + at_v, mask=inside, other=0).to(compute)
                off = tl.fma(dt[s], v, z) - x
                added = added + (tl.fma(off, off, partial[s]),)
            partial = added
        # Kept in memory, not in registers: each would be held by every lane.
        # Any thread may read what another wrote, hence the barriers.
        so_far = tl.load(cell, mask=written & (block > first_block), other=0)
        tl.debug_barrier()
        tl.store(cell, so_far + lanes_sums(partial).to(tl.float64), mask=written)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "count", "width", "splits", "elements"])
def join(
    cost, sums, live, cost_strides, live_strides, first, count, width, splits, elements,
    CELLS: tl.constexpr,
):  # fmt: skip
    """The means that belong to ``pair_sums``: ``cost`` [count, width, samples], inf where the
    source is not live or not above the target. ``cost`` may be the first split of ``sums``."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    sample = tl.program_id(1).to(tl.int64)
    index, j = cell // width, cell % width
    i = first + index
    row, sample_of_live = live_strides
    counts = (index < count) & (j < i)
    counts &= tl.load(live + i * row + sample * sample_of_live, mask=counts, other=0) != 0
    slab = sums + sample * splits * count * width + cell
    total = tl.full((CELLS,), 0, tl.float64)
    for _ in range(splits):
        total += tl.load(slab, mask=counts, other=0)
        slab += count * width
    mean = tl.where(counts, total / elements, float("inf"))
    source_stride, target_stride, sample_stride = cost_strides
    at = index * source_stride + j * target_stride + sample * sample_stride
    tl.store(cost + at, mean, mask=index < count)


@triton.jit(do_not_specialize=["count", "width", "samples"])
def add_terms(
    objective, cost, cost_strides, count, width, samples, LOG: tl.constexpr, FLOOR: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Adds what each sample counts, in order, to ``objective`` [count, width] float64."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    index, j = cell // width, cell % width
    source_stride, target_stride, sample_stride = cost_strides
    at = cost + index * source_stride + j * target_stride
    total = tl.load(objective + cell, mask=index < count, other=0)
    for _ in range(samples):
        value = tl.load(at, mask=index < count, other=0).to(tl.float64)
        finite = tl.abs(value) < float("inf")
        term = tl.log(tl.maximum(value, FLOOR)) if LOG else value
        total += tl.where(finite, term, float("inf"))
        at += sample_stride
    tl.store(objective + cell, total, mask=index < count)


@triton.jit(do_not_specialize=["first", "count", "rows"])
def select(
    score, parent, cost, score_strides, parent_strides, cost_strides, first, count, rows,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """Improves ``score`` and ``parent`` [rows, samples] by ``cost`` [count, targets, samples],
    the costs of sources from ``first`` on: not above the score wins, then the larger source."""
    target = tl.program_id(0) * TARGETS
    sample = tl.program_id(1).to(tl.int64)
    j = target + tl.arange(0, TARGETS).to(tl.int64)
    score += j * score_strides[0] + sample * score_strides[1]
    parent += j * parent_strides[0] + sample * parent_strides[1]
    best = tl.load(score, mask=j < rows, other=0).to(tl.float64)
    best = tl.where(tl.abs(best) < float("inf"), best, float("inf"))
    winner = tl.load(parent, mask=j < rows, other=-1)
    source_stride, target_stride, sample_stride = cost_strides
    column = cost + j[None, :] * target_stride + sample * sample_stride
    for source in range(tl.maximum(first, target + 1), first + count, SOURCES):
        i = source + tl.arange(0, SOURCES).to(tl.int64)[:, None]
        counts = (i > j[None, :]) & (i < first + count)
        c = tl.load(column + (i - first) * source_stride, mask=counts, other=float("inf"))
        c = tl.where(tl.abs(c) < float("inf"), c, float("inf"))
        least = tl.min(c, axis=0)
        largest = tl.max(tl.where(c == least[None, :], i, -1), axis=0)
        wins = (least <= best) & (least < float("inf"))
        best = tl.where(wins, least, best)
        winner = tl.where(wins, largest, winner)
    tl.store(score, best.to(score.dtype.element_ty), mask=j < rows)
    tl.store(parent, winner, mask=j < rows)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` to nearest even; in so many words for bfloat16, to which the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x == x, nearest, bits | 0x400000) >> 16  # NaN stays NaN
        out = kept.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        out = x.to(dtype)
    return out


@triton.jit(do_not_specialize=["first", "rows", "elements", "run"])
def advance(
    next_state, state, velocity, times, parent,
    next_strides, state_strides, velocity_strides, parent_strides, sizes,
    first, rows, elements, run, IN_PLACE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Moves ``run`` targets from their parents, some elements of a sample.

    Parents below ``first``, whose velocities are not here, leave the row: as it is in place,
    where one program must do all targets, and as state's otherwise.
    """
    e = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    sample = tl.program_id(2).to(tl.int64)
    inside = e < elements
    at_next, at_z, at_v = offsets_of(e, sizes, next_strides, state_strides, velocity_strides)
    next_state += sample * next_strides[1] + at_next
    state += sample * state_strides[1] + at_z
    velocity += sample * velocity_strides[1] + at_v
    stored: tl.constexpr = state.dtype.element_ty
    compute: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
    target = tl.program_id(1).to(tl.int64) * run
    for j in range(target, tl.minimum(target + run, rows)):
        source = tl.load(parent + j * parent_strides[0] + sample * parent_strides[1])
        moves = source >= first
        i = tl.where(moves, source, j)
        z = tl.load(state + i * state_strides[0], mask=inside, other=0)
        v = tl.load(velocity + (i - first) * velocity_strides[0], mask=inside & moves, other=0)
        dt = (tl.load(times + j) - tl.load(times + i)).to(compute)
        moved = tl.fma(dt, v.to(compute), z.to(compute))
        value = tl.where(moves, rounded(moved, stored), z)
        if IN_PLACE:  # every thread has read what another may write
            tl.debug_barrier()
            tl.store(next_state + j * next_strides[0], value, mask=inside & moves)
        else:
            tl.store(next_state + j * next_strides[0], value, mask=inside)
