// The advance: next[j] = fma(t[j] - t[r], v[r], z[r]) for the parent r of every target j, rounded
// once to the state's type.
//
// A thread owns a column of elements and walks the targets upwards, a few at a time: it reads
// theirs before it writes any. In place that is safe, because the parent of target j is above j and
// the rows above j are written later.
#pragma once

#include "cuda/launch.h"
#include "cuda/platform.h"

namespace oss::cuda {

struct AdvanceArgs {
  Tensor3 state, velocity;
  Tensor3 next;  // dense; the state itself in place
  const double* times;
  Parents parents;
  int64_t elements;
  int64_t first_source;  // row 0 of velocity belongs to this source
  int64_t targets;
  int64_t targets_per_block;
  int64_t first_sample;  // of blockIdx.z == 0
  bool in_place;
};

// Grid (blocks over columns of `width` elements, groups of targets, samples).
template <class Z, class V, int width>
OSS_KERNEL void __launch_bounds__(kAdvanceThreads) advance_kernel(const AdvanceArgs a) {
  using T = Compute<Z>;
  constexpr int at_once = 4;
  const int64_t e = (int64_t{blockIdx.x} * kAdvanceThreads + threadIdx.x) * width;
  if (e >= a.elements) return;
  const int64_t sample = a.first_sample + blockIdx.z;
  const int64_t state_at = offset_of(a.state.rows, static_cast<unsigned>(e), sizeof(Z));
  const int64_t velocity_at = offset_of(a.velocity.rows, static_cast<unsigned>(e), sizeof(V));
  const int64_t next_at = e * static_cast<int64_t>(sizeof(Z));
  const int64_t begin = blockIdx.y * a.targets_per_block;
  const int64_t end =
      begin + a.targets_per_block < a.targets ? begin + a.targets_per_block : a.targets;

  for (int64_t first = begin; first < end; first += at_once) {
    Packed<Z, width> out[at_once];
    bool write[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      const int64_t j = first + k;
      const int64_t parent = j < end ? a.parents.at(j, sample) : -1;
      // Parents of earlier chunks of sources are below first_source: their targets are in place.
      const bool moved = parent >= a.first_source && parent >= 0;
      write[k] = j < end && (moved || !a.in_place);
      if (!write[k]) continue;
      const char* const z = row_of(a.state, moved ? parent : j, sample) + state_at;
      const auto zs = *reinterpret_cast<const Packed<Z, width>*>(z);
      if (!moved) {
        out[k] = zs;
        continue;
      }
      const char* const v = row_of(a.velocity, parent - a.first_source, sample) + velocity_at;
      const auto vs = *reinterpret_cast<const Packed<V, width>*>(v);
      const T dt = static_cast<T>(a.times[j] - a.times[parent]);
#pragma unroll
      for (int n = 0; n < width; ++n)
        narrow(fma(dt, static_cast<T>(widen(vs.values[n])), widen(zs.values[n])), out[k].values[n]);
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (!write[k]) continue;
      char* const to = const_cast<char*>(row_of(a.next, first + k, sample)) + next_at;
      *reinterpret_cast<Packed<Z, width>*>(to) = out[k];
    }
  }
}

}  // namespace oss::cuda
