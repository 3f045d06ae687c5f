// The advance: next[j] = fma(t[j] - t[r], v[r], z[r]) for the parent r of every target j; and the
// combination, next[j] = the sum of c[r, j] * b[r] in the order of r. Rounded once to next's type.
//
// A thread owns a column of elements and walks the targets upwards, a few at a time: it reads
// theirs before it writes any. In place that is safe, because the parent of target j is above j and
// the rows above j are written later.
#pragma once

#include "cuda/candidates.h"

namespace oss::cuda {

// What a column reads for a target: of the parents that Euler's steps come from,
struct EulerMoves {
  EulerSteps steps;
  Parents parents;
  bool in_place;
};

// or of given rows.
struct Combination {
  Basis basis;                 // index: [terms, targets, samples]
  const double* coefficients;  // likewise
  int64_t strides[3];
};

template <class Moves>
struct AdvanceArgs {
  Moves moves;
  Tensor3 next;  // dense; the state itself in place
  int64_t elements;
  int64_t targets;
  int64_t targets_per_block;
  int64_t first_sample;  // of blockIdx.z == 0
};

// `width` elements from e on, of one sample.
template <class Stored, class V, int elements>
struct EulerColumn {
  using Moves = EulerMoves;
  using Z = Stored;
  using T = Compute<Z>;
  static constexpr int width = elements;

  const EulerMoves& m;
  const int64_t sample, state_at, velocity_at;

  OSS_DEVICE EulerColumn(const EulerMoves& m, int64_t sample, unsigned e)
      : m(m),
        sample(sample),
        state_at(offset_of(m.steps.state.rows, e, sizeof(Z))),
        velocity_at(offset_of(m.steps.velocity.rows, e, sizeof(V))) {}

  // Whether there is anything to write for target j.
  OSS_DEVICE bool read(int64_t j, Packed<Z, width>& out) const {
    const EulerSteps& steps = m.steps;
    const int64_t parent = m.parents.at(j, sample);
    // Parents of earlier chunks of sources are below first_source: their targets are in place.
    const bool moved = parent >= steps.first_source && parent >= 0;
    if (!moved && m.in_place) return false;
    const char* const z = row_of(steps.state, moved ? parent : j, sample) + state_at;
    const auto zs = *reinterpret_cast<const Packed<Z, width>*>(z);
    if (!moved) {
      out = zs;
      return true;
    }
    const char* const v =
        row_of(steps.velocity, parent - steps.first_source, sample) + velocity_at;
    const auto vs = *reinterpret_cast<const Packed<V, width>*>(v);
    const T dt = static_cast<T>(steps.gap(parent, j));
#pragma unroll
    for (int n = 0; n < width; ++n)
      narrow(fma(dt, static_cast<T>(widen(vs.values[n])), widen(zs.values[n])), out.values[n]);
    return true;
  }
};

template <class Stored, int elements>
struct CombinedColumn {
  using Moves = Combination;
  using Z = Stored;
  using T = Compute<Z>;
  static constexpr int width = elements;

  const Combination& m;
  const int64_t sample;
  const unsigned e;

  OSS_DEVICE CombinedColumn(const Combination& m, int64_t sample, unsigned e)
      : m(m), sample(sample), e(e) {}

  OSS_DEVICE void load(const Tensor3& tensor, int64_t row, T (&values)[width]) const {
    with_row_type<Z>(tensor.rows.dtype, [&](auto stored) {
      using Row = decltype(stored);
      const char* const from = row_of(tensor, row, sample) + offset_of(tensor.rows, e, sizeof(Row));
      const auto packed = *reinterpret_cast<const Packed<Row, width>*>(from);
#pragma unroll
      for (int n = 0; n < width; ++n) values[n] = widen(packed.values[n]);
    });
  }

  OSS_DEVICE bool read(int64_t j, Packed<Z, width>& out) const {
    T sum[width] = {};
    bool first = true;
#pragma unroll
    for (int r = 0; r < kMaxTerms; ++r) {
      const int64_t row = m.basis.row(r, j, sample);
      if (row < 0) continue;
      const T c = static_cast<T>(
          m.coefficients[r * m.strides[0] + j * m.strides[1] + sample * m.strides[2]]);
      T values[width];
      load(m.basis.tensors[r], row, values);
#pragma unroll
      for (int n = 0; n < width; ++n)
        sum[n] = first ? multiply(c, values[n]) : fma(c, values[n], sum[n]);
      first = false;
    }
#pragma unroll
    for (int n = 0; n < width; ++n) narrow(sum[n], out.values[n]);
    return true;
  }
};

// Grid (blocks over columns, groups of targets, samples).
template <class Column>
OSS_KERNEL void __launch_bounds__(kAdvanceThreads, kAdvanceBlocks)
    advance_kernel(const AdvanceArgs<typename Column::Moves> a) {
  using Row = Packed<typename Column::Z, Column::width>;
  constexpr int at_once = 4;
  const int64_t e = (int64_t{blockIdx.x} * kAdvanceThreads + threadIdx.x) * Column::width;
  if (e >= a.elements) return;
  const int64_t sample = a.first_sample + blockIdx.z;
  const Column column(a.moves, sample, static_cast<unsigned>(e));
  const int64_t next_at = e * static_cast<int64_t>(sizeof(typename Column::Z));
  const int64_t begin = blockIdx.y * a.targets_per_block;
  const int64_t end =
      begin + a.targets_per_block < a.targets ? begin + a.targets_per_block : a.targets;

  for (int64_t first = begin; first < end; first += at_once) {
    Row out[at_once];
    bool write[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k)
      write[k] = first + k < end && column.read(first + k, out[k]);
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (!write[k]) continue;
      char* const to = const_cast<char*>(row_of(a.next, first + k, sample)) + next_at;
      *reinterpret_cast<Row*>(to) = out[k];
    }
  }
}

}  // namespace oss::cuda
