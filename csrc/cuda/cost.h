// The cost pass: sums of squared differences of all pairs of a source and a target below it.
//
//     candidate  = fma(dt, v[i], z[i]),  dt = t[j] - t[i] subtracted in float64, rounded once
//     or           c[0] * b[0], then fma(c[r], b[r], candidate) in the order of r; c rounded once
//     difference = candidate - x[j]
//     sum        = fma(difference, difference, sum)
//
// A block computes a tile of pairs over one split of the elements. Each warp owns a square of the
// tile; its lanes lie side by side along the elements, so that rows are read as they lie in memory
// and every pair has one sum per lane. After kFlushChunks chunks the lanes are added in a fixed
// tree and the result is added in float64. No atomics: the order of additions of a pair depends on
// the splits alone, not on the tile that it falls in.
#pragma once

#include "cuda/candidates.h"

namespace oss::cuda {

template <class Of>
struct CostArgs {
  Of of;
  Tensor3 target;
  Mask mask;
  int elements;
  int64_t begin_source, end_source;  // those to compute, from 1 on
  int64_t first_sample;              // of blockIdx.z == 0
  int splits;
  double* sums;  // [samples of this launch, splits, cells of the sources to compute]
};

// Where the pairs of a source lie among those of [begin, ...).
OSS_DEVICE int64_t cell_of(int64_t source, int64_t target, int64_t begin) {
  return (source * (source - 1) - begin * (begin - 1)) / 2 + target;
}

// The first chunk of a split: chunks * split / splits, in 32 bits, because a 64-bit division is a
// function call, around which registers are spilled. There are less than 2^16 splits.
OSS_DEVICE int chunk_of(int elements, int split, int splits) {
  const unsigned chunks = (static_cast<unsigned>(elements) + kChunk - 1) / kChunk;
  const unsigned at = split, of = splits;
  return static_cast<int>(chunks / of * at + chunks % of * at / of);
}

struct TileAt {
  int64_t source, target;  // the first ones
};

OSS_DEVICE TileAt tile_at(int64_t begin_source, int64_t end_source, int sources, int targets,
                          int index) {
  for (int64_t source = begin_source;; source += sources) {
    const int64_t end = source + sources < end_source ? source + sources : end_source;
    const int tiles = (static_cast<int>(end) - 1 + targets - 1) / targets;
    if (index < tiles) return {source, int64_t{index} * targets};
    index -= tiles;
  }
}

// Adds over the lanes of a warp. A lane ends up with the sums of values [2 lane, 2 lane + 1] of 64,
// or of value lane / 2 of 16: where two lanes exchange, each keeps one half of what is left.
template <int count, int mask = 16, class T, int total>
OSS_DEVICE void add_lanes(T (&values)[total], int lane) {
  if constexpr (mask > 0 && count > 1) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int k = 0; k < count / 2; ++k) {
      const T low = values[k], high = values[k + count / 2];
      values[k] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
    }
    add_lanes<count / 2, mask / 2>(values, lane);
  } else if constexpr (mask > 0) {
    values[0] += __shfl_xor_sync(0xffffffffu, values[0], mask);
    add_lanes<1, mask / 2>(values, lane);
  }
}

// What one thread copies of a tile's rows of one tensor: 16 bytes of one or two rows in every
// chunk, chunks ascending. `beside`: rows may be 16-bit beside float32, one element at a time.
template <class Z, int tile, bool async, bool beside>
struct RowCopy {
  static constexpr int size = sizeof(Z), part = 16 / size, parts = kChunk / part;
  static constexpr int stride = kCostThreads / parts;  // rows that all threads copy together
  static constexpr int count = (tile + stride - 1) / stride;
  static_assert(kCostThreads % parts == 0);

  const char* at[count];  // the next bytes (async), or the row
  bool wanted[count];     // or else zeros

  // row_at(k) is the row of the tile's k-th, negative where zeros will do.
  template <class RowAt>
  OSS_DEVICE void begin(const Tensor3& from, int64_t sample, int chunk, const RowAt& row_at) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int64_t row = row_at(static_cast<int>(threadIdx.x) / parts + k * stride);
      wanted[k] = row >= 0;
      // An address is needed where nothing is read, too.
      at[k] = row_of(from, row >= 0 ? row : 0, sample);
      if (async) at[k] += int64_t{first_element(chunk)} * size;
    }
  }

  static OSS_DEVICE int first_element(int chunk) {
    return chunk * kChunk + static_cast<int>(threadIdx.x) % parts * part;
  }

  OSS_DEVICE void start(Z* to, const Tensor3& from, int elements, int chunk) {
    const int e = first_element(chunk);
    const int left = e < elements ? elements - e : 0, valid = left < part ? left : part;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      Z* const out = to + (threadIdx.x + k * kCostThreads) * part;
      const bool mine = tile % stride == 0 || k < count - 1 ||
                        static_cast<int>(threadIdx.x) < (tile % stride) * parts;
      if constexpr (async) {
        if (mine) copy_async(out, at[k], wanted[k] ? valid * size : 0);
        at[k] += kChunk * size;
      } else if (mine) {
#pragma unroll 1
        for (int n = 0; n < part; ++n) {
          if (!wanted[k] || n >= valid)
            out[n] = Z{};
          else if constexpr (beside)
            out[n] = load_beside<Z>(from.rows, at[k], e + n);
          else
            out[n] = load_element<Z>(from.rows, at[k], e + n);
        }
      }
    }
  }
};

// `async`: all rows are dense and aligned for copy_async, and of the type that is computed on.
template <class Form, bool async>
OSS_KERNEL void __launch_bounds__(kCostThreads, 1)
    cost_kernel(const CostArgs<typename Form::Of> a) {
  using Z = typename Form::Z;
  using V = typename Form::V;
  using T = typename Form::T;
  constexpr Shape shape = Form::shape;
  static_assert(shape.shared_bytes <= kSharedBytes);
  constexpr int pairs = kPairs<T>, count = pairs * pairs;
  constexpr int sources = shape.source_warps * pairs, targets = shape.target_warps * pairs;
  constexpr int terms = Form::terms, planes = Form::planes;
  constexpr int at_once = shape.at_once < pairs ? shape.at_once : pairs;
  constexpr int own = count > 32 ? count / 32 : 1;  // sums that a lane holds after add_lanes
  constexpr int lanes_per_sum = count > 32 ? 1 : 32 / count;

  char* const stages = dynamic_shared();
  // [plane][target][source]
  T* const coefficients = reinterpret_cast<T*>(stages + shape.stages * shape.stage_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_source = warp / shape.target_warps * pairs;
  const int my_target = warp % shape.target_warps * pairs;
  const TileAt at = tile_at(a.begin_source, a.end_source, sources, targets, blockIdx.x);
  const int64_t sample = a.first_sample + blockIdx.z;

#pragma unroll
  for (int r = 0; r < planes; ++r)
    for (int k = threadIdx.x; k < sources * targets; k += kCostThreads) {
      const int64_t i = at.source + k % sources, j = at.target + k / sources;
      coefficients[r * sources * targets + k] =
          i < a.end_source && j < i ? static_cast<T>(a.of.coefficient(r, i, j, sample)) : T(0);
    }

  const int begin = chunk_of(a.elements, blockIdx.y, a.splits);
  const int end = chunk_of(a.elements, blockIdx.y + 1, a.splits);
  RowCopy<Z, targets, async, false> target_copy;
  RowCopy<Z, sources, async, false> first_copy;
  RowCopy<V, sources, async, !Form::euler> other_copies[terms - 1];
  const auto row_of_term = [&](int r) {
    return [&a, &at, r, sample](int k) {
      const int64_t i = at.source + k;
      return i < a.end_source && a.mask.live(i, sample) ? a.of.row(r, i, sample) : -1;
    };
  };
  target_copy.begin(a.target, sample, begin, [&](int k) {
    const int64_t j = at.target + k;
    return j < a.end_source - 1 ? j : -1;
  });
  first_copy.begin(a.of.tensor(0), sample, begin, row_of_term(0));
#pragma unroll
  for (int r = 1; r < terms; ++r)
    other_copies[r - 1].begin(a.of.tensor(r), sample, begin, row_of_term(r));
  const auto stage = [&](int chunk, int which) {
    Z* const x = reinterpret_cast<Z*>(stages + which * shape.stage_bytes);
    V* const others = reinterpret_cast<V*>(x + (targets + sources) * kChunk);
    target_copy.start(x, a.target, a.elements, chunk);
    first_copy.start(x + targets * kChunk, a.of.tensor(0), a.elements, chunk);
#pragma unroll
    for (int r = 1; r < terms; ++r)
      other_copies[r - 1].start(others + (r - 1) * sources * kChunk, a.of.tensor(r), a.elements,
                                chunk);
  };
  for (int s = 0; s < shape.stages - 1; ++s) {
    if (begin + s < end) stage(begin + s, s);
    end_copies();
  }

  // Squares on and above the diagonal have no pairs; their warps only copy.
  const int64_t last_source = at.source + my_source + pairs - 1;
  const bool busy = at.source + my_source < a.end_source && at.target + my_target < last_source;
  T sums[count] = {};
  double total[own] = {};
  int which = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    wait_copies<shape.stages - 2>();
    __syncthreads();
    if (chunk + shape.stages - 1 < end)
      stage(chunk + shape.stages - 1, which == 0 ? shape.stages - 1 : which - 1);
    end_copies();
    if (busy) {
      const Z* const x = reinterpret_cast<const Z*>(stages + which * shape.stage_bytes);
      const Z* const firsts = x + targets * kChunk + 2 * lane;
      const V* const others =
          reinterpret_cast<const V*>(x + (targets + sources) * kChunk) + 2 * lane;
#pragma unroll
      for (int first = 0; first < pairs; first += at_once) {
        Two<T> rows[terms][at_once];
#pragma unroll
        for (int s = 0; s < at_once; ++s) {
          const int source = my_source + first + s;
          rows[0][s] = load_two(firsts + source * kChunk);
#pragma unroll
          for (int r = 1; r < terms; ++r)
            rows[r][s] = load_two(others + ((r - 1) * sources + source) * kChunk);
        }
#pragma unroll
        for (int t = 0; t < pairs; ++t) {
          // Else the operands of the next targets spill.
          if (terms > 2 && t % 2 == 0) hold_loads();
          const Two<T> xt = load_two(x + (my_target + t) * kChunk + 2 * lane);
          const T* const of_target = coefficients + (my_target + t) * sources + my_source + first;
          Two<T> candidate[at_once];
#pragma unroll
          for (int r = 0; r < terms; ++r) {
            if constexpr (Form::euler)
              if (r == 0) {
#pragma unroll
                for (int s = 0; s < at_once; ++s) candidate[s] = rows[0][s];
                continue;
              }
            const int plane = Form::euler ? 0 : r;
            const auto c = *reinterpret_cast<const Packed<T, at_once>*>(
                of_target + plane * sources * targets);
#pragma unroll
            for (int s = 0; s < at_once; ++s) {
              if (r == 0) {
                candidate[s] = {multiply(c.values[s], rows[0][s].a),
                                multiply(c.values[s], rows[0][s].b)};
              } else {
                candidate[s] = {fma(c.values[s], rows[r][s].a, candidate[s].a),
                                fma(c.values[s], rows[r][s].b, candidate[s].b)};
              }
            }
          }
#pragma unroll
          for (int s = 0; s < at_once; ++s) {
            const T a_difference = candidate[s].a - xt.a, b_difference = candidate[s].b - xt.b;
            T& sum = sums[(first + s) * pairs + t];
            sum = fma(a_difference, a_difference, sum);
            sum = fma(b_difference, b_difference, sum);
          }
        }
      }
    }
    const bool flush = (chunk - begin) % kFlushChunks == kFlushChunks - 1 || chunk == end - 1;
    if (busy && flush) {
      add_lanes<count>(sums, lane);
#pragma unroll
      for (int k = 0; k < own; ++k) total[k] += static_cast<double>(sums[k]);
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] = T(0);
    }
    which = which == shape.stages - 1 ? 0 : which + 1;
  }

  if (!busy || lane % lanes_per_sum != 0) return;
  const int64_t cells = cell_of(a.end_source, 0, a.begin_source);
  double* const out = a.sums + (int64_t{blockIdx.z} * a.splits + blockIdx.y) * cells;
#pragma unroll
  for (int k = 0; k < own; ++k) {
    const int pair = lane / lanes_per_sum * own + k;
    const int64_t i = at.source + my_source + pair / pairs;
    const int64_t j = at.target + my_target + pair % pairs;
    if (i < a.end_source && j < i) out[cell_of(i, j, a.begin_source)] = total[k];
  }
}

// --- The cost of one chosen pair per target and sample, with the additions of cost_kernel ---

template <class Of>
struct PairCostArgs {
  CostArgs<Of> cost;
  Best best;  // the cost is written where a source and the order that were computed have won
};

// Eight blocks have 64 registers a thread: for more blocks the compiler would spill some.
constexpr int kPairThreads = 128, kPairBlocks = 8;

// Shared memory: a double for each split, and the terms.
template <class Form>
constexpr int64_t pair_shared_bytes(int splits) {
  return splits * int64_t{sizeof(double)} +
         Form::terms * int64_t{sizeof(const char*) + sizeof(typename Form::T)};
}

// Block (target, sample).
template <class Form>
OSS_KERNEL void __launch_bounds__(kPairThreads, kPairBlocks)
    pair_cost_kernel(const PairCostArgs<typename Form::Of> p) {
  using Z = typename Form::Z;
  using T = typename Form::T;
  constexpr int terms = Form::terms;
  const auto& a = p.cost;
  double* const totals = reinterpret_cast<double*>(dynamic_shared());
  const int64_t j = blockIdx.x, sample = a.first_sample + blockIdx.z;
  const int64_t i = p.best.parents.at(j, sample);
  // None, or one of an earlier chunk, or of another order: the same for all threads.
  if (i < a.begin_source || p.best.order(j, sample) != a.of.order) return;
  // Shared, because registers have no index and loops over six terms of any type are long.
  const char** const rows = reinterpret_cast<const char**>(totals + a.splits);
  T* const coefficients = reinterpret_cast<T*>(rows + terms);
  if (threadIdx.x < terms) {
    const int r = threadIdx.x;
    const int64_t row = a.of.row(r, i, sample);
    rows[r] = row < 0 ? nullptr : row_of(a.of.tensor(r), row, sample);
    coefficients[r] = static_cast<T>(a.of.coefficient(r, i, j, sample));
  }
  __syncthreads();
  const char* const x = row_of(a.target, j, sample);
  const int lane = threadIdx.x % 32;

  for (int split = threadIdx.x / 32; split < a.splits; split += kPairThreads / 32) {
    const int begin = chunk_of(a.elements, split, a.splits);
    const int end = chunk_of(a.elements, split + 1, a.splits);
    T sums[1] = {};
    double total = 0;
    for (int chunk = begin; chunk < end; ++chunk) {
      for (int half = 0; half < 2; ++half) {
        const int e = chunk * kChunk + 2 * lane + half;
        if (e >= a.elements) continue;
        T candidate = 0;
#pragma unroll Form::euler ? terms : 1
        for (int r = 0; r < terms && rows[r] != nullptr; ++r) {
          const T value = Form::widened(a.of.tensor(r), r, rows[r], e);
          if (r == 0)
            candidate = Form::euler ? value : multiply(coefficients[0], value);
          else
            candidate = fma(coefficients[r], value, candidate);
        }
        const T difference = candidate - widen(load_element<Z>(a.target.rows, x, e));
        sums[0] = fma(difference, difference, sums[0]);
      }
      if ((chunk - begin) % kFlushChunks == kFlushChunks - 1 || chunk == end - 1) {
        add_lanes<1>(sums, lane);
        total += static_cast<double>(sums[0]);
        sums[0] = T(0);
      }
    }
    if (lane == 0) totals[split] = total;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int split = 0; split < a.splits; ++split) sum += totals[split];
  p.best.cost.set(j, sample, sum / static_cast<double>(a.elements));
}

}  // namespace oss::cuda
