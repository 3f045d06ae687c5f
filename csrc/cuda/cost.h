// The cost pass: sums of squared differences of all pairs of a source and a target below it.
//
//     candidate  = fma(dt, v[i], z[i]),  dt = t[j] - t[i] subtracted in float64, rounded once
//     or           c[0] * b[0], then fma(c[r], b[r], candidate) in the order of r; c rounded once
//     difference = candidate - x[j]
//     sum        = fma(difference, difference, sum)
//
// A block computes a tile of pairs over one split of the elements. Each warp owns a square of the
// tile; its lanes lie side by side along the elements, so that rows are read as they lie in memory
// and every pair has one sum per lane. After kFlushElements the lanes are added in a fixed tree and
// the result is added in float64. No atomics: the order of additions of a pair depends on the
// splits alone, not on the candidates' form nor on the tile that it falls in.
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

// The first element of a split: units * split / splits units, in 32 bits, because a 64-bit division
// is a function call, around which registers are spilled: kMaxSplits is less than 2^16.
OSS_DEVICE int element_of(int elements, int split, int splits) {
  const unsigned units = (static_cast<unsigned>(elements) + kUnit - 1) / kUnit;
  const unsigned at = split, of = splits;
  return static_cast<int>(units / of * at + units % of * at / of) * kUnit;
}

// The sum over the splits, of part(split): in eight interleaved sums, whose loads are under way
// together, then in a fixed tree.
template <class Part>
OSS_DEVICE double add_splits(int splits, const Part& part) {
  double sums[8] = {};
  int split = 0;
  for (; split + 8 <= splits; split += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) sums[k] += part(split + k);
  }
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (split + k < splits) sums[k] += part(split + k);
#pragma unroll
  for (int n = 4; n > 0; n /= 2)
#pragma unroll
    for (int k = 0; k < n; ++k) sums[k] += sums[k + n];
  return sums[0];
}

// Where a tile of the grid lies: those of a band (tiles_of_band in launch.h), its diagonal first.
struct TileAt {
  int source, target;  // the first ones; sources before those to compute have no pairs
  int columns;         // squares of targets
};

OSS_DEVICE TileAt tile_at(int end_source, const Tile& tile, int index) {
  for (int end = end_source;; end -= tile.sources) {
    const int columns = (end - 1 + tile.pairs - 1) / tile.pairs;
    const int others = columns > tile.diagonal ? columns - tile.diagonal : 0;
    const int tiles = 1 + (others + tile.columns - 1) / tile.columns;
    if (index >= tiles) {
      index -= tiles;
      continue;
    }
    const int source = end - tile.sources;
    if (index == 0) return {source, others * tile.pairs, columns - others};
    const int first = (index - 1) * tile.columns, left = others - first;
    return {source, first * tile.pairs, left < tile.columns ? left : tile.columns};
  }
}

struct SquareAt {
  int source, target;  // the first ones, in the tile
  bool any;
};

// The square of a warp: those of a tile that have pairs, column by column.
OSS_DEVICE SquareAt square_at(int begin_source, const Tile& tile, const TileAt& at, int warp) {
#pragma unroll 1
  for (int t = 0; t < at.columns; ++t)
#pragma unroll 1
    for (int s = 0; s < tile.rows; ++s) {
      const int last = at.source + (s + 1) * tile.pairs - 1;
      if (last < begin_source || last <= at.target + t * tile.pairs) continue;
      if (warp-- == 0) return {s * tile.pairs, t * tile.pairs, true};
    }
  return {0, 0, false};
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
// stages ascending. `some`: rows may be missing, which makes them zeros. `beside`: they may be
// 16-bit beside float32.
template <class Z, int rows, int length, bool async, bool some, bool beside>
struct RowCopy {
  static constexpr int size = sizeof(Z), part = 16 / size, parts = length / part;
  static constexpr int stride = kCostThreads / parts;  // rows that all threads copy together
  static constexpr int count = (rows + stride - 1) / stride;
  static_assert(kCostThreads % parts == 0 && (some || rows % stride == 0));

  const char* at[count];  // the next bytes; or (not async) the row, null where it is missing
  unsigned wanted;        // a bit for each row (async)

  static OSS_DEVICE int first_element() { return static_cast<int>(threadIdx.x) % parts * part; }

  static OSS_DEVICE Z* place(Z* stage, int k) {
    return stage + (threadIdx.x + k * kCostThreads) * part;
  }

  // row_at(k) is the row of the tile's k-th, less than 0 for none. Missing rows become zeros in all
  // stages.
  template <class RowAt, class StageAt>
  OSS_DEVICE void begin(const Tensor3& from, int64_t sample, int element, const RowAt& row_at,
                        int stages, const StageAt& stage_at) {
    wanted = 0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int mine = static_cast<int>(threadIdx.x) / parts + k * stride;
      const int64_t row = mine < rows ? row_at(mine) : -1;
      const bool missing = some && row < 0;
      // An address that moves is needed where nothing is read, too.
      at[k] = missing && !async ? nullptr : row_of(from, missing ? 0 : row, sample);
      if (async) at[k] += int64_t{element + first_element()} * size;
      if (!some) continue;
      if (!missing) {
        wanted |= 1u << k;
      } else if (mine < rows) {
        for (int s = 0; s < stages; ++s)
          *reinterpret_cast<Packed<float, 4>*>(place(stage_at(s), k)) = {};
      }
    }
  }

  // Copies `length` elements from `element` on; those from `end` on are zeros, of which there are
  // none where the stage is `full`.
  template <bool full>
  OSS_DEVICE void start(Z* stage, const Tensor3& from, int element, int end) {
    const int first = element + first_element();
    const int left = first < end ? end - first : 0, valid = left < part ? left : part;
    const unsigned bits = in_one_register(wanted);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      Z* const to = place(stage, k);
      const bool copied = !some || (async ? (bits >> k & 1) != 0 : at[k] != nullptr);
      if constexpr (async) {
        if (copied) full ? copy_async(to, at[k]) : copy_async(to, at[k], valid * size);
        at[k] += length * size;
      } else if (copied) {
#pragma unroll 1
        for (int n = 0; n < part; ++n) {
          if (n >= valid)
            to[n] = Z{};
          else if constexpr (beside)
            to[n] = load_beside<Z>(from.rows, at[k], first + n);
          else
            to[n] = load_element<Z>(from.rows, at[k], first + n);
        }
      }
    }
  }
};

// What a lane takes of chunks that follow each other.
template <class Z, class T, int count>
OSS_DEVICE void load_pairs(const Z* from, T (&values)[count]) {
#pragma unroll
  for (int n = 0; n < count; n += 2) load_packed<2>(from + n / 2 * kChunk, values + n);
}

// `roomy`: a block may share kRoomyBytes.
template <class Form, bool roomy>
constexpr Shape kShape = shape_of(Form::euler, Form::terms, sizeof(typename Form::Z),
                                  sizeof(typename Form::V), sizeof(typename Form::T), roomy);

// `async`: all rows are dense and aligned for copy_async, and of the type that is computed on.
template <class Form, bool async, bool roomy>
OSS_KERNEL void __launch_bounds__(kCostThreads, 1)
    cost_kernel(const CostArgs<typename Form::Of> a) {
  using Z = typename Form::Z;
  using V = typename Form::V;
  using T = typename Form::T;
  constexpr Shape shape = kShape<Form, roomy>;
  constexpr Tile tile = shape.tile;
  static_assert(shape.shared_bytes <= (roomy ? kRoomyBytes : kSharedBytes));
  static_assert(kFlushElements % shape.length == 0 && shape.length <= 2 * kUnit);
  constexpr int pairs = tile.pairs, count = pairs * pairs;
  constexpr int sources = tile.sources, targets = tile.targets;
  constexpr int terms = Form::terms, planes = Form::planes;
  constexpr int length = shape.length, width = 2 * shape.together;
  static_assert(length % (shape.together * kChunk) == 0);
  // Targets whose coefficients are in registers together.
  constexpr int at_once = async || terms <= 4 ? 4 : 2;
  constexpr int own = count > 32 ? count / 32 : 1;  // sums that a lane holds after add_lanes
  constexpr int lanes_per_sum = count > 32 ? 1 : 32 / count;

  char* const stages = dynamic_shared();
  // Of a stage.
  const auto targets_in = [&](int which) {
    return reinterpret_cast<Z*>(stages + which * shape.stage_bytes);
  };
  const auto firsts_in = [&](int which) { return targets_in(which) + targets * length; };
  const auto others_in = [&](int which, int r) {
    return reinterpret_cast<V*>(firsts_in(which) + sources * length) + (r - 1) * sources * length;
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const TileAt at = tile_at(static_cast<int>(a.end_source), tile, blockIdx.x);
  const SquareAt my = square_at(static_cast<int>(a.begin_source), tile, at, warp);
  const int64_t sample = a.first_sample + blockIdx.z;

  const int begin = element_of(a.elements, blockIdx.y, a.splits);
  const int end = element_of(a.elements, blockIdx.y + 1, a.splits);
  const int last_element = end < a.elements ? end : a.elements;
  RowCopy<Z, targets, length, async, true, false> target_copy;
  RowCopy<Z, sources, length, async, !Form::euler, !Form::euler> first_copy;
  RowCopy<V, sources, length, async, !Form::euler, !Form::euler> other_copies[terms - 1];
  const auto row_of_term = [&](int r) {
    return [&a, &at, r, sample](int k) {
      const int64_t i = at.source + k;
      if (i >= a.begin_source) return a.of.row(r, i, sample);
      return Form::euler ? a.of.row(r, a.begin_source, sample) : -1;  // for no pair
    };
  };
  // The last source of the tile steps to those before it.
  const auto row_of_target = [&](int k) {
    const int j = at.target + k;
    return k < at.columns * pairs && j < at.source + sources - 1 ? int64_t{j} : -1;
  };
  target_copy.begin(a.target, sample, begin, row_of_target, shape.stages, targets_in);
  first_copy.begin(a.of.tensor(0), sample, begin, row_of_term(0), shape.stages, firsts_in);
#pragma unroll
  for (int r = 1; r < terms; ++r)
    other_copies[r - 1].begin(a.of.tensor(r), sample, begin, row_of_term(r), shape.stages,
                              [&](int which) { return others_in(which, r); });
  const auto copy = [&](auto full, int element, int which) {
    target_copy.template start<full.value>(targets_in(which), a.target, element, last_element);
    first_copy.template start<full.value>(firsts_in(which), a.of.tensor(0), element, last_element);
#pragma unroll
    for (int r = 1; r < terms; ++r)
      other_copies[r - 1].template start<full.value>(others_in(which, r), a.of.tensor(r), element,
                                                     last_element);
  };
  const auto stage = [&](int element, int which) {
    if (async && element + length <= last_element)
      copy(std::true_type{}, element, which);
    else
      copy(std::false_type{}, element, which);
  };
  for (int s = 0; s < shape.stages - 1; ++s) {
    if (begin + s * length < end) stage(begin + s * length, s);
    end_copies();
  }

  // While the first copies come: [plane][source][target], of this warp's square.
  T* const coefficients =
      reinterpret_cast<T*>(stages + shape.stages * shape.stage_bytes) + warp * planes * count;
#pragma unroll
  for (int r = 0; r < planes; ++r)
    for (int k = lane; k < count; k += 32) {
      const int64_t i = at.source + my.source + k / pairs, j = at.target + my.target + k % pairs;
      coefficients[r * count + k] =
          my.any && i >= a.begin_source && j < i
              ? static_cast<T>(a.of.coefficient(r, i, j, sample))
              : T(0);
    }

  T sums[count] = {};
  double total[own] = {};
  int which = 0, element = begin;
  while (element < end) {
    const int flush = end - element < kFlushElements ? end : element + kFlushElements;
#pragma unroll 1
    for (; element < flush; element += length) {
      wait_copies<shape.stages - 2>();
      __syncthreads();
      const int next = element + (shape.stages - 1) * length;
      if (next < end) stage(next, which == 0 ? shape.stages - 1 : which - 1);
      end_copies();
      // The last stage of a split may be half empty.
      const int filled = length > kUnit && end - element < length ? kUnit : length;
      if (my.any) {
        const Z* const xs = targets_in(which) + my.target * length + 2 * lane;
        const Z* const firsts = firsts_in(which) + my.source * length + 2 * lane;
        const V* const others = others_in(which, 1) + my.source * length + 2 * lane;
#pragma unroll 1
        for (int chunk = 0; chunk < filled; chunk += shape.together * kChunk) {
          hold_loads();  // else all coefficients stay in registers, and others spill
          T x[pairs][width];
#pragma unroll
          for (int t = 0; t < pairs; ++t) load_pairs(xs + t * length + chunk, x[t]);
#pragma unroll
          for (int s = 0; s < pairs; ++s) {
            // Else those of the next sources spill.
            if (!Form::euler || !async) hold_loads();
            T basis[terms][width];
            load_pairs(firsts + s * length + chunk, basis[0]);
#pragma unroll
            for (int r = 1; r < terms; ++r)
              load_pairs(others + ((r - 1) * sources + s) * length + chunk, basis[r]);
#pragma unroll
            for (int first = 0; first < pairs; first += at_once) {
              T c[planes][at_once];
#pragma unroll
              for (int r = 0; r < planes; ++r)
                load_packed<at_once>(coefficients + r * count + s * pairs + first, c[r]);
#pragma unroll
              for (int t = 0; t < at_once; ++t) {
                T& sum = sums[s * pairs + first + t];
#pragma unroll
                for (int n = 0; n < width; ++n) {
                  T candidate = Form::euler ? basis[0][n] : multiply(c[0][t], basis[0][n]);
#pragma unroll
                  for (int r = 1; r < terms; ++r)
                    candidate = fma(c[Form::euler ? 0 : r][t], basis[r][n], candidate);
                  const T difference = candidate - x[first + t][n];
                  sum = fma(difference, difference, sum);
                }
              }
            }
          }
        }
      }
      which = which == shape.stages - 1 ? 0 : which + 1;
    }
    if (!my.any) continue;
    add_lanes<count>(sums, lane);
#pragma unroll
    for (int k = 0; k < own; ++k) total[k] += static_cast<double>(sums[k]);
#pragma unroll
    for (int k = 0; k < count; ++k) sums[k] = T(0);
  }

  if (!my.any || lane % lanes_per_sum != 0) return;
  const int64_t cells = cell_of(a.end_source, 0, a.begin_source);
  double* const out = a.sums + (int64_t{blockIdx.z} * a.splits + blockIdx.y) * cells;
#pragma unroll
  for (int k = 0; k < own; ++k) {
    const int pair = lane / lanes_per_sum * own + k;
    const int64_t i = at.source + my.source + pair / pairs;
    const int64_t j = at.target + my.target + pair % pairs;
    if (i >= a.begin_source && j < i) out[cell_of(i, j, a.begin_source)] = total[k];
  }
}

}  // namespace oss::cuda
