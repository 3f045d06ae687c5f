// The operators as launches of the kernels, without torch: pointers in, results in memory. `Gpu`
// gives device(), allocate(bytes) -> workspace that lives until the operator ends, and
// launch(kernel, grid, threads, shared bytes, arguments); on the host it runs the kernels there.
// Nothing here waits for the device or depends on values in its memory.
#pragma once

#include <cstdint>

#include "cuda/advance.h"
#include "cuda/cost.h"
#include "cuda/launch.h"
#include "cuda/select.h"

namespace oss::cuda {

struct Grid {
  int64_t x, y = 1, z = 1;
};

struct Problem {
  int64_t steps;  // N
  int64_t samples;
  int64_t elements;
  Tensor3 state, velocity, teacher;
  const double* times;
  Mask mask;
  int64_t first_source;              // row 0 of velocity belongs to this source
  int64_t begin_source, end_source;  // the sources that velocity holds, from 1 on
  Reduction reduce;
};

// Whether every row is one run of elements that begins at a multiple of `bytes`.
inline bool aligned_rows(const Tensor3& tensor, int64_t bytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(tensor.rows.data) |
                         static_cast<uintptr_t>(tensor.rows.row_stride) |
                         static_cast<uintptr_t>(tensor.sample_stride);
  return tensor.rows.dense && bits % static_cast<uintptr_t>(bytes) == 0;
}

// Calls body(Z{}, V{}) with the stored types of state and velocity.
template <class Body>
void with_types(DType state, DType velocity, const Body& body) {
  if (state == DType::float64) return body(double{}, double{});
  if (state == DType::float16) return body(Half{}, Half{});
  if (state == DType::bfloat16) return body(BFloat16{}, BFloat16{});
  if (velocity == DType::float16) return body(float{}, Half{});
  if (velocity == DType::bfloat16) return body(float{}, BFloat16{});
  return body(float{}, float{});
}

// Runs body(first, count) over the samples, at most `at_once` at a time.
template <class Body>
void in_groups(int64_t samples, int64_t at_once, const Body& body) {
  for (int64_t first = 0; first < samples; first += at_once)
    body(first, std::min(at_once, samples - first));
}

// The costs of all pairs, a group of samples at a time.
template <class Gpu>
class Costs {
 public:
  Costs(Gpu& gpu, const Problem& p)
      : gpu_(gpu),
        p_(p),
        tile_(p.state.rows.dtype == DType::float64 ? kTile<double> : kTile<float>),
        plan_(plan_cost(p.steps, p.samples, p.elements, tile_, gpu.device())),
        cells_(cells_of(p.begin_source, p.end_source)) {
    sums_ = static_cast<double*>(
        gpu.allocate(plan_.samples * plan_.splits * cells_ * static_cast<int64_t>(sizeof(double))));
  }

  int64_t group() const { return plan_.samples; }
  int64_t cells() const { return cells_; }
  SplitSums sums() const { return {sums_, cells_, plan_.splits, p_.elements, p_.begin_source}; }

  CostArgs args(int64_t first_sample) const {
    return {p_.state,        p_.velocity,     p_.teacher,
            p_.mask,         p_.times,        static_cast<int>(p_.elements),
            p_.first_source, p_.begin_source, p_.end_source,
            first_sample,    plan_.splits,    sums_};
  }

  // Fills the sums of samples [first, first + count).
  void compute(int64_t first, int64_t count) {
    const Grid grid{tiles_of(p_.begin_source, p_.end_source, tile_), plan_.splits, count};
    with_types(p_.state.rows.dtype, p_.velocity.rows.dtype, [&](auto z, auto v) {
      using Z = decltype(z);
      using V = decltype(v);
      const bool async = aligned_rows(p_.state, kCopyBytes) &&
                         aligned_rows(p_.velocity, kCopyBytes) &&
                         aligned_rows(p_.teacher, kCopyBytes);
      gpu_.launch(async ? cost_kernel<Z, V, true> : cost_kernel<Z, V, false>, grid, kCostThreads,
                  cost_shared_bytes<Z, V>, args(first));
    });
  }

  // The winners' own costs, after a reduction.
  void of_parents(const Parents& parents, const Numbers& best) {
    with_types(p_.state.rows.dtype, p_.velocity.rows.dtype, [&](auto z, auto v) {
      in_groups(p_.samples, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
        gpu_.launch(pair_cost_kernel<decltype(z), decltype(v)>, Grid{p_.end_source - 1, 1, count},
                    kPairThreads, plan_.splits * static_cast<int64_t>(sizeof(double)),
                    PairCostArgs{args(first), parents, best});
      });
    });
  }

 private:
  Gpu& gpu_;
  const Problem& p_;
  const Tile tile_;
  const Plan plan_;
  const int64_t cells_;
  double* sums_;
};

constexpr int64_t kSelectShared = kSelectThreads * (sizeof(double) + sizeof(int64_t));

// Moves the targets whose parents are among the problem's sources.
template <class Gpu>
void advance(Gpu& gpu, const Problem& p, const Parents& parents, const Tensor3& next, int64_t first,
             int64_t count, bool in_place) {
  const int64_t targets = in_place ? p.end_source - 1 : p.steps + 1;
  with_types(p.state.rows.dtype, p.velocity.rows.dtype, [&](auto z, auto v) {
    using Z = decltype(z);
    using V = decltype(v);
    constexpr int wide = 16 / sizeof(Z);
    const int64_t velocity_bytes = wide * static_cast<int64_t>(sizeof(V));
    const bool vector = p.elements % wide == 0 && aligned_rows(p.state, 16) &&
                        aligned_rows(next, 16) && aligned_rows(p.velocity, velocity_bytes);
    const int64_t columns = ceil_div(p.elements, vector ? wide : 1);
    const int64_t per_block = targets_per_block(targets, columns, count, in_place, gpu.device());
    const Grid grid{ceil_div(columns, kAdvanceThreads), ceil_div(targets, per_block), count};
    const AdvanceArgs args{p.state,        p.velocity, next,      p.times, parents, p.elements,
                           p.first_source, targets,    per_block, first,   in_place};
    if (vector)
      gpu.launch(advance_kernel<Z, V, wide>, grid, kAdvanceThreads, 0, args);
    else
      gpu.launch(advance_kernel<Z, V, 1>, grid, kAdvanceThreads, 0, args);
  });
}

// One step over the problem's sources. `more`: best and parents hold what smaller sources gave, and
// `next` is the state itself.
template <class Gpu>
void step(Gpu& gpu, const Problem& p, const Numbers& best, const Parents& parents,
          const Tensor3& next, bool more) {
  Costs<Gpu> costs(gpu, p);
  const int64_t targets = more ? p.end_source - 1 : p.steps + 1;
  const auto select = [&](const auto& offered, int64_t first, int64_t columns) {
    using Offered = std::decay_t<decltype(offered)>;
    gpu.launch(select_kernel<Offered>, Grid{targets, columns}, kSelectThreads, kSelectShared,
               SelectArgs<Offered>{offered, p.begin_source, p.end_source, first, p.samples,
                                   p.reduce, more, best, parents});
  };

  if (p.reduce == Reduction::none) {
    in_groups(p.samples, costs.group(), [&](int64_t first, int64_t count) {
      costs.compute(first, count);
      select(OfferedBySample{costs.sums(), p.mask, first}, first, count);
      advance(gpu, p, parents, next, first, count, more);
    });
    return;
  }
  double* const objective =
      static_cast<double*>(gpu.allocate(costs.cells() * static_cast<int64_t>(sizeof(double))));
  in_groups(p.samples, costs.group(), [&](int64_t first, int64_t count) {
    costs.compute(first, count);
    const Grid grid{ceil_div(p.end_source - 1, kSelectThreads), p.end_source - p.begin_source};
    gpu.launch(combine_kernel, grid, kSelectThreads, 0,
               CombineArgs{costs.sums(), p.mask, p.reduce, first, count, first == 0, objective});
  });
  select(OfferedTogether{objective, p.begin_source, p.samples}, 0, 1);
  costs.of_parents(parents, best);
  in_groups(p.samples, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
    advance(gpu, p, parents, next, first, count, more);
  });
}

// All costs, [N+1, N+1, B], inf where there is no pair or no live source.
template <class Gpu>
void means(Gpu& gpu, const Problem& p, double* out) {
  Costs<Gpu> costs(gpu, p);
  const int64_t rows = p.steps + 1;
  in_groups(p.samples, costs.group(), [&](int64_t first, int64_t count) {
    costs.compute(first, count);
    gpu.launch(means_kernel, Grid{ceil_div(rows, kSelectThreads), rows, count}, kSelectThreads, 0,
               MeansArgs{costs.sums(), p.mask, first, p.samples, rows, out});
  });
}

// The argmin over given costs.
template <class Gpu>
void select_costs(Gpu& gpu, const OfferedCosts& costs, int64_t rows, const Numbers& best,
                  const Parents& parents) {
  const int64_t columns = costs.reduce == Reduction::none ? costs.samples : 1;
  in_groups(columns, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
    gpu.launch(select_kernel<OfferedCosts>, Grid{rows, count}, kSelectThreads, kSelectShared,
               SelectArgs<OfferedCosts>{costs, 1, rows, first, costs.samples, costs.reduce, false,
                                        best, parents});
  });
  if (costs.reduce == Reduction::none) return;
  gpu.launch(pick_kernel, Grid{costs.samples, ceil_div(rows, kSelectThreads)}, kSelectThreads, 0,
             PickArgs{costs, parents, best, rows});
}

}  // namespace oss::cuda
