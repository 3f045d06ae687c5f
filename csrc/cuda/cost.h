// The cost pass: sums of squared differences of all pairs of a source and a target below it.
//
//     candidate  = fma(dt, v[i], z[i]),  dt = t[j] - t[i] subtracted in float64, rounded once
//     difference = candidate - x[j]
//     sum        = fma(difference, difference, sum)
//
// A block computes a tile of pairs over one split of the elements. Each warp owns a square of the
// tile; its lanes lie side by side along the elements, so that rows are read as they lie in memory
// and every pair has one sum per lane. After kFlushChunks chunks the lanes are added in a fixed
// tree and the result is added in float64. No atomics: the order of additions of a pair depends on
// the splits alone, not on the tile that it falls in.
#pragma once

#include "cuda/launch.h"
#include "cuda/platform.h"

namespace oss::cuda {

struct CostArgs {
  Tensor3 state, velocity, teacher;
  Mask mask;
  const double* times;
  int elements;
  int64_t first_source;              // row 0 of velocity belongs to this source
  int64_t begin_source, end_source;  // those to compute, from 1 on
  int64_t first_sample;              // of blockIdx.z == 0
  int splits;
  double* sums;  // [samples of this launch, splits, cells of the sources to compute]
};

// Where the pairs of a source lie among those of [begin, ...).
OSS_DEVICE int64_t cell_of(int64_t source, int64_t target, int64_t begin) {
  return (source * (source - 1) - begin * (begin - 1)) / 2 + target;
}

// The first chunk of a split; no product on the way exceeds 2^31 / 64 chunks x 2^16 splits.
OSS_DEVICE int chunk_of(int elements, int split, int splits) {
  const int64_t chunks = (int64_t{elements} + kChunk - 1) / kChunk;
  return static_cast<int>(chunks * split / splits);
}

struct TileAt {
  int64_t source, target;  // the first ones
};

OSS_DEVICE TileAt tile_at(const CostArgs& a, int sources, int targets, int index) {
  for (int64_t source = a.begin_source;; source += sources) {
    const int64_t end = source + sources < a.end_source ? source + sources : a.end_source;
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
// chunk, chunks ascending.
template <class Z, int tile, bool async>
struct RowCopy {
  static constexpr int size = sizeof(Z), part = 16 / size, parts = kChunk / part;
  static constexpr int stride = kCostThreads / parts;  // rows that all threads copy together
  static constexpr int count = (tile + stride - 1) / stride;
  static_assert(kCostThreads % parts == 0);

  const char* at[count];  // the next bytes (async), or the row
  bool wanted[count];     // or else zeros

  // `first` is the tile's first row; rows from `end` on, and dead ones, become zeros.
  OSS_DEVICE RowCopy(const Tensor3& from, int64_t first, int64_t end, int64_t shift, int64_t sample,
                     const Mask& mask, int chunk) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int64_t index = first + threadIdx.x / parts + k * stride;
      wanted[k] = index < end && mask.live(index, sample);
      // An address is needed where nothing is read, too.
      at[k] = row_of(from, (index < end ? index : end - 1) - shift, sample);
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
        for (int n = 0; n < part; ++n)
          out[n] = wanted[k] && n < valid ? load_element<Z>(from.rows, at[k], e + n) : Z{};
      }
    }
  }
};

template <class Z, class V>
constexpr int cost_stage_bytes =
    kChunk * ((kSourceTile<Compute<Z>> + kTargetTile<Compute<Z>>)*int{sizeof(Z)} +
              kSourceTile<Compute<Z>> * int{sizeof(V)});
template <class Z, class V>
constexpr int cost_shared_bytes =
    kStages * cost_stage_bytes<Z, V> +
    kSourceTile<Compute<Z>> * kTargetTile<Compute<Z>> * int{sizeof(Compute<Z>)};

// `async`: all rows are dense and aligned for copy_async.
template <class Z, class V, bool async>
OSS_KERNEL void __launch_bounds__(kCostThreads, 1) cost_kernel(const CostArgs a) {
  using T = Compute<Z>;
  constexpr int sources = kSourceTile<T>, targets = kTargetTile<T>;
  constexpr int pairs = kPairs<T>, count = pairs * pairs;
  constexpr int own = count > 32 ? count / 32 : 1;  // sums that a lane holds after add_lanes
  constexpr int lanes_per_sum = count > 32 ? 1 : 32 / count;

  char* const stages = dynamic_shared();
  T* const dt =
      reinterpret_cast<T*>(stages + kStages * cost_stage_bytes<Z, V>);  // [target][source]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_source = warp / kTargetWarps * pairs, my_target = warp % kTargetWarps * pairs;
  const TileAt at = tile_at(a, sources, targets, blockIdx.x);
  const int64_t sample = a.first_sample + blockIdx.z;

  for (int k = threadIdx.x; k < sources * targets; k += kCostThreads) {
    const int64_t i = at.source + k % sources, j = at.target + k / sources;
    dt[k] = i < a.end_source && j < i ? static_cast<T>(a.times[j] - a.times[i]) : T(0);
  }

  const int begin = chunk_of(a.elements, blockIdx.y, a.splits);
  const int end = chunk_of(a.elements, blockIdx.y + 1, a.splits);
  RowCopy<Z, sources, async> z_copy(a.state, at.source, a.end_source, 0, sample, a.mask, begin);
  RowCopy<V, sources, async> v_copy(a.velocity, at.source, a.end_source, a.first_source, sample,
                                    a.mask, begin);
  RowCopy<Z, targets, async> x_copy(a.teacher, at.target, a.end_source - 1, 0, sample, Mask{},
                                    begin);
  const auto stage = [&](int chunk, int which) {
    Z* const z = reinterpret_cast<Z*>(stages + which * cost_stage_bytes<Z, V>);
    z_copy.start(z, a.state, a.elements, chunk);
    x_copy.start(z + sources * kChunk, a.teacher, a.elements, chunk);
    v_copy.start(reinterpret_cast<V*>(z + (sources + targets) * kChunk), a.velocity, a.elements,
                 chunk);
  };
  for (int s = 0; s < kStages - 1; ++s) {
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
    wait_copies<kStages - 2>();
    __syncthreads();
    if (chunk + kStages - 1 < end) stage(chunk + kStages - 1, which == 0 ? kStages - 1 : which - 1);
    end_copies();
    if (busy) {
      const Z* const z = reinterpret_cast<const Z*>(stages + which * cost_stage_bytes<Z, V>);
      const Z* const x = z + sources * kChunk;
      const V* const v = reinterpret_cast<const V*>(x + targets * kChunk);
      // Four sources at a time: the operands of all eight would not fit beside the sums.
#pragma unroll
      for (int first = 0; first < pairs; first += 4) {
        Two<T> zs[4], vs[4];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          zs[s] = load_two(z + (my_source + first + s) * kChunk + 2 * lane);
          vs[s] = load_two(v + (my_source + first + s) * kChunk + 2 * lane);
        }
#pragma unroll
        for (int t = 0; t < pairs; ++t) {
          const Two<T> xt = load_two(x + (my_target + t) * kChunk + 2 * lane);
          const auto steps = *reinterpret_cast<const Packed<T, 4>*>(dt + (my_target + t) * sources +
                                                                    my_source + first);
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            const T a_difference = fma(steps.values[s], vs[s].a, zs[s].a) - xt.a;
            const T b_difference = fma(steps.values[s], vs[s].b, zs[s].b) - xt.b;
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
    which = which == kStages - 1 ? 0 : which + 1;
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

struct PairCostArgs {
  CostArgs cost;
  Parents parents;
  Numbers best;  // written where the parent is one of the sources to compute
};

constexpr int kPairThreads = 128;

// Block (target, sample); shared memory: a double for each split.
template <class Z, class V>
OSS_KERNEL void __launch_bounds__(kPairThreads) pair_cost_kernel(const PairCostArgs p) {
  using T = Compute<Z>;
  const CostArgs& a = p.cost;
  double* const totals = reinterpret_cast<double*>(dynamic_shared());
  const int64_t j = blockIdx.x, sample = a.first_sample + blockIdx.z;
  const int64_t i = p.parents.at(j, sample);
  if (i < a.begin_source) return;  // none, or one of an earlier chunk: the same for all threads
  const T dt = static_cast<T>(a.times[j] - a.times[i]);
  const char* const z = row_of(a.state, i, sample);
  const char* const v = row_of(a.velocity, i - a.first_source, sample);
  const char* const x = row_of(a.teacher, j, sample);
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
        const T vt = widen(load_element<V>(a.velocity.rows, v, e));
        const T zt = widen(load_element<Z>(a.state.rows, z, e));
        const T difference = fma(dt, vt, zt) - widen(load_element<Z>(a.teacher.rows, x, e));
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
  p.best.set(j, sample, sum / static_cast<double>(a.elements));
}

}  // namespace oss::cuda
