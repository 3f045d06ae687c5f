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

// The first chunk of a split: units * split / splits units of a whole stage, in 32 bits, because a
// 64-bit division is a function call, around which registers are spilled. There are less than 2^16
// splits. The last one ends with a whole stage, beyond the elements.
OSS_DEVICE int chunk_of(int elements, int split, int splits) {
  constexpr unsigned unit = kStageChunks * kChunk;
  const unsigned units = (static_cast<unsigned>(elements) + unit - 1) / unit;
  const unsigned at = split, of = splits;
  return static_cast<int>(units / of * at + units % of * at / of) * kStageChunks;
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

// What one thread copies of a tile's rows of one tensor: 16 bytes of a few rows in every stage,
// stages ascending. `zeros`: rows may be missing, which makes them zeros; they may be 16-bit beside
// float32, too.
template <class Z, int tile, int length, bool async, bool zeros>
struct RowCopy {
  static constexpr int size = sizeof(Z), part = 16 / size, parts = length / part;
  static constexpr int stride = kCostThreads / parts;  // rows that all threads copy together
  static constexpr int count = (tile + stride - 1) / stride;
  static_assert(kCostThreads % parts == 0);

  const char* at[count];  // the next bytes (async), or the row
  unsigned missing;       // a bit for each row

  static OSS_DEVICE int first_element() { return static_cast<int>(threadIdx.x) % parts * part; }

  static OSS_DEVICE Z* place(Z* stage, int k) {
    return stage + (threadIdx.x + k * kCostThreads) * part;
  }
  // The last rows are not for all threads.
  static OSS_DEVICE bool mine(int k) {
    return tile % stride == 0 || k < count - 1 ||
           static_cast<int>(threadIdx.x) < tile % stride * parts;
  }

  // row_at(k) is the row of the tile's k-th. Missing rows become zeros in all stages.
  template <class RowAt, class StageAt>
  OSS_DEVICE void begin(const Tensor3& from, int64_t sample, int element, const RowAt& row_at,
                        int stages, const StageAt& stage_at) {
    missing = 0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int64_t row = row_at(static_cast<int>(threadIdx.x) / parts + k * stride);
      // An address is needed where nothing is read, too.
      at[k] = row_of(from, zeros && row < 0 ? 0 : row, sample);
      if (async) at[k] += int64_t{element + first_element()} * size;
      if (!zeros || row >= 0 || !mine(k)) continue;
      missing |= 1u << k;
      for (int s = 0; s < stages; ++s)
        *reinterpret_cast<Packed<float, 4>*>(place(stage_at(s), k)) = {};
    }
  }

  // Copies `length` elements from `element` on; those from `end` on are zeros, of which there are
  // none where the stage is `full`.
  template <bool full>
  OSS_DEVICE void start(Z* stage, const Tensor3& from, int element, int end) {
    const int first = element + first_element();
    const int left = first < end ? end - first : 0, valid = left < part ? left : part;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      Z* const to = place(stage, k);
      const bool wanted = mine(k) && !(zeros && (missing >> k & 1) != 0);
      if constexpr (async) {
        if (wanted) full ? copy_async(to, at[k]) : copy_async(to, at[k], valid * size);
        at[k] += length * size;
      } else if (wanted) {
#pragma unroll 1
        for (int n = 0; n < part; ++n) {
          if (n >= valid)
            to[n] = Z{};
          else if constexpr (zeros)
            to[n] = load_beside<Z>(from.rows, at[k], first + n);
          else
            to[n] = load_element<Z>(from.rows, at[k], first + n);
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
  static_assert(shape.shared_bytes <= kSharedBytes && kFlushChunks % shape.chunks == 0);
  constexpr int pairs = kPairs<T>, count = pairs * pairs;
  constexpr int sources = shape.source_warps * pairs, targets = shape.target_warps * pairs;
  constexpr int terms = Form::terms, planes = Form::planes;
  constexpr int chunks = shape.chunks, length = chunks * kChunk;  // of a stage
  constexpr int at_once = shape.at_once < pairs ? shape.at_once : pairs;
  constexpr int own = count > 32 ? count / 32 : 1;  // sums that a lane holds after add_lanes
  constexpr int lanes_per_sum = count > 32 ? 1 : 32 / count;

  char* const stages = dynamic_shared();
  // [plane][target][source]
  T* const coefficients = reinterpret_cast<T*>(stages + shape.stages * shape.stage_bytes);
  // Of a stage.
  const auto targets_in = [&](int which) {
    return reinterpret_cast<Z*>(stages + which * shape.stage_bytes);
  };
  const auto firsts_in = [&](int which) { return targets_in(which) + targets * length; };
  const auto others_in = [&](int which, int r) {
    return reinterpret_cast<V*>(firsts_in(which) + sources * length) + (r - 1) * sources * length;
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Skewed: a multiprocessor has four schedulers, which get warps in turn, and the warps without
  // pairs, right of the diagonal, should not all be of one of them.
  const int source_warp = warp / shape.target_warps;
  const int target_warp = (warp + shape.target_warps - source_warp) % shape.target_warps;
  const int my_source = source_warp * pairs, my_target = target_warp * pairs;
  const TileAt at = tile_at(a.begin_source, a.end_source, sources, targets, blockIdx.x);
  const int64_t sample = a.first_sample + blockIdx.z;

  const int begin = chunk_of(a.elements, blockIdx.y, a.splits);
  const int end = chunk_of(a.elements, blockIdx.y + 1, a.splits);
  const int last_element = end * kChunk < a.elements ? end * kChunk : a.elements;
  RowCopy<Z, targets, length, async, false> target_copy;
  RowCopy<Z, sources, length, async, !Form::euler> first_copy;
  RowCopy<V, sources, length, async, !Form::euler> other_copies[terms - 1];
  // Those beyond the last one are read in its place: they have no pairs.
  const auto row_of_term = [&](int r) {
    return [&a, &at, r, sample](int k) {
      const int64_t i = at.source + k < a.end_source ? at.source + k : a.end_source - 1;
      return a.of.row(r, i, sample);
    };
  };
  const auto row_of_target = [&](int k) {
    return at.target + k < a.end_source - 1 ? at.target + k : a.end_source - 2;
  };
  target_copy.begin(a.target, sample, begin * kChunk, row_of_target, shape.stages, targets_in);
  first_copy.begin(a.of.tensor(0), sample, begin * kChunk, row_of_term(0), shape.stages,
                   firsts_in);
#pragma unroll
  for (int r = 1; r < terms; ++r)
    other_copies[r - 1].begin(a.of.tensor(r), sample, begin * kChunk, row_of_term(r), shape.stages,
                              [&](int which) { return others_in(which, r); });
  const auto copy = [&](auto full, int element, int which) {
    target_copy.template start<full.value>(targets_in(which), a.target, element, last_element);
    first_copy.template start<full.value>(firsts_in(which), a.of.tensor(0), element, last_element);
#pragma unroll
    for (int r = 1; r < terms; ++r)
      other_copies[r - 1].template start<full.value>(others_in(which, r), a.of.tensor(r), element,
                                                     last_element);
  };
  const auto stage = [&](int chunk, int which) {
    const int element = chunk * kChunk;
    if (async && element + length <= last_element)
      copy(std::true_type{}, element, which);
    else
      copy(std::false_type{}, element, which);
  };
  for (int s = 0; s < shape.stages - 1; ++s) {
    if (begin + s * chunks < end) stage(begin + s * chunks, s);
    end_copies();
  }

  // While the first copies come.
#pragma unroll
  for (int r = 0; r < planes; ++r)
    for (int k = threadIdx.x; k < sources * targets; k += kCostThreads) {
      const int64_t i = at.source + k % sources, j = at.target + k / sources;
      coefficients[r * sources * targets + k] =
          i < a.end_source && j < i ? static_cast<T>(a.of.coefficient(r, i, j, sample)) : T(0);
    }

  // Squares on and above the diagonal have no pairs; their warps only copy.
  const int64_t last_source = at.source + my_source + pairs - 1;
  const bool busy = at.source + my_source < a.end_source && at.target + my_target < last_source;
  T sums[count] = {};
  double total[own] = {};
  int which = 0, chunk = begin;
  while (chunk < end) {
    const int flush = chunk + kFlushChunks < end ? chunk + kFlushChunks : end;
#pragma unroll 1
    for (; chunk < flush; chunk += chunks) {
      wait_copies<shape.stages - 2>();
      __syncthreads();
      const int next = chunk + (shape.stages - 1) * chunks;
      if (next < end) stage(next, which == 0 ? shape.stages - 1 : which - 1);
      end_copies();
      if (busy) {
        const Z* const xs = targets_in(which) + my_target * length + 2 * lane;
        const Z* const firsts = firsts_in(which) + my_source * length + 2 * lane;
        const V* const others = others_in(which, 1) + my_source * length + 2 * lane;
#pragma unroll 1
        for (int part = 0; part < length; part += kChunk) {
          hold_loads();  // else all coefficients stay in registers, and others spill
#pragma unroll
          for (int first = 0; first < pairs; first += at_once) {
            Two<T> basis[terms][at_once];
#pragma unroll
            for (int s = 0; s < at_once; ++s) {
              basis[0][s] = load_two(firsts + (first + s) * length + part);
#pragma unroll
              for (int r = 1; r < terms; ++r)
                basis[r][s] = load_two(others + ((r - 1) * sources + first + s) * length + part);
            }
#pragma unroll
            for (int t = 0; t < pairs; ++t) {
              // Else the operands of the next targets spill.
              if ((terms > 2 || !async) && t % (4 / at_once) == 0) hold_loads();
              const Two<T> x = load_two(xs + t * length + part);
              const T* const of_target =
                  coefficients + (my_target + t) * sources + my_source + first;
              Two<T> candidate[at_once];
#pragma unroll
              for (int r = 0; r < terms; ++r) {
                if constexpr (Form::euler)
                  if (r == 0) {
#pragma unroll
                    for (int s = 0; s < at_once; ++s) candidate[s] = basis[0][s];
                    continue;
                  }
                const int plane = Form::euler ? 0 : r;
                const auto c = *reinterpret_cast<const Packed<T, at_once>*>(
                    of_target + plane * sources * targets);
#pragma unroll
                for (int s = 0; s < at_once; ++s) {
                  if (r == 0) {
                    candidate[s] = {multiply(c.values[s], basis[0][s].a),
                                    multiply(c.values[s], basis[0][s].b)};
                  } else {
                    candidate[s] = {fma(c.values[s], basis[r][s].a, candidate[s].a),
                                    fma(c.values[s], basis[r][s].b, candidate[s].b)};
                  }
                }
              }
#pragma unroll
              for (int s = 0; s < at_once; ++s) {
                const T a_difference = candidate[s].a - x.a, b_difference = candidate[s].b - x.b;
                T& sum = sums[(first + s) * pairs + t];
                sum = fma(a_difference, a_difference, sum);
                sum = fma(b_difference, b_difference, sum);
              }
            }
          }
        }
      }
      which = which == shape.stages - 1 ? 0 : which + 1;
    }
    if (!busy) continue;
    add_lanes<count>(sums, lane);
#pragma unroll
    for (int k = 0; k < own; ++k) total[k] += static_cast<double>(sums[k]);
#pragma unroll
    for (int k = 0; k < count; ++k) sums[k] = T(0);
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

}  // namespace oss::cuda
