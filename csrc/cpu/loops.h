// The loops of the step: costs of all pairs, and the advance to the chosen ones. See kernels.h.
//
// For a source i and a target j < i, with dt = t[j] - t[i] subtracted in float64 and rounded once:
//
//     candidate  = fma(dt, v[i], z[i])
//     difference = candidate - x[j]
//     sum        = fma(difference, difference, sum)
//
// in the compute type (float32, float64 for float64 tensors), one sum per lane within a block of
// elements, then a fixed tree over the lanes, then float64 over the blocks of a segment. The
// candidate comes first, so that a teacher made of the same steps has cost exactly 0 on its own
// path; z[i] - x[j] first would spare a register copy, which is 3 to 5 % of the time. The order of
// additions of a pair does not depend on what is computed beside it.
//
// Included inside the namespace of the capability, so that nothing here is shared between them.

// Elements are padded with zeros to whole runs of `unroll` vectors.
constexpr int64_t unroll = 4;

template <class V>
static int64_t padded_size(int64_t n) {
  constexpr int64_t run = unroll * V::lanes;
  return (n + run - 1) / run * run;
}

// A source of the packed group: where it is packed, where its cells are.
template <class T>
struct Source {
  const T* z;
  const T* v;
  double time;
  double* cells;
  int64_t index;
};

// Adds the sums of `sources` sources against a tile of targets from `target` on, whose packed rows
// are kBlock apart; n elements, padded. A source has targets below its own index only.
template <class V, int sources>
static void tile(const Source<typename V::Scalar>* source, const typename V::Scalar* x, int64_t n,
                 const double* times, int64_t target) {
  using T = typename V::Scalar;
  using Register = typename V::Register;
  constexpr int targets = V::tile_targets;
  static_assert(targets + 3 < kMaxTile);
  Register sum[sources][targets], dt[sources][targets];
#pragma GCC unroll 4
  for (int s = 0; s < sources; ++s) {
    T steps[kMaxTile];
    V::steps(times + target, source[s].time, steps);
#pragma GCC unroll 16
    for (int t = 0; t < targets; ++t) {
      sum[s][t] = V::zero();
      dt[s][t] = V::broadcast(steps[t]);
    }
  }
  for (int64_t run = 0; run < n; run += unroll * V::lanes) {
#pragma GCC unroll 4
    for (int64_t e = run; e < run + unroll * V::lanes; e += V::lanes) {
      Register zs[sources], vs[sources];
#pragma GCC unroll 4
      for (int s = 0; s < sources; ++s) {
        zs[s] = V::load(source[s].z + e);
        vs[s] = V::load(source[s].v + e);
      }
#pragma GCC unroll 16
      for (int t = 0; t < targets; ++t) {
        const Register xt = V::load(x + t * kBlock<T> + e);
#pragma GCC unroll 4
        for (int s = 0; s < sources; ++s) {
          const Register difference = V::sub(V::fma(dt[s][t], vs[s], zs[s]), xt);
          sum[s][t] = V::fma(difference, difference, sum[s][t]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < sources; ++s) {
    alignas(64) T sums[kMaxTile];
    V::template sums<targets>(sum[s], sums);
    double* cells = source[s].cells + target;
    const int64_t count = source[s].index - target;
    if (count >= targets) {
      for (int t = 0; t < targets; ++t) cells[t] += static_cast<double>(sums[t]);
    } else {
      for (int t = 0; t < count; ++t) cells[t] += static_cast<double>(sums[t]);
    }
  }
}

template <class V>
static void cost_of_segment(const CostJob& job, int64_t segment, int64_t begin, int64_t end,
                            void* scratch, int64_t scratch_bytes) {
  using T = typename V::Scalar;
  constexpr int64_t block = kBlock<T>;
  constexpr int64_t targets = V::tile_targets;
  T* z = static_cast<T*>(scratch);
  T* v = z + kSourceGroup * block;
  T* x = z + kScratchRows * block;
  const int64_t* live = job.live;
  double* slab = job.slabs + segment * job.slab_size;

  const int64_t last_target = live[end - 1];
  const int64_t panel = (scratch_bytes / kBlockBytes - kScratchRows) / targets * targets;
  const int64_t cells_end = job.offsets[end - 1] + last_target;
  for (int64_t c = job.offsets[begin]; c < cells_end; ++c) slab[c] = 0;
  // The last tile may read rows that no target fills: they only need to be numbers.
  __builtin_memset(x + (last_target - 1) % panel / targets * targets * block, 0,
                   targets * kBlockBytes);

  Prefetch prefetch;
  const int64_t last_block = first_block(job.segments, segment + 1);
  for (int64_t b = first_block(job.segments, segment); b < last_block; ++b) {
    const int64_t first = b * block;
    const int64_t n = job.segments.elements - first < block ? job.segments.elements - first : block;
    const int64_t padded = padded_size<V>(n);
    for (int64_t p = 0; p < last_target; p += panel) {
      const int64_t panel_end = p + panel < last_target ? p + panel : last_target;
      for (int64_t j = p; j < panel_end; ++j)
        pack(x + (j - p) * block, job.teacher, j, first, n, padded);

      int64_t l = begin;
      while (live[l] <= p) ++l;
      for (; l < end; l += kSourceGroup) {
        const int64_t group = end - l < kSourceGroup ? end - l : kSourceGroup;
        Source<T> source[kSourceGroup];
        for (int64_t s = 0; s < group; ++s) {
          const int64_t i = live[l + s];
          source[s] = {z + s * block, v + s * block, job.times[i], slab + job.offsets[l + s], i};
          pack(z + s * block, job.state, i, first, n, padded);
          pack(v + s * block, job.velocity, i - job.first_source, first, n, padded);
        }
        const int64_t last = live[l + group - 1];
        const int64_t targets_end = last < panel_end ? last : panel_end;
        // What comes next: the next group of sources, and a part of the targets of the next block.
        prefetch.start();
        for (int64_t m = l + group; m < end && m < l + group + kSourceGroup; ++m) {
          prefetch.add(job.state, live[m], first, n);
          prefetch.add(job.velocity, live[m] - job.first_source, first, n);
        }
        if (b + 1 < last_block) {
          const int64_t rest = job.segments.elements - first - block;
          const int64_t coming = rest < block ? rest : block;
          for (int64_t m = begin; l + group == end && m < end && m < begin + kSourceGroup; ++m) {
            prefetch.add(job.state, live[m], first + block, coming);
            prefetch.add(job.velocity, live[m] - job.first_source, first + block, coming);
          }
          const int64_t part_begin = last_target * (l - begin) / (end - begin);
          const int64_t part_end = last_target * (l - begin + group) / (end - begin);
          for (int64_t j = part_begin; j < part_end; ++j)
            prefetch.add(job.teacher, j, first + block, coming);
        }
        int64_t s0 = 0;
        for (int64_t j = p; j < targets_end; j += targets) {
          prefetch.step((targets_end - j + targets - 1) / targets);
          while (source[s0].index <= j) ++s0;
          const T* xj = x + (j - p) * block;
          int64_t s = s0;
          if constexpr (V::tile_sources == 2)
            for (; s + 1 < group; s += 2) tile<V, 2>(source + s, xj, padded, job.times, j);
          for (; s < group; ++s) tile<V, 1>(source + s, xj, padded, job.times, j);
        }
      }
    }
  }
}

static void cost(const CostJob& job, int64_t segment, int64_t begin, int64_t end, void* scratch,
                 int64_t scratch_bytes) {
  if (job.state.dtype == DType::float64)
    cost_of_segment<Double>(job, segment, begin, end, scratch, scratch_bytes);
  else
    cost_of_segment<Float>(job, segment, begin, end, scratch, scratch_bytes);
}

// One block of one chosen pair: writes the candidates, returns their sum of squared differences
// from x (which may be null), with the additions of `tile`.
template <class V>
static typename V::Scalar advance_block(const typename V::Scalar* z, const typename V::Scalar* v,
                                        const typename V::Scalar* x, typename V::Scalar dt,
                                        int64_t n, typename V::Scalar* candidates) {
  using T = typename V::Scalar;
  using Register = typename V::Register;
  const Register step = V::broadcast(dt);
  Register sum = V::zero();
  for (int64_t e = 0; e < n; e += V::lanes) {
    const Register candidate = V::fma(step, V::load(v + e), V::load(z + e));
    if (x != nullptr) {
      const Register difference = V::sub(candidate, V::load(x + e));
      sum = V::fma(difference, difference, sum);
    }
    V::store(candidates + e, candidate);
  }
  T out[4];
  V::template sums<1>(&sum, out);
  return out[0];
}

template <class V>
static void advance_segment(const AdvanceJob& job, int64_t segment) {
  using T = typename V::Scalar;
  constexpr int64_t block = kBlock<T>;
  // Runs of a few blocks: long enough to stream, short enough that a source which several targets
  // share stays in the cache.
  constexpr int64_t run = 8;
  alignas(64) T z[block], v[block], x[block], candidates[block];
  const int64_t size = size_of(job.next.dtype);
  const bool write_through = size == static_cast<int64_t>(sizeof(T));
  double* sums = job.sums + segment * job.targets;
  if (job.teacher.data != nullptr)
    for (int64_t j = 0; j < job.targets; ++j) sums[j] = 0;

  const int64_t end = first_block(job.segments, segment + 1);
  for (int64_t begin = first_block(job.segments, segment); begin < end; begin += run) {
    const int64_t run_end = begin + run < end ? begin + run : end;
    for (int64_t j = 0; j < job.targets; ++j) {
      const int64_t i = job.parent[j];
      if (i < 0 && job.in_place) continue;
      for (int64_t b = begin; b < run_end; ++b) {
        const int64_t first = b * block;
        const int64_t n =
            job.segments.elements - first < block ? job.segments.elements - first : block;
        const int64_t padded = padded_size<V>(n);
        char* next = job.next.data + j * job.next.row_stride + first * size;
        if (i < 0) {
          encode(next, view(z, job.state, j, first, n, padded), job.next.dtype, n);
          continue;
        }
        const bool direct = write_through && n == padded;
        const T* zi = view(z, job.state, i, first, n, padded);
        const T* vi = view(v, job.velocity, i - job.first_source, first, n, padded);
        const T* xj =
            job.teacher.data == nullptr ? nullptr : view(x, job.teacher, j, first, n, padded);
        const T dt = static_cast<T>(job.times[j] - job.times[i]);
        T* to = direct ? reinterpret_cast<T*>(next) : candidates;
        const T sum = advance_block<V>(zi, vi, xj, dt, padded, to);
        if (!direct) encode(next, candidates, job.next.dtype, n);
        if (xj != nullptr) sums[j] += static_cast<double>(sum);
      }
    }
  }
}

static void advance(const AdvanceJob& job, int64_t segment) {
  if (job.state.dtype == DType::float64)
    advance_segment<Double>(job, segment);
  else
    advance_segment<Float>(job, segment);
}
