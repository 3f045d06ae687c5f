// The loops of the step: costs of all pairs, and the advance to the chosen ones. See kernels.h.
//
// For a pair with terms r = 0, 1, ... and a target j below its source, in the compute type
// (float32, float64 for float64 tensors):
//
//     candidate  = c[0,j] * b[0], then candidate = fma(c[r,j], b[r], candidate) in the order of r
//     difference = candidate - x[j]
//     sum        = fma(difference, difference, sum)
//
// one sum per lane within a block of elements, then a fixed tree over the lanes, then float64 over
// the blocks of a segment. Coefficients are float64, rounded once. Euler's step has the terms
// 1 * z[i] + (t[j] - t[i]) * v[i]; it is a case of its own, because it needs no product for the
// first. The candidate comes first, so that a teacher made of the same steps has cost exactly 0 on
// its own path; z[i] - x[j] first would spare a register copy, which is 3 to 5 % of the time. The
// order of additions of a cell does not depend on what is computed beside it.
//
// Included inside the namespace of the capability, so that nothing here is shared between them.

// Elements are padded with zeros to whole runs of `unroll` vectors.
constexpr int64_t unroll = 4;

template <class V>
static int64_t padded_size(int64_t n) {
  constexpr int64_t run = unroll * V::lanes;
  return (n + run - 1) / run * run;
}

// A number that the compiler knows.
template <int number>
struct Known {
  static constexpr int value = number;
};

// body(Known<terms>()).
template <class Body>
static void with_terms(int64_t terms, const Body& body) {
  static_assert(kMaxTerms == 6);
  switch (terms) {
    case 1: return body(Known<1>());
    case 2: return body(Known<2>());
    case 3: return body(Known<3>());
    case 4: return body(Known<4>());
    case 5: return body(Known<5>());
    default: return body(Known<6>());
  }
}

// A pair of the packed group: where its rows are packed, its coefficients, its cells.
template <class T>
struct Source {
  const T* rows;  // of its terms, kBlock apart
  const T* coefficients;
  int64_t coefficients_size;  // of one term
  double time;
  double* cells;
  int64_t index;
  int64_t terms;
};

// Adds the sums of `sources` pairs of as many terms against a tile of targets from `target` on,
// whose packed rows are kBlock apart; n elements, padded. A pair has targets below its source only.
template <class V, int sources, int terms, bool euler>
static void tile(const Source<typename V::Scalar>* source, const typename V::Scalar* x, int64_t n,
                 const double* times, int64_t target) {
  using T = typename V::Scalar;
  using Register = typename V::Register;
  constexpr int targets = V::tile_targets;
  static_assert(targets + 3 < kMaxTile && targets <= kMaxTile / 2);
  // As many targets at once as have their coefficients in registers, or half of them: it is the
  // loads that limit the speed where coefficients come from memory.
  constexpr int wanted = sources * (targets * (1 + terms - euler) + terms) + 1;
  constexpr int at_once = euler || wanted <= V::registers ? targets : targets / 2;
  Register sum[sources][targets];
#pragma GCC unroll 2
  for (int begin = 0; begin < targets; begin += at_once) {
    Register c[sources][terms][at_once];
#pragma GCC unroll 4
    for (int s = 0; s < sources; ++s) {
      T steps[kMaxTile];
      if constexpr (euler) V::steps(times + target, source[s].time, steps);
#pragma GCC unroll 16
      for (int t = 0; t < at_once; ++t) {
        sum[s][begin + t] = V::zero();
        if constexpr (euler) {
          c[s][1][t] = V::broadcast(steps[t]);
        } else {
          const T* of_target = source[s].coefficients + target + begin + t;
#pragma GCC unroll 8
          for (int r = 0; r < terms; ++r)
            c[s][r][t] = V::broadcast(of_target[r * source[s].coefficients_size]);
        }
      }
    }
    for (int64_t run = 0; run < n; run += unroll * V::lanes) {
#pragma GCC unroll 4
      for (int64_t e = run; e < run + unroll * V::lanes; e += V::lanes) {
        Register b[sources][terms];
#pragma GCC unroll 4
        for (int s = 0; s < sources; ++s)
#pragma GCC unroll 8
          for (int r = 0; r < terms; ++r) b[s][r] = V::load(source[s].rows + r * kBlock<T> + e);
#pragma GCC unroll 16
        for (int t = 0; t < at_once; ++t) {
          const Register xt = V::load(x + (begin + t) * kBlock<T> + e);
#pragma GCC unroll 4
          for (int s = 0; s < sources; ++s) {
            Register candidate = b[s][0];
            if constexpr (!euler) candidate = V::mul(c[s][0][t], candidate);
#pragma GCC unroll 8
            for (int r = 1; r < terms; ++r) candidate = V::fma(c[s][r][t], b[s][r], candidate);
            const Register difference = V::sub(candidate, xt);
            sum[s][begin + t] = V::fma(difference, difference, sum[s][begin + t]);
          }
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

// The tile for pairs of any form.
template <class V, int sources>
static void any_tile(const CostJob& job, const Source<typename V::Scalar>* source,
                     const typename V::Scalar* x, int64_t n, int64_t target) {
  if (job.coefficients == nullptr)
    return tile<V, sources, 2, true>(source, x, n, job.times, target);
  with_terms(source->terms, [&](auto terms) {
    tile<V, sources, decltype(terms)::value, false>(source, x, n, job.times, target);
  });
}

// Calls row(slot, term, pair) for the rows that the group beginning at pair l needs: those of a few
// sources, each in a slot of its own. Returns where the group ends.
template <class Row>
static int64_t for_group(const CostJob& job, int64_t l, int64_t end, const Row& row) {
  const int64_t slots = group_of(job.terms);
  int64_t slot = -1, source = -1;
  int term = 0;
  for (; l < end; ++l) {
    const Pair& pair = job.pairs[l];
    if (pair.source != source) {
      if (++slot == slots) break;
      source = pair.source;
      term = 0;
    }
    for (; term < pair.terms; ++term) row(slot, term, pair);
  }
  return l;
}

template <class V>
static void cost_of_segment(const CostJob& job, int64_t segment, int64_t begin, int64_t end,
                            void* scratch, int64_t scratch_bytes) {
  using T = typename V::Scalar;
  constexpr int64_t block = kBlock<T>;
  constexpr int64_t targets = V::tile_targets;
  T* rows = static_cast<T*>(scratch);
  T* x = rows + kScratchRows * block;
  const T* coefficients = static_cast<const T*>(job.coefficients);
  const Pair* pairs = job.pairs;
  double* slab = job.slabs + segment * job.slab_size;

  const int64_t last_target = pairs[end - 1].source;
  const int64_t panel = (scratch_bytes / kBlockBytes - kScratchRows) / targets * targets;
  const int64_t cells_end = pairs[end - 1].cells + last_target;
  for (int64_t c = pairs[begin].cells; c < cells_end; ++c) slab[c] = 0;
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
        pack(x + (j - p) * block, job.target, j, first, n, padded);

      int64_t l = begin;
      while (pairs[l].source <= p) ++l;
      for (int64_t group_end; l < end; l = group_end) {
        group_end = for_group(job, l, end, [&](int64_t slot, int term, const Pair& pair) {
          T* to = rows + (slot * job.terms + term) * block;
          pack(to, job.basis[term], pair.rows[term], first, n, padded);
        });
        // By their number of terms, so that those of a tile have as many, then by source.
        Source<T> source[kSourceGroup * kMaxOrders];
        int64_t count = 0, slot = 0;
        for (int64_t m = l; m < group_end; ++m) {
          const Pair& pair = pairs[m];
          if (m > l) slot += pair.source != pairs[m - 1].source;
          int64_t at = count++;
          for (; at > 0 && source[at - 1].terms > pair.terms; --at) source[at] = source[at - 1];
          source[at] = {rows + slot * job.terms * block,
                        coefficients == nullptr ? nullptr : coefficients + pair.coefficients,
                        coefficients_of(pair),
                        job.times == nullptr ? 0 : job.times[pair.source],
                        slab + pair.cells,
                        pair.source,
                        pair.terms};
        }
        const int64_t last = pairs[group_end - 1].source;
        const int64_t targets_end = last < panel_end ? last : panel_end;
        // What comes next: the next group of sources, and a part of the targets of the next block.
        prefetch.start();
        for_group(job, group_end, end, [&](int64_t, int term, const Pair& pair) {
          prefetch.add(job.basis[term], pair.rows[term], first, n);
        });
        if (b + 1 < last_block) {
          const int64_t rest = job.segments.elements - first - block;
          const int64_t coming = rest < block ? rest : block;
          if (group_end == end)
            for_group(job, begin, end, [&](int64_t, int term, const Pair& pair) {
              prefetch.add(job.basis[term], pair.rows[term], first + block, coming);
            });
          const int64_t part_begin = last_target * (l - begin) / (end - begin);
          const int64_t part_end = last_target * (group_end - begin) / (end - begin);
          for (int64_t j = part_begin; j < part_end; ++j)
            prefetch.add(job.target, j, first + block, coming);
        }
        for (int64_t j = p; j < targets_end; j += targets) {
          prefetch.step((targets_end - j + targets - 1) / targets);
          const T* xj = x + (j - p) * block;
          for (int64_t s = 0; s < count; ++s) {
            if (source[s].index <= j) continue;
            if constexpr (V::tile_sources == 2)
              if (s + 1 < count && source[s].terms == source[s + 1].terms) {
                any_tile<V, 2>(job, source + s++, xj, padded, j);
                continue;
              }
            any_tile<V, 1>(job, source + s, xj, padded, j);
          }
        }
      }
    }
  }
}

static void cost(const CostJob& job, int64_t segment, int64_t begin, int64_t end, void* scratch,
                 int64_t scratch_bytes) {
  if (job.target.dtype == DType::float64)
    cost_of_segment<Double>(job, segment, begin, end, scratch, scratch_bytes);
  else
    cost_of_segment<Float>(job, segment, begin, end, scratch, scratch_bytes);
}

// One block of one chosen pair: writes the candidates, by V::stream if `streamed`, and returns
// their sum of squared differences from x (which may be null), with the additions of `tile`.
template <class V, int terms>
static typename V::Scalar advance_block(const typename V::Scalar* const* rows,
                                        const typename V::Scalar* coefficients,
                                        const typename V::Scalar* x, int64_t n,
                                        typename V::Scalar* candidates, bool streamed) {
  using T = typename V::Scalar;
  using Register = typename V::Register;
  Register c[terms];
#pragma GCC unroll 8
  for (int r = 0; r < terms; ++r) c[r] = V::broadcast(coefficients[r]);
  Register sum = V::zero();
  for (int64_t e = 0; e < n; e += V::lanes) {
    Register candidate = V::mul(c[0], V::load(rows[0] + e));
#pragma GCC unroll 8
    for (int r = 1; r < terms; ++r) candidate = V::fma(c[r], V::load(rows[r] + e), candidate);
    if (x != nullptr) {
      const Register difference = V::sub(candidate, V::load(x + e));
      sum = V::fma(difference, difference, sum);
    }
    if (streamed)
      V::stream(candidates + e, candidate);
    else
      V::store(candidates + e, candidate);
  }
  T out[4];
  V::template sums<1>(&sum, out);
  return out[0];
}

// What a target without terms gets.
template <class T>
static void absent_block(const AdvanceJob& job, int64_t target, int64_t first, int64_t n,
                         int64_t padded, T* scratch, char* next) {
  if (job.absent == Absent::kept) {
    encode(next, view(scratch, job.basis[0], target, first, n, padded), job.next.dtype, n);
  } else {
    for (int64_t e = 0; e < n; ++e) scratch[e] = 0;
    encode(next, scratch, job.next.dtype, n);
  }
}

template <class V>
static void advance_segment(const AdvanceJob& job, int64_t segment) {
  using T = typename V::Scalar;
  constexpr int64_t block = kBlock<T>;
  // Runs of a few blocks: long enough to stream, short enough that a source which several targets
  // share stays in the cache.
  constexpr int64_t run = 8;
  alignas(64) T packed[kMaxTerms][block], x[block], candidates[block];
  const int64_t size = size_of(job.next.dtype);
  const bool wanted = job.next.data != nullptr;
  const bool write_through = wanted && size == static_cast<int64_t>(sizeof(T));
  double* sums = job.sums + segment * job.targets;
  if (job.target.data != nullptr)
    for (int64_t j = 0; j < job.targets; ++j) sums[j] = 0;

  const int64_t end = first_block(job.segments, segment + 1);
  for (int64_t begin = first_block(job.segments, segment); begin < end; begin += run) {
    const int64_t run_end = begin + run < end ? begin + run : end;
    for (int64_t j = 0; j < job.targets; ++j) {
      int present[kMaxTerms], terms = 0;
      T coefficients[kMaxTerms];
      for (int r = 0; r < job.terms; ++r) {
        if (job.rows[j * job.terms + r] < 0) continue;
        coefficients[terms] = static_cast<T>(job.coefficients[j * job.terms + r]);
        present[terms++] = r;
      }
      if (terms == 0 && job.absent == Absent::untouched) continue;
      for (int64_t b = begin; b < run_end; ++b) {
        const int64_t first = b * block;
        const int64_t n =
            job.segments.elements - first < block ? job.segments.elements - first : block;
        const int64_t padded = padded_size<V>(n);
        char* next = wanted ? job.next.data + j * job.next.row_stride + first * size : nullptr;
        if (terms == 0) {
          absent_block(job, j, first, n, padded, candidates, next);
          continue;
        }
        const bool direct = write_through && n == padded;
        const T* rows[kMaxTerms];
        for (int k = 0; k < terms; ++k) {
          const int r = present[k];
          rows[k] = view(packed[k], job.basis[r], job.rows[j * job.terms + r], first, n, padded);
        }
        const T* xj =
            job.target.data == nullptr ? nullptr : view(x, job.target, j, first, n, padded);
        T* to = direct ? reinterpret_cast<T*>(next) : candidates;
        const bool streamed = direct && job.streamed && reinterpret_cast<uintptr_t>(to) % 64 == 0;
        T sum = 0;
        with_terms(terms, [&](auto known) {
          constexpr int count = decltype(known)::value;
          sum = advance_block<V, count>(rows, coefficients, xj, padded, to, streamed);
        });
        if (wanted && !direct) encode(next, candidates, job.next.dtype, n);
        if (xj != nullptr) sums[j] += static_cast<double>(sum);
      }
    }
  }
  fence();
}

static void advance(const AdvanceJob& job, int64_t segment) {
  if (job.basis[0].dtype == DType::float64)
    advance_segment<Double>(job, segment);
  else
    advance_segment<Float>(job, segment);
}
