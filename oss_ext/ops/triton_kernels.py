"""The Triton kernels of ``oss_ext.ops.triton``, which says what they are launched for.

Importing this file imports triton, so only ``oss_ext.ops.triton`` does, and only at its first
call. ``i`` and ``j`` are source and target, as in ``oss_ext.ops``.

Bits depend on nothing but the inputs. Products and sums are rounded where they are written: fused
operations are written out, and all launches forbid others. A sum over the lanes of a tile adds
the lanes in pairs, whatever threads hold them, because the compiler chooses the layout of a tile
by alignment, strides and number of warps.

A tensor ``[rows, samples, *dims]`` is a pointer and the strides (row, sample, *dims); ``sizes``
are those of dims, which the host has merged where it could. ``basis`` is a tuple of pointers, with
a tuple of strides: the terms of a candidate, as in ``oss_ext.ops.dp_argmin_``. Those of Euler's
step are the state and the velocity of the source, with coefficients that follow from ``times``.
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(32)
"""Elements of a tile, each summed in a lane of its own."""

BLOCK: tl.constexpr = tl.constexpr(2048)
"""Elements whose squares are summed in the compute type, 64 in a lane; float64 beyond."""

REGISTERS = 255
"""Of a thread, at most: all there are. Left alone, the assembler spills some to stay below 128."""


def _config(sources, targets, warps, unroll):
    tile = {"SOURCES": sources, "TARGETS": targets, "UNROLL": unroll}
    return triton.Config(tile, num_warps=warps, maxnreg=REGISTERS)


UNROLLED = [_config(8, 32, 8, 4), _config(4, 64, 8, 4), _config(4, 32, 4, 4), _config(4, 16, 4, 4)]
"""Tiles of pairs for Euler's step up to float32, and how many elements of every lane are under way
together, which share the arithmetic of addresses. Larger tiles read less, smaller ones leave room
for more programs. They change no bit: every pair has sums of its own, and the order of its elements
stays."""

PLAIN = [
    _config(*tile, 1)
    for tile in [(8, 32, 8), (8, 16, 4), (4, 32, 4), (4, 16, 4), (2, 32, 4), (2, 16, 4)]
]
"""Tiles where numbers of 8 bytes or more coefficients leave no registers for that."""

WHOLE = 128
"""Elements of all lanes that are under way, at most: a multiple of them needs no masks."""

TRIED = 4
"""How many of the plain tiles are timed: the largest that fit."""

HELD = {4: 96, 8: 56}
"""How many sums and coefficients a thread can hold, of how many bytes each."""


def tiles(_, given, **__):
    """Those to try for arguments of ``pair_sums``."""
    itemsize = max(4, given["target"].dtype.itemsize)
    if given["coefficients"] is None:  # Euler's step
        return UNROLLED if itemsize == 4 else PLAIN[:TRIED]
    of_pair = 1 + len(given["basis_strides"])

    def held(config):
        return config.kwargs["SOURCES"] * config.kwargs["TARGETS"] // config.num_warps * of_pair

    return [config for config in PLAIN if held(config) <= HELD[itemsize]][:TRIED]


INTERPRETED = [triton.Config({"SOURCES": 8, "TARGETS": 64, "UNROLL": 2})]
"""The interpreter takes the same time for any number of targets."""


@triton.jit
def offsets_of(e, sizes, strides):
    """Where elements ``e`` lie within a row with these strides (row, sample, *dims)."""
    last: tl.constexpr = len(sizes) - 1
    at = e * 0
    for k in tl.static_range(last):
        at += e % sizes[last - k] * strides[2 + last - k]
        e = e // sizes[last - k]
    return at + e * strides[2]


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
    INTERPRETED if triton.knobs.runtime.interpret else UNROLLED + PLAIN,
    key=["splits"],
    prune_configs_by={"early_config_prune": tiles},
    cache_results=True,
)
@triton.jit(
    do_not_specialize=["first", "stop", "splits", "elements"],
    # Wider loads would put neighbouring elements into one thread, and targets across lanes.
    do_not_specialize_on_alignment=["b0", "b1", "b2", "b3", "b4", "b5", "target"],
)
def pair_sums(
    sums, b0, b1, b2, b3, b4, b5, target, times, index, coefficients, live, wanted,
    basis_strides, target_strides, index_strides, coefficients_strides, live_strides,
    basis_rows, sizes, first, stop, splits, elements,
    EVEN: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sums of squared differences of one split of the elements, for a tile of pairs.

    Writes ``sums`` [samples, splits, stop - first, stop - 1] float64 for sources first .. stop - 1
    and the targets below each. Tiles in which no source is ``live`` are left out, and, if
    ``wanted`` is given ([targets] sources), those that hold no (wanted[j], j).

    Row i - first of every term is the source's own, or, if ``index`` is given ([terms, sources,
    samples] from ``first`` on), the one that it says. ``coefficients`` [terms, sources, targets,
    samples] come with it; without them the terms are those of Euler's step. The basis comes as a
    pointer for every term in use: of a tuple, Triton would see neither the dtypes, by which it
    chooses the tile, nor that the alignment does not count.

    Sources are taken one by one, in tuples, and targets along an axis: so every load has the
    layout of the sums, warps along the targets and lanes along the elements, and none has to be
    exchanged between threads.
    """
    basis = (b0, b1, b2, b3, b4, b5)
    terms: tl.constexpr = len(basis_strides)
    width = stop - 1
    across = (width + TARGETS - 1) // TARGETS
    source = first + tl.program_id(0) // across * SOURCES
    first_target = tl.program_id(0) % across * TARGETS
    split = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    i = source + tl.arange(0, SOURCES).to(tl.int64)
    j = first_target + tl.arange(0, TARGETS).to(tl.int64)
    needed = (i < stop) & (i > first_target)
    of_source = live + (i - first) * live_strides[0] + sample * live_strides[1]
    needed &= tl.load(of_source, mask=needed, other=0) != 0
    if wanted is not None:
        best = tl.load(wanted + j, mask=j < width, other=-1)
        needed &= tl.max((i[:, None] == best[None, :]).to(tl.int32), axis=1) != 0
    if tl.max(needed.to(tl.int32), axis=0) == 0:
        return

    # Rows past the end are computed as the last one and not written.
    row = tl.minimum(j, width - 1)[:, None]
    compute: tl.constexpr = tl.float64 if target.dtype.element_ty == tl.float64 else tl.float32
    target += sample * target_strides[1] + row * target_strides[0]
    sums += (sample * splits + split) * (stop - first) * width
    cell = sums + (i[None, :] - first) * width + j[:, None]
    written = (i[None, :] < stop) & (j[:, None] < i[None, :])
    rows = ()
    factors = ()
    for s in tl.static_range(SOURCES):
        k = tl.minimum(source + s, stop - 1).to(tl.int64)
        for r in tl.static_range(terms):
            if index is None:
                at = k - first
                factor = (tl.load(times + row) - tl.load(times + k)).to(compute)  # not of term 0
            else:
                at = tl.load(
                    index + r * index_strides[0] + (k - first) * index_strides[1]
                    + sample * index_strides[2]
                )  # fmt: skip
                # Where there is no such row, a coefficient or ``live`` leaves the candidate out.
                at = tl.minimum(tl.maximum(at, 0), basis_rows[r] - 1)
                factor = tl.load(
                    coefficients + r * coefficients_strides[0]
                    + (k - first) * coefficients_strides[1] + row * coefficients_strides[2]
                    + sample * coefficients_strides[3]
                ).to(compute)  # fmt: skip
            rows = rows + (basis[r] + sample * basis_strides[r][1] + at * basis_strides[r][0],)
            factors = factors + (factor,)
    lane = tl.arange(0, LANES).to(tl.int64)[None, :]
    blocks = (elements + BLOCK - 1) // BLOCK + tl.full((), 0, tl.int64)
    first_block = blocks * split // splits
    for block in range(first_block, blocks * (split + 1) // splits):
        partial = ()
        for _ in tl.static_range(SOURCES):
            partial = partial + (tl.full((TARGETS, LANES), 0, compute),)
        begin = block * BLOCK
        end = tl.minimum(begin + BLOCK, elements)
        for e0 in range(begin, end, LANES * UNROLL):
            for u in tl.static_range(UNROLL):
                e = e0 + lane + u * LANES
                inside = (e < elements) | EVEN
                x = tl.load(target + offsets_of(e, sizes, target_strides), mask=inside, other=0)
                offsets = ()
                for r in tl.static_range(terms):
                    offsets = offsets + (offsets_of(e, sizes, basis_strides[r]),)
                added = ()
                for s in tl.static_range(SOURCES):
                    place = rows[s * terms] + offsets[0]
                    candidate = tl.load(place, mask=inside, other=0).to(compute)
                    if index is not None:  # otherwise the first coefficient is 1
                        candidate = factors[s * terms] * candidate
                    for r in tl.static_range(1, terms):
                        place = rows[s * terms + r] + offsets[r]
                        b = tl.load(place, mask=inside, other=0).to(compute)
                        candidate = tl.fma(factors[s * terms + r], b, candidate)
                    off = candidate - x.to(compute)
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
    source_of_live, sample_of_live = live_strides
    counts = (index < count) & (j < first + index)
    of_source = live + index * source_of_live + sample * sample_of_live
    counts &= tl.load(of_source, mask=counts, other=0) != 0
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


@triton.jit(do_not_specialize=["order", "first", "count", "rows"])
def select(
    score, parent, best_order, cost, score_strides, parent_strides, order_strides, cost_strides,
    order, first, count, rows, SOURCES: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """Improves ``score`` and ``parent`` [rows, samples] by ``cost`` [count, targets, samples],
    the costs of sources from ``first`` on: the least wins, then the largest source, then the
    latest call, and ``best_order``, if given, becomes the winner's ``order``."""
    target = tl.program_id(0) * TARGETS
    sample = tl.program_id(1).to(tl.int64)
    j = target + tl.arange(0, TARGETS).to(tl.int64)
    score += j * score_strides[0] + sample * score_strides[1]
    parent += j * parent_strides[0] + sample * parent_strides[1]
    best = tl.load(score, mask=j < rows, other=0).to(tl.float64)
    best = tl.where(tl.abs(best) < float("inf"), best, float("inf"))
    winner = tl.load(parent, mask=j < rows, other=-1)
    won = j < 0
    source_stride, target_stride, sample_stride = cost_strides
    column = cost + j[None, :] * target_stride + sample * sample_stride
    for source in range(tl.maximum(first, target + 1), first + count, SOURCES):
        i = source + tl.arange(0, SOURCES).to(tl.int64)[:, None]
        counts = (i > j[None, :]) & (i < first + count)
        c = tl.load(column + (i - first) * source_stride, mask=counts, other=float("inf"))
        c = tl.where(tl.abs(c) < float("inf"), c, float("inf"))
        least = tl.min(c, axis=0)
        largest = tl.max(tl.where(c == least[None, :], i, -1), axis=0)
        wins = (least < best) | ((least == best) & (largest >= winner))
        wins &= least < float("inf")
        best = tl.where(wins, least, best)
        winner = tl.where(wins, largest, winner)
        won |= wins
    tl.store(score, best.to(score.dtype.element_ty), mask=j < rows)
    tl.store(parent, winner, mask=j < rows)
    if best_order is not None:
        best_order += j * order_strides[0] + sample * order_strides[1]
        tl.store(best_order, tl.zeros_like(j) + order, mask=won & (j < rows))


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
    next_state += sample * next_strides[1] + offsets_of(e, sizes, next_strides)
    state += sample * state_strides[1] + offsets_of(e, sizes, state_strides)
    velocity += sample * velocity_strides[1] + offsets_of(e, sizes, velocity_strides)
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


@triton.jit(do_not_specialize=["elements"])
def combine(
    out, basis, index, coefficients, out_strides, basis_strides, index_strides,
    coefficients_strides, sizes, elements, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """``out`` [targets, samples, *dims]: combinations of rows that ``index`` [terms, targets,
    samples] gives, with ``coefficients`` likewise; some elements of a target."""
    blocks = (elements + ELEMENTS - 1) // ELEMENTS
    j = (tl.program_id(0) // blocks).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = e < elements
    stored: tl.constexpr = out.dtype.element_ty
    compute: tl.constexpr = tl.float64 if stored == tl.float64 else tl.float32
    value = tl.full((ELEMENTS,), 0, compute)
    found = j < 0
    for r in tl.static_range(len(basis)):
        at = index + r * index_strides[0] + j * index_strides[1] + sample * index_strides[2]
        row = tl.load(at)
        there = row >= 0
        at = coefficients + r * coefficients_strides[0] + j * coefficients_strides[1]
        c = tl.load(at + sample * coefficients_strides[2]).to(compute)
        at = basis[r] + sample * basis_strides[r][1] + row * basis_strides[r][0]
        at += offsets_of(e, sizes, basis_strides[r])
        b = tl.load(at, mask=inside & there, other=0).to(compute)
        # Not added to a zero, which would take the sign from a -0.
        term = tl.where(found, tl.fma(c, b, value), c * b)
        value = tl.where(there, term, value)
        found |= there
    out += sample * out_strides[1] + j * out_strides[0] + offsets_of(e, sizes, out_strides)
    tl.store(out, rounded(value, stored), mask=inside)
