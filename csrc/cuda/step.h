// The operators as launches of the kernels, without torch: pointers in, results in memory. `Gpu`
// gives device(), allocate(bytes) -> workspace that lives until the operator ends, and
// launch(kernel, grid, threads, shared bytes, arguments); on the host it runs the kernels there.
// Nothing here waits for the device or depends on values in its memory.
#pragma once

#include <cstdint>

#include "cuda/advance.h"
#include "cuda/cost.h"
#include "cuda/launch.h"
#include "cuda/pair_cost.h"
#include "cuda/select.h"

namespace oss::cuda {

struct Grid {
  int64_t x, y = 1, z = 1;
};

// Candidates of pairs of a source and a target below it, and what they are compared with.
template <class Of>
struct Problem {
  int64_t steps;  // N
  int64_t samples;
  int64_t elements;
  Of of;
  Tensor3 target;
  Mask mask;
  int64_t begin_source, end_source;  // the sources that there are, from 1 on
  Reduction reduce;
};

// Whether every row is one run of elements that begins at a multiple of `bytes`.
inline bool aligned_rows(const Tensor3& tensor, int64_t bytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(tensor.rows.data) |
                         static_cast<uintptr_t>(tensor.rows.row_stride) |
                         static_cast<uintptr_t>(tensor.sample_stride);
  return tensor.rows.dense && bits % static_cast<uintptr_t>(bytes) == 0;
}

// Whether the cost pass can copy the rows as they are.
template <class Form>
bool can_copy(const typename Form::Of& of, const Tensor3& target) {
  bool can = aligned_rows(target, kCopyBytes);
  for (int r = 0; r < of.terms; ++r) {
    can = can && aligned_rows(of.tensor(r), kCopyBytes);
    can = can && (Form::euler || of.tensor(r).rows.dtype == target.rows.dtype);
  }
  return can;
}

// Runs body(first, count) over the samples, at most `at_once` at a time.
template <class Body>
void in_groups(int64_t samples, int64_t at_once, const Body& body) {
  for (int64_t first = 0; first < samples; first += at_once)
    body(first, std::min(at_once, samples - first));
}

// The costs of all pairs, of one order and a group of samples at a time.
template <class Gpu, class Of>
class Costs {
 public:
  Costs(Gpu& gpu, const Problem<Of>& p)
      : gpu_(gpu),
        p_(p),
        plan_(plan_cost(p.steps, p.samples, p.elements,
                        tile_of(true, p.target.rows.dtype == DType::float64 ? 8 : 4),
                        gpu.device())),
        cells_(cells_of(p.begin_source, p.end_source)) {
    sums_ = static_cast<double*>(
        gpu.allocate(plan_.samples * plan_.splits * cells_ * static_cast<int64_t>(sizeof(double))));
  }

  int64_t group() const { return plan_.samples; }
  int64_t cells() const { return cells_; }
  SplitSums sums() const { return {sums_, cells_, plan_.splits, p_.elements, p_.begin_source}; }

  // Fills the sums of samples [first, first + count).
  void compute(const Of& of, int64_t first, int64_t count) {
    with_form(of, [&](auto form) {
      using Form = decltype(form);
      // Euler's steps alone, because compiling takes time.
      constexpr bool gains = Form::euler && kShape<Form, true>.length > kShape<Form, false>.length;
      if (!can_copy<Form>(of, p_.target))
        compute_as<typename Form::Strided, false, false>(of, first, count);
      else if (gains && gpu_.device().shared_bytes >= kRoomyBytes)
        compute_as<Form, true, gains>(of, first, count);
      else
        compute_as<Form, true, false>(of, first, count);
    });
  }

  // The costs of the winners of an order, after a reduction.
  void of_winners(const Of& of, const Best& best) {
    with_form(of, [&](auto form) {
      using Form = typename decltype(form)::Strided;
      static_assert(pair_shared_bytes<Form>(kMaxSplits) <= kSharedBytes);
      const int warps = std::min(plan_.splits, kPairThreads / 32);
      in_groups(p_.samples, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
        gpu_.launch(pair_cost_kernel<Form>, Grid{p_.end_source - 1, 1, count}, 32 * warps,
                    pair_shared_bytes<Form>(plan_.splits),
                    PairCostArgs<Of>{args(of, first), best, warps});
      });
    });
  }

 private:
  CostArgs<Of> args(const Of& of, int64_t first_sample) const {
    return {of,
            p_.target,
            static_cast<int>(p_.elements),
            p_.begin_source,
            p_.end_source,
            first_sample,
            plan_.splits,
            sums_};
  }

  template <class Form, bool async, bool roomy>
  void compute_as(const Of& of, int64_t first, int64_t count) {
    constexpr Shape shape = kShape<Form, roomy>;
    const Grid grid{tiles_of(p_.begin_source, p_.end_source, shape.tile), plan_.splits, count};
    gpu_.launch(cost_kernel<Form, async, roomy>, grid, kCostThreads, shape.shared_bytes,
                args(of, first));
  }

  Gpu& gpu_;
  const Problem<Of>& p_;
  const Plan plan_;
  const int64_t cells_;
  double* sums_;
};

constexpr int64_t kSelectShared = kSelectThreads * (sizeof(double) + sizeof(int64_t));

// Walks the columns of samples [first, first + count).
template <class Column, class Gpu>
void walk(Gpu& gpu, const typename Column::Moves& moves, const Tensor3& next, int64_t elements,
          int64_t targets, int64_t first, int64_t count, bool in_place) {
  const int64_t columns = ceil_div(elements, Column::width);
  const int64_t per_block = targets_per_block(targets, columns, count, in_place, gpu.device());
  const Grid grid{ceil_div(columns, kAdvanceThreads), ceil_div(targets, per_block), count};
  gpu.launch(
      advance_kernel<Column>, grid, kAdvanceThreads, 0,
      AdvanceArgs<typename Column::Moves>{moves, next, elements, targets, per_block, first});
}

// Moves the targets whose parents are among the problem's sources.
template <class Gpu>
void advance(Gpu& gpu, const Problem<EulerSteps>& p, const Parents& parents, const Tensor3& next,
             int64_t first, int64_t count, bool in_place) {
  const int64_t targets = in_place ? p.end_source - 1 : p.steps + 1;
  with_form(p.of, [&](auto form) {
    using Z = typename decltype(form)::Z;
    using V = typename decltype(form)::V;
    constexpr int wide = 16 / sizeof(Z);
    const int64_t velocity_bytes = wide * static_cast<int64_t>(sizeof(V));
    const bool vector = p.elements % wide == 0 && aligned_rows(p.of.state, 16) &&
                        aligned_rows(next, 16) && aligned_rows(p.of.velocity, velocity_bytes);
    const EulerMoves moves{p.of, parents, in_place};
    if (vector)
      walk<EulerColumn<Z, V, wide>>(gpu, moves, next, p.elements, targets, first, count, in_place);
    else
      walk<EulerColumn<Z, V, 1>>(gpu, moves, next, p.elements, targets, first, count, in_place);
  });
}

// The sums that a combination names, for all samples.
template <class Gpu>
void combine(Gpu& gpu, const Combination& c, const Tensor3& next, int64_t elements,
             int64_t targets, int64_t samples) {
  with_stored(next.rows.dtype, [&](auto z) {
    using Z = decltype(z);
    constexpr int wide = 16 / sizeof(Z);
    bool vector = elements % wide == 0 && aligned_rows(next, 16);
    for (int r = 0; r < c.basis.terms; ++r) {
      const DType dtype = c.basis.tensors[r].rows.dtype;
      const bool half = dtype == DType::float16 || dtype == DType::bfloat16;
      vector = vector && aligned_rows(c.basis.tensors[r], half ? 2 * wide : 16);
    }
    in_groups(samples, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
      if (vector)
        walk<CombinedColumn<Z, wide>>(gpu, c, next, elements, targets, first, count, false);
      else
        walk<CombinedColumn<Z, 1>>(gpu, c, next, elements, targets, first, count, false);
    });
  });
}

// The argmin over the problem's candidates. `more`: `best` holds what smaller sources gave. Calls
// then(first, count) when the samples [first, first + count) are done.
template <class Gpu, class Of, class Then>
void improve(Gpu& gpu, const Problem<Of>& p, const Best& best, bool more, const Then& then) {
  Costs<Gpu, Of> costs(gpu, p);
  const int64_t targets = more ? p.end_source - 1 : p.steps + 1;
  const auto select = [&](const auto& offered, int64_t order, int64_t first, int64_t columns) {
    using Offered = std::decay_t<decltype(offered)>;
    gpu.launch(select_kernel<Offered>, Grid{targets, columns}, kSelectThreads, kSelectShared,
               SelectArgs<Offered>{offered, p.begin_source, p.end_source, first, p.samples,
                                   p.reduce, more, order, best});
  };
  // Orders one after the other, in the same memory: their sums are 4 times as large together. The
  // lowest comes last and wins ties.
  const auto for_orders = [&](const auto& body) {
    for (int order = p.of.orders - 1; order >= 0; --order) body(p.of.of_order(order));
  };

  if (p.reduce == Reduction::none) {
    in_groups(p.samples, costs.group(), [&](int64_t first, int64_t count) {
      for_orders([&](const Of& of) {
        costs.compute(of, first, count);
        select(OfferedBySample{costs.sums(), p.mask, first}, of.order, first, count);
      });
      then(first, count);
    });
    return;
  }
  double* const objective =
      static_cast<double*>(gpu.allocate(costs.cells() * static_cast<int64_t>(sizeof(double))));
  for_orders([&](const Of& of) {
    in_groups(p.samples, costs.group(), [&](int64_t first, int64_t count) {
      costs.compute(of, first, count);
      const Grid grid{ceil_div(p.end_source - 1, kSelectThreads), p.end_source - p.begin_source};
      gpu.launch(combine_kernel, grid, kSelectThreads, 0,
                 CombineArgs{costs.sums(), p.mask, p.reduce, first, count, first == 0, objective});
    });
    select(OfferedTogether{objective, p.begin_source, p.samples}, of.order, 0, 1);
    costs.of_winners(of, best);
  });
  in_groups(p.samples, kMaxSamplesPerLaunch, then);
}

// One step over the problem's sources. `more`: `best` holds what smaller sources gave, and `next`
// is the state itself.
template <class Gpu>
void step(Gpu& gpu, const Problem<EulerSteps>& p, const Best& best, const Tensor3& next,
          bool more) {
  improve(gpu, p, best, more, [&](int64_t first, int64_t count) {
    advance(gpu, p, best.parents, next, first, count, more);
  });
}

// All costs, [N+1, N+1, B], inf where there is no pair or no live source.
template <class Gpu>
void means(Gpu& gpu, const Problem<EulerSteps>& p, double* out) {
  Costs<Gpu, EulerSteps> costs(gpu, p);
  const int64_t rows = p.steps + 1;
  in_groups(p.samples, costs.group(), [&](int64_t first, int64_t count) {
    costs.compute(p.of, first, count);
    gpu.launch(means_kernel, Grid{ceil_div(rows, kSelectThreads), rows, count}, kSelectThreads, 0,
               MeansArgs{costs.sums(), p.mask, first, p.samples, rows, out});
  });
}

// The argmin over given costs.
template <class Gpu>
void select_costs(Gpu& gpu, const OfferedCosts& costs, int64_t rows, const Best& best) {
  const int64_t columns = costs.reduce == Reduction::none ? costs.samples : 1;
  in_groups(columns, kMaxSamplesPerLaunch, [&](int64_t first, int64_t count) {
    gpu.launch(select_kernel<OfferedCosts>, Grid{rows, count}, kSelectThreads, kSelectShared,
               SelectArgs<OfferedCosts>{costs, 1, rows, first, costs.samples, costs.reduce, false,
                                        0, best});
  });
  if (costs.reduce == Reduction::none) return;
  gpu.launch(pick_kernel, Grid{costs.samples, ceil_div(rows, kSelectThreads)}, kSelectThreads, 0,
             PickArgs{costs, best, rows});
}

}  // namespace oss::cuda
